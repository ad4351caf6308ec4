//! Carrying out an edit, with everything around the slots.
//!
//! In this order, each with its undo, the last first:
//!
//! 1. what deferred discards have left in memory that goes is freed; it was nobody's, so this is not undone;
//! 2. listeners unmap what goes; memory that is new gets its first state, and attributes are set where they must be before
//!    anybody sees a slot;
//! 3. listeners map what comes: only what really changes, and while the guest runs;
//! 4. if slots are replaced, the gate closes; dirty logs that would go are harvested;
//! 5. where the platform wants it and the caller allows it, private pages that appear at another frame are freed, which is not
//!    undone; KVM's calls, and the new layout is published;
//! 6. the gate opens.
//!
//! Page state is the guest's and no slot's: it does not change at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::addr::{FileRange, GfnRange, intersect_lists, merge_adjacent, subtract_lists};
use crate::backing::{SharedBacking, SharedSlice, Space};
use crate::convert::{Outcome, StepError};
use crate::edit::{self, Effects, Hazard, Plan, Prefer, Region, Step};
use crate::gmem::FileId;
use crate::layout::{Layout, LayoutError, Memslot, SlotId};

use super::edit::{Edit, EditError, check_mapped, mapping_in};
use super::frames::Frames;
use super::{CvmMemory, Materialise};

/// How an edit is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitOptions {
    /// What the plan avoids first.
    pub prefer: Prefer,
    /// How long vCPUs may take to leave the guest, and others before to open the gate.
    pub patience: Duration,
    /// Private memory may go for good where the platform destroys it with its slot, or may keep a vCPU's state in it.
    pub lose_private: bool,
    /// Private pages that appear at another frame are freed first where the platform wants that: their contents go, and do not
    /// come back should KVM then refuse a slot.
    pub free_rebound: bool,
    /// Dirty logs may go that nobody harvests.
    pub lose_dirty: bool,
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self {
            prefer: Prefer::default(),
            patience: Duration::from_secs(5),
            lose_private: false,
            free_rebound: false,
            lose_dirty: false,
        }
    }
}

/// What an edit took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// KVM's calls, in order.
    pub steps: Vec<Step>,
    /// How long vCPUs were kept out; `None` if nobody was.
    pub stopped: Option<Duration>,
    /// Calls that deleting all slots and adding all would have taken, with all vCPUs stopped.
    pub naive_calls: usize,
}

/// Memory that goes and memory that comes, both ascending; what is the same before and after is in neither.
struct Changes {
    gone: Vec<GfnRange>,
    come: Vec<GfnRange>,
    /// Holes among what comes that are kept from being taken for devices: without a slot, and private to KVM.
    sealed: Vec<GfnRange>,
    hull: GfnRange,
}

impl Edit<'_> {
    /// Carries it out: all of it, or nothing.
    ///
    /// Callable from any thread that is not in the guest, and not from a listener. If slots must be replaced, the
    /// [gate](CvmMemory::gate) is closed meanwhile, for just those calls; if not, nobody is stopped.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn commit(self, options: &CommitOptions) -> Result<Committed, EditError> {
        commit(&self, options)
    }
}

