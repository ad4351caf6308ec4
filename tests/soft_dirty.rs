//! The dirty log of the software KVM, where it cannot be held against the kernel's in the same scenario: KVM's own writes, the
//! counters, races of guests with whoever looks. What both have is in `selftest_dirty_log.rs`.

mod soft_kit;

use std::thread;

use cvm_memory::dirty::{DirtyRings, Owners};
use cvm_memory::hypervisor::{Cap, ClearDirtyLog, DirtyLog, Exit, Hypervisor, MemoryRegion, PreFaultMemory, Vcpu};
use cvm_memory::layout::SlotId;
use cvm_memory::soft::{OpResult, SoftVm};
use nix::errno::Errno;
use soft_kit::*;

const GPA: u64 = 0x10_0000;

fn logged(pages: u64) -> (SoftVm, Ram, MemoryRegion) {
    let vm = SoftVm::default_type();
    let ram = Ram::new(pages);
    let region = MemoryRegion { flags: LOG_DIRTY, ..shared_slot(3, GPA, pages * PAGE, ram.hva()) };
    set_region(&vm, &region).unwrap();
    (vm, ram, region)
}

fn get(vm: &SoftVm, slot: u32, pages: u64) -> Result<Vec<u64>, Errno> {
    let mut log = DirtyLog::for_pages(pages).unwrap();
    vm.get_dirty_log(slot, &mut log).map(|()| log.words().to_vec())
}

/// What KVM itself writes is logged, page by page, whether a vCPU has the page mapped or not.
#[test]
fn writes_by_kvm_itself() {
    let (vm, ram, region) = logged(8);
    vm.write_guest(GPA + PAGE - 2, &[1, 2, 3]).unwrap();
    assert_eq!((ram.byte(PAGE - 1), ram.byte(PAGE)), (2, 3));
    assert_eq!(get(&vm, 3, 8), Ok(vec![0b11]));
    assert_eq!(vm.write_guest(GPA + 8 * PAGE - 1, &[4, 4]), Err(Errno::EFAULT), "half of it is beyond the slot");
    assert_eq!(ram.byte(8 * PAGE - 1), 4);
    assert_eq!(get(&vm, 3, 8), Ok(vec![1 << 7]));
    assert_eq!(vm.write_guest(u64::MAX, &[4, 4]), Err(Errno::EFAULT));
    set_region(&vm, &delete(3)).unwrap();
    set_region(&vm, &MemoryRegion { flags: LOG_DIRTY | READONLY, ..region }).unwrap();
    assert_eq!(vm.write_guest(GPA, &[5]), Err(Errno::EFAULT));
    assert_eq!(get(&vm, 3, 8), Ok(vec![0]));
}

/// A read-only slot may have a log; no guest gets anything into it.
#[test]
fn a_read_only_slot_stays_clean() {
    let (vm, _, region) = logged(8);
    set_region(&vm, &delete(3)).unwrap();
    set_region(&vm, &MemoryRegion { flags: LOG_DIRTY | READONLY, ..region }).unwrap();
    let mut vcpu = vm.create_vcpu();
    assert_eq!(finish(&mut vcpu, check(GPA, 8 * PAGE, 0, false)), OpResult::Done);
    vcpu.start(fill(GPA, 1, 1, false));
    assert!(matches!(vcpu.run(), Ok(cvm_memory::hypervisor::Exit::Mmio(_))));
    assert_eq!(get(&vm, 3, 8), Ok(vec![0]));
}

/// Each address space has slots of its own, and so has each slot a log.
#[test]
fn slots_of_another_address_space() {
    let (vm, ram, region) = logged(8);
    let other = MemoryRegion { slot: 1 << 16 | 3, ..region };
    set_region(&vm, &other).unwrap();
    let mut vcpu = vm.create_vcpu();
    finish(&mut vcpu, fill(GPA + PAGE, 1, 1, false));
    assert_eq!(ram.byte(PAGE), 1);
    assert_eq!(get(&vm, 1 << 16 | 3, 8), Ok(vec![0]));
    assert_eq!(get(&vm, 3, 8), Ok(vec![0b10]));
    // Clearing the other's log protects nothing here.
    finish(&mut vcpu, fill(GPA + PAGE, 1, 1, false));
    let clear = ClearDirtyLog { slot: 1 << 16 | 3, first_page: 0, num_pages: 8, bitmap: &[0xff] };
    vm.clear_dirty_log(&clear).unwrap();
    assert_eq!(get(&vm, 3, 8), Ok(vec![0b10]));
}

/// Calls are counted, and a VM that is dead answers none.
#[test]
fn counted_and_dead() {
    let (vm, ..) = logged(8);
    let before = vm.counters();
    get(&vm, 3, 8).unwrap();
    assert_eq!(vm.clear_dirty_log(&ClearDirtyLog { slot: 3, first_page: 0, num_pages: 8, bitmap: &[0] }), Ok(()));
    assert_eq!(vm.reset_dirty_rings(), Err(Errno::EINVAL), "there are none");
    let since = vm.counters().since(&before);
    assert_eq!((since.get_dirty_log, since.clear_dirty_log, since.reset_dirty_rings), (1, 1, 1));
    vm.kill();
    assert_eq!(get(&vm, 3, 8), Err(Errno::EIO));
    assert_eq!(
        vm.clear_dirty_log(&ClearDirtyLog { slot: 3, first_page: 0, num_pages: 8, bitmap: &[0] }),
        Err(Errno::EIO)
    );
    assert_eq!(vm.reset_dirty_rings(), Err(Errno::EIO));
}

