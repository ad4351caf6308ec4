//! Why a slot is refused, and the checks that need no other slot.

use super::{BindError, FileId, Limits, Memslot, SlotFlags, SlotId};
use crate::addr::{AddrError, FileRange, Gfn, GfnRange, PAGE_SIZE};

/// Why a change to a [`Layout`](super::Layout) is refused.
///
/// KVM answers most of these with `EINVAL` and two with `EEXIST`; the reason is lost in either. Here each has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The id is not below [`Limits::slots_per_address_space`].
    #[error("slot {id}: ids end below {limit}")]
    IdTooHigh {
        /// The slot.
        id: SlotId,
        /// The limit.
        limit: u32,
    },
    /// A flag that no slot has.
    #[error("slot {id}: unknown flags {unknown:#x}")]
    UnknownFlags {
        /// The slot.
        id: SlotId,
        /// The bits without a meaning.
        unknown: u32,
    },
    /// KVM keeps no dirty log of a slot with a guest_memfd.
    #[error("slot {id}: a slot with a guest_memfd has no dirty log")]
    LogDirtyWithGuestMemfd {
        /// The slot.
        id: SlotId,
    },
    /// A slot with a guest_memfd is never read-only.
    #[error("slot {id}: a slot with a guest_memfd is not read-only")]
    ReadonlyWithGuestMemfd {
        /// The slot.
        id: SlotId,
    },
    /// The VM has no read-only slots.
    #[error("slot {id}: this vm has no read-only slots")]
    ReadonlyUnsupported {
        /// The slot.
        id: SlotId,
    },
    /// [`SlotFlags::GUEST_MEMFD`] without a binding.
    #[error("slot {id}: flagged for a guest_memfd but bound to none")]
    FlagWithoutBinding {
        /// The slot.
        id: SlotId,
    },
    /// A binding without [`SlotFlags::GUEST_MEMFD`].
    #[error("slot {id}: bound to guest_memfd {file} but not flagged for it")]
    BindingWithoutFlag {
        /// The slot.
        id: SlotId,
        /// The file.
        file: FileId,
    },
    /// No pages. To KVM that would be the removal of the slot.
    #[error("slot {id}: no pages at gfn {at}")]
    Empty {
        /// The slot.
        id: SlotId,
        /// Where it would be.
        at: Gfn,
    },
    /// The host address is not a multiple of 4096.
    #[error("slot {id}: host address {hva:#x} is not page aligned")]
    UnalignedHva {
        /// The slot.
        id: SlotId,
        /// The address in bytes.
        hva: u64,
    },
    /// Host address plus size wraps or exceeds [`Limits::hva_end`].
    #[error("slot {id}: {size:#x} bytes from host address {hva:#x} end beyond {limit:#x}")]
    HvaBeyondEnd {
        /// The slot.
        id: SlotId,
        /// The address in bytes.
        hva: u64,
        /// The slot's size in bytes.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// Offset plus size is beyond what any file can have.
    #[error("slot {id}: no file has these pages")]
    FileRange {
        /// The slot.
        id: SlotId,
        /// The sum that failed.
        #[source]
        source: AddrError,
    },
    /// The address space is not below [`Limits::address_spaces`].
    #[error("slot {id}: the vm has {count} address spaces")]
    NoSuchAddressSpace {
        /// The slot.
        id: SlotId,
        /// How many there are.
        count: u16,
    },
    /// More pages than [`Limits::pages_per_slot`].
    #[error("slot {id}: {pages:#x} pages are more than {limit:#x}")]
    TooLarge {
        /// The slot.
        id: SlotId,
        /// Its length.
        pages: u64,
        /// The limit.
        limit: u64,
    },
    /// Another slot has this id. Changing a slot is removing it and adding one.
    #[error("slot {id}: the id is in use at gfns {gfns}")]
    IdInUse {
        /// The id.
        id: SlotId,
        /// Where the slot with this id is.
        gfns: GfnRange,
    },
    /// Another slot of the address space covers one of the frames.
    #[error("slot {id}: gfns {common} belong to slot {with} already")]
    GfnOverlap {
        /// The slot.
        id: SlotId,
        /// The slot that is there.
        with: SlotId,
        /// The frames both want.
        common: GfnRange,
    },
    /// The file was never registered, or is closed.
    #[error("slot {id}: no guest_memfd {file}")]
    UnknownFile {
        /// The slot.
        id: SlotId,
        /// The file.
        file: FileId,
    },
    /// The frames reach beyond [`Limits::top`].
    #[error("slot {id}: gfns {gfns} end beyond {top}")]
    AboveTop {
        /// The slot.
        id: SlotId,
        /// Its frames.
        gfns: GfnRange,
        /// The limit, exclusive.
        top: Gfn,
    },
    /// The file pages cannot be bound, or the file cannot exist.
    #[error("guest_memfd {file}")]
    Bind {
        /// The file.
        file: FileId,
        /// What is wrong with the pages.
        #[source]
        source: BindError,
    },
    /// A file with this identity is registered already.
    #[error("guest_memfd {file} is registered already")]
    FileKnown {
        /// The file.
        file: FileId,
    },
    /// There is no such slot.
    #[error("no slot {id}")]
    UnknownSlot {
        /// The id.
        id: SlotId,
    },
}

