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

/// An old slot, and what it will be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Renewed {
    pub(super) old: usize,
    pub(super) region: Region,
}

/// What becomes of the slots that are, and the slots that are to come.
pub(super) struct Assignment {
    pub(super) fates: Vec<Fate>,
    /// Of the old slots, those that change flags where they are.
    pub(super) relogged: Vec<Renewed>,
    /// Of the old slots, those that move, in the order in which they must.
    pub(super) moved: Vec<Renewed>,
    /// New ones, ascending.
    pub(super) created: Vec<Region>,
}

impl Assignment {
    /// Calls that it takes.
    pub(super) fn calls(&self) -> usize {
        self.fates.iter().filter(|fate| **fate != Fate::Stays).count().saturating_add(self.created.len())
    }
}

/// Cuts the memory into slots and finds the old ones among them. Those in `stuck` may not move.
pub(super) fn assign(pieces: &[Piece], old: &Slots, prefer: Prefer, limit: u64, stuck: &[usize]) -> Assignment {
    let slots = old.all();
    let mut fates = vec![Fate::Goes; slots.len()];
    let (mut created, mut relogged) = (Vec::with_capacity(pieces.len()), Vec::new());
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
    let movers = Movers::new(old, &fates, stuck);
    let near = movers.any_for(&created);
    let mut moved = Vec::new();
    let long = |region: &Region| region.gfns.pages() > limit;
    if prefer == Prefer::NoInterruption && (near || created.iter().any(long)) {
        created = fill_gaps(&created, &uncut, &movers, old, limit, &mut moved);
    }
    if near {
        movers.rename(&mut created, old, &mut moved);
    }
    for Renewed { old, .. } in &moved {
        fates.get_mut(*old).into_iter().for_each(|fate| *fate = Fate::Moves);
    }
    Assignment { fates, relogged, moved, created }
}

/// Cuts what is to be created: where slots that would go fit exactly, they move there.
fn fill_gaps(
    created: &[Region],
    uncut: &[(usize, Vec<GfnRange>)],
    movers: &Movers,
    old: &Slots,
    limit: u64,
    moved: &mut Vec<Renewed>,
) -> Vec<Region> {
    let mut left = Vec::with_capacity(created.len());
    let mut taken = vec![false; old.all().len()];
    for (index, region) in created.iter().enumerate() {
        let whole = uncut.binary_search_by_key(&index, |(index, _)| *index).ok().and_then(|at| uncut.get(at));
        let run = Run { gfns: region.gfns, wholes: whole.map_or(&[], |(_, wholes)| wholes), limit };
        let fits = movers.fits(region, &run, old, &taken);
        for tile in run.cover(region.gfns, &fits, Aim::Calls) {
            let Some(region) = region.part(tile.gfns) else { continue };
            if let Some((at, taken)) = tile.old.and_then(|at| Some((at, taken.get_mut(at)?))) {
                *taken = true;
                moved.push(Renewed { old: at, region });
            } else {
                left.push(region);
            }
        }
    }
    left
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

    /// What is to be created exactly as a slot that would go, but elsewhere, is that slot.
    fn rename(&self, created: &mut Vec<Region>, old: &Slots, moved: &mut Vec<Renewed>) {
        let mut cursor = 0;
        let mut taken = vec![false; old.all().len()];
        for Renewed { old, .. } in &*moved {
            taken.get_mut(*old).into_iter().for_each(|taken| *taken = true);
        }
        created.retain(|region| {
            let same = |old: &Region| old.gfns.pages() == region.gfns.pages() && movable(old, region);
            let mut those = self.at(region.hva, &mut cursor);
            let free = those.find(|at| taken.get(*at) == Some(&false) && old.region(*at).is_some_and(|old| same(&old)));
            if let Some(at) = free {
                taken.get_mut(at).into_iter().for_each(|taken| *taken = true);
                moved.push(Renewed { old: at, region: *region });
            }
            free.is_none()
        });
    }

    /// Whether the memory of any of them begins in that of a new slot.
    fn any_for(&self, created: &[Region]) -> bool {
        let mut cursor = 0;
        !self.0.is_empty()
            && created.iter().any(|region| {
                let _exactly = self.at(region.hva, &mut cursor).next();
                let end = region.hva.saturating_add(region.gfns.bytes());
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
