//! Conversions through real calls: patterns of the kernel's private_mem_conversions_test, and what a change
//! unmaps and holds back.

mod soft_kit;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use cvm_memory::hypervisor::{Hypervisor, MemoryAttributes, Vcpu};
use cvm_memory::layout::SlotId;
use cvm_memory::soft::attributes::{Flavour, Level};
use cvm_memory::soft::{Event, OpResult, SoftVm};
use nix::errno::Errno;
use soft_kit::*;

const SIZE: u64 = (2 << 20) + PAGE;
const BASE: u64 = 4 << 30;

/// private_mem_conversions_test: 2 MiB + 4 KiB at 4 GiB, in one slot and in several.
#[test]
fn selftest_patterns() {
    let ranges = [(0, PAGE), (0, 2 << 20), (PAGE, PAGE), (PAGE, 2 << 20), (2 << 20, PAGE)];
    for (slots, allocate) in [(1, false), (1, true), (3, false)] {
        let vm = SoftVm::software_protected();
        let file = vm.create_guest_memfd(SIZE, 0).unwrap();
        let ram = Ram::new(SIZE / PAGE);
        let step = (SIZE / PAGE / slots) * PAGE;
        for n in 0..slots {
            let size = if n == slots - 1 { SIZE - n * step } else { step };
            let region =
                gmem_slot(u32::try_from(n).unwrap(), BASE + n * step, size, ram.hva() + n * step, &file, n * step);
            set_region(&vm, &region).unwrap();
        }
        let mut vcpu = vm.create_vcpu();
        let mut go = |op| assert_eq!(finish(&mut vcpu, op), OpResult::Done);
        for (offset, len) in ranges {
            let (gpa, end) = (BASE + offset, BASE + offset + len);
            // Shared by default, and seen by both sides.
            go(fill(BASE, SIZE, 0x11, false));
            assert!(ram.is_all(0..SIZE, 0x11));
            // To private: what was there is not there, what is around stays, the host still sees its own.
            set_private(&vm, gpa, len, true);
            if allocate {
                file.allocate(file_pages(offset / PAGE, (offset + len) / PAGE)).unwrap();
            }
            go(check(gpa, len, 0, true));
            go(fill(gpa, len, 0xcc, true));
            go(check(BASE, offset, 0x11, false));
            go(check(end, BASE + SIZE - end, 0x11, false));
            assert!(ram.is_all(0..SIZE, 0x11));
            // Odd pages back to shared, inside the private range.
            for odd in (gpa..end).step_by(8192).map(|page| page + PAGE).filter(|page| *page < end) {
                set_private(&vm, odd, PAGE, false);
                go(check(odd, PAGE, 0x11, false));
                go(fill(odd, PAGE, 0x22, false));
                go(check(odd - PAGE, PAGE, 0xcc, true));
                assert!(ram.is_all(odd - BASE..odd - BASE + PAGE, 0x22));
            }
            // All back; private memory was not freed by that, and is by a hole.
            set_private(&vm, gpa, len, false);
            go(check(gpa, PAGE, 0x11, false));
            set_private(&vm, gpa, PAGE, true);
            go(check(gpa, PAGE, 0xcc, true));
            set_private(&vm, gpa, PAGE, false);
            file.punch_hole(file_pages(offset / PAGE, (offset + len) / PAGE)).unwrap();
            set_private(&vm, gpa, len, true);
            go(check(gpa, len, 0, true));
            set_private(&vm, gpa, len, false);
            file.punch_hole(file.pages()).unwrap();
        }
    }
}

#[test]
fn arguments() {
    let call = |vm: &SoftVm, address, size, attributes, flags| {
        vm.set_memory_attributes(&MemoryAttributes { address, size, attributes, flags })
    };
    let vm = SoftVm::software_protected();
    for bit in (0..64).filter(|bit| *bit != 3) {
        assert_eq!(call(&vm, 0, PAGE, 1 << bit, 0), Err(Errno::EINVAL));
        assert_eq!(call(&vm, 0, PAGE, 8, 1 << bit), Err(Errno::EINVAL));
    }
    for (address, size) in [(0, 0), (1, PAGE), (0, 1), (!(PAGE - 1), PAGE), (PAGE, 0_u64.wrapping_sub(PAGE))] {
        assert_eq!(call(&vm, address, size, 8, 0), Err(Errno::EINVAL));
    }
    // Neither slots nor address limits are looked at.
    assert_eq!(call(&vm, 0, !(PAGE - 1), 8, 0), Ok(()));
    assert_eq!(vm.private_gfns(), [gfns(0, u64::MAX >> 12)]);
    // Without private memory, only "no attributes" is legal, and changes nothing.
    let plain = SoftVm::default_type();
    assert_eq!(call(&plain, 0, PAGE, 8, 0), Err(Errno::EINVAL));
    assert_eq!(call(&plain, 0, PAGE, 0, 0), Ok(()));
    assert_eq!(call(&plain, 0, 1, 0, 0), Err(Errno::EINVAL));
}

