//! A guest as Linux is one: accepts its memory 4 MiB at a time as it comes to need it, shares a bounce buffer of 64 MiB while
//! interrupts come in, and takes it back.

mod td_kit;

use std::ops::ControlFlow;
use std::sync::Arc;

use cvm_memory::convert::State;
use cvm_memory::exits::{Action, Handled};
use cvm_memory::hypervisor::{Exit, Vcpu};
use cvm_memory::memory::CvmMemory;
use cvm_memory::prefault::PrefaultOptions;
use cvm_memory::soft::OpResult;
use cvm_memory_tdx::import::{Import, ImportList};
use cvm_memory_tdx::launch::Start;
use cvm_memory_tdx::mechanism::InitVm;
use cvm_memory_tdx::model::sept::{Command, Sept};
use cvm_memory_tdx::model::{SoftTd, accept as accepted};
use cvm_memory_tdx::width::Width;
use nix::errno::Errno;
use td_kit::*;

const RAM: u64 = 128 * MIB;
/// What a Linux guest accepts at a time.
const UNIT: u64 = 4 * MIB;
const BUFFER: u64 = 32 * MIB;
const BUFFER_BYTES: u64 = 64 * MIB;
const SHARED: u64 = 1 << 47;
const RETRY: u64 = 1;
/// How often Linux asks again when nothing got on.
const RETRIES: u32 = 3;

/// A TD whose first 16 pages were there from the start.
fn boot() -> Running {
    let td = SoftTd::new();
    let mut vcpus = Start::new(td.clone()).init(&InitVm::new(Width::Bits48)).unwrap();
    vcpus.add(td.create_vcpu().unwrap(), 0).unwrap();
    let memory = Arc::new(CvmMemory::builder().ram(0, RAM).build(Arc::new(td.clone())).unwrap());
    let image = Import { gfns: gfns(0, 16), measured: true, contents: vec![0x90; 16 * 4096] };
    let list = ImportList::new(vec![image], Width::Bits48).unwrap();
    let launched = vcpus.image(list, &memory).unwrap().add_all().unwrap().finalize().unwrap();
    td.arch().with_sept(Sept::record);
    Running::of(td, memory, launched.vcpus.into_iter().next().unwrap())
}

/// Accepts a range: as large as the address allows first, and smaller where that is not what it is mapped by.
fn accept_range(td: &mut Running, start: u64, end: u64) {
    let mut at = start;
    while at < end {
        let large = at.is_multiple_of(2 * MIB) && end - at >= 2 * MIB;
        let sizes: &[(u64, u64)] = if large { &[(1, 2 * MIB), (0, PAGE)] } else { &[(0, PAGE)] };
        let size = sizes.iter().find_map(|(level, size)| match td.accept(at, *level) {
            accepted::SUCCESS => Some(*size),
            accepted::SIZE_MISMATCH => None,
            other => panic!("{at:#x}: {other:#x}"),
        });
        at += size.unwrap();
    }
}

/// Asks until it is done, as Linux does. Returns how often.
fn map_gpa_all(td: &mut Running, address: u64, size: u64) -> u32 {
    let (mut at, end, mut tries, mut asked) = (address, address + size, 0, 0);
    while tries < RETRIES {
        asked += 1;
        let (status, next) = td.map_gpa(at, end - at);
        if status == 0 {
            return asked;
        }
        assert_eq!(status, RETRY);
        // A host that sends the guest anywhere else is not to be trusted.
        assert!((at..end).contains(&next));
        tries = if next == at { tries + 1 } else { 0 };
        at = next;
    }
    panic!("no progress at {at:#x}");
}

fn commands(td: &Running, kind: fn(&Command) -> bool) -> u64 {
    td.td.arch().with_sept(Sept::take_log).iter().filter(|command| kind(command)).count() as u64
}

