//! Edits of a running VM's memory, on the software KVM: which calls are made, who is stopped, who hears of it, what a failure
//! leaves behind (nothing), and what is refused before anything happens.

mod edit_kit;

use std::collections::BTreeMap;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use cvm_memory::addr::{FilePage, Gpa, PAGE_SIZE};
use cvm_memory::backing::{SharedBacking, SharedSlice};
use cvm_memory::convert::{Listener, ListenerError, LockError, Request, SharedRun, State};
use cvm_memory::edit::{Harvest, Hazard, PlanError, Prefer, Reason};
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::gate::{Gate, GateError, Kick};
use cvm_memory::hypervisor::{Exit, Hazards, Hypervisor, MemoryFault, Mmio, Platform};
use cvm_memory::layout::{LayoutError, Memslot, SlotFlags, SlotId};
use cvm_memory::memory::{CommitOptions, CvmMemory, EditError, SlotSpec};
use cvm_memory::soft::{Arch, SlotInfo, SoftVm, Tagged};
use cvm_memory_testkit::{Call, GuestOp, Outcome, Recorder, SoftGuest};
use edit_kit::{MIB, PAGE, Runner, SoftKick, gfn, gfns, plain, slice, slots, steps};
use nix::errno::Errno;

type Vm = Recorder<SoftVm>;

const FEW: CommitOptions = CommitOptions {
    prefer: Prefer::FewSlots,
    patience: Duration::from_secs(60),
    lose_private: false,
    free_rebound: false,
    lose_dirty: false,
};
const BESIDE: CommitOptions = CommitOptions { prefer: Prefer::NoInterruption, ..FEW };

/// Memory that is never private, on a VM of the default type: `pages` of it, in a mapping of twice that.
fn plain_vm(pages: u64, flags: SlotFlags) -> (Vm, Arc<CvmMemory>, Arc<dyn SharedBacking>) {
    let vm = Recorder::new(SoftVm::default_type());
    let backing = slice(2 * pages * PAGE).backing;
    let slot = plain(0, pages * PAGE, &backing, 0, flags);
    let memory = CvmMemory::builder().slot(slot).build(Arc::new(vm.clone())).unwrap();
    vm.take();
    (vm, Arc::new(memory), backing)
}

fn private_vm(vm: SoftVm, pages: u64) -> (Vm, Arc<CvmMemory>) {
    let vm = Recorder::new(vm);
    let memory = CvmMemory::builder().ram(0, pages * PAGE).address_limit(1 << 30).build(Arc::new(vm.clone())).unwrap();
    vm.take();
    (vm, Arc::new(memory))
}

fn share(memory: &CvmMemory, start: u64, end: u64) {
    memory.convert(&Request { range: gfns(start, end), to: State::Shared }).unwrap();
}

/// Who maps shared memory: what it has, and how often it was told.
#[derive(Debug, Default)]
struct Device {
    mapped: Mutex<BTreeMap<u64, u64>>,
    told: Mutex<Vec<(bool, u64, u64)>>,
    /// Fails to map this frame.
    broken: Mutex<Option<u64>>,
}

impl Listener for Device {
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        if self.broken.lock().unwrap().is_some_and(|bad| run.gfns.contains(gfn(bad))) {
            return Err(Errno::ENOSPC.into());
        }
        self.told.lock().unwrap().push((true, run.gfns.start().get(), run.gfns.end().get()));
        for piece in &run.pieces {
            for (page, at) in piece.gfns.iter().zip(0..) {
                let before = self.mapped.lock().unwrap().insert(page.get(), piece.hva + at * PAGE);
                assert_eq!(before, None, "{page} mapped twice");
            }
        }
        Ok(())
    }

    fn unmap(&self, run: &SharedRun) {
        self.told.lock().unwrap().push((false, run.gfns.start().get(), run.gfns.end().get()));
        for page in run.gfns {
            let before = self.mapped.lock().unwrap().remove(&page.get());
            assert!(before.is_some() || thread::panicking(), "{page} was not mapped");
        }
    }
}

