//! What stands beside the library: the table of a device that maps shared memory, and shared memory whose discards somebody
//! watches. Who is told what, and in which order, is each test's own to write down.
#![allow(unsafe_code, reason = "wraps a backing that is vouched for already")]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cvm_memory::addr::PAGE_SIZE;
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedPiece};
use cvm_memory::convert::SharedRun;
use nix::errno::Errno;

/// What a device has mapped, frame to address in this process. It insists on what a
/// [`Listener`](cvm_memory::convert::Listener) is promised.
#[derive(Debug, Default)]
pub struct Mapped(Mutex<BTreeMap<u64, u64>>);

impl Mapped {
    fn table(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps a run.
    ///
    /// # Panics
    /// If a frame of it is mapped already, or the pieces are not the run.
    pub fn map(&self, run: &SharedRun) {
        let mut table = self.table();
        for (gfn, hva) in addresses(run) {
            assert_eq!(table.insert(gfn, hva), None, "gfn {gfn:#x} is mapped twice");
        }
    }

    /// Unmaps a run. A thread that panics is let off: the check that failed before is to be reported.
    ///
    /// # Panics
    /// If a frame of it is not mapped, or is mapped to another address.
    pub fn unmap(&self, run: &SharedRun) {
        if std::thread::panicking() {
            return;
        }
        let mut table = self.table();
        for (gfn, hva) in addresses(run) {
            assert_eq!(table.remove(&gfn), Some(hva), "what gfn {gfn:#x} was mapped to");
        }
    }

    /// All that is mapped.
    pub fn frames(&self) -> BTreeMap<u64, u64> {
        self.table().clone()
    }
}

/// The frames of a run and their addresses.
fn addresses(run: &SharedRun) -> Vec<(u64, u64)> {
    let of = |piece: &SharedPiece| {
        let hva = piece.hva;
        (0..).zip(piece.gfns.iter()).map(move |(page, gfn)| (gfn.get(), hva + page * PAGE_SIZE))
    };
    let found: Vec<_> = run.pieces.iter().flat_map(of).collect();
    assert!(
        found.iter().map(|(gfn, _)| *gfn).eq(run.gfns.iter().map(|gfn| gfn.get())),
        "the pieces are not the run: {run:?}"
    );
    found
}

/// Part of another mapping, or all of it once more: for what has several owners, or touches or overlaps other memory.
#[derive(Debug)]
pub struct Window {
    whole: Arc<dyn SharedBacking>,
    offset: u64,
    size: u64,
}

impl Window {
    /// `size` bytes from byte `offset` of `whole` on.
    ///
    /// # Panics
    /// If it has no such bytes.
    pub fn new(whole: &Arc<dyn SharedBacking>, offset: u64, size: u64) -> Self {
        assert!(offset.checked_add(size).is_some_and(|end| end <= whole.size()), "{offset:#x}, {size:#x}");
        Self { whole: Arc::clone(whole), offset, size }
    }
}

// SAFETY: part of what is vouched for, and it lives as long.
unsafe impl SharedBacking for Window {
    fn hva(&self) -> u64 {
        self.whole.hva() + self.offset
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.whole.discard(self.offset + offset, len)
    }

    fn resident_bytes(&self) -> Option<u64> {
        None
    }
}

/// Asked before bytes `[offset, offset + len)` are freed; an error and they are not.
type Watch = Box<dyn Fn(u64, u64) -> Result<(), Errno> + Send + Sync>;

/// Shared memory whose discards are watched, and fail on demand.
pub struct WatchedMemory {
    inner: SharedMemory,
    granule: u64,
    watch: Watch,
}

impl WatchedMemory {
    /// `size` bytes that say of themselves that they can only be freed `granule` bytes at a time. `watch` is told offset and
    /// length of every discard.
    ///
    /// # Panics
    /// If there is no memory.
    pub fn new(size: u64, granule: u64, watch: impl Fn(u64, u64) -> Result<(), Errno> + Send + Sync + 'static) -> Self {
        let inner = SharedMemory::new(size).expect("shared memory");
        Self { inner, granule, watch: Box::new(watch) }
    }
}

// SAFETY: the mapping is that of `inner`, which lives as long.
unsafe impl SharedBacking for WatchedMemory {
    fn hva(&self) -> u64 {
        self.inner.hva()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn granule(&self) -> u64 {
        self.granule
    }

    /// # Panics
    /// If part of a granule is to be freed.
    fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        assert_eq!((offset | len) % self.granule, 0, "discard of part of a page: {offset:#x}, {len:#x}");
        (self.watch)(offset, len)?;
        self.inner.discard(offset, len)
    }

    fn resident_bytes(&self) -> Option<u64> {
        self.inner.resident_bytes()
    }
}

impl fmt::Debug for WatchedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchedMemory").field("inner", &self.inner).finish_non_exhaustive()
    }
}
