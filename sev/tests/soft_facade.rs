//! What makes a `CvmMemory` on an SNP VM different from others: answers to guests, bindings, edits, holes, defaults. Each of
//! these turns red if the platform's description says otherwise.

#[path = "kit/soft.rs"]
mod soft;

use std::sync::Arc;

use cvm_memory::addr::{FilePage, Gfn, GfnRange};
use cvm_memory::backing::{SharedMemory, SharedSlice};
use cvm_memory::convert::{Request, State};
use cvm_memory::edit::{Hazard, Prefer};
use cvm_memory::exits::{Action, ExitOptions, Handled, VcpuExits};
use cvm_memory::hypervisor::{Exit, Vcpu as _};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{Builder, CommitOptions, CvmMemory, EditError, SlotError, SlotSpec};
use cvm_memory::soft::OpResult;
use cvm_memory_sev::ghcb::{Operation, msr};
use cvm_memory_sev::launch::{Policy, StartOptions};
use cvm_memory_sev::rmp::PageState;
use cvm_memory_sev::soft::{GuestFailed, rmpadjust, vmgexit};
use soft::{Guests, launched};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Where memory is moved to.
const AWAY: u64 = 16 * MIB;

fn ram() -> Builder {
    CvmMemory::builder().ram(0, 4 * MIB)
}

fn bytes(start: u64, len: u64) -> GfnRange {
    GfnRange::from_bytes(start, len).unwrap()
}

/// What the VMM writes into a request for a page state change before KVM sees it.
fn answer(guests: &mut Guests, exits: &mut VcpuExits, gpa: u64, to: Operation) -> (Handled, u64) {
    let vcpu = guests.vcpus[0].vcpu();
    vcpu.start(vmgexit(msr::page_state_request(gpa / PAGE, to)));
    let mut exit = vcpu.run().unwrap();
    let handled = match exits.handle(&mut exit) {
        Action::Resume(handled) => handled,
        other => panic!("{other:?}"),
    };
    let Exit::Hypercall(call) = exit else { panic!("{exit:?}") };
    let ret = *call.ret;
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    vcpu.take_result();
    (handled, ret)
}

/// KVM makes an error of "try again", and Linux gives up over an error.
#[test]
fn the_guest_is_never_told_to_try_again() {
    let mut guests = launched(ram(), 1);
    let memory = Arc::clone(&guests.memory);
    // Nor because it has had its share: one page, and then nothing for a while.
    let options = ExitOptions { budget: Some(1), ..ExitOptions::default() };
    let mut exits = VcpuExits::with_options(Arc::clone(&memory), options);
    for page in 8..12 {
        let answer = answer(&mut guests, &mut exits, page * PAGE, Operation::Shared);
        assert_eq!(answer, (Handled::Converted { pages: 1 }, 0), "page {page}");
    }
    let _pin = memory.pin(bytes(0x8000, PAGE)).unwrap();
    assert_eq!(answer(&mut guests, &mut exits, 0x8000, Operation::Private), (Handled::Refused, 22));
    assert_eq!(memory.state(Gfn::containing(0x8000)), Some(State::Shared));
}

/// All of memory at other frames than now.
fn slot_at(memory: &CvmMemory, gpa: u64) -> SlotSpec {
    let space = memory.space();
    let slot = *space.layout().table().slots().next().unwrap();
    let (file, range) = slot.file_range().unwrap();
    let private = Some((Arc::clone(space.file(file).unwrap()), range.start()));
    let shared = space.shared(slot.id).unwrap().clone();
    SlotSpec { id: Some(slot.id), gpa, size: slot.gfns.bytes(), shared, private, flags: SlotFlags::empty() }
}

#[test]
fn a_page_is_bound_elsewhere_only_once_it_is_freed() {
    let mut guests = launched(ram(), 1);
    let memory = Arc::clone(&guests.memory);
    guests.vcpus[0].accept(0x8000, 1).unwrap();
    guests.vcpus[0].write(0x8000, b"kept").unwrap();
    // By an edit, and slot by slot.
    memory.convert(&Request { range: bytes(0x10_0000, MIB), to: State::Shared }).unwrap().converted().unwrap();
    let mut edit = memory.edit();
    edit.move_to(0x10_0000, MIB, AWAY).unwrap();
    let refused = edit.clone().commit(&CommitOptions::default());
    assert!(matches!(refused, Err(EditError::Hazard(Hazard::Rebound { .. }))), "{refused:?}");
    edit.commit(&CommitOptions { free_rebound: true, ..CommitOptions::default() }).unwrap();
    guests.vcpus[0].accept(AWAY, 1).unwrap();
    assert_eq!(guests.snp.rmp_entry(Gfn::containing(AWAY)).unwrap().state(), PageState::GuestValid);
    assert_eq!(guests.vcpus[0].read(0x8000, 4).unwrap(), b"kept");

    let guests = launched(ram(), 1);
    let (there, away) = (slot_at(&guests.memory, 0), slot_at(&guests.memory, AWAY));
    guests.memory.remove_slot(there.id.unwrap()).unwrap();
    let refused = guests.memory.add_slots(vec![away.clone()]);
    assert!(matches!(refused, Err(SlotError::Rebound { was: Gfn::ZERO, .. })), "{refused:?}");
    guests.memory.add_slots(vec![there]).unwrap();
    // Another part of the file is nobody's yet.
    let file = guests.snp.vm();
    let file = Arc::new(cvm_memory::hypervisor::Hypervisor::create_guest_memfd(file, 4 * MIB, 0).unwrap());
    let shared = SharedSlice { backing: Arc::new(SharedMemory::new(away.size).unwrap()), offset: 0 };
    let fresh = SlotSpec { id: None, private: Some((file, FilePage::ZERO)), shared, ..away };
    guests.memory.add_slots(vec![fresh]).unwrap();
}

