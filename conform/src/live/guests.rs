//! What a guest does for an operation, and what is seen of it.

use cvm_memory::hypervisor::{Exit, HypercallExit, Mmio};
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use nix::errno::Errno;

use crate::observation::{End, Observation, Seen};
use crate::scenario::{MMIO_BYTE, Operation};

/// Exits of one instruction, at most. Two pages, and twice eight bytes each, are far below.
const MANY: usize = 64;
const PAGE: u64 = 4096;

/// Carries out an operation of a guest.
pub(crate) fn play(guest: &mut dyn Guest, operation: &Operation) -> Observation {
    let mut seen = Vec::new();
    let end = match *operation {
        Operation::Load { gpa, len, private, .. } => {
            guest.set_private(private);
            run(guest, &GuestOp::Read { gpa, len: len.into() }, &mut seen, 0)
        }
        Operation::Store { gpa, len, value, private, .. } => {
            guest.set_private(private);
            store(guest, gpa, &value.to_le_bytes()[..usize::from(len)], &mut seen)
        }
        Operation::Fetch { gpa, private, .. } => {
            guest.set_private(private);
            fetch(guest, gpa, &mut seen)
        }
        Operation::Dump { gpa, pages, private, .. } => {
            guest.set_private(private);
            return Observation::Pages((0..pages).map(|page| dump(guest, gpa + page * PAGE)).collect());
        }
        Operation::MapGpaRange { gpa, pages, attributes, answer, .. } => {
            let hypercall = GuestOp::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args: [gpa, pages, attributes, 0] };
            run(guest, &hypercall, &mut seen, answer)
        }
        _ => End::NoCode,
    };
    Observation::Guest { seen, end }
}

fn store(guest: &mut dyn Guest, gpa: u64, data: &[u8], seen: &mut Vec<Seen>) -> End {
    run(guest, &GuestOp::Write { gpa, data: data.to_vec() }, seen, 0)
}

/// Calls the code at `gpa` if there is some, or nothing at all; anything else would be executed too.
fn fetch(guest: &mut dyn Guest, gpa: u64, seen: &mut Vec<Seen>) -> End {
    let code = guest.return_code().to_vec();
    let read = GuestOp::Read { gpa, len: code.len() };
    let nothing_there = |seen: &[Seen]| !seen.is_empty();
    for attempt in [true, false] {
        match run(guest, &read, seen, 0) {
            End::Data(bytes) if nothing_there(seen) || bytes == code => break,
            End::Data(_) if attempt => {}
            End::Data(_) => return End::NoCode,
            other => return other,
        }
        match store(guest, gpa, &code, seen) {
            End::Done => {}
            other => return other,
        }
        if nothing_there(seen) {
            return End::NoCode; // a read-only slot
        }
    }
    run(guest, &GuestOp::Fetch { gpa }, seen, 0)
}

/// All of a page, if it is memory.
fn dump(guest: &mut dyn Guest, gpa: u64) -> End {
    let mut seen = Vec::new();
    match run(guest, &GuestOp::Read { gpa, len: 8 }, &mut seen, 0) {
        End::Data(_) if seen.is_empty() => run(guest, &GuestOp::Read { gpa, len: 4096 }, &mut seen, 0),
        end => end,
    }
}

/// Runs `op` to its end. MMIO and hypercalls are answered; everything else ends it.
fn run(guest: &mut dyn Guest, op: &GuestOp, seen: &mut Vec<Seen>, answer: u64) -> End {
    guest.start(op.clone());
    for _ in 0..MANY {
        match guest.run() {
            Ok(Exit::Halt) => {
                return match guest.result() {
                    Some(Outcome::Data(data)) => End::Data(data),
                    Some(Outcome::Answer(answer)) => End::Answer(answer),
                    Some(_) => End::Done,
                    None => End::Other(None),
                };
            }
            Ok(Exit::Mmio(Mmio::Read { gpa, data })) => {
                data.fill(MMIO_BYTE);
                seen.push(Seen::MmioRead { gpa, len: data.len() });
            }
            Ok(Exit::Mmio(Mmio::Write { gpa, data })) => seen.push(Seen::MmioWrite { gpa, data: data.to_vec() }),
            Ok(exit) => {
                if let Some(end) = ended_by(exit, answer, seen) {
                    return end;
                }
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(errno) => return End::Failed(errno),
        }
    }
    End::Endless
}

/// How an operation ends with `exit`. It goes on after a hypercall, which is answered.
pub(crate) fn ended_by(exit: Exit<'_>, answer: u64, seen: &mut Vec<Seen>) -> Option<End> {
    Some(match exit {
        Exit::Hypercall(HypercallExit { nr, args: [a, b, c, ..], ret }) => {
            *ret = answer;
            seen.push(Seen::Hypercall { nr, args: [a, b, c] });
            return None;
        }
        Exit::MemoryFault(fault) => {
            End::Fault { errno: fault.errno, flags: fault.flags, gpa: fault.gpa, size: fault.size }
        }
        Exit::Shutdown => End::Shutdown,
        Exit::InternalError { .. } => End::InternalError,
        Exit::FailEntry { reason, .. } => End::FailEntry(reason),
        Exit::Other(reason) => End::Other(reason),
        _ => End::Other(None),
    })
}
