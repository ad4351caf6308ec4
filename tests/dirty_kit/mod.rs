//! What the tests of the tracker share: a software KVM with memory, a vCPU, and a tracker that follows every edit.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::sync::Arc;

use cvm_memory::addr::FileRange;
use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::dirty::{Clearing, DirtyBitmap, Mechanism, Stage, SyncReport, Tracker, Unloggable};
use cvm_memory::hypervisor::{Cap, MemoryRegion, Vcpu};
use cvm_memory::layout::{Layout, Limits, Memslot, SlotFlags, SlotId};
use cvm_memory::soft::{SoftVcpu, SoftVm};
use cvm_memory_testkit::Recorder;

use crate::soft_kit::*;

pub const RING: Mechanism = Mechanism::Ring { cap: Cap::DIRTY_LOG_RING, bytes: 4096, backed: false };
pub const BACKED: Mechanism = Mechanism::Ring { cap: Cap::DIRTY_LOG_RING, bytes: 4096, backed: true };
pub const BY_LOOKING: Mechanism = Mechanism::Bitmap(Clearing::ByLooking);
pub const BY_HAND: Mechanism = Mechanism::Bitmap(Clearing::ByHand);
pub const FROM_ALL: Mechanism = Mechanism::Bitmap(Clearing::ByHandFromAll);
pub const PAGES: u64 = 512;

/// A software KVM with one stretch of memory, a vCPU, and a tracker.
pub struct Setup {
    pub soft: SoftVm,
    pub vm: Recorder<SoftVm>,
    pub ram: &'static SharedMemory,
    pub bitmap: Arc<DirtyBitmap>,
    pub tracker: Tracker,
    pub vcpu: SoftVcpu,
    pub layout: Layout,
}

/// Pages of the memory `[from, from + pages)` at frame `gfn`.
pub fn slot(ram: &SharedMemory, id: u16, at: u64, from: u64, pages: u64) -> Memslot {
    Memslot {
        id: SlotId::new(id),
        gfns: gfns(at, at + pages),
        hva: ram.hva() + from * PAGE,
        flags: SlotFlags::LOG_DIRTY,
        binding: None,
    }
}

pub fn region(slot: &Memslot) -> MemoryRegion {
    let shared = shared_slot(slot.id.raw(), slot.gfns.start_byte(), slot.gfns.bytes(), slot.hva);
    MemoryRegion { flags: slot.flags.bits(), ..shared }
}

pub fn layout(slots: &[Memslot]) -> Layout {
    Layout::from_slots(Limits::default(), [], slots.iter().copied()).unwrap()
}

pub fn pages(start: u64, end: u64) -> FileRange {
    file_pages(start, end)
}

impl Setup {
    pub fn new(mechanism: Mechanism, slots: impl Fn(&SharedMemory) -> Vec<Memslot>) -> Self {
        let soft = backed_vm();
        let vm = Recorder::new(soft.clone());
        let offer = cvm_memory::dirty::Offer::probe(&vm);
        mechanism.enable(&vm, &offer).unwrap();
        let ram: &'static SharedMemory = Box::leak(Box::new(SharedMemory::new(PAGES * PAGE).unwrap()));
        let tracker = Tracker::new(Arc::new(vm.clone()), mechanism);
        let bitmap = tracker.add_backing(ram).unwrap();
        let slots = slots(ram);
        slots.iter().for_each(|slot| set_region(&soft, &region(slot)).unwrap());
        let vcpu = soft.create_vcpu();
        if let Mechanism::Ring { bytes, .. } = mechanism {
            tracker.add_ring(vcpu.dirty_ring(bytes).unwrap());
        }
        let layout = layout(&slots);
        tracker.start(&layout, Unloggable::Refuse).unwrap();
        vm.take();
        Self { soft, vm, ram, bitmap, tracker, vcpu, layout }
    }

    pub fn write(&mut self, gfn: u64) {
        finish(&mut self.vcpu, fill(gfn * PAGE, 1, 1, false));
    }

    /// Deletes all slots and creates others, as an edit does.
    pub fn edit(&mut self, slots: &[Memslot]) {
        for old in self.layout.table().slots() {
            self.tracker.before_delete(old).unwrap();
            set_region(&self.soft, &delete(old.id.raw())).unwrap();
        }
        slots.iter().for_each(|slot| set_region(&self.soft, &region(slot)).unwrap());
        self.layout = layout(slots);
        self.tracker.edited(&self.layout);
    }

    pub fn sync(&self) -> SyncReport {
        self.tracker.sync(Stage::Running).unwrap()
    }

    pub fn dirty(&self) -> Vec<FileRange> {
        self.bitmap.take().collect()
    }
}

pub fn one_slot(ram: &SharedMemory) -> Vec<Memslot> {
    vec![slot(ram, 3, 0x100, 0, 64)]
}
