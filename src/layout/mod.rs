//! Where memory is: which frames have a slot, which file pages back them, and the way between the two.
//!
//! Nouns only: nothing here performs an ioctl, and nothing here decides what the layout should be. A [`Layout`] is what a
//! VM's memslots and guest_memfd bindings *are*, and refuses, with a precise reason, whatever KVM would refuse with an
//! ambiguous errno; so an ioctl is issued only for a slot that has passed here. Mirrors `kvm_set_memory_region()`
//! (`virt/kvm/kvm_main.c`) and `kvm_gmem_bind()` (`virt/kvm/guest_memfd.c`).
//!
//! - [`Memslot`]: one slot, and the translations within it.
//! - [`Bindings`]: one file's pages and their slots; [`Bindings::clip`] turns invalidated pages into frames.
//! - [`SlotTable`]: a snapshot of all slots; lookups.
//! - [`Layout`]: table and bindings kept in step.

mod bindings;
mod error;
mod memslot;
mod space;
mod table;

pub use crate::gmem::FileId;
pub use bindings::{BindError, Binding, Bindings, Clip, Clips, MAX_FILE_PAGES};
pub use error::LayoutError;
pub(crate) use memslot::Size;
pub use memslot::{FileBinding, Memslot, SlotFlags, SlotId};
pub use space::{AddressSpace, Location, Segment, Segments};
pub use table::SlotTable;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use crate::addr::{FileRange, Gfn, GfnRange, PAGE_SIZE};
use bindings::pairs;
use error::{check_alone, check_top};

/// What a VM allows of a slot. Start from [`Limits::default`] and narrow it to what the VM reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Ids are below this (`KVM_CAP_NR_MEMSLOTS`).
    pub slots_per_address_space: u32,
    /// Address spaces are below this (`KVM_CAP_MULTI_ADDRESS_SPACE`); 1 for a VM with private memory.
    pub address_spaces: u16,
    /// The most pages of one slot.
    pub pages_per_slot: u64,
    /// Frames are below this: the host's physical address width, or the shared bit of the guest's addresses if lower.
    pub top: Gfn,
    /// Host addresses end at or below this, in bytes.
    pub hva_end: u64,
    /// Whether [`SlotFlags::READONLY`] is allowed at all (`KVM_CAP_READONLY_MEM`); not on a VM whose state is protected.
    pub readonly: bool,
}

impl Default for Limits {
    /// What every x86-64 KVM has at most: 32,764 ids, slots below 8 TiB, 52 address bits for the guest and 56 for the host.
    /// One address space.
    fn default() -> Self {
        Self {
            slots_per_address_space: 32_764,
            address_spaces: 1,
            pages_per_slot: (1 << 31) - 1,
            top: Gfn::containing(1 << 52),
            hva_end: (1 << 56) - PAGE_SIZE,
            readonly: true,
        }
    }
}

/// The slots and files of a VM. Every change is complete or has not happened.
///
/// ```
/// use cvm_memory::addr::{FilePage, FileRange, Gfn, GfnRange};
/// use cvm_memory::layout::{FileBinding, FileId, Layout, LayoutError, Limits, Memslot, SlotFlags, SlotId};
///
/// let mut layout = Layout::new(Limits::default());
/// let file = FileId::next();
/// layout.register_file(file, 0x100)?;
/// let slot = Memslot {
///     id: SlotId::new(0),
///     gfns: GfnRange::with_len(Gfn::new(0x1000).unwrap(), 0x10).unwrap(),
///     hva: 0x7f00_0000_0000,
///     flags: SlotFlags::GUEST_MEMFD,
///     binding: Some(FileBinding { file, start: FilePage::new(0x20).unwrap() }),
/// };
/// layout.insert(slot)?;
/// assert_eq!(layout.table().lookup(Gfn::new(0x1004).unwrap()), Some(&slot));
///
/// // A hole punched at file page 0x24 takes frame 0x1004 away.
/// let hole = FileRange::page(FilePage::new(0x24).unwrap());
/// let clips: Vec<_> = layout.clip(file, hole).map(|clip| clip.gfns).collect();
/// assert_eq!(clips, [GfnRange::page(Gfn::new(0x1004).unwrap())]);
///
/// assert_eq!(layout.insert(slot), Err(LayoutError::IdInUse { id: slot.id, gfns: slot.gfns }));
/// # Ok::<(), LayoutError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    limits: Limits,
    table: Arc<SlotTable>,
    files: BTreeMap<FileId, Bindings>,
}

