//! The real KVM: [`KvmVm`] implements [`Hypervisor`] on a kvm-ioctls `VmFd`, [`KvmVcpu`] implements [`Vcpu`] on a `VcpuFd`.
//!
//! Nothing is checked, merged or retried here, and no errno is changed: what the kernel answers is what the caller sees.
//! kvm-ioctls makes the calls where it has them; `raw` is the one table of those it lacks.
//!
//! A VMM that owns its `VmFd` and its vCPUs keeps both: [`KvmVm::from_vm`] shares the former, and
//! [`Exit::from_kvm`] translates what `VcpuFd::run` gave. Two things have to be done around that call, because kvm-ioctls
//! reports a memory fault as success and forgets which errno came with it:
//!
//! ```no_run
//! use cvm_memory::hypervisor::Exit;
//! use nix::errno::Errno;
//!
//! # fn handle(exit: Exit<'_>) {}
//! # fn vcpu_loop(mut vcpu: kvm_ioctls::VcpuFd) -> Result<(), kvm_ioctls::Error> {
//! loop {
//!     // KVM clears the reason only when it enters the guest. If completing the previous exit fails, the old one would
//!     // still stand there, and an old memory fault would be taken for a new one.
//!     vcpu.get_kvm_run().exit_reason = 0;
//!     let exit = vcpu.run()?;
//!     // Before anything else that could make a system call: EHWPOISON and EFAULT differ only here.
//!     let errno = Errno::last();
//!     handle(Exit::from_kvm(exit, errno));
//! }
//! # }
//! ```
//!
//! Such a VMM sees a guest_memfd that ran out of memory (`ENOMEM`, `EIO`, ...) as an error of `run()`; [`KvmVcpu::run`]
//! reports it as the memory fault that it is.
//!
//! Mirrors `kvm_vm_ioctl()` and `kvm_vcpu_ioctl()` (`virt/kvm/kvm_main.c`).
//!
//! [`Hypervisor`]: super::Hypervisor
//! [`Vcpu`]: super::Vcpu
//! [`Exit::from_kvm`]: super::Exit::from_kvm
//! [`KvmVcpu::run`]: super::Vcpu::run

mod exit;
mod gmem;
mod raw;
mod ring;
mod vcpu;
mod vm;

use nix::errno::Errno;

use super::MissingCapability;

pub use vcpu::KvmVcpu;
pub use vm::KvmVm;

/// Why a VM or a vCPU could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KvmError {
    /// This KVM does not offer the VM type.
    #[error("vm type {vm_type:#x} is not offered by this kvm")]
    VmType {
        /// The argument of `KVM_CREATE_VM`.
        vm_type: u64,
        /// `KVM_CAP_VM_TYPES`, with the bit that is not there.
        #[source]
        missing: MissingCapability,
    },
    /// The system call failed.
    #[error("{call} with argument {argument:#x}")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// Its argument: the VM type, or the vCPU's id.
        argument: u64,
        /// What the kernel answered.
        #[source]
        errno: Errno,
    },
}

/// The errno that a kvm-ioctls call carried, as it is.
fn errno(error: kvm_ioctls::Error) -> Errno {
    Errno::from_raw(error.errno())
}