fn commit(edit: &Edit<'_>, options: &CommitOptions) -> Result<Committed, EditError> {
    let memory = edit.memory;
    memory.gate.refuse_deadlock()?;
    let mut frames = memory.editing()?;
    let current = memory.converter.space().clone();
    let before = edit.layout_of(&current)?;
    let replayed;
    let draft = if Arc::ptr_eq(&edit.base, &current) {
        &edit.draft
    } else {
        replayed = edit.draft.replay(&before, mapping_in(&current))?;
        &replayed
    };
    let mut plan = edit::plan(&before, draft, options.prefer)?;
    edit.let_go_unused(&mut plan.layout, &current);
    let naive_calls = before.table().len().saturating_add(plan.layout.table().len());
    let mappings = edit.mappings(&current);
    check_mapped(draft, &mappings)?;
    let Some(changes) = changes(memory, &plan, &mappings, &current)? else {
        return Ok(Committed { steps: Vec::new(), stopped: None, naive_calls });
    };
    let next = space_after(edit, &current, &plan.layout, &mappings)?;
    if let Some((one, other)) = next.shared_twice() {
        return Err(EditError::SharedTwice { one, other });
    }
    let both = slices_of_both(&current, &plan, &next);
    let converter = &memory.converter;
    // Only an access to what goes must end first.
    let _guard = if changes.gone.is_empty() {
        converter.hold(changes.hull)?
    } else {
        converter.exclusive(changes.hull, &changes.gone)?
    };
    let work =
        Work { memory, edit, options, plan: &plan, changes: &changes, current: &current, next: &next, both: &both };
    let rebound = work.check(&frames)?;
    let stopped = work.carry_out(&mut frames, &rebound)?;
    Ok(Committed { steps: plan.steps, stopped, naive_calls })
}

/// What differs, or `None` if nothing does.
fn changes(
    memory: &CvmMemory,
    plan: &Plan,
    mappings: &[Arc<dyn SharedBacking>],
    current: &Space,
) -> Result<Option<Changes>, EditError> {
    let touched = plan.steps.iter().flat_map(|step| [step.before(), step.after()]).flatten();
    let Some(hull) = touched.map(|slot| slot.gfns).reduce(|a, b| a.hull(&b)) else { return Ok(None) };
    let old_mapping = mapping_in(current);
    let mut deleted: Vec<Region> = plan.deleted().map(|slot| Region::of(&slot, old_mapping(&slot))).collect();
    let mut created = Vec::new();
    for slot in plan.created() {
        let mapping = Edit::slice(&slot, mappings)?.backing.hva();
        created.push(Region::of(&slot, mapping));
    }
    deleted.sort_unstable_by_key(|region| region.gfns);
    created.sort_unstable_by_key(|region| region.gfns);
    let mut same = Vec::new();
    for old in &deleted {
        let first = created.partition_point(|new| new.gfns.end() <= old.gfns.start());
        let overlapping = created.iter().skip(first).take_while(|new| new.gfns.start() < old.gfns.end());
        same.extend(overlapping.filter(|new| new.same_memory(old)).filter_map(|new| new.gfns.intersection(&old.gfns)));
    }
    let all = |regions: &[Region]| merge_adjacent(regions.iter().map(|region| region.gfns));
    let same = merge_adjacent(same);
    let (gone, come) = (subtract_lists(&all(&deleted), &same), subtract_lists(&all(&created), &same));
    let mut sealed = Vec::new();
    if memory.platform().hazards.holes_stick {
        let holes = subtract_lists(&come, &gone);
        let told: Vec<_> = holes.iter().flat_map(|&gfns| memory.converter.materialised().member_runs(gfns)).collect();
        let own: Vec<_> = holes.iter().flat_map(|&gfns| memory.converter.declared().member_runs(gfns)).collect();
        sealed = subtract_lists(&told, &own);
    }
    Ok(Some(Changes { gone, come, sealed, hull }))
}

fn space_after(
    edit: &Edit<'_>,
    current: &Space,
    layout: &Layout,
    mappings: &[Arc<dyn SharedBacking>],
) -> Result<Space, EditError> {
    let mut shared: BTreeMap<SlotId, SharedSlice> = BTreeMap::new();
    for slot in layout.table().slots() {
        let kept = current
            .layout()
            .table()
            .get(slot.id)
            .filter(|old| (old.hva, old.gfns.pages()) == (slot.hva, slot.gfns.pages()));
        let slice = match kept.and_then(|old| current.shared(old.id)) {
            Some(slice) => slice.clone(),
            None => Edit::slice(slot, mappings)?,
        };
        shared.insert(slot.id, slice);
    }
    let files = edit.files.iter().filter(|file| layout.bindings(file.id()).is_some());
    Ok(current.relaid(layout.clone(), files.cloned(), shared))
}

