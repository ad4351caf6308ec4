//! Structures and numbers of KVM's interface for TDs, which kvm-bindings lacks, with the proof that they are laid out as the
//! kernel's.
//!
//! Plain data, nothing is interpreted here. Mirrors `arch/x86/include/uapi/asm/kvm.h` and `struct kvm_run` of
//! `include/uapi/linux/kvm.h`, Linux 7.3.

use std::mem::{offset_of, size_of};

use kvm_bindings::{KVM_X86_TDX_VM, KVMIO, kvm_cpuid_entry2, kvm_run};
use nix::request_code_readwrite;

/// `KVM_X86_TDX_VM`.
pub const VM_TYPE: u64 = KVM_X86_TDX_VM as u64;
/// `KVM_EXIT_TDX`.
pub const EXIT_TDX: u32 = 40;
/// `KVM_TDX_MEASURE_MEMORY_REGION`, a flag of [`CommandId::InitMemRegion`].
pub const MEASURE_MEMORY_REGION: u32 = 1 << 0;
/// `TDX_TD_ATTRIBUTES_SEPT_VE_DISABLE`: a touch of a page that was not accepted does not raise #VE in the guest. The one
/// attribute that KVM supports.
pub const ATTRIBUTE_SEPT_VE_DISABLE: u64 = 1 << 28;
/// The most CPUID entries that `KVM_TDX_INIT_VM` takes.
pub const MAX_CPUID_ENTRIES: usize = 256;
/// Room for the entries of `KVM_TDX_CAPABILITIES`: more than any module has.
pub const ROOM_FOR_CPUID: usize = 1024;

/// `enum kvm_tdx_cmd_id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum CommandId {
    /// `KVM_TDX_CAPABILITIES`, on the VM: [`Capabilities`].
    Capabilities = 0,
    /// `KVM_TDX_INIT_VM`, on the VM: [`InitVm`].
    InitVm = 1,
    /// `KVM_TDX_INIT_VCPU`, on a vCPU; the data is its first RCX.
    InitVcpu = 2,
    /// `KVM_TDX_INIT_MEM_REGION`, on a vCPU: [`InitMemRegion`], which it advances.
    InitMemRegion = 3,
    /// `KVM_TDX_FINALIZE_VM`, on the VM.
    FinalizeVm = 4,
    /// `KVM_TDX_GET_CPUID`, on a vCPU: [`Cpuid`].
    GetCpuid = 5,
}

impl CommandId {
    /// The name in the kernel's header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Capabilities => "KVM_TDX_CAPABILITIES",
            Self::InitVm => "KVM_TDX_INIT_VM",
            Self::InitVcpu => "KVM_TDX_INIT_VCPU",
            Self::InitMemRegion => "KVM_TDX_INIT_MEM_REGION",
            Self::FinalizeVm => "KVM_TDX_FINALIZE_VM",
            Self::GetCpuid => "KVM_TDX_GET_CPUID",
        }
    }
}

/// `struct kvm_tdx_cmd`: the argument of `KVM_MEMORY_ENCRYPT_OP`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Command {
    /// [`CommandId`].
    pub id: u32,
    /// Flags of the command.
    pub flags: u32,
    /// Its argument, or the argument's address.
    pub data: u64,
    /// Zero on the way in; on the way out what the TDX module answered, for commands on the VM.
    pub hw_error: u64,
}

/// `struct kvm_cpuid2` with room for `N` entries.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Cpuid<const N: usize> {
    /// Entries that count.
    pub nent: u32,
    /// Must be zero.
    pub padding: u32,
    /// The entries.
    pub entries: [kvm_cpuid_entry2; N],
}

impl<const N: usize> Cpuid<N> {
    /// The entries that count.
    pub fn used(&self) -> &[kvm_cpuid_entry2] {
        let nent = usize::try_from(self.nent).unwrap_or(usize::MAX);
        self.entries.get(..nent).unwrap_or(&self.entries)
    }
}

/// `struct kvm_tdx_capabilities`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Capabilities<const N: usize> {
    /// Attributes that a TD may have.
    pub supported_attrs: u64,
    /// Extended features that a TD may have, as in XCR0 and `IA32_XSS`.
    pub supported_xfam: u64,
    /// TDVMCALLs that the kernel answers by itself, leaf 1's r11.
    pub kernel_tdvmcallinfo_1_r11: u64,
    /// TDVMCALLs that userspace has to answer, leaf 1's r11.
    pub user_tdvmcallinfo_1_r11: u64,
    /// As above, leaf 1's r12.
    pub kernel_tdvmcallinfo_1_r12: u64,
    /// As above, leaf 1's r12.
    pub user_tdvmcallinfo_1_r12: u64,
    /// Zero.
    pub reserved: [u64; 250],
    /// CPUID bits that may be configured.
    pub cpuid: Cpuid<N>,
}

