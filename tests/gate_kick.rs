//! The kick for vCPUs of the real KVM: what it must not undo, and whom it may be sent to.
#![allow(unsafe_code, reason = "a kick is made of a vCPU that has to outlive it")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use cvm_memory::addr::Gpa;
use cvm_memory::gate::{Gate, Kick, SignalKick};
use cvm_memory::hypervisor::Platform;
use cvm_memory::hypervisor::kvm::{KvmVcpu, KvmVm};
use cvm_memory::memory::CvmMemory;
use cvm_memory_testkit::kvm;
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// A vCPU, and a kick for it.
fn kicked(vm: &KvmVm) -> (KvmVcpu, SignalKick) {
    extern "C" fn nothing(_: nix::libc::c_int) {}
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: a handler that does nothing may run anywhere.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
    // SAFETY: the tests drop both together, and write the byte atomically.
    let kick = unsafe { SignalKick::new(vcpu.fd_mut(), Signal::SIGUSR1) };
    (vcpu, kick)
}

/// One without memory: whatever it does when it is run is over at once.
fn vcpu() -> Option<(KvmVcpu, SignalKick)> {
    Some(kicked(&kvm(Platform::DEFAULT)?))
}

/// A VMM asks a vCPU to stop, as VMMs do, just before it enters the gate.
#[test]
fn only_kicks_of_the_gate_are_forgotten() {
    let Some((mut vcpu, kick)) = vcpu() else { return };
    let byte = &raw mut vcpu.fd_mut().get_kvm_run().immediate_exit;
    // SAFETY: the mapping lives as long as the vCPU, and the byte is written atomically only.
    let immediate_exit = unsafe { AtomicU8::from_ptr(byte) };

    immediate_exit.store(1, Ordering::SeqCst);
    kick.entering();
    assert_eq!(vcpu.enter(), Err(Errno::EINTR), "the VMM's own");
    // It answers its own, and only now is the vCPU to run.
    immediate_exit.store(0, Ordering::SeqCst);
    kick.entering();
    assert_ne!(vcpu.enter(), Err(Errno::EINTR));

    kick.kick();
    assert_eq!(vcpu.enter(), Err(Errno::EINTR), "the gate's");
    kick.entering();
    assert_ne!(vcpu.enter(), Err(Errno::EINTR));

    // Both: neither takes the other's.
    kick.kick();
    immediate_exit.fetch_or(1, Ordering::SeqCst);
    kick.entering();
    assert_eq!(vcpu.enter(), Err(Errno::EINTR));
}

/// Whoever entered last need not be there any more. The stack is one that is given back when its thread has ended.
#[test]
fn a_thread_that_has_ended_is_no_target() {
    let Some((mut vcpu, kick)) = vcpu() else { return };
    thread::scope(|scope| {
        let entered = thread::Builder::new().stack_size(1 << 30).spawn_scoped(scope, || kick.entering()).unwrap();
        entered.join().unwrap();
        kick.kick();
    });
    assert_eq!(vcpu.enter(), Err(Errno::EINTR));
}

/// One that does nothing but loop is got out by nothing else, whether the kick comes before it is in the guest or later.
#[test]
fn a_guest_that_never_exits_is_got_out() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let memory = CvmMemory::builder().plain_ram(0, 0x1000).build(Arc::new(vm.clone())).unwrap();
    memory.write(Gpa(0), &[0xeb, 0xfe]).unwrap(); // jmp $
    let (mut vcpu, kick) = kicked(&vm);
    let mut sregs = vcpu.fd().get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.fd().set_sregs(&sregs).unwrap();
    vcpu.fd().set_regs(&kvm_bindings::kvm_regs { rflags: 2, ..Default::default() }).unwrap();
    let pass = Gate::register(memory.gate(), Arc::new(kick));
    let left = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..100 {
                let inside = pass.enter().unwrap();
                assert_eq!(vcpu.enter(), Err(Errno::EINTR));
                drop(inside);
                left.fetch_add(1, Ordering::SeqCst);
            }
        });
        while left.load(Ordering::SeqCst) < 100 {
            drop(memory.gate().close(Duration::from_secs(60)).unwrap());
        }
    });
}
