//! MapGPA: the shape in which a guest's request arrives, and what the guest is told.

mod td_kit;

use std::sync::Arc;

use cvm_memory::convert::{PinPolicy, Request, State};
use cvm_memory::exits::{ExitOptions, VcpuExits};
use cvm_memory::hypervisor::{Cap, Exit, Hypervisor, Vcpu};
use cvm_memory::memory::CvmMemory;
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_tdx::mapgpa::{Answer, MapGpa, Next, Status};
use cvm_memory_tdx::mechanism::{InitVm, TdVm};
use cvm_memory_tdx::width::Width;
use nix::errno::Errno;
use proptest::prelude::*;
use td_kit::*;

const RETRY: u64 = 1;
const INVALID: u64 = 0x8000_0000_0000_0000;
const UNALIGNED: u64 = 0x8000_0000_0000_0002;
const UNSUPPORTED: u64 = 0x8000_0000_0000_0003;
const SHARED: u64 = 1 << 47;

/// The hypercalls that userspace saw during a MapGPA, and what the guest was told.
fn asks(td: &mut Running, address: u64, size: u64) -> (Vec<[u64; 6]>, u64, u64) {
    let mut asks = Vec::new();
    let mut first = true;
    let result = td.run_with(map_gpa(address, size), |exit| {
        let Exit::Hypercall(hypercall) = exit else { panic!("{exit:?}") };
        if first {
            assert_eq!(hypercall.nr, 12);
            asks.push(hypercall.args);
        }
        first = !first;
    });
    let Ok(OpResult::Instruction(status)) = result else { panic!("{result:?}") };
    (asks, status, td.td.arch().r11(td.vcpu.index()))
}

#[test]
fn two_mebibytes_at_a_time_from_the_start() {
    let mut td = Running::new(16 * MIB);
    let start = MIB + 0x3000;
    let (asked, status, _) = asks(&mut td, SHARED | start, 5 * MIB);
    let piece = |at, pages, attributes| [at, pages, attributes, 0, 0, 0];
    assert_eq!(asked, [piece(start, 512, 0), piece(start + 2 * MIB, 512, 0), piece(start + 4 * MIB, 256, 0),]);
    assert_eq!(status, 0);
    let shared = gfns(start / PAGE, (start + 5 * MIB) / PAGE);
    assert_eq!(td.memory.statistics().private_bytes, 11 * MIB);
    assert_eq!(
        [td.memory.state(shared.start()), td.memory.state(shared.end())],
        [Some(State::Shared), Some(State::Private)]
    );
    let (asked, status, _) = asks(&mut td, start, 5 * MIB);
    assert_eq!((asked[0], asked.len(), status), (piece(start, 512, 0x10), 3, 0));
    assert_eq!(td.memory.statistics().private_bytes, 16 * MIB);
}

/// Nothing of it reaches userspace, and the address comes back as it was given.
#[test]
fn hostile_arguments() {
    let mut td = Running::new(16 * MIB);
    let beyond = 1 << 48;
    let cases = [
        // Nothing, less than nothing, everything.
        (0, 0, INVALID),
        (0x1000, u64::MAX, INVALID),
        (0x1000, u64::MAX - 0xfff, INVALID),
        (u64::MAX - 0xfff, 0x1000, INVALID),
        (0, u64::MAX, INVALID),
        // Above the shared bit, or into it from below, or out of it.
        (beyond, 0x1000, INVALID),
        (1 << 63, 0x1000, INVALID),
        (SHARED - 0x1000, 0x2000, INVALID),
        (0, SHARED + 0x1000, INVALID),
        (beyond - 0x1000, 0x2000, INVALID),
        (0x2000, beyond - 0x2000, INVALID),
        // Not of pages.
        (0x800, 0x1000, UNALIGNED),
        (0x1000, 0x1800, UNALIGNED),
        (SHARED | 1, 0xfff, UNALIGNED),
        (0x1001, 1, UNALIGNED),
        // What is wrong with the range is said before what is wrong with its alignment.
        (SHARED - 1, 2, INVALID),
    ];
    for (address, size, expected) in cases {
        let (asked, status, r11) = asks(&mut td, address, size);
        assert_eq!((asked, status, r11), (vec![], expected, address), "{address:#x} {size:#x}");
    }
    assert_eq!(td.memory.statistics().private_bytes, 16 * MIB);
    // The last page of either half is a good one, though not of memory. Userspace is asked: it cannot become private, and is
    // shared as far as anybody can tell.
    for (address, expected) in [(SHARED - 0x1000, (1, INVALID)), (beyond - 0x1000, (1, 0))] {
        let (asked, status, _) = asks(&mut td, address, 0x1000);
        assert_eq!((asked.len(), status), expected);
    }
}