#[test]
fn from_boot_to_a_shared_buffer_and_back() {
    let mut td = boot();
    let cpu = td.vcpu.index();
    // What firmware was given it uses as it is.
    assert_eq!(td.run(check(0, 16 * PAGE, 0x90, true)), Ok(OpResult::Done));

    // Lazy acceptance, unit by unit: one exit for each 2 MiB, because nothing was declared to KVM before.
    accept_range(&mut td, 16 * PAGE, UNIT);
    for unit in 1..RAM / UNIT {
        accept_range(&mut td, unit * UNIT, (unit + 1) * UNIT);
        assert_eq!(td.run(fill(unit * UNIT, 64, 0xa5, true)), Ok(OpResult::Done));
    }
    assert_eq!(commands(&td, |command| matches!(command, Command::Accept(_))), RAM / PAGE - 16);
    assert_eq!(td.exits_seen, RAM / (2 * MIB));

    // The buffer: an interrupt is pending all the time, so each request ends after one piece.
    td.td.arch().set_interrupted(cpu, true);
    assert_eq!(u64::from(map_gpa_all(&mut td, SHARED | BUFFER, BUFFER_BYTES)), BUFFER_BYTES / (2 * MIB));
    td.td.arch().set_interrupted(cpu, false);
    let buffer = gfns(BUFFER / PAGE, (BUFFER + BUFFER_BYTES) / PAGE);
    assert_eq!(td.memory.statistics().private_bytes, RAM - BUFFER_BYTES);
    assert_eq!(commands(&td, |command| matches!(command, Command::Remove(_))), buffer.pages());
    // Nothing of what the guest had there is to be seen by anybody.
    assert_eq!(td.run(check(BUFFER, 4 * MIB, 0, false)), Ok(OpResult::Done));
    td.memory.write(buffer.start().into(), b"from the device").unwrap();
    assert_eq!(td.run(check(BUFFER, 1, b'f', false)), Ok(OpResult::Done));

    // Back, in one request of many pieces; then it has to be accepted, and is zeroes.
    assert_eq!(map_gpa_all(&mut td, BUFFER, BUFFER_BYTES), 1);
    assert_eq!(td.memory.state(buffer.start()), Some(State::Private));
    accept_range(&mut td, BUFFER, BUFFER + BUFFER_BYTES);
    assert_eq!(td.run(check(BUFFER, BUFFER_BYTES, 0, true)), Ok(OpResult::Done));
    // The rest of its memory is as it was.
    assert_eq!(td.run(check(BUFFER - UNIT, 64, 0xa5, true)), Ok(OpResult::Done));
    assert_eq!(td.run(check(BUFFER + BUFFER_BYTES, 64, 0xa5, true)), Ok(OpResult::Done));
    assert_eq!(td.td.arch().death(), None);
}

/// A guest that forgets to accept what it has taken back is dead; the VMM hears it as the end of the VM, not as a fault.
#[test]
fn a_forgetful_guest() {
    let mut td = boot();
    accept_range(&mut td, UNIT, 2 * UNIT);
    map_gpa_all(&mut td, SHARED | UNIT, UNIT);
    map_gpa_all(&mut td, UNIT, UNIT);
    assert_eq!(td.run(fill(UNIT, 1, 1, true)), Err(Errno::EIO));
}

/// With its memory mapped ahead, accepting makes no exit and gives KVM nothing to do.
#[test]
fn prefault_removes_the_faults() {
    let run = |prefault: bool| {
        let mut td = boot();
        if prefault {
            let mut vcpus: [&mut dyn Vcpu; 1] = [&mut td.vcpu];
            let mut go_on = |_| ControlFlow::Continue(());
            let all = td.memory.private_memory();
            td.memory.prefault(&all, &mut vcpus, &PrefaultOptions::default(), &mut go_on).unwrap();
        }
        commands(&td, |_| true);
        accept_range(&mut td, UNIT, 8 * UNIT);
        (td.exits_seen, commands(&td, |command| matches!(command, Command::Aug(_))))
    };
    assert_eq!(run(false), (7 * UNIT / (2 * MIB), 7 * UNIT / PAGE));
    assert_eq!(run(true), (0, 0));
}

/// The host may take memory away only where the guest has given it: what it frees behind the guest's back kills it.
#[test]
fn nothing_is_freed_under_a_running_guest() {
    let mut td = boot();
    accept_range(&mut td, UNIT, 2 * UNIT);
    td.run(fill(UNIT, UNIT, 7, true)).unwrap();
    commands(&td, |_| true);
    // Trimming frees what conversions have left, and there were none.
    td.memory.trim(u64::MAX).unwrap();
    // Declaring private what is private already is nothing at all.
    assert_eq!(map_gpa_all(&mut td, UNIT, UNIT), 1);
    assert_eq!(commands(&td, |_| true), 0);
    assert_eq!(td.run(check(UNIT, UNIT, 7, true)), Ok(OpResult::Done));
    // An access by which a guest would convert a page that it has in use.
    td.vcpu.start(check(UNIT, 1, 0, false));
    let mut exit = td.vcpu.run().unwrap();
    assert!(matches!(exit, Exit::MemoryFault(_)));
    assert!(matches!(td.exits.handle(&mut exit), Action::Resume(Handled::Converted { pages: 1 })));
    assert_eq!(commands(&td, |command| matches!(command, Command::Remove(_))), 1);
}
