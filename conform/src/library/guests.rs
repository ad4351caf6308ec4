//! Guests whose exits are the library's, and what is written down of them.

use cvm_memory::exits::{Action, VcpuExits};
use cvm_memory::hypervisor::{Exit, Mmio, PreFaultMemory, Vcpu};
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use nix::errno::Errno;

use super::operation::Kind;
use super::say;
use super::wire::Wire;

/// Exits of one operation, at most: a guest that touches 4 MiB page by page has a thousand.
const MANY: usize = 1 << 13;

/// Runs `op` to its end, or to the first exit after which a VMM would not go on.
pub(super) fn run(guest: &mut dyn Guest, op: GuestOp, exits: &mut VcpuExits, wire: &Wire) -> String {
    guest.start(op);
    for _ in 0..MANY {
        let (name, action) = match guest.run() {
            Ok(Exit::Halt) => return result(guest.result().as_ref()),
            Ok(mut exit) => (describe(&exit), exits.handle(&mut exit)),
            Err(Errno::EINTR | Errno::EAGAIN) => continue,
            Err(errno) => return format!("failed {errno:?}"),
        };
        wire.note(format!("{name}: {}", say::action(&action)));
        if !matches!(action, Action::Resume(_)) {
            return "stopped".into();
        }
    }
    "exits without end".into()
}

fn result(outcome: Option<&Outcome>) -> String {
    match outcome {
        Some(Outcome::Done) => "done".into(),
        Some(Outcome::Same) => "same".into(),
        Some(Outcome::Differs { offset }) => format!("differs at {offset:#x}"),
        Some(Outcome::Answer(answer)) => format!("answer {answer}"),
        Some(Outcome::Data(_)) | None => "no result".into(),
    }
}

fn describe(exit: &Exit<'_>) -> String {
    match exit {
        Exit::Hypercall(call) => {
            let [gpa, pages, attributes, ..] = call.args;
            format!("exit hypercall {} {gpa:#x} {pages:#x} {attributes:#x}", call.nr)
        }
        Exit::MemoryFault(fault) => {
            format!("exit fault gpa={:#x} flags={:#x} {:?}", fault.gpa, fault.flags, fault.errno)
        }
        Exit::Mmio(Mmio::Read { gpa, .. }) => format!("exit mmio-read gpa={gpa:#x}"),
        Exit::Mmio(Mmio::Write { gpa, .. }) => format!("exit mmio-write gpa={gpa:#x}"),
        other => format!("exit {other:?}"),
    }
}

/// A vCPU whose prefaults are written down, and fail on demand.
#[derive(Debug)]
pub(super) struct Watched<'a> {
    pub guest: &'a mut dyn Guest,
    pub wire: Wire,
}

impl Vcpu for Watched<'_> {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        let line = format!("prefault gpa={:#x} size={:#x}", range.gpa, range.size);
        self.wire.call(Kind::Prefault, line)?;
        self.guest.pre_fault_memory(range)
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        self.guest.run()
    }
}
