//! The inode behind a guest_memfd, on a real memfd: its pages, and in what shape they are.
//!
//! It knows no VM and no mapping; who takes pages away has unmapped them. Should a mapping have been left behind, what a guest
//! reads through it is poison, and what it writes is lost: see [`Frame`]. Mirrors `kvm_gmem_get_pfn()`,
//! `__kvm_gmem_populate()` and `kvm_gmem_allocate()` (`virt/kvm/guest_memfd.c`).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::arch::{Arch, GmemPage};
use super::sync::{lock, read};
use crate::addr::{FilePage, FileRange, Gfn, PAGE_SHIFT, merge_adjacent};
use crate::gmem::GmemFlags;
use crate::layout::Bindings;
use crate::sync::blocking::{Mutex, RwLock};

/// A page that the file holds.
#[derive(Debug, Default)]
struct Page {
    /// As long as the file holds it. A page that takes its place is another one.
    life: Arc<()>,
    /// Zeroed, or given contents. A page that was only allocated is not.
    up_to_date: bool,
    /// The hardware reported it broken.
    poisoned: bool,
}

/// The memory of a page that a file held when it was asked: what a mapping points at.
///
/// A file's page that is freed and allocated again is other memory, and the old one somebody else's. A memfd would show the
/// new page through a mapping of the old, as if every mapping were zapped in time; so the mapping says which one it means.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    page: FilePage,
    life: Weak<()>,
}

impl Frame {
    /// The page that it is, or was, of its file.
    pub(super) const fn page(&self) -> FilePage {
        self.page
    }

    fn is_freed(&self) -> bool {
        self.life.strong_count() == 0
    }
}

/// What is in memory that was freed.
const POISON: u8 = 0xdb;

/// The inode: what is left when no descriptor is.
#[derive(Debug)]
pub(super) struct GmemFile {
    memfd: File,
    device_inode: (u64, u64),
    size: u64,
    flags: GmemFlags,
    closing: AtomicBool,
    /// Exclusive while pages leave the file and while bindings change; shared while pages are allocated ahead of use.
    pub(super) invalidate_lock: RwLock<()>,
    pub(super) bindings: RwLock<Bindings>,
    pages: Mutex<BTreeMap<FilePage, Page>>,
}

impl GmemFile {
    /// A file of `size` bytes, of a size that a guest_memfd may have.
    pub(super) fn create(size: u64, flags: GmemFlags) -> Result<Self, Errno> {
        let memfd = memfd::MemfdOptions::new()
            .close_on_exec(true)
            .allow_sealing(true)
            .create("guest_memfd")
            .map_err(|_| Errno::EMFILE)?;
        memfd.as_file().set_len(size).map_err(|error| errno_of(&error))?;
        // A guest_memfd never changes its size.
        let seals = [memfd::FileSeal::SealGrow, memfd::FileSeal::SealShrink, memfd::FileSeal::SealSeal];
        memfd.add_seals(&seals).map_err(|_| Errno::ENOMEM)?;
        let memfd = memfd.into_file();
        let metadata = memfd.metadata().map_err(|error| errno_of(&error))?;
        Ok(Self {
            memfd,
            device_inode: (metadata.dev(), metadata.ino()),
            size,
            flags,
            closing: AtomicBool::new(false),
            invalidate_lock: RwLock::new(()),
            bindings: RwLock::new(Bindings::new(size >> PAGE_SHIFT).map_err(|_| Errno::EINVAL)?),
            pages: Mutex::new(BTreeMap::new()),
        })
    }

    pub(super) const fn inode(&self) -> u64 {
        self.device_inode.1
    }

    pub(super) const fn device_inode(&self) -> (u64, u64) {
        self.device_inode
    }

    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    pub(super) const fn flags(&self) -> GmemFlags {
        self.flags
    }

