//! vCPUs that hammer memory while it is edited, under thousands of random schedules: the real `CvmMemory`, gate, exits and
//! tracker on the software KVM, of which every lock is a point at which the other threads may get on instead.
//!
//! `RUSTFLAGS="--cfg shuttle" CARGO_TARGET_DIR=target/shuttle cargo test --release --test edit_schedules`;
//! `CVM_SCHEDULES` sets how many schedules each test has, and a failure prints the one to be replayed.
#![cfg(shuttle)]

mod edit_kit;

use std::sync::Arc;

use cvm_memory::backing::SharedBacking;
use cvm_memory::dirty::{Clearing, DirtyBitmap, Mechanism, Stage, Tracker, Unloggable};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{CvmMemory, Edit, EditError};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Guest, GuestOp, Outcome, SoftGuest};
use edit_kit::*;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner as Explorer, thread};

const PAGES: u64 = 8;

fn schedules(test: impl Fn() + Send + Sync + 'static) {
    let count = std::env::var("CVM_SCHEDULES").ok().map_or(2_000, |text| text.parse().unwrap());
    // Half of them at random, half with few preemptions at places that are: each finds what the other does not.
    let test = Arc::new(test);
    let again = Arc::clone(&test);
    let mut config = Config::new();
    // Planning and committing an edit take more than shuttle's threads have by default.
    config.stack_size = 1 << 20;
    Explorer::new(RandomScheduler::new(count / 2), config.clone()).run(move || test());
    Explorer::new(PctScheduler::new(3, count / 2), config).run(move || again());
}

fn runner(vm: &SoftVm, memory: &Arc<CvmMemory>) -> Runner<SoftGuest> {
    let guest = SoftGuest::new(vm);
    let kick = Arc::new(guest.kick());
    Runner::new(memory, guest, kick)
}

/// Every page of `who`, a shared and a private one among them if there are such: written once, and read twice.
fn hammer(mut runner: Runner<SoftGuest>, who: u64, mixed: bool) {
    let value = |page: u64| GuestOp::Write { gpa: page * PAGE + 8, data: (100 + page).to_le_bytes().to_vec() };
    for page in (0..PAGES).filter(|page| page / 2 % 2 == who) {
        runner.guest.set_private(mixed && page % 2 == 0);
        runner.perform(value(page));
        let found = runner.perform(GuestOp::Read { gpa: page * PAGE + 8, len: 8 });
        assert_eq!(found, Outcome::Data((100 + page).to_le_bytes().to_vec()), "page {page}");
    }
    for page in (0..PAGES).filter(|page| page / 2 % 2 == who) {
        runner.guest.set_private(mixed && page % 2 == 0);
        let found = runner.perform(GuestOp::Read { gpa: page * PAGE + 8, len: 8 });
        assert_eq!(found, Outcome::Data((100 + page).to_le_bytes().to_vec()), "page {page} again");
    }
    assert_eq!(runner.unexplained, Vec::<String>::new(), "vcpu {who}");
}

type Ask = fn(&mut Edit<'_>) -> Result<(), EditError>;

/// Around and under the pages that are used.
const EDITS: [Ask; 6] = [
    |edit| edit.split(3 * PAGE).map(drop),
    |edit| edit.grow(4 * PAGE, (PAGES - 3 + 4) * PAGE).map(drop),
    |edit| edit.merge(0, PAGES * PAGE).map(drop),
    |edit| edit.punch_hole(PAGES * PAGE, 4 * PAGE).map(drop),
    |edit| edit.split(5 * PAGE).map(drop),
    |edit| edit.merge(0, PAGES * PAGE).map(drop),
];

/// Two vCPUs, and a thread that edits.
fn stress(vm: &SoftVm, memory: &Arc<CvmMemory>, mixed: bool) {
    let vcpus = [0, 1].map(|who| {
        let runner = runner(vm, memory);
        thread::spawn(move || hammer(runner, who, mixed))
    });
    for ask in EDITS {
        let mut edit = memory.edit();
        ask(&mut edit).unwrap();
        edit.commit(&BESIDE).unwrap();
    }
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    assert_eq!(slots(memory), [gfns(0, PAGES)]);
}

fn plain_memory(vm: &SoftVm, flags: SlotFlags) -> (Arc<CvmMemory>, Arc<dyn SharedBacking>) {
    let backing = slice(2 * PAGES * PAGE).backing;
    let slot = plain(0, PAGES * PAGE, &backing, 0, flags);
    let memory = CvmMemory::builder().address_limit(1 << 30).slot(slot).build(Arc::new(vm.clone())).unwrap();
    (Arc::new(memory), backing)
}

#[test]
fn no_byte_is_wrong_and_no_exit_unexplained() {
    schedules(|| {
        let vm = SoftVm::default_type();
        let (memory, _) = plain_memory(&vm, SlotFlags::empty());
        stress(&vm, &memory, false);
    });
}

fn dirty_pages(bitmap: &DirtyBitmap) -> Vec<u64> {
    bitmap.runs().flat_map(|run| run.iter().map(|page| page.get()).collect::<Vec<_>>()).collect()
}

#[test]
fn no_dirty_bit_is_lost() {
    schedules(|| {
        let vm = SoftVm::default_type();
        let (memory, backing) = plain_memory(&vm, SlotFlags::LOG_DIRTY);
        let tracker = Arc::new(Tracker::new(Arc::new(vm.clone()), Mechanism::Bitmap(Clearing::ByLooking)));
        let bitmap = tracker.add_backing(backing.as_ref()).unwrap();
        tracker.start(memory.space().layout(), Unloggable::default()).unwrap();
        memory.set_harvest(Some(Arc::<Tracker>::clone(&tracker))).unwrap();
        stress(&vm, &memory, false);
        tracker.sync(Stage::Last).unwrap();
        // Each page was written once, so a bit that was lost is missing for good.
        assert_eq!(dirty_pages(&bitmap), (0..PAGES).collect::<Vec<_>>());
    });
}

#[test]
fn private_and_shared_pages_keep_their_state_and_contents() {
    schedules(|| {
        let vm = SoftVm::tagged();
        let builder = CvmMemory::builder().address_limit(1 << 30).ram(0, 2 * PAGES * PAGE);
        let memory = Arc::new(builder.build(Arc::new(vm.clone())).unwrap());
        let mut edit = memory.edit();
        edit.truncate(0, PAGES * PAGE).unwrap();
        edit.commit(&BESIDE).unwrap();
        stress(&vm, &memory, true);
    });
}
