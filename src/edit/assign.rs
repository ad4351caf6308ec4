//! Into which slots the memory to be is cut, and which of the slots that are there they are. Pure.
//!
//! Memory falls into runs that could be one slot each. What fits stays; of the rest, what would go and fits elsewhere moves
//! there; what is missing is created.

use crate::addr::GfnRange;

use super::draft::Slots;
use super::movers::{self, Movers, Renewed, Uncut};
use super::pieces::{Piece, Was};
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

/// What becomes of an old slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Stays,
    Flags,
    Moves,
    Goes,
}

/// What becomes of the slots that are, and the slots that are to come.
pub(super) struct Assignment {
    /// Of the old slots, those that go, ascending.
    pub(super) gone: Vec<usize>,
    /// Of the old slots, those that change flags where they are.
    pub(super) relogged: Vec<Renewed>,
    /// Of the old slots, those that move, in the order in which they must.
    pub(super) moved: Vec<Renewed>,
    /// New ones, ascending.
    pub(super) created: Vec<Region>,
    /// No new one is known to have a frame that an old one has: all came where nothing was.
    pub(super) apart: bool,
}

impl Assignment {
    /// Calls that it takes.
    pub(super) fn calls(&self) -> usize {
        let lists = [self.gone.len(), self.relogged.len(), self.moved.len(), self.created.len()];
        lists.into_iter().fold(0, usize::saturating_add)
    }
}

/// Cuts the memory into slots and finds the old ones among them. Those in `stuck`, ascending, may not move.
pub(super) fn assign(pieces: &[Piece], old: &Slots, prefer: Prefer, limit: u64, stuck: &[usize]) -> Assignment {
    let slots = old.all();
    let mut fates = vec![Fate::Goes; slots.len()];
    let (mut created, mut relogged) = (Vec::with_capacity(pieces.len()), Vec::new());
    // Of the new slots, those that may not be cut anywhere.
    let mut uncut: Vec<Uncut> = Vec::new();
    let (mut rest, mut wholes, mut next_old, mut apart) = (pieces, Vec::new(), 0_usize, true);
    while let Some((first, later)) = rest.split_first() {
        if let Was::Slot(at) = first.was
            && (prefer == Prefer::NoInterruption || later.first().is_none_or(|next| !first.joins(next)))
        {
            fates.get_mut(usize::from(at)).into_iter().for_each(|of| *of = Fate::Stays);
            rest = later;
            continue;
        }
        let length = run_length(rest, prefer);
        let (run, later) = rest.split_at_checked(length).unwrap_or((rest, &[]));
        rest = later;
        let last = run.last().unwrap_or(first);
        let region = Region { gfns: first.gfns().hull(&last.gfns()), ..first.region };
        if prefer == Prefer::NoInterruption && run.iter().all(|piece| piece.was == Was::Nothing) {
            created.push(region);
            continue;
        }
        apart = false;
        wholes.clear();
        wholes.extend(run.iter().filter(|piece| piece.whole).map(Piece::gfns));
        let run = Run { gfns: region.gfns, wholes: &wholes, limit };
        // Old slots ascend as runs do.
        while slots.get(next_old).is_some_and(|slot| slot.gfns.start() < run.gfns.start()) {
            next_old = next_old.saturating_add(1);
        }
        let beside = slots.iter().enumerate().skip(next_old);
        let beside = beside.take_while(|(_, slot)| slot.gfns.start() < run.gfns.end());
        let fits = beside.filter_map(|(at, slot)| {
            let fits = run.admits(slot.gfns) && old.region(at)?.agrees(&region);
            let extra = if slot.flags == region.flags { -1 } else { 0 };
            fits.then_some(Fit { gfns: slot.gfns, old: at, extra })
        });
        let mut emit = |tile: Tile| {
            let Some((at, slot)) = tile.old.and_then(|at| Some((at, slots.get(at)?))) else {
                if !wholes.is_empty() {
                    uncut.push((created.len(), wholes.clone()));
                }
                created.extend(region.part(tile.gfns));
                return;
            };
            let fate = if slot.flags == region.flags { Fate::Stays } else { Fate::Flags };
            if fate == Fate::Flags {
                relogged.extend(region.part(tile.gfns).map(|region| Renewed { old: at, region }));
            }
            fates.get_mut(at).into_iter().for_each(|of| *of = fate);
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
    let mut gone = those_who_go(&fates);
    let mut moved = Vec::new();
    let long = prefer == Prefer::NoInterruption && created.iter().any(|region| region.gfns.pages() > limit);
    if long || !movers::in_place(old, &gone, &created) {
        let movers = Movers::new(old, &gone, stuck);
        let near = movers.any_for(&created);
        if long || (near && prefer == Prefer::NoInterruption) {
            created = movers::fill_gaps(&created, &uncut, &movers, old, limit, &mut moved);
        }
        if near {
            movers.rename(&mut created, old, &mut moved);
        }
        for Renewed { old, .. } in &moved {
            fates.get_mut(*old).into_iter().for_each(|fate| *fate = Fate::Moves);
        }
        gone.retain(|at| fates.get(*at) == Some(&Fate::Goes));
    }
    Assignment { gone, relogged, moved, created, apart }
}

/// Positions of the slots that go. Without a branch for each: nothing foretells which go.
fn those_who_go(fates: &[Fate]) -> Vec<usize> {
    let (mut list, mut found) = (vec![0_usize; fates.len()], 0_usize);
    for (at, fate) in fates.iter().enumerate() {
        list.get_mut(found).into_iter().for_each(|place| *place = at);
        found = found.saturating_add(usize::from(*fate == Fate::Goes));
    }
    list.truncate(found);
    list
}

/// How many pieces could be one slot, or several if they are long. A slot that has not been touched is not among them if it
/// stays whatever becomes of the memory beside it.
fn run_length(pieces: &[Piece], prefer: Prefer) -> usize {
    let continued = pieces.iter().zip(pieces.iter().skip(1));
    let stays = |piece: &Piece| prefer == Prefer::NoInterruption && matches!(piece.was, Was::Slot(_));
    continued.take_while(|(low, high)| !stays(high) && low.joins(high)).count().saturating_add(1)
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
