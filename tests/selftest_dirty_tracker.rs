//! The kernel's `dirty_log_test`: guests write round numbers into random pages of 1 GiB and three pages (64 MiB where all is
//! slow) while the host looks at what is dirty, copies it, and now and then stops the guests to see whether the copy is their memory. By every mechanism, with
//! one vCPU and two, and while somebody else edits the layout under them. On the software KVM and on the kernel's.
//!
//! Only pages that somebody has written cost memory. Of the others, reading is left out too, which would make them.

mod edit_kit;
mod selftest_kit;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use cvm_memory::addr::{Gfn, GfnRange};
use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::dirty::{
    Clearing, DirtyBitmap, MIN_RING_BYTES_HARDWARE_LOG, Mechanism, Offer, OwnWrites, Situation, Stage, SyncError,
    SyncReport, Tracker, Unloggable, Wish, negotiate,
};
use cvm_memory::gate::{Gate, Kick};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Cap, Exit, Platform, Vcpu};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::CvmMemory;
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::kvm_guest::is_emulated;
use cvm_memory_testkit::skip::require;
use cvm_memory_testkit::{Guest, GuestOp, Numbers, Outcome};
use edit_kit::{Done, FEW, plain};
use nix::errno::Errno;
use selftest_kit::{Machine, PAGE, on_both_machines};

// Clear of what the guests have for themselves.
const GPA: u64 = 4 << 30;

/// Pages: 1 GiB of them, but less where everything is slow; and as in the original, no multiple of 64.
fn size<M: Machine>() -> u64 {
    (if rows::<M>() { 1 << 14 } else { 1 << 18 }) + 3
}

/// Whether this is no real processor with a real KVM, of which some emulate string instructions.
fn rows<M: Machine>() -> bool {
    M::NAME == "soft" || is_emulated()
}

/// A machine whose vCPUs can be got out of the guest.
trait Kicked: Machine {
    fn kick(guest: &Self::Guest) -> Arc<dyn Kick>;
}

impl Kicked for SoftVm {
    fn kick(guest: &Self::Guest) -> Arc<dyn Kick> {
        Arc::new(guest.kick())
    }
}

impl Kicked for KvmVm {
    fn kick(guest: &Self::Guest) -> Arc<dyn Kick> {
        Arc::new(guest.kick())
    }
}

/// Memory of the guests, who writes to it, and who looks.
struct World<M: Machine> {
    // First: vCPUs go before the memory.
    guests: Vec<Mutex<M::Guest>>,
    memory: CvmMemory,
    ram: Arc<SharedMemory>,
    bitmap: Arc<DirtyBitmap>,
    tracker: Arc<Tracker>,
    /// What the memory should be.
    copied: Mutex<Vec<u64>>,
    /// Pages that somebody writes to, noted before.
    touched: Vec<AtomicBool>,
    /// Pages written, those again that were written again.
    written: AtomicU64,
    fulls: AtomicU64,
    edits: AtomicU64,
    syncs: AtomicU64,
    /// Syncs that came in the middle of an edit.
    interrupted: AtomicU64,
}

