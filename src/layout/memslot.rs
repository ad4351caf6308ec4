//! One memslot: a range of guest frames, the host memory behind it, and the piece of a guest_memfd bound to it.
//!
//! Plain values with no invariant between the fields; [`Layout::insert`](super::Layout::insert) is where a slot is held
//! against the rules. Mirrors `struct kvm_userspace_memory_region2` and `struct kvm_memory_slot`.

use std::fmt;

use crate::addr::{FilePage, FileRange, Gfn, GfnRange};
use crate::gmem::FileId;

/// A slot's address space and its id in it: the `slot` field of the ioctl, taken apart.
///
/// ```
/// use cvm_memory::layout::SlotId;
/// let slot = SlotId { as_id: 1, id: 0x23 };
/// assert_eq!(slot.raw(), 0x1_0023);
/// assert_eq!(SlotId::from_raw(0x1_0023), slot);
/// assert_eq!(slot.to_string(), "1:35");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId {
    /// Address space. A VM with private memory has only 0.
    pub as_id: u16,
    /// Id within the address space.
    pub id: u16,
}

impl SlotId {
    /// Slot `id` of address space 0.
    pub const fn new(id: u16) -> Self {
        Self { as_id: 0, id }
    }

    /// The `u32` that the ioctls and the dirty ring carry: `as_id << 16 | id`.
    pub const fn raw(self) -> u32 {
        let [id_low, id_high] = self.id.to_le_bytes();
        let [as_low, as_high] = self.as_id.to_le_bytes();
        u32::from_le_bytes([id_low, id_high, as_low, as_high])
    }

    /// The inverse of [`raw`](Self::raw). Every `u32` is some slot id, though perhaps none that a VM has.
    pub const fn from_raw(raw: u32) -> Self {
        let [id_low, id_high, as_low, as_high] = raw.to_le_bytes();
        Self { as_id: u16::from_le_bytes([as_low, as_high]), id: u16::from_le_bytes([id_low, id_high]) }
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.as_id, self.id)
    }
}

bitflags::bitflags! {
    /// The `flags` of a memslot, with KVM's values (`KVM_MEM_*`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct SlotFlags: u32 {
        /// Keep a dirty log. Never on a slot with a guest_memfd.
        const LOG_DIRTY = 1;
        /// Guest writes exit instead of reaching memory. Never on a slot with a guest_memfd.
        const READONLY = 2;
        /// Private accesses are served from a guest_memfd.
        const GUEST_MEMFD = 4;
    }
}

/// Where in a guest_memfd a slot's private memory lies. Its length is the slot's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileBinding {
    /// The file.
    pub file: FileId,
    /// The file page that backs the slot's first frame.
    pub start: FilePage,
}

/// One memslot.
///
/// ```
/// use cvm_memory::addr::{FilePage, Gfn, GfnRange};
/// use cvm_memory::layout::{FileBinding, FileId, Memslot, SlotFlags, SlotId};
///
/// let file = FileId::next();
/// let slot = Memslot {
///     id: SlotId::new(0),
///     gfns: GfnRange::from_bytes(0x100_0000, 0x1_0000)?,
///     hva: 0x7f00_0000_0000,
///     flags: SlotFlags::GUEST_MEMFD,
///     binding: Some(FileBinding { file, start: FilePage::containing(0x2_0000) }),
/// };
/// let gfn = Gfn::new(0x1004).unwrap();
/// assert_eq!(slot.hva_of(gfn), Some(0x7f00_0000_4000));
/// assert_eq!(slot.file_page_of(gfn), FilePage::new(0x24));
/// assert_eq!(slot.hva_of(slot.gfns.end()), None);
/// # Ok::<(), cvm_memory::addr::AddrError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Memslot {
    /// Address space and id.
    pub id: SlotId,
    /// The guest frames it covers.
    pub gfns: GfnRange,
    /// Host virtual address, in bytes, of the shared memory behind the first frame (`userspace_addr`).
    pub hva: u64,
    /// What the kernel is told about it.
    pub flags: SlotFlags,
    /// The guest_memfd behind it. `None` with [`SlotFlags::GUEST_MEMFD`] set: the file was closed under the slot.
    pub binding: Option<FileBinding>,
}

impl Memslot {
    /// The file and the pages of it that back this slot; `None` without a file, or if the range would not fit a file.
    pub fn file_range(&self) -> Option<(FileId, FileRange)> {
        let binding = self.binding?;
        let pages = FileRange::with_len(binding.start, self.gfns.pages()).ok()?;
        Some((binding.file, pages))
    }

    /// Host virtual address of `gfn`'s first byte; `None` if `gfn` is not in the slot.
    pub fn hva_of(&self, gfn: Gfn) -> Option<u64> {
        let pages = self.offset_of(gfn)?;
        // A page number times the page size always fits: `pages` is at most the slot's length.
        self.hva.checked_add(Gfn::new(pages)?.start_byte())
    }

    /// File page that backs `gfn`; `None` if `gfn` is not in the slot or no file is bound.
    pub fn file_page_of(&self, gfn: Gfn) -> Option<FilePage> {
        self.binding?.start.checked_add(self.offset_of(gfn)?)
    }

    /// Pages from the slot's first frame to `gfn`: the `offset` of a dirty ring entry.
    pub fn offset_of(&self, gfn: Gfn) -> Option<u64> {
        if self.gfns.contains(gfn) { gfn.pages_from(self.gfns.start()) } else { None }
    }
}

/// A byte count in the largest binary unit that divides it.
pub(crate) struct Size(pub(crate) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shift, unit) = match self.0.trailing_zeros() {
            _ if self.0 == 0 => (0, "B"),
            40.. => (40, "TiB"),
            30.. => (30, "GiB"),
            20.. => (20, "MiB"),
            10.. => (10, "KiB"),
            _ => (0, "B"),
        };
        write!(f, "{} {unit}", self.0 >> shift)
    }
}

impl fmt::Display for Memslot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (start, end) = (self.gfns.start_byte(), self.gfns.end_byte());
        write!(f, "slot {} gpa [{start:#x}, {end:#x}) {}", self.id, Size(self.gfns.bytes()))?;
        write!(f, " hva {:#x}", self.hva)?;
        match self.binding {
            Some(FileBinding { file, start }) => write!(f, " file {file} at {:#x}", start.start_byte())?,
            None if self.flags.contains(SlotFlags::GUEST_MEMFD) => f.write_str(" file closed")?,
            None => {}
        }
        if self.flags.contains(SlotFlags::READONLY) {
            f.write_str(" readonly")?;
        }
        if self.flags.contains(SlotFlags::LOG_DIRTY) {
            f.write_str(" log-dirty")?;
        }
        Ok(())
    }
}
