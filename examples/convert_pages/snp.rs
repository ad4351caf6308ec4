//! SNP VMs: on KVM where it offers them, else on the software KVM with a model of the RMP.

use std::sync::{Arc, Mutex, PoisonError};

use cvm_memory::addr::{GfnRange, PAGE_SIZE};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Hypervisor, Vcpu};
use cvm_memory::memory::{Builder, CvmMemory};
use cvm_memory_sev::SNP;
use cvm_memory_sev::commands::{Init, SnpCommands};
use cvm_memory_sev::import::{Import, ImportList};
use cvm_memory_sev::kvm::{KvmSnp, set_registers};
use cvm_memory_sev::launch::{FinishOptions, Launch, New, StartOptions};
use cvm_memory_sev::rmp::PageState;
use cvm_memory_sev::soft::SoftSnp;
use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE, Vmsa};
use cvm_memory_testkit::snp::{Emulation, Program, SnpGuest, SnpVcpu, c_bit};
use cvm_memory_testkit::{Guest, chain};
use kvm_ioctls::Kvm;

use crate::Failure;
use crate::args::{Args, BackendChoice};

/// Where the GHCB pages are: below the guest's memory.
const GHCBS: u64 = 3 << 30;
/// Where the guests' program is: below the guest's memory, above the GHCB pages.
const PROGRAM: u64 = 0xe000_0000;

pub struct Snp {
    host: Host,
    /// Until it is launched.
    launch: Mutex<Option<Launch<New>>>,
    /// What the vCPUs start with, in their order.
    vmsas: Mutex<Vec<Vmsa>>,
}

enum Host {
    Soft(Arc<SoftSnp>),
    Kvm { vm: KvmVm, program: Program, gosvw: [u8; 16] },
}

impl Snp {
    /// Makes the VM, and says on stderr which it is if that was left open.
    pub fn new(args: &Args) -> Result<Self, Failure> {
        match args.backend {
            BackendChoice::Soft => Self::soft(),
            BackendChoice::Kvm => Self::kvm(args.vcpus.into()),
            BackendChoice::Auto => match Self::kvm(args.vcpus.into()) {
                Ok(snp) => {
                    eprintln!("backend: kvm, which offers VMs with SEV-SNP");
                    Ok(snp)
                }
                Err(reason) => {
                    eprintln!("backend: soft, because kvm has no SEV-SNP here: {}", chain(reason.as_ref()));
                    Self::soft()
                }
            },
        }
    }

    fn soft() -> Result<Self, Failure> {
        let snp = Arc::new(SoftSnp::new());
        let launch = Launch::init(Arc::clone(&snp) as Arc<dyn SnpCommands>, &Init::default())?;
        Ok(Self::with(Host::Soft(snp), launch))
    }

    fn kvm(vcpus: u64) -> Result<Self, Failure> {
        let kvm = Kvm::new().map_err(|error| format!("open /dev/kvm: {error}"))?;
        let vm = KvmVm::create(&kvm, SNP)?;
        let commands = KvmSnp::open(vm.clone()).map_err(|error| format!("open /dev/sev: {error}"))?;
        let launch = Launch::init(Arc::new(commands), &Init::default())?;
        let c_bit = c_bit().ok_or("KVM does not say which bit is the C-bit")?;
        // By which the lab's emulated firmware is asked for this guest; it means nothing to a guest like this.
        let mut gosvw = [0; 16];
        gosvw[..4].copy_from_slice(&std::process::id().to_le_bytes());
        Ok(Self::with(Host::Kvm { vm, program: Program::new(PROGRAM, vcpus, c_bit), gosvw }, launch))
    }

    fn with(host: Host, launch: Launch<New>) -> Self {
        Self { host, launch: Mutex::new(Some(launch)), vmsas: Mutex::default() }
    }

    pub fn vm(&self) -> Arc<dyn Hypervisor> {
        match &self.host {
            Host::Soft(snp) => Arc::new(snp.vm().clone()),
            Host::Kvm { vm, .. } => Arc::new(vm.clone()),
        }
    }

