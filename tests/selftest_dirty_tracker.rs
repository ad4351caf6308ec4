//! The kernel's `dirty_log_test`: guests write round numbers into random pages while the host looks at what is dirty, copies it,
//! and now and then stops the guests to see whether the copy is their memory. By every mechanism, with one vCPU and two, and
//! while slots are split, merged and moved under them. On the software KVM and on the kernel's.

mod selftest_kit;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread;

use cvm_memory::addr::{Gfn, GfnRange};
use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::dirty::{
    Clearing, DirtyBitmap, MIN_RING_BYTES_HARDWARE_LOG, Mechanism, Offer, OwnWrites, Situation, Stage, Tracker,
    Unloggable, Wish, negotiate,
};
use cvm_memory::hypervisor::{Cap, Exit, MemoryRegion, Platform, Vcpu};
use cvm_memory::layout::{Layout, Limits, Memslot, SlotFlags, SlotId};
use cvm_memory_testkit::skip::require;
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use selftest_kit::*;

const GPA: u64 = 0xc000_0000;
/// As in the original, the size is no multiple of 64.
const PAGES: u64 = 2048 + 3;

/// Memory of the guests, who writes to it, and who looks.
struct World<M: Machine> {
    vm: M,
    ram: &'static SharedMemory,
    bitmap: Arc<DirtyBitmap>,
    tracker: Tracker,
    layout: Mutex<Layout>,
    /// Held by every vCPU while it is in the guest.
    gate: RwLock<()>,
    guests: Vec<Mutex<M::Guest>>,
    /// What the memory should be.
    copied: Mutex<Vec<u64>>,
    written: AtomicU64,
    fulls: AtomicU64,
}

/// One slot over `[start, end)` of the memory.
fn slot(ram: &SharedMemory, id: u16, start: u64, end: u64) -> Memslot {
    Memslot {
        id: SlotId::new(id),
        gfns: GfnRange::from_bytes(GPA + start * PAGE, (end - start) * PAGE).unwrap(),
        hva: ram.hva() + start * PAGE,
        flags: SlotFlags::LOG_DIRTY,
        binding: None,
    }
}

fn region(slot: &Memslot) -> MemoryRegion {
    let size = slot.gfns.bytes();
    let plain = plain_slot(slot.id.raw(), slot.gfns.start_byte(), size, slot.hva);
    MemoryRegion { flags: slot.flags.bits(), ..plain }
}

impl<M: Machine> World<M> {
    fn new(wish: Wish, vcpus: u64) -> Option<Self> {
        let vm = M::create(Platform::DEFAULT)?;
        let offer = Offer::probe(&vm);
        let situation =
            Situation { has_vcpus: false, has_slots: false, kernel_devices: false, own_writes: OwnWrites::Noted };
        if matches!(wish, Wish::Ring { .. }) {
            require(&vm, Cap::DIRTY_LOG_RING_ACQ_REL, 1 << 20)?;
        }
        let mut choice = negotiate(&offer, &situation, wish).unwrap();
        if let Err(error) = choice.mechanism.enable(&vm, &offer) {
            // A processor with a log of its own.
            assert_eq!(wish, Wish::Ring { bytes: 4096 }, "{error}");
            let wish = Wish::Ring { bytes: MIN_RING_BYTES_HARDWARE_LOG };
            choice = negotiate(&offer, &situation, wish).unwrap();
            choice.mechanism.enable(&vm, &offer).unwrap();
        }
        let ram = leaked(PAGES * PAGE);
        fill(ram, 0, PAGES * PAGE, 0);
        let tracker = Tracker::new(Arc::new(vm.clone()), choice.mechanism);
        let bitmap = tracker.add_backing(ram).unwrap();
        let mut guests = Vec::new();
        for id in 0..vcpus {
            let guest = vm.guest(id);
            if let Mechanism::Ring { bytes, .. } = choice.mechanism {
                tracker.add_ring(guest.dirty_ring(bytes).unwrap());
            }
            guests.push(Mutex::new(guest));
        }
        let all = slot(ram, 1, 0, PAGES);
        set(&vm, &region(&all)).unwrap();
        let layout = Layout::from_slots(Limits::default(), [], [all]).unwrap();
        tracker.start(&layout, Unloggable::Refuse).unwrap();
        Some(Self {
            vm,
            ram,
            bitmap,
            tracker,
            layout: Mutex::new(layout),
            gate: RwLock::new(()),
            guests,
            copied: Mutex::new(vec![0; usize::try_from(PAGES).unwrap()]),
            written: AtomicU64::new(0),
            fulls: AtomicU64::new(0),
        })
    }

