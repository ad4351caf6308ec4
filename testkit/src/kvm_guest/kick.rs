//! Getting a vCPU out of `KVM_RUN`, from another thread.
//!
//! A signal alone may come just before the ioctl and be missed; `immediate_exit` alone is looked at only on the way in.
//! Together nothing is missed, and no time matters.
#![allow(unsafe_code, reason = "another thread writes to the vCPU's kvm_run, and a signal handler is installed")]

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use cvm_memory::gate;
use kvm_ioctls::VcpuFd;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// What gets a thread out of `KVM_RUN`.
const SIGNAL: Signal = Signal::SIGUSR1;

/// `immediate_exit` of a mapped `kvm_run`.
struct ImmediateExit(*mut u8);

// SAFETY: the byte is only accessed atomically, by whichever thread holds the lock around it.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn set(&self, value: u8) {
        // SAFETY: the pointer is into a mapping that outlives this value (`Kick` forgets it before the vCPU goes), and
        // everybody writes this byte through here; KVM reads it at any time.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct State {
    /// Until the vCPU goes.
    exit: Option<ImmediateExit>,
    /// Who is running the vCPU.
    thread: Option<Pthread>,
    /// When the watchdog gets it out; `None` while the vCPU does not run.
    deadline: Option<Instant>,
    kicked: bool,
    /// The watchdog did.
    expired: bool,
}

/// Who asked a run to end that ended with `EINTR`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Somebody kicked it.
    Kicked,
    /// It took its time.
    Expired,
    /// Another signal.
    Other,
}

impl State {
    fn set_immediate(&self, immediate: bool) {
        if let Some(exit) = &self.exit {
            exit.set((immediate || self.kicked || self.expired).into());
        }
    }

    /// Gets the vCPU out, or keeps it from going in.
    fn expel(&self) {
        self.set_immediate(true);
        if let Some(thread) = self.thread {
            // The thread is alive: it takes itself off under the lock that is held here.
            pthread_kill(thread, SIGNAL).expect("a valid signal");
        }
    }
}

/// Makes a vCPU return from `KVM_RUN`. Clones are for the same vCPU, and may outlive it.
#[derive(Clone)]
pub struct Kick(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kick {
    pub(crate) fn new(vcpu: &mut VcpuFd) -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            extern "C" fn nothing(_: nix::libc::c_int) {}
            let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
            // SAFETY: a handler that does nothing may run anywhere.
            unsafe { sigaction(SIGNAL, &action) }.expect("a valid signal");
        });
        let shared = Shared::default();
        shared.lock().exit = Some(ImmediateExit(&raw mut vcpu.get_kvm_run().immediate_exit));
        Self(Arc::new(shared))
    }

    /// Makes the run in progress, or else the next one, fail with `EINTR`.
    pub fn kick(&self) {
        let mut state = self.0.lock();
        state.kicked = true;
        state.expel();
    }

    /// Makes the next run only complete what the last one left, or no longer so.
    pub(crate) fn set_immediate(&self, immediate: bool) {
        self.0.lock().set_immediate(immediate);
    }

    /// The calling thread is about to run the vCPU, for at most `patience`.
    pub(crate) fn enter(&self, patience: Duration) {
        let mut state = self.0.lock();
        state.thread = Some(pthread_self());
        state.deadline = Instant::now().checked_add(patience);
        self.0.changed.notify_all();
    }

    /// The vCPU came back, and whether with `EINTR`. Returns why, if so.
    pub(crate) fn leave(&self, interrupted: bool) -> Option<Cause> {
        let mut state = self.0.lock();
        state.thread = None;
        state.deadline = None;
        // A kick that came too late for a run that ended otherwise is kept for the next; the watchdog's was for that one run.
        let expired = std::mem::take(&mut state.expired);
        let kicked = interrupted && std::mem::take(&mut state.kicked);
        state.set_immediate(false);
        interrupted.then_some(match (kicked, expired) {
            (true, _) => Cause::Kicked,
            (false, true) => Cause::Expired,
            (false, false) => Cause::Other,
        })
    }

    /// The vCPU goes.
    pub(crate) fn forget(&self) {
        self.0.lock().exit = None;
        self.0.changed.notify_all();
    }

    /// Gets the vCPU out when it has run for too long, until it goes.
    pub(crate) fn watch(&self) {
        let kick = self.clone();
        let watch = move || {
            let mut state = kick.0.lock();
            while state.exit.is_some() {
                let now = Instant::now();
                state = match state.deadline {
                    None => kick.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                    Some(deadline) if now < deadline => {
                        let wait = kick.0.changed.wait_timeout(state, deadline - now);
                        wait.unwrap_or_else(PoisonError::into_inner).0
                    }
                    Some(_) => {
                        state.deadline = None;
                        state.expired = true;
                        state.expel();
                        state
                    }
                };
            }
        };
        std::thread::Builder::new().name("vcpu watchdog".into()).spawn(watch).expect("a thread");
    }
}

/// A kick that came too late makes the next run fail once, so nothing needs to be forgotten on the way in.
impl gate::Kick for Kick {
    fn entering(&self) {}

    fn kick(&self) {
        self.kick();
    }
}

impl fmt::Debug for Kick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kick").field("kicked", &self.0.lock().kicked).finish_non_exhaustive()
    }
}
