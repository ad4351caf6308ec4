//! Adding and removing slots.
//!
//! Checked against the layout first, with a precise reason, because KVM's errno has several meanings; then carried out
//! in an order in which no vCPU can see half of it, with everything undone if a call fails. Mirrors
//! `KVM_SET_USER_MEMORY_REGION2` (`kvm_set_memory_region()`): CREATE and DELETE only, since a slot with a guest_memfd
//! knows nothing else.
#![allow(unsafe_code, reason = "the one place that hands KVM an address, and it comes from a `SharedBacking`")]

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use nix::errno::Errno;

use crate::addr::{AddrError, FilePage, FileRange, Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, subtract_lists};
use crate::backing::{SharedSlice, Space};
use crate::convert::{LockError, Outcome, StepError};
use crate::edit::{PlanError, Reason, Refused, Region};
use crate::gmem::{FileId, GmemFlags, GuestMemfd};
use crate::hypervisor::MemoryRegion;
use crate::layout::{FileBinding, LayoutError, Memslot, SlotFlags, SlotId};
use crate::page_set::PageSetError;

use super::{CommitOptions, CvmMemory, EditError, Materialise};

/// What has a name here keeps it.
impl From<EditError> for SlotError {
    fn from(error: EditError) -> Self {
        match error {
            EditError::Refused(Refused { reason: Reason::UnknownSlot { id }, .. }) => {
                Self::Layout(LayoutError::UnknownSlot { id })
            }
            EditError::Plan(PlanError::Layout(error)) => Self::Layout(error),
            EditError::Locked(error) => Self::Locked(error),
            EditError::Step { gfns, error } => Self::Step { gfns, error },
            EditError::Kvm { slot, gfns, errno, .. } => Self::Kvm { slot, gfns, errno },
            other => Self::Edit(Box::new(other)),
        }
    }
}

/// A slot to be added.
#[derive(Debug, Clone)]
pub struct SlotSpec {
    /// Its id, or `None` for the lowest one that is free.
    pub id: Option<SlotId>,
    /// First byte, in guest physical address space.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// Its shared memory, at least `size` bytes.
    pub shared: SharedSlice,
    /// Its private memory, from this page of the file on, or `None` for memory that is never private.
    pub private: Option<(Arc<GuestMemfd>, FilePage)>,
    /// Flags besides `KVM_MEM_GUEST_MEMFD`, which follows from `private`.
    pub flags: SlotFlags,
}

impl SlotSpec {
    /// The whole pages of memory that begins and ends anywhere, `size` bytes at `gpa`; `None` if it has none. `shared` is
    /// where its first byte lies, and `private` the byte offset of that in a file: both go along with what is cut off.
    ///
    /// # Errors
    /// [`AddrError::Unaligned`] if its first whole page begins within a page of the file, of which a slot has whole ones;
    /// [`AddrError::BeyondTop`] if addresses or offsets wrap.
    ///
    /// ```
    /// use cvm_memory::backing::{SharedMemory, SharedSlice};
    /// use cvm_memory::layout::SlotFlags;
    /// use cvm_memory::memory::SlotSpec;
    /// use std::sync::Arc;
    ///
    /// let shared = SharedSlice { backing: Arc::new(SharedMemory::new(0x8000)?), offset: 0x800 };
    /// let slot = SlotSpec::whole_pages(0x1800, 0x3000, shared, None, SlotFlags::empty())?.unwrap();
    /// assert_eq!((slot.gpa, slot.size, slot.shared.offset), (0x2000, 0x2000, 0x1000));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn whole_pages(
        gpa: u64,
        size: u64,
        shared: SharedSlice,
        private: Option<(Arc<GuestMemfd>, u64)>,
        flags: SlotFlags,
    ) -> Result<Option<Self>, AddrError> {
        let beyond = |start| AddrError::BeyondTop { start, size };
        let end = gpa.checked_add(size).ok_or(beyond(gpa))? >> PAGE_SHIFT << PAGE_SHIFT;
        let Some(start) = gpa.checked_next_multiple_of(PAGE_SIZE).filter(|start| *start < end) else { return Ok(None) };
        let (skip, size) = (start.saturating_sub(gpa), end.saturating_sub(start));
        let further = |offset: u64| offset.checked_add(skip).ok_or(beyond(offset));
        let shared = SharedSlice { offset: further(shared.offset)?, ..shared };
        let private = match private {
            Some((file, offset)) => Some((file, FileRange::from_bytes(further(offset)?, size)?.start())),
            None => None,
        };
        Ok(Some(Self { id: None, gpa: start, size, shared, private, flags }))
    }

    /// Whether its pages can change state: they have a private side, and the file did not start out shared.
    pub(super) fn is_convertible(&self) -> bool {
        self.private.as_ref().is_some_and(|(file, _)| !file.flags().contains(GmemFlags::INIT_SHARED))
    }

    /// Its memory, at the frames that it asks for.
    pub(super) fn region(&self, gfns: GfnRange) -> Region {
        let (hva, mapping) = (self.shared.hva(), self.shared.backing.hva());
        let binding = self.private.as_ref().map(|(file, start)| FileBinding { file: file.id(), start: *start });
        let flags = if binding.is_some() { self.flags | SlotFlags::GUEST_MEMFD } else { self.flags };
        Region { gfns, hva, mapping, flags, binding }
    }
}

