//! Pages of a TD: how they come, how they go, and what happens to who touches them in between.

mod td_kit;

use std::ops::ControlFlow;

use cvm_memory::addr::{FilePage, FileRange};
use cvm_memory::convert::{Request, State};
use cvm_memory::hypervisor::{PreFaultMemory, Vcpu};
use cvm_memory::prefault::PrefaultOptions;
use cvm_memory::soft::{GmemPage, GuestOp, OpResult};
use cvm_memory_tdx::exit::RunError;
use cvm_memory_tdx::mechanism::InitVm;
use cvm_memory_tdx::model::sept::{Command, Refusal, Sept, SeptState};
use cvm_memory_tdx::model::{Death, accept as accepted};
use cvm_memory_tdx::width::Width;
use nix::errno::Errno;
use td_kit::*;

fn log(td: &Running) -> Vec<Command> {
    td.td.arch().with_sept(Sept::take_log)
}

fn recording(ram: u64) -> Running {
    let td = Running::new(ram);
    td.td.arch().with_sept(Sept::record);
    td
}

#[test]
fn a_page_is_augmented_accepted_and_used() {
    let mut td = recording(4 * MIB);
    assert_eq!(td.state(5), None);
    assert_eq!(td.accept(5 * PAGE, 0), accepted::SUCCESS);
    assert_eq!(log(&td), [Command::Aug(gfn(5)), Command::Accept(gfn(5))]);
    assert_eq!(td.state(5), Some(SeptState::Present));
    assert_eq!(td.run(check(5 * PAGE, PAGE, 0, true)), Ok(OpResult::Done));
    assert_eq!(td.run(fill(5 * PAGE, PAGE, 0x5a, true)), Ok(OpResult::Done));
    assert_eq!(td.accept(5 * PAGE, 0), accepted::ALREADY_ACCEPTED);
    assert_eq!(td.run(check(5 * PAGE, PAGE, 0x5a, true)), Ok(OpResult::Done));
    assert_eq!(log(&td), []);
}

#[test]
fn a_pending_touch_is_the_end_of_the_vm() {
    let mut td = Running::new(4 * MIB);
    assert_eq!(td.accept(0, 0), accepted::SUCCESS);
    // The first bytes lie in a page that is the guest's, the rest does not.
    assert_eq!(td.run(fill(PAGE - 8, 16, 1, true)), Err(Errno::EIO));
    assert_eq!(td.td.arch().death(), Some(Death::PendingTouch { gfn: gfn(1) }));
    assert_eq!(RunError::from_errno(Errno::EIO), Some(RunError::Dead));
    // It stays dead, for every vCPU and every ioctl.
    assert_eq!(td.run(check(0, 1, 0, true)), Err(Errno::EIO));
    assert_eq!(td.vcpu.pre_fault_memory(&mut PreFaultMemory { gpa: 0, size: PAGE, flags: 0 }), Err(Errno::EIO));
}

#[test]
fn a_guest_that_wants_to_hear_of_it_gets_an_exception() {
    let mut td = Running::with(&InitVm { attributes: 0, ..InitVm::new(Width::Bits48) }, 4 * MIB);
    assert_eq!(td.run(fill(0, 1, 1, true)), Ok(OpResult::Exception));
    assert_eq!(td.td.arch().death(), None);
    assert_eq!(td.accept(0, 0), accepted::SUCCESS);
    assert_eq!(td.run(fill(0, 1, 1, true)), Ok(OpResult::Done));
}

#[test]
fn code_in_shared_memory_is_the_end_of_the_vm() {
    let mut td = Running::new(4 * MIB);
    td.memory.convert(&Request { range: gfns(0, 1), to: State::Shared }).unwrap().converted().unwrap();
    assert_eq!(td.run(check(0, 8, 0, false)), Ok(OpResult::Done));
    assert_eq!(td.run(GuestOp::Fetch { gpa: 0, private: false }), Err(Errno::EIO));
    assert_eq!(td.td.arch().death(), Some(Death::SharedFetch { gfn: gfn(0) }));
}

