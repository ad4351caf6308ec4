//! A guest_memfd: the file whose pages are a guest's private memory.
//!
//! [`GuestMemfd`] owns one such file: it is closed on exec (KVM itself does not ask for that), knows its size and flags,
//! allocates pages ahead of use, punches holes, and counts what is resident. Every range is checked against the file
//! before anything is called, because kernels disagree on the errno of a range beyond the end, and some accept it.
//!
//! It does not create files (a [`Hypervisor`](crate::hypervisor::Hypervisor) does) and it does not know where the file is
//! bound (a [`Layout`](crate::layout::Layout) does). The file's operations sit behind [`GmemOps`], so that the software
//! KVM can invalidate its mappings when a hole is punched, as `kvm_gmem_punch_hole()` does.
//!
//! Mirrors `virt/kvm/guest_memfd.c`: `kvm_gmem_fallocate()`, `kvm_gmem_punch_hole()`, `kvm_gmem_allocate()`.

mod residency;

use std::fmt;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use bitflags::bitflags;
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;

use crate::addr::{FilePage, FileRange, PAGE_SHIFT, PAGE_SIZE};

pub use residency::cached_bytes;

bitflags! {
    /// Flags of `KVM_CREATE_GUEST_MEMFD`. Which are legal is `KVM_CAP_GUEST_MEMFD_FLAGS`, asked on the VM fd.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct GmemFlags: u64 {
        /// `GUEST_MEMFD_FLAG_MMAP`: the file can be mapped, and all faults of a slot bound to it are served from it.
        const MMAP = 1;
        /// `GUEST_MEMFD_FLAG_INIT_SHARED`: its pages start shared, so that the host may touch them.
        const INIT_SHARED = 2;
    }
}

/// Identity of one guest_memfd within this process. Never reused, unlike a file descriptor.
///
/// ```
/// use cvm_memory::gmem::FileId;
/// assert_ne!(FileId::next(), FileId::next());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(NonZeroU64);

impl FileId {
    /// An identity that no earlier call has returned.
    #[must_use]
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // Relaxed: only the number has to be unique, nothing is published with it. It takes centuries to wrap.
        Self(NonZeroU64::new(NEXT.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MAX))
    }

    /// The identity of this number, as shown in messages; zero is none.
    pub const fn new(number: u64) -> Option<Self> {
        match NonZeroU64::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// The system calls that a guest_memfd answers, errno for errno. Arguments are unchecked, as they are in the kernel.
pub trait GmemOps: fmt::Debug + Send + Sync {
    /// `fallocate(2)` on the file; offset and length in bytes.
    ///
    /// # Errors
    /// Whatever the system call gives.
    fn fallocate(&self, mode: FallocateFlags, offset: i64, len: i64) -> Result<(), Errno>;

    /// The file.
    fn as_fd(&self) -> BorrowedFd<'_>;
}

/// Why a guest_memfd operation was refused or failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GmemError {
    /// The range does not lie within the file.
    #[error("file pages {range} lie beyond the file's {pages:#x} pages")]
    BeyondFile {
        /// The range asked for.
        range: FileRange,
        /// Size of the file in pages.
        pages: u64,
    },
    /// The size is zero, unaligned, or above `i64::MAX`.
    #[error("guest_memfd size {size:#x} is zero, unaligned or above i64::MAX")]
    Size {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// The system call failed.
    #[error("{call} of file pages {range}")]
    Call {
        /// `fallocate` with its mode.
        call: &'static str,
        /// The range asked for.
        range: FileRange,
        /// What the kernel answered.
        #[source]
        errno: Errno,
    },
}

/// An owned guest_memfd. Closed on drop; hold it until every slot bound to it has been deleted.
///
/// ```
/// use cvm_memory::addr::{FilePage, FileRange};
/// use cvm_memory::hypervisor::Hypervisor;
/// use cvm_memory::soft::SoftVm;
///
/// let vm = SoftVm::software_protected();
/// let file = vm.create_guest_memfd(2 << 20, 0)?;
/// let head = FileRange::with_len(FilePage::ZERO, 4)?;
/// file.allocate(head)?;
/// assert_eq!(file.resident_bytes(), Some(4 * 4096));
/// file.punch_hole(head)?;
/// assert_eq!(file.resident_bytes(), Some(0));
///
/// // Beyond the end is an error of our own, whatever the kernel would say.
/// assert!(file.punch_hole(FileRange::with_len(FilePage::ZERO, 513)?).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestMemfd {
    id: FileId,
    size: u64,
    flags: GmemFlags,
    ops: Box<dyn GmemOps>,
}

