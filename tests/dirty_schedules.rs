//! Finding dirty pages under every kind of schedule: vCPUs write, somebody copies what is dirty, somebody replaces slots, and
//! which of them gets on next is drawn at random at every lock there is, those of the software KVM included. In the end, the
//! copy is the memory.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" CARGO_TARGET_DIR=target/shuttle cargo test --test dirty_schedules
//! ```
//!
//! `SHUTTLE_ITERATIONS` says how many schedules.
#![cfg(shuttle)]

mod soft_kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::dirty::{Clearing, DirtyBitmap, Mechanism, Offer, Stage, SyncError, SyncReport, Tracker, Unloggable};
use cvm_memory::gate::Gate;
use cvm_memory::hypervisor::{Cap, Exit, MemoryRegion, Vcpu};
use cvm_memory::layout::{Layout, Limits, Memslot, SlotFlags, SlotId};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Guest, GuestOp, SoftGuest};
use nix::errno::Errno;
use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, Runner, thread};
use soft_kit::*;

const RING: Mechanism = Mechanism::Ring { cap: Cap::DIRTY_LOG_RING, bytes: 4096, backed: false };
const BY_LOOKING: Mechanism = Mechanism::Bitmap(Clearing::ByLooking);
const BY_HAND: Mechanism = Mechanism::Bitmap(Clearing::ByHand);
/// First frame.
const GFN: u64 = 0x100;
const PAGES: u64 = 256;
/// Pages that are written at first, so that a ring gets full soon: it has room for 192.
const BEFORE: u64 = 190;

struct World {
    vm: SoftVm,
    ram: SharedMemory,
    bitmap: Arc<DirtyBitmap>,
    tracker: Tracker,
    gate: Arc<Gate>,
    written: AtomicU64,
}

fn slot(ram: &SharedMemory, id: u16, start: u64, end: u64) -> Memslot {
    let (gfns, hva) = (gfns(GFN + start, GFN + end), ram.hva() + start * PAGE);
    Memslot { id: SlotId::new(id), gfns, hva, flags: SlotFlags::LOG_DIRTY, binding: None }
}

fn region(slot: &Memslot) -> MemoryRegion {
    let shared = shared_slot(slot.id.raw(), slot.gfns.start_byte(), slot.gfns.bytes(), slot.hva);
    MemoryRegion { flags: slot.flags.bits(), ..shared }
}

fn layout(slots: &[Memslot]) -> Layout {
    Layout::from_slots(Limits::default(), [], slots.iter().copied()).unwrap()
}

impl World {
    fn new(mechanism: Mechanism) -> Self {
        let vm = SoftVm::default_type();
        mechanism.enable(&vm, &Offer::probe(&vm)).unwrap();
        let tracker = Tracker::new(Arc::new(vm.clone()), mechanism);
        let ram = SharedMemory::new(PAGES * PAGE).unwrap();
        let bitmap = tracker.add_backing(&ram).unwrap();
        let all = slot(&ram, 1, 0, PAGES);
        set_region(&vm, &region(&all)).unwrap();
        tracker.start(&layout(&[all]), Unloggable::Refuse).unwrap();
        Self { vm, ram, bitmap, tracker, gate: Arc::default(), written: AtomicU64::new(0) }
    }

    fn guest(&self) -> SoftGuest {
        let guest = SoftGuest::new(&self.vm);
        if let Mechanism::Ring { bytes, .. } = self.tracker.mechanism() {
            self.tracker.add_ring(guest.dirty_ring(bytes).unwrap());
        }
        guest
    }

