//! Who runs the guest: KVM with private memory, or the software KVM.

use std::sync::Arc;

use cvm_memory::addr::GfnRange;
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Cap, Capabilities, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, Platform, Vcpu};
use cvm_memory::memory::{Builder, CvmMemory};
use cvm_memory::soft::SoftVm;
use cvm_memory_tdx::mechanism::TdVm;
use cvm_memory_tdx::model::SoftTd;
use cvm_memory_testkit::{Guest, KvmGuest, SoftGuest, chain};
use kvm_ioctls::Kvm;

use crate::Failure;
use crate::args::{Args, BackendChoice, PlatformChoice, SoftVmKind};
use crate::snp::Snp;
use crate::td::{self, TdGuest};

pub enum Backend {
    Soft(SoftVm),
    Td(SoftTd),
    Snp(Snp),
    Kvm(KvmVm),
}

impl Backend {
    /// Makes a VM of the kind asked for, and says which on stderr if that was left open.
    pub fn new(args: &Args) -> Result<Self, Failure> {
        match (args.platform, args.backend) {
            (Some(PlatformChoice::Snp), _) => return Ok(Self::Snp(Snp::new(args)?)),
            (Some(PlatformChoice::Tdx), _) => return Ok(Self::Td(td::new()?)),
            (None, _) => {}
        }
        match args.backend {
            BackendChoice::Soft => Ok(Self::soft(args)),
            BackendChoice::Kvm => Ok(Self::Kvm(private_kvm()?)),
            BackendChoice::Auto => Ok(match private_kvm() {
                Ok(vm) => {
                    eprintln!("backend: kvm, which offers software-protected VMs with private memory");
                    Self::Kvm(vm)
                }
                Err(reason) => {
                    eprintln!("backend: soft, because kvm has no private memory here: {}", chain(reason.as_ref()));
                    Self::soft(args)
                }
            }),
        }
    }

    fn soft(args: &Args) -> Self {
        Self::Soft(match args.soft_vm {
            SoftVmKind::Tagged => SoftVm::tagged(),
            SoftVmKind::Protected => SoftVm::software_protected(),
        })
    }

    /// Describes memory that the guests need for themselves.
    pub fn extend(&self, builder: Builder, vcpus: u64) -> Builder {
        match self {
            Self::Snp(snp) => snp.extend(builder, vcpus),
            Self::Soft(_) | Self::Td(_) | Self::Kvm(_) => builder,
        }
    }

    /// Memory and vCPUs are there: what has to happen before the guest may run. It accepts its memory by itself.
    pub fn launch(&self, memory: &CvmMemory, vcpus: &mut [&mut dyn Vcpu]) -> Result<(), Failure> {
        match self {
            Self::Snp(snp) => snp.launch(memory, vcpus)?,
            Self::Td(td) => td.finalize()?,
            Self::Soft(_) | Self::Kvm(_) => {}
        }
        Ok(())
    }

    pub const fn name(&self) -> &'static str {
        match self {
            Self::Soft(_) | Self::Td(_) => "soft",
            Self::Snp(snp) => snp.name(),
            Self::Kvm(_) => "kvm",
        }
    }

    pub fn vm(&self) -> Arc<dyn Hypervisor> {
        match self {
            Self::Soft(vm) => Arc::new(vm.clone()),
            Self::Td(td) => Arc::new(td.clone()),
            Self::Snp(snp) => snp.vm(),
            Self::Kvm(vm) => Arc::new(vm.clone()),
        }
    }

    /// vCPU number `id`. On KVM its code lives in a slot of its own, of the highest ids, below 4 GiB.
    pub fn guest(&self, id: u64) -> Result<Box<dyn Guest>, Failure> {
        Ok(match self {
            Self::Soft(vm) => Box::new(SoftGuest::new(vm)),
            Self::Td(td) => Box::new(TdGuest::new(td)),
            Self::Snp(snp) => snp.guest(id)?,
            Self::Kvm(vm) => Box::new(KvmGuest::new(vm, id)),
        })
    }

    /// Whether what a private page held outlasts its being shared, as long as nobody frees it.
    pub const fn private_contents_survive(&self) -> bool {
        !matches!(self, Self::Td(_))
    }

    /// All frames whose attribute is private, where that can be asked. KVM has no such question.
    pub fn private_gfns(&self) -> Option<Vec<GfnRange>> {
        match self {
            Self::Soft(vm) => Some(vm.private_gfns()),
            Self::Td(td) => Some(td.vm().private_gfns()),
            Self::Snp(snp) => snp.private_gfns(),
            Self::Kvm(_) => None,
        }
    }

    /// What the platform's own table of pages says of the guest's frames, and whether the guest has accepted them. Where there
    /// is one, and it can be looked at.
    pub fn assigned(&self) -> Option<Vec<(GfnRange, bool)>> {
        match self {
            Self::Snp(snp) => snp.rmp(),
            Self::Soft(_) | Self::Td(_) | Self::Kvm(_) => None,
        }
    }

    /// How many pages have been put into that table so far.
    pub fn assignments(&self) -> Option<u64> {
        match self {
            Self::Snp(snp) => snp.assignments(),
            Self::Soft(_) | Self::Td(_) | Self::Kvm(_) => None,
        }
    }
}

/// A software-protected VM. What it offers is asked of the VM itself: `/dev/kvm` answers for VMs of the default type.
fn private_kvm() -> Result<KvmVm, Failure> {
    let kvm = Kvm::new().map_err(|error| format!("open /dev/kvm: {error}"))?;
    let vm = KvmVm::create(&kvm, Platform::SOFTWARE_PROTECTED)?;
    Capabilities::require(&vm, Cap::GUEST_MEMFD, 1)?;
    Capabilities::require(&vm, Cap::MEMORY_ATTRIBUTES, MEMORY_ATTRIBUTE_PRIVATE)?;
    Ok(vm)
}