/// The slices of both layouts by what they are made of, for a layout in between.
fn slices_of_both(current: &Space, plan: &Plan, next: &Space) -> Vec<(Memslot, SharedSlice)> {
    let old = plan.deleted().filter_map(|slot| Some((slot, current.shared(slot.id)?.clone())));
    let new = plan.created().filter_map(|slot| Some((slot, next.shared(slot.id)?.clone())));
    old.chain(new).collect()
}

/// A plan and what it is carried out with. The edit lock and the range's lock are held.
struct Work<'w> {
    memory: &'w CvmMemory,
    edit: &'w Edit<'w>,
    options: &'w CommitOptions,
    plan: &'w Plan,
    changes: &'w Changes,
    current: &'w Space,
    next: &'w Space,
    both: &'w [(Memslot, SharedSlice)],
}

/// Pages of a file that must be freed first.
type Rebound = Vec<(FileId, FileRange)>;

/// What has been done before KVM's calls, to be undone should they fail.
#[derive(Default)]
struct Done {
    fresh: Vec<GfnRange>,
    sealed: bool,
    unmapped: bool,
    mapped: Vec<GfnRange>,
}

impl Work<'_> {
    /// Everything that can be refused before anything happens.
    fn check(&self, frames: &Frames) -> Result<Rebound, EditError> {
        let platform = self.memory.platform();
        let hazards = platform.hazards;
        let declared = self.memory.converter.declared();
        let private = |gfns: &[GfnRange]| gfns.iter().find_map(|gfns| declared.member_runs(*gfns).next());
        let going: Vec<GfnRange> =
            self.plan.deleted().filter(|slot| slot.binding.is_some()).map(|slot| slot.gfns).collect();
        if hazards.slot_delete_loses_private
            && !self.options.lose_private
            && let Some(gfns) = private(&going)
        {
            return Err(Hazard::LosesPrivate { platform: platform.name, gfns }.into());
        }
        let mut going = going;
        going.sort_unstable();
        if hazards.vcpu_state_in_private_memory
            && !self.options.lose_private
            && let Some(gfns) = private(&intersect_lists(&going, &self.changes.gone))
        {
            return Err(Hazard::LosesVcpu { platform: platform.name, gfns }.into());
        }
        for slot in self.plan.created() {
            self.memory.check_record(&slot, self.next).map_err(|error| EditError::Record { gfns: slot.gfns, error })?;
        }
        let mut rebound = Rebound::new();
        for slot in self.plan.created().filter(|_| hazards.pages_keep_their_frame) {
            for (file, pages, was, wanted) in frames.rebound(&slot) {
                if !self.options.free_rebound {
                    return Err(Hazard::Rebound { file, pages, was, wanted }.into());
                }
                rebound.push((file, pages));
            }
        }
        for slot in self.plan.created().filter(|slot| !self.next.is_convertible(slot)) {
            if let Some(gfns) = private(&[slot.gfns]) {
                return Err(EditError::StillPrivate { gfns });
            }
        }
        if let Some(slot) = self.plan.harvest.first()
            && !self.options.lose_dirty
            && self.memory.harvester().is_none()
        {
            return Err(EditError::NobodyHarvests { slot: slot.id.raw() });
        }
        Ok(rebound)
    }

    fn carry_out(&self, frames: &mut Frames, rebound: &Rebound) -> Result<Option<Duration>, EditError> {
        let mut done = Done::default();
        let result = self.prepare(&mut done).and_then(|()| self.replace(frames, rebound));
        if result.is_err() {
            self.undo(&done);
        }
        result
    }

    /// Steps 1 to 3.
    fn prepare(&self, done: &mut Done) -> Result<(), EditError> {
        let converter = &self.memory.converter;
        if let Some(harvester) = self.memory.harvester() {
            for slot in self.plan.created() {
                let Some(slice) = self.next.shared(slot.id) else { continue };
                let failed = |errno| EditError::Harvest { slot: slot.id.raw(), errno };
                harvester.memory(&slice.backing).map_err(failed)?;
            }
        }
        for &gfns in &self.changes.gone {
            converter.settle_locked(gfns).map_err(|error| EditError::Step { gfns, error })?;
        }
        let hazards = self.memory.platform().hazards;
        if hazards.holes_stick {
            done.sealed = true;
            for &gfns in &self.changes.gone {
                converter.seal_locked(gfns).map_err(|error| EditError::Step { gfns, error })?;
            }
        }
        // Before anything is declared of the same frames: who has mapped them has mapped what is shared now.
        done.unmapped = true;
        for &gfns in &self.changes.gone {
            converter.announce_locked(gfns, self.current, false).map_err(|error| EditError::Step { gfns, error })?;
        }
        for slot in self.plan.created().filter(|slot| self.next.is_convertible(slot)) {
            let gfns = slot.gfns;
            let fresh: Vec<GfnRange> = self.memory.known.differing_runs(gfns, true).collect();
            for gfns in fresh {
                let record = |error| EditError::Record { gfns, error };
                done.fresh.push(gfns);
                self.memory.known.insert(gfns).map_err(record)?;
                converter.declare_locked(gfns, self.memory.initial).map_err(record)?;
            }
            if self.memory.materialise == Materialise::Eager
                && let Outcome::RolledBack { cause: error } | Outcome::Poisoned { cause: error, .. } =
                    converter.materialise_locked(gfns, self.next)
            {
                return Err(EditError::Step { gfns, error });
            }
        }
        for &gfns in &self.changes.come {
            converter.announce_locked(gfns, self.next, true).map_err(|error| EditError::Step { gfns, error })?;
            done.mapped.push(gfns);
        }
        Ok(())
    }

    /// Steps 4 to 6.
    fn replace(&self, frames: &mut Frames, rebound: &Rebound) -> Result<Option<Duration>, EditError> {
        let memory = self.memory;
        let hazards = memory.platform().hazards;
        let vcpu_state = hazards.vcpu_state_in_private_memory && self.plan.deleted().any(|slot| slot.binding.is_some());
        let mut closed = None;
        // What is freed to be bound elsewhere must not be used once more where it is.
        if self.plan.stops_vcpus() || vcpu_state || !rebound.is_empty() {
            closed = Some((memory.gate.close(self.options.patience)?, Instant::now()));
        }
        if closed.is_none()
            && let Some(harvester) = memory.harvester()
        {
            harvester.expect(self.next.layout());
        }
        let result = self.harvest().and_then(|()| self.call_kvm(frames, rebound));
        memory.tell_edited();
        let stopped = closed.map(|(closed, since)| {
            drop(closed);
            since.elapsed()
        });
        result.map(|()| stopped)
    }

    /// Dirty logs that go.
    fn harvest(&self) -> Result<(), EditError> {
        let Some(harvester) = self.memory.harvester() else { return Ok(()) };
        for slot in &self.plan.harvest {
            let Some(slice) = self.current.shared(slot.id) else { continue };
            let failed = |errno| EditError::Harvest { slot: slot.id.raw(), errno };
            harvester.harvest(slot, slice).map_err(failed)?;
        }
        Ok(())
    }

    /// Step 5.
    fn call_kvm(&self, frames: &mut Frames, rebound: &Rebound) -> Result<(), EditError> {
        let memory = self.memory;
        for (file, pages) in rebound {
            if let Some(owner) = self.edit.file(*file, self.current) {
                if let Err(error) = owner.punch_hole(*pages) {
                    self.remember_frames(frames, 0);
                    let gfns = self.changes.hull;
                    return Err(EditError::Step { gfns, error: StepError::Private { gfns, error } });
                }
                frames.freed(*file, *pages);
            }
        }
        memory.intended.store(Some(self.plan.layout.snapshot()));
        memory.changes.fetch_add(1, Ordering::AcqRel);
        let result = edit::commit(&self.plan.steps, self);
        let result = match result {
            Ok(()) => {
                memory.converter.publish_space(self.next.clone());
                self.plan.created().for_each(|slot| frames.bound(&slot));
                Ok(())
            }
            Err(failed) => {
                let error = self.failed(&failed);
                self.remember_frames(frames, failed.at);
                Err(error)
            }
        };
        memory.intended.store(None);
        memory.changes.fetch_add(1, Ordering::AcqRel);
        result
    }

    /// After a failure that so many steps came before: a guest may have used what was there for a moment, and uses what is there.
    fn remember_frames(&self, frames: &mut Frames, steps: usize) {
        self.plan.steps.iter().take(steps).filter_map(Step::after).for_each(|slot| frames.bound(&slot));
        let space = self.memory.converter.space().clone();
        let there = self.plan.deleted().chain(self.plan.created());
        let there = there.filter(|slot| space.layout().table().get(slot.id) == Some(slot));
        there.for_each(|slot| frames.bound(&slot));
    }

    /// What the failure left, published.
    fn failed(&self, failed: &edit::Failed) -> EditError {
        let (kind, slot, gfns) = self
            .plan
            .steps
            .get(failed.at)
            .map_or(("", 0, self.changes.hull), |step| (step.kind(), step.slot().id.raw(), step.slot().gfns));
        if failed.left.is_empty() {
            return EditError::Kvm { kind, slot, gfns, errno: failed.errno };
        }
        match self.space_left(failed) {
            Ok(space) => self.memory.converter.publish_space(space),
            Err(error) => {
                // Nobody knows what KVM has, so all memory that it may have is kept for ever.
                tracing::error!(%error, "a layout that cannot be");
                self.both.iter().for_each(|(_, slice)| std::mem::forget(slice.clone()));
            }
        }
        EditError::Broken { kind, slot, gfns, errno: failed.errno, left: failed.left.clone() }
    }

    fn space_left(&self, failed: &edit::Failed) -> Result<Space, LayoutError> {
        let before = self.edit.layout_of(self.current)?;
        let layout = failed.layout(&before)?;
        let mut shared = BTreeMap::new();
        for slot in layout.table().slots() {
            let of_both =
                self.both.iter().find(|(other, _)| (other.hva, other.gfns.pages()) == (slot.hva, slot.gfns.pages()));
            let slice = of_both.map(|(_, slice)| slice).or_else(|| self.current.shared(slot.id));
            shared.extend(slice.map(|slice| (slot.id, slice.clone())));
        }
        Ok(self.current.relaid(layout, self.edit.files.iter().cloned(), shared))
    }

    /// Takes steps 3 and 2 back.
    fn undo(&self, done: &Done) {
        let converter = &self.memory.converter;
        let complain = |what: &str, result: Result<(), StepError>| {
            if let Err(error) = result {
                tracing::error!(%error, "undoing an edit: {what}");
            }
        };
        // After a failure that could not be undone, not everything is as it was: what has come and is there stays, what was
        // there and is not goes.
        let space = converter.space().clone();
        let within = |there: &Space, ranges: &[GfnRange]| -> Vec<GfnRange> {
            ranges.iter().flat_map(|gfns| same_memory(&space, there, *gfns)).collect()
        };
        for gfns in subtract_lists(&done.mapped, &within(self.next, &done.mapped)).into_iter().rev() {
            complain("unmap", converter.announce_locked(gfns, self.next, false));
        }
        let mut fresh = done.fresh.clone();
        fresh.sort_unstable();
        for gfns in subtract_lists(&fresh, &within(self.next, &fresh)).into_iter().rev() {
            complain("forget", converter.forget_locked(gfns));
            if let Err(error) = self.memory.known.remove(gfns) {
                tracing::error!(%error, "undoing an edit: memory that was not wanted stays known");
            }
        }
        if done.unmapped {
            let mut deleted: Vec<GfnRange> = self.plan.deleted().map(|slot| slot.gfns).collect();
            deleted.sort_unstable();
            let kept = subtract_lists(&deleted, &self.changes.gone);
            for gfns in subtract_lists(&kept, &within(self.current, &kept)) {
                complain("unmap", converter.announce_locked(gfns, self.current, false));
            }
            for gfns in within(self.current, &self.changes.gone) {
                complain("map", converter.announce_locked(gfns, &space, true));
            }
        }
        if done.sealed {
            let slots = space.layout().table().space(0).slots();
            let memory = merge_adjacent(slots.iter().map(|slot| slot.gfns));
            for gfns in intersect_lists(&self.changes.gone, &memory) {
                complain("unseal", converter.unseal_locked(gfns));
            }
            for gfns in subtract_lists(&self.changes.sealed, &memory) {
                complain("seal", converter.seal_locked(gfns));
            }
        }
    }

    fn call(&self, step: &Step) -> Result<(), Errno> {
        let slot = step.slot();
        let size = if let Step::Delete(_) = step { 0 } else { slot.gfns.bytes() };
        let file = slot.binding.and_then(|binding| self.edit.file(binding.file, self.next));
        self.memory.call_region(slot, size, file.filter(|_| size != 0).map(Arc::as_ref))
    }

    /// What comes to have a slot is sealed no more: not before it has one, or somebody could find a hole.
    fn unseal(&self, step: &Step) -> Result<(), StepError> {
        let (Some(slot), true) = (step.after(), self.memory.platform().hazards.holes_stick) else { return Ok(()) };
        let changes = [&self.changes.gone, &self.changes.come];
        let there = changes.into_iter().flat_map(|gfns| intersect_lists(&[slot.gfns], gfns));
        there.into_iter().try_for_each(|gfns| self.memory.converter.unseal_locked(gfns))
    }

    /// Of what is about to lose its slot, what was sealed before the edit is so again.
    fn seal_again(&self, step: &Step) {
        for gfns in step.before().into_iter().flat_map(|slot| intersect_lists(&[slot.gfns], &self.changes.sealed)) {
            if let Err(error) = self.memory.converter.seal_locked(gfns) {
                tracing::error!(%error, "undoing an edit: a hole that its guest may take for a device");
            }
        }
    }
}

