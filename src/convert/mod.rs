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
mod discard;
mod effects;
mod listener;
mod lock;
mod plan;
mod request;

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use crate::addr::{Gfn, GfnRange, PAGE_SIZE, PAGES_PER_2M, subtract_lists};
use crate::backing::Space;
use crate::hypervisor::Hypervisor;
use crate::page_set::{PageSet, PageSetError};
use crate::stats::Counters;

pub use commit::{Effects, Outcome, StepError, commit};
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
    pub const fn declared(&self) -> &PageSet {
        &self.declared
    }

    /// Frames whose attribute in KVM is private.
    pub const fn materialised(&self) -> &PageSet {
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

    /// Keeps every conversion, pin and materialisation out of `gfns`, for an edit of the layout.
    ///
    /// # Errors
    /// [`LockError`].
    pub(crate) fn exclusive(&self, gfns: GfnRange) -> Result<RangeGuard<'_>, LockError> {
        self.locks.exclusive(gfns, Some(self.options.pins))
    }

    /// Keeps every conversion and materialisation out of `gfns`; device accesses may go on.
    ///
    /// # Errors
    /// [`LockError::Reentrant`].
    pub(crate) fn hold(&self, gfns: GfnRange) -> Result<RangeGuard<'_>, LockError> {
        self.locks.exclusive(gfns, None)
    }

    /// Converts the request's pages, or refuses before any effect.
    ///
    /// # Errors
    /// [`ConvertError`]: nothing has happened.
    pub fn convert(&self, request: &Request) -> Result<Outcome, ConvertError> {
        let counters = &self.counters.requests;
        counters.requests.add(1);
        let outcome = self.try_convert(request).inspect_err(|_| counters.refused.add(1))?;
        if let DiscardPolicy::Deferred { budget } = self.options.discard
            && self.deferred_bytes() > budget
        {
            // What cannot be freed now stays to be freed; the conversion itself is done.
            let _left_for_later = self.trim(u64::MAX);
        }
        Ok(outcome)
    }

    fn try_convert(&self, request: &Request) -> Result<Outcome, ConvertError> {
        // What is refused anyway need not wait for anybody.
        admit(request, &self.space.load())?;
        // Only shared pages are pinned, and a conversion to shared changes none of those.
        let pins = request.to.is_private().then_some(self.options.pins);
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
    /// [`StepError::Listener`] if it could not map: what it had mapped is unmapped again, and it is not registered.
    /// [`ConvertError`] if called from within a conversion.
    pub fn add_listener(&self, listener: &Arc<dyn Listener>) -> Result<ListenerId, AddListenerError> {
        let _guard = self.locks.exclusive(everything(), None)?;
        let runs = self.shared_runs(everything());
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
            self.shared_runs(everything()).iter().rev().for_each(|run| listener.unmap(run));
        }
        if self.listeners.is_empty() {
            self.forget_unmapped(everything());
        }
        Ok(())
    }

    /// The shared runs of memory within `gfns`, as listeners hear of them: without those that they could not map again.
    pub(crate) fn shared_runs(&self, gfns: GfnRange) -> Vec<SharedRun> {
        let space = self.space.load();
        let memory = space.layout().table().segments(gfns).filter(|segment| segment.slot.is_some());
        let memory = crate::addr::merge_adjacent(memory.map(|segment| segment.gfns));
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

    /// Tells listeners of memory that has been added, or is about to go. The caller holds
    /// [`exclusive`](Self::exclusive) over `gfns`.
    ///
    /// # Errors
    /// [`StepError::Listener`]: nothing of `gfns` is mapped then, and nobody will be told to unmap it.
    pub(crate) fn announce_locked(&self, gfns: GfnRange, mapped: bool) -> Result<(), StepError> {
        if self.listeners.is_empty() {
            return Ok(());
        }
        if !mapped {
            self.shared_runs(gfns).iter().rev().for_each(|run| self.listeners.unmap(run));
            self.forget_unmapped(gfns);
            return Ok(());
        }
        self.forget_unmapped(gfns);
        let runs = self.shared_runs(gfns);
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
