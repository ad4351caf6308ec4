//! Edits of a running VM's memory, on the software KVM: which calls are made, who is stopped, who hears of it, what a failure
//! leaves behind (nothing), and what is refused before anything happens.

mod edit_kit;

use std::sync::{Arc, Mutex};

use cvm_memory::addr::{FilePage, Gpa};
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::convert::State;
use cvm_memory::dirty::{Clearing, Mechanism, Offer, Stage, SyncReport, Tracker, Unloggable};
use cvm_memory::edit::{Harvest, Reason};
use cvm_memory::hypervisor::{Cap, Exit, Hypervisor, Vcpu};
use cvm_memory::layout::{Memslot, SlotFlags, SlotId};
use cvm_memory::memory::{CvmMemory, EditError, SlotSpec};
use cvm_memory::soft::{GuestOp, SoftVm};
use cvm_memory_testkit::{Call, Recorder, Window, chain};
use edit_kit::*;
use nix::errno::Errno;

#[test]
fn t01_only_the_outermost_commit_makes_calls() {
    let (vm, memory, _) = plain_vm(16, SlotFlags::empty());
    let mut first = memory.edit();
    let mut second = first.begin();
    let mut third = second.begin();
    third.punch_hole(4 * PAGE, PAGE).unwrap();
    third.commit();
    {
        let mut dropped = second.begin();
        dropped.punch_hole(0, 2 * PAGE).unwrap();
    }
    second.commit();
    assert_eq!(vm.take(), []);
    let done = first.commit(&FEW).unwrap();
    assert_eq!(steps(&done), [("delete", gfns(0, 16)), ("create", gfns(0, 4)), ("create", gfns(5, 16))]);
    assert_eq!(region_calls(&vm), [(0, 0), (0, 4 * PAGE), (1, 11 * PAGE)]);
}

#[test]
fn t02_vga_hole_in_one_stop() {
    let (vm, memory, _) = plain_vm(0x400, SlotFlags::empty());
    let mut edit = memory.edit();
    edit.punch_hole(0xa0 * PAGE, 0x20 * PAGE).unwrap();
    let done = edit.commit(&BESIDE).unwrap();
    assert!(done.stopped.is_some());
    assert_eq!(memory.gate().closures(), 1);
    assert_eq!(region_calls(&vm), [(0, 0), (0, 0xa0 * PAGE), (1, 0x340 * PAGE)]);
    assert_eq!(slots(&memory), [gfns(0, 0xa0), gfns(0xc0, 0x400)]);
    assert_eq!(done.naive_calls, 3);

    // Filled again with the same memory: one slot, or three.
    let mut edit = memory.edit();
    edit.grow(0, 0xc0 * PAGE).unwrap();
    let other = edit.clone();
    let done = edit.commit(&BESIDE).unwrap();
    assert_eq!((steps(&done), done.stopped), (vec![("create", gfns(0xa0, 0xc0))], None));
    // The same edit again makes no sense on what is there by now.
    let refused = other.commit(&FEW).unwrap_err();
    assert!(
        matches!(&refused, EditError::Refused(refused) if refused.reason == Reason::Occupied { gfns: gfns(0xa0, 0xc0) })
    );
}

#[test]
fn t04_nobody_is_stopped_for_slots_that_only_touch() {
    let (vm, memory, backing) = plain_vm(1, SlotFlags::empty());
    let mut edit = memory.edit();
    edit.delete(0, PAGE).unwrap().create(plain(PAGE, PAGE, &backing, PAGE, SlotFlags::empty())).unwrap();
    let done = edit.commit(&FEW).unwrap();
    assert_eq!((done.stopped, memory.gate().closures()), (None, 0));
    // The id of what went is not taken while there are others: a late entry of a dirty ring would name the wrong memory.
    assert_eq!(region_calls(&vm), [(0, 0), (1, PAGE)]);
}

