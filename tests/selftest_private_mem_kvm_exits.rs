//! The kernel's `private_mem_kvm_exits_test`: what a vCPU comes back with when its private page has no memory, and what
//! the library makes of it.

mod selftest_kit;

use std::ops::ControlFlow;
use std::sync::{Arc, mpsc};
use std::thread;

use cvm_memory::addr::{FilePage, Gfn, GfnRange, Gpa};
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::convert::{ConvertError, Refusal, State};
use cvm_memory::exits::{Action, GuestError, Handled, VcpuExits};
use cvm_memory::hypervisor::{Exit, MemoryFault, Platform, Vcpu};
use cvm_memory::layout::{SlotFlags, SlotId};
use cvm_memory::memory::{CvmMemory, SlotSpec};
use cvm_memory::prefault::PrefaultOptions;
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use nix::errno::Errno;
use selftest_kit::*;

const GPA: u64 = 1 << 30;
const SLOT: u16 = 10;
/// What the kernel says of either case.
const FAULT: MemoryFault = MemoryFault { errno: Errno::EFAULT, flags: MemoryFault::PRIVATE, gpa: GPA, size: PAGE };
const READ: GuestOp = GuestOp::Check { gpa: GPA, len: PAGE, byte: 0x5a };

/// Lets the guest read its page over and over until that faults. Calls `each` after every time that it could.
fn spin(guest: &mut impl Guest, mut each: impl FnMut()) -> MemoryFault {
    loop {
        guest.start(READ);
        loop {
            match guest.run() {
                Ok(Exit::Halt) => break,
                Ok(Exit::MemoryFault(fault)) => return fault,
                Ok(exit) => panic!("{exit:?}"),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => panic!("{errno}"),
            }
        }
        assert_eq!(guest.result(), Some(Outcome::Same));
        each();
    }
}

/// The slot is deleted while the vCPU spins on its page.
fn a_slot_deleted_under_a_spinning_vcpu<M: Machine>() {
    let Some(vm) = M::create(Platform::SOFTWARE_PROTECTED) else { return };
    let file = Arc::new(vm.create_guest_memfd(PAGE, 0).unwrap());
    let shared: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(PAGE).unwrap());
    let id = SlotId::new(SLOT);
    let slot = SlotSpec {
        id: Some(id),
        gpa: GPA,
        size: PAGE,
        shared: SharedSlice { backing: shared, offset: 0 },
        private: Some((file, FilePage::ZERO)),
        flags: SlotFlags::empty(),
    };
    let memory = Arc::new(CvmMemory::builder().slot(slot.clone()).build(Arc::new(vm.clone())).unwrap());
    let mut exits = VcpuExits::new(Arc::clone(&memory));
    let mut guest = vm.guest(0);
    assert_eq!(guest.perform(GuestOp::Fill { gpa: GPA, len: PAGE, byte: 0x5a }), Outcome::Done);

    let (mut times, mut waits) = (0_u64, 0_u64);
    thread::scope(|scope| {
        let (spins, spinning) = mpsc::channel();
        let memory = &memory;
        scope.spawn(move || {
            spinning.recv().unwrap();
            memory.remove_slot(id).unwrap();
        });
        let fault = spin(&mut guest, || {
            times += 1;
            if times == 8 {
                spins.send(()).unwrap();
            }
        });
        assert_eq!(fault, FAULT);

        // KVM's slot goes before the record of it, so at first there may seem to be nothing amiss.
        let refusal = loop {
            match exits.handle(&mut Exit::MemoryFault(fault)) {
                Action::Resume(Handled::Unchanged) => waits += 1,
                action => break action,
            }
            let again = guest.run();
            let Ok(Exit::MemoryFault(again)) = again else { panic!("{again:?}") };
            assert_eq!(again, FAULT);
        };
        let gfn = Gfn::containing(GPA);
        assert!(
            matches!(refusal, Action::GuestError(GuestError::NotMemory { gfn: at, to: State::Private }) if at == gfn),
            "{refusal:?}"
        );
    });
    println!("{}: {times} reads, then {FAULT:x?}; {waits} resumed before the record said so", M::NAME);

    // A private access restarts: with the slot back, the very same read finds the page as it was.
    assert_eq!(memory.state(Gfn::containing(GPA)), None);
    memory.add_slots(vec![slot]).unwrap();
    assert_eq!(memory.state(Gfn::containing(GPA)), Some(State::Private));
    assert!(matches!(guest.run(), Ok(Exit::Halt)));
    assert_eq!(guest.result(), Some(Outcome::Same));
}

