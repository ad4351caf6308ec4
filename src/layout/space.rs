//! The slots of one address space, in the order of their frames, and the search in them.
//!
//! A direct index with one entry per GiB narrows a search to the slots of that GiB, so the common lookup is two loads: the
//! index entry and the slot. The index ends at [`INDEXED`]; above it a plain binary search answers, so that no address,
//! however high, makes the table grow.

use std::iter::FusedIterator;
use std::slice;

use super::bindings::pairs;
use super::{FileId, Memslot};
use crate::addr::{FilePage, Gfn, GfnRange, PAGES_PER_1G};

/// log2 of the pages per index entry: 1 GiB.
const INDEX_SHIFT: u32 = PAGES_PER_1G.trailing_zeros();
/// Frames below this are indexed: 16 TiB, which takes 64 KiB of index.
const INDEXED: Gfn = match Gfn::new(PAGES_PER_1G << 14) {
    Some(gfn) => gfn,
    None => Gfn::MAX,
};

/// What is behind a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location<'a> {
    /// The slot that covers the frame.
    pub slot: &'a Memslot,
    /// Host virtual address of the frame's shared memory, in bytes.
    pub hva: u64,
    /// The file and the page of it that hold the frame's private memory.
    pub file: Option<(FileId, FilePage)>,
}

/// A piece of a range of frames: the part of one slot, or a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// The frames. Never empty.
    pub gfns: GfnRange,
    /// The slot that covers them, or `None` for a hole.
    pub slot: Option<&'a Memslot>,
}

/// The slots of one address space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddressSpace {
    /// Ascending by frame, disjoint, none empty.
    slots: Vec<Memslot>,
    /// Entry `g`: position of the lowest slot that ends above GiB `g`'s first frame. One entry more than there are GiB, so
    /// that the lowest slot that ends above GiB `g` is entry `g + 1`.
    index: Vec<u32>,
}

impl AddressSpace {
    /// No slots.
    pub(super) const EMPTY: &'static Self = &Self { slots: Vec::new(), index: Vec::new() };

    /// `slots` ascend and are disjoint.
    pub(super) fn new(slots: Vec<Memslot>) -> Self {
        debug_assert!(pairs(&slots).all(|(low, high)| low.gfns.end() <= high.gfns.start()), "slots overlap or descend");
        let mut space = Self { slots, index: Vec::new() };
        space.reindex();
        space
    }

    /// Adds a slot that overlaps no other.
    pub(super) fn insert(&mut self, slot: Memslot) {
        let at = self.first_ending_after(slot.gfns.start());
        self.slots.insert(at, slot);
        self.reindex();
    }

    /// Removes the slot that covers `gfn`.
    pub(super) fn remove(&mut self, gfn: Gfn) -> Option<Memslot> {
        let at = self.first_ending_after(gfn);
        self.slots.get(at).filter(|slot| slot.gfns.contains(gfn))?;
        let slot = self.slots.remove(at);
        self.reindex();
        Some(slot)
    }

    /// Changes slots in place. `change` leaves frames as they are.
    pub(super) fn for_each_mut(&mut self, change: impl FnMut(&mut Memslot)) {
        self.slots.iter_mut().for_each(change);
    }

    fn reindex(&mut self) {
        let end = self.span().end().min(INDEXED);
        self.index.clear();
        let mut position = 0_usize;
        let mut first = Some(Gfn::ZERO);
        while let Some(gib) = first {
            while self.slots.get(position).is_some_and(|slot| slot.gfns.end() <= gib) {
                position = position.saturating_add(1);
            }
            // 2^32 slots have all ids of all address spaces taken, and more.
            self.index.push(u32::try_from(position).unwrap_or(u32::MAX));
            first = if gib < end { gib.checked_add(PAGES_PER_1G) } else { None };
        }
    }

    /// The slots, ascending by frame.
    pub fn slots(&self) -> &[Memslot] {
        &self.slots
    }

    /// The smallest range that covers every slot; empty if there are none.
    pub fn span(&self) -> GfnRange {
        let first = self.slots.first().map_or(GfnRange::empty_at(Gfn::ZERO), |slot| slot.gfns);
        self.slots.last().map_or(first, |slot| first.hull(&slot.gfns))
    }

    /// The slot that covers `gfn`.
    #[inline]
    pub fn lookup(&self, gfn: Gfn) -> Option<&Memslot> {
        let slot = match self.candidates(gfn) {
            [slot] => slot,
            several => several.get(several.partition_point(|slot| slot.gfns.end() <= gfn))?,
        };
        slot.gfns.contains(gfn).then_some(slot)
    }

    /// The slots among which `gfn`'s is, if it has one.
    #[inline]
    fn candidates(&self, gfn: Gfn) -> &[Memslot] {
        let Ok(gib) = usize::try_from(gfn.get() >> INDEX_SHIFT) else { return &self.slots };
        match self.index.get(gib..).unwrap_or_default() {
            // The slot that reaches out of this GiB starts in it, or below: it belongs to both.
            [low, high, ..] => {
                let (Ok(low), Ok(high)) = (usize::try_from(*low), usize::try_from(*high)) else { return &self.slots };
                let end = high.saturating_add(1).min(self.slots.len());
                self.slots.get(low..end).unwrap_or_default()
            }
            _ => &self.slots,
        }
    }

    /// What is behind `gfn`: slot, host address and file page.
    #[inline]
    pub fn locate(&self, gfn: Gfn) -> Option<Location<'_>> {
        let slot = self.lookup(gfn)?;
        let hva = slot.hva_of(gfn)?;
        let file = slot.binding.and_then(|binding| Some((binding.file, slot.file_page_of(gfn)?)));
        Some(Location { slot, hva, file })
    }

    /// The pieces of `range`: it is covered completely, ascending, with a hole as a piece without a slot. Takes
    /// O(log slots + pieces), however many pages the range has.
    pub fn segments(&self, range: GfnRange) -> Segments<'_> {
        let first = self.first_ending_after(range.start());
        Segments { slots: self.slots.get(first..).unwrap_or_default().iter(), rest: range }
    }

    /// The lowest slot that shares a frame with `range`.
    pub fn first_overlap(&self, range: GfnRange) -> Option<&Memslot> {
        self.slots.get(self.first_ending_after(range.start())).filter(|slot| slot.gfns.overlaps(&range))
    }

    fn first_ending_after(&self, gfn: Gfn) -> usize {
        self.slots.partition_point(|slot| slot.gfns.end() <= gfn)
    }
}

/// Iterator of [`AddressSpace::segments`].
#[derive(Debug, Clone)]
pub struct Segments<'a> {
    /// The slots that end above `rest`'s start.
    slots: slice::Iter<'a, Memslot>,
    rest: GfnRange,
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;
    fn next(&mut self) -> Option<Segment<'a>> {
        if self.rest.is_empty() {
            return None;
        }
        let next = self.slots.as_slice().first();
        let (slot, end) = match next {
            Some(slot) if slot.gfns.start() <= self.rest.start() => {
                self.slots.next();
                (Some(slot), slot.gfns.end())
            }
            Some(slot) => (None, slot.gfns.start()),
            None => (None, self.rest.end()),
        };
        let (gfns, rest) = self.rest.split_at(end.min(self.rest.end()))?;
        self.rest = rest;
        Some(Segment { gfns, slot })
    }
}

impl FusedIterator for Segments<'_> {}
