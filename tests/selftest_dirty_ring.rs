//! Dirty rings through the seam: how they are enabled and mapped, what gets into them, how they fill up, and that nothing is
//! lost on the way out. The same scenarios on the software KVM and on the kernel's.

mod selftest_kit;

use std::collections::BTreeSet;

use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::dirty::{DirtyRings, MIN_RING_BYTES_HARDWARE_LOG, OwnerRun, Owners, RingStats};
use cvm_memory::hypervisor::{Cap, ClearDirtyLog, DirtyLog, Exit, Hypervisor, MemoryRegion, Platform, Vcpu};
use cvm_memory::layout::SlotId;
use cvm_memory_testkit::skip::require;
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use nix::errno::Errno;
use selftest_kit::*;

const GPA: u64 = 0xc000_0000;
const SLOT: u32 = 10;
const PAGES: u64 = 2048;
const RING: Cap = Cap::DIRTY_LOG_RING_ACQ_REL;
/// Entries that are kept free, and those that a processor keeps for itself.
const RESERVED: u64 = 64;
const HARDWARE_LOG: u64 = 512;

fn enable(vm: &dyn Hypervisor, bytes: u64) -> Result<(), Errno> {
    vm.enable_cap(RING, [bytes, 0, 0, 0])
}

/// A VM of either kind that offers rings, or a skip.
fn vms<M: Machine>() -> Vec<M> {
    let vms = [Platform::DEFAULT, Platform::SOFTWARE_PROTECTED].into_iter().filter_map(M::create);
    vms.filter(|vm| require(vm, RING, 1 << 20).is_some()).collect()
}

/// The smallest ring that the machine will have.
fn smallest<M: Machine>() -> u64 {
    vms::<M>().first().map_or(0, |vm| if enable(vm, 4096).is_ok() { 4096 } else { MIN_RING_BYTES_HARDWARE_LOG })
}

/// One slot, whoever asks.
struct OneSlot;

impl Owners for OneSlot {
    fn owner(&self, slot: SlotId) -> Option<(u64, u64)> {
        (slot.raw() == SLOT).then_some((1, PAGES))
    }
}

struct Setup<M: Machine> {
    vm: M,
    ram: &'static SharedMemory,
    region: MemoryRegion,
    rings: DirtyRings,
    bytes: u64,
}

/// VMs with rings of that size.
fn setups<M: Machine>(bytes: u64) -> Vec<Setup<M>> {
    let set_up = |vm: M| {
        enable(&vm, bytes).unwrap();
        let ram = leaked(PAGES * PAGE);
        fill(ram, 0, PAGES * PAGE, 0x11);
        let region = MemoryRegion { flags: LOG_DIRTY, ..plain_slot(SLOT, GPA, PAGES * PAGE, ram.hva()) };
        set(&vm, &region).unwrap();
        Setup { vm, ram, region, rings: DirtyRings::new(), bytes }
    };
    vms().into_iter().map(set_up).collect()
}

impl<M: Machine> Setup<M> {
    fn guest(&mut self, id: u64) -> M::Guest {
        let guest = self.vm.guest(id);
        self.rings.add(guest.dirty_ring(u32::try_from(self.bytes).unwrap()).unwrap());
        guest
    }

    /// Pages since the last time, and that none of them comes twice.
    fn pages(&mut self) -> BTreeSet<u64> {
        let harvest = self.rings.harvest(&OneSlot);
        let entries = harvest.entries();
        let runs = harvest.reset(&self.vm).unwrap().runs().collect::<Vec<_>>();
        assert_eq!(runs.iter().map(|run| run.pages).sum::<u64>(), entries);
        pages(&runs)
    }
}

fn pages(runs: &[OwnerRun]) -> BTreeSet<u64> {
    runs.iter().flat_map(|run| run.first..run.first + run.pages).collect()
}

fn write(guest: &mut impl Guest, page: u64) {
    let op = GuestOp::Fill { gpa: GPA + page * PAGE + 8, len: 1, byte: 0x22 };
    assert_eq!(guest.perform(op), Outcome::Done);
}