#[test]
fn t06_nothing_to_do_is_nothing_done() {
    let (vm, memory, backing) = plain_vm(16, SlotFlags::empty());
    let mut edit = memory.edit();
    edit.delete(0, 16 * PAGE).unwrap().create(plain(0, 16 * PAGE, &backing, 0, SlotFlags::empty())).unwrap();
    assert_eq!(edit.commit(&BESIDE).unwrap().steps, []);
    assert_eq!(memory.edit().commit(&FEW).unwrap().steps, []);
    let mut edit = memory.edit();
    edit.set_flags(0, 16 * PAGE, SlotFlags::LOG_DIRTY).unwrap();
    assert_eq!(steps(&edit.commit(&FEW).unwrap()), [("set flags", gfns(0, 16))]);
    assert_eq!(region_calls(&vm), [(0, 16 * PAGE)]);
    assert_eq!(memory.gate().closures(), 0);
}

/// All memory described anew: what is there as described takes no call.
#[test]
fn what_is_described_as_it_is_stays() {
    let (vm, memory, backing) = plain_vm(16, SlotFlags::empty());
    let mut edit = memory.edit();
    edit.split(8 * PAGE).unwrap();
    edit.commit(&BESIDE).unwrap();
    vm.take();
    let part = |gpa: u64, from: u64| plain(gpa * PAGE, 8 * PAGE, &backing, from * PAGE, SlotFlags::empty());
    let describe = |specs: Vec<SlotSpec>, options| {
        let mut edit = memory.edit();
        edit.replace_all(specs).unwrap();
        steps(&edit.commit(options).unwrap())
    };
    assert_eq!(describe(vec![part(8, 8), part(0, 0)], &BESIDE), []);
    assert_eq!(region_calls(&vm), []);
    // The upper half goes, and other memory comes; the lower half is left alone.
    let other = describe(vec![part(0, 0), part(32, 16)], &BESIDE);
    assert_eq!(other, [("delete", gfns(8, 16)), ("create", gfns(32, 40))]);
    assert_eq!(describe(vec![part(0, 0), part(8, 8)], &BESIDE), [("delete", gfns(32, 40)), ("create", gfns(8, 16))]);
    // Neighbours become one only where few slots are wanted.
    let one = [("delete", gfns(0, 8)), ("delete", gfns(8, 16)), ("create", gfns(0, 16))];
    assert_eq!(describe(vec![part(0, 0), part(8, 8)], &FEW), one);
    // What makes no sense leaves the edit as it was.
    let mut edit = memory.edit();
    edit.punch_hole(0, PAGE).unwrap();
    assert!(matches!(edit.replace_all(vec![part(0, 0), part(4, 8)]), Err(EditError::Refused(_))));
    assert_eq!(edit.draft().operations().count(), 1);
    assert_eq!(describe(Vec::new(), &FEW), [("delete", gfns(0, 16))]);
    assert_eq!(slots(&memory), []);
}

/// Somebody who keeps dirty bits, for the order of things.
#[derive(Debug, Default)]
struct Order(Mutex<Vec<String>>, Mutex<Option<Errno>>);

impl Harvest for Order {
    fn harvest(&self, slot: &Memslot, memory: &SharedSlice) -> Result<(), Errno> {
        self.0.lock().unwrap().push(format!("harvest {} at {:#x}", slot.gfns, memory.offset));
        self.1.lock().unwrap().map_or(Ok(()), Err)
    }

    fn edited(&self, layout: &cvm_memory::layout::Layout) {
        self.0.lock().unwrap().push(format!("edited {}", layout.table().len()));
    }

    fn wrote(&self, memory: &SharedSlice, bytes: u64) {
        self.0.lock().unwrap().push(format!("wrote {bytes} at {:#x}", memory.offset));
    }
}