impl LayoutError {
    pub(super) fn overlap(slot: &Memslot, held: &Memslot) -> Self {
        let common = slot.gfns.intersection(&held.gfns).unwrap_or(GfnRange::empty_at(slot.gfns.start()));
        Self::GfnOverlap { id: slot.id, with: held.id, common }
    }
}

/// What can be said of a slot without looking at the others, in KVM's order.
pub(super) fn check_alone(limits: &Limits, slot: &Memslot) -> Result<(), LayoutError> {
    let Memslot { id, gfns, hva, .. } = *slot;
    if u32::from(id.id) >= limits.slots_per_address_space {
        return Err(LayoutError::IdTooHigh { id, limit: limits.slots_per_address_space });
    }
    check_flags(limits, slot)?;
    if gfns.is_empty() {
        return Err(LayoutError::Empty { id, at: gfns.start() });
    }
    if hva & PAGE_SIZE.saturating_sub(1) != 0 {
        return Err(LayoutError::UnalignedHva { id, hva });
    }
    if hva.checked_add(gfns.bytes()).is_none_or(|end| end > limits.hva_end) {
        return Err(LayoutError::HvaBeyondEnd { id, hva, size: gfns.bytes(), limit: limits.hva_end });
    }
    if let Some(binding) = slot.binding {
        FileRange::with_len(binding.start, gfns.pages()).map_err(|source| LayoutError::FileRange { id, source })?;
    }
    if id.as_id >= limits.address_spaces {
        return Err(LayoutError::NoSuchAddressSpace { id, count: limits.address_spaces });
    }
    if gfns.pages() > limits.pages_per_slot {
        return Err(LayoutError::TooLarge { id, pages: gfns.pages(), limit: limits.pages_per_slot });
    }
    Ok(())
}

/// That the guest can address every frame. KVM's architecture code asks this late, after overlaps.
pub(super) fn check_top(limits: &Limits, slot: &Memslot) -> Result<(), LayoutError> {
    if slot.gfns.end() > limits.top {
        return Err(LayoutError::AboveTop { id: slot.id, gfns: slot.gfns, top: limits.top });
    }
    Ok(())
}

fn check_flags(limits: &Limits, slot: &Memslot) -> Result<(), LayoutError> {
    let Memslot { id, flags, binding, .. } = *slot;
    let unknown = flags.bits() & !SlotFlags::all().bits();
    if unknown != 0 {
        return Err(LayoutError::UnknownFlags { id, unknown });
    }
    let private = flags.contains(SlotFlags::GUEST_MEMFD);
    match (private, binding) {
        (true, None) => return Err(LayoutError::FlagWithoutBinding { id }),
        (false, Some(binding)) => return Err(LayoutError::BindingWithoutFlag { id, file: binding.file }),
        _ => {}
    }
    if private && flags.contains(SlotFlags::LOG_DIRTY) {
        return Err(LayoutError::LogDirtyWithGuestMemfd { id });
    }
    if private && flags.contains(SlotFlags::READONLY) {
        return Err(LayoutError::ReadonlyWithGuestMemfd { id });
    }
    if flags.contains(SlotFlags::READONLY) && !limits.readonly {
        return Err(LayoutError::ReadonlyUnsupported { id });
    }
    Ok(())
}