impl Device {
    fn on(memory: &CvmMemory) -> Arc<Self> {
        let device = Arc::new(Self::default());
        let listener: Arc<dyn Listener> = Arc::clone(&device) as Arc<dyn Listener>;
        memory.add_listener(&listener).unwrap();
        device.told.lock().unwrap().clear();
        device
    }

    fn told(&self) -> Vec<(bool, u64, u64)> {
        std::mem::take(&mut self.told.lock().unwrap())
    }
}

fn kvm_slots(vm: &Vm) -> Vec<SlotInfo> {
    vm.inner().slots()
}

fn region_calls(vm: &Vm) -> Vec<(u32, u64)> {
    let region =
        |call: Call| if let Call::SetUserMemoryRegion2(r) = call { Some((r.slot, r.memory_size)) } else { None };
    vm.take().into_iter().filter_map(region).collect()
}

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
    memory.set_harvest(Some(Arc::<Order>::clone(&order)));
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
    assert_eq!(device.mapped.lock().unwrap()[&0x100], backing.hva());
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
    let mapped = device.mapped.lock().unwrap().clone();
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
    assert!(device.mapped.lock().unwrap().keys().copied().eq(0..16), "devices keep what is there");
    memory.write(Gpa(0), b"still there").unwrap();
}

#[test]
fn what_makes_no_sense_is_refused_before_the_first_call() {
    let (vm, memory) = private_vm(SoftVm::software_protected(), 64);
    let file = Arc::clone(memory.space().files().next().unwrap());
    let refused = |edit: cvm_memory::memory::Edit<'_>| {
        let error = edit.commit(&BESIDE).unwrap_err();
        assert_eq!(vm.take(), [], "{error}");
        error
    };
    let mut edit = memory.edit();
    let range =
        |result: Result<&mut cvm_memory::memory::Edit<'_>, EditError>| matches!(result, Err(EditError::Range { .. }));
    assert!(
        range(edit.delete(1, PAGE)) && range(edit.delete(0, 0)) && range(edit.punch_hole(u64::MAX - 0xfff, 2 * PAGE))
    );
    assert!(matches!(edit.delete_slot(SlotId::new(7)), Err(EditError::Refused(_))));
    // S06: the pages are bound.
    let private = Some((Arc::clone(&file), FilePage::new(32).unwrap()));
    let spec =
        SlotSpec { id: None, gpa: MIB, size: 64 * PAGE, shared: slice(64 * PAGE), private, flags: SlotFlags::empty() };
    edit.create(SlotSpec { size: 16 * PAGE, ..spec.clone() }).unwrap();
    assert!(matches!(refused(edit), EditError::Plan(PlanError::Layout(LayoutError::Bind { .. }))));
    // Longer than its file, longer than its mapping.
    let mut edit = memory.edit();
    edit.grow(0, 65 * PAGE).unwrap();
    assert!(matches!(refused(edit), EditError::Plan(PlanError::Layout(LayoutError::Bind { .. }))));
    let mut edit = memory.edit();
    assert!(matches!(edit.create(SlotSpec { shared: slice(PAGE), ..spec }), Err(EditError::SharedTooShort { .. })));
    // S07.
    for flags in [SlotFlags::LOG_DIRTY, SlotFlags::READONLY] {
        let mut edit = memory.edit();
        edit.set_flags(0, 64 * PAGE, flags).unwrap();
        assert!(matches!(refused(edit), EditError::Plan(PlanError::Layout(_))));
    }
    // Private memory cannot become memory that is never private under the guest's feet.
    let mut edit = memory.edit();
    edit.delete(0, 64 * PAGE).unwrap();
    edit.create(plain(0, 64 * PAGE, &slice(64 * PAGE).backing, 0, SlotFlags::empty())).unwrap();
    assert!(matches!(refused(edit), EditError::StillPrivate { gfns: still } if still == gfns(0, 64)));
    let (vm, memory, _) = plain_vm(64, SlotFlags::empty());
    let mut edit = memory.edit();
    edit.grow(0, 129 * PAGE).unwrap();
    assert!(matches!(edit.commit(&FEW).unwrap_err(), EditError::SharedTooShort { .. }));
    assert_eq!(vm.take(), []);
}