#[test]
fn dirty_logs_are_harvested_before_they_go_or_they_stay() {
    let (vm, memory, _) = plain_vm(16, SlotFlags::LOG_DIRTY);
    let split = || {
        let mut edit = memory.edit();
        edit.split(4 * PAGE).unwrap();
        edit.commit(&BESIDE)
    };
    let before = kvm_slots(&vm);
    assert!(matches!(split().unwrap_err(), EditError::NobodyHarvests { slot: 0 }));
    let order = Arc::new(Order::default());
    memory.set_harvest(Some(Arc::<Order>::clone(&order))).unwrap();
    *order.1.lock().unwrap() = Some(Errno::EIO);
    assert!(matches!(split().unwrap_err(), EditError::Harvest { slot: 0, errno: Errno::EIO }));
    assert_eq!((region_calls(&vm), kvm_slots(&vm)), (vec![], before), "untouched");
    *order.1.lock().unwrap() = None;
    order.0.lock().unwrap().clear();
    split().unwrap();
    assert_eq!(*order.0.lock().unwrap(), ["harvest [0x0, 0x10) at 0x0", "edited 2"]);
    // What stops being logged is harvested as well; what stays as it is, is not.
    order.0.lock().unwrap().clear();
    let mut edit = memory.edit();
    edit.set_flags(4 * PAGE, 12 * PAGE, SlotFlags::empty()).unwrap();
    edit.commit(&BESIDE).unwrap();
    assert_eq!(*order.0.lock().unwrap(), ["harvest [0x4, 0x10) at 0x4000", "edited 2"]);
    assert_eq!(memory.gate().closures(), 3, "never with a vCPU inside");
}

/// C13: state, attributes and listeners are the guest's and the devices' business, not the slots'.
#[test]
fn page_state_and_devices_do_not_notice_a_split() {
    for vm in [SoftVm::software_protected(), SoftVm::tagged()] {
        let (vm, memory) = private_vm(vm, 1024);
        share(&memory, 256, 512);
        let device = Device::on(&memory);
        memory.write(Gpa(300 * PAGE), b"shared").unwrap();
        let attributes = vm.inner().private_gfns();
        vm.take();
        for edit_one in [0, 1] {
            let mut edit = memory.edit();
            match edit_one {
                0 => edit.split(300 * PAGE).unwrap(),
                _ => edit.merge(0, 1024 * PAGE).unwrap(),
            };
            assert_eq!(edit.commit(&FEW).unwrap().steps.len(), 3);
            let calls = vm.take();
            assert!(calls.iter().all(|call| matches!(call, Call::SetUserMemoryRegion2(_))), "{calls:?}");
            assert_eq!(device.told(), []);
            assert_eq!(vm.inner().private_gfns(), attributes);
            assert_eq!(memory.state(gfn(300)), Some(State::Shared));
            assert_eq!(memory.state(gfn(255)), Some(State::Private));
            let mut bytes = [0; 6];
            memory.read(Gpa(300 * PAGE), &mut bytes).unwrap();
            assert_eq!(&bytes, b"shared");
        }
    }
}

#[test]
fn listeners_hear_of_what_changes_and_of_nothing_else() {
    let (_, memory, backing) = plain_vm(64, SlotFlags::empty());
    let device = Device::on(&memory);
    let mut edit = memory.edit();
    edit.truncate(0, 48 * PAGE).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(device.told(), [(false, 48, 64)]);
    let mut edit = memory.edit();
    edit.grow(0, 56 * PAGE).unwrap();
    assert_eq!(steps(&edit.commit(&FEW).unwrap()), [("delete", gfns(0, 48)), ("create", gfns(0, 56))]);
    assert_eq!(device.told(), [(true, 48, 56)]);
    // Moved: it goes, and comes elsewhere, at the same address of the process.
    let mut edit = memory.edit();
    edit.move_to(0, 56 * PAGE, 0x100 * PAGE).unwrap();
    assert_eq!(steps(&edit.commit(&FEW).unwrap()), [("move", gfns(0x100, 0x138))]);
    assert_eq!(device.told(), [(false, 0, 56), (true, 0x100, 0x138)]);
    assert_eq!(device.mapped.frames()[&0x100], backing.hva());
    // Other memory at the same frames.
    let mut edit = memory.edit();
    edit.punch_hole(0x100 * PAGE, 8 * PAGE).unwrap();
    edit.create(plain(0x100 * PAGE, 8 * PAGE, &backing, 64 * PAGE, SlotFlags::empty())).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(device.told(), [(false, 0x100, 0x108), (true, 0x100, 0x108)]);
    // Read-only or not is nothing to a device.
    let mut edit = memory.edit();
    edit.set_flags(0x108 * PAGE, 8 * PAGE, SlotFlags::READONLY).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(device.told(), []);
}

