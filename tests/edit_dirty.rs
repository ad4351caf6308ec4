//! Dirty bits across edits, on a real KVM: each is found afterwards, by the memory that it is about. And what becomes of them,
//! and of the guest, where the same is done with bare calls.
#![allow(unsafe_code, reason = "the counterexample sets slots by hand")]

mod edit_kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::edit::Prefer;
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Exit, Hypervisor, MemoryRegion, Mmio, Platform, Vcpu};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{CommitOptions, CvmMemory};
use cvm_memory_testkit::{Guest, GuestOp, KvmGuest, kvm};
use edit_kit::{Bits, Done, PAGE, Runner, gfns, plain, slice, slots, steps};

const GIB: u64 = 1 << 30;

const FEW: CommitOptions = CommitOptions {
    prefer: Prefer::FewSlots,
    patience: std::time::Duration::from_secs(60),
    lose_private: false,
    free_rebound: false,
    lose_dirty: false,
};

struct Logged {
    vm: KvmVm,
    memory: Arc<CvmMemory>,
    bits: Arc<Bits>,
    runner: Runner<KvmGuest>,
}

/// A slot with a dirty log at `gpa`, `used` bytes of a mapping of `size`, or a skip.
fn logged(gpa: u64, used: u64, size: u64) -> Option<Logged> {
    let vm = kvm(Platform::DEFAULT)?;
    let slot = plain(gpa, used, &slice(size).backing, 0, SlotFlags::LOG_DIRTY);
    let memory = Arc::new(CvmMemory::builder().slot(slot).build(Arc::new(vm.clone())).unwrap());
    let bits = Bits::new(&vm);
    memory.set_harvest(Some(Arc::<Bits>::clone(&bits))).unwrap();
    let guest = KvmGuest::new(&vm, 0);
    let kick = Arc::new(guest.kick());
    let runner = Runner::new(&memory, guest, kick);
    Some(Logged { vm, memory, bits, runner })
}

impl Logged {
    fn write(&mut self, page: u64) {
        self.runner.perform(GuestOp::Write { gpa: page * PAGE, data: vec![1; 8] });
    }

    /// Pages of the mapping that have been dirty, those still in KVM's logs included.
    fn dirty(&self) -> Vec<u64> {
        self.bits.collect(&self.memory);
        let state = self.bits.state();
        assert!(state.lost.is_empty(), "{:?}", state.lost);
        state.dirty.iter().copied().collect()
    }
}

#[test]
fn t08_growing_keeps_bits_and_new_memory_starts_clean() {
    for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
        let Some(mut logged) = logged(0, GIB, 2 * GIB) else { return };
        logged.write(7);
        let mut edit = logged.memory.edit();
        edit.grow(0, 2 * GIB).unwrap();
        edit.commit(&CommitOptions { prefer, ..FEW }).unwrap();
        assert_eq!(logged.dirty(), [7]);
        logged.write(300_000);
        assert_eq!(logged.dirty(), [7, 300_000], "the new half logs as the old one does");
    }
}

#[test]
fn t09_truncating_keeps_the_bits_of_what_goes() {
    let Some(mut logged) = logged(0, 2 * GIB, 2 * GIB) else { return };
    logged.write(5);
    logged.write(300_000);
    let mut edit = logged.memory.edit();
    edit.truncate(0, GIB).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(logged.dirty(), [5, 300_000]);
}

#[test]
fn t10_splitting_keeps_bits() {
    let Some(mut logged) = logged(0, GIB, GIB) else { return };
    for page in [5, 0xb0, 200_000] {
        logged.write(page);
    }
    let mut edit = logged.memory.edit();
    edit.punch_hole(0xa0 * PAGE, 0x20 * PAGE).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(logged.dirty(), [5, 0xb0, 200_000]);
    // Merged again, moved, and its log switched off and on.
    let mut edit = logged.memory.edit();
    edit.grow(0, 0xc0 * PAGE).unwrap().merge(0, GIB).unwrap();
    edit.commit(&FEW).unwrap();
    logged.write(6);
    let mut edit = logged.memory.edit();
    edit.move_to(0, GIB, 8 * GIB).unwrap();
    assert_eq!(steps(&edit.commit(&FEW).unwrap()).len(), 1);
    logged.write((8 * GIB) / PAGE + 9);
    let mut edit = logged.memory.edit();
    edit.set_flags(8 * GIB, GIB, SlotFlags::empty()).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(logged.dirty(), [5, 6, 9, 0xb0, 200_000]);
}

