//! Memory that `KVM_GET_DIRTY_LOG` may write to, whatever slot it is asked for.
//!
//! The ioctl is given an address and no length: KVM writes as many words as the slot has when it looks, which is not for the
//! caller to know for sure (somebody else may have replaced the slot). A slice would be overrun then. So the words of a
//! [`DirtyLog`] end exactly where a stretch of inaccessible addresses begins, which is longer than the log of the longest slot
//! that KVM has: a slot that is longer than was thought is `EFAULT`, and no other memory is written. That is also what makes
//! [`Hypervisor::get_dirty_log`](super::Hypervisor::get_dirty_log) a safe function. The addresses cost no memory.
//!
//! It knows no slot and merges nothing. Mirrors the `copy_to_user()` of `kvm_get_dirty_log_protect()`.
#![allow(unsafe_code, reason = "maps memory of which the end must be inaccessible")]

use std::fmt;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

/// `KVM_MEM_MAX_NR_PAGES`: pages of the longest slot.
const MAX_NR_PAGES: u64 = (1 << 31) - 1;
/// Bytes of the longest log there is.
const GUARD: usize = 1 << 28;
const PAGE: usize = 4096;
const _: () = assert!(MAX_NR_PAGES.div_ceil(64) * 8 <= GUARD as u64);

/// The dirty log of one slot, one bit per page, as KVM wrote it. Can be used again and again, for slots of any length up to
/// [`pages`](Self::pages).
///
/// ```
/// use cvm_memory::hypervisor::DirtyLog;
///
/// let log = DirtyLog::for_pages(65)?;
/// assert_eq!(log.words(), [0, 0]);
/// # Ok::<(), nix::errno::Errno>(())
/// ```
pub struct DirtyLog {
    /// The mapping: some accessible pages, at the end of which the words lie, and then `GUARD` bytes that are not.
    base: NonNull<c_void>,
    accessible: usize,
    words: usize,
    pages: u64,
}

// SAFETY: the mapping belongs to this value alone, and is reached through `&self` for reading and `&mut self` for writing.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// A log for slots of at most `pages` pages, all clean: `pages` rounded up to a multiple of 64, in bits.
    ///
    /// # Errors
    /// `EINVAL` for more pages than a slot can have (2^31 - 1); `ENOMEM`.
    pub fn for_pages(pages: u64) -> Result<Self, Errno> {
        if pages > MAX_NR_PAGES {
            return Err(Errno::EINVAL);
        }
        let words = usize::try_from(pages.div_ceil(64)).map_err(|_| Errno::EINVAL)?;
        // At most 2^28 bytes, and as many again: nothing overflows.
        let accessible = words.saturating_mul(8).next_multiple_of(PAGE);
        let length = NonZeroUsize::new(accessible.saturating_add(GUARD)).ok_or(Errno::EINVAL)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping, wherever the kernel likes, is in nobody's way.
        let base = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_NONE, flags) }?;
        let log = Self { base, accessible, words, pages };
        if accessible != 0 {
            // SAFETY: the first pages of the mapping just made, to which nothing refers yet.
            unsafe { mprotect(base, accessible, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) }?;
        }
        Ok(log)
    }

    /// Pages of the longest slot that it has room for.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Bit `n % 64` of word `n / 64` is page `n` of the slot. What lies beyond the end of the slot that was asked for last is
    /// left from before.
    pub const fn words(&self) -> &[u64] {
        // SAFETY: `words` words are mapped there, aligned, initialized by the kernel, and nobody writes to them while this
        // borrow lasts: KVM does so only during a call that borrows `self` mutably.
        unsafe { std::slice::from_raw_parts(self.first().cast_const(), self.words) }
    }

    /// The same, to be written.
    pub const fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as above, and the borrow is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.first(), self.words) }
    }

    /// Where KVM is to write.
    pub(super) fn as_mut_ptr(&mut self) -> *mut c_void {
        self.first().cast()
    }

    const fn first(&self) -> *mut u64 {
        // The words end where the accessible pages do.
        let skip = self.accessible.saturating_sub(self.words.saturating_mul(8));
        // SAFETY: at most `accessible`, so within the mapping. A multiple of 8 into a page, so aligned.
        unsafe { self.base.as_ptr().byte_add(skip).cast() }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // SAFETY: the very mapping that was made, to which no borrow is left. It fails for nothing that was mapped.
        let _ = unsafe { munmap(self.base, self.accessible.saturating_add(GUARD)) };
    }
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyLog").field("pages", &self.pages).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_size_is_the_slots_rounded_up_to_a_word() {
        for (pages, words) in [(0, 0), (1, 1), (64, 1), (65, 2), (32_768, 512), (32_769, 513)] {
            let mut log = DirtyLog::for_pages(pages).unwrap();
            assert_eq!((log.pages(), log.words().len()), (pages, words));
            assert!(log.words().iter().all(|word| *word == 0));
            log.words_mut().fill(u64::MAX);
            assert!(log.words().iter().all(|word| *word == u64::MAX));
            assert!(log.as_mut_ptr().cast::<u64>().is_aligned());
        }
        assert_eq!(DirtyLog::for_pages(MAX_NR_PAGES + 1).unwrap_err(), Errno::EINVAL);
        assert_eq!(DirtyLog::for_pages(MAX_NR_PAGES).unwrap().words().len(), 1 << 25);
    }

    /// Not even a byte may be written beyond the words, and none as far as the longest log reaches.
    #[test]
    fn what_follows_it_cannot_be_written() {
        let pipe = nix::unistd::pipe().unwrap();
        for pages in [0, 1, 64, 65, 32_768, 32_769] {
            let mut log = DirtyLog::for_pages(pages).unwrap();
            let words = log.words().len();
            let end = log.as_mut_ptr().wrapping_byte_add(words * 8);
            for beyond in [0, 1, PAGE, GUARD - 1] {
                nix::unistd::write(&pipe.1, &[1]).unwrap();
                let at = end.wrapping_byte_add(beyond);
                // SAFETY: the kernel is asked to write one byte, and refuses.
                let read = unsafe { nix::libc::read(std::os::fd::AsRawFd::as_raw_fd(&pipe.0), at, 1) };
                assert_eq!((read, Errno::last()), (-1, Errno::EFAULT), "{pages} pages, {beyond:#x}");
            }
        }
    }
}
