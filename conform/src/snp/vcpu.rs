//! A vCPU of an SNP guest that is told what to do, on either side, and what is seen of it.

use cvm_memory::hypervisor::{Exit, PreFaultMemory};
use nix::errno::Errno;

use super::own::Own;
use crate::live::guests;
use crate::observation::{End, Seen};

/// Exits of one operation, at most.
const MANY: usize = 600;

/// One thing to do. Addresses are guest physical.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Do {
    /// By one instruction if it is of 1, 2, 4 or 8 bytes.
    Read { gpa: u64, len: u64, private: bool },
    /// By one instruction, of 1, 2, 4 or 8 bytes.
    Write { gpa: u64, data: Vec<u8>, private: bool },
    /// Calls a return instruction. Fetches are private.
    Fetch { gpa: u64 },
    /// PVALIDATE.
    Pvalidate { gpa: u64, large: bool, validate: bool },
    /// VMGEXIT with this in the register of the GHCB.
    Vmgexit { value: u64 },
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Done,
    Data(Vec<u8>),
    /// A register, or that and a flag.
    Word(u64),
    /// #VC, of which the host hears nothing.
    Exception,
    /// #VC by which a guest hears that it has met MMIO.
    Mmio,
    /// An exception that nothing here has a reason for.
    Astray(u64, u64),
}

/// A vCPU that does one thing at a time.
pub(super) trait Vcpu: std::fmt::Debug + Send {
    /// The memory its guest keeps for itself.
    fn own(&self) -> &Own;

    /// Tells it what to do; what it was at is given up.
    fn start(&mut self, what: &Do);

    /// Runs it to its next exit. `ELOOP` if it executes the same instruction for ever, without an exit.
    fn run(&mut self) -> Result<Exit<'_>, Errno>;

    /// What came of the last thing, when it has halted.
    fn result(&mut self) -> Value;

    /// `KVM_PRE_FAULT_MEMORY`.
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno>;
}

/// Does `what` to its end. Hypercalls are answered; everything else ends it.
pub(super) fn perform(vcpu: &mut dyn Vcpu, what: &Do, answer: u64, seen: &mut Vec<Seen>) -> End {
    vcpu.start(what);
    for _ in 0..MANY {
        match vcpu.run() {
            Ok(Exit::Halt) => {
                return match vcpu.result() {
                    Value::Done => End::Done,
                    Value::Data(data) => End::Data(data),
                    Value::Word(word) => End::Answer(word),
                    Value::Exception => End::Exception,
                    Value::Mmio => End::Mmio,
                    Value::Astray(..) => End::Other(None),
                };
            }
            // Of a machine whose guests need not ask for it by themselves.
            Ok(Exit::Mmio(_)) => return End::Mmio,
            Ok(exit) => {
                if let Some(end) = guests::ended_by(exit, answer, seen) {
                    return end;
                }
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(Errno::ELOOP) => return End::Endless,
            Err(errno) => return End::Failed(errno),
        }
    }
    End::Endless
}