    pub const fn name(&self) -> &'static str {
        match &self.host {
            Host::Soft(_) => "soft, with a model of the RMP",
            Host::Kvm { .. } => "kvm",
        }
    }

    /// Describes memory that the guests need for themselves: GHCB pages, and a program on processors that execute one.
    pub fn extend(&self, builder: Builder, vcpus: u64) -> Builder {
        let builder = builder.plain_ram(GHCBS, vcpus * PAGE_SIZE);
        match &self.host {
            Host::Soft(_) => builder,
            Host::Kvm { program, .. } => builder.ram(program.gpa(), program.size()),
        }
    }

    /// vCPU number `id`; they are made in order.
    pub fn guest(&self, id: u64) -> Result<Box<dyn Guest>, Failure> {
        let mut vmsas = self.vmsas.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(match &self.host {
            Host::Soft(snp) => {
                let vmsa = Vmsa::of_all(1, 0, CpuSignature(0), SNP_ACTIVE).remove(0);
                let vcpu = snp.vm().create_vcpu();
                snp.set_registers(u32::try_from(id)?, &vmsa);
                vmsas.push(vmsa);
                Box::new(SnpGuest::new(vcpu, GHCBS + id * PAGE_SIZE))
            }
            Host::Kvm { vm, program, .. } => {
                let vcpu = SnpVcpu::new(vm, program, id);
                set_registers(vcpu.vcpu(), vcpu.vmsa()).map_err(|errno| format!("set registers: {errno}"))?;
                vmsas.push(vcpu.vmsa().clone());
                Box::new(SnpGuest::new(vcpu, GHCBS + id * PAGE_SIZE))
            }
        })
    }

    /// The image is the guests' program, if they need one. All other memory the guest accepts by itself.
    pub fn launch(&self, memory: &CvmMemory, vcpus: &mut [&mut dyn Vcpu]) -> Result<(), Failure> {
        let launch = self.launch.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut list = ImportList::new();
        let mut options = StartOptions::default();
        if let Host::Kvm { program, gosvw, .. } = &self.host {
            list.push(Import::normal(program.gpa(), &program.image())?);
            options.gosvw = *gosvw;
        }
        let launch = launch.ok_or("a VM is launched once")?.start(&options);
        let mut launch = launch.map_err(|(_, error)| error)?;
        launch.import(memory, &list, &mut |_| {})?;
        let vmsas = self.vmsas.lock().unwrap_or_else(PoisonError::into_inner);
        launch.finish(vcpus, &vmsas, FinishOptions::default())?;
        Ok(())
    }

    /// All frames whose attribute is private, where that can be asked. KVM has no such question.
    pub fn private_gfns(&self) -> Option<Vec<GfnRange>> {
        match &self.host {
            Host::Soft(snp) => Some(snp.vm().private_gfns()),
            Host::Kvm { .. } => None,
        }
    }

    /// What the RMP says of the guest's frames, and whether it has accepted them: of the model, or of the lab's emulated host. No
    /// processor tells.
    pub fn rmp(&self) -> Option<Vec<(GfnRange, bool)>> {
        match &self.host {
            Host::Soft(snp) => {
                let valid = |(gfns, state)| (gfns, state == PageState::GuestValid);
                Some(snp.rmp_by_gfn().into_iter().map(valid).collect())
            }
            Host::Kvm { gosvw, .. } if Emulation::is_here() => {
                let emulation = Emulation::here()?;
                let (guest, _) = emulation.guest(*gosvw);
                let entries = emulation.rmp(guest.get("asid")?);
                Some(entries.into_iter().map(|entry| (entry.gfns, entry.state == "guest-valid")).collect())
            }
            Host::Kvm { .. } => None,
        }
    }
    /// How many pages have been put into the RMP so far, of the whole host.
    pub fn assignments(&self) -> Option<u64> {
        match &self.host {
            Host::Soft(snp) => {
                // Each update puts one in or takes one out.
                let machine = snp.machine();
                Some((machine.counters().rmpupdate + machine.assigned() as u64) / 2)
            }
            Host::Kvm { .. } if Emulation::is_here() => Some(Emulation::here()?.counter("rmpupdate_assign")),
            Host::Kvm { .. } => None,
        }
    }
}