impl Layout {
    /// No slots and no files.
    pub fn new(limits: Limits) -> Self {
        Self { limits, table: Arc::default(), files: BTreeMap::new() }
    }

    /// The layout of `slots` over `files`, each with its size in pages.
    ///
    /// # Errors
    /// As [`register_file`](Self::register_file) and [`insert`](Self::insert).
    pub fn from_slots(
        limits: Limits,
        files: impl IntoIterator<Item = (FileId, u64)>,
        slots: impl IntoIterator<Item = Memslot>,
    ) -> Result<Self, LayoutError> {
        let mut layout = Self::new(limits);
        for (file, pages) in files {
            layout.register_file(file, pages)?;
        }
        layout.insert_all(slots)?;
        Ok(layout)
    }

    /// What the VM allows.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The slots.
    pub fn table(&self) -> &SlotTable {
        &self.table
    }

    /// The slots as they are now, to be published: later changes do not show in it.
    pub fn snapshot(&self) -> Arc<SlotTable> {
        Arc::clone(&self.table)
    }

    /// The bindings of `file`; `None` if it is unknown or closed.
    pub fn bindings(&self, file: FileId) -> Option<&Bindings> {
        self.files.get(&file)
    }

    /// The files and their bindings.
    pub fn files(&self) -> impl Iterator<Item = (FileId, &Bindings)> {
        self.files.iter().map(|(file, bindings)| (*file, bindings))
    }

    /// Makes a file of `pages` pages known.
    ///
    /// # Errors
    /// [`LayoutError::FileKnown`]; [`LayoutError::Bind`] for a size no file can have.
    pub fn register_file(&mut self, file: FileId, pages: u64) -> Result<(), LayoutError> {
        let bindings = Bindings::new(pages).map_err(|source| LayoutError::Bind { file, source })?;
        match self.files.entry(file) {
            Entry::Occupied(_) => Err(LayoutError::FileKnown { file }),
            Entry::Vacant(vacant) => {
                vacant.insert(bindings);
                Ok(())
            }
        }
    }

    /// Adds a slot, checked in the order KVM checks. Takes O(slots).
    ///
    /// # Errors
    /// See [`LayoutError`]; of several reasons, one with the errno that KVM would give. Nothing has changed then.
    pub fn insert(&mut self, slot: Memslot) -> Result<(), LayoutError> {
        check_alone(&self.limits, &slot)?;
        if let Some(held) = self.table.get(slot.id) {
            return Err(LayoutError::IdInUse { id: slot.id, gfns: held.gfns });
        }
        if let Some(held) = self.table.space(slot.id.as_id).first_overlap(slot.gfns) {
            return Err(LayoutError::overlap(&slot, held));
        }
        let file = self.file_of(&slot)?;
        check_top(&self.limits, &slot)?;
        if let Some((file, run)) = file {
            let bindings = self.files.get_mut(&file).ok_or(LayoutError::UnknownFile { id: slot.id, file })?;
            bindings.bind(run.slot, run.pages, run.base).map_err(|source| LayoutError::Bind { file, source })?;
        }
        Arc::make_mut(&mut self.table).insert(slot);
        Ok(())
    }

