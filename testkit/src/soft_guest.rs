//! Guests on the software KVM: a vCPU that does as it is told, without any instruction in between.
//!
//! Where accesses carry their privacy, [`Guest::set_private`] says how the guest accesses memory from then on; a new one
//! accesses everything as private.

use cvm_memory::gate::Kick;
use cvm_memory::hypervisor::{DirtyRingMemory, Exit, PreFaultMemory, Vcpu};
use cvm_memory::soft::{GuestOp as SoftOp, ImmediateExit, OpResult, SoftVcpu, SoftVm};
use nix::errno::Errno;

use crate::guest::{Guest, GuestOp, Outcome};

/// A vCPU of the software KVM.
///
/// ```
/// use cvm_memory::memory::CvmMemory;
/// use cvm_memory::soft::SoftVm;
/// use cvm_memory_testkit::{Guest, GuestOp, Outcome, SoftGuest};
/// use std::sync::Arc;
///
/// let vm = SoftVm::software_protected();
/// let _memory = CvmMemory::builder().ram(0, 4 << 20).build(Arc::new(vm.clone()))?;
/// let mut guest = SoftGuest::new(&vm);
/// guest.perform(GuestOp::Fill { gpa: 0x1000, len: 16, byte: 7 });
/// assert_eq!(guest.perform(GuestOp::Check { gpa: 0x1000, len: 17, byte: 7 }), Outcome::Differs { offset: 16 });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SoftGuest {
    vcpu: SoftVcpu,
    private: bool,
    /// What it is at, as far as its result needs that: where it started, and whether it compares.
    start: u64,
    compares: bool,
}

impl SoftGuest {
    /// Creates the next vCPU of `vm`.
    pub fn new(vm: &SoftVm) -> Self {
        Self { vcpu: vm.create_vcpu(), private: true, start: 0, compares: false }
    }

    /// The vCPU.
    pub const fn vcpu(&self) -> &SoftVcpu {
        &self.vcpu
    }

    /// What gets it out of a run.
    pub fn kick(&self) -> SoftKick {
        SoftKick(self.vcpu.immediate_exit())
    }
}

/// Makes a vCPU of the software KVM return, and keeps it out until it enters again.
#[derive(Debug)]
pub struct SoftKick(ImmediateExit);

impl Kick for SoftKick {
    fn entering(&self) {
        self.0.set(false);
    }

    fn kick(&self) {
        self.0.set(true);
    }
}

impl Vcpu for SoftGuest {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.vcpu.pre_fault_memory(range)
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        self.vcpu.run()
    }

    fn dirty_ring(&self, bytes: u32) -> Result<Box<dyn DirtyRingMemory>, Errno> {
        self.vcpu.dirty_ring(bytes)
    }
}

impl Guest for SoftGuest {
    fn start(&mut self, op: GuestOp) {
        let private = self.private;
        self.compares = matches!(op, GuestOp::Check { .. });
        self.start = if let GuestOp::Check { gpa, .. } = op { gpa } else { 0 };
        self.vcpu.start(match op {
            GuestOp::Read { gpa, len } => SoftOp::Read { gpa, len: len as u64, private },
            GuestOp::Write { gpa, data } => SoftOp::Write { gpa, data, private },
            GuestOp::Fill { gpa, len, byte } => SoftOp::Fill { gpa, len, byte, private },
            GuestOp::Check { gpa, len, byte } => SoftOp::Check { gpa, len, byte, private },
            GuestOp::Fetch { gpa } => SoftOp::Fetch { gpa, private },
            GuestOp::Hypercall { nr, args } => SoftOp::Hypercall { nr, args },
        });
    }

    /// # Panics
    /// If the guest got an exception.
    fn result(&mut self) -> Option<Outcome> {
        Some(match self.vcpu.take_result()? {
            OpResult::Read(data) => Outcome::Data(data),
            OpResult::Done if self.compares => Outcome::Same,
            OpResult::Done => Outcome::Done,
            OpResult::Differs { gpa, .. } => Outcome::Differs { offset: gpa.wrapping_sub(self.start) },
            OpResult::Hypercall(answer) => Outcome::Answer(answer),
            result @ (OpResult::Instruction(_) | OpResult::Exception) => panic!("the guest got {result:?}"),
        })
    }

    /// Nothing is executed, so any code does.
    fn return_code(&self) -> &'static [u8] {
        &[0xc3]
    }

    fn set_private(&mut self, private: bool) {
        self.private = private;
    }
}
