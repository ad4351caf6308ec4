//! A guest in a trust domain, on the model of one: it asks by MapGPA, with the shared bit in the address, and accepts a page
//! when it is told, by an exception, that it has not yet.

use cvm_memory::addr::{Gpa, PAGE_SIZE};
use cvm_memory::convert::State;
use cvm_memory::hypervisor::{Exit, HypercallExit, PreFaultMemory, Vcpu};
use cvm_memory::soft::{GuestOp as SoftOp, OpResult};
use cvm_memory_tdx::mapgpa::Status;
use cvm_memory_tdx::mechanism::{InitVm, TdVcpu, TdVm};
use cvm_memory_tdx::model::{SoftTd, SoftTdVcpu, op};
use cvm_memory_tdx::width::Width;
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use nix::errno::Errno;

use crate::Failure;

const WIDTH: Width = Width::Bits48;

/// A TD that vCPUs can be made for. Its guest wants to hear of pages that it has not accepted.
pub fn new() -> Result<SoftTd, Failure> {
    let td = SoftTd::new();
    td.init_vm(&InitVm { attributes: 0, ..InitVm::new(WIDTH) })?;
    Ok(td)
}

/// What the vCPU is at.
enum Doing {
    /// What it was told.
    Operation,
    /// Accepting the page here, before it tries that again.
    Accepting(u64),
    /// A request that ends here.
    Asking(u64),
}

pub struct TdGuest {
    td: SoftTd,
    vcpu: SoftTdVcpu,
    private: bool,
    operation: GuestOp,
    doing: Doing,
    /// The step that it was at is over.
    halted: bool,
    done: Option<Outcome>,
}

impl std::fmt::Debug for TdGuest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TdGuest").field("vcpu", &self.vcpu).field("operation", &self.operation).finish_non_exhaustive()
    }
}

impl TdGuest {
    /// The next vCPU, before the TD is finalised.
    pub fn new(td: &SoftTd) -> Self {
        let mut vcpu = td.create_vcpu().expect("the TD is initialised");
        vcpu.init_vcpu(0).expect("the vCPU is new");
        let operation = GuestOp::Fetch { gpa: 0 };
        Self { td: td.clone(), vcpu, private: true, operation, doing: Doing::Operation, halted: false, done: None }
    }

    /// First byte and end of what the operation accesses.
    fn range(&self) -> (u64, u64) {
        let (gpa, len) = match &self.operation {
            GuestOp::Read { gpa, len } => (*gpa, *len as u64),
            GuestOp::Write { gpa, data } => (*gpa, data.len() as u64),
            GuestOp::Fill { gpa, len, .. } | GuestOp::Check { gpa, len, .. } => (*gpa, *len),
            GuestOp::Fetch { gpa } => (*gpa, 1),
            GuestOp::Hypercall { .. } => (0, 0),
        };
        (gpa, gpa + len)
    }

    fn begin(&mut self) {
        let private = self.private;
        self.doing = Doing::Operation;
        self.vcpu.start(match self.operation.clone() {
            GuestOp::Read { gpa, len } => SoftOp::Read { gpa, len: len as u64, private },
            GuestOp::Write { gpa, data } => SoftOp::Write { gpa, data, private },
            GuestOp::Fill { gpa, len, byte } => SoftOp::Fill { gpa, len, byte, private },
            GuestOp::Check { gpa, len, byte } => SoftOp::Check { gpa, len, byte, private },
            GuestOp::Fetch { gpa } => SoftOp::Fetch { gpa, private },
            GuestOp::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args: [gpa, pages, attributes, _] } => {
                let state = State::from_private(attributes != 0);
                let (start, size) = (WIDTH.join(Gpa(gpa), state), pages * PAGE_SIZE);
                return self.ask(start, start + size);
            }
            GuestOp::Hypercall { nr, args } => SoftOp::Hypercall { nr, args },
        });
    }

    fn ask(&mut self, start: u64, end: u64) {
        self.doing = Doing::Asking(end);
        self.vcpu.start(SoftOp::Instruction { nr: op::MAP_GPA, args: [start, end - start, 0, 0] });
    }

    fn accept(&mut self, gpa: u64) {
        self.doing = Doing::Accepting(gpa);
        self.vcpu.start(SoftOp::Instruction { nr: op::ACCEPT, args: [gpa, 0, 0, 0] });
    }

    /// A step is over: on to the next one, or to the end.
    fn step(&mut self, result: OpResult) {
        let (start, end) = self.range();
        self.done = match (&self.doing, result) {
            // Not accepted: all that it accesses is, one after the other; what was accepted before stays as it is.
            (Doing::Operation, OpResult::Exception) if self.private => return self.accept(start & !(PAGE_SIZE - 1)),
            (Doing::Accepting(at), OpResult::Instruction(_)) => {
                let next = at + PAGE_SIZE;
                return if next < end { self.accept(next) } else { self.begin() };
            }
            (Doing::Asking(end), OpResult::Instruction(status)) if status == Status::Retry.code() => {
                let (next, end) = (self.td.arch().r11(self.vcpu.index()), *end);
                return self.ask(next, end);
            }
            (Doing::Asking(_), OpResult::Instruction(status)) => {
                Some(Outcome::Answer(if status == 0 { 0 } else { Errno::EINVAL as u64 }))
            }
            (_, OpResult::Read(data)) => Some(Outcome::Data(data)),
            (_, OpResult::Differs { gpa, .. }) => Some(Outcome::Differs { offset: gpa - start }),
            (_, OpResult::Hypercall(answer)) => Some(Outcome::Answer(answer)),
            (_, OpResult::Done) if matches!(self.operation, GuestOp::Check { .. }) => Some(Outcome::Same),
            (_, OpResult::Done) => Some(Outcome::Done),
            (_, result) => panic!("the guest got {result:?}"),
        };
    }
}

impl Vcpu for TdGuest {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.vcpu.pre_fault_memory(range)
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        if std::mem::take(&mut self.halted) {
            let result = self.vcpu.take_result().expect("a halted guest has a result");
            self.step(result);
            if self.done.is_some() {
                return Ok(Exit::Halt);
            }
        }
        match self.vcpu.run() {
            // The result is looked at when it is run again.
            Ok(Exit::Halt) => {
                self.halted = true;
                Err(Errno::EAGAIN)
            }
            other => other,
        }
    }
}

impl Guest for TdGuest {
    fn start(&mut self, op: GuestOp) {
        self.operation = op;
        self.halted = false;
        self.done = None;
        self.begin();
    }

    fn result(&mut self) -> Option<Outcome> {
        self.done.take()
    }

    /// Nothing is executed, so any code does.
    fn return_code(&self) -> &'static [u8] {
        &[0xc3]
    }

    fn set_private(&mut self, private: bool) {
        self.private = private;
    }
}
