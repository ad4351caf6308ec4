//! One entry point for vCPU exits that concern memory: what has happened, and what the VMM must do now.
//!
//! ```text
//! run → Exit → VcpuExits::handle → Action
//! ```
//!
//! A conversion that the guest asks for by hypercall or by touching a page in the other state is carried out; a page
//! declared private ahead of use is materialised; the answer to a hypercall is written where KVM expects it. Everything
//! else is told apart, so that a VMM need not guess: not our business, a guest that touches what is not there, a page
//! the hardware has lost, a fault that comes back however often it is resolved. Nothing that a guest does makes this
//! panic, wait for ever or spin: a vCPU whose identical fault has nothing left to resolve is reported
//! ([`Action::Stuck`]) after a few repeats.
//!
//! Device input and output passes through here as well, because it need not be any: an access to memory whose slot is just
//! being replaced looks like it, and is completed as what it was (`flux`).
//!
//! It runs no vCPU. Mirrors sections `KVM_EXIT_HYPERCALL` and `KVM_EXIT_MEMORY_FAULT` of
//! `Documentation/virt/kvm/api.rst`.

mod flux;
mod limit;

use std::fmt;
use std::sync::Arc;

use nix::errno::Errno;

use crate::addr::{Gfn, GfnRange, Gpa, PAGES_PER_1G};
use crate::convert::{ConvertError, LockError, Outcome, Request, RequestError, State, StepError};
use crate::hypervisor::{Exit, HypercallExit, MemoryFault, Mmio};
use crate::memory::CvmMemory;

use flux::Access;
use limit::RateLimit;

/// What the VMM must do.
#[derive(Debug)]
#[must_use]
pub enum Action {
    /// Enter the guest again. A hypercall's answer has been written.
    Resume(Handled),
    /// Not about page state: the VMM's own business.
    NotOurs,
    /// The guest did what cannot be resolved. The VM is whole: stop this vCPU, or inject what the platform has for it.
    GuestError(GuestError),
    /// KVM takes this private page for device input and output that it was before, and goes on doing so until the page is mapped:
    /// [prefault](CvmMemory::prefault) it, and enter the guest again. Only where the attribute alone decides what is private.
    Prefault(Gpa),
    /// The page's memory is broken. Convert it, punch it, inject a machine check, or stop.
    HwPoison(Gpa),
    /// The same fault came back again and again with nothing left to resolve.
    Stuck(MemoryFault),
    /// The kernel could not provide a private page (out of memory, platform refusal).
    Unresolvable(MemoryFault),
    /// A conversion could be neither completed nor undone. See [`Outcome::Poisoned`].
    Poisoned(Outcome),
}

/// What was done before the guest is entered again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// Pages were converted.
    Converted {
        /// How many.
        pages: u64,
    },
    /// Pages declared private were made so in KVM.
    Materialised {
        /// How many.
        pages: u64,
    },
    /// Nothing was left to do: somebody else had done it, or the pages were in that state.
    Unchanged,
    /// The guest was told that its request failed. Nothing has changed; of a request for more than 1 GiB, some of what comes first may
    /// have been converted.
    Refused,
    /// The guest was told to ask again: it has had its [budget](ExitOptions::budget) of conversions for now.
    Postponed,
    /// The access was one to memory whose slot was being replaced, and KVM cannot repeat it: it was done here.
    Completed,
    /// The guest came upon memory whose slot was being replaced. It tries again.
    Retried,
}

/// What a guest did that cannot be resolved.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GuestError {
    /// A memory fault that is none.
    #[error(transparent)]
    Malformed(#[from] RequestError),
    /// An access that would convert what cannot be converted.
    #[error(transparent)]
    Refused(#[from] ConvertError),
    /// An access to what is not memory, or not any more.
    #[error("{to} access to gfn {gfn:#x}, which is not memory")]
    NotMemory {
        /// The frame.
        gfn: Gfn,
        /// The state that the access has.
        to: State,
    },
    /// The access would convert the page, and that is not allowed implicitly.
    #[error("access that would make gfn {gfn:#x} {to}")]
    Implicit {
        /// The frame.
        gfn: Gfn,
        /// The state that the access has.
        to: State,
    },
    /// The page could not be converted, and it was left as it was.
    #[error("gfn {gfn:#x} could not be made {to}")]
    Failed {
        /// The frame.
        gfn: Gfn,
        /// The state that the access has.
        to: State,
        /// Why.
        #[source]
        cause: StepError,
    },
}

/// How exits are handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitOptions {
    /// Whether touching a page in the other state converts it. Without, it is a [`GuestError::Implicit`].
    pub implicit_conversion: bool,
    /// How often one vCPU may come back with an identical fault that left nothing to resolve.
    pub repeats: u32,
    /// Pages that one vCPU may have converted by its requests before it is told to ask again, and can look after its
    /// interrupts meanwhile. A request that comes first is carried out whatever its size. Without effect where a guest would
    /// take that answer for an error.
    pub budget: Option<u64>,
}