/// A writer in a slot of 16 GiB, out of which a GiB goes, and comes back: no bit is lost, and the writer sees nothing of it.
#[test]
fn a_hole_in_a_large_slot_under_a_writer() {
    // Above the memory that the guest itself needs.
    const BASE: u64 = 16 * GIB;
    let size = 16 * GIB;
    let Some(Logged { vm, memory, bits, mut runner }) = logged(BASE, size, size) else { return };
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    // Below the hole and above it.
    let pages: Vec<u64> =
        (0..64).map(|at| if at % 2 == 0 { at * 997 } else { (12 * GIB) / PAGE + at * 1009 }).collect();
    thread::scope(|scope| {
        let (done, rounds, pages, runner) = (&done, &rounds, &pages, &mut runner);
        let writer = scope.spawn(move || {
            while !done.load(Ordering::Acquire) {
                let round = rounds.load(Ordering::Acquire) + 1;
                for page in pages {
                    runner.perform(GuestOp::Write { gpa: BASE + page * PAGE, data: round.to_le_bytes().to_vec() });
                }
                rounds.store(round, Ordering::Release);
            }
            assert_eq!((runner.unexplained.len(), runner.completed), (0, 0), "the writer saw it");
        });
        // Also should this thread panic.
        let stop = Done(done);
        for _ in 0..5 {
            let before = rounds.load(Ordering::Acquire);
            while rounds.load(Ordering::Acquire) < before + 2 && !writer.is_finished() {
                thread::yield_now();
            }
            let mut edit = memory.edit();
            edit.name("delete (a), add (b) and (d)").unwrap().punch_hole(BASE + 8 * GIB, GIB).unwrap();
            let punched = edit.commit(&FEW).unwrap();
            assert_eq!(
                steps(&punched).iter().map(|(kind, _)| *kind).collect::<Vec<_>>(),
                ["delete", "create", "create"]
            );
            // Every page that has been written by now was dirty in the log that went.
            let written = rounds.load(Ordering::Acquire) > 0;
            assert!(written && pages.iter().all(|page| bits.state().dirty.contains(page)));
            bits.state().dirty.clear();
            let mut edit = memory.edit();
            edit.grow(BASE, 9 * GIB).unwrap().merge(BASE, size).unwrap();
            edit.commit(&FEW).unwrap();
        }
        drop(stop);
        writer.join().unwrap();
    });
    bits.collect(&memory);
    assert!(bits.state().lost.is_empty());
    assert_eq!(slots(&memory), [gfns(BASE / PAGE, (BASE + size) / PAGE)]);
    drop(vm);
}

/// The same with bare calls: a bit set after the last look is lost with its slot, and a guest that comes by in between finds a
/// device instead of memory, its write done and gone.
#[test]
fn with_bare_calls_bits_are_lost_and_writes_go_nowhere() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let memory: &'static SharedMemory = Box::leak(Box::new(SharedMemory::new(64 * PAGE).unwrap()));
    let set = |slot: u32, start: u64, pages: u64| {
        let region = MemoryRegion {
            slot,
            flags: SlotFlags::LOG_DIRTY.bits(),
            guest_phys_addr: start * PAGE,
            memory_size: pages * PAGE,
            userspace_addr: memory.hva() + start * PAGE,
            ..MemoryRegion::default()
        };
        // SAFETY: leaked memory for the guest.
        unsafe { vm.set_user_memory_region2(&region) }.unwrap();
    };
    let log = |slot: u32, pages: u64| vm.vm().get_dirty_log(slot, usize::try_from(pages * PAGE).unwrap()).unwrap()[0];
    set(0, 0, 64);
    let mut guest = KvmGuest::new(&vm, 0);
    guest.perform(GuestOp::Write { gpa: 5 * PAGE, data: vec![1; 8] });
    assert_eq!(log(0, 64), 1 << 5);
    // After the last look, before the slot goes.
    guest.perform(GuestOp::Write { gpa: 6 * PAGE, data: vec![2; 8] });
    set(0, 0, 0);
    // In between: KVM takes it for a device, and has retired the instruction when it says so.
    guest.start(GuestOp::Write { gpa: 7 * PAGE, data: vec![3; 8] });
    let mut lost = 0;
    loop {
        match guest.run().unwrap() {
            Exit::Halt => break,
            Exit::Mmio(Mmio::Write { gpa, data }) => {
                assert_eq!(gpa / PAGE, 7);
                lost += data.len();
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(lost, 8);
    set(0, 0, 32);
    set(1, 48, 16);
    let mut bytes = [0_u8; 8];
    memory.slice(6 * PAGE, 8).unwrap().copy_to(&mut bytes[..]);
    assert_eq!(bytes, [2; 8], "page 6 was written");
    assert_eq!(log(0, 32), 0, "and nobody will ever know");
    memory.slice(7 * PAGE, 8).unwrap().copy_to(&mut bytes[..]);
    assert_eq!(bytes, [0; 8], "page 7 was not");
    let _backing: &dyn SharedBacking = memory;
}