    /// What a vCPU does until it is told to stop: numbers into random pages.
    fn vcpu(&self, id: usize, stop: &AtomicBool) {
        let mut guest = self.guests[id].lock().unwrap();
        let mut random = 0x9e37_79b9_u64.wrapping_add(id as u64);
        while !stop.load(Ordering::Relaxed) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (random >> 33) % PAGES;
            let value = self.written.fetch_add(1, Ordering::Relaxed) + 1;
            guest.start(GuestOp::Write { gpa: GPA + page * PAGE, data: value.to_le_bytes().to_vec() });
            loop {
                let _inside = self.gate.read().unwrap();
                let full = match guest.run() {
                    Ok(Exit::Halt) => break,
                    Ok(Exit::DirtyRingFull) => true,
                    Ok(exit) => panic!("{exit:?}"),
                    Err(errno) => panic!("{errno}"),
                };
                drop(_inside);
                if full {
                    self.fulls.fetch_add(1, Ordering::Relaxed);
                    assert!(!self.tracker.ring_full().unwrap().overrun);
                }
            }
            assert_eq!(guest.result(), Some(Outcome::Done));
        }
    }

    /// Slots are replaced under the guests, who are kept out meanwhile. Every way has the same memory at the same place.
    fn edit(&self, round: u64) {
        let _out = self.gate.write().unwrap();
        let cut = 1 + round * 577 % (PAGES - 1);
        let slots = match round % 3 {
            0 => vec![slot(self.ram, 1, 0, PAGES)],
            // The id of what was all of it is now a part, and at another place.
            1 => vec![slot(self.ram, 2, 0, cut), slot(self.ram, 1, cut, PAGES)],
            _ => vec![slot(self.ram, 1, 0, cut), slot(self.ram, 2, cut, PAGES)],
        };
        let mut layout = self.layout.lock().unwrap();
        for old in layout.table().slots() {
            self.tracker.before_delete(old).unwrap();
            set(&self.vm, &deletion(&region(old))).unwrap();
        }
        slots.iter().for_each(|new| set(&self.vm, &region(new)).unwrap());
        *layout = Layout::from_slots(Limits::default(), [], slots).unwrap();
        self.tracker.edited(&layout);
    }

    fn page(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram.read(page * PAGE, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Copies what is dirty, by frame or by page of the backing.
    fn copy(&self, to: &mut [u64], by_frame: bool) -> u64 {
        let origin = Gfn::containing(GPA);
        let pages: Vec<u64> = if by_frame {
            self.tracker
                .take_gfns()
                .iter()
                .flat_map(GfnRange::iter)
                .map(|gfn| gfn.pages_from(origin).unwrap())
                .collect()
        } else {
            self.bitmap.take().flat_map(|run| run.iter()).map(|page| page.get()).collect()
        };
        pages.iter().for_each(|page| to[usize::try_from(*page).unwrap()] = self.page(*page));
        pages.len() as u64
    }

    /// The scheme: rounds of copying while guests run, then they are stopped and the copy is held against their memory.
    fn run(&self, stops: u64, rounds: u64, edits: bool) {
        let mut copy = self.copied.lock().unwrap();
        let mut copied = 0;
        for stopped in 0..stops {
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                for id in 0..self.guests.len() {
                    let stop = &stop;
                    scope.spawn(move || self.vcpu(id, stop));
                }
                for round in 0..rounds {
                    let before = self.written.load(Ordering::Relaxed);
                    while self.written.load(Ordering::Relaxed) < before + 100 {
                        thread::yield_now();
                    }
                    if edits {
                        self.edit(stopped * rounds + round);
                    }
                    self.tracker.sync(Stage::Running).unwrap();
                    copied += self.copy(&mut copy, round % 2 == 0);
                }
                stop.store(true, Ordering::Relaxed);
            });
            let report = self.tracker.sync(Stage::Last).unwrap();
            assert_eq!((report.stray, report.overrun), (None, false));
            copied += self.copy(&mut copy, stopped % 2 == 0);
            let memory: Vec<u64> = (0..PAGES).map(|page| self.page(page)).collect();
            assert!(*copy == memory, "a page was missed: {:?}", copy.iter().zip(&memory).position(|(a, b)| a != b));
            assert_eq!(self.tracker.sync(Stage::Last).unwrap().pages, 0);
        }
        // Not everything is dirty all the time, which would be right always: nor is more copied than was written, but for
        // what a new log starts with.
        let written = self.written.load(Ordering::Relaxed);
        if self.tracker.mechanism() != Mechanism::Bitmap(Clearing::ByHandFromAll) {
            assert!(copied <= written, "{copied} pages copied, {written} written");
        }
    }
}

const RINGS: [Wish; 2] = [Wish::Ring { bytes: 1 << 20 }, Wish::Ring { bytes: 4096 }];

fn every_wish() -> Vec<Wish> {
    let logs = [Clearing::ByLooking, Clearing::ByHand, Clearing::ByHandFromAll].map(Wish::Bitmap);
    logs.into_iter().chain(RINGS).collect()
}

fn scheme<M: Machine>(vcpus: u64, edits: bool) {
    for wish in every_wish() {
        if let Some(world) = World::<M>::new(wish, vcpus) {
            world.run(3, 6, edits);
        }
    }
}

fn one_vcpu<M: Machine>() {
    scheme::<M>(1, false);
}

fn two_vcpus<M: Machine>() {
    scheme::<M>(2, false);
}

fn while_slots_are_replaced<M: Machine>() {
    scheme::<M>(2, true);
}

/// The smallest ring goes round several times.
fn a_ring_that_wraps_around<M: Machine>() {
    if let Some(world) = World::<M>::new(RINGS[1], 1) {
        let size = u64::from(match world.tracker.mechanism() {
            Mechanism::Ring { bytes, .. } => bytes / 16,
            Mechanism::Bitmap(_) => unreachable!(),
        });
        while world.tracker.ring_stats().entries < 3 * size {
            world.run(1, 1 + size / 50, false);
        }
    }
}

on_both_machines!(one_vcpu, two_vcpus, while_slots_are_replaced, a_ring_that_wraps_around);