/// Why a slot could not be added or removed. Unless it says otherwise, everything is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Address or size is empty, unaligned or beyond the top.
    #[error("slot at {gpa:#x}, {size:#x} bytes")]
    Range {
        /// First byte.
        gpa: u64,
        /// In bytes.
        size: u64,
        /// Why.
        #[source]
        error: AddrError,
    },
    /// The shared memory is shorter than the slot.
    #[error("slot at {gpa:#x}: its {size:#x} bytes at offset {offset:#x} exceed the shared memory's {available:#x}")]
    SharedTooShort {
        /// First byte.
        gpa: u64,
        /// In bytes.
        size: u64,
        /// In bytes.
        offset: u64,
        /// In bytes.
        available: u64,
    },
    /// The layout does not admit it.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The dirty bits of its memory could not be kept.
    #[error("keep the dirty bits of slot {slot:#x}")]
    Harvest {
        /// The slot, as KVM numbers it.
        slot: u32,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// Page state, pins and listeners know address space 0 only.
    #[error("slot {id} is not in address space 0")]
    AddressSpace {
        /// The slot.
        id: SlotId,
    },
    /// They have shared memory in common, and one of them can change state: what a conversion there frees would be missing in
    /// the other.
    #[error("slots {one} and {other} have shared memory in common")]
    SharedTwice {
        /// A slot.
        one: SlotId,
        /// Another one.
        other: SlotId,
    },
    /// Frames that were to be left to devices have a slot.
    #[error("gfns {gfns} are memory")]
    IsMemory {
        /// The first of them.
        gfns: GfnRange,
    },
    /// Every id is taken.
    #[error("no slot id is free below {limit}")]
    NoFreeId {
        /// How many there are.
        limit: u32,
    },
    /// Frames of memory that never is private were private memory before, and nobody has made them shared: no access to
    /// them could succeed. Convert them before their slot goes.
    #[error("slot {slot:#x} has no private side, but its gfns {gfns} are private")]
    StillPrivate {
        /// The slot, as KVM numbers it.
        slot: u32,
        /// The first such frames.
        gfns: GfnRange,
    },
    /// Pages of a file were at other frames, and this platform remembers that until they are freed: the guest would fault on
    /// them for ever. Add them by an [edit](CvmMemory::edit) that frees them first
    /// ([`free_rebound`](super::CommitOptions::free_rebound)): of holes that somebody else punches nobody here hears.
    #[error("slot {slot:#x} has pages {pages} of guest_memfd {file} at gfn {wanted}, which were at gfn {was}")]
    Rebound {
        /// The slot, as KVM numbers it.
        slot: u32,
        /// The file.
        file: FileId,
        /// The first such pages.
        pages: FileRange,
        /// The frame of the first of them.
        was: Gfn,
        /// Where it would be now.
        wanted: Gfn,
    },
    /// The record of page state does not reach so far: see [`Builder::address_limit`](super::Builder::address_limit).
    #[error("slot at gfns {gfns}")]
    Record {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        error: PageSetError,
    },
    /// A conversion is in the way, or a device access that does not end.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// A step around the slot failed: an attribute, a listener, memory to be freed first.
    #[error("slot at gfns {gfns}")]
    Step {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        error: StepError,
    },
    /// A slot is bound to the file.
    #[error("guest_memfd {file} is bound to a slot")]
    FileInUse {
        /// The file.
        file: FileId,
    },
    /// The edit was not carried out for another reason.
    #[error(transparent)]
    Edit(Box<EditError>),
    /// KVM refused a slot that should have been fine.
    #[error("set slot {slot:#x}, gfns {gfns}")]
    Kvm {
        /// The slot, as KVM numbers it.
        slot: u32,
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        errno: Errno,
    },
}