    /// A number into each of the pages.
    fn write(&self, guest: &mut SoftGuest, pages: impl IntoIterator<Item = u64>) {
        let pass = Gate::register(&self.gate, Arc::new(guest.kick()));
        for page in pages {
            let value = self.written.fetch_add(1, Ordering::Relaxed) + 1;
            guest.start(GuestOp::Write { gpa: (GFN + page) * PAGE, data: value.to_le_bytes().to_vec() });
            loop {
                let inside = pass.enter().unwrap();
                match guest.run() {
                    Ok(Exit::Halt) => break,
                    Ok(Exit::DirtyRingFull) => {
                        drop(inside);
                        self.tracker.ring_full().unwrap();
                    }
                    Err(Errno::EINTR) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    /// Slots are replaced, and an id that stood for all of it stands for a part.
    fn edit(&self, old: &[Memslot], new: &[Memslot]) {
        let _closed = self.gate.close(Duration::from_secs(3600)).unwrap();
        for slot in old {
            self.tracker.before_delete(slot).unwrap();
            set_region(&self.vm, &delete(slot.id.raw())).unwrap();
        }
        new.iter().for_each(|slot| set_region(&self.vm, &region(slot)).unwrap());
        self.tracker.edited(&layout(new));
    }

    fn sync(&self, stage: Stage) -> SyncReport {
        loop {
            match self.tracker.sync(stage) {
                Err(SyncError::Editing) => thread::yield_now(),
                other => return other.unwrap(),
            }
        }
    }

    fn page(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram.read(page * PAGE, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn copy(&self, to: &mut [u64]) {
        for page in self.bitmap.take().flat_map(|run| run.iter()) {
            to[usize::try_from(page.get()).unwrap()] = self.page(page.get());
        }
    }
}

fn scenario(mechanism: Mechanism, edits: bool) {
    let world = Arc::new(World::new(mechanism));
    let mut guests = [world.guest(), world.guest()];
    if let Mechanism::Ring { .. } = mechanism {
        world.write(&mut guests[0], 0..BEFORE);
    }
    // Whoever copies takes what is in the bitmap at any time, in the middle of a sync too.
    let copier = thread::spawn({
        let world = Arc::clone(&world);
        move || {
            let mut copy = vec![0; usize::try_from(PAGES).unwrap()];
            for _ in 0..10 {
                world.copy(&mut copy);
                thread::yield_now();
            }
            copy
        }
    });
    let mut threads = Vec::new();
    for (mut guest, own) in guests.into_iter().zip([192, 224]) {
        let world = Arc::clone(&world);
        // Pages that are written once, so that no later write makes up for a bit that was lost; and one that both write again and
        // again. On either side of where slots are cut.
        let pages = [own, own + 8, 221, own + 16, 221, own + 24, 221, own + 31, 221];
        threads.push(thread::spawn(move || world.write(&mut guest, pages)));
    }
    if edits {
        let world = Arc::clone(&world);
        threads.push(thread::spawn(move || {
            let whole = [slot(&world.ram, 1, 0, PAGES)];
            let parts = [slot(&world.ram, 2, 0, 220), slot(&world.ram, 1, 220, PAGES)];
            // Where there is something to lose.
            let before = world.written.load(Ordering::Relaxed);
            for (writes, old, new) in [(4, &whole[..], &parts[..]), (10, &parts[..], &whole[..])] {
                while world.written.load(Ordering::Relaxed) < before + writes {
                    thread::yield_now();
                }
                world.edit(old, new);
            }
        }));
    }
    for _ in 0..3 {
        world.sync(Stage::Running);
        thread::yield_now();
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let mut copy = copier.join().unwrap();
    let report = world.sync(Stage::Last);
    assert_eq!((report.stray, report.overrun), (None, false));
    world.copy(&mut copy);
    let memory: Vec<u64> = (0..PAGES).map(|page| world.page(page)).collect();
    let missed: Vec<_> = (0..).zip(memory.iter().zip(&copy)).filter(|(_, (a, b))| a != b).collect::<Vec<(u64, _)>>();
    assert!(missed.is_empty(), "missed: {missed:?}");
}

fn explore(mechanism: Mechanism, edits: bool) {
    let iterations = std::env::var("SHUTTLE_ITERATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.max_steps = shuttle::MaxSteps::FailAfter(10_000_000);
    Runner::new(RandomScheduler::new(iterations), config).run(move || scenario(mechanism, edits));
}

#[test]
fn logs() {
    explore(BY_LOOKING, false);
    explore(BY_HAND, false);
}

#[test]
fn logs_while_slots_are_replaced() {
    explore(BY_LOOKING, true);
    explore(BY_HAND, true);
}

#[test]
fn rings() {
    explore(RING, false);
}

#[test]
fn rings_while_slots_are_replaced() {
    explore(RING, true);
}
