//! The seam between the build of a TD and KVM: one method, one command.
//!
//! Like [`Hypervisor`] and [`Vcpu`], which it adds to: arguments unchecked, errno unchanged, no policy, so that the real KVM
//! and the model can stand in for each other, and a test in between. Mirrors `tdx_vm_ioctl()` and `tdx_vcpu_ioctl()`
//! (`arch/x86/kvm/vmx/tdx.c`).

use std::fmt;

use cvm_memory::hypervisor::{Hazards, Hypervisor, Platform, Vcpu, VmType};
use kvm_bindings::kvm_cpuid_entry2;
use nix::errno::Errno;

use crate::uapi::{self, InitMemRegion};
use crate::width::Width;

/// TDs, as the generic crate has to know them.
pub const PLATFORM: Platform = Platform {
    name: "tdx",
    vm_type: VmType(uapi::VM_TYPE),
    private_memory: true,
    accesses_carry_privacy: true,
    // A guest that is told RETRY asks again from where the answer says.
    guest_retries: true,
    hazards: Hazards {
        slot_delete_loses_private: true,
        vcpu_state_in_private_memory: false,
        pages_keep_their_frame: false,
        holes_stick: true,
    },
};

/// A command that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// What the ioctl failed with.
    pub errno: Errno,
    /// What the TDX module answered to KVM; zero where it was not asked, or KVM does not say.
    pub hw_error: u64,
}

impl Failure {
    /// One without an answer of the module.
    pub const fn errno(errno: Errno) -> Self {
        Self { errno, hw_error: 0 }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.hw_error {
            0 => write!(f, "{}", self.errno),
            hw_error => write!(f, "{}, tdx module error {hw_error:#x}", self.errno),
        }
    }
}

impl std::error::Error for Failure {}

/// What TDs may be like on this machine.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Capabilities {
    /// Attributes that a TD may have.
    pub attributes: u64,
    /// Extended features that a TD may have.
    pub xfam: u64,
    /// CPUID bits that may be configured.
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

/// What one TD is to be like. The three registers are bound to its attestation and otherwise free.
#[derive(Debug, Clone, PartialEq)]
pub struct InitVm {
    /// Attributes. The module may add some.
    pub attributes: u64,
    /// Extended features.
    pub xfam: u64,
    /// `MRCONFIGID`.
    pub mrconfigid: [u8; 48],
    /// `MROWNER`.
    pub mrowner: [u8; 48],
    /// `MROWNERCONFIG`.
    pub mrownerconfig: [u8; 48],
    /// What it sees of CPUID; function 0x8000_0008 says how wide its addresses are.
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

impl InitVm {
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    const X87_AND_SSE: u64 = 0b11;

    /// One with that address width as its only CPUID entry, with KVM's one attribute, and nothing else.
    ///
    /// ```
    /// use cvm_memory_tdx::{mechanism::InitVm, width::Width};
    /// assert_eq!(InitVm::new(Width::Bits52).width(), Some(Width::Bits52));
    /// ```
    pub fn new(width: Width) -> Self {
        let eax = width.bits() << 16;
        Self {
            attributes: uapi::ATTRIBUTE_SEPT_VE_DISABLE,
            xfam: 0,
            mrconfigid: [0; 48],
            mrowner: [0; 48],
            mrownerconfig: [0; 48],
            cpuid: vec![kvm_cpuid_entry2 { function: Self::ADDRESS_SIZES, eax, ..Default::default() }],
        }
    }

    /// One with as much of what `supported` says (`KVM_GET_SUPPORTED_CPUID`) as this machine lets a TD be configured with.
    /// Extended features are left to the caller, all but the two that every TD has.
    pub fn configured(width: Width, offered: &Capabilities, supported: &[kvm_cpuid_entry2]) -> Self {
        let mut init = Self::new(width);
        init.attributes &= offered.attributes;
        init.xfam = Self::X87_AND_SSE & offered.xfam;
        for mask in offered.cpuid.iter().filter(|mask| mask.function != Self::ADDRESS_SIZES) {
            let same = |entry: &&kvm_cpuid_entry2| entry.function == mask.function && entry.index == mask.index;
            if let Some(entry) = supported.iter().find(same) {
                init.cpuid.push(kvm_cpuid_entry2 {
                    flags: mask.flags,
                    eax: entry.eax & mask.eax,
                    ebx: entry.ebx & mask.ebx,
                    ecx: entry.ecx & mask.ecx,
                    edx: entry.edx & mask.edx,
                    ..*entry
                });
            }
        }
        init
    }

    /// The address width, from CPUID; `None` if there is no such entry, or KVM would refuse its width.
    pub fn width(&self) -> Option<Width> {
        let entry = self.cpuid.iter().find(|entry| entry.function == Self::ADDRESS_SIZES)?;
        Width::from_bits((entry.eax >> 16) & 0xff)
    }
}

/// The commands on a VM fd.
pub trait TdVm: Hypervisor {
    /// `KVM_TDX_CAPABILITIES`.
    ///
    /// # Errors
    /// `E2BIG` for more CPUID entries than there is room for; `EIO` if the module is not there; `ENOTTY` on any other
    /// kind of VM.
    fn capabilities(&self) -> Result<Capabilities, Failure>;

    /// `KVM_TDX_INIT_VM`, before vCPUs and slots.
    ///
    /// # Errors
    /// `EBUSY` with vCPUs; `EINVAL` if done before, and for what the TD cannot be like; `E2BIG` for more than 256 CPUID
    /// entries; `EAGAIN` while the machine lacks entropy.
    fn init_vm(&self, init: &InitVm) -> Result<(), Failure>;

    /// `KVM_TDX_FINALIZE_VM`: no page can be added any more, and the TD can run.
    ///
    /// # Errors
    /// `EINVAL` before `KVM_TDX_INIT_VM` and if done before; `EBUSY`, to be tried again; `EIO`.
    fn finalize(&self) -> Result<(), Failure>;
}

/// The commands on a vCPU fd.
pub trait TdVcpu: Vcpu {
    /// `KVM_TDX_INIT_VCPU`, once; its first RCX is where firmware looks for the list of memory.
    ///
    /// # Errors
    /// `EINVAL` before `KVM_TDX_INIT_VM`, after `KVM_TDX_FINALIZE_VM`, and if done before; `EIO`, `ENOMEM`.
    fn init_vcpu(&mut self, rcx: u64) -> Result<(), Failure>;

    /// `KVM_TDX_INIT_MEM_REGION`: adds pages, measured or not, and advances `region` past those that it has added, also
    /// when it fails. KVM reads the contents as userspace's: a bad address is an errno.
    ///
    /// # Errors
    /// `EINVAL` before `KVM_TDX_INIT_VCPU`, after `KVM_TDX_FINALIZE_VM`, for a bad region, and for a page without a slot,
    /// without a file, or that is not private; `EINTR` and `EAGAIN` ask for another call; `EIO` for a page that was added
    /// before; `EFAULT`, `ENOMEM`.
    fn init_mem_region(&mut self, region: &mut InitMemRegion, measure: bool) -> Result<(), Failure>;

    /// `KVM_TDX_GET_CPUID`: what this vCPU is going to see of CPUID, for `KVM_SET_CPUID2`.
    ///
    /// # Errors
    /// `EINVAL` before `KVM_TDX_INIT_VCPU` and after `KVM_TDX_FINALIZE_VM`; `E2BIG` for more entries than there is room for.
    fn td_cpuid(&mut self) -> Result<Vec<kvm_cpuid_entry2>, Failure>;
}