/// Memory that can be private comes where memory was that cannot: devices let go of the old one, whatever state the new one
/// starts in; and have it again if nothing comes of it.
#[test]
fn devices_let_go_of_memory_where_private_memory_comes() {
    for vm in [SoftVm::software_protected(), SoftVm::tagged()] {
        let vm = Recorder::new(vm);
        let old = plain(0, 64 * PAGE, &slice(64 * PAGE).backing, 0, SlotFlags::empty());
        let memory = CvmMemory::builder().slot(old).address_limit(1 << 30).build(Arc::new(vm.clone())).unwrap();
        let device = Device::on(&memory);
        let replace = || replace_by_private(&vm, &memory, 64);
        let before = device.mapped.frames();
        assert_eq!(before.len(), 64);
        vm.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.memory_size != 0), Errno::ENOMEM);
        assert!(matches!(replace(), Err(EditError::Kvm { errno: Errno::ENOMEM, .. })));
        assert_eq!(device.mapped.frames(), before);
        assert_eq!((memory.state(gfn(0)), vm.inner().private_gfns()), (Some(State::Shared), vec![]));
        device.told();
        replace().unwrap();
        assert_eq!(device.told(), [(false, 0, 64)]);
        assert!(device.mapped.frames().is_empty(), "the memory behind them has gone");
        assert_eq!(memory.state(gfn(0)), Some(State::Private));
    }
}

/// S08: two calls with one id; if the second fails, the slot is what it was.
#[test]
fn s08_a_toggle_of_read_only_that_fails_is_taken_back() {
    let (vm, memory, _) = plain_vm(16, SlotFlags::empty());
    let before = kvm_slots(&vm);
    let toggle = || {
        let mut edit = memory.edit();
        edit.set_flags(0, 16 * PAGE, SlotFlags::READONLY).unwrap();
        edit.commit(&BESIDE)
    };
    vm.fail_nth(2, Errno::ENOMEM);
    let error = toggle().unwrap_err();
    assert!(matches!(error, EditError::Kvm { kind: "create", slot: 0, errno: Errno::ENOMEM, .. }), "{error}");
    assert_eq!(region_calls(&vm), [(0, 0), (0, 16 * PAGE), (0, 16 * PAGE)]);
    assert_eq!(kvm_slots(&vm), before);
    assert_eq!(memory.space().layout().table().get(SlotId::new(0)).unwrap().flags, SlotFlags::empty());
    toggle().unwrap();
    assert_eq!(region_calls(&vm), [(0, 0), (0, 16 * PAGE)]);
    assert_eq!(kvm_slots(&vm)[0].flags, SlotFlags::READONLY);
}

/// Everything that a failed edit must leave as it was.
fn everything(vm: &Vm, memory: &CvmMemory, device: &Device) -> impl PartialEq + std::fmt::Debug {
    let states: Vec<_> = (0..256).map(|page| memory.state(gfn(page))).collect();
    let mut shared = Vec::new();
    for page in 0..256 {
        let mut byte = [0];
        shared.push(memory.read(Gpa(page * PAGE), &mut byte).ok().map(|()| byte));
    }
    let table: Vec<_> = memory.space().layout().table().slots().copied().collect();
    let mapped = device.mapped.frames();
    (kvm_slots(vm), vm.inner().private_gfns(), states, shared, table, mapped)
}