/// A platform with hazards.
#[derive(Debug)]
struct Hazardous(Hazards);

impl Arch for Hazardous {
    fn platform(&self) -> Platform {
        Platform { hazards: self.0, name: "hazardous", ..Tagged::PLATFORM }
    }
    fn has_protected_state(&self) -> bool {
        true
    }
}

fn hazardous(hazards: Hazards) -> (Vm, Arc<CvmMemory>) {
    private_vm(SoftVm::with_arch(Arc::new(Hazardous(hazards))), 64)
}

#[test]
fn private_memory_that_goes_with_its_slot_is_not_lost_unasked() {
    let (vm, memory) = hazardous(Hazards { slot_delete_loses_private: true, ..Hazards::NONE });
    let split = |options: &CommitOptions| {
        let mut edit = memory.edit();
        edit.split(32 * PAGE).unwrap();
        edit.commit(options)
    };
    let error = split(&BESIDE).unwrap_err();
    assert!(matches!(error, EditError::Hazard(Hazard::LosesPrivate { gfns: lost, .. }) if lost == gfns(0, 64)));
    assert_eq!(vm.take(), []);
    // Memory beside it is another matter.
    let mut edit = memory.edit();
    let private = Some((Arc::new(vm.create_guest_memfd(MIB, 0).unwrap()), FilePage::ZERO));
    edit.create(SlotSpec { id: None, gpa: MIB, size: MIB, shared: slice(MIB), private, flags: SlotFlags::empty() })
        .unwrap();
    edit.commit(&BESIDE).unwrap();
    split(&CommitOptions { lose_private: true, ..BESIDE }).unwrap();
    // Nor is anything lost that is shared.
    share(&memory, 0, 64);
    let mut edit = memory.edit();
    edit.merge(0, 64 * PAGE).unwrap();
    edit.commit(&BESIDE).unwrap();
}

#[test]
fn where_vcpus_keep_their_state_in_memory_nothing_private_goes_and_all_stop() {
    let (_, memory) = hazardous(Hazards { vcpu_state_in_private_memory: true, ..Hazards::NONE });
    let mut edit = memory.edit();
    edit.truncate(0, 32 * PAGE).unwrap();
    let error = edit.clone().commit(&BESIDE).unwrap_err();
    assert!(matches!(error, EditError::Hazard(Hazard::LosesVcpu { gfns: lost, .. }) if lost == gfns(32, 64)));
    // The same pages at the same frames: nobody is lost, as long as nobody looks meanwhile.
    let mut split = memory.edit();
    split.split(32 * PAGE).unwrap();
    assert!(split.commit(&BESIDE).unwrap().stopped.is_some());
    // Memory that goes for good stops nobody elsewhere; here it does.
    share(&memory, 32, 64);
    let mut gone = memory.edit();
    gone.delete(32 * PAGE, 32 * PAGE).unwrap();
    assert!(gone.commit(&BESIDE).unwrap().stopped.is_some());
}

#[test]
fn a_page_appears_at_another_frame_only_once_it_is_freed() {
    let (vm, memory) = hazardous(Hazards { pages_keep_their_frame: true, ..Hazards::NONE });
    let file = memory.space().files().next().unwrap().id();
    let mut edit = memory.edit();
    edit.move_to(16 * PAGE, 16 * PAGE, MIB).unwrap();
    let error = edit.clone().commit(&BESIDE).unwrap_err();
    let EditError::Hazard(Hazard::Rebound { was, wanted, pages, .. }) = error else { panic!("{error}") };
    assert_eq!((was, wanted, pages.pages()), (gfn(16), gfn(256), 16));
    assert_eq!(vm.take(), []);
    edit.commit(&CommitOptions { free_rebound: true, ..BESIDE }).unwrap();
    let punched: Vec<_> = vm.take().into_iter().filter(Call::is_punch_hole).collect();
    let (offset, len) = (16 * i64::try_from(PAGE).unwrap(), 16 * i64::try_from(PAGE).unwrap());
    assert!(
        matches!(punched.as_slice(), [Call::Fallocate { file: f, offset: o, len: l, .. }] if (*f, *o, *l) == (file, offset, len))
    );
    // Away for a while, the pages remember all the same; back where they were, there is nothing to free.
    let mut edit = memory.edit();
    edit.delete(MIB, 16 * PAGE).unwrap();
    edit.commit(&BESIDE).unwrap();
    let back = |gpa: u64| {
        let space = memory.space();
        let private = Some((Arc::clone(space.file(file).unwrap()), FilePage::new(16).unwrap()));
        let mut edit = memory.edit();
        let shared = slice(16 * PAGE);
        edit.create(SlotSpec { id: None, gpa, size: 16 * PAGE, shared, private, flags: SlotFlags::empty() }).unwrap();
        edit.commit(&BESIDE)
    };
    assert!(matches!(back(16 * PAGE), Err(EditError::Hazard(Hazard::Rebound { .. }))));
    back(MIB).unwrap();
}