impl CvmMemory {
    /// Adds slots, all of them or none. New memory starts in the initial state; memory that was there before, in the
    /// state it had.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn add_slots(&self, specs: Vec<SlotSpec>) -> Result<Vec<SlotId>, SlotError> {
        let mut frames = self.editing()?;
        let current = self.converter.space().clone();
        let mut next = Space::clone(&current);
        let added = resolve(specs, &current)?;
        let slots: Vec<Memslot> = added.iter().map(|(slot, ..)| *slot).collect();
        let files: Vec<Option<Arc<GuestMemfd>>> = added.iter().map(|(_, _, file)| file.clone()).collect();
        next.insert(added)?;
        if let Some(slot) = slots.iter().find(|slot| slot.id.as_id != 0) {
            return Err(SlotError::AddressSpace { id: slot.id });
        }
        if let Some((one, other)) = next.shared_twice() {
            return Err(SlotError::SharedTwice { one, other });
        }
        for slot in &slots {
            self.check_record(slot, &next).map_err(|error| SlotError::Record { gfns: slot.gfns, error })?;
        }
        let hull = slots.iter().map(|slot| slot.gfns).reduce(|a, b| a.hull(&b));
        let Some(hull) = hull else { return Ok(Vec::new()) };
        // What is no memory yet has no pins; those of memory in between do not matter.
        let _guard = self.converter.hold(hull)?;
        if let Some(harvester) = self.harvester() {
            for (slot, slice) in slots.iter().filter_map(|slot| Some((slot, next.shared(slot.id)?))) {
                let failed = |errno| SlotError::Harvest { slot: slot.id.raw(), errno };
                harvester.memory(&slice.backing).map_err(failed)?;
            }
        }
        for slot in slots.iter().filter(|slot| !next.is_convertible(slot)) {
            if let Some(gfns) = self.converter.declared().member_runs(slot.gfns).next() {
                return Err(SlotError::StillPrivate { slot: slot.id.raw(), gfns });
            }
        }
        let hazards = self.platform().hazards;
        let rebound = |slot: &Memslot| frames.rebound(slot).into_iter().next().map(|pages| (slot.id.raw(), pages));
        if hazards.pages_keep_their_frame
            && let Some((slot, (file, pages, was, wanted))) = slots.iter().find_map(rebound)
        {
            return Err(SlotError::Rebound { slot, file, pages, was, wanted });
        }
        let mut undo = Undo {
            memory: self,
            space: next.clone(),
            fresh: Vec::new(),
            sealed: Vec::new(),
            created: Vec::new(),
            armed: true,
        };
        for slot in slots.iter().filter(|_| hazards.holes_stick) {
            let told: Vec<GfnRange> = self.converter.materialised().member_runs(slot.gfns).collect();
            let own: Vec<GfnRange> = self.converter.declared().member_runs(slot.gfns).collect();
            undo.sealed.extend(subtract_lists(&told, &own));
        }
        for slot in slots.iter().filter(|slot| next.is_convertible(slot)) {
            let fresh: Vec<GfnRange> = self.known.differing_runs(slot.gfns, true).collect();
            for gfns in fresh {
                let record = |error| SlotError::Record { gfns, error };
                undo.fresh.push(gfns);
                self.known.insert(gfns).map_err(record)?;
                self.converter.declare_locked(gfns, self.initial).map_err(record)?;
            }
            // Before the slot exists, so that no vCPU sees it half done, and nothing has to be unmapped.
            if self.materialise == Materialise::Eager
                && let Outcome::RolledBack { cause: error } | Outcome::Poisoned { cause: error, .. } =
                    self.converter.materialise_locked(slot.gfns, &next)
            {
                return Err(SlotError::Step { gfns: slot.gfns, error });
            }
        }
        if let Some(harvester) = self.harvester() {
            harvester.expect(next.layout());
        }
        for (slot, file) in slots.iter().zip(&files) {
            self.set_region(slot, slot.gfns.bytes(), file.as_deref())?;
            undo.created.push(*slot);
            // Its guest may use it from here on, even if it goes again.
            frames.bound(slot);
            // Not before: as long as there was no slot, somebody could have found a hole.
            if hazards.holes_stick {
                let gfns = slot.gfns;
                self.converter.unseal_locked(gfns).map_err(|error| SlotError::Step { gfns, error })?;
            }
        }
        let published = next.clone();
        self.converter.publish_space(next);
        for slot in &slots {
            if let Err(error) = self.converter.announce_locked(slot.gfns, &published, true) {
                let before = slots.iter().take_while(|other| other.id != slot.id);
                for slot in before {
                    // Unmapping cannot fail.
                    let _unmapped = self.converter.announce_locked(slot.gfns, &published, false);
                }
                self.converter.publish_space(Space::clone(&current));
                return Err(SlotError::Step { gfns: slot.gfns, error });
            }
        }
        undo.armed = false;
        self.tell_edited();
        Ok(slots.iter().map(|slot| slot.id).collect())
    }

    /// Removes a slot: an [edit](Self::edit) of that one deletion. The state of its pages is remembered, and so are its
    /// file's pages, where the platform does not destroy them with their slot; what deferred discards have left there is
    /// freed first, and a dirty log is harvested with every vCPU outside the guest.
    ///
    /// The guest sees it go: keep its vCPUs away, or know what they do without that memory.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn remove_slot(&self, id: SlotId) -> Result<(), SlotError> {
        let mut edit = self.edit();
        edit.delete_slot(id)?;
        self.converter.counters().naive.set_user_memory_region2.add(1);
        edit.commit(&CommitOptions { lose_private: true, ..CommitOptions::default() })?;
        Ok(())
    }

    /// Lets devices be where memory was. Forgets the state of `gfns`, none of which has a slot: they are shared to KVM, and
    /// memory that comes there begins anew.
    ///
    /// Only needed where a hole is remembered as a device ([`Hazards::holes_stick`](crate::hypervisor::Hazards::holes_stick)).
    /// Memory that goes is kept private to KVM there, so an access is a memory fault and never device input or output. Once a
    /// device has been at a frame, no memory can be: its guest would go on finding the device.
    ///
    /// # Errors
    /// [`SlotError::IsMemory`]; [`SlotError::Step`] if KVM refuses, and then it can be tried again.
    pub fn leave_to_devices(&self, gfns: GfnRange) -> Result<(), SlotError> {
        let _editing = self.editing()?;
        if let Some(slot) = self.space().layout().table().space(0).first_overlap(gfns) {
            return Err(SlotError::IsMemory { gfns: slot.gfns.intersection(&gfns).unwrap_or(gfns) });
        }
        // What the record does not reach has no state.
        let reach = GfnRange::with_len(Gfn::ZERO, self.known.capacity()).ok();
        let Some(gfns) = reach.and_then(|reach| reach.intersection(&gfns)) else { return Ok(()) };
        let _guard = self.converter.hold(gfns)?;
        self.converter.forget_locked(gfns).map_err(|error| SlotError::Step { gfns, error })?;
        self.known.remove(gfns).map_err(|error| SlotError::Record { gfns, error })
    }

    /// Lets go of a file that no slot is bound to any more: its pages are freed when its last owner drops it.
    ///
    /// # Errors
    /// [`SlotError::FileInUse`] while a slot is bound to it.
    pub fn release_file(&self, file: FileId) -> Result<(), SlotError> {
        let _editing = self.editing()?;
        let mut next = Space::clone(&self.converter.space());
        if next.layout().bindings(file).is_some_and(|bindings| !bindings.is_empty()) {
            return Err(SlotError::FileInUse { file });
        }
        next.release_file(file);
        self.converter.publish_space(next);
        Ok(())
    }

    /// Removes every slot, last one first, whatever fails on the way. For teardown: nobody else is about.
    pub(super) fn remove_all_slots(&mut self) {
        // Listeners and backings are foreign code. Should one panic, the slots that are left keep their memory for ever.
        let current = ManuallyDrop::new(self.converter.space().clone());
        let slots: Vec<Memslot> = current.layout().table().slots().copied().collect();
        for slot in slots.iter().rev() {
            let freed = self.converter.settle_locked(slot.gfns);
            let unmapped = self.converter.announce_locked(slot.gfns, &current, false);
            if let Some(error) = freed.err().or(unmapped.err()) {
                tracing::warn!(%error, slot = slot.id.raw(), "memory left behind");
            }
            if let Err(error) = self.set_region(slot, 0, None) {
                keep_for_ever(&error, current.shared(slot.id));
                tracing::warn!(%error, "slot left behind");
            }
        }
        drop(ManuallyDrop::into_inner(current));
    }

    /// `KVM_SET_USER_MEMORY_REGION2`; size zero deletes.
    fn set_region(&self, slot: &Memslot, size: u64, file: Option<&GuestMemfd>) -> Result<(), SlotError> {
        self.converter.counters().naive.set_user_memory_region2.add(1);
        let kvm = |errno| SlotError::Kvm { slot: slot.id.raw(), gfns: slot.gfns, errno };
        self.call_region(slot, size, file).map_err(kvm)
    }

    /// The call itself. The memory of `slot` is that of a [`SharedSlice`] which the space before or after the call owns.
    pub(super) fn call_region(&self, slot: &Memslot, size: u64, file: Option<&GuestMemfd>) -> Result<(), Errno> {
        self.converter.counters().issued.set_user_memory_region2.add(1);
        let region = MemoryRegion {
            slot: slot.id.raw(),
            flags: slot.flags.bits(),
            guest_phys_addr: slot.gfns.start_byte(),
            memory_size: size,
            userspace_addr: slot.hva,
            guest_memfd_offset: slot.binding.map_or(0, |binding| binding.start.start_byte()),
            guest_memfd: file.map_or(-1, |file| file.as_fd().as_raw_fd()),
        };
        // SAFETY: the address range lies within the slot's `SharedBacking` (checked by `resolve`, or by the edit), which is
        // memory for the guest while it lives; the space published next, and so `self`, keeps it until the slot has been
        // deleted.
        unsafe { self.converter.hypervisor().set_user_memory_region2(&region) }
    }
}