fn index(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

/// The mechanism for a wish, enabled; with larger rings if the processor has a log of its own. Or a skip.
fn mechanism(vm: &impl Machine, wish: Wish) -> Option<Mechanism> {
    let offer = Offer::probe(vm);
    let situation =
        Situation { has_vcpus: false, has_slots: false, kernel_devices: false, own_writes: OwnWrites::Noted };
    if matches!(wish, Wish::Ring { .. }) {
        require(vm, Cap::DIRTY_LOG_RING_ACQ_REL, 1 << 20)?;
    }
    let mut choice = negotiate(&offer, &situation, wish).unwrap();
    if let Err(error) = choice.mechanism.enable(vm, &offer) {
        assert_eq!(wish, Wish::Ring { bytes: 4096 }, "{error}");
        let wish = Wish::Ring { bytes: MIN_RING_BYTES_HARDWARE_LOG };
        choice = negotiate(&offer, &situation, wish).unwrap();
        choice.mechanism.enable(vm, &offer).unwrap();
    }
    Some(choice.mechanism)
}

impl<M: Kicked> World<M> {
    fn new(wish: Wish, vcpus: u64) -> Option<Self> {
        let vm = M::create(Platform::DEFAULT)?;
        let mechanism = mechanism(&vm, wish)?;
        let tracker = Arc::new(Tracker::new(Arc::new(vm.clone()), mechanism));
        let ram = Arc::new(SharedMemory::new(size::<M>() * PAGE).unwrap());
        let backing: Arc<dyn SharedBacking> = ram.clone();
        let slot = plain(GPA, size::<M>() * PAGE, &backing, 0, SlotFlags::LOG_DIRTY);
        let memory = CvmMemory::builder().slot(slot).harvest(tracker.clone()).build(Arc::new(vm.clone())).unwrap();
        let bitmap = tracker.adopt(&backing).unwrap();
        let mut guests = Vec::new();
        for id in 0..vcpus {
            let guest = vm.guest(id);
            if let Mechanism::Ring { bytes, .. } = mechanism {
                tracker.add_ring(guest.dirty_ring(bytes).unwrap());
            }
            guests.push(Mutex::new(guest));
        }
        tracker.start(memory.space().layout(), Unloggable::Refuse).unwrap();
        Some(Self {
            guests,
            memory,
            ram,
            bitmap,
            tracker,
            copied: Mutex::new(vec![0; index(size::<M>())]),
            touched: (0..size::<M>()).map(|_| AtomicBool::new(false)).collect(),
            written: AtomicU64::new(0),
            fulls: AtomicU64::new(0),
            edits: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            interrupted: AtomicU64::new(0),
        })
    }

    /// What a vCPU does until it is told to stop: numbers into `row` pages each, from random ones on.
    fn vcpu(&self, id: usize, row: u64, stop: &AtomicBool) {
        let mut guest = self.guests[id].lock().unwrap();
        let pass = Gate::register(self.memory.gate(), M::kick(&guest));
        let mut numbers = Numbers(0x9e37_79b9 + id as u64);
        while !stop.load(Ordering::Relaxed) {
            let page = numbers.below(size::<M>() - row + 1);
            (page..page + row).for_each(|page| self.touched[index(page)].store(true, Ordering::Release));
            let value = self.written.fetch_add(row, Ordering::Relaxed) + 1;
            guest.start(if row == 1 {
                GuestOp::Write { gpa: GPA + page * PAGE, data: value.to_le_bytes().to_vec() }
            } else {
                GuestOp::Fill { gpa: GPA + page * PAGE, len: row * PAGE, byte: value.to_le_bytes()[1] | 1 }
            });
            loop {
                let inside = pass.enter().unwrap();
                let full = match guest.run() {
                    Ok(Exit::Halt) => break,
                    Ok(Exit::DirtyRingFull) => true,
                    Err(Errno::EINTR | Errno::EAGAIN) => false,
                    Ok(exit) => panic!("{exit:?}"),
                    Err(errno) => panic!("{errno}"),
                };
                drop(inside);
                if full {
                    self.fulls.fetch_add(1, Ordering::Relaxed);
                    let report = self.tracker.ring_full().unwrap();
                    assert!(!report.overrun, "{report:?} {:?}", self.tracker.ring_stats());
                }
            }
            assert_eq!(guest.result(), Some(Outcome::Done));
        }
    }

    /// One slot becomes two, and one again, and two others: ids that stand for something else each time.
    fn edit(&self, round: u64) {
        let cut = 1 + round * 57_731 % (size::<M>() - 1);
        let mut edit = self.memory.edit();
        match round % 3 {
            0 => edit.split(GPA + cut * PAGE).unwrap(),
            1 => edit.merge(GPA, size::<M>() * PAGE).unwrap().split(GPA + cut * PAGE).unwrap(),
            _ => edit.merge(GPA, size::<M>() * PAGE).unwrap(),
        };
        edit.commit(&FEW).unwrap();
    }

    /// A sync while slots may be replaced.
    fn sync(&self, stage: Stage) -> SyncReport {
        loop {
            match self.tracker.sync(stage) {
                Err(SyncError::Editing) => _ = self.interrupted.fetch_add(1, Ordering::Relaxed),
                other => {
                    self.syncs.fetch_add(1, Ordering::Relaxed);
                    return other.unwrap();
                }
            }
            thread::yield_now();
        }
    }

    /// The first word of a page.
    fn page(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        // What is written from here on is dirty once more.
        if self.touched[index(page)].load(Ordering::Acquire) {
            self.ram.read(page * PAGE, &mut bytes).unwrap();
        }
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
        pages.iter().for_each(|page| to[index(*page)] = self.page(*page));
        pages.len() as u64
    }

    /// Rounds of copying while guests run, then they are stopped and the copy is held against their memory.
    fn run(&self, stops: u64, rounds: u64, row: u64, edits: bool) {
        let mut copy = self.copied.lock().unwrap();
        let mut copied = 0;
        for stopped in 0..stops {
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                // Also should this thread panic.
                let _stopped = Done(&stop);
                let guests: Vec<_> = (0..self.guests.len())
                    .map(|id| {
                        scope.spawn({
                            let stop = &stop;
                            move || self.vcpu(id, row, stop)
                        })
                    })
                    .collect();
                let running = || !guests.iter().any(thread::ScopedJoinHandle::is_finished);
                let wait = |writes: u64| {
                    let before = self.written.load(Ordering::Relaxed);
                    while self.written.load(Ordering::Relaxed) < before + writes && running() {
                        thread::yield_now();
                    }
                };
                for round in 0..rounds {
                    let syncs = AtomicBool::new(edits);
                    thread::scope(|scope| {
                        let editor = edits.then(|| {
                            scope.spawn(|| {
                                let mut first = true;
                                while std::mem::take(&mut first) || syncs.load(Ordering::Relaxed) {
                                    self.edit(self.edits.fetch_add(1, Ordering::Relaxed));
                                    wait(20);
                                }
                            })
                        });
                        wait(100);
                        self.sync(Stage::Running);
                        copied += self.copy(&mut copy, round % 2 == 0);
                        syncs.store(false, Ordering::Relaxed);
                        editor.into_iter().for_each(|editor| editor.join().unwrap());
                    });
                }
            });
            let report = self.sync(Stage::Last);
            assert_eq!((report.stray, report.overrun), (None, false));
            copied += self.copy(&mut copy, stopped % 2 == 0);
            let missed: BTreeSet<u64> =
                (0..size::<M>()).filter(|page| self.page(*page) != copy[index(*page)]).collect();
            assert_eq!(missed, BTreeSet::new(), "pages were missed");
            assert_eq!(self.sync(Stage::Last).pages, 0);
        }
        let written = self.written.load(Ordering::Relaxed);
        let edited = self.edits.load(Ordering::Relaxed);
        if std::env::var_os("CVM_DIRTY_VERBOSE").is_some() {
            let (fulls, interrupted) = (self.fulls.load(Ordering::Relaxed), self.interrupted.load(Ordering::Relaxed));
            let mechanism = self.tracker.mechanism();
            eprintln!(
                "{} {mechanism:?}, {} vcpus: {written} pages written, {copied} copied, {fulls} rings full, {edited} edits, \
                 {interrupted} syncs within one",
                M::NAME,
                self.guests.len()
            );
        }
        // Not everything is dirty all the time, which would be right always: nor is more copied than was written, but for
        // what a new log starts with. A write is logged before it is done, and again if it was cleared, or came back, in between.
        if self.tracker.mechanism() != Mechanism::Bitmap(Clearing::ByHandFromAll) {
            let again = [&self.fulls, &self.syncs, &self.edits].map(|count| count.load(Ordering::Relaxed));
            let again = again.iter().sum::<u64>() * self.guests.len() as u64;
            assert!(copied <= written + again, "{copied} pages copied, {written} written, {again} perhaps twice");
        }
        assert!(copied > 0 && edits == (edited > 0));
    }
}