/// Rule 3a: while there is no slot, no shared access may find one missing.
#[test]
fn memory_that_goes_is_sealed_where_holes_stick() {
    let (vm, memory) = hazardous(Hazards { holes_stick: true, ..Hazards::NONE });
    share(&memory, 0, 64);
    assert_eq!(vm.inner().private_gfns(), []);
    let truncate = || {
        let mut edit = memory.edit();
        edit.truncate(0, 32 * PAGE).unwrap();
        edit.commit(&BESIDE)
    };
    // A failure takes it back.
    vm.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.memory_size != 0), Errno::ENOMEM);
    truncate().unwrap_err();
    assert_eq!(vm.inner().private_gfns(), []);
    truncate().unwrap();
    assert_eq!(vm.inner().private_gfns(), [gfns(32, 64)]);
    let mut edit = memory.edit();
    edit.grow(0, 64 * PAGE).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(vm.inner().private_gfns(), [], "shared, as the guest has been told");
    assert_eq!(memory.state(gfn(40)), Some(State::Shared));
    memory.write(Gpa(40 * PAGE), b"x").unwrap();
}

#[test]
fn nobody_waits_for_himself() {
    let (vm, memory, _) = plain_vm(64, SlotFlags::empty());
    #[derive(Debug)]
    struct Deaf;
    impl Kick for Deaf {
        fn entering(&self) {}
        fn kick(&self) {}
    }
    let pass = Gate::register(memory.gate(), Arc::new(Deaf));
    let commit = |options: &CommitOptions| {
        let mut edit = memory.edit();
        edit.split(32 * PAGE).unwrap();
        edit.commit(options)
    };
    // From a vCPU's thread that is in the guest.
    let inside = pass.enter().unwrap();
    let before = kvm_slots(&vm);
    assert!(matches!(commit(&BESIDE), Err(EditError::Gate(GateError::Inside { .. }))));
    // A vCPU that never leaves.
    thread::scope(|scope| {
        let impatient = CommitOptions { patience: Duration::from_millis(1), ..BESIDE };
        let error = scope.spawn(move || commit(&impatient)).join().unwrap().unwrap_err();
        assert!(matches!(error, EditError::Gate(GateError::NeverLeft { ref inside, .. }) if *inside == [pass.id()]));
    });
    assert_eq!((kvm_slots(&vm), region_calls(&vm)), (before, vec![]));
    drop(inside);
    // From a vCPU's thread that is not: nothing wrong with that.
    commit(&BESIDE).unwrap();
}

/// Edits its memory when it is told of a change, which must not be.
#[derive(Debug)]
struct Meddler(Weak<CvmMemory>, Mutex<Vec<Result<(), String>>>);

impl Listener for Meddler {
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        if let Some(memory) = self.0.upgrade() {
            let mut edit = memory.edit();
            edit.split(PAGE).unwrap();
            let result = edit.commit(&BESIDE).map(drop);
            let reentrant = matches!(result, Err(EditError::Locked(LockError::Reentrant { .. })));
            self.1.lock().unwrap().push(if reentrant { Ok(()) } else { Err(format!("{run:?}: {result:?}")) });
        }
        Ok(())
    }

    fn unmap(&self, _: &SharedRun) {}
}

