//! How much memory a file holds, asked of the kernel.
//!
//! A guest_memfd has no block count and cannot be searched for data, but its pages sit in the page cache, and
//! `cachestat(2)` (Linux 6.5, optional) counts those of any file. This is a measurement for people and statistics; no
//! decision is built on it.
#![allow(unsafe_code, reason = "cachestat(2) has no safe wrapper in any crate; this file is nothing but that call")]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

/// `struct cachestat_range` of `<linux/mman.h>`; a length of zero would mean "to the end".
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// `struct cachestat` of `<linux/mman.h>`, all in pages.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

const SYS_CACHESTAT: libc::c_long = 451;

/// Bytes of page cache that `file` holds within `[offset, offset + len)`, or `None` if this kernel cannot tell.
pub fn cached_bytes(file: BorrowedFd<'_>, offset: u64, len: u64) -> Option<u64> {
    if len == 0 {
        return Some(0);
    }
    let range = Range { offset, len };
    let mut stat = Stat::default();
    // SAFETY: both pointers are to live structures of the layout that the call expects, and it writes only to `stat`,
    // within its size. A kernel without the call answers ENOSYS.
    let answer = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            std::ptr::from_ref(&range),
            std::ptr::from_mut(&mut stat),
            0 as libc::c_uint,
        )
    };
    (answer == 0).then(|| stat.cache.saturating_mul(crate::addr::PAGE_SIZE))
}
