//! The dirty log through the seam, nothing in between: when it comes and goes, what is in it, what takes pages out of it, and
//! in which order things are refused. The same scenarios on the software KVM and on the kernel's.
//!
//! The kernel counts a page as written once it can be written without a fault, so a guest that only reads a page which the
//! process can write makes it dirty. Where a scenario depends on that, it says so.

mod selftest_kit;

use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::hypervisor::{Cap, ClearDirtyLog, DirtyLog, Hypervisor, MemoryRegion, Platform, PreFaultMemory, Vcpu};
use cvm_memory_testkit::skip::require;
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use nix::errno::Errno;
use selftest_kit::*;

const GPA: u64 = 0xc000_0000;
const SLOT: u32 = 10;
/// Not a multiple of 64, so that the log has a word that is not full.
const PAGES: u64 = 200;
const WORDS: usize = 4;

const MANUAL_PROTECT: u64 = 1;
const INITIALLY_SET: u64 = 2;

struct Setup<M> {
    vm: M,
    ram: &'static SharedMemory,
    region: MemoryRegion,
}

/// Both kinds of VM. Memory is written before guests see it, so that it is writable at once.
fn setups<M: Machine>() -> Vec<Setup<M>> {
    let vms = [Platform::DEFAULT, Platform::SOFTWARE_PROTECTED].into_iter().filter_map(M::create);
    vms.map(|vm| {
        let ram = leaked(PAGES * PAGE);
        fill(ram, 0, PAGES * PAGE, 0x11);
        let region = plain_slot(SLOT, GPA, PAGES * PAGE, ram.hva());
        Setup { vm, ram, region }
    })
    .collect()
}

impl<M: Machine> Setup<M> {
    fn set_flags(&self, flags: u32) {
        set(&self.vm, &MemoryRegion { flags, ..self.region }).unwrap();
    }

    fn get(&self) -> Result<Vec<u64>, Errno> {
        get(&self.vm, SLOT, PAGES)
    }

    fn pages(&self) -> Vec<u64> {
        pages(&self.get().unwrap())
    }
}

fn get(vm: &dyn Hypervisor, slot: u32, pages: u64) -> Result<Vec<u64>, Errno> {
    let mut log = DirtyLog::for_pages(pages).unwrap();
    // What KVM does not write must not be taken for clean.
    log.words_mut().fill(0x5555_5555_5555_5555);
    vm.get_dirty_log(slot, &mut log)?;
    Ok(log.words().to_vec())
}

fn clear(vm: &dyn Hypervisor, first_page: u64, num_pages: u32, bitmap: &[u64]) -> Result<(), Errno> {
    vm.clear_dirty_log(&ClearDirtyLog { slot: SLOT, first_page, num_pages, bitmap })
}

/// The pages that have a bit.
fn pages(words: &[u64]) -> Vec<u64> {
    (0..words.len() as u64 * 64)
        .filter(|page| words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1)
        .collect()
}

fn write(guest: &mut impl Guest, page: u64) {
    assert_eq!(guest.perform(GuestOp::Fill { gpa: GPA + page * PAGE + 8, len: 1, byte: 0x22 }), Outcome::Done);
}

fn read(guest: &mut impl Guest, page: u64) {
    assert_eq!(guest.perform(GuestOp::Check { gpa: GPA + page * PAGE, len: 1, byte: 0x11 }), Outcome::Same);
}

/// Every write since the last look is there, once, and no other page.
fn each_look_tells_what_was_written_since<M: Machine>() {
    for setup in setups::<M>() {
        setup.set_flags(LOG_DIRTY);
        assert_eq!(setup.get(), Ok(vec![0; WORDS]));
        let mut guest = setup.vm.guest(0);
        for written in [vec![0], vec![63, 64, 127], vec![], (0..PAGES).step_by(3).collect(), vec![199], vec![199]] {
            written.iter().for_each(|page| write(&mut guest, *page));
            assert_eq!(setup.pages(), written);
            assert_eq!(setup.get(), Ok(vec![0; WORDS]));
        }
        // All are mapped by now, and those that were not written since cannot be written.
        for page in (0..PAGES).step_by(3) {
            read(&mut guest, page);
        }
        assert_eq!(setup.pages(), [0_u64; 0]);
        assert!(is_all(setup.ram, 8, 1, 0x22));
    }
}