/// Sizes, once, before any vCPU.
fn enabled_once_and_in_time<M: Machine>() {
    for vm in vms::<M>() {
        assert_eq!(vm.check_extension(Cap::DIRTY_LOG_RING), vm.check_extension(RING));
        assert_eq!(vm.reset_dirty_rings(), Err(Errno::EINVAL));
        for bytes in [0, 1, 2048, 4097, 12288, 1 << 32, (1 << 20) + 4096] {
            assert_eq!(enable(&vm, bytes), Err(Errno::EINVAL), "{bytes:#x}");
        }
        assert_eq!(enable(&vm, 2 << 20), Err(Errno::E2BIG));
        assert_eq!(enable(&vm, 1 << 31), Err(Errno::E2BIG));
        // The upper half is not looked at.
        assert_eq!(enable(&vm, (7 << 32) | 65536), Ok(()));
        assert_eq!(enable(&vm, 65536), Err(Errno::EINVAL), "once only");
        assert_eq!(vm.enable_cap(Cap::DIRTY_LOG_RING, [65536, 0, 0, 0]), Err(Errno::EINVAL));
        assert_eq!(vm.reset_dirty_rings(), Ok(0));
    }
    for vm in vms::<M>() {
        let _guest = vm.guest(0);
        assert_eq!(enable(&vm, 65536), Err(Errno::EINVAL), "too late");
    }
}

/// Where there are rings there are no logs, and no log beside the rings on these machines.
fn no_logs_beside_rings<M: Machine>() {
    for setup in setups::<M>(65536) {
        let vm = &setup.vm;
        for slot in [SLOT, SLOT + 1, u32::MAX] {
            assert_eq!(vm.get_dirty_log(slot, &mut DirtyLog::for_pages(PAGES).unwrap()), Err(Errno::ENXIO));
            let clear = ClearDirtyLog { slot, first_page: 1, num_pages: 64, bitmap: &[0] };
            assert_eq!(vm.clear_dirty_log(&clear), Err(Errno::ENXIO));
        }
        assert_eq!(vm.check_extension(Cap::DIRTY_LOG_RING_WITH_BITMAP), 0);
        assert_eq!(vm.enable_cap(Cap::DIRTY_LOG_RING_WITH_BITMAP, [0; 4]), Err(Errno::EINVAL));
    }
}

/// The mapping has the size of the ring, or is not to be had.
fn mapped_whole_or_not_at_all<M: Machine>() {
    for setup in setups::<M>(65536) {
        let guest = setup.vm.guest(0);
        for bytes in [0, 1, 16, 4096, 32768, 65535, 65537, 131_072, 1 << 20, 1 << 31, u32::MAX] {
            assert_eq!(guest.dirty_ring(bytes).map(drop), Err(Errno::EINVAL), "{bytes:#x}");
        }
        let ring = guest.dirty_ring(65536).unwrap();
        assert_eq!(ring.entries().len(), 4096);
        assert!(ring.entries().iter().all(|entry| entry.flags() == 0));
        drop(guest);
        // It outlives the vCPU.
        assert!(ring.entries().iter().all(|entry| entry.flags() == 0));
    }
    for vm in vms::<M>() {
        assert_eq!(vm.guest(0).dirty_ring(65536).map(drop), Err(Errno::EINVAL), "not enabled");
    }
}

/// A page is in the ring once, until it was harvested and reset; then it can be in it again.
fn a_page_is_in_it_once_until_reset<M: Machine>() {
    for mut setup in setups::<M>(65536) {
        let mut guest = setup.guest(0);
        for page in [3, 4, 5, 100, 3, 4] {
            write(&mut guest, page);
        }
        assert_eq!(setup.pages(), BTreeSet::from([3, 4, 5, 100]));
        assert_eq!(setup.pages(), BTreeSet::new());
        write(&mut guest, 5);
        assert_eq!(setup.pages(), BTreeSet::from([5]));
        // Harvested and not reset: not protected, so what is written now is not told again...
        write(&mut guest, 6);
        let _ = setup.rings.harvest(&OneSlot);
        write(&mut guest, 6);
        // ... but is before whoever waits for the reset.
        assert_eq!(setup.pages(), BTreeSet::from([6]));
        assert!(is_all(setup.ram, 6 * PAGE + 8, 1, 0x22));
        assert_eq!(setup.rings.stats().strays, 0);
    }
}

