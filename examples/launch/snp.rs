//! The launch of an SEV-SNP guest.

use std::sync::Arc;

use cvm_memory::addr::{GfnRange, merge_adjacent, subtract_lists};
use cvm_memory::hypervisor::Vcpu;
use cvm_memory::hypervisor::kvm::{KvmVcpu, KvmVm};
use cvm_memory::memory::CvmMemory;
use cvm_memory_sev::SNP;
use cvm_memory_sev::commands::{Init, SnpCommands};
use cvm_memory_sev::cpuid::CpuidTable;
use cvm_memory_sev::digest::{LaunchDigest, PageType};
use cvm_memory_sev::firmware::{KernelHashes, Ovmf};
use cvm_memory_sev::igvm::{IgvmImage, Parameters};
use cvm_memory_sev::import::ImportList;
use cvm_memory_sev::kvm::{KvmSnp, set_registers};
use cvm_memory_sev::launch::{FinishOptions, Launch, New, Policy, StartOptions};
use cvm_memory_sev::soft::SoftSnp;
use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE, Vmsa};
use cvm_memory_testkit::chain;
use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;

use crate::args::{Args, BackendChoice};
use crate::{Failure, Report, progress};

/// What the image says is to be launched.
struct Image {
    list: ImportList,
    vmsas: Vec<Vmsa>,
    policy: Policy,
    /// With the ID block, if the image has one.
    finish: FinishOptions,
}

pub fn run(args: &Args) -> Result<Report, Failure> {
    let backend = Backend::new(args)?;
    let mut notes = Vec::new();
    let mut image = image(args, &backend.cpuid()?)?;
    let predicted = image.list.digest(&image.vmsas);
    if let Some(machine_checks) = backend.machine_checks() {
        let made = image.vmsas.iter().map(|vmsa| vmsa.clone().on_host(machine_checks)).collect();
        if made != image.vmsas {
            notes.push(
                "this host's KVM makes other save areas than were assumed: CR4.MCE is the host's, and some bits are fixed".to_owned(),
            );
            image.vmsas = made;
        }
    }
    let memory_size = args.memory << 20;
    let (launched, memory) = backend.launch(args, &image, memory_size)?;
    if !matches!(backend, Backend::Kvm { .. }) {
        notes.push("no hardware and no KVM was involved: the firmware is a model".to_owned());
    }
    let types = (0..=u8::MAX).filter_map(PageType::from_raw).filter(|page_type| *page_type != PageType::Vmsa);
    let counted = types.map(|page_type| (page_type.to_string(), image.list.count(Some(page_type))));
    let mut pages: Vec<(String, u64)> = counted.collect();
    pages.push(("vmsa".to_owned(), image.vmsas.len() as u64));
    pages.push(("shared".to_owned(), image.list.count(None)));
    pages.retain(|(_, count)| *count > 0);
    Ok(Report {
        platform: "snp",
        firmware: args.firmware.display().to_string(),
        backend: backend.name(),
        pages,
        vcpus: u32::try_from(image.vmsas.len())?,
        predicted_digest: predicted.to_string(),
        launched_digest: launched.to_string(),
        notes,
        map: memory.map().to_string(),
    })
}

/// Reads what is to be launched.
fn image(args: &Args, cpuid: &CpuidTable) -> Result<Image, Failure> {
    let read =
        |path: &std::path::Path| std::fs::read(path).map_err(|error| format!("read {}: {error}", path.display()));
    let bytes = read(&args.firmware)?;
    if args.igvm {
        let memory = [GfnRange::from_bytes(0, args.memory << 20)?];
        let parameters =
            Parameters { vcpus: args.vcpus, memory: &memory, cpuid: cpuid.clone(), ..Parameters::default() };
        let image = IgvmImage::parse(&bytes, &parameters)?;
        let policy = image.policy().map_or(Ok(Policy::default()), Policy::new)?;
        return Ok(Image {
            list: image.import_list().clone(),
            vmsas: image.vmsas().to_vec(),
            policy,
            finish: image.finish_options(),
        });
    }
    let cpu = CpuSignature::of_cpu_type(&args.cpu).ok_or_else(|| {
        let known: Vec<&str> = CpuSignature::cpu_types().collect();
        format!("--cpu: `{}` is none of {}", args.cpu, known.join(", "))
    })?;
    let hashes = match &args.kernel {
        Some(kernel) => {
            let initrd = args.initrd.as_deref().map(read).transpose()?.unwrap_or_default();
            Some(KernelHashes::new(&read(kernel)?, &initrd, &args.append))
        }
        None => None,
    };
    let ovmf = Ovmf::parse(&bytes)?;
    let list = ovmf.import_list(cpuid, hashes.as_ref())?;
    let vmsas = ovmf.vmsas(args.vcpus, cpu, args.guest_features)?;
    Ok(Image { list, vmsas, policy: Policy::default(), finish: FinishOptions::default() })
}

/// Who launches.
enum Backend {
    Soft,
    Kvm { kvm: Kvm, vm: KvmVm, commands: Arc<KvmSnp> },
}

impl Backend {
    fn new(args: &Args) -> Result<Self, Failure> {
        match args.backend {
            BackendChoice::Soft => Ok(Self::Soft),
            BackendChoice::Kvm => Self::kvm(),
            BackendChoice::Auto => Ok(Self::kvm().unwrap_or_else(|reason| {
                eprintln!("backend: soft, because kvm has no SNP here: {}", chain(reason.as_ref()));
                Self::Soft
            })),
        }
    }

