//! A TD on the real KVM: what can be checked of it without running a guest. Needs a TDX machine; it has not run on one yet.
//!
//! ```text
//! CVM_REQUIRE_KVM=1 cargo test -p cvm-memory-tdx --test hardware -- --nocapture
//! ```

use std::sync::Arc;

use cvm_memory::addr::GfnRange;
use cvm_memory::hypervisor::{Cap, Hypervisor, PreFaultMemory, Vcpu};
use cvm_memory::memory::CvmMemory;
use cvm_memory_tdx::import::{Import, ImportList};
use cvm_memory_tdx::launch::Start;
use cvm_memory_tdx::mechanism::{InitVm, PLATFORM, TdVcpu};
use cvm_memory_tdx::mrtd::Order;
use cvm_memory_tdx::uapi::InitMemRegion;
use cvm_memory_tdx::width::Width;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use nix::errno::Errno;

/// `KVM_CAP_SPLIT_IRQCHIP`, without which a TD has no vCPUs.
const SPLIT_IRQCHIP: Cap = Cap(121);

#[test]
fn a_td_is_built_finalised_and_prefaulted() {
    let Some(vm) = cvm_memory_testkit::kvm(PLATFORM) else { return };
    vm.enable_cap(SPLIT_IRQCHIP, [24, 0, 0, 0]).unwrap();
    let start = Start::new(vm.clone());
    let offered = start.capabilities().unwrap();
    println!("{offered:x?}");
    let supported = kvm_ioctls::Kvm::new().unwrap().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let mut vcpus = start.init(&InitVm::configured(Width::Bits48, &offered, supported.as_slice())).unwrap();
    vcpus.add(vm.create_vcpu(0).unwrap(), 0).unwrap();
    let memory = CvmMemory::builder().ram(0, 64 << 20).build(Arc::new(vm)).unwrap();

    // More than one call takes, measured and not.
    let import = |gpa: u64, pages: u64, measured| {
        let gfns = GfnRange::from_bytes(gpa, pages * 0x1000).unwrap();
        Import { gfns, measured, contents: vec![0xf4; usize::try_from(pages).unwrap() * 0x1000] }
    };
    let list = ImportList::new(vec![import(0, 700, true), import(32 << 20, 3, false)], Width::Bits48).unwrap();
    let expected = list.mrtd(Order::SinglePass);
    let launched = vcpus.image(list, &memory).unwrap().add_all().unwrap().finalize().unwrap();
    assert_eq!(launched.mrtd, expected);

    let mut vcpu = launched.vcpus.into_iter().next().unwrap();
    // Too late for another page, early enough to map some.
    let mut region = InitMemRegion { source_addr: 0x1000, gpa: 48 << 20, nr_pages: 1 };
    assert_eq!(vcpu.init_mem_region(&mut region, true).unwrap_err().errno, Errno::EINVAL);
    let gfns = GfnRange::from_bytes(16 << 20, 2 << 20).unwrap();
    memory.converter().materialise(gfns).unwrap().converted().unwrap();
    let mut range = PreFaultMemory { gpa: gfns.start_byte(), size: gfns.bytes(), flags: 0 };
    while range.size != 0 {
        vcpu.pre_fault_memory(&mut range).unwrap();
    }
}