impl Default for ExitOptions {
    fn default() -> Self {
        Self { implicit_conversion: true, repeats: 64, budget: None }
    }
}

/// Pages of a guest's request that are planned at a time: at worst, 1 GiB in which every page differs from the next is some 30 MiB of
/// plan.
const PIECE: u64 = PAGES_PER_1G;

/// Handles the exits of one vCPU.
///
/// ```
/// use cvm_memory::exits::{Action, VcpuExits};
/// use cvm_memory::hypervisor::{Exit, Vcpu};
/// use cvm_memory::memory::CvmMemory;
/// use cvm_memory::soft::{GuestOp, SoftVm};
/// use std::sync::Arc;
///
/// let vm = SoftVm::software_protected();
/// let memory = Arc::new(CvmMemory::builder().ram(0, 4 << 20).build(Arc::new(vm.clone()))?);
/// let mut exits = VcpuExits::new(Arc::clone(&memory));
/// let mut vcpu = vm.create_vcpu();
///
/// // The guest asks for its first page to be shared (hypercall MAP_GPA_RANGE).
/// vcpu.start(GuestOp::Hypercall { nr: 12, args: [0, 1, 0, 0] });
/// loop {
///     let mut exit = vcpu.run()?;
///     if let Exit::Halt = exit {
///         break;
///     }
///     match exits.handle(&mut exit) {
///         Action::Resume(_) => {}
///         other => panic!("{other:?}"),
///     }
/// }
/// assert!(memory.write(cvm_memory::addr::Gpa(0), b"shared now").is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct VcpuExits {
    memory: Arc<CvmMemory>,
    options: ExitOptions,
    last: Option<MemoryFault>,
    repeated: u32,
    /// Pages that requests have converted since the guest was last told to ask again.
    spent: u64,
    /// Changes of the layout when this vCPU last came upon one.
    seen_changes: u64,
    log: RateLimit,
}

impl VcpuExits {
    /// For one vCPU of the VM whose memory this is.
    pub fn new(memory: Arc<CvmMemory>) -> Self {
        Self::with_options(memory, ExitOptions::default())
    }

    /// With other options than the default ones.
    pub fn with_options(memory: Arc<CvmMemory>, options: ExitOptions) -> Self {
        let seen_changes = memory.layout_changes();
        Self { memory, options, last: None, repeated: 0, spent: 0, seen_changes, log: RateLimit::default() }
    }

    /// Handles one exit.
    pub fn handle(&mut self, exit: &mut Exit<'_>) -> Action {
        match exit {
            Exit::Hypercall(hypercall) => self.hypercall(hypercall),
            Exit::MemoryFault(fault) => self.memory_fault(fault),
            Exit::Mmio(mmio) => {
                self.forget();
                self.mmio(mmio)
            }
            _ => {
                // The guest got on.
                self.forget();
                Action::NotOurs
            }
        }
    }

    /// An access that KVM leaves to userspace, to memory perhaps.
    ///
    /// Where accesses carry their privacy, this one was a shared one, since KVM reports a private one without a slot as a
    /// fault; so if the page is private, it comes to what a fault would have: the page is converted, or the guest is told off.
    /// Where the attribute alone decides, nobody has asked for the page to be shared, and its contents are not given up.
    fn mmio(&mut self, mmio: &mut Mmio<'_>) -> Action {
        // Somebody may convert it back meanwhile, but not for ever.
        for _ in 0..=self.options.repeats {
            let range = match flux::complete(&self.memory, mmio) {
                Access::Completed => return Action::Resume(Handled::Completed),
                Access::Device => return Action::NotOurs,
                Access::Private(range) => range,
            };
            let (gfn, to) = (range.start(), State::Shared);
            if !self.options.implicit_conversion || !self.memory.platform().accesses_carry_privacy {
                return self.guest_error(GuestError::Implicit { gfn, to });
            }
            match self.memory.convert(&Request { range, to }) {
                Ok(Outcome::Unchanged) => {}
                Ok(Outcome::Converted { .. }) => self.memory.converter().counters().requests.shared_faults.add(1),
                Ok(Outcome::RolledBack { cause }) => return self.guest_error(GuestError::Failed { gfn, to, cause }),
                Ok(poisoned @ Outcome::Poisoned { .. }) => return Action::Poisoned(poisoned),
                Err(error) => return self.guest_error(error.into()),
            }
        }
        Action::NotOurs
    }

