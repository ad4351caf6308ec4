//! Keeps vCPUs outside the guest while its memory is in flux.
//!
//! KVM replaces a slot in two calls, and a vCPU that comes by in between finds no memory there: its access turns into
//! device input or output that cannot be repeated. So a commit that replaces slots [closes](Gate::close) the gate, kicks
//! whoever is inside, waits, and opens it again. A thread [enters](VcpuPass::enter) around each `KVM_RUN`, and only around
//! that: an exit that is being handled holds nobody up, and is not held up.
//!
//! What would wait for itself is an error instead: closing the gate from inside or twice by one thread, entering it while
//! this thread keeps it closed, one vCPU entering twice. Of several threads that close it, each waits its turn, but not for ever:
//! who keeps it closed may want what the one who waits has. The gate knows nothing of memory, and runs nothing.

mod signal;

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::sync::{Condvar, Mutex, MutexGuard, ThreadId, current_thread};

pub use signal::SignalKick;

/// Gets a vCPU out of `KVM_RUN`. Called with the gate locked, so an implementation must not use the gate.
pub trait Kick: fmt::Debug + Send + Sync {
    /// The calling thread is about to enter: an earlier [`kick`](Self::kick) is forgotten, and nothing else. Nothing after this
    /// may forget one.
    fn entering(&self);

    /// The run in progress, or else the next one, returns `EINTR` at once. The thread that entered is alive.
    fn kick(&self);
}

/// A vCPU, as the gate knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub u64);

impl fmt::Display for VcpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Why the gate was not closed, or not entered. It is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// vCPUs did not leave the guest in time. They have been kicked, and may go on.
    #[error("vcpus {inside:?} did not leave the guest within {patience:?}")]
    NeverLeft {
        /// Which.
        inside: Vec<VcpuId>,
        /// How long they had.
        patience: Duration,
    },
    /// Another thread did not open it in time. It may be waiting for this one.
    #[error("another thread keeps the gate closed for longer than {patience:?}")]
    KeptClosed {
        /// How long it had.
        patience: Duration,
    },
    /// This thread is inside with a vCPU: it would wait for itself.
    #[error("this thread is inside with vcpu {vcpu}")]
    Inside {
        /// The vCPU.
        vcpu: VcpuId,
    },
    /// This thread keeps the gate closed: it would wait for itself.
    #[error("this thread keeps the gate closed")]
    ClosedByMe,
    /// The vCPU is inside already.
    #[error("vcpu {vcpu} is inside already")]
    Twice {
        /// The vCPU.
        vcpu: VcpuId,
    },
}

#[derive(Debug)]
struct Member {
    id: VcpuId,
    kick: Arc<dyn Kick>,
    inside: Option<ThreadId>,
}

#[derive(Debug, Default)]
struct State {
    members: Vec<Member>,
    next: u64,
    /// Who keeps it closed.
    closed: Option<ThreadId>,
    /// How often it has been closed.
    closures: u64,
}

/// The gate of one VM. See the [module](self).
///
/// ```
/// use cvm_memory::gate::{Gate, Kick};
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// # #[derive(Debug)]
/// # struct Signal;
/// # impl Kick for Signal { fn entering(&self) {} fn kick(&self) {} }
/// let gate = Arc::new(Gate::default());
/// let pass = Gate::register(&gate, Arc::new(Signal));
/// // The thread of the vCPU, for each KVM_RUN:
/// {
///     let _inside = pass.enter()?;
///     // vcpu.run()
/// }
/// // Whoever replaces slots:
/// let _closed = gate.close(Duration::from_secs(1))?;
/// # Ok::<(), cvm_memory::gate::GateError>(())
/// ```
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// A vCPU's right to pass the gate. It ends with this value.
#[derive(Debug)]
pub struct VcpuPass {
    gate: Arc<Gate>,
    id: VcpuId,
}

/// A vCPU in the guest, or about to be. Dropping it is leaving. It stays with the thread that has entered, since that is the one
/// that is kicked:
///
/// ```compile_fail,E0277
/// fn to_another_thread(inside: impl Send) {}
/// # fn f(pass: &cvm_memory::gate::VcpuPass) {
/// to_another_thread(pass.enter());
/// # }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Inside<'a> {
    pass: &'a VcpuPass,
    stays: PhantomData<*const ()>,
}

/// The gate is closed, and nobody is inside. Dropping it opens the gate.
#[derive(Debug)]
#[must_use]
pub struct Closed<'a> {
    gate: &'a Gate,
}