#[test]
fn the_shared_bit_goes_with_the_width() {
    let mut td = Running::with(&InitVm::new(Width::Bits52), 4 * MIB);
    // Bit 47 is an address bit like any other: private, and no memory.
    let (asked, status, r11) = asks(&mut td, SHARED, 0x1000);
    assert_eq!((asked, status, r11), (vec![[SHARED, 1, 0x10, 0, 0, 0]], INVALID, SHARED));
    let (asked, status, _) = asks(&mut td, 1 << 51, 0x1000);
    assert_eq!((asked, status), (vec![[0, 1, 0, 0, 0, 0]], 0));
    assert_eq!(td.memory.state(gfn(0)), Some(State::Shared));
}

/// What was done before stays done, and the guest hears from where on nothing was.
#[test]
fn a_refusal_ends_it_where_it_is() {
    let mut td = Running::new(4 * MIB);
    // From 1 MiB on; memory ends within the second piece. What is no memory is none of anybody's on the way to shared.
    let (asked, status, _) = asks(&mut td, SHARED | MIB, 8 * MIB);
    assert_eq!((asked.len(), status), (4, 0));
    assert_eq!(td.memory.statistics().private_bytes, MIB);
    // To private, a piece that is memory in part is refused as it is.
    let (asked, status, r11) = asks(&mut td, MIB, 8 * MIB);
    assert_eq!((asked.len(), status, r11), (2, INVALID, 3 * MIB));
    assert_eq!(td.memory.statistics().private_bytes, 3 * MIB);
}

#[test]
fn an_interrupt_comes_between_two_pieces() {
    let mut td = Running::new(16 * MIB);
    let cpu = td.vcpu.index();
    td.td.arch().set_interrupted(cpu, true);
    // It does not come before the first, nor after the last.
    let (asked, status, r11) = asks(&mut td, SHARED, 5 * MIB);
    assert_eq!((asked.len(), status, r11), (1, RETRY, SHARED | (2 * MIB)));
    let (asked, status, r11) = asks(&mut td, r11, 3 * MIB);
    assert_eq!((asked.len(), status, r11), (1, RETRY, SHARED | (4 * MIB)));
    let (asked, status, _) = asks(&mut td, r11, MIB);
    assert_eq!((asked.len(), status), (1, 0));
    td.td.arch().set_interrupted(cpu, false);
    assert_eq!(td.memory.statistics().private_bytes, 11 * MIB);
}

/// A device access in progress: the guest is told to ask again, from the piece that could not be converted.
#[test]
fn a_pinned_piece_is_asked_for_again() {
    let builder = CvmMemory::builder().ram(1 << 32, 8 * MIB).initial(State::Shared).pins(PinPolicy::Refuse);
    let mut td = Running::built(&InitVm::new(Width::Bits48), builder);
    let memory = Arc::clone(&td.memory);
    let pin = memory.pin(gfns((1 << 20) + 1024, (1 << 20) + 1025)).unwrap();
    let (asked, status, r11) = asks(&mut td, 1 << 32, 8 * MIB);
    assert_eq!((asked.len(), status, r11), (3, RETRY, (1 << 32) + 4 * MIB));
    assert_eq!(memory.statistics().private_bytes, 4 * MIB);
    drop(pin);
    let (asked, status, _) = asks(&mut td, r11, 4 * MIB);
    assert_eq!((asked.len(), status), (2, 0));
    assert_eq!(memory.statistics().private_bytes, 8 * MIB);
}

