//! The launch: from a VM without a guest to one whose digest is known.
//!
//! ```text
//! Launch<New> ─start─▶ Launch<Started> ─import, as often as needed─▶ ─finish─▶ Launched
//! ```
//! What is done in the wrong order does not compile. Before an import does anything its whole list is validated; each page is
//! made private in KVM, launched and only then measured here, so that [`digest`](Launch::digest) always tells what the
//! firmware has. Rules of KVM's that are kept: a command may succeed in part, and goes on from where it is; whatever fails at
//! its first page is `EIO`; a CPUID page that the firmware has corrected is offered once more; finishing is not repeated, and
//! needs all vCPUs to be out of the guest.
//!
//! It makes no VM and no vCPU. Mirrors `snp_launch_start()`, `snp_launch_update()` and `snp_launch_finish()`
//! (`arch/x86/kvm/svm/sev.c`).

mod error;
mod policy;

use std::sync::Arc;

use cvm_memory::addr::{GfnRange, Gpa, PAGE_SIZE, merge_adjacent};
use cvm_memory::convert::{ConvertError, Outcome, Request, State};
use cvm_memory::hypervisor::Vcpu;
use cvm_memory::memory::CvmMemory;
use nix::errno::Errno;

use crate::commands::{
    CommandError, FirmwareStatus, IdBlock, Init, LaunchFinish, LaunchStart, LaunchUpdate, SnpCommands, Source,
};
use crate::cpuid::CpuidTable;
use crate::digest::{LaunchDigest, PageType};
use crate::import::{Import, ImportList};
use crate::page::Page;
use crate::vmsa::{SNP_ACTIVE, Vmsa};

pub use error::{FinishError, ImportError};
pub use policy::{InvalidPolicy, Policy};

/// Pages per command: progress can be reported that often.
const PAGES_PER_COMMAND: u64 = 512;
/// How often a command is tried that fails without the firmware: a signal that is pending looks the same as any other
/// failure, and is gone the next time.
const ATTEMPTS: u32 = 4;

/// State of a [`Launch`]: the VM is initialised for SNP; vCPUs may be created.
#[derive(Debug)]
pub struct New {
    /// `SEV_FEATURES` of every vCPU.
    features: u64,
}

/// State of a [`Launch`]: the firmware knows the guest.
#[derive(Debug)]
pub struct Started {
    features: u64,
    digest: LaunchDigest,
    launched: Vec<GfnRange>,
    corrected: Vec<Corrected>,
}

/// A CPUID page in which the firmware would not have what was to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corrected {
    /// Where it is.
    pub gpa: u64,
    /// What is in it now.
    pub table: CpuidTable,
}

/// How a launch starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StartOptions {
    /// The guest policy.
    pub policy: Policy,
    /// What the guest is told about workarounds of the host's.
    pub gosvw: [u8; 16],
}

/// How a launch ends.
#[derive(Debug, Clone, Default)]
pub struct FinishOptions {
    /// The digest that it must have; if it has not, it is not finished.
    pub expected: Option<LaunchDigest>,
    /// The ID block, if there is one.
    pub id_block: Option<IdBlock>,
    /// Whether attestation reports must not be signed with the chip's own key.
    pub vcek_disabled: bool,
    /// What the attestation report says of the host.
    pub host_data: [u8; 32],
}

/// How far an import has come. In pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Done.
    pub done: u64,
    /// Of so many.
    pub total: u64,
}

/// A launch. See the [module](self).
///
/// ```no_run
/// use cvm_memory::hypervisor::Hypervisor;
/// use cvm_memory::hypervisor::kvm::KvmVm;
/// use cvm_memory::memory::CvmMemory;
/// use cvm_memory_sev::commands::Init;
/// use cvm_memory_sev::cpuid::CpuidTable;
/// use cvm_memory_sev::firmware::Ovmf;
/// use cvm_memory_sev::kvm::{KvmSnp, set_registers};
/// use cvm_memory_sev::launch::{FinishOptions, Launch, StartOptions};
/// use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE};
/// use std::sync::Arc;
///
/// let kvm = kvm_ioctls::Kvm::new()?;
/// let vm = KvmVm::create(&kvm, cvm_memory_sev::SNP)?;
/// let launch = Launch::init(Arc::new(KvmSnp::open(vm.clone())?), &Init::default())?;
///
/// let cpuid = kvm.get_supported_cpuid(256)?;
/// let mut vcpu = vm.create_vcpu(0)?;
/// vcpu.fd().set_cpuid2(&cpuid)?;
/// let memory = CvmMemory::builder().ram(0, 1 << 30).ram(0xffc0_0000, 4 << 20).build(Arc::new(vm))?;
///
/// let image = std::fs::read("OVMF.fd")?;
/// let firmware = Ovmf::parse(&image)?;
/// let list = firmware.import_list(&CpuidTable::from_kvm(cpuid.as_slice())?, None)?;
/// let vmsas = firmware.vmsas(1, CpuSignature::of_cpu_type("EPYC-v4").ok_or("cpu")?, SNP_ACTIVE)?;
/// set_registers(&vcpu, &vmsas[0])?;
///
/// let mut launch = launch.start(&StartOptions::default()).map_err(|(_, error)| error)?;
/// launch.import(&memory, &list, &mut |progress| println!("{progress:?}"))?;
/// let launched = launch.finish(&mut [&mut vcpu], &vmsas, FinishOptions::default())?;
/// println!("{}", launched.digest);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Launch<S> {
    commands: Arc<dyn SnpCommands>,
    state: S,
}

