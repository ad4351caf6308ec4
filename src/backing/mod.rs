//! The memory behind the slots: shared mappings, guest_memfd files, and which of them a guest frame falls on.
//!
//! [`Layout`] says where memory is; a [`Space`] adds the owned things themselves, so that a range of guest frames can be
//! turned into the file pages to punch and the mapped bytes to free. A `Space` is an immutable snapshot: whoever changes
//! the layout publishes a new one. It performs no call and takes no decision.

mod shared;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::addr::{FileRange, Gfn, GfnRange, PAGE_SHIFT};
use crate::gmem::{FileId, GmemFlags, GuestMemfd};
use crate::layout::{Layout, LayoutError, Memslot, SlotId};

pub use shared::{SharedBacking, SharedError, SharedMemory};

/// Part of a shared backing: what one slot's `userspace_addr` points into.
#[derive(Debug, Clone)]
pub struct SharedSlice {
    /// The mapping.
    pub backing: Arc<dyn SharedBacking>,
    /// Where the slot starts in it, in bytes.
    pub offset: u64,
}

impl SharedSlice {
    /// Address of the slice in this process.
    pub fn hva(&self) -> u64 {
        self.backing.hva().saturating_add(self.offset)
    }

    /// Whether the mapping goes on for `size` bytes from where the slice starts.
    pub(crate) fn holds(&self, size: u64) -> bool {
        self.offset.checked_add(size).is_some_and(|end| end <= self.backing.size())
    }
}

/// A run of guest frames whose private pages are contiguous in one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrivatePiece {
    /// The frames.
    pub gfns: GfnRange,
    /// The file.
    pub file: FileId,
    /// Their pages in it.
    pub pages: FileRange,
}

/// A run of guest frames whose shared memory is contiguous in one mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPiece {
    /// The frames.
    pub gfns: GfnRange,
    /// The slot of the first of them.
    pub slot: SlotId,
    /// Address of the first of them in this process.
    pub hva: u64,
    /// Offset of the first of them in its backing, in bytes.
    pub offset: u64,
}

/// The layout of a VM's memory together with the memory.
#[derive(Debug, Clone)]
pub struct Space {
    layout: Layout,
    files: BTreeMap<FileId, Arc<GuestMemfd>>,
    shared: BTreeMap<SlotId, SharedSlice>,
}

impl Space {
    /// No memory, within the limits of `layout`.
    pub const fn new(layout: Layout) -> Self {
        Self { layout, files: BTreeMap::new(), shared: BTreeMap::new() }
    }

    /// Where memory is.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Adds slots: all of them, or none. Registers their files on first sight.
    ///
    /// # Errors
    /// What [`Layout::insert_all`] refuses.
    pub fn insert(&mut self, slots: Vec<(Memslot, SharedSlice, Option<Arc<GuestMemfd>>)>) -> Result<(), LayoutError> {
        let mut next = self.clone();
        for file in slots.iter().filter_map(|(_, _, file)| file.as_ref()) {
            if next.files.insert(file.id(), Arc::clone(file)).is_none() {
                next.layout.register_file(file.id(), file.pages().pages())?;
            }
        }
        next.layout.insert_all(slots.iter().map(|(slot, ..)| *slot))?;
        next.shared.extend(slots.into_iter().map(|(slot, shared, _)| (slot.id, shared)));
        *self = next;
        Ok(())
    }

    /// Takes slot `id` away. Its file stays.
    ///
    /// # Errors
    /// [`LayoutError`] if there is no such slot.
    pub fn remove(&mut self, id: SlotId) -> Result<Memslot, LayoutError> {
        let slot = self.layout.remove(id)?;
        self.shared.remove(&id);
        Ok(slot)
    }

    /// The same memory and `files` besides, laid out as `layout` has it; `shared` is the memory of its slots.
    pub(crate) fn relaid(
        &self,
        layout: Layout,
        files: impl IntoIterator<Item = Arc<GuestMemfd>>,
        shared: BTreeMap<SlotId, SharedSlice>,
    ) -> Self {
        let mut all = self.files.clone();
        all.extend(files.into_iter().map(|file| (file.id(), file)));
        Self { layout, files: all, shared }
    }

    /// Lets go of a file. Slots that are still bound to it lose their private side.
    pub fn release_file(&mut self, id: FileId) {
        self.layout.close_file(id);
        self.files.remove(&id);
    }

    /// Whether the pages of `slot` can change state: they have a private side, and the file did not start out shared.
    pub fn is_convertible(&self, slot: &Memslot) -> bool {
        let file = slot.binding.and_then(|binding| self.files.get(&binding.file));
        file.is_some_and(|file| !file.flags().contains(GmemFlags::INIT_SHARED))
    }

