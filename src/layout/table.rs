//! A snapshot of every slot of a VM: what to ask where a frame is.
//!
//! Values only, cheap to search and dear to change: [`Layout`](super::Layout) changes it, readers hold a snapshot. Nothing
//! here waits or allocates during a lookup. Mirrors `struct kvm_memslots`.

use std::collections::BTreeMap;
use std::fmt;

use super::space::{AddressSpace, Location, Segments};
use super::{FileId, Memslot, SlotId};
use crate::addr::{Gfn, GfnRange};

/// All slots of a VM. The plain lookups are about address space 0; [`space`](Self::space) gives the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotTable {
    main: AddressSpace,
    /// The address spaces above 0 that have slots.
    others: BTreeMap<u16, AddressSpace>,
    /// First frame of every slot, ascending by id.
    by_id: Vec<(SlotId, Gfn)>,
}

impl SlotTable {
    /// `slots` are valid together: ids differ, none is empty, and within an address space none overlap.
    pub(super) fn new(mut slots: Vec<Memslot>) -> Self {
        slots.sort_by_key(|slot| (slot.id.as_id, slot.gfns.start()));
        let mut by_id: Vec<_> = slots.iter().map(|slot| (slot.id, slot.gfns.start())).collect();
        by_id.sort_unstable();
        let mut table = Self { by_id, ..Self::default() };
        for group in slots.chunk_by(|a, b| a.id.as_id == b.id.as_id) {
            let space = AddressSpace::new(group.to_vec());
            match group.first().map_or(0, |slot| slot.id.as_id) {
                0 => table.main = space,
                as_id => {
                    table.others.insert(as_id, space);
                }
            }
        }
        table
    }

    /// Adds a slot whose id is free and that overlaps no other.
    pub(super) fn insert(&mut self, slot: Memslot) {
        let at = self.by_id.partition_point(|(id, _)| *id < slot.id);
        self.by_id.insert(at, (slot.id, slot.gfns.start()));
        match slot.id.as_id {
            0 => self.main.insert(slot),
            as_id => self.others.entry(as_id).or_default().insert(slot),
        }
    }

    /// Removes a slot.
    pub(super) fn remove(&mut self, id: SlotId) -> Option<Memslot> {
        let at = self.by_id.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        let (_, start) = self.by_id.remove(at);
        if id.as_id == 0 {
            return self.main.remove(start);
        }
        let space = self.others.get_mut(&id.as_id)?;
        let slot = space.remove(start);
        if space.slots().is_empty() {
            self.others.remove(&id.as_id);
        }
        slot
    }

    /// Takes the binding from every slot bound to `file`.
    pub(super) fn forget_file(&mut self, file: FileId) {
        for space in std::iter::once(&mut self.main).chain(self.others.values_mut()) {
            space.for_each_mut(|slot| slot.binding = slot.binding.filter(|binding| binding.file != file));
        }
    }

    /// The slots of address space `as_id`; one that has none is empty.
    pub fn space(&self, as_id: u16) -> &AddressSpace {
        match as_id {
            0 => &self.main,
            _ => self.others.get(&as_id).unwrap_or(AddressSpace::EMPTY),
        }
    }

    /// The slot that covers `gfn` in address space 0. Two or three loads below 16 TiB, a binary search above.
    #[inline]
    pub fn lookup(&self, gfn: Gfn) -> Option<&Memslot> {
        self.main.lookup(gfn)
    }

    /// What is behind `gfn` in address space 0.
    #[inline]
    pub fn locate(&self, gfn: Gfn) -> Option<Location<'_>> {
        self.main.locate(gfn)
    }

    /// The pieces of `range` in address space 0, holes included: see [`AddressSpace::segments`].
    pub fn segments(&self, range: GfnRange) -> Segments<'_> {
        self.main.segments(range)
    }

    /// The smallest range that covers every slot of address space 0; empty if there are none.
    pub fn span(&self) -> GfnRange {
        self.main.span()
    }

    /// Every slot, by address space, then by frame.
    pub fn slots(&self) -> impl Iterator<Item = &Memslot> {
        std::iter::once(&self.main).chain(self.others.values()).flat_map(|space| space.slots())
    }

    /// The slot with this id.
    pub fn get(&self, id: SlotId) -> Option<&Memslot> {
        let at = self.by_id.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        let (_, start) = self.by_id.get(at)?;
        self.space(id.as_id).lookup(*start)
    }

    /// Number of slots, over all address spaces.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there is no slot.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }
}

/// One line per slot, in the order of [`SlotTable::slots`].
impl fmt::Display for SlotTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.slots().try_for_each(|slot| writeln!(f, "{slot}"))
    }
}
