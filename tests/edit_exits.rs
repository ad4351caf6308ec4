//! Exits that come upon memory whose slots are being replaced, and such that do not.

mod edit_kit;

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;

use cvm_memory::addr::{Gpa, PAGE_SIZE};
use cvm_memory::backing::SharedSlice;
use cvm_memory::edit::Harvest;
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::gate::Gate;
use cvm_memory::hypervisor::{Exit, MemoryFault, Mmio};
use cvm_memory::layout::{Memslot, SlotFlags};
use cvm_memory::memory::CvmMemory;
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