    /// The file `id`.
    pub fn file(&self, id: FileId) -> Option<&Arc<GuestMemfd>> {
        self.files.get(&id)
    }

    /// All files.
    pub fn files(&self) -> impl Iterator<Item = &Arc<GuestMemfd>> {
        self.files.values()
    }

    /// The shared memory of slot `id`.
    pub fn shared(&self, id: SlotId) -> Option<&SharedSlice> {
        self.shared.get(&id)
    }

    /// The shared memory of every slot.
    pub fn shared_slices(&self) -> impl Iterator<Item = &SharedSlice> {
        self.shared.values()
    }

    /// The shared backings, each once however many slots use it.
    pub fn shared_backings(&self) -> Vec<&Arc<dyn SharedBacking>> {
        let mut distinct: Vec<&Arc<dyn SharedBacking>> = self.shared.values().map(|slice| &slice.backing).collect();
        let extent = |backing: &&Arc<dyn SharedBacking>| (backing.hva(), backing.size());
        distinct.sort_unstable_by_key(extent);
        distinct.dedup_by_key(|backing| extent(backing));
        distinct
    }

    /// Two slots with shared memory in common, of which one can change state: a conversion there frees what the other one
    /// shows. `None` is how it should be.
    pub fn shared_twice(&self) -> Option<(SlotId, SlotId)> {
        let mut slots: Vec<&Memslot> = self.layout.table().slots().collect();
        slots.sort_unstable_by_key(|slot| slot.hva);
        let end = |slot: &Memslot| slot.hva.saturating_add(slot.gfns.bytes());
        // Of those before: the one that reaches furthest, and the last that can change state, which no such one reaches beyond.
        let (mut any, mut convertible): (Option<&Memslot>, Option<&Memslot>) = (None, None);
        for slot in slots {
            let changes = self.is_convertible(slot);
            let before = if changes { any } else { convertible };
            if let Some(before) = before.filter(|before| end(before) > slot.hva) {
                return Some((before.id, slot.id));
            }
            if any.is_none_or(|any| end(any) < end(slot)) {
                any = Some(slot);
            }
            if changes {
                convertible = Some(slot);
            }
        }
        None
    }

    /// Address of `gfn`'s shared memory in this process, if it is memory at all.
    pub fn hva(&self, gfn: Gfn) -> Option<u64> {
        self.layout.table().lookup(gfn)?.hva_of(gfn)
    }

    /// The private side of `range`, ascending, neighbours in the same file joined even across slots.
    pub fn private_pieces(&self, range: GfnRange) -> Vec<PrivatePiece> {
        let mut pieces: Vec<PrivatePiece> = Vec::new();
        for segment in self.layout.table().segments(range) {
            let Some(slot) = segment.slot else { continue };
            let Some(binding) = slot.binding.filter(|_| self.is_convertible(slot)) else { continue };
            let Some(pages) = segment.gfns.rebase(slot.gfns.start(), binding.start) else { continue };
            match pieces.last_mut() {
                Some(last)
                    if last.file == binding.file
                        && last.gfns.end() == segment.gfns.start()
                        && last.pages.end() == pages.start() =>
                {
                    last.gfns = last.gfns.hull(&segment.gfns);
                    last.pages = last.pages.hull(&pages);
                }
                _ => pieces.push(PrivatePiece { gfns: segment.gfns, file: binding.file, pages }),
            }
        }
        pieces
    }

    /// The shared side of `range`, ascending, neighbours in the same mapping joined even across slots.
    pub fn shared_pieces(&self, range: GfnRange) -> Vec<SharedPiece> {
        let mut pieces: Vec<SharedPiece> = Vec::new();
        for segment in self.layout.table().segments(range) {
            let Some(slot) = segment.slot else { continue };
            let Some(slice) = self.shared.get(&slot.id) else { continue };
            let skip = segment.gfns.start().pages_from(slot.gfns.start()).unwrap_or(0) << PAGE_SHIFT;
            let (hva, offset) = (slot.hva.saturating_add(skip), slice.offset.saturating_add(skip));
            match pieces.last_mut() {
                Some(last)
                    if last.gfns.end() == segment.gfns.start()
                        && last.hva.saturating_add(last.gfns.bytes()) == hva
                        && self.shared.get(&last.slot).is_some_and(|l| Arc::ptr_eq(&l.backing, &slice.backing)) =>
                {
                    last.gfns = last.gfns.hull(&segment.gfns);
                }
                _ => pieces.push(SharedPiece { gfns: segment.gfns, slot: slot.id, hva, offset }),
            }
        }
        pieces
    }
}
