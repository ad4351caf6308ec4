//! What devices may do with shared memory: pins for an access, listeners for those who map it.

use std::sync::Arc;

use crate::addr::{GfnRange, merge_adjacent, subtract_lists};
use crate::backing::Space;

use super::commit::StepError;
use super::listener::{Listener, ListenerId, SharedRun};
use super::lock::{LockError, RangeGuard};
use super::{Converter, everything};

/// Why shared memory could not be pinned for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// Part of the range is private, or is not memory.
    #[error("gfns {range} are not all shared memory: gfns {part}")]
    NotShared {
        /// The range asked for.
        range: GfnRange,
        /// The first part that is not.
        part: GfnRange,
    },
    /// The range could not be locked.
    #[error(transparent)]
    Locked(#[from] LockError),
}

/// A device access in progress: while it lives, no page of its range becomes private.
#[derive(Debug)]
pub struct Pin<'a> {
    guard: RangeGuard<'a>,
}

impl Pin<'_> {
    /// The frames.
    pub const fn gfns(&self) -> GfnRange {
        self.guard.range()
    }
}

/// Why a listener could not be registered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AddListenerError {
    /// It could not map what is shared.
    #[error(transparent)]
    Map(#[from] StepError),
    /// Called from within a conversion.
    #[error(transparent)]
    Locked(#[from] LockError),
}

impl Converter {
    /// Pins `gfns` for a device access: all of them are shared memory, and stay so while the pin lives.
    ///
    /// # Errors
    /// [`PinError`].
    pub fn pin(&self, gfns: GfnRange) -> Result<Pin<'_>, PinError> {
        let guard = self.locks.shared(gfns)?;
        let space = self.space.load();
        let hole = space.layout().table().segments(gfns).find(|segment| segment.slot.is_none());
        if let Some(part) = self.declared.member_runs(gfns).next().or(hole.map(|segment| segment.gfns)) {
            return Err(PinError::NotShared { range: gfns, part });
        }
        Ok(Pin { guard })
    }

    /// Registers a listener and maps for it what is shared now.
    ///
    /// # Errors
    /// [`AddListenerError::Map`] if it could not map: what it had mapped is unmapped again, and it is not registered.
    /// [`AddListenerError::Locked`] if called from within a conversion.
    pub fn add_listener(&self, listener: &Arc<dyn Listener>) -> Result<ListenerId, AddListenerError> {
        let _guard = self.locks.exclusive(everything(), None)?;
        let runs = self.shared_runs(everything(), &self.space.load());
        for (done, run) in runs.iter().enumerate() {
            if let Err(error) = listener.map(run) {
                runs.iter().take(done).rev().for_each(|earlier| listener.unmap(earlier));
                return Err(AddListenerError::Map(StepError::Listener { gfns: run.gfns, error }));
            }
        }
        Ok(self.listeners.add(listener))
    }

    /// Takes a listener out and unmaps what is shared now. Unknown ones are ignored.
    ///
    /// # Errors
    /// [`LockError::Reentrant`] if called from within a conversion.
    pub fn remove_listener(&self, id: ListenerId) -> Result<(), LockError> {
        let _guard = self.locks.exclusive(everything(), None)?;
        if let Some(listener) = self.listeners.remove(id) {
            self.shared_runs(everything(), &self.space.load()).iter().rev().for_each(|run| listener.unmap(run));
        }
        if self.listeners.is_empty() {
            self.forget_unmapped(everything());
        }
        Ok(())
    }

    /// The shared runs of memory within `gfns`, as listeners hear of them: without those that they could not map again.
    fn shared_runs(&self, gfns: GfnRange, space: &Space) -> Vec<SharedRun> {
        let memory = space.layout().table().segments(gfns).filter(|segment| segment.slot.is_some());
        let memory = merge_adjacent(memory.map(|segment| segment.gfns));
        let shared: Vec<_> = memory.iter().flat_map(|&gfns| self.declared.differing_runs(gfns, true)).collect();
        let unmapped: Vec<_> = self.unmapped.member_runs(gfns).collect();
        let shared = subtract_lists(&shared, &unmapped).into_iter();
        shared.map(|gfns| SharedRun { gfns, pieces: space.shared_pieces(gfns) }).collect()
    }

    /// Nobody has `gfns` mapped, or everybody is about to.
    fn forget_unmapped(&self, gfns: GfnRange) {
        for gfns in self.unmapped.member_runs(gfns) {
            // It was in the set, so it can be taken out.
            let _gone = self.unmapped.remove(gfns);
        }
    }

    /// Tells listeners of memory that has been added, or is about to go, with the memory as `space` has it. The caller holds
    /// [`exclusive`](Self::exclusive) over `gfns`.
    ///
    /// # Errors
    /// [`StepError::Listener`]: nothing of `gfns` is mapped then, and nobody will be told to unmap it.
    pub(crate) fn announce_locked(&self, gfns: GfnRange, space: &Space, mapped: bool) -> Result<(), StepError> {
        if self.listeners.is_empty() {
            return Ok(());
        }
        if !mapped {
            self.shared_runs(gfns, space).iter().rev().for_each(|run| self.listeners.unmap(run));
            self.forget_unmapped(gfns);
            return Ok(());
        }
        self.forget_unmapped(gfns);
        let runs = self.shared_runs(gfns, space);
        for (done, run) in runs.iter().enumerate() {
            if let Err(error) = self.listeners.map(run) {
                runs.iter().take(done).rev().for_each(|earlier| self.listeners.unmap(earlier));
                for run in &runs {
                    // Memory beyond the record is never private, and goes as it came.
                    let _remembered = self.unmapped.insert(run.gfns);
                }
                return Err(StepError::Listener { gfns: run.gfns, error });
            }
        }
        Ok(())
    }
}
