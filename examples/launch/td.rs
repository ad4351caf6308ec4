//! A TD from a firmware image with TDVF metadata.

use std::fs;
use std::ops::ControlFlow;
use std::sync::Arc;

use cvm_memory::addr::{GfnRange, Gpa};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Cap, Exit, Hypervisor, Vcpu};
use cvm_memory::memory::CvmMemory;
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_tdx::hob::{memory_list, td_hob};
use cvm_memory_tdx::import::ImportList;
use cvm_memory_tdx::launch::{Added, Launched, Progress, Start};
use cvm_memory_tdx::mechanism::{InitVm, PLATFORM, TdVcpu, TdVm};
use cvm_memory_tdx::model::SoftTd;
use cvm_memory_tdx::mrtd::Order;
use cvm_memory_tdx::tdvf::{Attributes, Tdvf};
use cvm_memory_tdx::width::Width;
use indicatif::ProgressBar;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;

use crate::{Args, Backend, Failure};

/// Where firmware ends.
const TOP: u64 = 1 << 32;
/// Where x86 processors start.
const RESET_VECTOR: u64 = TOP - 16;
/// `KVM_CAP_SPLIT_IRQCHIP`, without which a TD has no vCPUs; and its pins.
const SPLIT_IRQCHIP: (Cap, u64) = (Cap(121), 24);

pub fn launch(args: &Args) -> Result<(), Failure> {
    let image = fs::read(&args.firmware)?;
    let tdvf = Tdvf::parse(&image)?;
    println!("{:<9} {:<27} {:>9}  measured", "section", "gfns", "in file");
    for section in tdvf.sections() {
        let kind = format!("{:?}", section.kind);
        let measured = if section.attributes.contains(Attributes::MEASURED) { "yes" } else { "addresses only" };
        println!("{kind:<9} {:<27} {:>9x}  {measured}", section.gfns.to_string(), section.data.len());
    }
    match args.backend {
        Backend::Kvm => {
            let kvm = Kvm::new()?;
            let vm = KvmVm::create(&kvm, PLATFORM)?;
            vm.enable_cap(SPLIT_IRQCHIP.0, [SPLIT_IRQCHIP.1, 0, 0, 0])?;
            let offered = Start::new(vm.clone()).capabilities()?;
            let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
            let init = InitVm::configured(Width::Bits48, &offered, supported.as_slice());
            build(args, &tdvf, &init, &vm, |id| Ok(vm.create_vcpu(id)?))?;
        }
        Backend::Soft => {
            let td = SoftTd::new();
            let (launched, _memory) = build(args, &tdvf, &InitVm::new(Width::Bits48), &td, |_| Ok(td.create_vcpu()?))?;
            let by_module = td.arch().mrtd();
            if by_module != launched.mrtd {
                return Err(format!("the model of the tdx module has measured {by_module}").into());
            }
            // The model executes no code, but lets the guest look at it: what it finds it has not had to accept.
            let mut vcpu = launched.vcpus.into_iter().next().ok_or("no vCPU")?;
            vcpu.start(GuestOp::Read { gpa: RESET_VECTOR, len: 16, private: true });
            if !matches!(vcpu.run()?, Exit::Halt) {
                return Err("the reset vector cannot be read".into());
            }
            if let Some(OpResult::Read(bytes)) = vcpu.take_result() {
                println!("reset vector, as the guest finds it: {bytes:02x?}");
            }
        }
    }
    Ok(())
}

/// From a new VM to one that can run.
fn build<V: TdVm + Clone + 'static, C: TdVcpu>(
    args: &Args,
    tdvf: &Tdvf<'_>,
    init: &InitVm,
    td: &V,
    create_vcpu: impl Fn(u64) -> Result<C, Failure>,
) -> Result<(Launched<V, C>, CvmMemory), Failure> {
    let ram = GfnRange::from_bytes(0, args.memory << 20)?;
    let bottom = tdvf.sections().iter().map(|section| section.gfns.start_byte()).filter(|gpa| *gpa >= ram.end_byte());
    let bottom = bottom.min().ok_or("the firmware is not where firmware is")?;

    let mut vcpus = Start::new(td.clone()).init(init)?;
    let hob_at = tdvf.td_hob().map_or(Gpa(0), |section| section.gfns.start().into());
    for id in 0..args.vcpus.into() {
        vcpus.add(create_vcpu(id)?, hob_at.get())?;
    }
    let builder = CvmMemory::builder().ram(0, ram.bytes()).ram(bottom, TOP - bottom);
    let memory = builder.build(Arc::new(td.clone()))?;

    // Firmware without a place for the list of memory finds out in other ways.
    let list = td_hob(hob_at, &memory_list(&[ram], &tdvf.added_memory())?)?;
    let list = if tdvf.td_hob().is_some() { list } else { Vec::new() };
    let imports = ImportList::new(tdvf.imports(&list)?, vcpus.width())?;
    let expected = imports.mrtd(Order::SinglePass);
    println!("{} pages, {} KiB", imports.pages(), imports.bytes() >> 10);

    let bar = ProgressBar::new(imports.pages());
    let mut progress = |progress: Progress| {
        bar.set_position(progress.done);
        ControlFlow::Continue(())
    };
    let Added::Complete(complete) = vcpus.image(imports, &memory)?.add_with(&mut progress)? else {
        return Err("stopped".into());
    };
    bar.finish_and_clear();
    let launched = complete.finalize()?;
    println!("MRTD {}", launched.mrtd);
    if launched.mrtd != expected {
        return Err(format!("the list alone would have been {expected}").into());
    }
    Ok((launched, memory))
}
