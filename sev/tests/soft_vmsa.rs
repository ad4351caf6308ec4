//! Save areas in guest memory: a vCPU whose page is taken from it cannot be entered any more, and not every edit takes it.

#[path = "kit/soft.rs"]
mod soft;

use cvm_memory::addr::{FilePage, FileRange, Gfn, GfnRange};
use cvm_memory::backing::SharedSlice;
use cvm_memory::convert::{DiscardPolicy, Request, State};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{CvmMemory, SlotSpec};
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_sev::ghcb::page::{EXIT_AP_CREATION, EXIT_INFO_1, EXIT_INFO_2, VALID_BITMAP};
use cvm_memory_sev::soft::{GuestFailed, SnpGuest, rmpadjust};
use soft::{Guests, launched};

const GHCB: u64 = 0x1000;
const VMSA: u64 = 0x9000;
const RAX: u64 = 0x1f8;
const CREATE: u64 = 1;
const DESTROY: u64 = 2;

/// What the guest does to start or stop vCPU 1: Linux does the former for every vCPU but the first.
fn ask(guest: &mut SnpGuest, request: u64, vmsa: u64, features: u64) -> [u64; 2] {
    guest.write_shared(GHCB + RAX, &features.to_le_bytes()).unwrap();
    guest.request(GHCB, EXIT_AP_CREATION, 1 << 32 | request, vmsa).unwrap();
    // RAX is valid too: bit 63 of the bitmap. The first request went without.
    let mut bitmap = [0; 8];
    bitmap[7] = 0x80;
    guest.write_shared(GHCB + VALID_BITMAP, &bitmap).unwrap();
    for (offset, value) in [(0x390, EXIT_AP_CREATION), (EXIT_INFO_1, 1 << 32 | request), (EXIT_INFO_2, vmsa)] {
        guest.write_shared(GHCB + offset, &value.to_le_bytes()).unwrap();
    }
    guest.perform(cvm_memory_sev::soft::vmgexit(GHCB)).unwrap();
    [EXIT_INFO_1, EXIT_INFO_2].map(|offset| guest.field(GHCB, offset).unwrap())
}

/// Two vCPUs, of which the second has its save area at `VMSA` in guest memory.
fn guests(policy: DiscardPolicy) -> Guests {
    let mut guests = launched(CvmMemory::builder().ram(0, 4 << 20).discard(policy), 2);
    let boot = &mut guests.vcpus[0];
    boot.set_up_ghcb(GHCB).unwrap();
    boot.accept(VMSA, 1).unwrap();
    boot.accept(0x5000, 1).unwrap();
    assert_eq!(boot.perform(rmpadjust(VMSA, 1, 0, true)).unwrap(), OpResult::Instruction(0));
    assert_eq!(ask(boot, CREATE, VMSA, 1), [0, 0]);
    runs(&mut guests);
    guests
}

fn second_vcpu(guests: &mut Guests) -> Result<OpResult, GuestFailed> {
    guests.vcpus[1].perform(GuestOp::Read { gpa: 0x5000, len: 1, private: true })
}

fn runs(guests: &mut Guests) {
    assert_eq!(second_vcpu(guests).unwrap(), OpResult::Read(vec![0]));
}

/// `KVM_EXIT_FAIL_ENTRY` with reason -1, on every attempt.
fn is_lost(guests: &mut Guests) {
    for _ in 0..3 {
        assert!(matches!(second_vcpu(guests), Err(GuestFailed::NoEntry { reason: u64::MAX })));
    }
    // The first vCPU's save area is KVM's own.
    guests.vcpus[0].read(0x5000, 1).unwrap();
}

/// The slot of all memory, and what it takes to make it again.
fn slot(guests: &Guests) -> SlotSpec {
    let space = guests.memory.space();
    let slot = *space.layout().table().slots().next().unwrap();
    let (file, range) = slot.file_range().unwrap();
    SlotSpec {
        id: Some(slot.id),
        gpa: slot.gfns.start_byte(),
        size: slot.gfns.bytes(),
        shared: SharedSlice::clone(space.shared(slot.id).unwrap()),
        private: Some((std::sync::Arc::clone(space.file(file).unwrap()), range.start())),
        flags: SlotFlags::empty(),
    }
}