/// A first touch makes a page writable if the process can write it, so it counts as written. Later reads do not.
///
/// Without two-dimensional paging, the guest's own page tables have a say in what is writable.
fn a_first_read_of_a_writable_page_counts<M: Machine>() {
    for setup in setups::<M>() {
        let Some(_) = require(&setup.vm, Cap::PRE_FAULT_MEMORY, 1) else { continue };
        setup.set_flags(LOG_DIRTY);
        let mut guest = setup.vm.guest(0);
        read(&mut guest, 7);
        assert_eq!(setup.pages(), [7]);
        read(&mut guest, 7);
        assert_eq!(setup.pages(), [0_u64; 0]);
        write(&mut guest, 7);
        assert_eq!(setup.pages(), [7]);
    }
}

/// What a guest could write before the log was wanted is not in it, until it is written again.
fn logging_starts_when_the_flag_is_set<M: Machine>() {
    for setup in setups::<M>() {
        setup.set_flags(0);
        let mut guest = setup.vm.guest(0);
        (0..10).for_each(|page| write(&mut guest, page));
        assert_eq!(setup.get(), Err(Errno::ENOENT));
        setup.set_flags(LOG_DIRTY);
        assert_eq!(setup.get(), Ok(vec![0; WORDS]));
        write(&mut guest, 5);
        assert_eq!(setup.pages(), [5]);
        // The log goes with the flag: what is in it then is lost.
        write(&mut guest, 6);
        setup.set_flags(0);
        assert_eq!(setup.get(), Err(Errno::ENOENT));
        setup.set_flags(LOG_DIRTY);
        assert_eq!(setup.get(), Ok(vec![0; WORDS]));
        write(&mut guest, 6);
        assert_eq!(setup.pages(), [6]);
    }
}

/// A move takes the log along, page by page of the slot; a deletion takes it away.
fn moved_and_deleted<M: Machine>() {
    for setup in setups::<M>() {
        setup.set_flags(LOG_DIRTY);
        let mut guest = setup.vm.guest(0);
        write(&mut guest, 3);
        let moved = MemoryRegion { guest_phys_addr: GPA + PAGE, flags: LOG_DIRTY, ..setup.region };
        set(&setup.vm, &moved).unwrap();
        // What was page 11 is at page 12's place now.
        write(&mut guest, 12);
        assert_eq!(setup.pages(), [3, 11]);
        write(&mut guest, 4);
        set(&setup.vm, &deletion(&moved)).unwrap();
        assert_eq!(setup.get(), Err(Errno::ENOENT));
        setup.set_flags(LOG_DIRTY);
        assert_eq!(setup.get(), Ok(vec![0; WORDS]));
        // A move without the flag is the end of the log, too.
        write(&mut guest, 4);
        set(&setup.vm, &MemoryRegion { flags: 0, ..moved }).unwrap();
        assert_eq!(setup.get(), Err(Errno::ENOENT));
    }
}

/// By hand: getting the log changes nothing, and what is cleared is what is in both masks.
fn cleared_by_hand<M: Machine>() {
    for setup in setups::<M>() {
        setup.vm.enable_cap(Cap::MANUAL_DIRTY_LOG_PROTECT2, [MANUAL_PROTECT, 0, 0, 0]).unwrap();
        setup.set_flags(LOG_DIRTY);
        let mut guest = setup.vm.guest(0);
        for page in [0, 1, 63, 64, 130, 199] {
            write(&mut guest, page);
        }
        for _ in 0..2 {
            assert_eq!(setup.pages(), [0, 1, 63, 64, 130, 199]);
        }
        // 2 has a bit in the mask only, 1 in the log only.
        clear(&setup.vm, 0, 64, &[1 | 1 << 2 | 1 << 63]).unwrap();
        assert_eq!(setup.pages(), [1, 64, 130, 199]);
        write(&mut guest, 0);
        read(&mut guest, 63);
        assert_eq!(setup.pages(), [0, 1, 64, 130, 199]);
        // The last word of the slot is not a whole one.
        clear(&setup.vm, 128, 72, &[u64::MAX; 2]).unwrap();
        assert_eq!(setup.pages(), [0, 1, 64]);
        clear(&setup.vm, 0, 200, &[u64::MAX; WORDS]).unwrap();
        assert_eq!(setup.get(), Ok(vec![0; WORDS]));
        for page in [0, 1, 63, 64, 130, 199] {
            write(&mut guest, page);
        }
        assert_eq!(setup.pages(), [0, 1, 63, 64, 130, 199]);

        // It can be given back at any time.
        setup.vm.enable_cap(Cap::MANUAL_DIRTY_LOG_PROTECT2, [0; 4]).unwrap();
        assert_eq!(setup.pages(), [0, 1, 63, 64, 130, 199]);
        assert_eq!(setup.get(), Ok(vec![0; WORDS]));
        // And clearing needs nothing to be enabled.
        write(&mut guest, 64);
        clear(&setup.vm, 64, 64, &[1]).unwrap();
        assert_eq!(setup.get(), Ok(vec![0; WORDS]));
    }
}