impl GuestMemfd {
    /// Takes ownership of a file that a hypervisor has just created with `size` bytes and `flags`.
    ///
    /// # Errors
    /// [`GmemError::Size`] if no guest_memfd can have that size.
    pub fn new(size: u64, flags: GmemFlags, ops: Box<dyn GmemOps>) -> Result<Self, GmemError> {
        if size == 0 || size & (PAGE_SIZE - 1) != 0 || i64::try_from(size).is_err() {
            return Err(GmemError::Size { size });
        }
        Ok(Self { id: FileId::next(), size, flags, ops })
    }

    /// Identity of the file within this process.
    pub const fn id(&self) -> FileId {
        self.id
    }

    /// Size in bytes; never changes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// All pages of the file.
    pub fn pages(&self) -> FileRange {
        // A size that fits an i64 has fewer pages than any range may have.
        FileRange::with_len(FilePage::ZERO, self.size >> PAGE_SHIFT)
            .unwrap_or_else(|_| FileRange::empty_at(FilePage::ZERO))
    }

    /// Flags the file was created with.
    pub const fn flags(&self) -> GmemFlags {
        self.flags
    }

    /// The system calls of the file, unchecked.
    pub fn ops(&self) -> &dyn GmemOps {
        self.ops.as_ref()
    }

    /// Allocates the pages of `range` (`fallocate` with `KEEP_SIZE`). Neither zeroes nor converts them: that happens when
    /// a page is first used.
    ///
    /// # Errors
    /// [`GmemError::BeyondFile`]; [`GmemError::Call`] with `EINTR` if a signal came (some pages may be allocated),
    /// `ENOMEM`, or what else the kernel gives.
    pub fn allocate(&self, range: FileRange) -> Result<(), GmemError> {
        self.fallocate("allocation", FallocateFlags::FALLOC_FL_KEEP_SIZE, range)
    }

    /// Frees the pages of `range` (`fallocate` with `PUNCH_HOLE`). The next access finds fresh zeroed pages. Memory
    /// attributes do not change.
    ///
    /// # Errors
    /// [`GmemError::BeyondFile`], [`GmemError::Call`].
    pub fn punch_hole(&self, range: FileRange) -> Result<(), GmemError> {
        self.fallocate("punch hole", FallocateFlags::FALLOC_FL_KEEP_SIZE | FallocateFlags::FALLOC_FL_PUNCH_HOLE, range)
    }

    /// Bytes of memory that the file holds, or `None` where the kernel has no way to tell.
    pub fn resident_bytes(&self) -> Option<u64> {
        cached_bytes(self.ops.as_fd(), 0, self.size)
    }

    fn fallocate(&self, call: &'static str, mode: FallocateFlags, range: FileRange) -> Result<(), GmemError> {
        if range.is_empty() {
            return Ok(());
        }
        let beyond = GmemError::BeyondFile { range, pages: self.pages().pages() };
        if !self.pages().contains_range(&range) {
            return Err(beyond);
        }
        let (Ok(offset), Ok(len)) = (i64::try_from(range.start_byte()), i64::try_from(range.bytes())) else {
            return Err(beyond);
        };
        self.ops.fallocate(mode, offset, len).map_err(|errno| GmemError::Call { call, range, errno })
    }
}

impl AsFd for GuestMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ops.as_fd()
    }
}