/// Takes back what an addition has done so far, last first.
struct Undo<'a> {
    memory: &'a CvmMemory,
    /// With the memory of the slots that were to be added.
    space: Space,
    /// Frames in the state in which holes are kept.
    sealed: Vec<GfnRange>,
    fresh: Vec<GfnRange>,
    created: Vec<Memslot>,
    armed: bool,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        self.seal();
        for slot in self.created.iter().rev() {
            if let Err(error) = self.memory.set_region(slot, 0, None) {
                keep_for_ever(&error, self.space.shared(slot.id));
                tracing::error!(%error, "a slot that was not wanted stays");
            }
        }
        for &gfns in self.fresh.iter().rev() {
            let forgotten = self.memory.converter.forget_locked(gfns);
            let unknown = self.memory.known.remove(gfns);
            if let Err(error) = forgotten {
                tracing::error!(%error, "an attribute that was not wanted stays");
            }
            if let Err(error) = unknown {
                tracing::error!(%error, "memory that was not wanted stays known");
            }
        }
        // What was forgotten may have been a hole before.
        self.seal();
        self.memory.tell_edited();
    }
}

impl Undo<'_> {
    fn seal(&self) {
        for &gfns in &self.sealed {
            if let Err(error) = self.memory.converter.seal_locked(gfns) {
                tracing::error!(%error, "a hole stays that the guest may take for a device");
            }
        }
    }
}

