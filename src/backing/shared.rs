//! The shared side of guest memory: what the host and its devices see.
//!
//! A slot's `userspace_addr` is a bare number to KVM; the guest reads and writes whatever lies there. [`SharedBacking`]
//! is the promise that something does, for as long as the value lives. [`SharedMemory`] is the usual one, a memfd mapped
//! whole; a VMM that has its own mappings implements the trait on them.
#![allow(unsafe_code, reason = "declares the unsafe trait by which a mapping is vouched for, and vouches for our own")]

use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use memfd::{FileSeal, MemfdOptions};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::fstat;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileSlice};

use crate::addr::PAGE_SIZE;
use crate::gmem::cached_bytes;

/// Shared guest memory that is mapped in this process.
///
/// # Safety
/// While the value lives, `[hva(), hva() + size())` is mapped readable and writable, is meant for the guest, and is
/// nothing that Rust references point into: the guest may change it at any time.
pub unsafe trait SharedBacking: fmt::Debug + Send + Sync {
    /// Address in this process, page aligned. Never changes. Whoever takes it from a pointer exposes its provenance
    /// (`pointer::expose_provenance`); what `mmap` has just returned is exposed.
    fn hva(&self) -> u64;

    /// Size in bytes. Never changes.
    fn size(&self) -> u64;

    /// Bytes that can only be freed together: the page size of the backing, a power of two.
    fn granule(&self) -> u64 {
        PAGE_SIZE
    }

    /// Frees the memory of `[offset, offset + len)`, in bytes, which are multiples of [`granule`](Self::granule); it
    /// reads as zeros then.
    ///
    /// # Errors
    /// Whatever the system call gives; nothing may have been freed then.
    fn discard(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// Bytes of memory held now, or `None` where that cannot be told.
    fn resident_bytes(&self) -> Option<u64>;

    /// The bytes `[offset, offset + len)`, which the guest may change at any time; `None` beyond the end.
    fn slice(&self, offset: u64, len: u64) -> Option<VolatileSlice<'_>> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size());
        let address = usize::try_from(self.hva().checked_add(offset)?).ok();
        let (Some(_), Some(address), Ok(length)) = (end, address, usize::try_from(len)) else { return None };
        // SAFETY: the implementor promises that this part of the address space is mapped, readable and writable, and
        // reached through nothing but volatile accesses, while `self` lives; so it is for the slice's lifetime.
        Some(unsafe { VolatileSlice::new(std::ptr::with_exposed_provenance_mut(address), length) })
    }
}

/// Why shared memory could not be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The size is zero or unaligned.
    #[error("shared memory size {size:#x} is zero or unaligned")]
    Size {
        /// In bytes.
        size: u64,
    },
    /// No memfd could be created.
    #[error("create a memfd of {size:#x} bytes")]
    Create {
        /// In bytes.
        size: u64,
        /// Why.
        #[source]
        source: memfd::Error,
    },
    /// The memfd could not be sized.
    #[error("size a memfd to {size:#x} bytes")]
    Resize {
        /// In bytes.
        size: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The memfd could not be mapped.
    #[error("map {size:#x} bytes of shared memory")]
    Map {
        /// In bytes.
        size: u64,
        /// Why.
        #[source]
        source: MmapRegionError,
    },
    /// An access reached beyond the end.
    #[error("shared memory access at {offset:#x}, {len:#x} bytes, beyond its {size:#x}")]
    Beyond {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// In bytes.
        size: u64,
    },
}

/// Shared guest memory on a memfd of its own.
///
/// ```
/// use cvm_memory::backing::{SharedBacking, SharedMemory};
///
/// let memory = SharedMemory::new(2 << 20)?;
/// memory.write(0x1000, b"hello")?;
/// let mut bytes = [0; 5];
/// memory.read(0x1000, &mut bytes)?;
/// assert_eq!(&bytes, b"hello");
/// assert_eq!(memory.resident_bytes(), Some(4096));
///
/// memory.discard(0x1000, 0x1000)?;
/// assert_eq!(memory.resident_bytes(), Some(0));
/// memory.read(0x1000, &mut bytes)?;
/// assert_eq!(bytes, [0; 5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SharedMemory {
    file: Arc<File>,
    offset: u64,
    region: MmapRegion<()>,
}