    /// `KVM_HC_MAP_GPA_RANGE`: the answer is a positive errno for the guest.
    fn hypercall(&mut self, exit: &mut HypercallExit<'_>) -> Action {
        let Some(request) = Request::from_hypercall(exit) else { return Action::NotOurs };
        self.forget();
        let result = match request {
            Ok(request) if self.is_over_budget(&request) => {
                self.spent = 0;
                *exit.ret = self.errno(true);
                return Action::Resume(Handled::Postponed);
            }
            Ok(request) => self.memory.converter().convert_in_pieces(&request, PIECE).map_err(Refused::from),
            Err(error) => Err(Refused::from(error)),
        };
        let (answer, action) = match result {
            Ok(Outcome::Unchanged) => (0, Action::Resume(Handled::Unchanged)),
            Ok(Outcome::Converted { pages }) => {
                self.spent = self.spent.saturating_add(pages);
                (0, Action::Resume(Handled::Converted { pages }))
            }
            Ok(Outcome::RolledBack { cause }) => {
                self.log.warn(&cause);
                (self.errno(true), Action::Resume(Handled::Refused))
            }
            Ok(poisoned @ Outcome::Poisoned { .. }) => (Errno::EINVAL as u64, Action::Poisoned(poisoned)),
            Err(refused) => {
                self.log.warn(&refused);
                (self.errno(refused.is_transient()), Action::Resume(Handled::Refused))
            }
        };
        *exit.ret = answer;
        action
    }

    fn is_over_budget(&self, request: &Request) -> bool {
        let wanted = self.spent.saturating_add(request.range.pages());
        self.spent != 0
            && self.memory.platform().guest_retries
            && self.options.budget.is_some_and(|budget| wanted > budget)
    }

    /// What to tell the guest: "try again" only to a guest that would.
    fn errno(&self, transient: bool) -> u64 {
        let errno = if transient && self.memory.platform().guest_retries { Errno::EAGAIN } else { Errno::EINVAL };
        errno as u64
    }

    fn memory_fault(&mut self, fault: &MemoryFault) -> Action {
        let request = match Request::from_fault(fault) {
            Ok(request) => request,
            Err(error) => return self.guest_error(error.into()),
        };
        match fault.errno {
            Errno::EFAULT => {}
            Errno::EHWPOISON => return Action::HwPoison(Gpa(fault.gpa)),
            _ => return Action::Unresolvable(*fault),
        }
        let gfn = request.range.start();
        let again = self.last == Some(*fault);
        // Where the attribute alone decides, no access has a state of its own that it could differ in. If KVM goes on about a
        // private one nevertheless, somebody else has set the attribute.
        let asks = self.memory.platform().accesses_carry_privacy || again && request.to.is_private();
        let counters = &self.memory.converter().counters().requests;
        match self.memory.state(gfn) {
            // Declared private and touched as such: KVM has not been told yet, or something else is amiss.
            Some(State::Private) if request.to.is_private() => {
                let outcome = match self.memory.converter().materialise_around(gfn) {
                    Ok(outcome) => outcome,
                    Err(error) => return self.guest_error(error.into()),
                };
                if let Outcome::Converted { pages } = outcome {
                    counters.private_faults.add(1);
                    self.forget();
                    return Action::Resume(Handled::Materialised { pages });
                }
                self.resolved(fault, gfn, request.to, outcome)
            }
            // Already what the access wants: another vCPU was faster, or is converting just now, attributes first. Its
            // end is waited for, lest a vCPU count as stuck because another one's range is long.
            Some(state) if state == request.to => self.unchanged_after(fault, request.range),
            // About to be memory, or just having become so.
            None if self.memory.memory_in_flux(gfn).is_some() => self.unchanged_after(fault, request.range),
            None => self.guest_error(GuestError::NotMemory { gfn, to: request.to }),
            // The fault is about the page as it was.
            Some(_) if !asks => match self.unchanged_after(fault, request.range) {
                Action::Resume(_) if again => Action::Prefault(Gpa(fault.gpa)),
                action => action,
            },
            Some(_) if !self.options.implicit_conversion => {
                self.guest_error(GuestError::Implicit { gfn, to: request.to })
            }
            Some(_) => match self.memory.converter().convert_for_access(&request) {
                Ok(outcome) => {
                    if let Outcome::Converted { .. } = outcome {
                        if request.to.is_private() {
                            counters.private_faults.add(1);
                        } else {
                            counters.shared_faults.add(1);
                        }
                    }
                    self.resolved(fault, gfn, request.to, outcome)
                }
                // The device access has not ended in all that time; perhaps it does by the next.
                Err(ConvertError::Locked(LockError::Pinned { .. })) => self.unchanged(fault),
                Err(error) => self.guest_error(error.into()),
            },
        }
    }

