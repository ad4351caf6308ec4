//! Guest memory as devices see it: what is shared of it, through the traits of `vm-memory`.
//!
//! A virtio queue, or any device model that is written for [`GuestMemory`], runs on a [`SharedView`] as it is. What it is
//! given is pinned: a page whose slice it holds stays shared, and a conversion waits for it. A page that is private, or no
//! memory, is an error ([`AccessError`](crate::memory::AccessError)) and never bytes, and so is a write to read-only memory.
//! What it writes is told to whoever [keeps dirty bits](CvmMemory::set_harvest).
//!
//! It is not for the VMM's own accesses ([`CvmMemory::read`] and [`write`](CvmMemory::write) say more when they refuse), and
//! no way into private memory. Devices that reach memory by themselves, without asking for each access, are
//! [listeners](crate::convert::Listener).
#![allow(unsafe_code, reason = "makes volatile slices of memory that is kept mapped by what goes with them")]

use std::fmt;
use std::io;
use std::iter::FusedIterator;
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::addr::Gpa;
use crate::backing::SharedSlice;
use crate::convert::Pin;
use crate::layout::SlotFlags;
use crate::memory::{CvmMemory, Part};

/// The shared part of a VM's memory. Cheap to clone.
///
/// ```
/// use cvm_memory::addr::GfnRange;
/// use cvm_memory::convert::{Outcome, Request, State};
/// use cvm_memory::memory::CvmMemory;
/// use cvm_memory::soft::SoftVm;
/// use cvm_memory::view::SharedView;
/// use std::sync::Arc;
/// use vm_memory::{Bytes, GuestAddress};
///
/// let memory = CvmMemory::builder().ram(0, 64 << 20).build(Arc::new(SoftVm::software_protected()))?;
/// let outcome = memory.convert(&Request { range: GfnRange::from_bytes(0x20_0000, 0x1000)?, to: State::Shared })?;
/// assert!(matches!(outcome, Outcome::Converted { pages: 1 }), "{outcome:?}");
///
/// let view = SharedView::new(Arc::new(memory));
/// view.write_obj(0x1234_u32, GuestAddress(0x20_0ffc))?;
/// assert_eq!(view.read_obj::<u32>(GuestAddress(0x20_0ffc))?, 0x1234);
/// // The last two bytes would be private.
/// assert!(view.read_obj::<u32>(GuestAddress(0x20_0ffe)).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct SharedView(Arc<CvmMemory>);

impl SharedView {
    /// Devices' view of `memory`.
    pub const fn new(memory: Arc<CvmMemory>) -> Self {
        Self(memory)
    }

    /// The memory.
    pub const fn memory(&self) -> &Arc<CvmMemory> {
        &self.0
    }
}

impl GuestMemory for SharedView {
    /// There is none that could be had as a whole: what is shared changes.
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = Marks;

    /// Whether all of it is shared memory now. It need not be any more when it is used; an access finds out by itself.
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        count == 0 || self.pinned(addr, count, access).is_ok()
    }

    /// All of it, pinned, or an error.
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, Access<'a>>> {
        let held = if count == 0 { None } else { Some(self.pinned(addr, count, access)?) };
        Ok(Slices { memory: &self.0, held })
    }
}

/// A pin, and what is left of the parts that it is of.
type Pinned<'a> = (Arc<Pin<'a>>, std::vec::IntoIter<Part>);

impl SharedView {
    /// Pins what is not nothing. What the guest cannot write, no device writes for it.
    fn pinned(&self, addr: GuestAddress, count: usize, access: Permissions) -> Result<Pinned<'_>> {
        let (pin, parts) = self.0.access(Gpa(addr.0), count as u64).map_err(denied)?;
        let space = self.0.space();
        let mut slots = space.layout().table().segments(pin.gfns()).filter_map(|segment| segment.slot);
        if access.has_write() && slots.any(|slot| slot.flags.contains(SlotFlags::READONLY)) {
            return Err(denied(ReadOnly { gpa: Gpa(addr.0), len: count as u64 }));
        }
        Ok((Arc::new(pin), parts.into_iter()))
    }
}

/// A device's write to memory that is read-only to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write of {len:#x} bytes at {gpa:#x}, some of which is read-only")]
pub struct ReadOnly {
    /// First byte.
    pub gpa: Gpa,
    /// Bytes.
    pub len: u64,
}

/// The reason, as the source of the only error that takes one.
fn denied(reason: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::IOError(io::Error::new(io::ErrorKind::PermissionDenied, reason))
}

/// The slices of one access, which all hold its pin.
struct Slices<'a> {
    memory: &'a CvmMemory,
    held: Option<Pinned<'a>>,
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a, Access<'a>>>;

    fn next(&mut self) -> Option<Self::Item> {
        let (pin, parts) = self.held.as_mut()?;
        let Some(Part { memory, bytes }) = parts.next() else {
            self.held = None;
            return None;
        };
        let access = Access { to: memory, memory: self.memory, pin: Arc::clone(pin) };
        let slice = access.to.backing.slice(access.to.offset, bytes);
        let Some((address, length)) = slice.map(|slice| (slice.ptr_guard_mut().as_ptr(), slice.len())) else {
            self.held = None;
            return Some(Err(Error::InvalidBackendAddress));
        };
        // SAFETY: the slice that the backing gave says that the memory is there, and reached by volatile accesses only,
        // while the backing lives. `access` holds it, and is in this slice and in each that is made from it.
        Some(Ok(unsafe { VolatileSlice::with_bitmap(address, length, access, None) }))
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, Access<'a>> for Slices<'a> {}

/// What goes with a slice: the pin of its pages, and who is told what was written. `vm-memory` takes it for a bitmap.
#[derive(Clone)]
pub struct Access<'a> {
    /// The first byte, in memory that this keeps mapped.
    to: SharedSlice,
    memory: &'a CvmMemory,
    pin: Arc<Pin<'a>>,
}

impl fmt::Debug for Access<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("pinned", &self.pin.gfns()).finish_non_exhaustive()
    }
}

impl Access<'_> {
    /// What goes with the part of the slice that begins at `offset`.
    fn at(&self, offset: usize) -> Self {
        let to =
            SharedSlice { backing: Arc::clone(&self.to.backing), offset: self.to.offset.saturating_add(offset as u64) };
        Self { to, ..self.clone() }
    }
}

impl<'b> WithBitmapSlice<'b> for Access<'_> {
    type S = Self;
}

impl BitmapSlice for Access<'_> {}

impl Bitmap for Access<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len != 0 {
            self.memory.wrote(&self.at(offset).to, len as u64);
        }
    }

    /// Not known here: dirty bits are with whoever keeps them.
    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        self.at(offset)
    }
}

/// Names [`Access`] for every lifetime where `vm-memory` asks for a bitmap. There is no value of it.
#[derive(Debug, Clone, Copy)]
pub enum Marks {}

impl<'a> WithBitmapSlice<'a> for Marks {
    type S = Access<'a>;
}

impl Bitmap for Marks {
    fn mark_dirty(&self, _: usize, _: usize) {
        match *self {}
    }

    fn dirty_at(&self, _: usize) -> bool {
        match *self {}
    }

    fn slice_at(&self, _: usize) -> Access<'_> {
        match *self {}
    }
}
