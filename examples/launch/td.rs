//! The launch of a TD.

use std::ops::ControlFlow;
use std::sync::Arc;

use cvm_memory::addr::{GfnRange, Gpa};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Cap, Hypervisor};
use cvm_memory::memory::CvmMemory;
use cvm_memory_tdx::hob::{memory_list, td_hob};
use cvm_memory_tdx::import::ImportList;
use cvm_memory_tdx::launch::{Added, Progress, Start};
use cvm_memory_tdx::mechanism::{InitVm, PLATFORM, TdVcpu, TdVm};
use cvm_memory_tdx::model::SoftTd;
use cvm_memory_tdx::mrtd::{Measurement, Order};
use cvm_memory_tdx::tdvf::{Attributes, Tdvf};
use cvm_memory_tdx::width::Width;
use cvm_memory_testkit::chain;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;

use crate::args::{Args, BackendChoice};
use crate::{Failure, Report, progress};

/// Where firmware ends.
const TOP: u64 = 1 << 32;
const WIDTH: Width = Width::Bits48;
/// `KVM_CAP_SPLIT_IRQCHIP`, without which a TD has no vCPUs; and its pins.
const SPLIT_IRQCHIP: (Cap, u64) = (Cap(121), 24);

/// What the image says is to be launched.
struct Image {
    list: ImportList,
    /// Where the guest finds the list of its memory.
    hob_at: Gpa,
    ram: Vec<GfnRange>,
}

pub fn run(args: &Args) -> Result<Report, Failure> {
    let bytes = std::fs::read(&args.firmware).map_err(|error| format!("read {}: {error}", args.firmware.display()))?;
    let tdvf = Tdvf::parse(&bytes)?;
    let image = image(args, &tdvf)?;
    let predicted = image.list.mrtd(Order::SinglePass);
    let pages = tdvf.sections().iter().map(|section| {
        let measured = if section.attributes.contains(Attributes::MEASURED) { ", measured" } else { "" };
        (format!("{:?} at gfns {}{measured}", section.kind, section.gfns), section.gfns.pages())
    });
    let pages = pages.collect();
    let mut notes = Vec::new();
    let (backend, (launched, memory)) = match kvm(args)? {
        Some((kvm, vm)) => {
            vm.enable_cap(SPLIT_IRQCHIP.0, [SPLIT_IRQCHIP.1, 0, 0, 0])?;
            let offered = Start::new(vm.clone()).capabilities()?;
            let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
            let init = InitVm::configured(WIDTH, &offered, supported.as_slice());
            notes.push("the host is not told what was measured: this is what KVM says to have added".to_owned());
            ("kvm", build(args, image, &init, &vm, |id| Ok(vm.create_vcpu(id)?))?)
        }
        None => {
            let td = SoftTd::new();
            let (_, memory) = build(args, image, &InitVm::new(WIDTH), &td, |_| Ok(td.create_vcpu()?))?;
            notes.push("no hardware and no KVM was involved: the TDX module is a model".to_owned());
            ("the software KVM", (td.arch().mrtd(), memory))
        }
    };
    Ok(Report {
        platform: "tdx",
        firmware: args.firmware.display().to_string(),
        backend,
        pages,
        vcpus: args.vcpus,
        predicted_digest: predicted.to_string(),
        launched_digest: launched.to_string(),
        notes,
        map: memory.map().to_string(),
    })
}

/// What is to be launched, list of memory included.
fn image(args: &Args, tdvf: &Tdvf<'_>) -> Result<Image, Failure> {
    let low = GfnRange::from_bytes(0, args.memory << 20)?;
    let flash = tdvf.sections().iter().map(|section| section.gfns.start_byte()).filter(|gpa| *gpa >= low.end_byte());
    let flash = flash.min().ok_or("the firmware is not where firmware is")?;
    let ram = vec![low, GfnRange::from_bytes(flash, TOP - flash)?];
    let hob_at = tdvf.td_hob().map(|section| Gpa::from(section.gfns.start()));
    let hob = match hob_at {
        Some(base) => td_hob(base, &memory_list(&[low], &tdvf.added_memory())?)?,
        // Such firmware finds out about memory in other ways.
        None => Vec::new(),
    };
    Ok(Image { list: ImportList::new(tdvf.imports(&hob)?, WIDTH)?, hob_at: hob_at.unwrap_or_default(), ram })
}

/// A TD of the real KVM, if that was asked for or is to be had.
fn kvm(args: &Args) -> Result<Option<(Kvm, KvmVm)>, Failure> {
    let real = || -> Result<(Kvm, KvmVm), Failure> {
        let kvm = Kvm::new().map_err(|error| format!("open /dev/kvm: {error}"))?;
        let vm = KvmVm::create(&kvm, PLATFORM)?;
        Ok((kvm, vm))
    };
    match args.backend {
        BackendChoice::Soft => Ok(None),
        BackendChoice::Kvm => real().map(Some),
        BackendChoice::Auto => Ok(real()
            .inspect_err(|reason| eprintln!("backend: soft, because kvm has no TDX here: {}", chain(reason.as_ref())))
            .ok()),
    }
}

/// From a new VM to one that can run.
fn build<V: TdVm + Clone + 'static, C: TdVcpu>(
    args: &Args,
    image: Image,
    init: &InitVm,
    td: &V,
    create_vcpu: impl Fn(u64) -> Result<C, Failure>,
) -> Result<(Measurement, CvmMemory), Failure> {
    let mut vcpus = Start::new(td.clone()).init(init)?;
    for id in 0..args.vcpus.into() {
        vcpus.add(create_vcpu(id)?, image.hob_at.get())?;
    }
    let builder = CvmMemory::builder();
    let builder = image.ram.iter().fold(builder, |builder, gfns| builder.ram(gfns.start_byte(), gfns.bytes()));
    let memory = builder.build(Arc::new(td.clone()))?;

    let bar = progress(args);
    bar.set_length(image.list.pages());
    bar.set_message("adding pages");
    let mut watch = |progress: Progress| {
        bar.set_position(progress.done);
        ControlFlow::Continue(())
    };
    let Added::Complete(complete) = vcpus.image(image.list, &memory)?.add_with(&mut watch)? else {
        return Err("stopped".into());
    };
    bar.finish_and_clear();
    Ok((complete.finalize()?.mrtd, memory))
}