/// A new log can start with every page in it; then nothing is protected until it is cleared.
fn initially_set<M: Machine>() {
    for setup in setups::<M>() {
        setup.set_flags(0);
        let mut guest = setup.vm.guest(0);
        write(&mut guest, 9);
        setup.vm.enable_cap(Cap::MANUAL_DIRTY_LOG_PROTECT2, [MANUAL_PROTECT | INITIALLY_SET, 0, 0, 0]).unwrap();
        setup.set_flags(LOG_DIRTY);
        let all: Vec<u64> = (0..PAGES).collect();
        assert_eq!(setup.pages(), all);
        clear(&setup.vm, 0, 200, &[u64::MAX; WORDS]).unwrap();
        assert_eq!(setup.get(), Ok(vec![0; WORDS]));
        write(&mut guest, 9);
        assert_eq!(setup.pages(), [9]);
        // A log that exists is not set again.
        set(&setup.vm, &MemoryRegion { guest_phys_addr: GPA + PAGE, flags: LOG_DIRTY, ..setup.region }).unwrap();
        assert_eq!(setup.pages(), [9]);
    }
}

/// What the options may be.
fn options<M: Machine>() {
    for setup in setups::<M>() {
        assert_eq!(setup.vm.check_extension(Cap::MANUAL_DIRTY_LOG_PROTECT2), MANUAL_PROTECT | INITIALLY_SET);
        let enable = |value| setup.vm.enable_cap(Cap::MANUAL_DIRTY_LOG_PROTECT2, [value, 0, 0, 0]);
        for (value, answer) in [(0, true), (1, true), (2, false), (3, true), (4, false), (5, false), (1 << 63, false)] {
            assert_eq!(enable(value), if answer { Ok(()) } else { Err(Errno::EINVAL) }, "{value:#x}");
        }
    }
}

/// What is mapped ahead of use counts as written, if it can be; what is mapped already stays as it is.
fn mapped_ahead_of_use<M: Machine>() {
    for setup in setups::<M>() {
        let Some(_) = require(&setup.vm, Cap::PRE_FAULT_MEMORY, 1) else { continue };
        setup.set_flags(LOG_DIRTY);
        let mut guest = setup.vm.guest(0);
        let mut range = PreFaultMemory { gpa: GPA + 60 * PAGE, size: 10 * PAGE, flags: 0 };
        while range.size != 0 {
            guest.pre_fault_memory(&mut range).unwrap();
        }
        assert_eq!(setup.pages(), (60..70).collect::<Vec<_>>());
        let mut range = PreFaultMemory { gpa: GPA + 60 * PAGE, size: 10 * PAGE, flags: 0 };
        while range.size != 0 {
            guest.pre_fault_memory(&mut range).unwrap();
        }
        assert_eq!(setup.pages(), [0_u64; 0]);
        write(&mut guest, 65);
        assert_eq!(setup.pages(), [65]);
    }
}