/// `struct kvm_tdx_init_vm`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct InitVm<const N: usize> {
    /// TD attributes.
    pub attributes: u64,
    /// Extended features.
    pub xfam: u64,
    /// `MRCONFIGID`.
    pub mrconfigid: [u64; 6],
    /// `MROWNER`.
    pub mrowner: [u64; 6],
    /// `MROWNERCONFIG`.
    pub mrownerconfig: [u64; 6],
    /// Must be zero.
    pub reserved: [u64; 12],
    /// What the TD sees of CPUID.
    pub cpuid: Cpuid<N>,
}

/// `struct kvm_tdx_init_mem_region`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct InitMemRegion {
    /// Address of the contents in this process; aligned, and not zero even for zeroes.
    pub source_addr: u64,
    /// First byte, without the shared bit.
    pub gpa: u64,
    /// Pages that are still to be added.
    pub nr_pages: u64,
}

/// The member `tdx` of `kvm_run`'s union.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct TdxExit {
    /// Zero so far.
    pub flags: u64,
    /// Which TDVMCALL.
    pub nr: u64,
    /// The status for the guest.
    pub ret: u64,
    /// What the call has: [`GET_QUOTE`], [`GET_TD_VM_CALL_INFO`], [`SETUP_EVENT_NOTIFY_INTERRUPT`] say what stands where.
    pub data: [u64; 5],
}

/// `TDVMCALL_GET_TD_VM_CALL_INFO`: `data` is leaf, r11, r12, r13, r14.
pub const GET_TD_VM_CALL_INFO: u64 = 0x10000;
/// `TDVMCALL_MAP_GPA`; the kernel turns it into hypercalls.
pub const MAP_GPA: u64 = 0x10001;
/// `TDVMCALL_GET_QUOTE`: `data` is gpa, size.
pub const GET_QUOTE: u64 = 0x10002;
/// `TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT`: `data` is the vector.
pub const SETUP_EVENT_NOTIFY_INTERRUPT: u64 = 0x10004;

/// Checks `field` of `structure` against the offset and size of the kernel's header.
macro_rules! layout {
    ($structure:ty, $size:expr, $($offset:literal : $bytes:literal $field:ident),+ $(,)?) => {
        const _: () = {
            const fn bytes<S, T>(_: fn(&S) -> &T) -> usize {
                size_of::<T>()
            }
            assert!(size_of::<$structure>() == $size);
            $(
                assert!(offset_of!($structure, $field) == $offset);
                assert!(bytes(|structure: &$structure| &structure.$field) == $bytes);
            )+
        };
    };
}

layout!(Command, 24, 0:4 id, 4:4 flags, 8:8 data, 16:8 hw_error);
layout!(Cpuid<0>, 8, 0:4 nent, 4:4 padding, 8:0 entries);
layout!(Cpuid<3>, 8 + 40 * 3, 8:120 entries);
layout!(Capabilities<0>, 2056, 0:8 supported_attrs, 8:8 supported_xfam, 16:8 kernel_tdvmcallinfo_1_r11,
    24:8 user_tdvmcallinfo_1_r11, 32:8 kernel_tdvmcallinfo_1_r12, 40:8 user_tdvmcallinfo_1_r12, 48:2000 reserved,
    2048:8 cpuid);
layout!(Capabilities<2>, 2056 + 40 * 2, 2048:88 cpuid);
layout!(InitVm<0>, 264, 0:8 attributes, 8:8 xfam, 16:48 mrconfigid, 64:48 mrowner, 112:48 mrownerconfig,
    160:96 reserved, 256:8 cpuid);
layout!(InitVm<2>, 264 + 40 * 2, 256:88 cpuid);
layout!(InitMemRegion, 24, 0:8 source_addr, 8:8 gpa, 16:8 nr_pages);
layout!(kvm_cpuid_entry2, 40, 0:4 function, 4:4 index, 8:4 flags, 12:4 eax, 16:4 ebx, 20:4 ecx, 24:4 edx, 28:12 padding);

/// Offsets from the start of `kvm_run`, in which the union is at 32.
const _: () = {
    assert!(offset_of!(kvm_run, __bindgen_anon_1) == 32);
    assert!(offset_of!(TdxExit, flags) == 0);
    assert!(offset_of!(TdxExit, nr) == 40 - 32);
    assert!(offset_of!(TdxExit, ret) == 48 - 32);
    // gpa of a quote, leaf of an inquiry, vector of a notification; then size, and r11 to r14.
    assert!(offset_of!(TdxExit, data) == 56 - 32);
    assert!(size_of::<TdxExit>() <= 256);
    assert!(request_code_readwrite!(KVMIO, 0xba, size_of::<nix::libc::c_ulong>()) == 0xc008_aeba);
    assert!(VM_TYPE == 5);
};
