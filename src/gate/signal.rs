//! The usual way out of `KVM_RUN`: `immediate_exit` and a signal.
//!
//! A signal alone may come just before the ioctl and be missed; `immediate_exit` alone is looked at only on the way in.
//! Together nothing is missed. KVM asks of the byte only whether it is zero, so the gate has a bit of it to itself and forgets
//! nothing but that: a VMM that sets it for a reason of its own, before the gate is entered, is not overruled.
#![allow(unsafe_code, reason = "another thread writes a byte of the vCPU's kvm_run and sends a signal")]

use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;
use nix::libc;
use nix::sys::signal::Signal;
use nix::unistd::{getpid, gettid};

use super::Kick;

/// The gate's bit of `immediate_exit`. VMMs write 1.
const OURS: u8 = 1 << 1;

thread_local! {
    /// This thread, as the kernel numbers it: asked once, and not each time that a vCPU runs.
    static ME: i32 = gettid().as_raw();
}

/// Kicks a vCPU of `kvm-ioctls`. `KVM_CAP_IMMEDIATE_EXIT` is assumed; every kernel with guest_memfd has it.
#[derive(Debug)]
pub struct SignalKick {
    immediate_exit: AtomicPtr<u8>,
    signal: Signal,
    /// The thread that entered last, as the kernel numbers it; zero before one has.
    thread: AtomicI32,
}

impl SignalKick {
    /// Kicks `vcpu` with `signal`, for which the VMM has installed a handler (one that does nothing will do) and which it
    /// does not block.
    ///
    /// A VMM that stops its vCPUs by `immediate_exit` as well goes on doing so: what it writes there stays until it clears
    /// the byte, which it does between runs, with the gate left.
    ///
    /// # Safety
    /// `vcpu` must live as long as this value, and nobody else may write its `immediate_exit` meanwhile except atomically.
    pub unsafe fn new(vcpu: &mut VcpuFd, signal: Signal) -> Self {
        let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
        Self { immediate_exit: AtomicPtr::new(immediate_exit), signal, thread: AtomicI32::new(0) }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let byte = self.immediate_exit.load(Ordering::Relaxed);
        // SAFETY: `new` was promised that the mapping lives, and that this byte is written atomically only; KVM reads it at
        // any time.
        unsafe { AtomicU8::from_ptr(byte) }
    }
}

impl Kick for SignalKick {
    fn entering(&self) {
        self.thread.store(ME.with(|me| *me), Ordering::SeqCst);
        self.immediate_exit().fetch_and(!OURS, Ordering::SeqCst);
    }

    fn kick(&self) {
        self.immediate_exit().fetch_or(OURS, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // By its number in the kernel, for which it does not matter if the thread has ended meanwhile: `immediate_exit`
            // serves if no signal can be sent.
            // SAFETY: a system call that takes numbers only, and signals a thread of this process or none.
            let _sent =
                unsafe { libc::syscall(libc::SYS_tgkill, getpid().as_raw(), thread, self.signal as libc::c_int) };
        }
    }
}