impl SharedMemory {
    /// `size` bytes, zeroed, allocated on first touch.
    ///
    /// # Errors
    /// [`SharedError`] if the size is zero or unaligned, or memory or files run out.
    pub fn new(size: u64) -> Result<Self, SharedError> {
        let Some(length) = usize::try_from(size).ok().filter(|_| size != 0 && size & (PAGE_SIZE - 1) == 0) else {
            return Err(SharedError::Size { size });
        };
        let failed = |source| SharedError::Create { size, source };
        let file =
            MemfdOptions::new().close_on_exec(true).allow_sealing(true).create("cvm-memory-shared").map_err(failed)?;
        file.as_file().set_len(size).map_err(|source| SharedError::Resize { size, source })?;
        // Whoever is handed the file must not be able to take it away from under the mapping.
        file.add_seals(&[FileSeal::SealGrow, FileSeal::SealShrink, FileSeal::SealSeal]).map_err(failed)?;
        Self::of_file(Arc::new(file.into_file()), 0, length)
    }

    /// The bytes `[offset, offset + size)` of a file that can be mapped: a memfd of the caller's, a hugetlbfs file (whose
    /// page size [`granule`](SharedBacking::granule) does not know), or a guest_memfd that starts out shared. It must not
    /// be truncated while it is mapped: an access beyond its end would end this process.
    ///
    /// # Errors
    /// [`SharedError`] if the part is empty, unaligned, beyond the end of the file, or cannot be mapped.
    pub fn from_file(file: Arc<File>, offset: u64, size: u64) -> Result<Self, SharedError> {
        match usize::try_from(size) {
            Ok(length) if size != 0 && (offset | size) & (PAGE_SIZE - 1) == 0 => Self::of_file(file, offset, length),
            _ => Err(SharedError::Size { size }),
        }
    }

    fn of_file(file: Arc<File>, offset: u64, length: usize) -> Result<Self, SharedError> {
        let region = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), offset), length)
            .map_err(|source| SharedError::Map { size: length as u64, source })?;
        Ok(Self { file, offset, region })
    }

    /// The file, to hand to a device process.
    pub const fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Copies out of the memory.
    ///
    /// # Errors
    /// [`SharedError::Beyond`].
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), SharedError> {
        self.part(offset, bytes.len() as u64)?.copy_to(bytes);
        Ok(())
    }

    /// Copies into the memory.
    ///
    /// # Errors
    /// [`SharedError::Beyond`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), SharedError> {
        self.part(offset, bytes.len() as u64)?.copy_from(bytes);
        Ok(())
    }

    fn part(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, SharedError> {
        self.slice(offset, len).ok_or(SharedError::Beyond { offset, len, size: self.size() })
    }
}

// SAFETY: the mapping is owned by `region`, lives as long as it, is readable and writable, and is handed out only as
// volatile slices.
unsafe impl SharedBacking for SharedMemory {
    fn hva(&self) -> u64 {
        self.region.as_ptr().expose_provenance() as u64
    }

    fn size(&self) -> u64 {
        self.region.size() as u64
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let offset = offset.checked_add(self.offset).ok_or(Errno::EINVAL)?;
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let len = i64::try_from(len).map_err(|_| Errno::EINVAL)?;
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(self.file.as_fd(), hole, offset, len)
    }

    fn resident_bytes(&self) -> Option<u64> {
        let file = fstat(self.file.as_fd()).ok()?;
        let whole = self.offset == 0 && u64::try_from(file.st_size) == Ok(self.size());
        if !whole {
            // The rest of the file is not this memory's.
            return cached_bytes(self.file.as_fd(), self.offset, self.size());
        }
        // st_blocks counts units of 512 bytes on every file system.
        u64::try_from(file.st_blocks).ok()?.checked_mul(512)
    }
}
