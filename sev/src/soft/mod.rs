//! SNP on the software KVM: a machine with an RMP and a firmware, and VMs that KVM's SNP code would run.
//!
//! [`SoftSnp`] is such a VM: its [`vm`](SoftSnp::vm) is a [`SoftVm`] with this platform's hooks, and it takes the launch's
//! commands as KVM does ([`SnpCommands`](crate::commands::SnpCommands)). vCPUs execute the guest's own instructions too ([`pvalidate`], [`rmpadjust`],
//! [`vmgexit`]); [`SnpGuest`] does with them what Linux does.
//!
//! What is not modelled: encryption (contents survive everything but a hole; a shared read of a page that is assigned finds one
//! byte over and over), VMPLs other than 0, faults of the host on the RMP,
//! entries of 2 MiB (Linux 7.3 makes none), live migration, guest requests. The GHCB page is read through the guest's shared
//! mapping, where KVM reads it by the slot's address.
//!
//! # Locks
//! A guest's, then the machine's; both below every lock of the software KVM.

mod arch;
mod commands;
mod firmware;
mod guest;
mod instructions;
mod machine;
mod state;
mod vmgexit;

use std::sync::Arc;

use cvm_memory::addr::{Gfn, GfnRange};
use cvm_memory::soft::SoftVm;

use crate::digest::LaunchDigest;
use crate::rmp::{Entry, PageState};
use crate::vmsa::Vmsa;

use state::SnpArch;

pub use guest::{ExitCounts, GuestFailed, SnpGuest};
pub use instructions::{pvalidate, rmpadjust, validated, vmgexit};
pub use machine::Machine;

/// A VM of type SNP on the software KVM.
///
/// ```
/// use cvm_memory::memory::CvmMemory;
/// use cvm_memory_sev::commands::Init;
/// use cvm_memory_sev::import::{Import, ImportList};
/// use cvm_memory_sev::launch::{FinishOptions, Launch, StartOptions};
/// use cvm_memory_sev::soft::{SnpGuest, SoftSnp};
/// use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE, Vmsa};
/// use std::sync::Arc;
///
/// let snp = Arc::new(SoftSnp::new());
/// let launch = Launch::init(snp.clone(), &Init::default())?;
/// let memory = Arc::new(CvmMemory::builder().ram(0, 16 << 20).build(Arc::new(snp.vm().clone()))?);
/// let mut guest = SnpGuest::new(&snp, &memory);
///
/// let mut image = ImportList::new();
/// image.push(Import::normal(0x1000, &[0x90; 4096])?);
/// let mut launch = launch.start(&StartOptions::default()).map_err(|(_, error)| error)?;
/// launch.import(&memory, &image, &mut |_| {})?;
/// let vmsas = Vmsa::of_all(1, 0, CpuSignature::new(25, 1, 1), SNP_ACTIVE);
/// snp.set_registers(0, &vmsas[0]);
/// let launched = launch.finish(&mut [guest.vcpu()], &vmsas, FinishOptions::default())?;
/// assert_eq!(snp.firmware_digest(), Some(launched.digest));
///
/// // The guest accepts a page before it uses it.
/// guest.accept(0x20_0000, 1)?;
/// guest.write(0x20_0000, b"secret")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SoftSnp {
    vm: SoftVm,
    arch: Arc<SnpArch>,
}

impl SoftSnp {
    /// `KVM_CREATE_VM`, on a machine of its own.
    pub fn new() -> Self {
        Self::on(&Machine::new())
    }

    /// `KVM_CREATE_VM` on a machine that may have other guests.
    pub fn on(machine: &Arc<Machine>) -> Self {
        let arch = Arc::new(SnpArch::new(Arc::clone(machine)));
        Self { vm: SoftVm::with_arch(Arc::clone(&arch) as _), arch }
    }

    /// The VM.
    pub const fn vm(&self) -> &SoftVm {
        &self.vm
    }

    /// The machine.
    pub fn machine(&self) -> &Arc<Machine> {
        self.arch.machine()
    }

    /// Gives vCPU number `vcpu` the registers from which KVM makes `vmsa` when the launch is finished.
    pub fn set_registers(&self, vcpu: u32, vmsa: &Vmsa) {
        self.arch.guest().registers.insert(vcpu, vmsa.page().clone());
    }

    /// The guest's ASID, once it is initialised.
    pub fn asid(&self) -> Option<u32> {
        self.arch.guest().asid
    }

    /// The digest that the firmware has, once the launch has started.
    pub fn firmware_digest(&self) -> Option<LaunchDigest> {
        self.arch.guest().context.as_ref().map(|context| context.digest)
    }

    /// The RMP entry of the guest's frame.
    pub fn rmp_entry(&self, gfn: Gfn) -> Option<Entry> {
        let asid = self.asid()?;
        self.machine()
            .rmp(|rmp| rmp.iter().map(|(_, entry)| *entry).find(|entry| entry.asid == asid && entry.gfn == gfn))
    }

    /// What the RMP says of the guest's frames, ascending, in runs; without those that are not assigned.
    pub fn rmp_by_gfn(&self) -> Vec<(GfnRange, PageState)> {
        let Some(asid) = self.asid() else { return Vec::new() };
        let mut pages: Vec<(Gfn, PageState)> = self.machine().rmp(|rmp| {
            let own = rmp.iter().filter(|(_, entry)| entry.asid == asid);
            own.map(|(_, entry)| (entry.gfn, entry.state())).collect()
        });
        pages.sort_by_key(|(gfn, _)| *gfn);
        let mut runs: Vec<(GfnRange, PageState)> = Vec::new();
        for (gfn, state) in pages {
            match runs.last_mut() {
                Some((run, same)) if run.end() == gfn && *same == state => *run = run.hull(&GfnRange::page(gfn)),
                _ => runs.push((GfnRange::page(gfn), state)),
            }
        }
        runs
    }
}

impl Default for SoftSnp {
    fn default() -> Self {
        Self::new()
    }
}