    fn kvm() -> Result<Self, Failure> {
        let kvm = Kvm::new().map_err(|error| format!("open /dev/kvm: {error}"))?;
        let vm = KvmVm::create(&kvm, SNP)?;
        let firmware = KvmSnp::open(vm.clone()).map_err(|error| format!("open /dev/sev: {error}"))?;
        Ok(Self::Kvm { kvm, vm, commands: Arc::new(firmware) })
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Soft => "the software KVM",
            Self::Kvm { .. } => "kvm",
        }
    }

    fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, Failure> {
        Ok(kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(|error| format!("cpuid: {error}"))?)
    }

    /// What the guest is told about its processor: nothing where there is none.
    fn cpuid(&self) -> Result<CpuidTable, Failure> {
        match self {
            Self::Soft => Ok(CpuidTable::default()),
            Self::Kvm { kvm, .. } => {
                let supported = Self::supported_cpuid(kvm)?;
                // What the hypervisor says of itself is not in the firmware's table.
                let of_processor = |function: u32| !(0x4000_0000..0x5000_0000).contains(&function);
                let entries: Vec<_> =
                    supported.as_slice().iter().filter(|entry| of_processor(entry.function)).copied().collect();
                Ok(CpuidTable::from_kvm(&entries)?)
            }
        }
    }

    /// Whether the host runs with machine checks, if it makes the save areas.
    fn machine_checks(&self) -> Option<bool> {
        let there = || std::path::Path::new("/sys/devices/system/machinecheck").exists();
        matches!(self, Self::Kvm { .. }).then(there)
    }

    fn launch(&self, args: &Args, image: &Image, size: u64) -> Result<(LaunchDigest, CvmMemory), Failure> {
        let vmsas = &image.vmsas;
        // An image that brings its save areas says there which features the guest has, and no option does.
        let features = vmsas.first().map_or(args.guest_features, Vmsa::features);
        let init = Init { vmsa_features: features & !SNP_ACTIVE, ..Init::default() };
        match self {
            Self::Soft => {
                let snp = Arc::new(SoftSnp::new());
                let launch = Launch::init(Arc::clone(&snp) as Arc<dyn SnpCommands>, &init)?;
                let memory = memory(image, size)?.build(Arc::new(snp.vm().clone()))?;
                let mut vcpus: Vec<_> = vmsas.iter().map(|_| snp.vm().create_vcpu()).collect();
                for (vcpu, vmsa) in (0..).zip(vmsas) {
                    snp.set_registers(vcpu, vmsa);
                }
                let digest = carry_out(args, launch, &memory, image, &mut vcpus)?;
                if snp.firmware_digest() != Some(digest) {
                    return Err("the model's firmware has another digest".into());
                }
                Ok((digest, memory))
            }
            Self::Kvm { kvm, vm, commands } => {
                let launch = Launch::init(Arc::clone(commands) as Arc<dyn SnpCommands>, &init)?;
                let memory = memory(image, size)?.build(Arc::new(vm.clone()))?;
                let cpuid = Self::supported_cpuid(kvm)?;
                let mut vcpus: Vec<KvmVcpu> = Vec::new();
                for (id, vmsa) in (0..).zip(vmsas) {
                    let vcpu = vm.create_vcpu(id)?;
                    vcpu.fd().set_cpuid2(&cpuid).map_err(|error| format!("KVM_SET_CPUID2: {error}"))?;
                    set_registers(&vcpu, vmsa).map_err(|errno| format!("set registers of vCPU {id}: {errno}"))?;
                    vcpus.push(vcpu);
                }
                let digest = carry_out(args, launch, &memory, image, &mut vcpus)?;
                Ok((digest, memory))
            }
        }
    }
}

/// Memory from zero, and wherever else the image has pages.
fn memory(image: &Image, size: u64) -> Result<cvm_memory::memory::Builder, Failure> {
    let low = GfnRange::from_bytes(0, size)?;
    let mut imports: Vec<GfnRange> = image.list.iter().map(|import| import.gfns()).collect();
    imports.sort_by_key(GfnRange::start);
    let elsewhere = subtract_lists(&merge_adjacent(imports), &[low]);
    Ok(elsewhere
        .iter()
        .fold(CvmMemory::builder().ram(0, size), |builder, gfns| builder.ram(gfns.start_byte(), gfns.bytes())))
}

fn carry_out<V: Vcpu>(
    args: &Args,
    launch: Launch<New>,
    memory: &CvmMemory,
    image: &Image,
    vcpus: &mut [V],
) -> Result<LaunchDigest, Failure> {
    let bar = progress(args);
    bar.set_message("launching");
    let options = StartOptions { policy: image.policy, ..StartOptions::default() };
    let mut launch = launch.start(&options).map_err(|(_, error)| error)?;
    launch.import(memory, &image.list, &mut |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    })?;
    bar.finish_and_clear();
    let mut vcpus: Vec<&mut V> = vcpus.iter_mut().collect();
    let launched = launch.finish(&mut vcpus, &image.vmsas, image.finish.clone())?;
    for corrected in &launched.corrected {
        eprintln!("the firmware has corrected the CPUID page at {:#x}", corrected.gpa);
    }
    Ok(launched.digest)
}