/// Mapping ahead of use does not look whether the ring is full: beyond its last entry, pages are lost, and that can be told.
#[test]
fn prefaulting_overruns_a_ring() {
    struct All;
    impl Owners for All {
        fn owner(&self, _: SlotId) -> Option<(u64, u64)> {
            Some((0, 600))
        }
    }
    for pages in [255, 256, 257, 600] {
        let vm = SoftVm::default_type();
        vm.enable_cap(Cap::DIRTY_LOG_RING, [4096, 0, 0, 0]).unwrap();
        let ram = Ram::new(600);
        set_region(&vm, &MemoryRegion { flags: LOG_DIRTY, ..shared_slot(3, GPA, 600 * PAGE, ram.hva()) }).unwrap();
        let mut vcpu = vm.create_vcpu();
        let mut rings = DirtyRings::new();
        rings.add(vcpu.dirty_ring(4096).unwrap());
        vcpu.pre_fault_memory(&mut PreFaultMemory { gpa: GPA, size: pages * PAGE, flags: 0 }).unwrap();
        assert_eq!(vm.lost_dirty_pages(), pages.saturating_sub(256));
        let harvested = rings.harvest(&All).reset(&vm).unwrap();
        assert_eq!(harvested.overrun(), pages >= 256);
        let seen: u64 = harvested.runs().map(|run| run.pages).sum();
        assert_eq!(seen, pages.min(256));
        // Nothing helps a vCPU whose ring was overrun by far: KVM waits for entries that are nowhere.
        vcpu.start(fill(GPA, 1, 1, false));
        let stuck = matches!(vcpu.run(), Ok(Exit::DirtyRingFull));
        assert_eq!(stuck, pages == 600);
    }
}

/// Rings that a log backs: a vCPU's writes are in its ring, all others in the log. Only where KVM offers it, and in order.
#[test]
fn rings_backed_by_a_log() {
    let backed = Cap::DIRTY_LOG_RING_WITH_BITMAP;
    for order in 0..3 {
        let vm = backed_vm();
        assert_eq!(vm.check_extension(backed), 1);
        assert_eq!(vm.enable_cap(backed, [0; 4]), Err(Errno::EINVAL), "no ring yet");
        let ram = Ram::new(8);
        let slot = MemoryRegion { flags: LOG_DIRTY, ..shared_slot(3, GPA, 8 * PAGE, ram.hva()) };
        if order == 1 {
            set_region(&vm, &slot).unwrap();
        }
        vm.enable_cap(Cap::DIRTY_LOG_RING, [4096, 0, 0, 0]).unwrap();
        if order == 2 {
            set_region(&vm, &slot).unwrap();
        }
        if order > 0 {
            assert_eq!(vm.enable_cap(backed, [0; 4]), Err(Errno::EINVAL), "there is a slot");
            vm.write_guest(GPA, &[1]).unwrap();
            assert_eq!(vm.lost_dirty_pages(), u64::from(order == 2));
            continue;
        }
        vm.enable_cap(backed, [0; 4]).unwrap();
        set_region(&vm, &slot).unwrap();
        let mut vcpu = vm.create_vcpu();
        finish(&mut vcpu, fill(GPA + PAGE, 1, 1, false));
        vm.write_guest(GPA + 2 * PAGE, &[1]).unwrap();
        assert_eq!(get(&vm, 3, 8), Ok(vec![0b100]));
        let ring = vcpu.dirty_ring(4096).unwrap();
        assert_eq!((ring.entries()[0].flags(), ring.entries()[0].page()), (1, (3, 1)));
        assert_eq!((ring.entries()[1].flags(), vm.lost_dirty_pages()), (0, 0));
    }
}

/// Whoever copies pages as the log says ends up with the guest's memory, however the guest's writes and the looks fall.
/// Cleared by the look itself, and by hand, where the bits are cleared before the pages are copied.
#[test]
fn a_copy_that_follows_the_log_is_the_memory() {
    const PAGES: u64 = 70;
    for manual in [0, 1, 3] {
        let vm = SoftVm::default_type();
        vm.enable_cap(Cap::MANUAL_DIRTY_LOG_PROTECT2, [manual, 0, 0, 0]).unwrap();
        let ram = Ram::new(PAGES);
        let region = MemoryRegion { flags: LOG_DIRTY, ..shared_slot(3, GPA, PAGES * PAGE, ram.hva()) };
        set_region(&vm, &region).unwrap();
        let mut copy = vec![0_u8; usize::try_from(PAGES).unwrap()];
        let mut round = || {
            let words = get(&vm, 3, PAGES).unwrap();
            if manual != 0 {
                let clear = ClearDirtyLog { slot: 3, first_page: 0, num_pages: 70, bitmap: &words };
                vm.clear_dirty_log(&clear).unwrap();
            }
            for (page, to) in copy.iter_mut().enumerate() {
                if words[page / 64] >> (page % 64) & 1 == 1 {
                    *to = ram.byte(page as u64 * PAGE);
                }
            }
        };
        thread::scope(|scope| {
            let guests = [0, 1].map(|id| {
                let mut vcpu = vm.create_vcpu();
                scope.spawn(move || {
                    let mut at = id;
                    for value in 0..4000_u64 {
                        at = (at * 31 + 7) % PAGES;
                        finish(&mut vcpu, fill(GPA + at * PAGE, 1, (value % 251) as u8 + 1, false));
                    }
                })
            });
            while guests.iter().any(|guest| !guest.is_finished()) {
                round();
            }
        });
        round();
        let memory: Vec<u8> = (0..PAGES).map(|page| ram.byte(page * PAGE)).collect();
        assert_eq!(copy, memory, "options {manual}");
    }
}