#[test]
fn a_listener_cannot_edit() {
    let (_, memory, _) = plain_vm(64, SlotFlags::empty());
    let meddler = Arc::new(Meddler(Arc::downgrade(&memory), Mutex::default()));
    let listener: Arc<dyn Listener> = Arc::clone(&meddler) as Arc<dyn Listener>;
    let mut edit = memory.edit();
    edit.truncate(0, 32 * PAGE).unwrap();
    edit.commit(&FEW).unwrap();
    memory.add_listener(&listener).unwrap_or_else(|error| panic!("{error}"));
    let mut edit = memory.edit();
    edit.grow(0, 40 * PAGE).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(*meddler.1.lock().unwrap(), [Ok(()), Ok(())]);
}

#[test]
fn two_edits_at_once_both_happen() {
    let (_, memory, _) = plain_vm(1024, SlotFlags::empty());
    thread::scope(|scope| {
        for who in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                for at in 0..16 {
                    let mut edit = memory.edit();
                    edit.punch_hole((who + 4 * at) * 16 * PAGE, PAGE).unwrap();
                    // Made on an older layout than it is committed on, more often than not.
                    thread::yield_now();
                    edit.commit(&BESIDE).unwrap();
                }
            });
        }
    });
    let expected: Vec<_> = (0..64).map(|at| gfns(at * 16 + 1, at * 16 + 16)).collect();
    assert_eq!(slots(&memory), expected);
}

/// Blocks while it is asked for bits: a commit that takes long, with the gate closed.
#[derive(Debug)]
struct Slow(Mutex<std::sync::mpsc::Sender<()>>, Mutex<std::sync::mpsc::Receiver<()>>);

impl Harvest for Slow {
    fn harvest(&self, _: &Memslot, _: &SharedSlice) -> Result<(), Errno> {
        self.0.lock().unwrap().send(()).unwrap();
        self.1.lock().unwrap().recv().unwrap();
        Ok(())
    }
}

/// T13: an exit on memory that is not in flux is handled while the gate is closed.
#[test]
fn t13_an_exit_elsewhere_is_not_held_up() {
    let vm = SoftVm::tagged();
    let backing = slice(16 * PAGE).backing;
    let logged = plain(MIB, 16 * PAGE, &backing, 0, SlotFlags::LOG_DIRTY);
    let memory = CvmMemory::builder().ram(0, 64 * PAGE).slot(logged).build(Arc::new(vm.clone()));
    let memory = Arc::new(memory.unwrap());
    let (asked, is_asked) = channel();
    let (answer, answered) = channel();
    memory.set_harvest(Some(Arc::new(Slow(Mutex::new(asked), Mutex::new(answered)))));
    let guest = SoftGuest::new(&vm);
    let kick = Arc::new(SoftKick(guest.vcpu().immediate_exit()));
    let mut runner = Runner::new(&memory, guest, kick);
    thread::scope(|scope| {
        let commit = scope.spawn(|| {
            let mut edit = memory.edit();
            edit.delete(MIB, 16 * PAGE).unwrap();
            edit.commit(&BESIDE).unwrap()
        });
        is_asked.recv().unwrap();
        // The gate is closed. An exit elsewhere:
        let mut exits = VcpuExits::new(Arc::clone(&memory));
        let fault = MemoryFault { errno: Errno::EFAULT, flags: 0, gpa: 0, size: PAGE };
        assert!(matches!(exits.handle(&mut Exit::MemoryFault(fault)), Action::Resume(Handled::Converted { .. })));
        memory.write(Gpa(0), b"and a device").unwrap();
        assert!(!commit.is_finished());
        answer.send(()).unwrap();
        commit.join().unwrap();
    });
    runner.perform(GuestOp::Write { gpa: 8 * PAGE, data: vec![1] });
}

