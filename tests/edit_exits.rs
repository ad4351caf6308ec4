//! Exits that come upon memory whose slots are being replaced, and such that do not.

mod edit_kit;

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;

use cvm_memory::addr::{Gpa, PAGE_SIZE};
use cvm_memory::backing::SharedSlice;
use cvm_memory::convert::State;
use cvm_memory::dirty::{Clearing, Mechanism, Stage, Tracker, Unloggable};
use cvm_memory::edit::Harvest;
use cvm_memory::exits::{Action, ExitOptions, GuestError, Handled, VcpuExits};
use cvm_memory::gate::Gate;
use cvm_memory::hypervisor::{Exit, MemoryFault, Mmio};
use cvm_memory::layout::{Memslot, SlotFlags, SlotId};
use cvm_memory::memory::{CvmMemory, EditError, SlotError, SlotSpec};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{GuestOp, Outcome, SoftGuest};
use edit_kit::*;
use nix::errno::Errno;

/// Blocks while it is asked for bits: a commit that takes long, with the gate closed.
#[derive(Debug)]
struct Slow(Mutex<std::sync::mpsc::Sender<()>>, Mutex<std::sync::mpsc::Receiver<()>>);

impl Harvest for Slow {
    fn harvest(&self, _: &Memslot, _: &SharedSlice) -> Result<(), Errno> {
        self.0.lock().unwrap().send(()).unwrap();
        self.1.lock().unwrap().recv().unwrap();
        Ok(())
    }

    fn wrote(&self, _: &SharedSlice, _: u64) {}
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
    memory.set_harvest(Some(Arc::new(Slow(Mutex::new(asked), Mutex::new(answered))))).unwrap();
    let guest = SoftGuest::new(&vm);
    let kick = Arc::new(guest.kick());
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
}

/// What a fault would have come to, had there been a slot.
#[test]
fn an_access_to_private_memory_that_kvm_took_for_a_device() {
    let write = |exits: &mut VcpuExits| exits.handle(&mut Exit::Mmio(Mmio::Write { gpa: 0x3008, data: b"shared" }));
    // Accesses say whether they are private, so this one asks for the page to be shared.
    let (_, memory) = private_vm(SoftVm::tagged(), 64);
    let mut exits = VcpuExits::new(Arc::clone(&memory));
    assert!(matches!(write(&mut exits), Action::Resume(Handled::Completed)));
    let states: Vec<_> = (2..5).map(|page| memory.state(gfn(page))).collect();
    assert_eq!(states, [Some(State::Private), Some(State::Shared), Some(State::Private)]);
    let mut bytes = [0; 6];
    memory.read(Gpa(0x3008), &mut bytes).unwrap();
    assert_eq!(&bytes, b"shared");
    // Unless that is not allowed.
    let (_, memory) = private_vm(SoftVm::tagged(), 64);
    let options = ExitOptions { implicit_conversion: false, ..ExitOptions::default() };
    let mut exits = VcpuExits::with_options(Arc::clone(&memory), options);
    let implicit = |action| {
        let Action::GuestError(GuestError::Implicit { gfn: at, to: State::Shared }) = action else { return false };
        at == gfn(3)
    };
    assert!(implicit(write(&mut exits)));
    // Where the attribute alone decides, nobody has asked for anything: contents are not given up.
    let (_, protected) = private_vm(SoftVm::software_protected(), 64);
    assert!(implicit(write(&mut VcpuExits::new(Arc::clone(&protected)))));
    for memory in [memory, protected] {
        assert_eq!(memory.state(gfn(3)), Some(State::Private));
    }
}

/// KVM knows nothing of a write that is completed here.
#[test]
fn a_write_that_is_completed_is_dirty() {
    let (vm, memory, backing) = plain_vm(64, SlotFlags::LOG_DIRTY);
    let tracker = Arc::new(Tracker::new(Arc::new(vm), Mechanism::Bitmap(Clearing::ByLooking)));
    let bitmap = tracker.add_backing(backing.as_ref()).unwrap();
    tracker.start(memory.space().layout(), Unloggable::default()).unwrap();
    memory.set_harvest(Some(Arc::<Tracker>::clone(&tracker))).unwrap();
    // The memory lies elsewhere in the backing than in the guest.
    let mut edit = memory.edit();
    edit.move_to(0, 64 * PAGE, MIB).unwrap();
    edit.commit(&BESIDE).unwrap();
    let mut exits = VcpuExits::new(Arc::clone(&memory));
    let action = exits.handle(&mut Exit::Mmio(Mmio::Write { gpa: MIB + 0x4ffc, data: b"on both " }));
    assert!(matches!(action, Action::Resume(Handled::Completed)));
    let mut data = [0; 8];
    let action = exits.handle(&mut Exit::Mmio(Mmio::Read { gpa: MIB + 0x8000, data: &mut data }));
    assert!(matches!(action, Action::Resume(Handled::Completed)));
    assert_eq!(bitmap.runs().map(|run| (run.start().get(), run.end().get())).collect::<Vec<_>>(), [(4, 6)]);
}

/// A slot that is removed goes as in any other edit: with nobody inside, and not before its log was harvested.
#[test]
fn a_slot_that_is_removed_loses_no_dirty_bit() {
    let vm = SoftVm::default_type();
    let backing = slice(64 * PAGE).backing;
    let slot = plain(0, 64 * PAGE, &backing, 0, SlotFlags::LOG_DIRTY);
    let memory = Arc::new(CvmMemory::builder().slot(slot.clone()).build(Arc::new(vm.clone())).unwrap());
    let id = SlotId::new(0);
    let refused = memory.remove_slot(id).unwrap_err();
    assert!(matches!(&refused, SlotError::Edit(error) if matches!(**error, EditError::NobodyHarvests { slot: 0 })));
    let tracker = Arc::new(Tracker::new(Arc::new(vm.clone()), Mechanism::Bitmap(Clearing::ByLooking)));
    let bitmap = tracker.add_backing(backing.as_ref()).unwrap();
    tracker.start(memory.space().layout(), Unloggable::default()).unwrap();
    memory.set_harvest(Some(Arc::<Tracker>::clone(&tracker))).unwrap();

    let guest = SoftGuest::new(&vm);
    let kick = Arc::new(guest.kick());
    let mut runner = Runner::new(&memory, guest, kick);
    runner.perform(GuestOp::Write { gpa: 5 * PAGE, data: vec![1] });
    memory.remove_slot(id).unwrap();
    assert_eq!(memory.gate().closures(), 1);
    let dirty = || bitmap.runs().map(|run| (run.start().get(), run.end().get())).collect::<Vec<_>>();
    assert_eq!(dirty(), [(5, 6)]);
    // What is added is followed, though at other frames.
    memory.add_slots(vec![SlotSpec { gpa: MIB, ..slot }]).unwrap();
    runner.perform(GuestOp::Write { gpa: MIB + 9 * PAGE, data: vec![1] });
    tracker.sync(Stage::Last).unwrap();
    assert_eq!(dirty(), [(5, 6), (9, 10)]);
    // From inside, an error and not a hang.
    let pass = Gate::register(memory.gate(), Arc::new(SoftGuest::new(&vm).kick()));
    let inside = pass.enter().unwrap();
    assert!(matches!(memory.remove_slot(id).unwrap_err(), SlotError::Edit(_)));
    drop(inside);
    memory.remove_slot(id).unwrap();
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
            let kick = Arc::new(guest.kick());
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