/// T14: an edit that truncates, moves, grows and brings memory; each of its calls fails once, and so does the device.
#[test]
fn t14_a_failure_at_any_call_leaves_everything_as_it_was() {
    let (vm, memory) = private_vm(SoftVm::software_protected(), 64);
    let file = Arc::clone(memory.space().files().next().unwrap());
    let extra = Arc::new(vm.create_guest_memfd(16 * PAGE, 0).unwrap());
    share(&memory, 8, 24);
    let device = Device::on(&memory);
    memory.write(Gpa(9 * PAGE), b"x").unwrap();
    let commit = || {
        let mut edit = memory.edit();
        edit.split(16 * PAGE).unwrap().punch_hole(20 * PAGE, 8 * PAGE).unwrap();
        edit.move_to(48 * PAGE, 16 * PAGE, 128 * PAGE).unwrap();
        let private = Some((Arc::clone(&extra), FilePage::ZERO));
        let spec = SlotSpec {
            id: None,
            gpa: 200 * PAGE,
            size: 16 * PAGE,
            shared: slice(16 * PAGE),
            private,
            flags: SlotFlags::empty(),
        };
        edit.create(spec).unwrap();
        edit.commit(&BESIDE)
    };
    let before = format!("{:?}", everything(&vm, &memory, &device));
    let bound = memory.space().layout().bindings(file.id()).unwrap().clone();
    let mut failures = 0;
    for call in 1.. {
        vm.take();
        vm.fail_nth(call, Errno::ENOMEM);
        let result = commit();
        if vm.clear_faults() == 1 {
            result.unwrap();
            break;
        }
        failures += 1;
        let error = result.unwrap_err();
        assert!(matches!(error, EditError::Kvm { .. } | EditError::Step { .. }), "{error}");
        assert_eq!(format!("{:?}", everything(&vm, &memory, &device)), before, "call {call}: {error}");
        assert_eq!(memory.space().layout().bindings(file.id()), Some(&bound));
    }
    assert!(failures >= 6, "{failures}");
    assert_eq!(slots(&memory), [gfns(0, 16), gfns(16, 20), gfns(28, 48), gfns(128, 144), gfns(200, 216)]);
    assert_ne!(format!("{:?}", everything(&vm, &memory, &device)), before);
}

#[test]
fn a_device_that_cannot_map_what_comes_stops_the_edit() {
    let (vm, memory, _) = plain_vm(64, SlotFlags::empty());
    let device = Device::on(&memory);
    *device.broken.lock().unwrap() = Some(100);
    let before = format!("{:?}", everything(&vm, &memory, &device));
    let mut edit = memory.edit();
    edit.grow(0, 120 * PAGE).unwrap().truncate(0, 32 * PAGE).unwrap();
    let error = edit.commit(&BESIDE).unwrap_err();
    assert!(matches!(error, EditError::Step { gfns: failed, .. } if failed == gfns(64, 120)), "{error}");
    let at = "[0x40, 0x78)";
    assert_eq!(chain(&error), format!("memory at gfns {at}: map gfns {at} for devices: listener: {}", Errno::ENOSPC));
    assert_eq!(format!("{:?}", everything(&vm, &memory, &device)), before);
    assert_eq!(region_calls(&vm), [], "before any call");
}