impl Gate {
    /// Lets a vCPU use the gate. One that runs without does so at its own risk: nobody keeps it out of memory in flux.
    pub fn register(gate: &Arc<Self>, kick: Arc<dyn Kick>) -> VcpuPass {
        let mut state = gate.lock();
        let id = VcpuId(state.next);
        state.next = state.next.wrapping_add(1);
        state.members.push(Member { id, kick, inside: None });
        VcpuPass { gate: Arc::clone(gate), id }
    }

    /// Closes the gate: waits for others who keep it closed, kicks those inside, and waits for them to leave.
    ///
    /// An edit of the layout keeps its memory locked while it waits for the gate. So who keeps the gate closed and converts, pins,
    /// reads or writes memory, or adds slots, may have to wait until such an edit has lost its patience.
    ///
    /// # Errors
    /// [`GateError::KeptClosed`] and [`GateError::NeverLeft`] after `patience` each; [`GateError::Inside`] and
    /// [`GateError::ClosedByMe`] at once.
    pub fn close(&self, patience: Duration) -> Result<Closed<'_>, GateError> {
        let me = current_thread().id();
        let mut state = self.lock();
        refuse(&state, me)?;
        let mut started = None;
        while state.closed.is_some() {
            let left = patience.saturating_sub(started.get_or_insert_with(Instant::now).elapsed());
            if left.is_zero() {
                return Err(GateError::KeptClosed { patience });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.closed = Some(me);
        state.closures = state.closures.wrapping_add(1);
        for member in state.members.iter().filter(|member| member.inside.is_some()) {
            member.kick.kick();
        }
        let mut started = None;
        while state.members.iter().any(|member| member.inside.is_some()) {
            let left = patience.saturating_sub(started.get_or_insert_with(Instant::now).elapsed());
            if left.is_zero() {
                let inside = state.members.iter().filter(|member| member.inside.is_some()).map(|member| member.id);
                let inside = inside.collect();
                state.closed = None;
                drop(state);
                self.changed.notify_all();
                return Err(GateError::NeverLeft { inside, patience });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Closed { gate: self })
    }

    /// Refuses a thread that could not close the gate, before it waits for something else.
    ///
    /// # Errors
    /// [`GateError::Inside`] and [`GateError::ClosedByMe`].
    pub fn refuse_deadlock(&self) -> Result<(), GateError> {
        refuse(&self.lock(), current_thread().id())
    }

    /// How often it has been closed.
    pub fn closures(&self) -> u64 {
        self.lock().closures
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refuse(state: &State, me: ThreadId) -> Result<(), GateError> {
    if state.closed == Some(me) {
        return Err(GateError::ClosedByMe);
    }
    match state.members.iter().find(|member| member.inside == Some(me)) {
        Some(member) => Err(GateError::Inside { vcpu: member.id }),
        None => Ok(()),
    }
}

impl VcpuPass {
    /// Which vCPU it is, in errors.
    pub const fn id(&self) -> VcpuId {
        self.id
    }

    /// Waits until the gate is open, and enters. Run the vCPU, and drop what this returns before its exit is handled.
    ///
    /// # Errors
    /// [`GateError::ClosedByMe`], [`GateError::Twice`].
    pub fn enter(&self) -> Result<Inside<'_>, GateError> {
        let me = current_thread().id();
        let mut state = self.gate.lock();
        while let Some(closer) = state.closed {
            if closer == me {
                return Err(GateError::ClosedByMe);
            }
            state = self.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(member) = state.members.iter_mut().find(|member| member.id == self.id) {
            if member.inside.is_some() {
                return Err(GateError::Twice { vcpu: self.id });
            }
            member.inside = Some(me);
            // Under the lock: a kick that comes later is not forgotten.
            member.kick.entering();
        }
        Ok(Inside { pass: self, stays: PhantomData })
    }
}

impl Drop for VcpuPass {
    fn drop(&mut self) {
        self.gate.lock().members.retain(|member| member.id != self.id);
        self.gate.changed.notify_all();
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let Inside { pass, .. } = self;
        if let Some(member) = pass.gate.lock().members.iter_mut().find(|member| member.id == pass.id) {
            member.inside = None;
        }
        pass.gate.changed.notify_all();
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.lock().closed = None;
        self.gate.changed.notify_all();
    }
}

#[cfg(all(test, loom))]
mod models;
#[cfg(all(test, not(loom)))]
mod tests;
