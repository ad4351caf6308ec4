//! Who runs the guest: KVM with private memory, or the software KVM.

use std::error::Error;
use std::sync::Arc;

use cvm_memory::addr::{GfnRange, PAGE_SIZE};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Cap, Capabilities, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, Platform};
use cvm_memory::memory::Builder;
use cvm_memory::soft::SoftVm;
use cvm_memory_sev::commands::{Init, LaunchFinish, LaunchStart, SnpCommands};
use cvm_memory_sev::launch::Policy;
use cvm_memory_sev::soft::SoftSnp;
use cvm_memory_tdx::mechanism::TdVm;
use cvm_memory_tdx::model::SoftTd;
use cvm_memory_testkit::{Guest, KvmGuest, SoftGuest};
use kvm_ioctls::Kvm;

use crate::Failure;
use crate::args::{Args, BackendChoice, PlatformChoice, SoftVmKind};
use crate::snp_guest::{GHCBS, SnpSoftGuest};
use crate::td::{self, TdGuest};

pub enum Backend {
    Soft(SoftVm),
    Td(SoftTd),
    Snp(Arc<SoftSnp>),
    Kvm(KvmVm),
}

impl Backend {
    /// Makes a VM of the kind asked for, and says which on stderr if that was left open.
    pub fn new(args: &Args) -> Result<Self, Failure> {
        match (args.platform, args.backend) {
            (Some(PlatformChoice::Snp), BackendChoice::Kvm) => {
                return Err("--platform snp: only --backend soft has guests of this platform".into());
            }
            (Some(PlatformChoice::Snp), _) => {
                let snp = SoftSnp::new();
                snp.init(&Init::default())?;
                return Ok(Self::Snp(Arc::new(snp)));
            }
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
            Self::Snp(_) => builder.plain_ram(GHCBS, vcpus * PAGE_SIZE),
            Self::Soft(_) | Self::Td(_) | Self::Kvm(_) => builder,
        }
    }

    /// Memory and vCPUs are there: what has to happen before the guest may run. The image is empty: the guest accepts all its
    /// memory by itself.
    pub fn launch(&self) -> Result<(), Failure> {
        match self {
            Self::Snp(snp) => {
                snp.launch_start(&LaunchStart { policy: Policy::default().bits(), ..LaunchStart::default() })?;
                snp.launch_finish(&LaunchFinish::default())?;
            }
            Self::Td(td) => td.finalize()?,
            Self::Soft(_) | Self::Kvm(_) => {}
        }
        Ok(())
    }

    pub const fn name(&self) -> &'static str {
        match self {
            Self::Soft(_) | Self::Td(_) => "soft",
            Self::Snp(_) => "soft, with a model of the RMP",
            Self::Kvm(_) => "kvm",
        }
    }

    pub fn vm(&self) -> Arc<dyn Hypervisor> {
        match self {
            Self::Soft(vm) => Arc::new(vm.clone()),
            Self::Td(td) => Arc::new(td.clone()),
            Self::Snp(snp) => Arc::new(snp.vm().clone()),
            Self::Kvm(vm) => Arc::new(vm.clone()),
        }
    }

    /// vCPU number `id`. On KVM its code lives in a slot of its own, of the highest ids, below 4 GiB.
    pub fn guest(&self, id: u64) -> Box<dyn Guest> {
        match self {
            Self::Soft(vm) => Box::new(SoftGuest::new(vm)),
            Self::Td(td) => Box::new(TdGuest::new(td)),
            Self::Snp(snp) => Box::new(SnpSoftGuest::new(snp, id)),
            Self::Kvm(vm) => Box::new(KvmGuest::new(vm, id)),
        }
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
            Self::Snp(snp) => Some(snp.vm().private_gfns()),
            Self::Kvm(_) => None,
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

/// An error with all its causes, on one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
