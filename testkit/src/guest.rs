//! A guest that is told what to do, whoever executes it: a vCPU of the real KVM or one of the software KVM.

use cvm_memory::hypervisor::{Exit, Vcpu};

/// One thing for a guest to do. Addresses are guest physical, in bytes, and need no alignment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestOp {
    /// Reads memory: [`Outcome::Data`].
    Read {
        /// First byte.
        gpa: u64,
        /// Bytes.
        len: usize,
    },
    /// Writes memory: [`Outcome::Done`].
    Write {
        /// First byte.
        gpa: u64,
        /// What to write.
        data: Vec<u8>,
    },
    /// Writes the same byte over and over: [`Outcome::Done`].
    Fill {
        /// First byte.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// The byte.
        byte: u8,
    },
    /// Reads memory and compares: [`Outcome::Same`] or [`Outcome::Differs`].
    Check {
        /// First byte.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// What each should be.
        byte: u8,
    },
    /// Executes code, which has to be [`Guest::return_code`]: [`Outcome::Done`].
    Fetch {
        /// Its first byte.
        gpa: u64,
    },
    /// Asks the hypervisor for a service: [`Outcome::Answer`].
    Hypercall {
        /// Which.
        nr: u64,
        /// Its arguments.
        args: [u64; 4],
    },
}

/// What came of a [`GuestOp`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// What was read.
    Data(Vec<u8>),
    /// All bytes were as expected.
    Same,
    /// The first byte that was not.
    Differs {
        /// Bytes from the start of the operation.
        offset: u64,
    },
    /// What a hypercall returned.
    Answer(u64),
}

/// A vCPU whose guest does one [`GuestOp`] at a time.
///
/// After [`start`](Self::start), [`run`](Vcpu::run) it. An exit other than [`Exit::Halt`] has to be dealt with and the guest
/// run again, which repeats or resumes what it was at; with `Halt` the operation is over and has a result.
pub trait Guest: Vcpu {
    /// Tells the guest what to do next. What it was at before, if unfinished, is dropped.
    ///
    /// # Panics
    /// If the guest cannot reach the addresses.
    fn start(&mut self, op: GuestOp);

    /// What came of the last operation, once; `None` while it is unfinished.
    fn result(&mut self) -> Option<Outcome>;

    /// The code that has to be in memory for [`GuestOp::Fetch`]: a return.
    fn return_code(&self) -> &'static [u8];

    /// How the guest accesses memory from the next operation on, where accesses carry their privacy. Elsewhere nothing
    /// changes.
    fn set_private(&mut self, private: bool) {
        let _ = private;
    }

    /// Does `op` to its end. `handle` deals with every exit on the way.
    ///
    /// # Panics
    /// If the vCPU fails with anything but `EINTR` or `EAGAIN`.
    fn complete(&mut self, op: GuestOp, handle: &mut dyn FnMut(Exit<'_>)) -> Outcome {
        use nix::errno::Errno;

        self.start(op);
        loop {
            match self.run() {
                Ok(Exit::Halt) => return self.result().expect("a halted guest has a result"),
                Ok(exit) => handle(exit),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => panic!("run failed: {errno}"),
            }
        }
    }

    /// Does `op`, which is to need nobody's help.
    ///
    /// # Panics
    /// On any exit, and as [`complete`](Self::complete).
    fn perform(&mut self, op: GuestOp) -> Outcome {
        let what = format!("{op:x?}");
        self.complete(op, &mut |exit| panic!("{what} came back with {exit:x?}"))
    }
}
