//! guest_memfd files on real memfds, and how they take their pages away from the guest.
//!
//! The descriptor handed out is that of a memfd: its contents can be read and written through it, which a guest_memfd
//! refuses. Everything that goes through [`GmemOps`] behaves as the kernel's file does. Mirrors `virt/kvm/guest_memfd.c`:
//! `kvm_gmem_fallocate()`, `kvm_gmem_punch_hole()`, `kvm_gmem_get_pfn()`, `kvm_gmem_release()`, `kvm_gmem_error_folio()`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::arch::{Arch, GmemPage};
use super::counters::Call;
use super::sync::{lock, read, write};
use super::vm::Vm;
use crate::addr::{FilePage, FileRange, Gfn, PAGE_SHIFT, PAGE_SIZE, merge_adjacent};
use crate::gmem::{GmemFlags, GmemOps};
use crate::layout::Bindings;

/// A page that the file holds.
#[derive(Debug, Clone, Copy, Default)]
struct Page {
    /// Zeroed, or given contents. A page that was only allocated is not.
    up_to_date: bool,
    /// The hardware reported it broken.
    poisoned: bool,
}

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

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    pub(super) fn read_at(&self, page: FilePage, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let at = page.start_byte().saturating_add(offset);
        self.memfd.read_exact_at(data, at).map_err(|error| errno_of(&error))
    }

    pub(super) fn write_at(&self, page: FilePage, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let at = page.start_byte().saturating_add(offset);
        self.memfd.write_all_at(data, at).map_err(|error| errno_of(&error))
    }

    /// The page for a fault at `gfn`: allocated, zeroed if it never had contents, and the guest's
    /// (steps 4 to 7 of `kvm_gmem_get_pfn()`).
    pub(super) fn get_page(&self, arch: &dyn Arch, page: FilePage, gfn: Gfn) -> Result<(), Errno> {
        let mut pages = lock(&self.pages);
        let held = pages.entry(page).or_default();
        if held.poisoned {
            return Err(Errno::EHWPOISON);
        }
        if !held.up_to_date {
            self.write_at(page, 0, &[0; PAGE_BYTES])?;
            held.up_to_date = true;
        }
        if !self.starts_shared() {
            arch.make_private(GmemPage { file: self.inode(), page }, gfn)?;
        }
        Ok(())
    }

    /// Gives the page initial contents, if `fill` succeeds (`__kvm_gmem_populate()`). Under `invalidate_lock`, exclusive.
    pub(super) fn populate(
        &self,
        page: FilePage,
        contents: &mut [u8],
        fill: impl FnOnce(&mut [u8]) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut pages = lock(&self.pages);
        let held = pages.entry(page).or_default();
        if held.poisoned {
            return Err(Errno::EHWPOISON);
        }
        fill(contents)?;
        self.write_at(page, 0, contents)?;
        held.up_to_date = true;
        Ok(())
    }

    /// The platform has destroyed what the page held; it stays in the file, and is zeroed before it is mapped again.
    pub(super) fn lose_contents(&self, page: FilePage) {
        if let Some(held) = lock(&self.pages).get_mut(&page) {
            held.up_to_date = false;
        }
    }

    /// Marks the page as broken. It stays in the file until a hole is punched.
    fn set_poisoned(&self, page: FilePage) {
        lock(&self.pages).entry(page).or_default().poisoned = true;
    }

    fn allocate(&self, range: FileRange) -> Result<(), Errno> {
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
    fn remove_pages(&self, arch: &dyn Arch, range: FileRange) {
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

/// An open guest_memfd: keeps its VM alive, and is closed on drop.
#[derive(Debug)]
pub(super) struct SoftGmem {
    vm: Arc<Vm>,
    file: Arc<GmemFile>,
}

impl SoftGmem {
    pub(super) const fn new(vm: Arc<Vm>, file: Arc<GmemFile>) -> Self {
        Self { vm, file }
    }
}

impl GmemOps for SoftGmem {
    fn fallocate(&self, mode: FallocateFlags, offset: i64, len: i64) -> Result<(), Errno> {
        let punch = mode.contains(FallocateFlags::FALLOC_FL_PUNCH_HOLE);
        self.vm.count(if punch { Call::PunchHole } else { Call::Allocate });
        let (offset, end) = vfs_checks(mode, offset, len)?;
        let keep_size = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if !mode.contains(keep_size) || !(keep_size | FallocateFlags::FALLOC_FL_PUNCH_HOLE).contains(mode) {
            return Err(Errno::EOPNOTSUPP);
        }
        if (offset | end) & (PAGE_SIZE - 1) != 0 || (!punch && end > self.file.size()) {
            return Err(Errno::EINVAL);
        }
        let start = FilePage::containing(offset);
        let range = FileRange::new(start, FilePage::containing(end)).map_err(|_| Errno::EINVAL)?;
        if !punch {
            return self.file.allocate(range);
        }
        self.vm.punch_hole(&self.file, range);
        Ok(())
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.memfd.as_fd()
    }
}

impl Drop for SoftGmem {
    fn drop(&mut self) {
        self.file.closing.store(true, Ordering::Release);
        self.vm.close_file(&self.file);
    }
}

impl Vm {
    /// `kvm_gmem_punch_hole()`. Takes no `slots_lock`.
    fn punch_hole(&self, file: &GmemFile, range: FileRange) {
        let _exclusive = write(&file.invalidate_lock);
        let started = self.invalidate_start(file, range);
        let inside = FilePage::containing(file.size());
        if let Ok(within) = FileRange::new(range.start().min(inside), range.end().min(inside))
            && !within.is_empty()
        {
            file.remove_pages(self.arch(), within);
        }
        self.invalidate_end(started);
    }

    /// `kvm_gmem_error_folio()`: the page is unmapped but kept.
    pub(super) fn poison_page(&self, file: &GmemFile, page: FilePage) {
        let _shared = read(&file.invalidate_lock);
        let started = self.invalidate_start(file, FileRange::page(page));
        file.set_poisoned(page);
        self.invalidate_end(started);
    }

    /// `kvm_gmem_release()`, and the end of the inode. Slots do not find the file any more since it is closing.
    fn close_file(&self, file: &GmemFile) {
        let _slots_lock = self.lock_slots();
        let _exclusive = write(&file.invalidate_lock);
        let everything = FileRange::new(FilePage::ZERO, FilePage::MAX).unwrap_or(FileRange::empty_at(FilePage::ZERO));
        let started = self.invalidate_start(file, everything);
        self.invalidate_end(started);
        write(&file.bindings).close();
        self.forget_file(file);
        if let Ok(whole) = FileRange::new(FilePage::ZERO, FilePage::containing(file.size())) {
            file.remove_pages(self.arch(), whole);
        }
    }
}

/// What `vfs_fallocate()` checks before the file sees the call. Returns offset and end.
fn vfs_checks(mode: FallocateFlags, offset: i64, len: i64) -> Result<(u64, u64), Errno> {
    let (start, len_bytes) = match (u64::try_from(offset), u64::try_from(len)) {
        (Ok(offset), Ok(len)) if len > 0 => (offset, len),
        _ => return Err(Errno::EINVAL),
    };
    let keep_size = mode.contains(FallocateFlags::FALLOC_FL_KEEP_SIZE);
    match mode.bits() & !FallocateFlags::FALLOC_FL_KEEP_SIZE.bits() {
        // Allocate, zero a range, unshare a range.
        0 | 0x10 | 0x40 => {}
        // Punch a hole.
        0x02 if keep_size => {}
        // Collapse, insert, write zeroes.
        0x08 | 0x20 | 0x80 if !keep_size => {}
        _ => return Err(Errno::EOPNOTSUPP),
    }
    let end = start.checked_add(len_bytes).filter(|end| *end <= i64::MAX.unsigned_abs()).ok_or(Errno::EFBIG)?;
    Ok((start, end))
}

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
