//! The parts of this process's address space that scenarios name, and looks into them that end in `EFAULT` and not in a signal.
#![allow(unsafe_code, reason = "address space is reserved, mapped and copied from")]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;

use cvm_memory::gmem::{GmemFlags, GuestMemfd};
use nix::errno::Errno;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::scenario::{AREA_BYTES, AREA_ROOM, Area, File, Hva};

/// Address space of one area: further than scenarios name an offset.
const STRIDE: usize = 1 << 32;
const _: () = assert!(AREA_ROOM == 1 << 32);
/// Memory areas, files, and the void.
const AREAS: usize = 4 + 8 + 1;
/// Address space of all, and behind them the largest memslot there is, 2^31 - 1 pages: wherever in an area a slot starts, it
/// leads to nothing but areas.
const RESERVED: usize = AREAS * STRIDE + (1 << 43);

/// The areas of one machine: address space that nothing else gets.
#[derive(Debug)]
pub(super) struct Areas {
    start: NonNull<c_void>,
    /// What is copied goes through here, as the kernel then says `EFAULT` where there is nothing.
    scratch: OwnedFd,
}

// SAFETY: an address range belongs to no thread.
unsafe impl Send for Areas {}

const fn nonzero(bytes: usize) -> NonZeroUsize {
    NonZeroUsize::new(bytes).expect("not zero")
}

impl Areas {
    pub(super) fn new() -> Self {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice harms nobody.
        let start = unsafe { mmap_anonymous(None, nonzero(RESERVED), ProtFlags::PROT_NONE, flags) };
        let scratch = memfd_create("scratch", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        let areas = Self { start: start.expect("address space"), scratch };
        for memory in 0..4 {
            let bytes = nonzero(usize::try_from(AREA_BYTES).expect("small"));
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // Populated: a page that was never written is mapped read-only by KVM until it is, and that would show in the dirty
            // log, although it is this process's affair and none of KVM's.
            areas.replace(Area::Memory(memory), bytes, protection, MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE);
        }
        areas
    }

    fn place(&self, area: Area) -> usize {
        let index = match area {
            Area::Memory(index) => usize::from(index % 4),
            Area::File(File(index)) => 4 + usize::from(index % 8),
            Area::Void => AREAS - 1,
        };
        self.start.as_ptr().expose_provenance() + index * STRIDE
    }

    /// Replaces the beginning of an area by nothing in particular.
    fn replace(&self, area: Area, bytes: NonZeroUsize, protection: ProtFlags, flags: MapFlags) {
        let at = NonZeroUsize::new(self.place(area));
        // SAFETY: the range is this area's, to which no reference leads.
        let mapped = unsafe { mmap_anonymous(at, bytes, protection, flags | MapFlags::MAP_FIXED) };
        mapped.expect("memory");
    }

    /// The address itself.
    pub(super) fn address(&self, hva: Hva) -> u64 {
        match hva {
            Hva::In(area, offset) => self.place(area) as u64 + offset,
            Hva::Raw(address) => address,
        }
    }

    /// `mmap(2)` of a file to its area. A file that is not the kernel's own behaves as if it were.
    pub(super) fn map(&self, name: File, file: &GuestMemfd, kernel_file: bool) -> Result<(), Errno> {
        let bytes = usize::try_from(file.size()).map_err(|_| Errno::ENOMEM)?;
        if bytes > STRIDE {
            return Err(Errno::ENOMEM);
        }
        let mut protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        if !kernel_file {
            if !file.flags().contains(GmemFlags::MMAP) {
                return Err(Errno::ENODEV);
            }
            if !file.flags().contains(GmemFlags::INIT_SHARED) {
                protection = ProtFlags::PROT_NONE; // every touch is a SIGBUS
            }
        }
        let at = NonZeroUsize::new(self.place(Area::File(name)));
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: as in `replace`.
        unsafe { mmap(at, nonzero(bytes), protection, flags, file.as_fd(), 0) }.map(drop)
    }

    /// Takes the mapping of a file away, and leaves nothing in its place.
    pub(super) fn unmap(&self, name: File) {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        self.replace(Area::File(name), nonzero(STRIDE), ProtFlags::PROT_NONE, flags);
    }

    /// The bytes at `at`.
    pub(super) fn read(&self, at: Hva, len: u64) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; usize::try_from(len).expect("small")];
        let from = std::ptr::with_exposed_provenance::<c_void>(usize::try_from(self.address(at)).expect("64 bits"));
        let fd = self.scratch.as_raw_fd();
        // SAFETY: the kernel checks every address it copies from.
        let copied = unsafe { libc::pwrite(fd, from, bytes.len(), 0) };
        whole(copied, bytes.len())?;
        // SAFETY: the kernel writes into a vector of that length.
        let back = unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        whole(back, bytes.len())?;
        Ok(bytes)
    }

    /// Writes `byte` `len` times to `at`.
    pub(super) fn fill(&self, at: Hva, len: u64, byte: u8) -> Result<(), Errno> {
        let bytes = vec![byte; usize::try_from(len).expect("small")];
        let to = std::ptr::with_exposed_provenance_mut::<c_void>(usize::try_from(self.address(at)).expect("64 bits"));
        let fd = self.scratch.as_raw_fd();
        // SAFETY: the kernel reads from a vector of that length.
        let there = unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), 0) };
        whole(there, bytes.len())?;
        // SAFETY: the kernel checks every address it copies to; they are in an area, to which no reference leads.
        let copied = unsafe { libc::pread(fd, to, bytes.len(), 0) };
        whole(copied, bytes.len())
    }
}

impl Drop for Areas {
    fn drop(&mut self) {
        // SAFETY: the range was reserved by `new`, and no reference leads to it.
        unsafe { munmap(self.start, RESERVED) }.expect("a mapping of our own");
    }
}

/// A copy that ends early has met a page that cannot be accessed.
fn whole(copied: isize, wanted: usize) -> Result<(), Errno> {
    if usize::try_from(copied) == Ok(wanted) { Ok(()) } else { Err(Errno::EFAULT) }
}
