//! guest_memfd files, and how they take their pages away from the guest.
//!
//! The descriptor handed out is that of a memfd: its contents can be read and written through it, which a guest_memfd
//! refuses. Everything that goes through [`GmemOps`] behaves as the kernel's file does. Mirrors `virt/kvm/guest_memfd.c`:
//! `kvm_gmem_fallocate()`, `kvm_gmem_punch_hole()`, `kvm_gmem_release()`, `kvm_gmem_error_folio()`.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;

use super::counters::Call;
use super::file::GmemFile;
use super::sync::{read, write};
use super::vm::Vm;
use crate::addr::{FilePage, FileRange, PAGE_SIZE};
use crate::gmem::GmemOps;

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
        self.file.as_fd()
    }
}

impl Drop for SoftGmem {
    fn drop(&mut self) {
        self.file.close();
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