/// A vCPU leaves when its ring is nearly full, and enters no more until entries were harvested and reset.
///
/// One byte per page: a string instruction that KVM emulates, as it may without two-dimensional paging, makes an entry per
/// byte, up to 1024 of them before it looks whether the ring is full.
fn full<M: Machine>() {
    for mut setup in setups::<M>(smallest::<M>()) {
        let mut guest = setup.guest(0);
        let size = setup.bytes / 16;
        let limits = [size - RESERVED, size.saturating_sub(RESERVED + HARDWARE_LOG)];
        let mut seen = BTreeSet::new();
        let mut fulls = 0;
        let mut stubborn = 0;
        let mut handle = |exit: Exit<'_>| {
            assert!(matches!(exit, Exit::DirtyRingFull), "{exit:?}");
            // Run again for nothing, then harvested for nothing, then reset.
            stubborn += 1;
            match stubborn % 3 {
                1 => {}
                2 => {
                    let entries = setup.rings.harvest(&OneSlot).entries();
                    assert!(limits.contains(&entries), "{entries}");
                }
                _ => {
                    fulls += 1;
                    seen.extend(setup.pages());
                }
            }
        };
        for page in 0..PAGES {
            let op = GuestOp::Fill { gpa: GPA + page * PAGE, len: 1, byte: 0x33 };
            assert_eq!(guest.complete(op, &mut handle), Outcome::Done);
        }
        seen.extend(setup.pages());
        assert_eq!(seen, (0..PAGES).collect());
        assert!(fulls >= PAGES / size, "{fulls}");
        assert!((0..PAGES).all(|page| is_all(setup.ram, page * PAGE, 1, 0x33)));
        let RingStats { entries, size, .. } = setup.rings.stats();
        assert!(entries >= PAGES, "{entries}: the index has gone round {} times", entries / u64::from(size));
    }
}

/// Two vCPUs have a ring each, and a reset is for all of them.
fn two_vcpus<M: Machine>() {
    for mut setup in setups::<M>(65536) {
        let mut guests = [setup.guest(0), setup.guest(1)];
        write(&mut guests[0], 1);
        write(&mut guests[1], 2);
        assert_eq!(setup.pages(), BTreeSet::from([1, 2]));
        write(&mut guests[1], 1);
        write(&mut guests[0], 1);
        assert_eq!(setup.pages(), BTreeSet::from([1]));
    }
}

/// Entries of a slot that has gone are taken back like all others.
fn reset_after_the_slot_has_gone<M: Machine>() {
    for mut setup in setups::<M>(65536) {
        let mut guest = setup.guest(0);
        for page in [1, 2, 2000] {
            write(&mut guest, page);
        }
        set(&setup.vm, &deletion(&setup.region)).unwrap();
        let shorter = MemoryRegion { memory_size: 64 * PAGE, ..setup.region };
        set(&setup.vm, &shorter).unwrap();
        assert_eq!(setup.pages(), BTreeSet::from([1, 2, 2000]));
        write(&mut guest, 2);
        assert_eq!(setup.pages(), BTreeSet::from([2]));
    }
}

/// The flag of the slot decides, with rings as with logs.
fn only_slots_that_are_logged<M: Machine>() {
    for mut setup in setups::<M>(65536) {
        let mut guest = setup.guest(0);
        set(&setup.vm, &MemoryRegion { flags: 0, ..setup.region }).unwrap();
        write(&mut guest, 1);
        assert_eq!(setup.pages(), BTreeSet::new());
        set(&setup.vm, &setup.region).unwrap();
        write(&mut guest, 1);
        assert_eq!(setup.pages(), BTreeSet::from([1]));
    }
}

on_both_machines!(
    enabled_once_and_in_time,
    no_logs_beside_rings,
    mapped_whole_or_not_at_all,
    a_page_is_in_it_once_until_reset,
    full,
    two_vcpus,
    reset_after_the_slot_has_gone,
    only_slots_that_are_logged,
);
