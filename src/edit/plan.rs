//! From one layout to another in the fewest calls. Pure.
//!
//! The memory that a draft describes falls into runs that could be one slot each; [`Prefer`] says how they are cut. What is
//! left of the old slots then stays as it is, changes flags, moves, or goes, and what is missing is created.
//! All deletions come first, then moves, each once its target is free, then flags, then creations, so that KVM never sees an
//! overlap.
//!
//! [`Prefer::FewSlots`] gives the fewest slots, and of such layouts one that takes the fewest calls.
//! [`Prefer::NoInterruption`] keeps every slot that can be kept, and then takes the fewest calls. Both hold where no shared
//! memory appears at two places and no run is longer than a slot may be; else they are close. Mirrors what
//! `kvm_set_memory_region()` allows: a slot with a guest_memfd is only created and deleted; `READONLY`, address and size
//! never change; position and `LOG_DIRTY` may.

use crate::addr::GfnRange;
use crate::layout::{Layout, LayoutError, Memslot, SlotFlags, SlotId};

use super::assign::{Assignment, Fate, Final, Prefer, assign, fate};
use super::draft::Draft;
use super::error::PlanError;
use super::ids;
use super::order;
use super::pieces::Piece;

/// One call of `KVM_SET_USER_MEMORY_REGION2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Size zero.
    Delete(Memslot),
    /// Another place, perhaps other flags.
    Move {
        /// As it was.
        from: Memslot,
        /// As it will be.
        to: Memslot,
    },
    /// Another value of `LOG_DIRTY`.
    SetFlags {
        /// As it was.
        from: Memslot,
        /// As it will be.
        to: Memslot,
    },
    /// A new slot.
    Create(Memslot),
}

impl Step {
    /// What it is called in messages.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Delete(_) => "delete",
            Self::Move { .. } => "move",
            Self::SetFlags { .. } => "set flags",
            Self::Create(_) => "create",
        }
    }

    /// The slot, as the call names it.
    pub const fn slot(&self) -> &Memslot {
        match self {
            Self::Delete(slot) | Self::Create(slot) | Self::Move { to: slot, .. } | Self::SetFlags { to: slot, .. } => {
                slot
            }
        }
    }

    /// The step that takes this one back.
    pub const fn inverse(&self) -> Self {
        match *self {
            Self::Delete(slot) => Self::Create(slot),
            Self::Create(slot) => Self::Delete(slot),
            Self::Move { from, to } => Self::Move { from: to, to: from },
            Self::SetFlags { from, to } => Self::SetFlags { from: to, to: from },
        }
    }
}

/// What takes a VM from one layout to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The calls, in order.
    pub steps: Vec<Step>,
    /// The layout afterwards.
    pub layout: Layout,
    /// Frames that are memory before and after, and none for a moment in between, ascending.
    pub replaced: Vec<GfnRange>,
    /// Slots whose dirty log the steps would lose.
    pub harvest: Vec<Memslot>,
}

impl Plan {
    /// Whether no vCPU may be in the guest while it is carried out: memory that stays would be missing for a moment, or
    /// writes after the last look at a dirty log would be lost.
    pub const fn stops_vcpus(&self) -> bool {
        !self.replaced.is_empty() || !self.harvest.is_empty()
    }

    /// The slots that go, or go elsewhere.
    pub fn deleted(&self) -> impl Iterator<Item = &Memslot> {
        self.steps.iter().filter_map(|step| match step {
            Step::Delete(slot) | Step::Move { from: slot, .. } => Some(slot),
            _ => None,
        })
    }

    /// The slots that come, or come from elsewhere.
    pub fn created(&self) -> impl Iterator<Item = &Memslot> {
        self.steps.iter().filter_map(|step| match step {
            Step::Create(slot) | Step::Move { to: slot, .. } => Some(slot),
            _ => None,
        })
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
        let removed: Vec<SlotId> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Create(_) => None,
                other => Some(other.slot().id),
            })
            .collect();
        let added = steps.iter().filter(|step| !matches!(step, Step::Delete(_))).map(|step| *step.slot());
        next.replace(&removed, added)?;
    }
    check_flags(&steps)?;
    let replaced = replaced(&draft.pieces.0, &steps);
    let harvest = harvest(&steps);
    Ok(Plan { steps, layout: next, replaced, harvest })
}

/// The steps of a plan alone: nobody has checked yet that KVM takes each of the slots.
///
/// # Errors
/// [`PlanError::NoFreeId`].
pub fn steps(layout: &Layout, draft: &Draft, prefer: Prefer) -> Result<Vec<Step>, PlanError> {
    let limit = layout.limits().pages_per_slot;
    let assignment = order::acyclic(&draft.old, |stuck| assign(&draft.pieces.0, &draft.old, prefer, limit, stuck));
    let Assignment { finals, fates, moves } = assignment;
    let changing = fates.iter().filter(|fate| **fate != Fate::Stays).count();
    let created = finals.iter().filter(|of| of.old.is_none()).count();
    let mut steps: Vec<Step> = Vec::with_capacity(changing.saturating_add(created));
    let going = draft.old.all().iter().zip(&fates).filter(|(_, fate)| **fate == Fate::Goes);
    steps.extend(going.map(|(slot, _)| Step::Delete(*slot)));
    let renewed = |of: &Final| {
        let old = draft.old.get(of.old?)?;
        Some((*old, of.region.slot(old.id)))
    };
    let moving = moves.iter().filter_map(|index| renewed(finals.get(*index)?));
    steps.extend(moving.map(|(from, to)| Step::Move { from, to }));
    let relogged = finals.iter().filter(|of| fate(&fates, of.old) == Some(Fate::Flags));
    steps.extend(relogged.filter_map(renewed).map(|(from, to)| Step::SetFlags { from, to }));
    ids::assign(layout, draft, finals, &fates, |slot| steps.push(Step::Create(slot)))?;
    Ok(steps)
}

/// A binding whose file was closed under its slot cannot be made again: [`Layout::replace`] refuses that as it would any.
/// What it cannot see is a call that only changes flags, which KVM never allows on a slot with a guest_memfd.
fn check_flags(steps: &[Step]) -> Result<(), LayoutError> {
    for step in steps {
        if let Step::SetFlags { to, .. } | Step::Move { to, .. } = step
            && to.flags.contains(SlotFlags::GUEST_MEMFD)
        {
            return Err(LayoutError::LogDirtyWithGuestMemfd { id: to.id });
        }
    }
    Ok(())
}

/// What is memory before and after, in slots that do not stay.
fn replaced(pieces: &[Piece], steps: &[Step]) -> Vec<GfnRange> {
    let leaving = steps.iter().filter_map(|step| match step {
        Step::Delete(slot) | Step::Move { from: slot, .. } => Some(slot.gfns),
        _ => None,
    });
    let mut leaving: Vec<GfnRange> = leaving.collect();
    leaving.sort_unstable();
    let memory = crate::addr::merge_adjacent(pieces.iter().map(Piece::gfns));
    crate::addr::merge_adjacent(crate::addr::intersect_lists(&leaving, &memory))
}

/// Slots that stop being logged, or being at all.
fn harvest(steps: &[Step]) -> Vec<Memslot> {
    let losing = steps.iter().filter_map(|step| match step {
        Step::Delete(from) | Step::Move { from, .. } => Some(from),
        Step::SetFlags { from, to } => Some(from).filter(|_| !to.flags.contains(SlotFlags::LOG_DIRTY)),
        Step::Create(_) => None,
    });
    losing.filter(|slot| slot.flags.contains(SlotFlags::LOG_DIRTY)).copied().collect()
}
