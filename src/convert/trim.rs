//! Freeing what conversions have left to be freed.

use crate::addr::GfnRange;

use super::commit::{Effects, StepError};
use super::plan::{self, Step};
use super::request::State;
use super::{Converter, everything};

impl Converter {
    /// Frees all that conversions have left within `gfns`, whose memory is about to go. The caller holds
    /// [`exclusive`](Self::exclusive) over `gfns`.
    ///
    /// # Errors
    /// As [`trim`](Self::trim).
    pub(crate) fn settle_locked(&self, gfns: GfnRange) -> Result<u64, StepError> {
        let private = self.trim_locked(gfns, State::Private)?;
        Ok(private.saturating_add(self.trim_locked(gfns, State::Shared)?))
    }

    /// Frees up to `budget` bytes of what conversions have left; whole pieces, so a little more may be freed.
    /// Returns the bytes freed.
    ///
    /// # Errors
    /// [`StepError`] of the first piece that could not be freed, after everything else has been tried; it stays to be freed.
    pub fn trim(&self, budget: u64) -> Result<u64, StepError> {
        self.trim_within(everything(), budget)
    }

    /// [`trim`](Self::trim) of `gfns` only.
    ///
    /// # Errors
    /// As [`trim`](Self::trim).
    pub fn trim_within(&self, gfns: GfnRange, budget: u64) -> Result<u64, StepError> {
        let (mut freed, mut failed) = (0u64, None);
        for side in [State::Private, State::Shared] {
            let mut rest = gfns;
            while freed < budget {
                let Some(run) = self.queue.first(rest, side) else { break };
                let Some((_, above)) = rest.split_at(run.end()) else { break };
                rest = above;
                let steps = plan::plan_trim(run, side, &self.space.load(), &self.rules());
                // What no longer has a slot has nothing to free, but is to be forgotten.
                let pieces = if steps.is_empty() { vec![run] } else { steps.iter().map(Step::gfns).collect() };
                for piece in pieces {
                    if freed >= budget {
                        break;
                    }
                    // From within a conversion: it will be trimmed another time.
                    let Ok(_guard) = self.locks.exclusive(piece, None) else { continue };
                    // What cannot be freed does not keep what lies behind it.
                    match self.trim_locked(piece, side) {
                        Ok(bytes) => freed = freed.saturating_add(bytes),
                        Err(error) => failed = failed.or(Some(error)),
                    }
                }
            }
        }
        failed.map_or(Ok(freed), Err)
    }

    fn trim_locked(&self, piece: GfnRange, side: State) -> Result<u64, StepError> {
        let space = self.space.load();
        let executor = self.executor(&space);
        let mut freed = 0u64;
        // Between the look at the queue and the lock, some of it may have been freed or come into use.
        for gfns in self.queue.left(piece, side) {
            for step in plan::plan_trim(gfns, side, &space, &self.rules()) {
                match &step {
                    Step::DiscardPrivate(discard) => executor.discard_private(discard)?,
                    Step::DiscardShared(discard) => executor.discard_shared(discard)?,
                    _ => continue,
                }
                freed = freed.saturating_add(step.gfns().bytes());
            }
            // What no longer has a slot has nothing to free here.
            executor.keep(gfns, side)?;
        }
        Ok(freed)
    }
}
