//! SNP guests on the real KVM, launched with the program of the testkit, and told what to do.
#![allow(dead_code, reason = "each test program uses its part")]

use std::sync::Arc;

use cvm_memory::exits::{Action, VcpuExits};
use cvm_memory::hypervisor::Exit;
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::memory::{Builder, CvmMemory};
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_sev::commands::Init;
use cvm_memory_sev::ghcb::msr;
use cvm_memory_sev::ghcb::page::{EXIT_AP_CREATION, EXIT_CODE, EXIT_INFO_1, EXIT_INFO_2, VALID_BITMAP, VERSION};
use cvm_memory_sev::import::{Import, ImportList};
use cvm_memory_sev::kvm::{KvmSnp, set_registers};
use cvm_memory_sev::launch::{FinishOptions, Launch, StartOptions};
use cvm_memory_sev::rmp::Size;
use cvm_memory_sev::soft::{pvalidate, rmpadjust, vmgexit};
use cvm_memory_sev::vmsa::Vmsa;
use cvm_memory_testkit::snp::{Emulation, Processor as _, Program, SnpGuest, SnpVcpu, c_bit, snp_vm};
use nix::errno::Errno;

const PAGE: u64 = 4096;
/// A GHCB page for each vCPU.
const GHCBS: u64 = 3 << 30;
const PROGRAM: u64 = 0xe000_0000;
/// RAX in the GHCB.
const RAX: u64 = 0x1f8;

pub const CREATE: u64 = 1;
pub const DESTROY: u64 = 2;

pub struct Lab {
    pub vm: KvmVm,
    pub memory: Arc<CvmMemory>,
    pub vcpus: Vec<SnpGuest<SnpVcpu>>,
    pub asid: String,
}

/// A VM with this memory and so many vCPUs, launched, or a skip. The firmware's digest is the predicted one.
pub fn launched(emulation: &Emulation, builder: Builder, vcpus: u64, gosvw: u8) -> Option<Lab> {
    let vm = snp_vm()?;
    let launch = Launch::init(Arc::new(KvmSnp::open(vm.clone()).unwrap()), &Init::default()).unwrap();
    let program = Program::new(PROGRAM, vcpus, c_bit().unwrap());
    let builder = builder.plain_ram(GHCBS, vcpus * PAGE).ram(PROGRAM, program.size());
    let memory = Arc::new(builder.build(Arc::new(vm.clone())).unwrap());
    let mut guests: Vec<SnpVcpu> = (0..vcpus).map(|id| SnpVcpu::new(&vm, &program, id)).collect();
    // The lab's kernel is built without machine checks, which no kernel of a real host is.
    let machine_checks = std::fs::exists("/sys/devices/system/machinecheck").unwrap();
    let vmsas: Vec<Vmsa> = guests.iter().map(|guest| guest.vmsa().clone().on_host(machine_checks)).collect();
    for (guest, vmsa) in guests.iter().zip(&vmsas) {
        set_registers(guest.vcpu(), vmsa).unwrap();
    }
    let list: ImportList = [Import::normal(program.gpa(), &program.image()).unwrap()].into_iter().collect();
    let options = StartOptions { gosvw: [gosvw; 16], ..StartOptions::default() };
    let mut launch = launch.start(&options).map_err(|(_, error)| error).unwrap();
    launch.import(&memory, &list, &mut |_| {}).unwrap();
    let mut borrowed: Vec<&mut SnpVcpu> = guests.iter_mut().collect();
    let launched = launch.finish(&mut borrowed, &vmsas, FinishOptions::default()).unwrap();
    let (guest, _) = emulation.guest([gosvw; 16]);
    assert_eq!(guest["digest"], launched.digest.to_string());
    let asid = guest["asid"].clone();
    let vcpus = (0..).zip(guests).map(|(id, guest)| SnpGuest::new(guest, GHCBS + id * PAGE)).collect();
    Some(Lab { vm, memory, vcpus, asid })
}

/// `KVM_EXIT_FAIL_ENTRY`, with this reason.
#[derive(Debug, PartialEq, Eq)]
pub struct NoEntry(pub u64);

impl Lab {
    /// Runs `vcpu` until what it was told is done.
    pub fn go_on(&mut self, vcpu: usize) -> Result<OpResult, NoEntry> {
        let mut exits = VcpuExits::new(Arc::clone(&self.memory));
        let processor = self.vcpus[vcpu].processor();
        loop {
            match cvm_memory::hypervisor::Vcpu::run(processor) {
                Ok(Exit::Halt) => return Ok(processor.finished().unwrap()),
                Ok(Exit::FailEntry { reason, .. }) => return Err(NoEntry(reason)),
                Ok(mut exit) => {
                    let action = exits.handle(&mut exit);
                    assert!(matches!(action, Action::Resume(_)), "{exit:x?} came to {action:x?}");
                }
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => panic!("run failed: {errno}"),
            }
        }
    }

    /// One step of `vcpu`.
    pub fn step(&mut self, vcpu: usize, op: GuestOp) -> Result<OpResult, NoEntry> {
        self.vcpus[vcpu].processor().begin(op);
        self.go_on(vcpu)
    }

    fn must(&mut self, op: GuestOp) -> OpResult {
        self.step(0, op).unwrap()
    }

    fn put(&mut self, gpa: u64, data: &[u8]) {
        let op = GuestOp::Write { gpa, data: data.to_vec(), private: false };
        assert_eq!(self.must(op), OpResult::Done);
    }

    /// vCPU 0 starts or stops vCPU 1, which runs from the save area at `vmsa`. What it is answered.
    pub fn ask(&mut self, request: u64, vmsa: u64) -> [u64; 2] {
        self.must(vmgexit(msr::register_request(GHCBS / PAGE)));
        let mut valid = [0_u8; 16];
        for (offset, value) in
            [(RAX, 1), (EXIT_CODE, EXIT_AP_CREATION), (EXIT_INFO_1, 1 << 32 | request), (EXIT_INFO_2, vmsa)]
        {
            self.put(GHCBS + offset, &value.to_le_bytes());
            let (byte, mask) = cvm_memory_sev::ghcb::page::valid_bit(offset);
            valid[usize::try_from(byte).unwrap()] |= mask;
        }
        self.put(GHCBS + VALID_BITMAP, &valid);
        self.put(GHCBS + VERSION, &2_u16.to_le_bytes());
        self.must(vmgexit(GHCBS));
        [EXIT_INFO_1, EXIT_INFO_2].map(|offset| {
            match self.must(GuestOp::Read { gpa: GHCBS + offset, len: 8, private: false }) {
                OpResult::Read(bytes) => u64::from_le_bytes(bytes.try_into().unwrap()),
                other => panic!("{other:?}"),
            }
        })
    }

    /// vCPU 0 accepts a page; what PVALIDATE gives.
    pub fn accept(&mut self, gpa: u64) -> OpResult {
        self.must(pvalidate(gpa, Size::Small, true))
    }

    /// vCPU 0 makes a save area at `vmsa`, in a page that it accepts, from which vCPU 1 starts.
    pub fn start_second(&mut self, vmsa: u64) {
        let data = self.vcpus[1].processor().vmsa().page().to_vec();
        assert_eq!(self.accept(vmsa), OpResult::Instruction(0));
        assert_eq!(self.must(GuestOp::Write { gpa: vmsa, data, private: true }), OpResult::Done);
        assert_eq!(self.must(rmpadjust(vmsa, 1, 0, true)), OpResult::Instruction(0));
        assert_eq!(self.ask(CREATE, vmsa), [0, 0]);
    }
}