#[test]
fn levels_of_acceptance() {
    let mut td = Running::new(4 * MIB);
    // What is mapped by small pages cannot be accepted as a large one; nothing happens to it.
    assert_eq!(td.accept(2 * MIB, 1), accepted::SIZE_MISMATCH);
    assert_eq!(td.accept(0, 2), accepted::SIZE_MISMATCH);
    assert_eq!(td.state(512), Some(SeptState::Pending));
    assert_eq!(td.accept(2 * MIB, 0), accepted::SUCCESS);
    // Of what is none: an address of another level, a level that does not exist, a shared address.
    let shared = Width::Bits48.shared_bit();
    for (gpa, level) in [(MIB, 1), (2 * MIB, 2), (0x800, 0), (0, 3), (0, 7), (shared, 0), (u64::MAX << 12, 0)] {
        assert_eq!(td.accept(gpa, level), accepted::OPERAND_INVALID, "{gpa:#x} {level}");
    }
}

/// Shared and private again: what the guest had is gone, and it has to accept what it gets.
#[test]
fn a_round_trip_needs_another_acceptance() {
    let mut td = recording(4 * MIB);
    for page in 0..3 {
        assert_eq!(td.accept(page * PAGE, 0), accepted::SUCCESS);
    }
    td.run(fill(0, 3 * PAGE, 0x77, true)).unwrap();
    log(&td);
    let convert =
        |td: &Running, to| td.memory.convert(&Request { range: gfns(0, 2), to }).unwrap().converted().unwrap();
    convert(&td, State::Shared);
    let gone = |n| [Command::Block(gfn(n)), Command::Track, Command::Remove(gfn(n))];
    assert_eq!(log(&td), [gone(0), gone(1)].concat());
    assert_eq!((td.state(0), td.state(2)), (None, Some(SeptState::Present)));
    convert(&td, State::Private);
    assert_eq!(td.accept(0, 0), accepted::SUCCESS);
    assert_eq!(td.run(check(0, PAGE, 0, true)), Ok(OpResult::Done));
    assert_eq!(td.run(check(2 * PAGE, PAGE, 0x77, true)), Ok(OpResult::Done));
    // The other one was not accepted.
    assert_eq!(td.run(check(PAGE, PAGE, 0, true)), Err(Errno::EIO));
    assert_eq!(td.td.arch().death(), Some(Death::PendingTouch { gfn: gfn(1) }));
}

/// Memory taken from under the guest, without its asking, kills it at the next touch.
#[test]
fn holes_and_slots_take_pages_away() {
    let punch = |td: &Running| {
        let space = td.memory.space();
        let pages = FileRange::with_len(FilePage::ZERO, 1).unwrap();
        space.files().next().unwrap().punch_hole(pages).unwrap();
    };
    let remove_slot = |td: &Running| {
        let slot = td.memory.space().layout().table().lookup(gfn(0)).unwrap().id;
        td.memory.remove_slot(slot).unwrap();
    };
    let takes: [&dyn Fn(&Running); 2] = [&punch, &remove_slot];
    for (nr, take) in takes.into_iter().enumerate() {
        let mut td = recording(4 * MIB);
        assert_eq!(td.accept(0, 0), accepted::SUCCESS);
        td.run(fill(0, 8, 9, true)).unwrap();
        log(&td);
        take(&td);
        assert_eq!(log(&td), [Command::Block(gfn(0)), Command::Track, Command::Remove(gfn(0))], "{nr}");
        assert_eq!(td.state(0), None);
        if nr == 0 {
            assert_eq!(td.run(check(0, 8, 9, true)), Err(Errno::EIO));
            assert_eq!(td.td.arch().death(), Some(Death::PendingTouch { gfn: gfn(0) }));
        }
    }
}