/// A guest that is ready to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launched {
    /// What its attestation report shows as its measurement.
    pub digest: LaunchDigest,
    /// CPUID pages that are not as they were given.
    pub corrected: Vec<Corrected>,
}

impl Launch<New> {
    /// Initialises the VM for SNP. Before any vCPU is created.
    ///
    /// # Errors
    /// What KVM answered; the VM is as it was.
    pub fn init(commands: Arc<dyn SnpCommands>, init: &Init) -> Result<Self, CommandError> {
        commands.init(init)?;
        Ok(Self { commands, state: New { features: init.vmsa_features | SNP_ACTIVE } })
    }

    /// Makes the guest known to the firmware.
    ///
    /// # Errors
    /// What KVM answered, and the launch, which may be started again.
    pub fn start(self, options: &StartOptions) -> Result<Launch<Started>, (Self, CommandError)> {
        let StartOptions { policy, gosvw } = *options;
        match self.commands.launch_start(&LaunchStart { policy: policy.bits(), gosvw, flags: 0 }) {
            Ok(()) => {
                let New { features } = self.state;
                let (digest, launched, corrected) = (LaunchDigest::INITIAL, Vec::new(), Vec::new());
                let state = Started { features, digest, launched, corrected };
                Ok(Launch { commands: self.commands, state })
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Launch<Started> {
    /// The digest of what has been launched so far.
    pub const fn digest(&self) -> LaunchDigest {
        self.state.digest
    }

    /// The digest that finishing with these save areas will give.
    pub fn digest_with(&self, vmsas: &[Vmsa]) -> LaunchDigest {
        let mut digest = self.state.digest;
        vmsas.iter().for_each(|vmsa| digest.add_vmsa(vmsa.page()));
        digest
    }

    /// Launches the pages of `list` in its order: converts what has to be private, writes what is shared. `progress` hears of
    /// each command, and at the end.
    ///
    /// # Errors
    /// [`ImportError`]. If the list was refused, nothing has happened. Later, pages before the one that failed are launched,
    /// and [`digest`](Self::digest) is theirs: the launch can go on with the rest, or be given up with the VM.
    pub fn import(
        &mut self,
        memory: &CvmMemory,
        list: &ImportList,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), ImportError> {
        let slots: Vec<GfnRange> = memory.space().layout().table().slots().map(|slot| slot.gfns).collect();
        list.validate(&memory.private_memory(), &slots)?;
        for import in list {
            if let Some(gfns) = self.state.launched.iter().find_map(|done| done.intersection(&import.gfns())) {
                return Err(ImportError::Again { gfns });
            }
        }
        let total = list.pages();
        let mut done = 0_u64;
        for import in list {
            match import.page_type() {
                None => {
                    convert(memory, import.gfns(), State::Shared)?;
                    for (gfn, page) in import.gfns().into_iter().zip(import.pages()) {
                        let write = memory.write(Gpa::from(gfn), &**page);
                        write.map_err(|error| ImportError::Write { gpa: gfn.start_byte(), error })?;
                    }
                    done = done.saturating_add(import.gfns().pages());
                }
                Some(page_type) => {
                    convert(memory, import.gfns(), State::Private)?;
                    for piece in import.gfns().split_every(PAGES_PER_COMMAND) {
                        progress(Progress { done, total });
                        self.launch(import, page_type, piece)?;
                        done = done.saturating_add(piece.pages());
                    }
                }
            }
        }
        progress(Progress { done, total });
        Ok(())
    }

    /// Launches a piece of an import, in as many commands as it takes.
    fn launch(&mut self, import: &Import, page_type: PageType, piece: GfnRange) -> Result<(), ImportError> {
        let mut left = piece;
        let mut table = (page_type == PageType::Cpuid).then(|| Box::new(import.page(0).clone()));
        let mut attempts = ATTEMPTS;
        while !left.is_empty() {
            let mut update =
                LaunchUpdate { gfn_start: left.start().get(), len: left.bytes(), page_type: page_type.raw(), flags: 0 };
            let first = left.start().pages_from(import.gfns().start()).unwrap_or(0);
            let source = match (&mut table, page_type) {
                (Some(table), _) => Source::Correctable(table),
                (None, PageType::Zero) => Source::None,
                // The firmware fills the page; KVM wants to copy something nevertheless.
                (None, PageType::Secrets) => Source::Pages(const { std::slice::from_ref(&Page::ZERO) }),
                (None, _) => {
                    let pages = usize::try_from(first).ok().and_then(|first| import.pages().get(first..));
                    Source::Pages(pages.unwrap_or_default())
                }
            };
            match self.commands.launch_update(&mut update, source) {
                Ok(()) => {
                    let pages = left.bytes().saturating_sub(update.len) / PAGE_SIZE;
                    let (launched, rest) = match left.start().checked_add(pages).and_then(|at| left.split_at(at)) {
                        Some(split) if pages > 0 => split,
                        _ => return Err(ImportError::Stalled { gpa: left.start_byte() }),
                    };
                    for (nr, gfn) in (first..).zip(launched) {
                        self.state.digest.add(page_type, gfn, import.page(nr));
                    }
                    self.state.launched.push(launched);
                    (left, attempts) = (rest, ATTEMPTS);
                }
                Err(error) => {
                    attempts = attempts.saturating_sub(1);
                    let transient = error.firmware == FirmwareStatus::SUCCESS && attempts > 0;
                    let corrected = self.corrected(&error, piece, table.as_deref());
                    if error.errno != Errno::EIO || !(transient || corrected) {
                        return Err(ImportError::Command { gpa: left.start_byte(), page_type, error });
                    }
                }
            }
        }
        self.state.launched = merge_adjacent(std::mem::take(&mut self.state.launched));
        Ok(())
    }

    /// Whether the command failed because the firmware would have another CPUID table, which it has given, for the first time.
    fn corrected(&mut self, error: &CommandError, piece: GfnRange, table: Option<&Page>) -> bool {
        let gpa = piece.start_byte();
        match table {
            Some(table)
                if error.firmware == FirmwareStatus::INVALID_PARAM
                    && self.state.corrected.iter().all(|corrected| corrected.gpa != gpa) =>
            {
                let table = CpuidTable::from_page(table.clone());
                self.state.corrected.push(Corrected { gpa, table });
                true
            }
            _ => false,
        }
    }

    /// Measures the save areas of all vCPUs and makes the guest ready to run. `vcpus` are all there are, in the order of their
    /// creation: borrowing them shows that none is in the guest. `vmsas` are the save areas that KVM will make of them, with the
    /// features that the VM was [initialised](Launch::init) with.
    ///
    /// # Errors
    /// [`FinishError`]. If it is of KVM's, the VM cannot be used any more: KVM may have measured save areas, and does not do
    /// that twice.
    pub fn finish<V: Vcpu + ?Sized>(
        self,
        vcpus: &mut [&mut V],
        vmsas: &[Vmsa],
        options: FinishOptions,
    ) -> Result<Launched, FinishError> {
        if vcpus.len() != vmsas.len() {
            return Err(FinishError::Vcpus { vcpus: vcpus.len(), vmsas: vmsas.len() });
        }
        let vm = self.state.features;
        let other = vmsas.iter().map(Vmsa::features).enumerate().find(|(_, features)| *features != vm);
        if let Some((vcpu, features)) = other {
            return Err(FinishError::Features { vcpu, features, vm });
        }
        let digest = self.digest_with(vmsas);
        let FinishOptions { expected, id_block, vcek_disabled, host_data } = options;
        if let Some(expected) = expected.filter(|expected| *expected != digest) {
            return Err(FinishError::Digest { digest, expected });
        }
        self.commands.launch_finish(&LaunchFinish { id_block, vcek_disabled, host_data, flags: 0 })?;
        Ok(Launched { digest, corrected: self.state.corrected })
    }
}

/// Brings the frames into the state that a launch needs, KVM's attribute included.
fn convert(memory: &CvmMemory, gfns: GfnRange, to: State) -> Result<(), ImportError> {
    let settled = |outcome: Result<Outcome, ConvertError>| match outcome {
        Ok(Outcome::Unchanged | Outcome::Converted { .. }) => Ok(()),
        Ok(outcome) => Err(ImportError::NotConverted { gfns, to, outcome: Box::new(outcome) }),
        Err(error) => Err(ImportError::Convert { gfns, to, error }),
    };
    settled(memory.convert(&Request { range: gfns, to }))?;
    if to.is_private() { settled(memory.converter().materialise(gfns)) } else { Ok(()) }
}
