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

use super::draft::{Draft, Old};
use super::error::PlanError;
use super::ids;
use super::order;
use super::pieces::Piece;
use super::region::Region;
use super::tile::{Aim, Fit, Run, Tile};

/// What a plan avoids first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prefer {
    /// Slots: memory that continues becomes part of one slot, though the slots beside it must be replaced for that.
    FewSlots,
    /// Replacing slots that can stay: memory that is added beside one gets a slot of its own.
    #[default]
    NoInterruption,
}

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

/// What becomes of an old slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Stays,
    Flags,
    Moves,
    Goes,
}

/// A slot of the layout to be, and the old one that it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Final {
    pub(super) region: Region,
    pub(super) old: Option<usize>,
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
    let old_slot = |old: &Old| old.region.slot(old.id);

    let changing = fates.iter().filter(|fate| **fate != Fate::Stays).count();
    let mut steps: Vec<Step> = Vec::with_capacity(changing.saturating_add(finals.len()));
    let going = draft.old.iter().zip(&fates).filter(|(_, fate)| **fate == Fate::Goes);
    steps.extend(going.map(|(old, _)| Step::Delete(old_slot(old))));
    let renewed = |of: &Final| {
        let old = draft.old.get(of.old?)?;
        Some((old_slot(old), of.region.slot(old.id)))
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

pub(super) fn fate(fates: &[Fate], old: Option<usize>) -> Option<Fate> {
    fates.get(old?).copied()
}

/// The slots to be, and what becomes of those that are.
pub(super) struct Assignment {
    pub(super) finals: Vec<Final>,
    pub(super) fates: Vec<Fate>,
    /// Positions in `finals` of those that move, in the order in which they must.
    pub(super) moves: Vec<usize>,
}

impl Assignment {
    /// Calls that it takes.
    pub(super) fn calls(&self) -> usize {
        let created = self.finals.iter().filter(|of| of.old.is_none()).count();
        self.fates.iter().filter(|fate| **fate != Fate::Stays).count().saturating_add(created)
    }
}

/// Cuts the memory into slots and finds the old ones among them. Those in `stuck` may not move.
fn assign(pieces: &[Piece], old: &[Old], prefer: Prefer, limit: u64, stuck: &[usize]) -> Assignment {
    let mut fates = vec![Fate::Goes; old.len()];
    let mut finals: Vec<Final> = Vec::with_capacity(pieces.len());
    // Of the new slots, those that may not be cut anywhere.
    let mut uncut: Vec<(usize, Vec<GfnRange>)> = Vec::new();
    let (mut rest, mut wholes, mut next_old) = (pieces, Vec::new(), 0_usize);
    while let Some((first, _)) = rest.split_first() {
        let length = run_length(rest);
        let (run, later) = rest.split_at_checked(length).unwrap_or((rest, &[]));
        rest = later;
        wholes.clear();
        wholes.extend(run.iter().filter(|piece| piece.whole).map(Piece::gfns));
        let last = run.last().unwrap_or(first);
        let region = Region { gfns: first.gfns().hull(&last.gfns()), ..first.region };
        let run = Run { gfns: region.gfns, wholes: &wholes, limit };
        // Old slots ascend as runs do.
        while old.get(next_old).is_some_and(|old| old.region.gfns.start() < run.gfns.start()) {
            next_old = next_old.saturating_add(1);
        }
        let beside = old.get(next_old..).unwrap_or_default();
        let beside = beside.iter().take_while(|old| old.region.gfns.start() < run.gfns.end());
        let fits = beside.enumerate().filter_map(|(at, old)| {
            let fits = run.admits(old.region.gfns) && old.region.agrees(&region);
            let extra = if old.region.flags == region.flags { -1 } else { 0 };
            fits.then_some(Fit { gfns: old.region.gfns, old: next_old.saturating_add(at), extra })
        });
        let mut emit = |tile: Tile| {
            let Some(part) = region.part(tile.gfns) else { return };
            if let Some((old, fate)) = tile.old.and_then(|at| Some((old.get(at)?, fates.get_mut(at)?))) {
                *fate = if old.region.flags == part.flags { Fate::Stays } else { Fate::Flags };
            } else if !wholes.is_empty() {
                uncut.push((finals.len(), wholes.clone()));
            }
            finals.push(Final { region: part, old: tile.old });
        };
        match prefer {
            // One slot: that which is there already, if it is the same.
            Prefer::FewSlots if region.gfns.pages() <= limit => {
                let same = fits.into_iter().find(|fit| fit.gfns == region.gfns).map(|fit| fit.old);
                emit(Tile { gfns: region.gfns, old: same });
            }
            Prefer::FewSlots => {
                let fits: Vec<_> = fits.collect();
                run.cover(region.gfns, &fits, Aim::Slots).into_iter().for_each(emit);
            }
            Prefer::NoInterruption => kept_and_gaps(region.gfns, fits, &mut emit),
        }
    }
    let movers = Movers::new(old, &fates, stuck);
    let mut taken = vec![false; old.len()];
    let long = |of: &Final| of.old.is_none() && of.region.gfns.pages() > limit;
    if prefer == Prefer::NoInterruption && (movers.any_for(&finals) || finals.iter().any(long)) {
        finals = fill_gaps(&finals, &uncut, &movers, old, limit, &mut taken);
    }
    // What is to be created exactly as a slot that would go, but elsewhere, is that slot.
    let mut cursor = 0;
    for of in finals.iter_mut().filter(|of| of.old.is_none()) {
        let same = movers.at(of.region.hva, &mut cursor).find(|&at| {
            let same = |old: &Old| old.region.gfns.pages() == of.region.gfns.pages();
            taken.get(at) == Some(&false)
                && old.get(at).is_some_and(|old| same(old) && movable(&old.region, &of.region))
        });
        if let Some((at, taken)) = same.and_then(|at| Some((at, taken.get_mut(at)?))) {
            *taken = true;
            of.old = Some(at);
        }
    }
    for (fate, taken) in fates.iter_mut().zip(&taken) {
        if *taken {
            *fate = Fate::Moves;
        }
    }
    let moves = finals.iter().enumerate().filter(|(_, of)| fate(&fates, of.old) == Some(Fate::Moves));
    let moves = moves.map(|(at, _)| at).collect();
    Assignment { finals, fates, moves }
}

/// Cuts what is to be created: where slots that would go fit exactly, they move there.
fn fill_gaps(
    finals: &[Final],
    uncut: &[(usize, Vec<GfnRange>)],
    movers: &Movers,
    old: &[Old],
    limit: u64,
    taken: &mut [bool],
) -> Vec<Final> {
    let mut filled = Vec::with_capacity(finals.len());
    for (index, of) in finals.iter().enumerate() {
        if of.old.is_some() {
            filled.push(*of);
            continue;
        }
        let whole = uncut.binary_search_by_key(&index, |(index, _)| *index).ok().and_then(|at| uncut.get(at));
        let run = Run { gfns: of.region.gfns, wholes: whole.map_or(&[], |(_, wholes)| wholes), limit };
        let fits = movers.fits(&of.region, &run, old, taken);
        for tile in run.cover(of.region.gfns, &fits, Aim::Calls) {
            let Some(part) = of.region.part(tile.gfns) else { continue };
            if let Some(taken) = tile.old.and_then(|at| taken.get_mut(at)) {
                *taken = true;
            }
            filled.push(Final { region: part, old: tile.old });
        }
    }
    filled
}

/// How many pieces could be one slot.
fn run_length(pieces: &[Piece]) -> usize {
    let continued = pieces.iter().zip(pieces.iter().skip(1));
    let joints = continued.take_while(|(low, high)| !high.cut && low.region.continues(&high.region)).count();
    joints.saturating_add(1)
}

/// Everything that fits stays; the rest is gaps.
fn kept_and_gaps(gfns: GfnRange, fits: impl Iterator<Item = Fit>, emit: &mut impl FnMut(Tile)) {
    let mut next = gfns.start();
    let gap = |low, high| GfnRange::new(low, high).ok().filter(|gap| !gap.is_empty());
    for fit in fits {
        if let Some(gfns) = gap(next, fit.gfns.start()) {
            emit(Tile { gfns, old: None });
        }
        emit(Tile { gfns: fit.gfns, old: Some(fit.old) });
        next = fit.gfns.end();
    }
    if let Some(gfns) = gap(next, gfns.end()) {
        emit(Tile { gfns, old: None });
    }
}

/// Whether KVM lets a slot of `old` be moved to where `new` begins.
fn movable(old: &Region, new: &Region) -> bool {
    let fixed = |flags: SlotFlags| flags.difference(SlotFlags::LOG_DIRTY);
    !old.flags.contains(SlotFlags::GUEST_MEMFD)
        && (fixed(old.flags), old.mapping, old.binding) == (fixed(new.flags), new.mapping, new.binding)
}

/// Old slots that would go and could move instead, by address of their memory.
struct Movers(Vec<(u64, usize)>);

impl Movers {
    fn new(old: &[Old], fates: &[Fate], stuck: &[usize]) -> Self {
        let going = old.iter().zip(fates).enumerate().filter(|(at, (old, fate))| {
            **fate == Fate::Goes && !old.region.flags.contains(SlotFlags::GUEST_MEMFD) && !stuck.contains(at)
        });
        let mut movers: Vec<_> = going.map(|(at, (old, _))| (old.region.hva, at)).collect();
        movers.sort_unstable();
        Self(movers)
    }

    /// Those whose memory begins at `hva`. `cursor` is where the last search ended: most go on from there.
    fn at(&self, hva: u64, cursor: &mut usize) -> impl Iterator<Item = usize> {
        let below = |at: usize| self.0.get(at).is_some_and(|(other, _)| *other < hva);
        if cursor.checked_sub(1).is_some_and(|before| !below(before)) {
            *cursor = self.0.partition_point(|(other, _)| *other < hva);
        }
        while below(*cursor) {
            *cursor = cursor.saturating_add(1);
        }
        self.0.iter().skip(*cursor).take_while(move |(other, _)| *other == hva).map(|(_, at)| *at)
    }

    /// Whether the memory of any of them begins in that of a new slot.
    fn any_for(&self, finals: &[Final]) -> bool {
        let mut cursor = 0;
        !self.0.is_empty()
            && finals.iter().filter(|of| of.old.is_none()).any(|of| {
                let _exactly = self.at(of.region.hva, &mut cursor).next();
                let end = of.region.hva.saturating_add(of.region.gfns.bytes());
                self.0.get(cursor).is_some_and(|(hva, _)| *hva < end)
            })
    }

    /// Those whose memory is part of `region`, at their places in it.
    fn fits(&self, region: &Region, run: &Run<'_>, old: &[Old], taken: &[bool]) -> Vec<Fit> {
        let end = region.hva.saturating_add(region.gfns.bytes());
        let first = self.0.partition_point(|(hva, _)| *hva < region.hva);
        let mut fits = Vec::new();
        for (hva, at) in self.0.iter().skip(first).take_while(|(hva, _)| *hva < end) {
            let Some(mover) = old.get(*at).filter(|_| taken.get(*at) == Some(&false)) else { continue };
            let skip = hva.saturating_sub(region.hva) >> crate::addr::PAGE_SHIFT;
            let start = region.gfns.start().checked_add(skip);
            let Some(gfns) = start.and_then(|start| GfnRange::with_len(start, mover.region.gfns.pages()).ok()) else {
                continue;
            };
            if run.admits(gfns) && movable(&mover.region, region) {
                fits.push(Fit { gfns, old: *at, extra: 0 });
            }
        }
        fits
    }
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