/// What an edit must not take, and that all vCPUs are out while a slot is replaced.
#[test]
fn edits_keep_save_areas() {
    let mut guests = launched(ram(), 1);
    guests.vcpus[0].accept(0x9000, 1).unwrap();
    assert_eq!(guests.vcpus[0].perform(rmpadjust(0x9000, 1, 0, true)).unwrap(), OpResult::Instruction(0));
    let memory = Arc::clone(&guests.memory);
    let mut edit = memory.edit();
    edit.punch_hole(0x8000, 2 * PAGE).unwrap();
    let refused = edit.commit(&CommitOptions::default());
    assert!(matches!(refused, Err(EditError::Hazard(Hazard::LosesVcpu { .. }))), "{refused:?}");
    let mut edit = memory.edit();
    edit.split(0x9000).unwrap();
    assert!(edit.commit(&CommitOptions::default()).unwrap().stopped.is_some());
    // Memory without anything private goes, and every vCPU is out nevertheless.
    memory.convert(&Request { range: bytes(2 * MIB, 2 * MIB), to: State::Shared }).unwrap().converted().unwrap();
    let mut edit = memory.edit();
    edit.punch_hole(2 * MIB, 2 * MIB).unwrap();
    assert!(edit.commit(&CommitOptions::default()).unwrap().stopped.is_some());
    assert_eq!(guests.snp.rmp_entry(Gfn::containing(0x9000)).unwrap().state(), PageState::GuestValid);
}

/// A shared access to a hole would be remembered as one to a device, for good.
#[test]
fn memory_without_a_slot_is_private_to_kvm() {
    let mut guests = launched(ram(), 1);
    let memory = Arc::clone(&guests.memory);
    let upper = bytes(2 * MIB, 2 * MIB);
    memory.convert(&Request { range: upper, to: State::Shared }).unwrap().converted().unwrap();
    let is_sealed =
        |guests: &Guests| guests.snp.vm().private_gfns().iter().any(|gfns| gfns.intersection(&upper) == Some(upper));
    let no_device = |guests: &mut Guests| {
        let touched = guests.vcpus[0].write_shared(2 * MIB, b"?");
        let Err(GuestFailed::Exit(what)) = touched else { panic!("{touched:?}") };
        assert!(!what.contains("Mmio"), "{what}");
    };

    let mut edit = memory.edit();
    edit.punch_hole(2 * MIB, 2 * MIB).unwrap();
    edit.commit(&CommitOptions::default()).unwrap();
    assert!(is_sealed(&guests));
    no_device(&mut guests);
    let mut edit = memory.edit();
    edit.grow(0, 4 * MIB).unwrap();
    edit.commit(&CommitOptions { prefer: Prefer::FewSlots, ..CommitOptions::default() }).unwrap();
    assert!(!is_sealed(&guests));
    guests.vcpus[0].write_shared(2 * MIB, b"shared").unwrap();

    // Slot by slot.
    let spec = slot_at(&memory, 0);
    memory.remove_slot(spec.id.unwrap()).unwrap();
    assert!(is_sealed(&guests));
    no_device(&mut guests);
    memory.add_slots(vec![spec]).unwrap();
    assert!(!is_sealed(&guests));
    assert_eq!(memory.state(Gfn::containing(2 * MIB)), Some(State::Shared));
    assert_eq!(guests.vcpus[0].read_shared(2 * MIB, 6).unwrap(), b"shared");
}

/// Freed at once unless somebody asks for something else; and nobody debugs a guest unasked.
#[test]
fn defaults() {
    let mut guests = launched(ram(), 1);
    guests.vcpus[0].accept(0x8000, 1).unwrap();
    guests.memory.convert(&Request { range: bytes(0x8000, PAGE), to: State::Shared }).unwrap().converted().unwrap();
    assert_eq!(guests.snp.rmp_entry(Gfn::containing(0x8000)), None, "freed, and so the host's");
    assert_eq!(guests.memory.statistics().deferred_bytes, 0);

    for policy in [Policy::default(), StartOptions::default().policy] {
        assert!(!policy.allows_debugging());
        assert_eq!(policy.bits(), 0x3_0000);
    }
}