/// The end of the memory is an orderly one: blocked, tracked, removed, and only then freed.
#[test]
fn teardown_leaves_nothing() {
    let mut td = recording(4 * MIB);
    for page in 0..4 {
        td.accept(page * PAGE, 0);
    }
    let arch = td.td.arch().clone();
    drop(td);
    assert_eq!(arch.with_sept(|sept| sept.states().count()), 0);
    let log = arch.with_sept(Sept::take_log);
    assert_eq!(log.iter().filter(|command| matches!(command, Command::Remove(_))).count(), 4);
    assert_eq!(arch.bugs(), []);
}

#[test]
fn prefault_leaves_nothing_to_fault_on() {
    let mut td = recording(8 * MIB);
    let mut progress = |_| ControlFlow::Continue(());
    let range = gfns(0, 1024);
    let mut vcpus: [&mut dyn Vcpu; 1] = [&mut td.vcpu];
    td.memory.prefault(&[range], &mut vcpus, &PrefaultOptions::default(), &mut progress).unwrap();
    assert_eq!(log(&td), (0..1024).map(|n| Command::Aug(gfn(n))).collect::<Vec<_>>());
    assert_eq!(td.state(1023), Some(SeptState::Pending));
    // Neither an exit nor a page that has to be given.
    for page in 0..1024 {
        assert_eq!(td.accept(page * PAGE, 0), accepted::SUCCESS);
    }
    assert_eq!(log(&td), (0..1024).map(|n| Command::Accept(gfn(n))).collect::<Vec<_>>());
    assert_eq!(td.exits_seen, 0);
    // Where nothing was prefaulted there are both.
    assert_eq!(td.accept(4 * MIB, 0), accepted::SUCCESS);
    assert_eq!(td.exits_seen, 1);
    assert_eq!(log(&td), [Command::Aug(gfn(1024)), Command::Accept(gfn(1024))]);
}

/// Each command as the module has it: the one order, and every other one refused without effect.
#[test]
fn the_module_takes_one_order_only() {
    let page = |n| GmemPage { file: 1, page: FilePage::new(n).unwrap() };
    let (a, b) = (gfn(10), gfn(11));
    let wrong = |gfn, state| Err(Refusal::State { gfn, state });
    let mut sept = Sept::default();
    assert_eq!(sept.aug(a, page(0)), Err(Refusal::Phase));
    assert_eq!(sept.accept(a), wrong(a, None));
    assert_eq!(sept.block(a), wrong(a, None));
    assert_eq!(sept.remove(a), wrong(a, None));
    assert_eq!(sept.add(a, page(0)), Ok(()));
    assert_eq!(sept.add(a, page(1)), wrong(a, Some(SeptState::Present)));
    assert_eq!(sept.add(b, page(0)), Err(Refusal::Owned { gfn: b, owner: a }));
    assert_eq!(sept.finalize(), Ok(()));
    assert_eq!(sept.finalize(), Err(Refusal::Phase));
    assert_eq!(sept.add(b, page(1)), Err(Refusal::Phase));

    assert_eq!(sept.aug(b, page(1)), Ok(()));
    assert_eq!(sept.aug(b, page(2)), wrong(b, Some(SeptState::Pending)));
    assert_eq!(sept.remove(b), wrong(b, Some(SeptState::Pending)));
    assert_eq!(sept.block(b), Ok(()));
    assert_eq!(sept.state(b), Some(SeptState::PendingBlocked));
    assert_eq!(sept.accept(b), wrong(b, Some(SeptState::PendingBlocked)));
    assert_eq!(sept.block(b), wrong(b, Some(SeptState::PendingBlocked)));
    assert_eq!(sept.remove(b), Err(Refusal::NotTracked { gfn: b }));
    sept.track();
    // Blocked after that epoch began: one track does not do for both.
    assert_eq!(sept.block(a), Ok(()));
    assert_eq!(sept.state(a), Some(SeptState::Blocked));
    assert_eq!(sept.remove(b), Ok(()));
    assert_eq!(sept.remove(a), Err(Refusal::NotTracked { gfn: a }));
    sept.track();
    assert_eq!(sept.remove(a), Ok(()));
    assert_eq!((sept.states().count(), sept.owner(page(0))), (0, None));
    assert_eq!(sept.aug(b, page(0)), Ok(()));
}
