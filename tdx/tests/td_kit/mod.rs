//! What the tests of TDs share: a TD with memory that can run, and guests that finish what they are told.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(unsafe_code, reason = "slots are made here without shared memory, or over memory that is never freed")]

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use cvm_memory::addr::GfnRange;
use cvm_memory::exits::{Action, VcpuExits};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Exit, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes, MemoryRegion, Vcpu};
use cvm_memory::memory::{Builder, CvmMemory};
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_tdx::mechanism::{InitVm, TdVcpu, TdVm};
use cvm_memory_tdx::model::sept::SeptState;
use cvm_memory_tdx::model::{SoftTd, SoftTdVcpu, op};
use cvm_memory_tdx::width::Width;
#[allow(unused_imports, reason = "each test file uses its own part")]
pub use cvm_memory_testkit::{gfn, gfns};
use nix::errno::Errno;

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

/// A TD that has been initialised, with one vCPU that has too.
pub fn initialised(init: &InitVm) -> (SoftTd, SoftTdVcpu) {
    let td = SoftTd::new();
    td.init_vm(init).unwrap();
    let mut vcpu = td.create_vcpu().unwrap();
    vcpu.init_vcpu(0).unwrap();
    (td, vcpu)
}

/// A TD that runs, its memory all private, none of it added.
pub struct Running {
    pub td: SoftTd,
    pub memory: Arc<CvmMemory>,
    pub vcpu: SoftTdVcpu,
    pub exits: VcpuExits,
    /// Exits so far that were not the end of an operation.
    pub exits_seen: u64,
}

impl Running {
    pub fn with(init: &InitVm, ram: u64) -> Self {
        Self::built(init, CvmMemory::builder().ram(0, ram))
    }

    pub fn built(init: &InitVm, builder: Builder) -> Self {
        let (td, vcpu) = initialised(init);
        let memory = builder.build(Arc::new(td.clone())).unwrap();
        td.finalize().unwrap();
        Self::of(td, Arc::new(memory), vcpu)
    }

    /// A TD that somebody else has built.
    pub fn of(td: SoftTd, memory: Arc<CvmMemory>, vcpu: SoftTdVcpu) -> Self {
        let exits = VcpuExits::new(Arc::clone(&memory));
        Self { td, memory, vcpu, exits, exits_seen: 0 }
    }

    pub fn new(ram: u64) -> Self {
        Self::with(&InitVm::new(Width::Bits48), ram)
    }

    /// Runs `op` to its end, with every exit handled as a VMM would.
    pub fn run(&mut self, op: GuestOp) -> Result<OpResult, Errno> {
        self.run_with(op, |_| {})
    }

    /// As [`run`](Self::run), with a look at what was handled.
    pub fn run_with(&mut self, op: GuestOp, mut look: impl FnMut(&Exit<'_>)) -> Result<OpResult, Errno> {
        self.vcpu.start(op);
        loop {
            let mut exit = self.vcpu.run()?;
            if let Exit::Halt = exit {
                return Ok(self.vcpu.take_result().unwrap());
            }
            self.exits_seen += 1;
            look(&exit);
            match self.exits.handle(&mut exit) {
                Action::Resume(_) => {}
                other => panic!("{other:?}"),
            }
            look(&exit);
        }
    }

    pub fn accept(&mut self, gpa: u64, level: u64) -> u64 {
        match self.run(accept(gpa, level)) {
            Ok(OpResult::Instruction(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Status and r11.
    pub fn map_gpa(&mut self, address: u64, size: u64) -> (u64, u64) {
        match self.run(map_gpa(address, size)) {
            Ok(OpResult::Instruction(status)) => (status, self.td.arch().r11(self.vcpu.index())),
            other => panic!("{other:?}"),
        }
    }

    pub fn state(&self, n: u64) -> Option<SeptState> {
        self.td.arch().with_sept(|sept| sept.state(gfn(n)))
    }

    /// Nothing went on that should not have.
    pub fn is_sound(&self) {
        assert_eq!(self.td.arch().bugs(), []);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.is_sound();
        }
    }
}

/// A slot of private memory alone: nothing is mapped at its address in this process.
pub fn set_slot(td: &SoftTd, slot: u32, gpa: u64, size: u64, file: &GuestMemfd, offset: u64) -> Result<(), Errno> {
    let region = MemoryRegion {
        slot,
        flags: 4,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: 0,
        guest_memfd_offset: offset,
        guest_memfd: file.as_fd().as_raw_fd(),
    };
    // SAFETY: shared accesses would go to the first pages of this process, where nothing can be mapped.
    unsafe { td.set_user_memory_region2(&region) }
}

pub fn set_private(td: &SoftTd, gfns: GfnRange, private: bool) {
    let attributes = if private { MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
    let (address, size) = (gfns.start_byte(), gfns.bytes());
    td.set_memory_attributes(&MemoryAttributes { address, size, attributes, flags: 0 }).unwrap();
}

pub fn accept(gpa: u64, level: u64) -> GuestOp {
    GuestOp::Instruction { nr: op::ACCEPT, args: [gpa | level, 0, 0, 0] }
}

pub fn map_gpa(address: u64, size: u64) -> GuestOp {
    GuestOp::Instruction { nr: op::MAP_GPA, args: [address, size, 0, 0] }
}

pub fn fill(gpa: u64, len: u64, byte: u8, private: bool) -> GuestOp {
    GuestOp::Fill { gpa, len, byte, private }
}

pub fn check(gpa: u64, len: u64, byte: u8, private: bool) -> GuestOp {
    GuestOp::Check { gpa, len, byte, private }
}