#[test]
fn a_budget_is_a_retry() {
    let mut td = Running::new(16 * MIB);
    let options = ExitOptions { budget: Some(1024), ..ExitOptions::default() };
    td.exits = VcpuExits::with_options(Arc::clone(&td.memory), options);
    let (mut address, mut rounds) = (0, Vec::new());
    loop {
        let (asked, status, r11) = asks(&mut td, SHARED | address, 16 * MIB - address);
        rounds.push(asked.len());
        match status {
            0 => break,
            RETRY => assert!(r11 > SHARED | address, "no progress"),
            other => panic!("{other:#x}"),
        }
        address = r11 & !SHARED;
    }
    // Two pieces in each round, and the one that is put off.
    assert_eq!(rounds, [3, 3, 3, 2]);
    assert_eq!(td.memory.statistics().private_bytes, 0);
}

#[test]
fn userspace_may_say_three_things() {
    let (td, mut vcpu) = initialised(&InitVm::new(Width::Bits48));
    td.finalize().unwrap();
    // Nobody asked to hear of it.
    vcpu.start(map_gpa(0x1000, 0x1000));
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    assert_eq!(vcpu.take_result(), Some(OpResult::Instruction(UNSUPPORTED)));
    assert_eq!(td.arch().r11(0), 0x1000);
    td.enable_cap(Cap::EXIT_HYPERCALL, [1 << 12, 0, 0, 0]).unwrap();
    for (answer, expected) in [(0, Ok(0)), (11, Ok(RETRY)), (22, Ok(INVALID)), (12, Err(Errno::EINVAL))] {
        vcpu.start(map_gpa(SHARED | 0x1000, 0x1000));
        let Ok(Exit::Hypercall(hypercall)) = vcpu.run() else { panic!() };
        *hypercall.ret = answer;
        let result = vcpu.run().map(drop);
        match expected {
            Ok(status) => {
                assert_eq!(result, Ok(()));
                assert_eq!(vcpu.take_result(), Some(OpResult::Instruction(status)));
            }
            Err(errno) => assert_eq!(result, Err(errno)),
        }
    }
}

/// The plain hypercall, which a TD may use as well: the answer as it is.
#[test]
fn the_plain_hypercall() {
    let mut td = Running::new(4 * MIB);
    let ask = |args| GuestOp::Hypercall { nr: 12, args };
    assert_eq!(td.run(ask([0, 1024, 0, 0])), Ok(OpResult::Hypercall(0)));
    assert_eq!(td.memory.statistics().private_bytes, 0);
    assert_eq!(td.run(ask([0, 1, 0x20, 0])), Ok(OpResult::Hypercall(22)));
}

/// A private touch of shared memory, and the other way round: the VMM may convert, but what comes back has to be accepted.
#[test]
fn touches_convert_and_do_not_accept() {
    let mut td = Running::new(4 * MIB);
    td.memory.convert(&Request { range: gfns(0, 2), to: State::Shared }).unwrap().converted().unwrap();
    assert_eq!(td.run(fill(0, 8, 1, true)), Err(Errno::EIO));
    assert_eq!(td.memory.state(gfn(0)), Some(State::Private));
}

proptest! {
    /// Against the definition: pieces that follow each other from the start, none above 2 MiB, all of the range and no more.
    #[test]
    fn pieces_make_up_the_range(
        wide in any::<bool>(), shared in any::<bool>(), start in 0..1_u64 << 34, pages in 1..5000_u64, stop in 0..12_usize,
        interrupted in any::<bool>(),
    ) {
        let width = if wide { Width::Bits52 } else { Width::Bits48 };
        let bit = if shared { width.shared_bit() } else { 0 };
        let (mut request, mut next) = MapGpa::start(width, bit | (start * PAGE), pages * PAGE, true).unwrap();
        let mut at = start;
        for round in 0.. {
            let Next::Ask([gpa, count, attributes, 0, 0, 0]) = next else { panic!("{next:?}") };
            prop_assert_eq!((gpa, attributes), (at * PAGE, if shared { 0 } else { 0x10 }));
            prop_assert_eq!(count, (start + pages - at).min(512));
            let (ret, pending) = if round < stop { (0, false) } else { (if interrupted { 0 } else { 11 }, true) };
            next = request.answered(ret, pending);
            if ret == 0 {
                at += count;
            }
            if let Next::Answer(Answer { status, gpa }) = next {
                let done = at == start + pages;
                prop_assert_eq!(status, if done { Status::Success } else { Status::Retry });
                prop_assert!(done || gpa == bit | (at * PAGE));
                prop_assert!(done || round == stop);
                break;
            }
        }
    }
}
