//! What a guest of the software KVM can be told to do, and what came of it.

use super::arch::Instruction;

/// One guest operation. Addresses in bytes, any alignment; memory is accessed page by page, in order. `private` is how the
/// guest accesses it, which counts only where accesses carry their privacy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestOp {
    /// Reads `len` bytes: [`OpResult::Read`].
    Read {
        /// First byte.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// How.
        private: bool,
    },
    /// Writes `data`: [`OpResult::Done`].
    Write {
        /// First byte.
        gpa: u64,
        /// What to write.
        data: Vec<u8>,
        /// How.
        private: bool,
    },
    /// Writes `byte` `len` times: [`OpResult::Done`].
    Fill {
        /// First byte.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// With what.
        byte: u8,
        /// How.
        private: bool,
    },
    /// Compares `len` bytes with `byte`: [`OpResult::Done`], or [`OpResult::Differs`] at the first that is another.
    Check {
        /// First byte.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// What each byte should be.
        byte: u8,
        /// How.
        private: bool,
    },
    /// Fetches an instruction: [`OpResult::Done`].
    Fetch {
        /// Where.
        gpa: u64,
        /// How.
        private: bool,
    },
    /// Executes a hypercall: [`OpResult::Hypercall`].
    Hypercall {
        /// Its number.
        nr: u64,
        /// Its arguments.
        args: [u64; 4],
    },
    /// Executes an operation of the platform: [`OpResult::Instruction`].
    Instruction {
        /// Which, in the platform's numbering.
        nr: u64,
        /// Its operands.
        args: [u64; 4],
    },
}

/// What a finished operation came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpResult {
    /// The bytes read.
    Read(Vec<u8>),
    /// Done; nothing to tell.
    Done,
    /// A byte was not what it should be.
    Differs {
        /// Where.
        gpa: u64,
        /// What it was.
        found: u8,
    },
    /// The return register: userspace's answer as it is, or KVM's own negative errno.
    Hypercall(u64),
    /// What the platform gave.
    Instruction(u64),
    /// The guest got an exception instead.
    Exception,
}

/// An operation and how far it has come.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) op: GuestOp,
    /// Bytes done.
    pub(super) done: u64,
    /// Bytes read.
    pub(super) read: Vec<u8>,
    /// Calls of the platform's operation.
    pub(super) round: u64,
    /// Answer to the last hypercall.
    pub(super) answer: Option<u64>,
}

impl Running {
    pub(super) const fn new(op: GuestOp) -> Self {
        Self { op, done: 0, read: Vec::new(), round: 0, answer: None }
    }

    pub(super) const fn instruction(&self, vcpu: u32, nr: u64, args: [u64; 4], map_gpa_exits: bool) -> Instruction {
        Instruction { vcpu, nr, args, round: self.round, answer: self.answer, map_gpa_exits }
    }

    /// First byte, length and privacy of an operation on memory.
    pub(super) fn memory(&self) -> Option<(u64, u64, bool)> {
        match &self.op {
            GuestOp::Read { gpa, len, private }
            | GuestOp::Fill { gpa, len, private, .. }
            | GuestOp::Check { gpa, len, private, .. } => Some((*gpa, *len, *private)),
            GuestOp::Write { gpa, data, private } => Some((*gpa, u64::try_from(data.len()).ok()?, *private)),
            GuestOp::Fetch { gpa, private } => Some((*gpa, 1, *private)),
            GuestOp::Hypercall { .. } | GuestOp::Instruction { .. } => None,
        }
    }

    /// The next `len` bytes that the operation writes; `None` if it reads.
    pub(super) fn output(&self, len: usize) -> Option<Vec<u8>> {
        match &self.op {
            GuestOp::Fill { byte, .. } => Some(vec![*byte; len]),
            GuestOp::Write { data, .. } => {
                let done = usize::try_from(self.done).ok()?;
                Some(data.get(done..)?.iter().take(len).copied().collect())
            }
            _ => None,
        }
    }

    /// Takes bytes read. Returns the result if they end the operation.
    pub(super) fn absorb(&mut self, bytes: &[u8]) -> Option<OpResult> {
        match &self.op {
            GuestOp::Read { .. } => self.read.extend_from_slice(bytes),
            GuestOp::Check { gpa, byte, .. } => {
                if let Some(at) = bytes.iter().position(|found| found != byte) {
                    let found = bytes.get(at).copied().unwrap_or_default();
                    let at = self.done.saturating_add(u64::try_from(at).unwrap_or(u64::MAX));
                    return Some(OpResult::Differs { gpa: gpa.wrapping_add(at), found });
                }
            }
            _ => {}
        }
        None
    }

    /// Counts bytes as done.
    pub(super) fn advance(&mut self, bytes: usize) {
        self.done = self.done.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    /// The result of an operation on memory that has come to its end.
    pub(super) fn finish(&mut self) -> OpResult {
        match self.op {
            GuestOp::Read { .. } => OpResult::Read(std::mem::take(&mut self.read)),
            _ => OpResult::Done,
        }
    }
}
