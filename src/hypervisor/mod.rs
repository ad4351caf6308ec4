//! The seam between policy and mechanism: what KVM offers on a VM fd ([`Hypervisor`]) and on a vCPU fd ([`Vcpu`]).
//!
//! Each method mirrors one ioctl, with its arguments unchecked and its errno unchanged, so that the software KVM and the
//! real one can be held against each other call by call, and so that a recorder or a fault injector can stand in between.
//! No policy lives below this seam: nothing here knows what was declared, merges ranges, retries or rolls back.
//!
//! Mirrors `include/uapi/linux/kvm.h`; numbers and layouts come from there.

mod caps;
mod dirty_log;
mod dirty_ring;
mod exit;
pub mod kvm;

use std::fmt;
use std::os::fd::RawFd;

use nix::errno::Errno;

use crate::gmem::GuestMemfd;

pub use caps::{Cap, Capabilities, MissingCapability, VmType};
pub use dirty_log::DirtyLog;
pub use dirty_ring::{DirtyGfn, DirtyRingMemory};
pub use exit::{Exit, HypercallExit, MemoryFault, Mmio, exit_reason};

/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`: bit 3, the only attribute there is.
pub const MEMORY_ATTRIBUTE_PRIVATE: u64 = 1 << 3;

/// Argument of `KVM_SET_USER_MEMORY_REGION2`, every field free. Sizes, addresses and offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryRegion {
    /// Address space in bits 31:16, slot id in bits 15:0.
    pub slot: u32,
    /// `KVM_MEM_LOG_DIRTY_PAGES` 1, `KVM_MEM_READONLY` 2, `KVM_MEM_GUEST_MEMFD` 4.
    pub flags: u32,
    /// Where the slot starts in guest physical address space.
    pub guest_phys_addr: u64,
    /// Size; zero deletes the slot.
    pub memory_size: u64,
    /// Where its shared memory starts in this process.
    pub userspace_addr: u64,
    /// Where its private memory starts in the file.
    pub guest_memfd_offset: u64,
    /// The file; looked at only with `KVM_MEM_GUEST_MEMFD`.
    pub guest_memfd: RawFd,
}

/// Argument of `KVM_SET_MEMORY_ATTRIBUTES`. Address and size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryAttributes {
    /// First byte, without any shared bit.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
    /// [`MEMORY_ATTRIBUTE_PRIVATE`] or zero.
    pub attributes: u64,
    /// Must be zero.
    pub flags: u64,
}

/// Argument of `KVM_PRE_FAULT_MEMORY`, which the call advances past what it has mapped. Address and size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PreFaultMemory {
    /// First byte that is still to be mapped.
    pub gpa: u64,
    /// Bytes that are still to be mapped.
    pub size: u64,
    /// Must be zero.
    pub flags: u64,
}

/// Argument of `KVM_CLEAR_DIRTY_LOG`, every field free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClearDirtyLog<'a> {
    /// Address space in bits 31:16, slot id in bits 15:0.
    pub slot: u32,
    /// First page of the slot that the bits are about; must be a multiple of 64.
    pub first_page: u64,
    /// Pages that they are about; must be a multiple of 64 unless they end where the slot does.
    pub num_pages: u32,
    /// Bit `n % 64` of word `n / 64` is page `first_page + n`. At least `num_pages` bits.
    pub bitmap: &'a [u64],
}

impl ClearDirtyLog<'_> {
    /// Whether the bitmap has all the bits that it should: no more than those may be read.
    pub fn is_whole(&self) -> bool {
        usize::try_from(self.num_pages.div_ceil(64)).is_ok_and(|words| words <= self.bitmap.len())
    }
}

/// What a kind of VM is like, as far as the generic code has to care. Vendors describe theirs in their own crates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Platform {
    /// A word for messages.
    pub name: &'static str,
    /// The argument of `KVM_CREATE_VM`.
    pub vm_type: VmType,
    /// Whether pages can be private at all.
    pub private_memory: bool,
    /// Whether a guest access says by itself if it is private, so that an access that differs from the attribute exits.
    /// Where the attribute alone decides, a page whose attribute was not set yet would silently be shared.
    pub accesses_carry_privacy: bool,
    /// Whether a guest that is answered `EAGAIN` asks again. Where it does not, `EAGAIN` would be an error to it.
    pub guest_retries: bool,
    /// What an edit of the layout must not do.
    pub hazards: Hazards,
}

/// What may go wrong when slots are replaced under a guest, by kind of VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hazards {
    /// Deleting a slot destroys the private memory behind it.
    pub slot_delete_loses_private: bool,
    /// The state of a vCPU may lie in private memory, at a place that nobody but the guest and KVM knows. A vCPU that runs
    /// while its slot is missing never runs again.
    pub vcpu_state_in_private_memory: bool,
    /// A private page remembers its frame until it is freed: at another one its guest would fault for ever.
    pub pages_keep_their_frame: bool,
    /// A shared access to a frame without a slot is remembered as device input or output even once it has one.
    pub holes_stick: bool,
}

impl Hazards {
    /// None of them.
    pub const NONE: Self = Self {
        slot_delete_loses_private: false,
        vcpu_state_in_private_memory: false,
        pages_keep_their_frame: false,
        holes_stick: false,
    };
}

impl Platform {
    /// KVM's default VM type: no private memory.
    pub const DEFAULT: Self = Self {
        name: "default",
        vm_type: VmType::DEFAULT,
        private_memory: false,
        accesses_carry_privacy: false,
        guest_retries: false,
        hazards: Hazards::NONE,
    };

    /// KVM's software-protected VM type: private memory, decided by the attribute alone.
    pub const SOFTWARE_PROTECTED: Self = Self {
        name: "software-protected",
        vm_type: VmType::SOFTWARE_PROTECTED,
        private_memory: true,
        accesses_carry_privacy: false,
        guest_retries: false,
        hazards: Hazards::NONE,
    };
}

/// The mechanisms of a VM fd. One method, one ioctl.
pub trait Hypervisor: fmt::Debug + Send + Sync {
    /// What kind of VM this is.
    fn platform(&self) -> Platform;

    /// `KVM_CHECK_EXTENSION` on the VM fd: zero where unsupported. Never fails: a negative answer counts as zero.
    fn check_extension(&self, cap: Cap) -> u64;

    /// `KVM_ENABLE_CAP` on the VM fd.
    ///
    /// # Errors
    /// `EINVAL` for an unknown capability or argument.
    fn enable_cap(&self, cap: Cap, args: [u64; 4]) -> Result<(), Errno>;

    /// `KVM_CREATE_GUEST_MEMFD`: size in bytes, flags as given (unknown ones are for the kernel to refuse). The file is
    /// close-on-exec.
    ///
    /// # Errors
    /// `EINVAL` for a bad size or flag; `EMFILE`, `ENFILE`, `ENOMEM`.
    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<GuestMemfd, Errno>;

    /// `KVM_SET_USER_MEMORY_REGION2`.
    ///
    /// # Errors
    /// `EINVAL`, `EEXIST`, `EBADF`, `ENOMEM`, `EIO`, in the order of `kvm_set_memory_region()`.
    ///
    /// # Safety
    /// While the slot exists, the guest may read and write `[userspace_addr, userspace_addr + memory_size)` of this
    /// process: it must be memory that is meant for the guest, and stay so until the slot has been deleted.
    #[allow(unsafe_code, reason = "the guest is let at an address range that only the caller can vouch for")]
    unsafe fn set_user_memory_region2(&self, region: &MemoryRegion) -> Result<(), Errno>;

    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    ///
    /// # Errors
    /// `EINVAL`, `ENOMEM` (nothing changed), `ENOTTY` where there are no attributes.
    fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno>;

    /// `KVM_GET_DIRTY_LOG`: which pages of the slot were written since the log was last cleared. Unless
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` is enabled, this clears it too, and has later writes logged again.
    ///
    /// Safe, because KVM cannot write beyond a [`DirtyLog`] even if the slot is longer than that.
    ///
    /// # Errors
    /// `ENXIO` where dirty rings take the place of the log, `EINVAL` for an address space or an id that no VM has, `ENOENT`
    /// for no slot or one without a log. `EFAULT` if `log` has no room for the slot: what was cleared is lost then, and the
    /// contents of `log` mean nothing. `ENOTTY` where there are no dirty logs at all, which is what this does by default.
    fn get_dirty_log(&self, slot: u32, log: &mut DirtyLog) -> Result<(), Errno> {
        let _ = (slot, log);
        Err(Errno::ENOTTY)
    }

    /// `KVM_CLEAR_DIRTY_LOG`: takes pages out of the slot's log, those with a bit in `clear.bitmap`, and has later writes to
    /// them logged again. Needs no capability to be enabled, but makes sense only where getting the log does not clear it.
    ///
    /// # Errors
    /// `EFAULT`, before anything else is looked at, if the bitmap has fewer than `num_pages` bits. `ENXIO`, then `EINVAL` for
    /// an address space, an id or a first page that cannot be, then `ENOENT`, as for [`get_dirty_log`](Self::get_dirty_log);
    /// `EINVAL` for pages that the slot does not have, or that end within a word other than its last. `ENOTTY` by default.
    fn clear_dirty_log(&self, clear: &ClearDirtyLog<'_>) -> Result<(), Errno> {
        let _ = clear;
        Err(Errno::ENOTTY)
    }

    /// `KVM_RESET_DIRTY_RINGS`: takes back what was harvested from the dirty rings of all vCPUs, and has later writes to those
    /// pages logged again. Returns the number of entries taken back. Only then may the pages be copied.
    ///
    /// # Errors
    /// `EINVAL` if the VM has no dirty rings; `ENOTTY` by default.
    fn reset_dirty_rings(&self) -> Result<u64, Errno> {
        Err(Errno::ENOTTY)
    }
}