/// The frames of `gfns` with the same memory in both, ascending.
fn same_memory(a: &Space, b: &Space, gfns: GfnRange) -> Vec<GfnRange> {
    let (mapping_a, mapping_b) = (mapping_in(a), mapping_in(b));
    let mut same = Vec::new();
    for segment in a.layout().table().segments(gfns) {
        let Some(slot) = segment.slot else { continue };
        let of_a = Region::of(slot, mapping_a(slot));
        let parts = b.layout().table().segments(segment.gfns);
        let parts =
            parts.filter(|part| part.slot.is_some_and(|slot| Region::of(slot, mapping_b(slot)).same_memory(&of_a)));
        same.extend(parts.map(|part| part.gfns));
    }
    same
}

impl Effects for Work<'_> {
    fn step(&self, step: &Step) -> Result<(), Errno> {
        self.seal_again(step);
        self.call(step)?;
        let Err(error) = self.unseal(step) else { return Ok(()) };
        tracing::error!(%error, "{} slot {:#x}", step.kind(), step.slot().id.raw());
        let back = step.inverse();
        self.seal_again(&back);
        match self.call(&back) {
            Ok(()) => Err(if let StepError::Attributes { errno, .. } = error { errno } else { Errno::EIO }),
            // The slot is there, and the layout has to say so.
            Err(_) => Ok(()),
        }
    }
}
