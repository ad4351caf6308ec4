//! Into which slots the memory to be is cut, and which of the slots that are there they are. Pure.
//!
//! Memory falls into runs that could be one slot each. What fits stays; of the rest, what would go and fits elsewhere moves
//! there; what is missing is created.

use crate::addr::GfnRange;
use crate::layout::SlotFlags;

use super::draft::Slots;
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

/// What becomes of an old slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Stays,
    Flags,
    Moves,
    Goes,
}

/// A slot of the layout to be that takes a call, and the old one that it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Final {
    pub(super) region: Region,
    pub(super) old: Option<usize>,
}

pub(super) fn fate(fates: &[Fate], old: Option<usize>) -> Option<Fate> {
    fates.get(old?).copied()
}

/// The slots to be that take a call, ascending, and what becomes of those that are.
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
pub(super) fn assign(pieces: &[Piece], old: &Slots, prefer: Prefer, limit: u64, stuck: &[usize]) -> Assignment {
    let slots = old.all();
    let mut fates = vec![Fate::Goes; slots.len()];
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
            if let Some((slot, fate)) = tile.old.and_then(|at| Some((slots.get(at)?, fates.get_mut(at)?))) {
                *fate = if slot.flags == region.flags { Fate::Stays } else { Fate::Flags };
                if *fate == Fate::Stays {
                    return;
                }
            } else if !wholes.is_empty() {
                uncut.push((finals.len(), wholes.clone()));
            }
            finals.extend(region.part(tile.gfns).map(|region| Final { region, old: tile.old }));
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
    let mut taken = vec![false; slots.len()];
    let long = |of: &Final| of.old.is_none() && of.region.gfns.pages() > limit;
    if prefer == Prefer::NoInterruption && (movers.any_for(&finals) || finals.iter().any(long)) {
        finals = fill_gaps(&finals, &uncut, &movers, old, limit, &mut taken);
    }
    // What is to be created exactly as a slot that would go, but elsewhere, is that slot.
    let mut cursor = 0;
    for of in finals.iter_mut().filter(|of| of.old.is_none()) {
        let same = movers.at(of.region.hva, &mut cursor).find(|&at| {
            let same = |old: &Region| old.gfns.pages() == of.region.gfns.pages() && movable(old, &of.region);
            taken.get(at) == Some(&false) && old.region(at).is_some_and(|old| same(&old))
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
    old: &Slots,
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
    fn new(old: &Slots, fates: &[Fate], stuck: &[usize]) -> Self {
        let going = old.all().iter().zip(fates).enumerate().filter(|(at, (slot, fate))| {
            **fate == Fate::Goes && !slot.flags.contains(SlotFlags::GUEST_MEMFD) && !stuck.contains(at)
        });
        let mut movers: Vec<_> = going.map(|(at, (slot, _))| (slot.hva, at)).collect();
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
    fn fits(&self, region: &Region, run: &Run<'_>, old: &Slots, taken: &[bool]) -> Vec<Fit> {
        let end = region.hva.saturating_add(region.gfns.bytes());
        let first = self.0.partition_point(|(hva, _)| *hva < region.hva);
        let mut fits = Vec::new();
        for (hva, at) in self.0.iter().skip(first).take_while(|(hva, _)| *hva < end) {
            let Some(mover) = old.region(*at).filter(|_| taken.get(*at) == Some(&false)) else { continue };
            let skip = hva.saturating_sub(region.hva) >> crate::addr::PAGE_SHIFT;
            let start = region.gfns.start().checked_add(skip);
            let Some(gfns) = start.and_then(|start| GfnRange::with_len(start, mover.gfns.pages()).ok()) else {
                continue;
            };
            if run.admits(gfns) && movable(&mover, region) {
                fits.push(Fit { gfns, old: *at, extra: 0 });
            }
        }
        fits
    }
}