/// Undoing fails too: what is left is said, and published, and is what KVM has.
#[test]
fn what_cannot_be_taken_back_is_known() {
    let (vm, memory, _) = plain_vm(64, SlotFlags::empty());
    let device = Device::on(&memory);
    let mut edit = memory.edit();
    edit.punch_hole(16 * PAGE, 16 * PAGE).unwrap();
    // Delete, create, create (fails), delete (fails), create (then overlaps).
    vm.fail_nth(3, Errno::ENOMEM);
    vm.fail_nth(4, Errno::ENOMEM);
    let error = edit.commit(&BESIDE).unwrap_err();
    let EditError::Broken { kind: "create", left, .. } = error else { panic!("{error}") };
    assert_eq!(left.iter().map(|(step, _)| step.kind()).collect::<Vec<_>>(), ["delete", "create"]);
    assert_eq!(kvm_slots(&vm).iter().map(|slot| slot.gfns).collect::<Vec<_>>(), [gfns(0, 16)]);
    assert_eq!(slots(&memory), [gfns(0, 16)]);
    assert!(device.mapped.frames().into_keys().eq(0..16), "devices keep what is there");
    memory.write(Gpa(0), b"still there").unwrap();
}

#[test]
fn s03_memory_below_and_above_4_gib_has_one_file() {
    let builder =
        CvmMemory::builder().ram(0, 2 << 30).ram(4 << 30, 4 << 30).materialise(cvm_memory::memory::Materialise::Lazy);
    let memory = builder.build(Arc::new(SoftVm::tagged())).unwrap();
    let space = memory.space();
    let bindings: Vec<_> = space.layout().table().slots().map(|slot| slot.binding.unwrap()).collect();
    assert_eq!(bindings.iter().map(|binding| binding.start.start_byte()).collect::<Vec<_>>(), [0, 0x8000_0000]);
    assert_eq!(bindings[0].file, bindings[1].file);
}

/// S09: what an invalidation takes away is clipped to each slot, also to those that an edit has made.
#[test]
fn s09_holes_are_clipped_to_the_slots_that_there_are() {
    let vm = SoftVm::software_protected();
    let file = Arc::new(vm.create_guest_memfd(0x400 * PAGE, 0).unwrap());
    let private = Some((Arc::clone(&file), FilePage::new(0x80).unwrap()));
    let size = 0x200 * PAGE;
    let slot = SlotSpec { id: None, gpa: 0x100 * PAGE, size, shared: slice(size), private, flags: SlotFlags::empty() };
    let memory = CvmMemory::builder().slot(slot).build(Arc::new(vm)).unwrap();
    let clip = |start, end| {
        let pages =
            cvm_memory::addr::FileRange::new(FilePage::new(start).unwrap(), FilePage::new(end).unwrap()).unwrap();
        memory.space().layout().clip(file.id(), pages).map(|clip| clip.gfns).collect::<Vec<_>>()
    };
    assert_eq!(clip(0x40, 0x90), [gfns(0x100, 0x110)]);
    assert_eq!(clip(0x270, 0x300), [gfns(0x2f0, 0x300)]);
    assert_eq!(clip(0x280, 0x290), []);
    let mut edit = memory.edit();
    edit.punch_hole(0x108 * PAGE, 0x10 * PAGE).unwrap().split(0x200 * PAGE).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(clip(0x40, 0x90), [gfns(0x100, 0x108)]);
    assert_eq!(clip(0x8f, 0x99), [gfns(0x118, 0x119)]);
    assert_eq!(clip(0x17f, 0x181), [gfns(0x1ff, 0x200), gfns(0x200, 0x201)]);
}

