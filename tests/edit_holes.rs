//! Holes where a platform remembers them as devices: a frame without a slot is private to KVM, from before its slot goes until
//! after another one has come, whatever fails.

mod edit_kit;

use std::sync::Arc;

use cvm_memory::addr::{FilePage, Gpa};
use cvm_memory::hypervisor::{Exit, Hazards, Hypervisor, Vcpu};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{EditError, SlotError, SlotSpec};
use cvm_memory::soft::GuestOp;
use cvm_memory_testkit::Call;
use edit_kit::*;
use nix::errno::Errno;

/// Where other memory was to come at frames that have some, a failure leaves them what they were: memory, and not a hole.
#[test]
fn a_failure_seals_no_memory() {
    let (vm, memory) = hazardous(Hazards { holes_stick: true, ..Hazards::NONE });
    share(&memory, 0, 64);
    let replace = || replace_by_private(&vm, &memory, 96);
    for nth in [1, 2] {
        let matching = move |call: &Call| match call {
            Call::SetUserMemoryRegion2(r) => (r.memory_size == 0) == (nth == 1),
            _ => false,
        };
        vm.fail_matching(matching, Errno::ENOMEM);
        assert!(matches!(replace(), Err(EditError::Kvm { errno: Errno::ENOMEM, .. })));
        assert_eq!(vm.inner().private_gfns(), [], "frames are as they were, and so are those that never were memory");
    }
    memory.write(Gpa(0), b"x").unwrap();
}

/// What KVM was asked for, in order: whether attributes became private, or whether a slot came.
fn order(vm: &Vm) -> Vec<(&'static str, bool)> {
    let called = |call: Call| match call {
        Call::SetUserMemoryRegion2(r) => Some(("slot", r.memory_size != 0)),
        Call::SetMemoryAttributes(a) => Some(("private", a.attributes != 0)),
        _ => None,
    };
    vm.take().into_iter().filter_map(called).collect()
}

/// Frames are sealed for as long as they have no slot, to the call: whoever comes by in between would find a hole.
#[test]
fn a_hole_is_unsealed_only_once_it_is_one_no_more() {
    let (vm, memory) = hazardous(Hazards { holes_stick: true, ..Hazards::NONE });
    share(&memory, 0, 64);
    let mut edit = memory.edit();
    edit.truncate(0, 32 * PAGE).unwrap();
    edit.commit(&BESIDE).unwrap();
    let grow = |more: bool| {
        let mut edit = memory.edit();
        edit.grow(0, 64 * PAGE).unwrap();
        if more {
            edit.create(plain(MIB, 16 * PAGE, &slice(16 * PAGE).backing, 0, SlotFlags::empty())).unwrap();
        }
        edit.commit(&BESIDE)
    };
    vm.take();
    vm.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.guest_phys_addr == MIB), Errno::ENOMEM);
    grow(true).unwrap_err();
    let taken_back = [("slot", true), ("private", false), ("slot", true), ("private", true), ("slot", false)];
    assert_eq!(order(&vm), taken_back);
    assert_eq!(vm.inner().private_gfns(), [gfns(32, 64)]);
    // An attribute that cannot be set: the slot does not stay without it.
    vm.fail_matching(|call| matches!(call, Call::SetMemoryAttributes(_)), Errno::ENOMEM);
    assert!(matches!(grow(false), Err(EditError::Kvm { errno: Errno::ENOMEM, .. })));
    assert_eq!((slots(&memory), kvm_slots(&vm).len()), (vec![gfns(0, 32)], 1));
    assert_eq!(vm.inner().private_gfns(), [gfns(32, 64)]);
    vm.take();
    assert_eq!(grow(false).unwrap().stopped, None);
    assert_eq!(order(&vm), [("slot", true), ("private", false)]);
    memory.write(Gpa(40 * PAGE), b"x").unwrap();
    // Slot by slot.
    let space = memory.space();
    let slot = *space.layout().table().lookup(gfn(40)).unwrap();
    let (file, pages) = slot.file_range().unwrap();
    let spec = SlotSpec {
        id: None,
        gpa: slot.gfns.start_byte(),
        size: slot.gfns.bytes(),
        shared: space.shared(slot.id).unwrap().clone(),
        private: Some((Arc::clone(space.file(file).unwrap()), pages.start())),
        flags: SlotFlags::empty(),
    };
    memory.remove_slot(slot.id).unwrap();
    vm.take();
    let other = plain(MIB, 16 * PAGE, &slice(16 * PAGE).backing, 0, SlotFlags::empty());
    vm.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.guest_phys_addr == MIB), Errno::ENOMEM);
    memory.add_slots(vec![spec.clone(), other]).unwrap_err();
    assert_eq!(order(&vm), taken_back);
    memory.add_slots(vec![spec]).unwrap();
    assert_eq!(order(&vm), [("slot", true), ("private", false)]);
}

