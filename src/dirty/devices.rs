//! Writes of devices and of the VMM itself, which KVM never sees: vm-memory notes them as it makes them.
//!
//! Mirrors `vm_memory::bitmap`: memory whose regions carry a [`DeviceDirty`] marks the same [`DirtyBitmap`] that KVM's own
//! log is merged into.

use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use super::DirtyBitmap;
use crate::addr::{FilePage, FileRange};

/// A [`DirtyBitmap`] as vm-memory wants it. Offsets are in bytes of the backing.
///
/// ```
/// use cvm_memory::addr::{FilePage, FileRange};
/// use cvm_memory::dirty::{DeviceDirty, DirtyBitmap};
/// use nix::libc;
/// use std::sync::Arc;
/// use vm_memory::mmap::MmapRegionBuilder;
/// use vm_memory::{Bytes, VolatileMemory};
///
/// let dirty = Arc::new(DirtyBitmap::new(16)?);
/// let region = MmapRegionBuilder::new_with_bitmap(16 * 4096, DeviceDirty::new(Arc::clone(&dirty)))
///     .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
///     .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
///     .build()?;
/// region.as_volatile_slice().write_slice(b"a device was here", 2 * 4096 - 1)?;
/// assert_eq!(dirty.take().map(|run| run.pages()).collect::<Vec<_>>(), [2]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct DeviceDirty {
    bitmap: Arc<DirtyBitmap>,
    base: usize,
}

impl DeviceDirty {
    /// From the first byte of the backing on.
    pub const fn new(bitmap: Arc<DirtyBitmap>) -> Self {
        Self { bitmap, base: 0 }
    }
}

/// Part of a [`DeviceDirty`], for a slice of the memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceDirtySlice<'a> {
    bitmap: &'a DirtyBitmap,
    base: usize,
}

fn mark(bitmap: &DirtyBitmap, base: usize, offset: usize, len: usize) {
    if len == 0 {
        return;
    }
    let first = base.saturating_add(offset) as u64;
    let last = first.saturating_add(len.saturating_sub(1) as u64);
    let end = FilePage::containing(last).get().saturating_add(1);
    if let Some(end) = FilePage::new(end)
        && let Ok(pages) = FileRange::new(FilePage::containing(first), end)
    {
        bitmap.set(pages);
    }
}

fn marked(bitmap: &DirtyBitmap, base: usize, offset: usize) -> bool {
    bitmap.contains(FilePage::containing(base.saturating_add(offset) as u64))
}

impl<'a> WithBitmapSlice<'a> for DeviceDirty {
    type S = DeviceDirtySlice<'a>;
}

impl Bitmap for DeviceDirty {
    fn mark_dirty(&self, offset: usize, len: usize) {
        mark(&self.bitmap, self.base, offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        marked(&self.bitmap, self.base, offset)
    }

    fn slice_at(&self, offset: usize) -> DeviceDirtySlice<'_> {
        DeviceDirtySlice { bitmap: &self.bitmap, base: self.base.saturating_add(offset) }
    }
}

impl<'b> WithBitmapSlice<'b> for DeviceDirtySlice<'_> {
    type S = Self;
}

impl BitmapSlice for DeviceDirtySlice<'_> {}

impl Bitmap for DeviceDirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        mark(self.bitmap, self.base, offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        marked(self.bitmap, self.base, offset)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { base: self.base.saturating_add(offset), ..*self }
    }
}