/// Slots that share a mapping, each with an owner of its own for it: whichever goes, the dirty bits of the other are kept.
#[test]
fn a_mapping_is_tracked_until_its_last_slot_goes() {
    for stays in [0, 16] {
        let vm = SoftVm::default_type();
        let ram: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(32 * PAGE).unwrap());
        let slot = |at: u64| {
            let owner: Arc<dyn SharedBacking> = Arc::new(Window::new(&ram, 0, 32 * PAGE));
            plain(at * PAGE, 16 * PAGE, &owner, at * PAGE, SlotFlags::LOG_DIRTY)
        };
        let memory = CvmMemory::builder().slot(slot(0)).slot(slot(16)).build(Arc::new(vm.clone())).unwrap();
        let tracker = Arc::new(Tracker::new(Arc::new(vm), Mechanism::Bitmap(Clearing::ByLooking)));
        memory.set_harvest(Some(Arc::<Tracker>::clone(&tracker))).unwrap();
        tracker.start(memory.space().layout(), Unloggable::Refuse).unwrap();
        let mut edit = memory.edit();
        edit.delete((16 - stays) * PAGE, 16 * PAGE).unwrap();
        edit.commit(&BESIDE).unwrap();
        let mut edit = memory.edit();
        edit.create(plain(MIB, PAGE, &slice(PAGE).backing, 0, SlotFlags::empty())).unwrap();
        edit.commit(&BESIDE).unwrap();
        memory.write(Gpa(stays * PAGE), b"x").unwrap();
        tracker.sync(Stage::Running).unwrap();
        assert_eq!(tracker.take_gfns(), [gfns(stays, stays + 1)]);
    }
}

/// KVM logs a slot from the moment it is there, under a guest that does not wait until everybody has been told.
#[test]
fn what_is_written_to_memory_that_is_just_coming_is_dirty() {
    const RING: Mechanism = Mechanism::Ring { cap: Cap::DIRTY_LOG_RING, bytes: 4096, backed: false };
    for (reaped, edited) in [(false, false), (false, true), (true, false), (true, true)] {
        let soft = SoftVm::default_type();
        RING.enable(&soft, &Offer::probe(&soft)).unwrap();
        let vm = Recorder::new(soft.clone());
        let tracker = Arc::new(Tracker::new(Arc::new(soft.clone()), RING));
        let backing = slice(64 * PAGE).backing;
        let slot = |at: u64| plain(at * PAGE, 16 * PAGE, &backing, at * PAGE, SlotFlags::LOG_DIRTY);
        let builder = CvmMemory::builder().slot(slot(0)).harvest(Arc::<Tracker>::clone(&tracker));
        let memory = builder.build(Arc::new(vm.clone())).unwrap();
        tracker.start(memory.space().layout(), Unloggable::Refuse).unwrap();
        let vcpu = soft.create_vcpu();
        tracker.add_ring(vcpu.dirty_ring(4096).unwrap());
        // Between the two slots that come, the guest writes to the first.
        let (vcpu, reaper) = (Mutex::new(vcpu), Arc::clone(&tracker));
        let write = move |call: &Call| {
            if matches!(call, Call::SetUserMemoryRegion2(r) if r.guest_phys_addr == 48 * PAGE) {
                let vcpu = &mut *vcpu.lock().unwrap();
                vcpu.start(GuestOp::Fill { gpa: 20 * PAGE, len: 1, byte: 1, private: false });
                assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
                if reaped {
                    reaper.reap().unwrap();
                }
            }
            false
        };
        vm.fail_matching(write, Errno::EIO);
        if edited {
            let mut edit = memory.edit();
            edit.create(slot(16)).unwrap().create(slot(48)).unwrap();
            assert_eq!(edit.commit(&BESIDE).unwrap().stopped, None);
        } else {
            memory.add_slots(vec![slot(16), slot(48)]).unwrap();
        }
        assert_eq!(tracker.sync(Stage::Last).unwrap().stray, None);
        assert_eq!(tracker.take_gfns(), [gfns(20, 21)], "reaped: {reaped}, edited: {edited}");
        // Slots that did not come to be are forgotten.
        vm.clear_faults();
        vm.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(_)), Errno::ENOMEM);
        memory.add_slots(vec![plain(MIB, 16 * PAGE, &slice(16 * PAGE).backing, 0, SlotFlags::LOG_DIRTY)]).unwrap_err();
        assert_eq!(tracker.sync(Stage::Last), Ok(SyncReport::default()));
    }
}
