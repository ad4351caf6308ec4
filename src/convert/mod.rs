//! Page state changes: from what somebody asks for to what KVM, the record, the devices and the memory then say.
//!
//! ```text
//! guest ─▶ request (untrusted → typed) ─▶ plan (pure → steps) ─▶ commit (steps + undo) ─▶ Outcome
//! ```
//!
//! [`Converter`] holds what a conversion needs: the record, the locks on ranges, those who listen, and what is left to be
//! freed. Two facts are kept per page. *Declared* is what the guest has been told; *materialised* is what KVM's attribute
//! says. They differ only where a page was declared private ahead of use and no private access has come yet: setting the
//! attribute costs KVM time and memory per page, so it is set when first needed, for the block around the fault. A
//! request by the guest itself is evidence of imminent use: it sets the attribute of what it changes at once. KVM has no way to ask for an
//! attribute, so the record is the authority; it outlives every slot.
//!
//! It does not know vCPUs, exits or errnos for the guest (that is [`exits`](crate::exits)), and it does not edit the
//! layout: it is handed a new [`Space`].
//!
//! Mirrors the user side of `KVM_SET_MEMORY_ATTRIBUTES`, whose order of effects is `kvm_vm_set_mem_attributes()` in
//! `virt/kvm/kvm_main.c`.

mod commit;
mod devices;
mod discard;
mod effects;
mod listener;
mod lock;
mod plan;
mod request;
mod trim;

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use crate::addr::{Gfn, GfnRange, PAGE_SIZE, PAGES_PER_2M};
use crate::backing::Space;
use crate::hypervisor::Hypervisor;
use crate::page_set::{PageSet, PageSetError, Pages};
use crate::stats::Counters;

pub use commit::{Effects, Outcome, StepError, commit};
pub use devices::{AddListenerError, Pin, PinError};
pub use discard::DiscardPolicy;
pub use listener::{Listener, ListenerError, ListenerId, SharedRun};
pub use lock::{LockError, PinPolicy, RangeGuard, RangeLock};
pub use plan::{Plan, PrivateDiscard, Refusal, Rules, SharedDiscard, Snapshot, Step, admit, plan, plan_materialise};
pub use request::{Request, RequestError, State};

use discard::DiscardQueue;
use effects::Executor;
use listener::Listeners;

/// How conversions are done. The defaults suit a confidential VM on current kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvertOptions {
    /// What becomes of the side of a page that lost.
    pub discard: DiscardPolicy,
    /// What a conversion to private does about device accesses in progress.
    pub pins: PinPolicy,
    /// The most pages that one call may cover. KVM holds a lock of the whole VM for 68 ns or so per page.
    pub chunk_pages: u64,
    /// Pages around a private fault that are materialised with it.
    pub materialise_pages: u64,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            discard: DiscardPolicy::Immediate,
            pins: PinPolicy::default(),
            chunk_pages: (64 << 20) / PAGE_SIZE,
            materialise_pages: PAGES_PER_2M,
        }
    }
}

/// A conversion that did not start. Nothing has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// The layout does not admit it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The range could not be locked.
    #[error(transparent)]
    Locked(#[from] LockError),
}

/// Every guest frame there can be.
fn everything() -> GfnRange {
    GfnRange::new(Gfn::ZERO, Gfn::MAX).unwrap_or(GfnRange::empty_at(Gfn::ZERO))
}

/// The state of every page, and the way to change it. See the [module](self).
#[derive(Debug)]
pub struct Converter {
    // Dropped in this order: the files before the VM.
    space: ArcSwap<Space>,
    /// Frames that the guest has been told are private.
    declared: PageSet,
    /// Frames whose attribute in KVM is private.
    materialised: PageSet,
    locks: RangeLock,
    listeners: Listeners,
    /// Frames that are shared and that listeners nevertheless could not map again.
    unmapped: PageSet,
    queue: DiscardQueue,
    options: ConvertOptions,
    counters: Counters,
    hypervisor: Arc<dyn Hypervisor>,
}