/// The mechanisms of a vCPU fd.
pub trait Vcpu: fmt::Debug + Send {
    /// `KVM_PRE_FAULT_MEMORY`: maps the first pages of `range` and advances it past them. Never converts.
    ///
    /// Not while another thread deletes a slot of a VM of the default type, unless its quirk `SLOT_ZAP_ALL` is disabled: in
    /// Linux 7.3 the call may then repeat one page for ever, and the deletion waits for it, until this thread gets a signal.
    ///
    /// # Errors
    /// An error means that nothing was mapped: `EINTR`, `EAGAIN` (a slot is being replaced), `ENOENT` (shared, no slot),
    /// `EFAULT` (private, no slot or no file), `EOPNOTSUPP` (not yet allowed), `EINVAL`, `EHWPOISON`, `ENOMEM`, `EIO`.
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno>;

    /// `KVM_RUN`: runs the guest until it needs something. A memory fault, for which the ioctl fails, is an exit here.
    ///
    /// # Errors
    /// `EINTR` and `EAGAIN` ask for another run; everything else is the end of this vCPU.
    fn run(&mut self) -> Result<Exit<'_>, Errno>;

    /// `mmap(2)` of the vCPU's dirty ring, which has `bytes` bytes as they were enabled on the VM.
    ///
    /// # Errors
    /// `EINVAL` if rings of that size were not enabled when the vCPU was created; `ENOMEM`. `ENODEV` where there are none at
    /// all, which is what this does by default.
    fn dirty_ring(&self, bytes: u32) -> Result<Box<dyn DirtyRingMemory>, Errno> {
        let _ = bytes;
        Err(Errno::ENODEV)
    }
}