    fn resolved(&mut self, fault: &MemoryFault, gfn: Gfn, to: State, outcome: Outcome) -> Action {
        match outcome {
            Outcome::Unchanged => self.unchanged(fault),
            Outcome::Converted { pages } => {
                self.forget();
                Action::Resume(Handled::Converted { pages })
            }
            Outcome::RolledBack { cause } => self.guest_error(GuestError::Failed { gfn, to, cause }),
            poisoned @ Outcome::Poisoned { .. } => Action::Poisoned(poisoned),
        }
    }

    /// Nothing was left to resolve. That may be a race that another vCPU has won; it cannot be one for ever.
    fn unchanged(&mut self, fault: &MemoryFault) -> Action {
        if self.last == Some(*fault) {
            self.repeated = self.repeated.saturating_add(1);
        } else {
            self.last = Some(*fault);
            self.repeated = 0;
        }
        if self.repeated < self.options.repeats {
            return Action::Resume(Handled::Unchanged);
        }
        self.forget();
        Action::Stuck(*fault)
    }

    /// Once whoever is at `gfns` has ended, nothing is left to resolve.
    fn unchanged_after(&mut self, fault: &MemoryFault, gfns: GfnRange) -> Action {
        match self.memory.converter().hold(gfns).map(drop) {
            Ok(()) => self.unchanged(fault),
            Err(error) => self.guest_error(ConvertError::from(error).into()),
        }
    }

    /// KVM could not emulate an instruction (`KVM_INTERNAL_ERROR_EMULATION`) that lies at, or accesses, one of `addresses`;
    /// the VMM has found out which those are. If one of them is memory, and slots have been replaced since this was last
    /// asked, KVM may have looked while there was none: the guest tries again, with `KVM_CAP_EXIT_ON_EMULATION_FAILURE`
    /// enabled. Otherwise the guest has gone astray, and it is none of our business.
    pub fn emulation_failure(&mut self, addresses: &[Gpa]) -> Action {
        self.forget();
        let memory = addresses.iter().find(|gpa| self.memory.memory_in_flux(gpa.gfn()).is_some());
        let Some(gpa) = memory else { return Action::NotOurs };
        // Whoever is at it ends first.
        if let Err(error) = self.memory.converter().hold(GfnRange::page(gpa.gfn())).map(drop) {
            return self.guest_error(ConvertError::from(error).into());
        }
        let changes = self.memory.layout_changes();
        if std::mem::replace(&mut self.seen_changes, changes) == changes {
            return Action::NotOurs;
        }
        Action::Resume(Handled::Retried)
    }

    fn guest_error(&mut self, error: GuestError) -> Action {
        self.forget();
        self.log.warn(&error);
        Action::GuestError(error)
    }

    fn forget(&mut self) {
        self.last = None;
        self.repeated = 0;
    }
}

impl fmt::Debug for VcpuExits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuExits")
            .field("options", &self.options)
            .field("last", &self.last)
            .field("repeated", &self.repeated)
            .finish_non_exhaustive()
    }
}

/// A hypercall that did not start.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Malformed(#[from] RequestError),
    #[error(transparent)]
    Convert(#[from] ConvertError),
}

impl Refused {
    /// Whether asking again later could succeed.
    const fn is_transient(&self) -> bool {
        matches!(self, Self::Convert(ConvertError::Locked(LockError::Pinned { .. })))
    }
}
