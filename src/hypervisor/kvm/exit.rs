//! Exits, from `kvm_run` as KVM left it and from what kvm-ioctls made of it.
#![allow(unsafe_code, reason = "the payload of kvm_run is a C union")]

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_HYPERV, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_NMI, KVM_EXIT_SET_TPR, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_TPR_ACCESS,
    KVM_EXIT_UNKNOWN, KVM_EXIT_WATCHDOG, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, kvm_run,
};
use kvm_ioctls::VcpuExit;
use nix::errno::Errno;

use crate::hypervisor::{Exit, HypercallExit, MemoryFault, Mmio, exit_reason};

impl<'a> Exit<'a> {
    /// What `kvm_ioctls::VcpuFd::run` gave, for VMMs that run their vCPUs themselves.
    ///
    /// `errno` is the thread's errno right after that call ([`Errno::last`]); it tells a poisoned page from one to
    /// convert, and matters only for a memory fault. See the [module](crate::hypervisor::kvm) for the whole recipe. Exits
    /// that are none of this library's business become [`Exit::Other`]; a VMM keeps handling those by itself, before.
    pub fn from_kvm(exit: VcpuExit<'a>, errno: Errno) -> Self {
        match exit {
            VcpuExit::MemoryFault { flags, gpa, size } => Self::MemoryFault(MemoryFault { errno, flags, gpa, size }),
            VcpuExit::Hypercall(call) => Self::Hypercall(HypercallExit { nr: call.nr, args: call.args, ret: call.ret }),
            VcpuExit::MmioRead(gpa, data) => Self::Mmio(Mmio::Read { gpa, data }),
            VcpuExit::MmioWrite(gpa, data) => Self::Mmio(Mmio::Write { gpa, data }),
            VcpuExit::Hlt => Self::Halt,
            VcpuExit::Shutdown => Self::Shutdown,
            VcpuExit::FailEntry(reason, cpu) => Self::FailEntry { reason, cpu },
            VcpuExit::InternalError => Self::InternalError { suberror: None },
            VcpuExit::Unsupported(exit_reason::DIRTY_RING_FULL) => Self::DirtyRingFull,
            other => Self::Other(number(&other)),
        }
    }
}

/// The exit reason of an exit that has no variant of its own here, where x86 has it.
const fn number(exit: &VcpuExit<'_>) -> Option<u32> {
    Some(match exit {
        VcpuExit::Unknown => KVM_EXIT_UNKNOWN,
        VcpuExit::Exception => KVM_EXIT_EXCEPTION,
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => KVM_EXIT_IO,
        VcpuExit::Debug(_) => KVM_EXIT_DEBUG,
        VcpuExit::IrqWindowOpen => KVM_EXIT_IRQ_WINDOW_OPEN,
        VcpuExit::Intr => KVM_EXIT_INTR,
        VcpuExit::SetTpr => KVM_EXIT_SET_TPR,
        VcpuExit::TprAccess => KVM_EXIT_TPR_ACCESS,
        VcpuExit::Nmi => KVM_EXIT_NMI,
        VcpuExit::Watchdog => KVM_EXIT_WATCHDOG,
        VcpuExit::SystemEvent(..) => KVM_EXIT_SYSTEM_EVENT,
        VcpuExit::IoapicEoi(_) => KVM_EXIT_IOAPIC_EOI,
        VcpuExit::Hyperv => KVM_EXIT_HYPERV,
        VcpuExit::X86Rdmsr(_) => KVM_EXIT_X86_RDMSR,
        VcpuExit::X86Wrmsr(_) => KVM_EXIT_X86_WRMSR,
        VcpuExit::Unsupported(reason) => *reason,
        _ => return None,
    })
}

/// The memory fault in `run`, if that is why KVM came back. It is the one exit for which `KVM_RUN` fails, with `errno`.
///
/// `EINTR` and `EAGAIN` are never a fault's own: they ask for another run, which meets the fault again if it is still due.
pub(super) fn memory_fault(run: &kvm_run, errno: Errno) -> Option<MemoryFault> {
    if run.exit_reason != exit_reason::MEMORY_FAULT || matches!(errno, Errno::EINTR | Errno::EAGAIN) {
        return None;
    }
    // SAFETY: every member of the union is made of integers, so any bytes are a value of it; KVM has filled this one.
    let fault = unsafe { run.__bindgen_anon_1.memory_fault };
    Some(MemoryFault { errno, flags: fault.flags, gpa: fault.gpa, size: fault.size })
}

/// The exit in `run`, after a `KVM_RUN` that succeeded.
pub(super) fn decode(run: &mut kvm_run) -> Exit<'_> {
    let payload = &mut run.__bindgen_anon_1;
    match run.exit_reason {
        exit_reason::HYPERCALL => {
            // SAFETY: integers only, as above.
            let call = unsafe { &mut payload.hypercall };
            Exit::Hypercall(HypercallExit { nr: call.nr, args: call.args, ret: &mut call.ret })
        }
        exit_reason::MMIO => {
            // SAFETY: integers only, as above.
            let mmio = unsafe { &mut payload.mmio };
            let gpa = mmio.phys_addr;
            let len = usize::try_from(mmio.len).unwrap_or(usize::MAX).min(mmio.data.len());
            let (data, _) = mmio.data.split_at_mut(len);
            if mmio.is_write == 0 {
                Exit::Mmio(Mmio::Read { gpa, data })
            } else {
                Exit::Mmio(Mmio::Write { gpa, data })
            }
        }
        exit_reason::HLT => Exit::Halt,
        exit_reason::DIRTY_RING_FULL => Exit::DirtyRingFull,
        exit_reason::SHUTDOWN => Exit::Shutdown,
        exit_reason::FAIL_ENTRY => {
            // SAFETY: integers only, as above.
            let entry = unsafe { payload.fail_entry };
            Exit::FailEntry { reason: entry.hardware_entry_failure_reason, cpu: entry.cpu }
        }
        exit_reason::INTERNAL_ERROR => {
            // SAFETY: integers only, as above.
            let internal = unsafe { payload.internal };
            Exit::InternalError { suberror: Some(internal.suberror) }
        }
        reason => Exit::Other(Some(reason)),
    }
}

#[cfg(test)]
mod tests;