/// Refusals of a look, in order.
fn looks_that_are_refused<M: Machine>() {
    for setup in setups::<M>() {
        let spaces = u32::try_from(setup.vm.check_extension(Cap::MULTI_ADDRESS_SPACE).max(1)).unwrap();
        let slots = u32::try_from(setup.vm.check_extension(Cap::NR_MEMSLOTS)).unwrap();
        for (slot, errno) in [
            (SLOT, Errno::ENOENT),
            (slots - 1, Errno::ENOENT),
            (slots, Errno::EINVAL),
            (0xffff, Errno::EINVAL),
            (spaces << 16 | SLOT, Errno::EINVAL),
            (0xffff << 16, Errno::EINVAL),
        ] {
            assert_eq!(get(&setup.vm, slot, PAGES), Err(errno), "{slot:#x}");
            // A page that cannot be comes before a slot that is not.
            let refused = |first_page| {
                let clear = ClearDirtyLog { slot, first_page, num_pages: 64, bitmap: &[0] };
                setup.vm.clear_dirty_log(&clear)
            };
            assert_eq!(refused(0), Err(errno), "{slot:#x}");
            assert_eq!(refused(1), Err(Errno::EINVAL), "{slot:#x}");
        }
        if spaces > 1 {
            assert_eq!(get(&setup.vm, 1 << 16 | SLOT, PAGES), Err(Errno::ENOENT));
        }
        setup.set_flags(0);
        assert_eq!(setup.get(), Err(Errno::ENOENT));
        assert_eq!(clear(&setup.vm, 0, 64, &[0]), Err(Errno::ENOENT));
    }
}

/// What can be cleared: whole words, but at the end of the slot.
fn clears_that_are_refused<M: Machine>() {
    for setup in setups::<M>() {
        setup.set_flags(LOG_DIRTY);
        let zeros = [0; 8];
        for (first, pages, answer) in [
            (0, 0, Ok(())),
            (0, 64, Ok(())),
            (0, 128, Ok(())),
            (64, 64, Ok(())),
            (0, 200, Ok(())),
            (192, 8, Ok(())),
            (192, 0, Ok(())),
            (1, 64, Err(Errno::EINVAL)),
            (63, 1, Err(Errno::EINVAL)),
            (0, 1, Err(Errno::EINVAL)),
            (0, 65, Err(Errno::EINVAL)),
            (0, 199, Err(Errno::EINVAL)),
            (192, 7, Err(Errno::EINVAL)),
            (192, 9, Err(Errno::EINVAL)),
            (192, 64, Err(Errno::EINVAL)),
            (256, 0, Err(Errno::EINVAL)),
            (256, 64, Err(Errno::EINVAL)),
            (u64::MAX - 63, 64, Err(Errno::EINVAL)),
        ] {
            assert_eq!(clear(&setup.vm, first, pages, &zeros), answer, "{first:#x}, {pages}");
        }
        // A mask that is too short is not read at all.
        assert_eq!(clear(&setup.vm, 0, 65, &zeros[..1]), Err(Errno::EFAULT));
        assert_eq!(clear(&setup.vm, 0, u32::MAX, &zeros), Err(Errno::EFAULT));
    }
}

/// R01. One page is one word, 65 are two; a slot that is longer than the log is an error, and nothing is overrun.
fn r01_sizes<M: Machine>() {
    for setup in setups::<M>() {
        let mut guest = setup.vm.guest(0);
        for (slot_pages, log_pages, fits) in [
            (1, 1, true),
            (64, 1, true),
            (64, 64, true),
            (65, 65, true),
            (65, 64, false),
            (200, 1, false),
            (1, 65, true),
        ] {
            let region = MemoryRegion { flags: LOG_DIRTY, memory_size: slot_pages * PAGE, ..setup.region };
            set(&setup.vm, &region).unwrap();
            write(&mut guest, slot_pages - 1);
            let answer = get(&setup.vm, SLOT, log_pages);
            if fits {
                let words = answer.unwrap();
                let (of_slot, beyond) = words.split_at(usize::try_from(slot_pages.div_ceil(64)).unwrap());
                assert_eq!(pages(of_slot), [slot_pages - 1]);
                assert!(beyond.iter().all(|word| *word == 0x5555_5555_5555_5555), "left alone");
            } else {
                assert_eq!(answer, Err(Errno::EFAULT), "{slot_pages}, {log_pages}");
                // KVM had cleared it by then.
                assert_eq!(pages(&get(&setup.vm, SLOT, slot_pages).unwrap()), [0_u64; 0]);
            }
            set(&setup.vm, &deletion(&region)).unwrap();
        }
    }
}

on_both_machines!(
    each_look_tells_what_was_written_since,
    a_first_read_of_a_writable_page_counts,
    logging_starts_when_the_flag_is_set,
    moved_and_deleted,
    cleared_by_hand,
    initially_set,
    options,
    mapped_ahead_of_use,
    looks_that_are_refused,
    clears_that_are_refused,
    r01_sizes,
);