    /// Whether the host may touch its pages from the start.
    pub(super) const fn starts_shared(&self) -> bool {
        self.flags.contains(GmemFlags::INIT_SHARED)
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// The last descriptor is gone, or going.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    pub(super) fn read_at(&self, frame: &Frame, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        if frame.is_freed() {
            data.fill(POISON);
            return Ok(());
        }
        let at = frame.page.start_byte().saturating_add(offset);
        self.memfd.read_exact_at(data, at).map_err(|error| errno_of(&error))
    }

    pub(super) fn write_at(&self, frame: &Frame, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if frame.is_freed() {
            return Ok(());
        }
        let at = frame.page.start_byte().saturating_add(offset);
        self.memfd.write_all_at(data, at).map_err(|error| errno_of(&error))
    }

    fn fill(&self, page: FilePage, contents: &[u8]) -> Result<(), Errno> {
        self.memfd.write_all_at(contents, page.start_byte()).map_err(|error| errno_of(&error))
    }

    /// The page for a fault at `gfn`: allocated, zeroed if it never had contents, and the guest's
    /// (steps 4 to 7 of `kvm_gmem_get_pfn()`).
    pub(super) fn get_page(&self, arch: &dyn Arch, page: FilePage, gfn: Gfn) -> Result<Frame, Errno> {
        let mut pages = lock(&self.pages);
        let held = pages.entry(page).or_default();
        if held.poisoned {
            return Err(Errno::EHWPOISON);
        }
        if !held.up_to_date {
            // Where the host may touch pages, its mapping may have been first; and a fresh page of a memfd is zeroes.
            if !self.starts_shared() {
                self.fill(page, &[0; PAGE_BYTES])?;
            }
            held.up_to_date = true;
        }
        if !self.starts_shared() {
            arch.make_private(GmemPage { file: self.inode(), page }, gfn)?;
        }
        Ok(Frame { page, life: Arc::downgrade(&held.life) })
    }

    /// Gives the page initial contents, if `fill` succeeds (`__kvm_gmem_populate()`). Under `invalidate_lock`, exclusive.
    pub(super) fn populate(
        &self,
        page: FilePage,
        contents: &mut [u8],
        fill: impl FnOnce(&mut [u8]) -> Result<(), Errno>,
    ) -> Result<Frame, Errno> {
        let mut pages = lock(&self.pages);
        let held = pages.entry(page).or_default();
        if held.poisoned {
            return Err(Errno::EHWPOISON);
        }
        fill(contents)?;
        self.fill(page, contents)?;
        held.up_to_date = true;
        Ok(Frame { page, life: Arc::downgrade(&held.life) })
    }

    /// The platform has destroyed what the page held; it stays in the file, and is zeroed before it is mapped again.
    pub(super) fn lose_contents(&self, page: FilePage) {
        if let Some(held) = lock(&self.pages).get_mut(&page) {
            held.up_to_date = false;
        }
    }

    /// Marks the page as broken. It stays in the file until a hole is punched.
    pub(super) fn set_poisoned(&self, page: FilePage) {
        lock(&self.pages).entry(page).or_default().poisoned = true;
    }

    pub(super) fn allocate(&self, range: FileRange) -> Result<(), Errno> {
        let _shared = read(&self.invalidate_lock);
        let mut pages = lock(&self.pages);
        let mode = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (off_t(range.start_byte())?, off_t(range.bytes())?);
        fallocate(&self.memfd, mode, offset, len).map_err(no_space_is_no_memory)?;
        for page in range {
            pages.entry(page).or_default();
        }
        Ok(())
    }

    /// Frees the pages of `range`, which nothing maps any more.
    pub(super) fn remove_pages(&self, arch: &dyn Arch, range: FileRange) {
        let mut pages = lock(&self.pages);
        let removed = pages.extract_if(range.start()..range.end(), |_, _| true).map(|(page, _)| FileRange::page(page));
        for run in merge_adjacent(removed) {
            arch.reclaim(self.inode(), run);
        }
        let mode = FallocateFlags::FALLOC_FL_KEEP_SIZE | FallocateFlags::FALLOC_FL_PUNCH_HOLE;
        if let (Ok(offset), Ok(len)) = (off_t(range.start_byte()), off_t(range.bytes())) {
            // Should it ever fail, the pages are zeroed before they are used again: they are not up to date any more.
            let _ = fallocate(&self.memfd, mode, offset, len);
        }
    }
}

pub(super) const PAGE_BYTES: usize = 1 << PAGE_SHIFT;

fn off_t(bytes: u64) -> Result<i64, Errno> {
    i64::try_from(bytes).map_err(|_| Errno::EFBIG)
}

fn errno_of(error: &std::io::Error) -> Errno {
    no_space_is_no_memory(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// tmpfs has a size limit; guest_memfd has only the machine's.
fn no_space_is_no_memory(errno: Errno) -> Errno {
    if errno == Errno::ENOSPC { Errno::ENOMEM } else { errno }
}

#[cfg(test)]
mod tests {
    use super::super::arch::Plain;
    use super::*;

    /// What was freed is nobody's memory, even where the file has a page again.
    #[test]
    fn a_frame_outlives_its_page_as_poison() {
        let file = GmemFile::create(2 * PAGE_BYTES as u64, GmemFlags::empty()).unwrap();
        let (page, gfn) = (FilePage::new(1).unwrap(), Gfn::new(7).unwrap());
        let read = |frame: &Frame| {
            let mut bytes = [1; 4];
            file.read_at(frame, 8, &mut bytes).unwrap();
            bytes
        };
        let old = file.get_page(&Plain, page, gfn).unwrap();
        file.write_at(&old, 8, &[2; 4]).unwrap();
        let same = file.get_page(&Plain, page, gfn).unwrap();
        assert_eq!((read(&old), read(&same)), ([2; 4], [2; 4]));

        file.remove_pages(&Plain, FileRange::page(page));
        assert_eq!(read(&old), [POISON; 4]);
        let new = file.get_page(&Plain, page, gfn).unwrap();
        file.write_at(&old, 8, &[3; 4]).unwrap();
        assert_eq!((read(&old), read(&new)), ([POISON; 4], [0; 4]));
    }
}
