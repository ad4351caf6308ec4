//! What the steps of a plan do to KVM, to the record, to those who listen and to the memory.

use crate::addr::{GfnRange, subtract_lists};
use crate::backing::Space;
use crate::gmem::GmemError;
use crate::hypervisor::{Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes};
use crate::page_set::PageSet;
use crate::stats::SyscallCounters;
use nix::errno::Errno;

use super::commit::{Effects, StepError};
use super::discard::DiscardQueue;
use super::listener::{Listeners, SharedRun};
use super::plan::{PrivateDiscard, SharedDiscard};
use super::request::State;

/// Carries steps out on one VM. The range's lock is held.
pub(super) struct Executor<'a> {
    pub(super) hypervisor: &'a dyn Hypervisor,
    pub(super) space: &'a Space,
    pub(super) declared: &'a PageSet,
    pub(super) materialised: &'a PageSet,
    pub(super) listeners: &'a Listeners,
    pub(super) unmapped: &'a PageSet,
    pub(super) queue: &'a DiscardQueue,
    pub(super) counters: &'a SyscallCounters,
}

impl Executor<'_> {
    fn run(&self, gfns: GfnRange) -> SharedRun {
        SharedRun { gfns, pieces: self.space.shared_pieces(gfns) }
    }

    fn settled(&self, gfns: GfnRange, side: State) -> Result<(), StepError> {
        self.queue.settle(gfns, side).map_err(|error| StepError::Record { gfns, error })
    }
}

impl Effects for Executor<'_> {
    fn unmap(&self, gfns: GfnRange) {
        let missing: Vec<_> = self.unmapped.member_runs(gfns).collect();
        for gfns in subtract_lists(&[gfns], &missing) {
            self.listeners.unmap(&self.run(gfns));
        }
        for gfns in missing {
            // It was in the set, so it can be taken out.
            let _gone = self.unmapped.remove(gfns);
        }
    }

    fn map(&self, gfns: GfnRange) -> Result<(), StepError> {
        self.listeners.map(&self.run(gfns)).map_err(|error| StepError::Listener { gfns, error })
    }

    fn map_again(&self, gfns: GfnRange) -> Result<(), StepError> {
        self.map(gfns).inspect_err(|_| {
            // The set is as large as the record, in which these frames are.
            let _remembered = self.unmapped.insert(gfns);
        })
    }

    fn set_attributes(&self, gfns: GfnRange, to: State) -> Result<(), StepError> {
        self.counters.set_memory_attributes.add(1);
        self.hypervisor
            .set_memory_attributes(&MemoryAttributes {
                address: gfns.start_byte(),
                size: gfns.bytes(),
                attributes: if to.is_private() { MEMORY_ATTRIBUTE_PRIVATE } else { 0 },
                flags: 0,
            })
            .map_err(|errno| StepError::Attributes { gfns, to, errno })?;
        // KVM has done it, so this must follow whatever becomes of the rest.
        self.materialised.set(gfns, to.is_private()).map_err(|error| StepError::Record { gfns, error })
    }

    fn publish(&self, gfns: GfnRange, to: State) -> Result<(), StepError> {
        self.declared.set(gfns, to.is_private()).map_err(|error| StepError::Record { gfns, error })
    }

    fn discard_private(&self, discard: &PrivateDiscard) -> Result<(), StepError> {
        let gfns = discard.gfns;
        // A file that has gone has taken its pages along.
        if let Some(file) = self.space.file(discard.file) {
            self.counters.punch_hole.add(1);
            file.punch_hole(discard.pages).map_err(|error: GmemError| StepError::Private { gfns, error })?;
        }
        self.settled(gfns, State::Private)
    }

    fn discard_shared(&self, discard: &SharedDiscard) -> Result<(), StepError> {
        let gfns = discard.gfns;
        if let Some(slice) = self.space.shared(discard.slot) {
            let backing = slice.backing.as_ref();
            // A backing of larger pages frees whole ones only; the rest stays, and shows in the residency.
            let unit = backing.granule().max(1);
            let end = discard.offset.saturating_add(gfns.bytes());
            let start = discard.offset.checked_next_multiple_of(unit).unwrap_or(end);
            let end = end.saturating_sub(end.checked_rem(unit).unwrap_or(0));
            if start < end {
                self.counters.discard_shared.add(1);
                backing
                    .discard(start, end.saturating_sub(start))
                    .map_err(|errno: Errno| StepError::Shared { gfns, errno })?;
            }
        }
        self.settled(gfns, State::Shared)
    }

    fn defer(&self, gfns: GfnRange, side: State) -> Result<(), StepError> {
        self.queue.defer(gfns, side).map_err(|error| StepError::Record { gfns, error })
    }

    fn keep(&self, gfns: GfnRange, side: State) -> Result<(), StepError> {
        self.settled(gfns, side)
    }
}
