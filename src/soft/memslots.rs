//! Memslots as KVM holds them, and the set of them that a vCPU looks into.
//!
//! A slot is immutable once published, but for its mixed-attribute flags and its dirty log; a change publishes another one in its place. Its
//! pointer to a file leads nowhere once the file is being closed, which is how KVM's is nulled then.
//! Mirrors `struct kvm_memory_slot` and `struct kvm_memslots` (`include/linux/kvm_host.h`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use super::attributes::Mixed;
use super::dirty::DirtyBits;
use super::file::GmemFile;
use super::sync::lock;
use crate::addr::{FilePage, FileRange, Gfn, GfnRange};
use crate::layout::{SlotFlags, SlotId};
use crate::sync::blocking::Mutex;

/// The guest_memfd side of a slot.
#[derive(Debug)]
pub(super) struct SlotFile {
    /// The file pages that the slot is bound to.
    pub(super) pages: FileRange,
    /// `KVM_MEMSLOT_GMEM_ONLY`: the file can be mapped by the process, so shared faults are served from it too.
    pub(super) only: bool,
    /// The slot does not keep the file open.
    file: Weak<GmemFile>,
}

impl SlotFile {
    pub(super) fn new(file: &Arc<GmemFile>, pages: FileRange, only: bool) -> Self {
        Self { pages, only, file: Arc::downgrade(file) }
    }

    /// The file, unless it is closed or about to be (`kvm_gmem_get_file()`).
    pub(super) fn get(&self) -> Option<Arc<GmemFile>> {
        self.file.upgrade().filter(|file| !file.is_closing())
    }

    /// The file even while it is being closed.
    pub(super) fn get_closing(&self) -> Option<Arc<GmemFile>> {
        self.file.upgrade()
    }
}

/// One memslot.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) id: SlotId,
    pub(super) gfns: GfnRange,
    pub(super) flags: SlotFlags,
    pub(super) userspace_addr: u64,
    pub(super) file: Option<SlotFile>,
    /// Blocks that must not be mapped by a huge page.
    pub(super) mixed: Mutex<Mixed>,
    /// Pages written, if the slot is logged.
    pub(super) dirty: Option<Arc<DirtyBits>>,
    /// `KVM_MEMSLOT_INVALID`: being deleted or moved. Such a slot is a copy without a file.
    pub(super) invalid: bool,
}

impl Slot {
    /// The copy that stands in while this slot is deleted or moved.
    pub(super) fn invalidated(&self) -> Self {
        Self {
            id: self.id,
            gfns: self.gfns,
            flags: self.flags,
            userspace_addr: self.userspace_addr,
            file: None,
            mixed: Mutex::new(lock(&self.mixed).clone()),
            dirty: self.dirty.clone(),
            invalid: true,
        }
    }

    /// The address of `gfn` in this process.
    pub(super) fn hva(&self, gfn: Gfn) -> Option<u64> {
        let skip = gfn.pages_from(self.gfns.start())?;
        self.userspace_addr.checked_add(Gfn::new(skip)?.start_byte())
    }

    /// The file page behind `gfn`.
    pub(super) fn file_page(&self, gfn: Gfn) -> Option<FilePage> {
        let file = self.file.as_ref()?;
        Some(GfnRange::page(gfn).rebase(self.gfns.start(), file.pages.start())?.start())
    }
}

/// Every slot of a VM, by id and by frame.
#[derive(Debug, Default)]
pub(super) struct Memslots {
    by_id: BTreeMap<SlotId, Arc<Slot>>,
    by_gfn: BTreeMap<(u16, Gfn), Arc<Slot>>,
    generations: BTreeMap<u16, u64>,
    /// Address spaces with a swap that not every vCPU has noticed yet (`KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS`).
    updating: BTreeSet<u16>,
}

impl Memslots {
    pub(super) fn get(&self, id: SlotId) -> Option<&Arc<Slot>> {
        self.by_id.get(&id)
    }

    /// The slot that has `gfn`.
    pub(super) fn find(&self, as_id: u16, gfn: Gfn) -> Option<&Arc<Slot>> {
        let (_, slot) = self.by_gfn.range((as_id, Gfn::ZERO)..=(as_id, gfn)).next_back()?;
        slot.gfns.contains(gfn).then_some(slot)
    }

    /// Slots that have a frame of `range`, descending.
    pub(super) fn within(&self, as_id: u16, range: GfnRange) -> impl Iterator<Item = &Arc<Slot>> {
        let below = self.by_gfn.range((as_id, Gfn::ZERO)..(as_id, range.end())).rev();
        below.map(|(_, slot)| slot).take_while(move |slot| slot.gfns.end() > range.start())
    }

    /// All slots, ascending by id.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.by_id.values()
    }

    /// One swap of the active set: `old` out, `new` in. It is over once [`swapped`](Self::swapped) is told. Returns the address
    /// space.
    pub(super) fn swap(&mut self, old: Option<&Slot>, new: Option<&Arc<Slot>>) -> Option<u16> {
        if let Some(old) = old {
            self.by_id.remove(&old.id);
            self.by_gfn.remove(&(old.id.as_id, old.gfns.start()));
        }
        if let Some(new) = new {
            self.by_id.insert(new.id, Arc::clone(new));
            self.by_gfn.insert((new.id.as_id, new.gfns.start()), Arc::clone(new));
        }
        let as_id = old.or(new.map(Arc::as_ref)).map(|slot| slot.id.as_id);
        self.updating.extend(as_id);
        as_id
    }

    /// Every vCPU has noticed the last swap: the generation goes on by the number of address spaces. Not before, or what a fault
    /// found in the old set would count as found in the new one.
    pub(super) fn swapped(&mut self, as_id: u16, address_spaces: u64) {
        self.updating.remove(&as_id);
        let generation = self.generations.entry(as_id).or_insert(u64::from(as_id));
        *generation = generation.wrapping_add(address_spaces);
    }

    pub(super) fn generation(&self, as_id: u16) -> u64 {
        self.generations.get(&as_id).copied().unwrap_or(u64::from(as_id))
    }

    /// The generation that what was found before must be of, to count still; none does during a swap.
    pub(super) fn valid_generation(&self, as_id: u16) -> Option<u64> {
        (!self.updating.contains(&as_id)).then(|| self.generation(as_id))
    }
}