/// Where holes stick, all memory is within the record: what becomes of a hole could not be remembered beyond. That is said
/// before the first call, as it is of memory that can be private.
#[test]
fn memory_beyond_the_record_is_refused_before_any_call() {
    const BEYOND: u64 = 1 << 30;
    for holes_stick in [true, false] {
        let (vm, memory) = hazardous(Hazards { holes_stick, ..Hazards::NONE });
        let backing = slice(16 * PAGE).backing;
        let beyond = || plain(BEYOND, 16 * PAGE, &backing, 0, SlotFlags::empty());
        let created = || {
            let mut edit = memory.edit();
            edit.create(beyond()).unwrap();
            edit.commit(&BESIDE)
        };
        if holes_stick {
            assert!(matches!(created(), Err(EditError::Record { .. })));
            assert!(matches!(memory.add_slots(vec![beyond()]), Err(SlotError::Record { .. })));
            assert_eq!(vm.take(), []);
        } else {
            created().unwrap();
            let mut edit = memory.edit();
            edit.delete(BEYOND, 16 * PAGE).unwrap();
            edit.commit(&BESIDE).unwrap();
        }
        let private = Some((Arc::new(vm.create_guest_memfd(MIB, 0).unwrap()), FilePage::ZERO));
        let spec =
            SlotSpec { id: None, gpa: BEYOND, size: MIB, shared: slice(MIB), private, flags: SlotFlags::empty() };
        vm.take();
        let mut edit = memory.edit();
        edit.truncate(0, 32 * PAGE).unwrap().create(spec).unwrap();
        assert!(matches!(edit.commit(&BESIDE), Err(EditError::Record { .. })));
        assert_eq!(vm.take(), []);
    }
}

/// A device where memory was: a BAR, the hole for a VGA.
#[test]
fn a_device_where_memory_was() {
    let (vm, memory) = hazardous(Hazards { holes_stick: true, ..Hazards::NONE });
    share(&memory, 0, 16);
    let mut edit = memory.edit();
    edit.punch_hole(8 * PAGE, 16 * PAGE).unwrap();
    edit.commit(&BESIDE).unwrap();
    let mut vcpu = vm.inner().create_vcpu();
    let mut is_device = |page: u64| {
        vcpu.start(GuestOp::Read { gpa: page * PAGE, len: 4, private: false });
        match vcpu.run().unwrap() {
            Exit::Mmio(_) => true,
            Exit::MemoryFault(_) => false,
            other => panic!("{other:?}"),
        }
    };
    assert!(!is_device(8) && !is_device(23), "sealed");
    let is_memory =
        |result, start, end| matches!(result, Err(SlotError::IsMemory { gfns: at }) if at == gfns(start, end));
    assert!(is_memory(memory.leave_to_devices(gfns(7, 9)), 7, 8));
    assert!(is_memory(memory.leave_to_devices(gfns(20, 30)), 24, 30));
    vm.fail_matching(|call| matches!(call, Call::SetMemoryAttributes(_)), Errno::ENOMEM);
    assert!(matches!(memory.leave_to_devices(gfns(8, 20)), Err(SlotError::Step { .. })));
    memory.leave_to_devices(gfns(8, 20)).unwrap();
    for page in [8, 15, 16, 19] {
        assert!(is_device(page), "what was shared, and what was private: {page}");
    }
    assert!(!is_device(20) && !is_device(23), "nobody asked for it");
    // Far beyond all memory there is nothing to forget.
    memory.leave_to_devices(gfns(1 << 30, 1 << 31)).unwrap();
}
