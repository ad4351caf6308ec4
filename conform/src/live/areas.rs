//! The parts of this process's address space that scenarios name, and looks into them that end in `EFAULT` and not in a signal.
#![allow(unsafe_code, reason = "address space is reserved, mapped and copied from")]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;

use cvm_memory::gmem::{GmemFlags, GuestMemfd};
use nix::errno::Errno;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::place_of;
use crate::scenario::{AREA_BYTES, Area, File, Hva};

/// Address space of one area: the largest memslot, 2^31 - 1 pages, from the furthest offset that scenarios use.
const RESERVED: usize = (1 << 43) + (1 << 31);

/// Address space that nothing else gets; unmapped on drop.
#[derive(Debug)]
struct Reservation(NonNull<c_void>);

// SAFETY: an address range belongs to no thread.
unsafe impl Send for Reservation {}

const fn nonzero(bytes: usize) -> NonZeroUsize {
    NonZeroUsize::new(bytes).expect("not zero")
}

impl Reservation {
    fn new() -> Self {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice harms nobody.
        let start = unsafe { mmap_anonymous(None, nonzero(RESERVED), ProtFlags::PROT_NONE, flags) };
        Self(start.expect("address space"))
    }

    fn address(&self) -> usize {
        self.0.as_ptr().expose_provenance()
    }

    /// Replaces the first `bytes` by fresh memory.
    fn fill(&self, bytes: usize) {
        let at = NonZeroUsize::new(self.address());
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the range is this reservation's, to which nothing refers.
        let mapped =
            unsafe { mmap_anonymous(at, nonzero(bytes), protection, MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED) };
        mapped.expect("memory");
    }

    /// Replaces the first `bytes` by a file.
    fn map(&self, file: impl AsFd, bytes: usize, protection: ProtFlags) -> Result<(), Errno> {
        let at = NonZeroUsize::new(self.address());
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: as in `fill`.
        unsafe { mmap(at, nonzero(bytes), protection, flags, file, 0) }.map(drop)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range was reserved by `new`, and nothing refers to it.
        unsafe { munmap(self.0, RESERVED) }.expect("a mapping of our own");
    }
}

/// The areas of one machine.
#[derive(Debug)]
pub(super) struct Areas {
    areas: BTreeMap<Area, Reservation>,
    /// What is copied goes through here, as the kernel then says `EFAULT` where there is nothing.
    scratch: OwnedFd,
}

impl Areas {
    pub(super) fn new() -> Self {
        let scratch = memfd_create("scratch", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        Self { areas: BTreeMap::new(), scratch }
    }

    fn area(&mut self, area: Area) -> &Reservation {
        self.areas.entry(area).or_insert_with(|| {
            let reservation = Reservation::new();
            if let Area::Memory(_) = area {
                reservation.fill(usize::try_from(AREA_BYTES).expect("small"));
            }
            reservation
        })
    }

    /// The address itself.
    pub(super) fn address(&mut self, hva: Hva) -> u64 {
        match hva {
            Hva::In(area, offset) => self.area(area).address() as u64 + offset,
            Hva::Raw(address) => address,
        }
    }

    /// `mmap(2)` of a file to its area. A file that is not the kernel's own behaves as if it were.
    pub(super) fn map(&mut self, name: File, file: &GuestMemfd, kernel_file: bool) -> Result<(), Errno> {
        let bytes = usize::try_from(file.size()).map_err(|_| Errno::ENOMEM)?;
        if bytes > RESERVED {
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
        self.area(Area::File(name)).map(file.as_fd(), bytes, protection)
    }

    /// Takes the mapping of a file away, and leaves nothing in its place.
    pub(super) fn unmap(&mut self, name: File) {
        let Hva::In(area, _) = place_of(name) else { return };
        if let Some(reservation) = self.areas.get(&area) {
            let at = NonZeroUsize::new(reservation.address());
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
            // SAFETY: the range is this reservation's, to which nothing refers.
            let mapped = unsafe { mmap_anonymous(at, nonzero(RESERVED), ProtFlags::PROT_NONE, flags) };
            mapped.expect("address space");
        }
    }

    /// The bytes at `at`.
    pub(super) fn read(&mut self, at: Hva, len: u64) -> Result<Vec<u8>, Errno> {
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
    pub(super) fn fill(&mut self, at: Hva, len: u64, byte: u8) -> Result<(), Errno> {
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

/// A copy that ends early has met a page that cannot be accessed.
fn whole(copied: isize, wanted: usize) -> Result<(), Errno> {
    if usize::try_from(copied) == Ok(wanted) { Ok(()) } else { Err(Errno::EFAULT) }
}
