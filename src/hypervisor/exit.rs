//! Why a vCPU came back, in the words of `kvm_run`, independent of who ran it.
//!
//! A VMM that keeps its own kvm-ioctls vCPU builds one with `Exit::from_kvm`; the software KVM's vCPUs
//! give them as they are. Nothing is interpreted here.

use nix::errno::Errno;

/// Exit reasons of `kvm_run` that this library names.
pub mod exit_reason {
    /// `KVM_EXIT_HYPERCALL`.
    pub const HYPERCALL: u32 = 3;
    /// `KVM_EXIT_HLT`.
    pub const HLT: u32 = 5;
    /// `KVM_EXIT_MMIO`.
    pub const MMIO: u32 = 6;
    /// `KVM_EXIT_SHUTDOWN`.
    pub const SHUTDOWN: u32 = 8;
    /// `KVM_EXIT_FAIL_ENTRY`.
    pub const FAIL_ENTRY: u32 = 9;
    /// `KVM_EXIT_INTERNAL_ERROR`.
    pub const INTERNAL_ERROR: u32 = 17;
    /// `KVM_EXIT_DIRTY_RING_FULL`.
    pub const DIRTY_RING_FULL: u32 = 31;
    /// `KVM_EXIT_MEMORY_FAULT`.
    pub const MEMORY_FAULT: u32 = 39;
}

/// `KVM_EXIT_MEMORY_FAULT`: the guest touched a page in a way that KVM would not resolve by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryFault {
    /// What `KVM_RUN` failed with: `EFAULT`, `EHWPOISON`, or what guest_memfd gave.
    pub errno: Errno,
    /// Bit 3: the access was private. KVM defines no other.
    pub flags: u64,
    /// Address of the page in bytes, without any shared bit.
    pub gpa: u64,
    /// Size in bytes; always 4096 today.
    pub size: u64,
}

impl MemoryFault {
    /// `KVM_MEMORY_EXIT_FLAG_PRIVATE`.
    pub const PRIVATE: u64 = 1 << 3;
}

/// `KVM_EXIT_HYPERCALL`: the guest asks for a service. The next run completes it with `ret`.
#[derive(Debug)]
pub struct HypercallExit<'a> {
    /// Which; 12 is MAP_GPA_RANGE.
    pub nr: u64,
    /// Its arguments, untrusted.
    pub args: [u64; 6],
    /// The answer: a *positive* errno or zero.
    pub ret: &'a mut u64,
}

impl HypercallExit<'_> {
    /// `KVM_HC_MAP_GPA_RANGE`.
    pub const MAP_GPA_RANGE: u64 = 12;
}

/// `KVM_EXIT_MMIO`: the guest touched an address without a slot.
#[derive(Debug)]
pub enum Mmio<'a> {
    /// The next run completes the read with `data`.
    Read {
        /// Address in bytes.
        gpa: u64,
        /// 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// The instruction has retired; re-running does not repeat it.
    Write {
        /// Address in bytes.
        gpa: u64,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
}

/// Why a vCPU came back.
#[derive(Debug)]
#[non_exhaustive]
pub enum Exit<'a> {
    /// A page needs converting, materialising, or is bad.
    MemoryFault(MemoryFault),
    /// The guest asks for a service.
    Hypercall(HypercallExit<'a>),
    /// An access without a slot.
    Mmio(Mmio<'a>),
    /// `KVM_EXIT_HLT`.
    Halt,
    /// `KVM_EXIT_SHUTDOWN`: a triple fault.
    Shutdown,
    /// `KVM_EXIT_FAIL_ENTRY`.
    FailEntry {
        /// `hardware_entry_failure_reason`.
        reason: u64,
        /// The host CPU.
        cpu: u32,
    },
    /// `KVM_EXIT_INTERNAL_ERROR`; 1 is an emulation failure. The suberror is `None` where the caller's crate drops it.
    InternalError {
        /// `suberror`.
        suberror: Option<u32>,
    },
    /// `KVM_EXIT_DIRTY_RING_FULL`: the vCPU's dirty ring has hardly any room left. It enters the guest no more until entries
    /// have been harvested *and* reset.
    DirtyRingFull,
    /// Any other exit reason, by number where it is known: none of this library's business.
    Other(Option<u32>),
}