/// A slot could not be deleted, so the guest may still reach its memory: that must never be unmapped. `EIO` is the answer
/// of a VM that is dead, or of another process's: no guest reaches anything through those.
fn keep_for_ever(error: &SlotError, shared: Option<&SharedSlice>) {
    if !matches!(error, SlotError::Kvm { errno: Errno::EIO, .. }) {
        std::mem::forget(shared.cloned());
    }
}

type Added = (Memslot, SharedSlice, Option<Arc<GuestMemfd>>);

/// Slots as asked for, with ids and addresses; checked as far as one slot goes.
fn resolve(specs: Vec<SlotSpec>, space: &Space) -> Result<Vec<Added>, SlotError> {
    let limit = space.layout().limits().slots_per_address_space;
    let mut taken: Vec<SlotId> = space.layout().table().slots().map(|slot| slot.id).collect();
    taken.extend(specs.iter().filter_map(|spec| spec.id));
    taken.sort_unstable();
    let mut candidates = (0..u16::try_from(limit).unwrap_or(u16::MAX))
        .map(|id| SlotId { as_id: 0, id })
        .filter(|id| taken.binary_search(id).is_err());
    let mut slots = Vec::with_capacity(specs.len());
    for spec in specs {
        let SlotSpec { gpa, size, .. } = spec;
        let gfns = GfnRange::from_bytes(gpa, size).map_err(|error| SlotError::Range { gpa, size, error })?;
        if !spec.shared.holds(size) {
            let (offset, available) = (spec.shared.offset, spec.shared.backing.size());
            return Err(SlotError::SharedTooShort { gpa, size, offset, available });
        }
        let id = match spec.id {
            Some(id) => id,
            None => candidates.next().ok_or(SlotError::NoFreeId { limit })?,
        };
        if let Some((_, start)) = &spec.private {
            FileRange::with_len(*start, gfns.pages()).map_err(|error| SlotError::Range { gpa, size, error })?;
        }
        let slot = spec.region(gfns).slot(id);
        slots.push((slot, spec.shared, spec.private.map(|(file, _)| file)));
    }
    Ok(slots)
}
