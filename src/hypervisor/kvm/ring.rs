//! The dirty ring of a vCPU fd, mapped.
//!
//! Pages of the descriptor's mapping that are not the ring's would be a `SIGBUS` to touch, and a mapping that is shorter than
//! the ring would be read in the wrong order. So the size is put to the test once, with calls that answer by errno.
#![allow(unsafe_code, reason = "maps memory that the kernel writes to")]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc::off_t;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use crate::hypervisor::{DirtyGfn, DirtyRingMemory};

/// `KVM_DIRTY_LOG_PAGE_OFFSET` pages into the descriptor.
const OFFSET: off_t = 64 * 4096;
const PAGE: usize = 4096;

/// A ring in this process's address space.
#[derive(Debug)]
pub(super) struct MappedRing {
    base: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and this value owns it alone.
unsafe impl Send for MappedRing {}
// SAFETY: nothing but shared atomics is given out.
unsafe impl Sync for MappedRing {}

impl MappedRing {
    /// `mmap(2)` of the ring of a vCPU.
    pub(super) fn map(vcpu: BorrowedFd<'_>, bytes: u32) -> Result<Self, Errno> {
        let bytes = usize::try_from(bytes).map_err(|_| Errno::EINVAL)?;
        if !bytes.is_power_of_two() || bytes < PAGE {
            return Err(Errno::EINVAL);
        }
        // One page more, which must not be there.
        let length = bytes.checked_add(PAGE).and_then(NonZeroUsize::new).ok_or(Errno::EINVAL)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is asked for, so no existing mapping can be replaced.
        let base = unsafe { mmap(None, length, prot, MapFlags::MAP_SHARED, vcpu, OFFSET) }?;
        let ring = Self { base, bytes };
        // SAFETY: within the mapping just made, or right behind it, where its last page is.
        let beyond = unsafe { base.byte_add(bytes) };
        // SAFETY: the last page of the mapping. This only looks if it can be had.
        let longer = unsafe { madvise(beyond, PAGE, MmapAdvise::MADV_POPULATE_READ) };
        // SAFETY: the same page, which nothing refers to.
        let _ = unsafe { munmap(beyond, PAGE) };
        // SAFETY: all of what is left of the mapping.
        let there = unsafe { madvise(base, bytes, MmapAdvise::MADV_POPULATE_READ) };
        match (there, longer) {
            (Ok(()), Err(Errno::EFAULT)) => Ok(ring),
            // Another size than the one that was enabled, or none was.
            _ => Err(Errno::EINVAL),
        }
    }
}

impl DirtyRingMemory for MappedRing {
    fn entries(&self) -> &[DirtyGfn] {
        // SAFETY: `bytes` bytes are mapped there, aligned, for as long as `self` lives, and all of them are the ring's. Entries
        // are made of atomics, of which any bytes are a value; the kernel writes them at any time, as it does to atomics.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.bytes.div_ceil(size_of::<DirtyGfn>())) }
    }
}

impl Drop for MappedRing {
    fn drop(&mut self) {
        // SAFETY: the very mapping that was made, to which no borrow is left. It fails for nothing that was mapped.
        let _ = unsafe { munmap(self.base, self.bytes) };
    }
}