    /// Adds all of `slots`, or none of them. Takes one sort, however many they are.
    ///
    /// # Errors
    /// As [`insert`](Self::insert), for one of the slots at fault. Nothing has changed then.
    pub fn insert_all(&mut self, slots: impl IntoIterator<Item = Memslot>) -> Result<(), LayoutError> {
        let mut added: BTreeMap<FileId, Vec<Binding>> = BTreeMap::new();
        let mut all: Vec<Memslot> = self.table.slots().copied().collect();
        for slot in slots {
            check_alone(&self.limits, &slot)?;
            check_top(&self.limits, &slot)?;
            if let Some((file, run)) = self.file_of(&slot)? {
                added.entry(file).or_default().push(run);
            }
            all.push(slot);
        }
        // Stable sorts: of two with one id, the later one is named.
        all.sort_by_key(|slot| slot.id);
        for (held, slot) in pairs(&all) {
            if held.id == slot.id {
                return Err(LayoutError::IdInUse { id: slot.id, gfns: held.gfns });
            }
        }
        all.sort_by_key(|slot| (slot.id.as_id, slot.gfns.start()));
        for (held, slot) in pairs(&all) {
            if held.id.as_id == slot.id.as_id && held.gfns.overlaps(&slot.gfns) {
                // Whichever comes first by address: a slot that is there already is not the one at fault.
                let known = self.table.get(slot.id).is_some();
                let (slot, held) = if known { (held, slot) } else { (slot, held) };
                return Err(LayoutError::overlap(slot, held));
            }
        }
        let mut bound = Vec::new();
        for (file, runs) in added {
            let Some(mut bindings) = self.files.get(&file).cloned() else { continue };
            bindings.bind_all(runs).map_err(|source| LayoutError::Bind { file, source })?;
            bound.push((file, bindings));
        }
        self.files.extend(bound);
        self.table = Arc::new(SlotTable::new(all));
        Ok(())
    }

    /// Takes the slots of `removed` away and adds `added`, or changes nothing. An id that is removed may be added again. Takes
    /// one sort, however many they are.
    ///
    /// # Errors
    /// [`LayoutError::UnknownSlot`]; else as [`insert_all`](Self::insert_all).
    pub fn replace(&mut self, removed: &[SlotId], added: impl IntoIterator<Item = Memslot>) -> Result<(), LayoutError> {
        let mut gone = removed.to_vec();
        gone.sort_unstable();
        if let Some(&id) = gone.iter().find(|id| self.table.get(**id).is_none()) {
            return Err(LayoutError::UnknownSlot { id });
        }
        let stays = |id: &SlotId| gone.binary_search(id).is_err();
        let mut next = self.clone();
        next.table = Arc::new(SlotTable::new(self.table.slots().filter(|slot| stays(&slot.id)).copied().collect()));
        next.files.values_mut().for_each(|bindings| bindings.retain(stays));
        next.insert_all(added)?;
        *self = next;
        Ok(())
    }

    /// The file behind `slot`, and the binding it asks for.
    fn file_of(&self, slot: &Memslot) -> Result<Option<(FileId, Binding)>, LayoutError> {
        let Some((file, pages)) = slot.file_range() else { return Ok(None) };
        if !self.files.contains_key(&file) {
            return Err(LayoutError::UnknownFile { id: slot.id, file });
        }
        Ok(Some((file, Binding { slot: slot.id, pages, base: slot.gfns.start() })))
    }

    /// Removes a slot and its binding, and returns it.
    ///
    /// # Errors
    /// [`LayoutError::UnknownSlot`].
    pub fn remove(&mut self, id: SlotId) -> Result<Memslot, LayoutError> {
        if self.table.get(id).is_none() {
            return Err(LayoutError::UnknownSlot { id });
        }
        let slot = Arc::make_mut(&mut self.table).remove(id).ok_or(LayoutError::UnknownSlot { id })?;
        if let Some(bindings) = slot.binding.and_then(|binding| self.files.get_mut(&binding.file)) {
            bindings.unbind(id);
        }
        Ok(slot)
    }

    /// Forgets a file, as its last descriptor is closed. Its slots stay, without a binding; returns them and the frames that
    /// lose their private memory, ascending by file page. An unknown file has none.
    pub fn close_file(&mut self, file: FileId) -> Vec<(SlotId, GfnRange)> {
        let Some(mut bindings) = self.files.remove(&file) else { return Vec::new() };
        let lost = bindings.close();
        if !lost.is_empty() {
            Arc::make_mut(&mut self.table).forget_file(file);
        }
        lost
    }

    /// What an invalidation of pages `range` of `file` takes away from its slots: see [`Bindings::clip`]. Nothing for a file
    /// that is unknown or closed.
    pub fn clip(&self, file: FileId, range: FileRange) -> Clips<'_> {
        self.files.get(&file).map_or(Clips::none(range), |bindings| bindings.clip(range))
    }
}

#[cfg(test)]
mod tests;
