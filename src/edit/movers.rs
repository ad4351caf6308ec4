//! Slots that would go, and move instead: what is missing is already there, at other frames. Pure.

use crate::addr::GfnRange;
use crate::layout::SlotFlags;

use super::draft::Slots;
use super::region::Region;
use super::tile::{Aim, Fit, Run};

/// An old slot, and what it will be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Renewed {
    pub(super) old: usize,
    pub(super) region: Region,
}

/// New slots that may not be cut anywhere: which one, and the parts that must stay in one.
pub(super) type Uncut = (usize, Vec<GfnRange>);

/// Whether the memory of all that goes and comes lies equally far from its frames: then nothing can have moved.
pub(super) fn in_place(old: &Slots, gone: &[usize], created: &[Region]) -> bool {
    let distance = |gfns: GfnRange, hva: u64| hva.wrapping_sub(gfns.start_byte());
    let Some(first) = created.first().map(|new| distance(new.gfns, new.hva)) else { return true };
    let slots = old.all();
    let gone = gone.iter().filter_map(|at| slots.get(*at)).map(|slot| distance(slot.gfns, slot.hva));
    let mut all = gone.chain(created.iter().map(|new| distance(new.gfns, new.hva)));
    all.all(|distance| distance == first)
}

/// Cuts what is to be created: where slots that would go fit exactly, they move there.
pub(super) fn fill_gaps(
    created: &[Region],
    uncut: &[Uncut],
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

/// Whether KVM lets a slot of `old` be moved to where `new` begins.
fn movable(old: &Region, new: &Region) -> bool {
    let fixed = |flags: SlotFlags| flags.difference(SlotFlags::LOG_DIRTY);
    !old.flags.contains(SlotFlags::GUEST_MEMFD)
        && (fixed(old.flags), old.mapping, old.binding) == (fixed(new.flags), new.mapping, new.binding)
}

/// Old slots that would go and could move instead, by address of their memory.
pub(super) struct Movers(Vec<(u64, usize)>);

impl Movers {
    pub(super) fn new(old: &Slots, gone: &[usize], stuck: &[usize]) -> Self {
        let free =
            gone.iter().filter(|at| stuck.binary_search(at).is_err()).filter_map(|at| Some((old.get(*at)?, *at)));
        let free = free.filter(|(slot, _)| !slot.flags.contains(SlotFlags::GUEST_MEMFD));
        let mut movers: Vec<_> = free.map(|(slot, at)| (slot.hva, at)).collect();
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
    pub(super) fn rename(&self, created: &mut Vec<Region>, old: &Slots, moved: &mut Vec<Renewed>) {
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
    pub(super) fn any_for(&self, created: &[Region]) -> bool {
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
