//! Carrying out a plan: its effects in order, and their undoing in reverse.
//!
//! What an effect *is* hides behind [`Effects`], so that every failure at every step can be tried without a VM. This file
//! decides nothing about what is converted; it knows only which step undoes which, and from where on nothing can be
//! undone any more.

use crate::addr::{GfnRange, merge_adjacent, subtract_lists};

use super::listener::ListenerError;
use super::plan::{Plan, PrivateDiscard, SharedDiscard, Step};
use super::request::State;
use crate::gmem::GmemError;
use crate::page_set::PageSetError;
use nix::errno::Errno;

/// Why a step failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StepError {
    /// `KVM_SET_MEMORY_ATTRIBUTES` failed; it changed nothing.
    #[error("set the memory attributes of gfns {gfns} to {to}")]
    Attributes {
        /// The frames.
        gfns: GfnRange,
        /// The state wanted.
        to: State,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// A listener could not map.
    #[error("map gfns {gfns} for devices")]
    Listener {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        error: ListenerError,
    },
    /// Private memory could not be freed.
    #[error("free the private memory of gfns {gfns}")]
    Private {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        error: GmemError,
    },
    /// Shared memory could not be freed.
    #[error("free the shared memory of gfns {gfns}")]
    Shared {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// The record does not reach so far.
    #[error("record the state of gfns {gfns}")]
    Record {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        error: PageSetError,
    },
}

/// What a plan's steps do. Every method either does all of its work or none.
pub trait Effects {
    /// Listeners unmap `gfns`.
    fn unmap(&self, gfns: GfnRange);
    /// Listeners map `gfns`.
    ///
    /// # Errors
    /// [`StepError::Listener`].
    fn map(&self, gfns: GfnRange) -> Result<(), StepError>;
    /// Listeners map `gfns`, which is or stays shared whether they can or not. If not, that is remembered, so that they are
    /// not told to unmap what they do not have.
    ///
    /// # Errors
    /// [`StepError::Listener`].
    fn map_again(&self, gfns: GfnRange) -> Result<(), StepError>;
    /// KVM's attributes.
    ///
    /// # Errors
    /// [`StepError::Attributes`].
    fn set_attributes(&self, gfns: GfnRange, to: State) -> Result<(), StepError>;
    /// The record.
    ///
    /// # Errors
    /// [`StepError::Record`].
    fn publish(&self, gfns: GfnRange, to: State) -> Result<(), StepError>;
    /// Frees private memory, and forgets that it was to be freed.
    ///
    /// # Errors
    /// [`StepError::Private`].
    fn discard_private(&self, discard: &PrivateDiscard) -> Result<(), StepError>;
    /// Frees shared memory, and forgets that it was to be freed.
    ///
    /// # Errors
    /// [`StepError::Shared`].
    fn discard_shared(&self, discard: &SharedDiscard) -> Result<(), StepError>;
    /// Leaves `side` of `gfns` to be freed later.
    ///
    /// # Errors
    /// [`StepError::Record`].
    fn defer(&self, gfns: GfnRange, side: State) -> Result<(), StepError>;
    /// Takes back what [`defer`](Self::defer) did: the side is in use again.
    ///
    /// # Errors
    /// [`StepError::Record`].
    fn keep(&self, gfns: GfnRange, side: State) -> Result<(), StepError>;
}

/// How a conversion ended.
#[derive(Debug, Clone)]
#[must_use = "a conversion that was rolled back is no error"]
pub enum Outcome {
    /// Every page was in the wanted state. No call was made.
    Unchanged,
    /// Every page is in the wanted state.
    Converted {
        /// How many changed.
        pages: u64,
    },
    /// A step failed, and everything before it was undone: every page is in the state it was in.
    RolledBack {
        /// What failed.
        cause: StepError,
    },
    /// A step failed, and not everything before it could be undone. The record and KVM agree on `done`, and so do the
    /// listeners but for `unmapped`.
    Poisoned {
        /// The frames that are in the wanted state now; all others are in the state they were in.
        done: Vec<GfnRange>,
        /// Frames that are shared now and that no listener has mapped, because one of them could not. Converting them to
        /// private and back is another chance.
        unmapped: Vec<GfnRange>,
        /// The frames of the step that failed.
        at: GfnRange,
        /// What failed.
        cause: StepError,
        /// What failed first while undoing. `None` if the failing step was the second or a later one of freeing memory: what
        /// was not freed has been left to be freed later.
        undo: Option<StepError>,
    },
}

impl Outcome {
    /// How many pages changed, for whom anything else is an error.
    ///
    /// # Errors
    /// The cause, if it was rolled back or could not even be.
    pub fn converted(self) -> Result<u64, StepError> {
        match self {
            Self::Unchanged => Ok(0),
            Self::Converted { pages } => Ok(pages),
            Self::RolledBack { cause } | Self::Poisoned { cause, .. } => Err(cause),
        }
    }
}

/// Carries out `plan`.
pub fn commit(plan: &Plan, effects: &dyn Effects) -> Outcome {
    let mut freed = false;
    for (at, step) in plan.steps.iter().enumerate() {
        let Err(cause) = apply(step, effects) else {
            freed |= step.is_final();
            continue;
        };
        let (before, rest) = plan.steps.split_at_checked(at).unwrap_or((&plan.steps, &[]));
        if freed {
            return leave_the_rest(plan, rest, step.gfns(), cause, effects);
        }
        return undo(plan, before, step.gfns(), cause, effects);
    }
    if plan.changed.is_empty() { Outcome::Unchanged } else { Outcome::Converted { pages: plan.pages_changed() } }
}

fn apply(step: &Step, effects: &dyn Effects) -> Result<(), StepError> {
    match step {
        Step::Unmap(gfns) => {
            effects.unmap(*gfns);
            Ok(())
        }
        Step::Map(gfns) => effects.map(*gfns),
        Step::SetAttributes(gfns, to) => effects.set_attributes(*gfns, *to),
        Step::Publish(gfns, to) => effects.publish(*gfns, *to),
        Step::SettlePrivate(discard) | Step::DiscardPrivate(discard) => effects.discard_private(discard),
        Step::SettleShared(discard) | Step::DiscardShared(discard) => effects.discard_shared(discard),
        Step::Defer(gfns, side) => effects.defer(*gfns, *side),
    }
}

/// Memory has been freed that was in use, so the conversion stands; what is left to be freed is not lost.
fn leave_the_rest(plan: &Plan, rest: &[Step], at: GfnRange, cause: StepError, effects: &dyn Effects) -> Outcome {
    let mut failed = None;
    for step in rest.iter().filter(|step| step.is_final()) {
        failed = failed.or(effects.defer(step.gfns(), plan.to.opposite()).err());
    }
    Outcome::Poisoned { done: plan.changed.clone(), unmapped: Vec::new(), at, cause, undo: failed }
}

/// Undoes `steps`, the first ones of `plan`, last first. What cannot be undone stays as the plan wanted it, in KVM, record
/// and listeners alike, and the side of it that lost is left to be freed later.
fn undo(plan: &Plan, steps: &[Step], at: GfnRange, cause: StepError, effects: &dyn Effects) -> Outcome {
    let (mut stuck, mut unmapped) = (Vec::new(), Vec::new());
    let mut failed = None;
    // Asked of the whole plan: it may have failed before it came to either.
    let listeners = plan.steps.iter().any(|step| matches!(step, Step::Map(_) | Step::Unmap(_)));
    let frees = plan.steps.iter().any(|step| step.is_final() || matches!(step, Step::Defer(..)));
    // `or`, not `or_else`: everything is tried, whatever failed before.
    let mut map_again = |gfns| effects.map_again(gfns).inspect_err(|_| unmapped.push(gfns)).err();
    for step in steps.iter().rev() {
        match step {
            Step::Map(gfns) => effects.unmap(*gfns),
            Step::Publish(gfns, to) => failed = failed.or(effects.publish(*gfns, to.opposite()).err()),
            Step::SetAttributes(gfns, to) => {
                let Err(error) = effects.set_attributes(*gfns, to.opposite()) else { continue };
                // The page stays converted, so everybody must know it as converted.
                failed = failed.or(Some(error)).or(effects.publish(*gfns, *to).err());
                if *to == State::Shared && listeners {
                    failed = failed.or(map_again(*gfns));
                }
                if frees {
                    failed = failed.or(effects.defer(*gfns, to.opposite()).err());
                }
                stuck.push(*gfns);
            }
            Step::Unmap(gfns) => {
                stuck.sort_unstable();
                for gfns in subtract_lists(&[*gfns], &merge_adjacent(stuck.iter().copied())) {
                    failed = failed.or(map_again(gfns));
                }
            }
            Step::Defer(gfns, side) => failed = failed.or(effects.keep(*gfns, *side).err()),
            // Nobody had a use for what these freed.
            Step::SettlePrivate(_) | Step::SettleShared(_) => {}
            // Never undone: once one has succeeded, the conversion stands.
            Step::DiscardPrivate(_) | Step::DiscardShared(_) => {}
        }
    }
    if failed.is_none() {
        return Outcome::RolledBack { cause };
    }
    let merged = |mut gfns: Vec<GfnRange>| {
        gfns.sort_unstable();
        merge_adjacent(gfns)
    };
    Outcome::Poisoned { done: merged(stuck), unmapped: merged(unmapped), at, cause, undo: failed }
}