/// A change is clipped per slot, the hull covers what lies between, a change to what is already so is nothing at all.
#[test]
fn what_a_change_unmaps() {
    let vm = SoftVm::software_protected();
    let ram = Ram::new(0x20);
    set_region(&vm, &shared_slot(0, 0x10 * PAGE, 0x10 * PAGE, ram.hva())).unwrap();
    set_region(&vm, &shared_slot(1, 0x1000 * PAGE, 0x10 * PAGE, ram.hva() + 0x10 * PAGE)).unwrap();
    let mut vcpu = vm.create_vcpu();
    finish(&mut vcpu, fill(0x10 * PAGE, 0x10 * PAGE, 1, false));
    finish(&mut vcpu, fill(0x1000 * PAGE, 0x10 * PAGE, 1, false));
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&events);
    vm.observe(move |event| log.lock().unwrap().push(*event));
    let take = || std::mem::take(&mut *events.lock().unwrap());

    set_private(&vm, 0x18 * PAGE, (0x1008 - 0x18) * PAGE, true);
    let unmapped: Vec<_> = take()
        .into_iter()
        .filter_map(|event| match event {
            Event::Unmapped { gfns, flavour: Flavour::Shared, .. } => Some(gfns),
            _ => None,
        })
        .collect();
    assert_eq!(unmapped.len(), 2);
    assert!(unmapped.contains(&gfns(0x18, 0x20)) && unmapped.contains(&gfns(0x1000, 0x1008)));
    assert_eq!(mapped(&vm), [gfns(0x10, 0x18), gfns(0x1008, 0x1010)]);
    assert_eq!(vm.invalidate_seq(), 1);

    set_private(&vm, 0x18 * PAGE, 8 * PAGE, true);
    assert_eq!((take(), vm.invalidate_seq()), (vec![], 1), "no change");
    set_private(&vm, 0x8000 * PAGE, PAGE, true);
    assert_eq!((take(), vm.invalidate_seq()), (vec![], 1), "no slot");
}

/// Until the new attribute is stored, the huge page around a change is not mapped, though its frames do not change.
#[test]
fn hull_and_mixed_flags_of_a_slot() {
    let vm = SoftVm::software_protected();
    let ram = Ram::new(1024);
    set_private(&vm, 0x200 * PAGE, PAGE, true);
    set_region(&vm, &shared_slot(0, 0, 1024 * PAGE, ram.hva())).unwrap();
    let mixed = |level| vm.mixed(SlotId::new(0)).unwrap().blocks(level);
    assert_eq!(mixed(Level::M2), [gfn(0x200)], "computed when the slot is created");

    let inner = vm.clone();
    let (outside, waiting) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(None)));
    let (count, handle) = (Arc::clone(&outside), Arc::clone(&waiting));
    vm.observe(move |event| {
        let Event::Unmapped { gfns: unmapped, hull, .. } = event else { return };
        assert_eq!((*unmapped, *hull), (gfns(3, 4), gfns(0, 0x200)));
        assert_eq!(inner.invalidate_in_progress(), (1, gfns(0, 0x200)));
        // Outside the hull, a fault is served meanwhile.
        let mut vcpu = inner.create_vcpu();
        assert_eq!(finish(&mut vcpu, fill(0x300 * PAGE, 1, 1, false)), OpResult::Done);
        count.fetch_add(1, Ordering::SeqCst);
        // Inside, it is tried again and again. One is told to leave, another waits for the end.
        let mut vcpu = inner.create_vcpu();
        let leave = vcpu.immediate_exit();
        let thread = std::thread::spawn(move || {
            vcpu.start(fill(0x100 * PAGE, 1, 1, false));
            vcpu.run().map(|exit| format!("{exit:?}"))
        });
        for _ in 0..100 {
            std::thread::yield_now();
            assert!(mapped(&inner).iter().all(|range| !range.overlaps(hull)));
        }
        leave.set(true);
        assert_eq!(thread.join().unwrap(), Err(Errno::EINTR));
        let mut vcpu = inner.create_vcpu();
        *handle.lock().unwrap() = Some(std::thread::spawn(move || finish(&mut vcpu, fill(0x100 * PAGE, 1, 1, false))));
    });
    set_private(&vm, 3 * PAGE, PAGE, true);
    vm.stop_observing();
    assert_eq!(waiting.lock().unwrap().take().unwrap().join().unwrap(), OpResult::Done);
    assert_eq!(outside.load(Ordering::SeqCst), 1);
    assert_eq!(mixed(Level::M2), [gfn(0), gfn(0x200)]);
    set_private(&vm, 0, 1024 * PAGE, true);
    assert_eq!(mixed(Level::M2), []);
}