fn free(guests: &Guests) {
    let (file, offset) = guests.memory.reader().lookup(Gfn::containing(VMSA)).unwrap().file.unwrap();
    let page = FileRange::page(FilePage::containing(offset));
    guests.memory.space().file(file).unwrap().punch_hole(page).unwrap();
}

#[test]
fn a_slot_replaced_with_all_vcpus_out_keeps_it() {
    let mut guests = guests(DiscardPolicy::Immediate);
    let spec = slot(&guests);
    for _ in 0..3 {
        guests.memory.remove_slot(spec.id.unwrap()).unwrap();
        guests.memory.add_slots(vec![spec.clone()]).unwrap();
        runs(&mut guests);
    }
}

#[test]
fn entered_without_the_slot_it_is_lost_for_good() {
    let mut guests = guests(DiscardPolicy::Immediate);
    let spec = slot(&guests);
    guests.memory.remove_slot(spec.id.unwrap()).unwrap();
    assert!(matches!(second_vcpu(&mut guests), Err(GuestFailed::NoEntry { reason: u64::MAX })));
    guests.memory.add_slots(vec![spec]).unwrap();
    is_lost(&mut guests);
    // Only the guest itself can start it again.
    assert_eq!(ask(&mut guests.vcpus[0], CREATE, VMSA, 1), [0, 0]);
    runs(&mut guests);
}

#[test]
fn attributes_do_not_take_it_but_freeing_does() {
    let mut guests = guests(DiscardPolicy::Never);
    let to = |guests: &Guests, to| {
        guests
            .memory
            .convert(&Request { range: GfnRange::from_bytes(VMSA, 0x1000).unwrap(), to })
            .unwrap()
            .converted()
            .unwrap();
    };
    to(&guests, State::Shared);
    runs(&mut guests);
    to(&guests, State::Private);
    runs(&mut guests);
    // A fresh page is no save area: the processor refuses it.
    free(&guests);
    is_lost(&mut guests);
}

#[test]
fn a_conversion_that_frees_takes_it() {
    let mut guests = guests(DiscardPolicy::Immediate);
    let range = GfnRange::from_bytes(VMSA, 0x1000).unwrap();
    guests.memory.convert(&Request { range, to: State::Shared }).unwrap().converted().unwrap();
    is_lost(&mut guests);
}

#[test]
fn creation_is_checked_and_destruction_is_final() {
    let mut guests = guests(DiscardPolicy::Immediate);
    let boot = &mut guests.vcpus[0];
    const INVALID: [u64; 2] = [2, 5];
    assert_eq!(ask(boot, CREATE, VMSA + 8, 1), INVALID, "not aligned");
    assert_eq!(ask(boot, CREATE, 0x20_0000, 1), INVALID, "2 MiB aligned addresses are refused");
    assert_eq!(ask(boot, CREATE, VMSA, 3), INVALID, "other features than the VM's");
    assert_eq!(ask(boot, CREATE, 1 << 60 | VMSA, 1), INVALID, "beyond all addresses");
    assert_eq!(ask(boot, 7, VMSA, 1), INVALID, "no such request");
    runs(&mut guests);
    assert_eq!(ask(&mut guests.vcpus[0], DESTROY, 0, 1), [0, 0]);
    is_lost(&mut guests);
    // A page that is not made one, or not there: refused when it is to be entered.
    guests.vcpus[0].accept(0xb000, 1).unwrap();
    for vmsa in [0xb000, 0x7fff_f000] {
        assert_eq!(ask(&mut guests.vcpus[0], CREATE, vmsa, 1), [0, 0]);
        is_lost(&mut guests);
    }
}