/// The page has a slot, but that has no file.
fn a_private_page_of_a_slot_without_a_file<M: Machine>() {
    let Some(vm) = M::create(Platform::SOFTWARE_PROTECTED) else { return };
    let memory = Arc::new(CvmMemory::builder().plain_ram(GPA, PAGE).build(Arc::new(vm.clone())).unwrap());
    let mut exits = VcpuExits::new(Arc::clone(&memory));
    let mut guest = vm.guest(0);
    assert_eq!(guest.perform(GuestOp::Fill { gpa: GPA, len: PAGE, byte: 0x5a }), Outcome::Done);

    // Nobody but the kernel is told.
    set_private(&vm, GPA, PAGE, true);
    let fault = spin(&mut guest, || panic!("read a private page that has no memory"));
    assert_eq!(fault, FAULT);
    // It could be that the page has just been made shared.
    assert!(matches!(exits.handle(&mut Exit::MemoryFault(fault)), Action::Resume(Handled::Unchanged)));
    assert!(matches!(guest.run(), Ok(Exit::MemoryFault(FAULT))));
    let refusal = exits.handle(&mut Exit::MemoryFault(fault));
    let Action::GuestError(GuestError::Refused(ConvertError::Refused(refusal))) = refusal else {
        panic!("{refusal:?}")
    };
    let range = GfnRange::from_bytes(GPA, PAGE).unwrap();
    assert_eq!(refusal, Refusal::NotConvertible { range, part: range, slot: 0 });
    println!("{}: {FAULT:x?}; {refusal}", M::NAME);

    // Neither the kernel nor the library has changed anything.
    assert_eq!(memory.state(Gfn::containing(GPA)), Some(State::Shared));
    set_private(&vm, GPA, PAGE, false);
    assert!(matches!(guest.run(), Ok(Exit::Halt)));
    assert_eq!(guest.result(), Some(Outcome::Same));
}

/// The guest takes memory for a device, before it is there; KVM goes on about that until the page is mapped.
fn a_private_page_that_was_device_memory<M: Machine>() {
    let Some(vm) = M::create(Platform::SOFTWARE_PROTECTED) else { return };
    let memory = Arc::new(CvmMemory::builder().ram(GPA + PAGE, PAGE).build(Arc::new(vm.clone())).unwrap());
    let mut exits = VcpuExits::new(Arc::clone(&memory));
    let mut guest = vm.guest(0);
    guest.start(GuestOp::Read { gpa: GPA, len: 1 });
    match guest.run() {
        Ok(mut exit @ Exit::Mmio(_)) => assert!(matches!(exits.handle(&mut exit), Action::NotOurs)),
        other => panic!("{other:?}"),
    }
    let file = Arc::new(vm.create_guest_memfd(PAGE, 0).unwrap());
    let shared: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(PAGE).unwrap());
    memory
        .add_slots(vec![SlotSpec {
            id: None,
            gpa: GPA,
            size: PAGE,
            shared: SharedSlice { backing: shared, offset: 0 },
            private: Some((file, FilePage::ZERO)),
            flags: SlotFlags::empty(),
        }])
        .unwrap();
    assert_eq!(memory.state(Gfn::containing(GPA)), Some(State::Private));

    guest.start(GuestOp::Fill { gpa: GPA, len: PAGE, byte: 0x5a });
    let stale = MemoryFault { flags: 0, ..FAULT };
    let mut handled = Vec::new();
    loop {
        let mut exit = guest.run().unwrap();
        if matches!(exit, Exit::Halt) {
            break;
        }
        assert!(matches!(exit, Exit::MemoryFault(fault) if fault == stale), "{exit:?}");
        let action = exits.handle(&mut exit);
        if let Action::Prefault(gpa) = action {
            let page = GfnRange::page(gpa.gfn());
            let options = PrefaultOptions::default();
            memory.prefault(&[page], &mut [&mut guest], &options, &mut |_| ControlFlow::Continue(())).unwrap();
        }
        handled.push(action);
    }
    assert!(matches!(handled[..], [Action::Resume(Handled::Unchanged), Action::Prefault(Gpa(GPA))]), "{handled:?}");
    // It has not been made shared on the way, as such a fault would ask for elsewhere.
    assert_eq!(memory.state(Gfn::containing(GPA)), Some(State::Private));
    assert_eq!(memory.statistics().requests.pages_converted, 0);
    assert_eq!(guest.perform(READ), Outcome::Same);
}

/// The same of a page that never had a slot.
fn a_private_page_without_a_slot<M: Machine>() {
    let Some(vm) = M::create(Platform::SOFTWARE_PROTECTED) else { return };
    let memory = Arc::new(CvmMemory::builder().plain_ram(GPA + PAGE, PAGE).build(Arc::new(vm.clone())).unwrap());
    let mut exits = VcpuExits::new(memory);
    let mut guest = vm.guest(0);
    set_private(&vm, GPA, PAGE, true);
    let fault = spin(&mut guest, || panic!("read a private page that has no slot"));
    assert_eq!(fault, FAULT);
    let refusal = exits.handle(&mut Exit::MemoryFault(fault));
    assert!(matches!(refusal, Action::GuestError(GuestError::NotMemory { to: State::Private, .. })), "{refusal:?}");
}

on_both_machines!(
    a_slot_deleted_under_a_spinning_vcpu,
    a_private_page_of_a_slot_without_a_file,
    a_private_page_that_was_device_memory,
    a_private_page_without_a_slot,
);
