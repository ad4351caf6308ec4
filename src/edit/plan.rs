//! From one layout to another in the fewest calls. Pure.
//!
//! The memory that a draft describes falls into runs that could be one slot each; [`Prefer`] says how they are cut. What is
//! left of the old slots then stays as it is, changes flags, moves, or goes, and what is missing is created.
//! All deletions come first, then moves, each once its target is free, then flags, then creations, so that KVM never sees an
//! overlap.
//!
//! [`Prefer::FewSlots`] gives the fewest slots, and of such layouts one that takes the fewest calls.
//! [`Prefer::NoInterruption`] keeps every slot that can be kept, and then takes the fewest calls. Both hold where no shared
//! memory appears at two places, no run is longer than a slot may be, and no more than ten slots wait for each other's places;
//! else they are close. Mirrors what
//! `kvm_set_memory_region()` allows: a slot with a guest_memfd is only created and deleted; `READONLY`, address and size
//! never change; position and `LOG_DIRTY` may.

use crate::addr::GfnRange;
use crate::layout::{Layout, LayoutError, Memslot, SlotFlags, SlotId};

use super::assign::{Assignment, Prefer, assign};
use super::draft::Draft;
use super::error::PlanError;
use super::ids;
use super::movers::Renewed;
use super::order;
use super::pieces::Pieces;
use super::step::Step;

/// What takes a VM from one layout to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The calls, in order.
    pub steps: Vec<Step>,
    /// The layout afterwards.
    pub layout: Layout,
    /// Frames that are memory before and after, and none for a moment in between, ascending.
    pub replaced: Vec<GfnRange>,
    /// Slots whose dirty log the steps would lose, or take to other frames.
    pub harvest: Vec<Memslot>,
}

impl Plan {
    /// Whether no vCPU may be in the guest while it is carried out: memory that stays would be missing for a moment, or
    /// writes after the last look at a dirty log would be lost.
    pub const fn stops_vcpus(&self) -> bool {
        !self.replaced.is_empty() || !self.harvest.is_empty()
    }

    /// The slots that go, or go elsewhere.
    pub fn deleted(&self) -> impl Iterator<Item = Memslot> {
        let going = self.steps.iter().filter(|step| matches!(step, Step::Delete(_) | Step::Move { .. }));
        going.filter_map(Step::before)
    }

    /// The slots that come, or come from elsewhere.
    pub fn created(&self) -> impl Iterator<Item = Memslot> {
        let coming = self.steps.iter().filter(|step| matches!(step, Step::Create(_) | Step::Move { .. }));
        coming.filter_map(Step::after)
    }
}

/// The fewest steps from `layout` to what `draft`, made from it, describes.
///
/// # Errors
/// [`PlanError`]: KVM would refuse one of the slots.
pub fn plan(layout: &Layout, draft: &Draft, prefer: Prefer) -> Result<Plan, PlanError> {
    let steps = steps(layout, draft, prefer)?;
    let mut next = layout.clone();
    if !steps.is_empty() {
        let removed: Vec<SlotId> = steps.iter().filter_map(Step::before).map(|slot| slot.id).collect();
        next.replace(&removed, steps.iter().filter_map(Step::after))?;
    }
    check_flags(&steps)?;
    let replaced = replaced(draft, &steps);
    let harvest = harvest(&steps);
    Ok(Plan { steps, layout: next, replaced, harvest })
}

/// The steps of a plan alone: nobody has checked yet that KVM takes each of the slots.
///
/// # Errors
/// [`PlanError::NoFreeId`].
pub fn steps(layout: &Layout, draft: &Draft, prefer: Prefer) -> Result<Vec<Step>, PlanError> {
    let limit = layout.limits().pages_per_slot;
    let Some(Pieces(pieces)) = &draft.pieces else { return Ok(Vec::new()) };
    let assignment = order::acyclic(&draft.old, |stuck| assign(pieces, &draft.old, prefer, limit, stuck));
    let mut steps: Vec<Step> = Vec::with_capacity(assignment.calls());
    let Assignment { gone, relogged, moved, created, apart } = assignment;
    // Through references, whose number is known, so that each slot is copied once and into its place.
    let gone: Vec<&Memslot> = gone.iter().filter_map(|at| draft.old.get(*at)).collect();
    steps.extend(gone.into_iter().copied().map(Step::Delete));
    let renewed = |of: Renewed| {
        let old = draft.old.get(of.old)?;
        Some((of.region.slot(old.id), *old))
    };
    let moved = moved.into_iter().filter_map(renewed);
    steps.extend(moved.map(|(slot, old)| Step::Move { slot, from: old.gfns, flags: old.flags }));
    let relogged = relogged.into_iter().filter_map(renewed);
    steps.extend(relogged.map(|(slot, old)| Step::SetFlags { slot, flags: old.flags }));
    let unnamed = SlotId { as_id: draft.as_id, id: u16::MAX };
    steps.extend(created.iter().map(|region| Step::Create(region.slot(unnamed))));
    ids::assign(layout, draft, &mut steps, apart)?;
    Ok(steps)
}

/// A binding whose file was closed under its slot cannot be made again: [`Layout::replace`] refuses that as it would any.
/// What it cannot see is a call that only changes flags, which KVM never allows on a slot with a guest_memfd.
fn check_flags(steps: &[Step]) -> Result<(), LayoutError> {
    for step in steps {
        if let Step::SetFlags { slot, .. } | Step::Move { slot, .. } = step
            && slot.flags.contains(SlotFlags::GUEST_MEMFD)
        {
            return Err(LayoutError::LogDirtyWithGuestMemfd { id: slot.id });
        }
    }
    Ok(())
}

/// What is memory before and after, in slots that do not stay.
fn replaced(draft: &Draft, steps: &[Step]) -> Vec<GfnRange> {
    let leaving = steps.iter().filter_map(|step| match step {
        Step::Delete(Memslot { gfns, .. }) | Step::Move { from: gfns, .. } => Some(*gfns),
        _ => None,
    });
    let mut leaving: Vec<GfnRange> = leaving.collect();
    leaving.sort_unstable();
    let memory = crate::addr::merge_adjacent(draft.regions().map(|region| region.gfns));
    crate::addr::merge_adjacent(crate::addr::intersect_lists(&leaving, &memory))
}

/// Slots that stop being logged, or being where they are, or at all.
fn harvest(steps: &[Step]) -> Vec<Memslot> {
    let logged = |slot: Option<Memslot>| slot.filter(|slot| slot.flags.contains(SlotFlags::LOG_DIRTY));
    // A slot that moves keeps its log. But entries of a ring are by slot and page of it, and have to be read while it is known
    // which frames those are.
    let kept = |step: &&Step| matches!(step, Step::SetFlags { .. }) && logged(step.after()).is_some();
    steps.iter().filter(|step| !kept(step)).filter_map(|step| logged(step.before())).collect()
}