const RINGS: [Wish; 2] = [Wish::Ring { bytes: 1 << 20 }, Wish::Ring { bytes: 4096 }];

fn every_wish() -> Vec<Wish> {
    let logs = [Clearing::ByLooking, Clearing::ByHand, Clearing::ByHandFromAll].map(Wish::Bitmap);
    logs.into_iter().chain(RINGS).collect()
}

fn scheme<M: Kicked>(vcpus: u64, edits: bool) {
    for wish in every_wish() {
        if let Some(world) = World::<M>::new(wish, vcpus) {
            world.run(2, 4, 1, edits);
        }
    }
}

fn one_vcpu<M: Kicked>() {
    scheme::<M>(1, false);
}

fn two_vcpus<M: Kicked>() {
    scheme::<M>(2, false);
}

fn while_slots_are_replaced<M: Kicked>() {
    scheme::<M>(1, true);
    scheme::<M>(2, true);
}

/// Rings of either size go round, the smallest several times. There is a KVM that emulates string instructions and logs them byte
/// by byte, more of them in one go than it keeps entries free for: it gets no long ones.
fn rings_that_wrap_around<M: Kicked>() {
    for (wish, rounds, row) in [(RINGS[0], 1, 1024), (RINGS[1], 3, 100)] {
        let Some(world) = World::<M>::new(wish, 1) else { return };
        let Mechanism::Ring { bytes, .. } = world.tracker.mechanism() else { unreachable!() };
        let entries = u64::from(bytes / 16);
        while world.tracker.ring_stats().entries < rounds * entries + entries / 16 {
            if rows::<M>() {
                world.run(1, 4, row, false);
            } else {
                world.run(1, entries / 200, 1, false);
            }
        }
    }
}

on_both_machines!(one_vcpu, two_vcpus, while_slots_are_replaced, rings_that_wrap_around);
