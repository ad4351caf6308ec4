//! What a vCPU of a TD comes back with that no other vCPU does: requests of the TD, and the end of it.
//!
//! Page state changes are not among them: KVM turns those into hypercalls and memory faults, and
//! [`exits`](cvm_memory::exits) handles them as everybody's. Mirrors `KVM_EXIT_TDX` of `include/uapi/linux/kvm.h` and
//! `tdx_handle_ept_violation()`.
#![allow(unsafe_code, reason = "kvm_run's union is read here")]

use kvm_bindings::kvm_run;
use nix::errno::Errno;

use crate::uapi::{self, TdxExit};

/// What a TD asks of userspace in a `KVM_EXIT_TDX`. Addresses in bytes, without the shared bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TdVmCall {
    /// Which optional TDVMCALLs there are.
    GetTdVmCallInfo {
        /// The leaf; 1.
        leaf: u64,
    },
    /// A quote for the report in shared memory.
    GetQuote {
        /// Where.
        gpa: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The vector by which the guest wants to hear of events.
    SetupEventNotifyInterrupt {
        /// Which.
        vector: u64,
    },
    /// Any other, by number.
    Other(u64),
}

impl From<&TdxExit> for TdVmCall {
    fn from(exit: &TdxExit) -> Self {
        let [first, second, ..] = exit.data;
        match exit.nr {
            uapi::GET_TD_VM_CALL_INFO => Self::GetTdVmCallInfo { leaf: first },
            uapi::GET_QUOTE => Self::GetQuote { gpa: first, size: second },
            uapi::SETUP_EVENT_NOTIFY_INTERRUPT => Self::SetupEventNotifyInterrupt { vector: first },
            other => Self::Other(other),
        }
    }
}

/// The TDX part of `kvm_run` after an exit with [`uapi::EXIT_TDX`], `None` after any other. What is written to `ret` and
/// `data` reaches the guest with the next run.
pub fn tdx_exit(run: &mut kvm_run) -> Option<&mut TdxExit> {
    if run.exit_reason != uapi::EXIT_TDX {
        return None;
    }
    let union = &raw mut run.__bindgen_anon_1;
    // SAFETY: the union is 256 bytes of plain integers, initialised as every `kvm_run` is, at offset 32 of a structure that is
    // aligned to words: aligned and long enough for eight of them. The borrow of `run` keeps everybody else out meanwhile.
    Some(unsafe { &mut *union.cast::<TdxExit>() })
}

/// Why `KVM_RUN` of a TD's vCPU has failed. A memory fault is none: that is an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// KVM has given the TD up, and every later call on it fails. KVM does not say why; with `SEPT_VE_DISABLE` this is what
    /// becomes of a TD that touches a page which it has not accepted, or not again since it was last shared, freed, or
    /// without a slot. Instructions in shared memory do the same.
    #[error("the td is dead: its guest touched a page that it had not accepted, or executed shared memory")]
    Dead,
    /// The vCPU was not initialised, the TD is not finalised, or the last hypercall was answered with what KVM does not take.
    #[error("the vcpu may not run: it or its td is not complete, or its last hypercall was answered wrongly")]
    NotReady,
    /// Anything else that KVM fails with.
    #[error("KVM_RUN")]
    Other(#[source] Errno),
}

impl RunError {
    /// What an errno of `KVM_RUN` means for a TD; `None` for those that only ask for another run.
    pub const fn from_errno(errno: Errno) -> Option<Self> {
        match errno {
            Errno::EINTR | Errno::EAGAIN => None,
            Errno::EIO => Some(Self::Dead),
            Errno::EINVAL => Some(Self::NotReady),
            errno => Some(Self::Other(errno)),
        }
    }
}