#[test]
fn an_access_that_kvm_took_for_a_device_is_completed() {
    let (_, memory, backing) = plain_vm(64, SlotFlags::empty());
    let mut exits = VcpuExits::new(Arc::clone(&memory));
    let completed = |action| matches!(action, Action::Resume(Handled::Completed));
    let mut write = |gpa, data: &[u8]| exits.handle(&mut Exit::Mmio(Mmio::Write { gpa, data }));
    assert!(completed(write(0x1ff8, b"written!")));
    assert!(matches!(write(64 * PAGE, b"device"), Action::NotOurs));
    let mut data = [0; 8];
    assert!(completed(exits.handle(&mut Exit::Mmio(Mmio::Read { gpa: 0x1ff8, data: &mut data }))));
    assert_eq!(&data, b"written!");
    let mut bytes = [0; 8];
    backing.slice(0x1ff8, 8).unwrap().copy_to(&mut bytes[..]);
    assert_eq!(&bytes, b"written!");
    // A write to ROM is for whoever emulates flash.
    let mut edit = memory.edit();
    edit.set_flags(0, 16 * PAGE, SlotFlags::READONLY).unwrap();
    edit.commit(&BESIDE).unwrap();
    let mut write = |gpa, data: &[u8]| exits.handle(&mut Exit::Mmio(Mmio::Write { gpa, data }));
    assert!(matches!(write(0x1000, b"rom"), Action::NotOurs));
    assert!(completed(exits.handle(&mut Exit::Mmio(Mmio::Read { gpa: 0x1ff8, data: &mut data }))));
    // Private memory is not the host's to touch.
    let (_, memory) = private_vm(SoftVm::software_protected(), 64);
    let mut exits = VcpuExits::new(memory);
    assert!(matches!(exits.handle(&mut Exit::Mmio(Mmio::Write { gpa: 0, data: b"no" })), Action::NotOurs));
}

#[test]
fn an_emulation_failure_is_tried_again_only_after_a_change() {
    let (_, memory, _) = plain_vm(64, SlotFlags::empty());
    let mut exits = VcpuExits::new(Arc::clone(&memory));
    assert!(matches!(exits.emulation_failure(&[Gpa(0)]), Action::NotOurs), "gone astray: nothing has changed");
    let mut edit = memory.edit();
    edit.split(PAGE_SIZE).unwrap();
    edit.commit(&BESIDE).unwrap();
    assert!(matches!(exits.emulation_failure(&[Gpa(1 << 40), Gpa(0)]), Action::Resume(Handled::Retried)));
    assert!(matches!(exits.emulation_failure(&[Gpa(0)]), Action::NotOurs), "the same again is no accident");
    assert!(matches!(exits.emulation_failure(&[Gpa(1 << 40)]), Action::NotOurs));
}

/// A vCPU that minds no gate: what it comes upon in flux is completed, byte for byte.
#[test]
fn without_the_gate_accesses_in_flux_are_completed() {
    let vm = SoftVm::default_type();
    let backing = slice(64 * PAGE).backing;
    let memory =
        CvmMemory::builder().slot(plain(0, 64 * PAGE, &backing, 0, SlotFlags::empty())).build(Arc::new(vm.clone()));
    let memory = Arc::new(memory.unwrap());
    let done = std::sync::atomic::AtomicBool::new(false);
    let ungated = Arc::new(Gate::default());
    let completed = thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            let guest = SoftGuest::new(&vm);
            let kick = Arc::new(SoftKick(guest.vcpu().immediate_exit()));
            let mut runner = Runner::with_gate(&memory, &ungated, guest, kick);
            let mut value = 0_u64;
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                value += 1;
                for page in 0..64 {
                    let gpa = page * PAGE + 8;
                    runner.perform(GuestOp::Write { gpa, data: (value + page).to_le_bytes().to_vec() });
                    let found = runner.perform(GuestOp::Read { gpa, len: 8 });
                    assert_eq!(found, Outcome::Data((value + page).to_le_bytes().to_vec()));
                    if runner.completed > 20 {
                        done.store(true, std::sync::atomic::Ordering::Release);
                    }
                }
            }
            runner.completed
        });
        while !done.load(std::sync::atomic::Ordering::Acquire) && !vcpu.is_finished() {
            for whole in [false, true] {
                let mut edit = memory.edit();
                let _ = if whole { edit.merge(0, 64 * PAGE).unwrap() } else { edit.split(32 * PAGE).unwrap() };
                edit.commit(&BESIDE).unwrap();
            }
        }
        vcpu.join().unwrap()
    });
    assert!(completed > 20);
}