impl Converter {
    /// No memory yet; frames below `capacity` pages can have a state.
    ///
    /// # Errors
    /// [`PageSetError`] if the record cannot be mapped.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        space: Space,
        capacity: u64,
        options: ConvertOptions,
    ) -> Result<Self, PageSetError> {
        Ok(Self {
            hypervisor,
            space: ArcSwap::from_pointee(space),
            declared: PageSet::new(capacity)?,
            materialised: PageSet::new(capacity)?,
            locks: RangeLock::default(),
            listeners: Listeners::default(),
            unmapped: PageSet::new(capacity)?,
            queue: DiscardQueue::new(capacity)?,
            options,
            counters: Counters::default(),
        })
    }

    /// The options in force.
    pub const fn options(&self) -> &ConvertOptions {
        &self.options
    }

    /// The VM.
    pub fn hypervisor(&self) -> &Arc<dyn Hypervisor> {
        &self.hypervisor
    }

    /// The memory as it is now.
    pub fn space(&self) -> Guard<Arc<Space>> {
        self.space.load()
    }

    /// The cell in which the memory is published, for readers that cache it.
    pub(crate) const fn space_cell(&self) -> &ArcSwap<Space> {
        &self.space
    }

    /// Publishes a changed layout. Within the crate only: what is published owns the memory behind KVM's slots, so a
    /// space that lacks one of them would free memory that a guest can reach. The caller holds [`exclusive`](Self::exclusive) over every frame that changes.
    pub(crate) fn publish_space(&self, space: Space) {
        self.space.store(Arc::new(space));
    }

    /// Frames that the guest has been told are private.
    pub fn declared(&self) -> &Pages {
        &self.declared
    }

    /// Frames whose attribute in KVM is private.
    pub fn materialised(&self) -> &Pages {
        &self.materialised
    }

    /// What was asked for and done.
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Bytes that are left to be freed.
    pub fn deferred_bytes(&self) -> u64 {
        self.queue.bytes()
    }

    /// Keeps every conversion, pin and materialisation out of `gfns`, for an edit of the layout that takes `going` away. Device
    /// accesses to the rest may go on.
    ///
    /// # Errors
    /// [`LockError`].
    pub(crate) fn exclusive(&self, gfns: GfnRange, going: &[GfnRange]) -> Result<RangeGuard<'_>, LockError> {
        self.locks.exclusive_over(gfns, Some(self.options.pins), going)
    }

    /// Keeps every conversion and materialisation out of `gfns`; device accesses may go on.
    ///
    /// # Errors
    /// [`LockError::Reentrant`].
    pub(crate) fn hold(&self, gfns: GfnRange) -> Result<RangeGuard<'_>, LockError> {
        self.locks.exclusive(gfns, None)
    }

    /// [`hold`](Self::hold) of all frames: while others are called who must not edit.
    ///
    /// # Errors
    /// [`LockError::Reentrant`].
    pub(crate) fn hold_all(&self) -> Result<RangeGuard<'_>, LockError> {
        self.hold(everything())
    }

    /// Refuses a thread that is at a conversion: a listener that wants to edit slots.
    ///
    /// # Errors
    /// [`LockError::Reentrant`].
    pub(crate) fn refuse_reentry(&self) -> Result<(), LockError> {
        self.locks.refuse_reentry(everything())
    }

    /// Converts the request's pages, or refuses before any effect.
    ///
    /// # Errors
    /// [`ConvertError`]: nothing has happened.
    pub fn convert(&self, request: &Request) -> Result<Outcome, ConvertError> {
        self.counted(|| self.try_convert(request, self.options.pins))
    }

    /// [`convert`](Self::convert) for an access of the guest's, which cannot be told to try again: where the policy is to refuse
    /// while a device is at one of the pages, it waits as the default policy does.
    ///
    /// # Errors
    /// As [`convert`](Self::convert).
    pub fn convert_for_access(&self, request: &Request) -> Result<Outcome, ConvertError> {
        let pins = match self.options.pins {
            PinPolicy::Refuse => PinPolicy::default(),
            waits @ PinPolicy::Wait(_) => waits,
        };
        self.counted(|| self.try_convert(request, pins))
    }

    /// [`convert`](Self::convert) in pieces of at most `pages` pages, so that what is planned at a time is bounded, whatever a guest
    /// has made of its memory and asks for: a run of pages of one state costs some 200 bytes. Whether the range can be converted at all
    /// is known before the first piece. If a later one fails, those before it stay converted.
    ///
    /// # Errors
    /// As [`convert`](Self::convert).
    pub fn convert_in_pieces(&self, request: &Request, pages: u64) -> Result<Outcome, ConvertError> {
        self.counted(|| {
            if request.range.pages() <= pages {
                return self.try_convert(request, self.options.pins);
            }
            // Of what is not memory, which may be most of it, there are no pieces.
            let memory = admit(request, &self.space.load())?;
            let mut converted = 0_u64;
            for range in memory.iter().flat_map(|gfns| gfns.split_every(pages)) {
                match self.try_convert(&Request { range, ..*request }, self.options.pins)? {
                    Outcome::Unchanged => {}
                    Outcome::Converted { pages } => converted = converted.saturating_add(pages),
                    failed => return Ok(failed),
                }
            }
            Ok(if converted == 0 { Outcome::Unchanged } else { Outcome::Converted { pages: converted } })
        })
    }

    fn counted(&self, convert: impl FnOnce() -> Result<Outcome, ConvertError>) -> Result<Outcome, ConvertError> {
        let counters = &self.counters.requests;
        counters.requests.add(1);
        let outcome = convert().inspect_err(|_| counters.refused.add(1))?;
        if let DiscardPolicy::Deferred { budget } = self.options.discard
            && self.deferred_bytes() > budget
        {
            // What cannot be freed now stays to be freed; the conversion itself is done.
            let _left_for_later = self.trim(u64::MAX);
        }
        Ok(outcome)
    }

    fn try_convert(&self, request: &Request, pins: PinPolicy) -> Result<Outcome, ConvertError> {
        // What is refused anyway need not wait for anybody.
        admit(request, &self.space.load())?;
        // Only shared pages are pinned, and a conversion to shared changes none of those.
        let pins = request.to.is_private().then_some(pins);
        let _guard = self.locks.exclusive(request.range, pins)?;
        let space = self.space.load();
        let memory = admit(request, &space)?;
        let private = request.to.is_private();
        let differing: Vec<_> = memory.iter().flat_map(|&gfns| self.declared.differing_runs(gfns, private)).collect();
        let seen = Snapshot {
            attributes: differing.iter().flat_map(|&gfns| self.materialised.differing_runs(gfns, private)).collect(),
            unsettled: differing.iter().flat_map(|&gfns| self.queue.left(gfns, request.to)).collect(),
            differing,
        };
        let plan = plan(request.to, &memory, &seen, &space, &self.rules());
        self.count(&plan);
        let outcome = commit(&plan, &self.executor(&space));
        self.count_outcome(&plan, &outcome);
        Ok(outcome)
    }

    /// Sets KVM's attribute for the block around `gfn`, as far as the block has been declared private: the answer to a
    /// private access to a page that was declared private ahead of use.
    ///
    /// # Errors
    /// [`ConvertError::Locked`].
    pub fn materialise_around(&self, gfn: Gfn) -> Result<Outcome, ConvertError> {
        self.materialise(GfnRange::page(gfn).align_out(self.options.materialise_pages.max(1)))
    }

    /// Sets KVM's attribute for every page of `gfns` that is memory and has been declared private.
    ///
    /// # Errors
    /// [`ConvertError::Locked`].
    pub fn materialise(&self, gfns: GfnRange) -> Result<Outcome, ConvertError> {
        let _guard = self.locks.exclusive(gfns, None)?;
        let space = self.space.load();
        Ok(self.materialise_locked(gfns, &space))
    }

    /// [`materialise`](Self::materialise), by a caller that holds the lock, with the memory as it is to be.
    pub(crate) fn materialise_locked(&self, gfns: GfnRange, space: &Space) -> Outcome {
        let memory: Vec<_> = space.private_pieces(gfns).into_iter().map(|piece| piece.gfns).collect();
        let missing: Vec<_> = memory
            .into_iter()
            .flat_map(|gfns| self.declared.member_runs(gfns))
            .flat_map(|gfns| self.materialised.differing_runs(gfns, true))
            .collect();
        let plan = plan_materialise(&crate::addr::merge_adjacent(missing), &self.rules());
        let outcome = commit(&plan, &self.executor(space));
        if let Outcome::Converted { pages } = outcome {
            self.counters.requests.pages_materialised.add(pages);
        }
        outcome
    }

    /// Declares memory that is about to be added, before the guest can see it: no effect but on the record.
    ///
    /// The caller holds [`exclusive`](Self::exclusive) over `gfns`.
    ///
    /// # Errors
    /// [`PageSetError`] if the record does not reach so far.
    pub(crate) fn declare_locked(&self, gfns: GfnRange, state: State) -> Result<(), PageSetError> {
        self.declared.set(gfns, state.is_private())
    }

    /// Takes back what [`declare_locked`](Self::declare_locked) and
    /// [`materialise_locked`](Self::materialise_locked) did to memory that was not added after all.
    ///
    /// # Errors
    /// [`StepError`]: KVM still has an attribute that nobody needs.
    pub(crate) fn forget_locked(&self, gfns: GfnRange) -> Result<(), StepError> {
        let space = self.space.load();
        let executor = self.executor(&space);
        executor.publish(gfns, State::Shared)?;
        let set: Vec<_> = self.materialised.member_runs(gfns).collect();
        for chunk in set.iter().flat_map(|gfns| gfns.split_every(self.rules().chunk)) {
            executor.set_attributes(chunk, State::Shared)?;
        }
        Ok(())
    }

    /// Sets KVM's attribute to private for all of `gfns`, whatever has been declared: memory without a slot to which a guest
    /// must have no shared access.
    ///
    /// # Errors
    /// [`StepError`].
    pub(crate) fn seal_locked(&self, gfns: GfnRange) -> Result<(), StepError> {
        let missing: Vec<_> = self.materialised.differing_runs(gfns, true).collect();
        self.attributes_locked(&missing, State::Private)
    }

    /// Takes back what [`seal_locked`](Self::seal_locked) did: KVM's attribute is private only where that was declared.
    ///
    /// # Errors
    /// [`StepError`].
    pub(crate) fn unseal_locked(&self, gfns: GfnRange) -> Result<(), StepError> {
        let set: Vec<_> = self.materialised.member_runs(gfns).collect();
        let kept: Vec<_> = self.declared.member_runs(gfns).collect();
        self.attributes_locked(&crate::addr::subtract_lists(&set, &kept), State::Shared)
    }

    fn attributes_locked(&self, runs: &[GfnRange], to: State) -> Result<(), StepError> {
        let space = self.space.load();
        let executor = self.executor(&space);
        runs.iter()
            .flat_map(|gfns| gfns.split_every(self.rules().chunk))
            .try_for_each(|gfns| executor.set_attributes(gfns, to))
    }

    fn rules(&self) -> Rules {
        Rules {
            discard: self.options.discard,
            chunk: self.options.chunk_pages.max(1),
            listeners: !self.listeners.is_empty(),
        }
    }

    fn executor<'a>(&'a self, space: &'a Space) -> Executor<'a> {
        Executor {
            hypervisor: self.hypervisor.as_ref(),
            space,
            declared: &self.declared,
            materialised: &self.materialised,
            listeners: &self.listeners,
            unmapped: &self.unmapped,
            queue: &self.queue,
            counters: &self.counters.issued,
        }
    }

    /// What was asked for, and what a backend without a record would do about it.
    fn count(&self, plan: &Plan) {
        let (requests, naive) = (&self.counters.requests, &self.counters.naive);
        requests.pages_requested.add(plan.pages);
        naive.set_memory_attributes.add(plan.pages);
        if plan.to.is_private() {
            naive.discard_shared.add(plan.pages);
        } else {
            naive.punch_hole.add(plan.pages);
        }
    }

    fn count_outcome(&self, plan: &Plan, outcome: &Outcome) {
        let requests = &self.counters.requests;
        let converted = match outcome {
            Outcome::Unchanged => 0,
            Outcome::Converted { pages } => *pages,
            Outcome::RolledBack { .. } => {
                requests.rolled_back.add(1);
                0
            }
            Outcome::Poisoned { done, .. } => {
                requests.poisoned.add(1);
                done.iter().map(GfnRange::pages).fold(0, u64::saturating_add)
            }
        };
        requests.pages_converted.add(converted);
        requests.pages_unchanged.add(plan.pages.saturating_sub(plan.pages_changed()));
    }
}
