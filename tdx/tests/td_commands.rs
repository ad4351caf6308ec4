//! The commands on the model, in every wrong state and with every wrong argument: one errno each, and nothing done.

mod td_kit;

use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Hypervisor, PreFaultMemory, Vcpu};
use cvm_memory_tdx::mechanism::{Capabilities, Failure, InitVm, TdVcpu, TdVm};
use cvm_memory_tdx::model::sept::SeptState;
use cvm_memory_tdx::model::{Machine, SoftTd, SoftTdVcpu};
use cvm_memory_tdx::uapi::InitMemRegion;
use cvm_memory_tdx::width::Width;
use kvm_bindings::kvm_cpuid_entry2;
use nix::errno::Errno;
use td_kit::*;

fn init() -> InitVm {
    InitVm::new(Width::Bits48)
}

fn errno(result: Result<(), Failure>) -> Result<(), Errno> {
    result.map_err(|failure| failure.errno)
}

#[test]
fn initialising_a_td() {
    let refused = |init: &InitVm| errno(SoftTd::new().init_vm(init)).unwrap_err();
    let many = InitVm { cpuid: vec![init().cpuid[0]; 257], ..init() };
    assert_eq!(refused(&many), Errno::E2BIG);
    for attributes in (0..64).map(|bit| 1_u64 << bit).filter(|bit| *bit != 1 << 28) {
        assert_eq!(refused(&InitVm { attributes, ..init() }), Errno::EINVAL, "{attributes:#x}");
    }
    assert_eq!(refused(&InitVm { xfam: 8, ..init() }), Errno::EINVAL);
    assert_eq!(refused(&InitVm { cpuid: vec![], ..init() }), Errno::EINVAL);
    for bits in (0..=255).filter(|bits| ![48, 52].contains(bits)) {
        let mut odd = init();
        odd.cpuid[0].eax = bits << 16 | 52;
        assert_eq!(refused(&odd), Errno::EINVAL, "{bits}");
    }
    let four_levels = Machine { five_level_ept: false, ..Machine::default() };
    assert_eq!(errno(SoftTd::on(four_levels).init_vm(&InitVm::new(Width::Bits52))), Err(Errno::EINVAL));
    assert_eq!(errno(SoftTd::on(four_levels).init_vm(&init())), Ok(()));

    let td = SoftTd::new();
    assert_eq!(td.create_vcpu().map(drop), Err(Errno::EIO));
    assert_eq!(errno(td.finalize()), Err(Errno::EINVAL));
    assert_eq!(errno(td.init_vm(&init())), Ok(()));
    assert_eq!(errno(td.init_vm(&init())), Err(Errno::EINVAL));
    td.create_vcpu().unwrap();
    assert_eq!(errno(td.init_vm(&init())), Err(Errno::EBUSY));
}

/// What is configured is what both sides have, function by function; the width is the caller's.
#[test]
fn what_can_be_configured() {
    let entry = |function, index, eax, edx| kvm_cpuid_entry2 { function, index, eax, edx, ..Default::default() };
    let masks = vec![
        entry(1, 0, 0xff00, 0xf),
        entry(7, 1, u32::MAX, 1),
        entry(0x8000_0008, 0, 0xff_0000, 0),
        entry(9, 0, 1, 1),
    ];
    let offered = Capabilities { attributes: 1 << 28, xfam: 0x602e7, cpuid: masks };
    let supported =
        [entry(1, 0, 0x1234_5678, 0xa5), entry(7, 0, 3, 3), entry(7, 1, 5, 6), entry(0x8000_0008, 0, 57, 0)];
    let configured = InitVm::configured(Width::Bits52, &offered, &supported);
    let expected = InitVm {
        xfam: 3,
        cpuid: vec![entry(0x8000_0008, 0, 52 << 16, 0), entry(1, 0, 0x5600, 5), entry(7, 1, 5, 0)],
        ..InitVm::new(Width::Bits52)
    };
    assert_eq!(configured, expected);
}

#[test]
fn a_vcpu_has_to_be_ready() {
    let td = SoftTd::new();
    td.init_vm(&init()).unwrap();
    let (mut ready, mut not) = (td.create_vcpu().unwrap(), td.create_vcpu().unwrap());
    let prefault = |vcpu: &mut SoftTdVcpu| vcpu.pre_fault_memory(&mut PreFaultMemory { gpa: 0, size: PAGE, flags: 0 });
    assert_eq!(errno(ready.init_vcpu(0x1234)), Ok(()));
    assert_eq!(ready.first_rcx(), Some(0x1234));
    assert_eq!(errno(ready.init_vcpu(0)), Err(Errno::EINVAL));
    assert_eq!(ready.run().map(drop), Err(Errno::EINVAL));
    assert_eq!(ready.td_cpuid().unwrap()[0].eax >> 16, 48);
    assert_eq!(not.td_cpuid().map_err(|failure| failure.errno), Err(Errno::EINVAL));
    assert_eq!(prefault(&mut ready), Err(Errno::EOPNOTSUPP));
    assert_eq!(errno(td.finalize()), Ok(()));
    assert_eq!(errno(td.finalize()), Err(Errno::EINVAL));
    assert_eq!(errno(not.init_vcpu(0)), Err(Errno::EINVAL));
    assert_eq!(not.run().map(drop), Err(Errno::EINVAL));
    assert_eq!(ready.run().map(drop), Ok(()));
    // Nothing is there, but it may ask.
    assert_eq!(prefault(&mut ready), Err(Errno::ENOENT));
}

#[test]
fn no_slot_and_no_prefault_with_the_shared_bit() {
    for width in [Width::Bits48, Width::Bits52] {
        let td = SoftTd::new();
        let shared = width.shared_bit();
        let file = td.create_guest_memfd(4 * PAGE, 0).unwrap();
        // Before the TD has a width, there is no such bit.
        assert_eq!(set_slot(&td, 1, shared - PAGE, 2 * PAGE, &file, 0), Ok(()));
        set_slot(&td, 1, 0, 0, &file, 0).unwrap();
        td.init_vm(&InitVm::new(width)).unwrap();
        assert_eq!(set_slot(&td, 1, shared - PAGE, 2 * PAGE, &file, 0), Err(Errno::EINVAL));
        assert_eq!(set_slot(&td, 1, shared, PAGE, &file, 0), Err(Errno::EINVAL));
        assert_eq!(set_slot(&td, 1, shared - PAGE, PAGE, &file, 0), Ok(()));
        let mut vcpu = td.create_vcpu().unwrap();
        td.finalize().unwrap();
        set_private(&td, gfns(shared / PAGE - 1, shared / PAGE), true);
        let mut prefault = |gpa, size| vcpu.pre_fault_memory(&mut PreFaultMemory { gpa, size, flags: 0 });
        assert_eq!(prefault(shared, PAGE), Err(Errno::EINVAL));
        assert_eq!(prefault(shared - PAGE, 2 * PAGE), Err(Errno::EINVAL));
        assert_eq!(prefault(shared - PAGE, PAGE), Ok(()));
    }
}

/// A TD with private memory at frames 0 to 8 in two slots of one file, the first page of which is shared, and contents.
struct Building {
    td: SoftTd,
    vcpu: SoftTdVcpu,
    file: GuestMemfd,
    source: SharedMemory,
}

impl Building {
    fn new() -> Self {
        let (td, vcpu) = initialised(&init());
        let file = td.create_guest_memfd(8 * PAGE, 0).unwrap();
        set_slot(&td, 0, 0, 4 * PAGE, &file, 0).unwrap();
        set_slot(&td, 1, 4 * PAGE, 4 * PAGE, &file, 4 * PAGE).unwrap();
        set_private(&td, gfns(1, 16), true);
        let source = SharedMemory::new(8 * PAGE).unwrap();
        Self { td, vcpu, file, source }
    }

    fn region(&self, first: u64, pages: u64) -> InitMemRegion {
        InitMemRegion { source_addr: self.source.hva(), gpa: first * PAGE, nr_pages: pages }
    }

    /// What came of it, and how many pages it advanced by, consistently.
    fn add(&mut self, region: InitMemRegion) -> (Result<(), Errno>, u64) {
        let mut now = region;
        let result = self.vcpu.init_mem_region(&mut now, true);
        let pages = region.nr_pages - now.nr_pages;
        assert_eq!(now.gpa - region.gpa, pages * PAGE);
        assert_eq!(now.source_addr - region.source_addr, pages * PAGE);
        (errno(result), pages)
    }
}

#[test]
fn arguments_of_a_region() {
    let mut building = Building::new();
    let good = building.region(1, 2);
    let shared = Width::Bits48.shared_bit();
    let bad = [
        InitMemRegion { source_addr: 0, ..good },
        InitMemRegion { source_addr: good.source_addr + 1, ..good },
        InitMemRegion { source_addr: good.source_addr + 2048, ..good },
        InitMemRegion { gpa: PAGE + 1, ..good },
        InitMemRegion { nr_pages: 0, ..good },
        InitMemRegion { nr_pages: u64::MAX, ..good },
        InitMemRegion { nr_pages: 1 << 52, ..good },
        InitMemRegion { nr_pages: (1 << 52) + 1, ..good },
        InitMemRegion { gpa: u64::MAX - 0xfff, nr_pages: 1, ..good },
        InitMemRegion { gpa: shared, ..good },
        InitMemRegion { gpa: shared - PAGE, ..good },
        InitMemRegion { gpa: 1 << 50, ..good },
        // Without a slot, and not private.
        InitMemRegion { gpa: 9 * PAGE, ..good },
        InitMemRegion { gpa: 0, ..good },
    ];
    for region in bad {
        assert_eq!(building.add(region), (Err(Errno::EINVAL), 0), "{region:x?}");
    }
    let nowhere = InitMemRegion { source_addr: PAGE, ..good };
    assert_eq!(building.add(nowhere), (Err(Errno::EFAULT), 0));
    assert_eq!(building.td.arch().with_sept(|sept| sept.states().count()), 0);
    let untouched = building.td.arch().mrtd();

    let mut other = building.td.create_vcpu().unwrap();
    assert_eq!(errno(other.init_mem_region(&mut good.clone(), true)), Err(Errno::EINVAL));
    assert_eq!(building.td.arch().mrtd(), untouched);
    assert_eq!(building.add(good), (Ok(()), 2));
    assert_ne!(building.td.arch().mrtd(), untouched);
    building.td.finalize().unwrap();
    assert_eq!(building.add(building.region(3, 1)), (Err(Errno::EINVAL), 0));
}

/// A region may span slots; an error comes with what was done before it.
#[test]
fn progress_comes_with_the_error() {
    let mut building = Building::new();
    assert_eq!(building.add(building.region(6, 1)), (Ok(()), 1));
    // Pages 2 to 5 lie in both slots; page 6 was added before.
    assert_eq!(building.add(building.region(2, 6)), (Err(Errno::EIO), 4));
    assert_eq!(building.add(building.region(7, 4)), (Err(Errno::EINVAL), 1));
    set_private(&building.td, gfns(3, 4), false);
    set_private(&building.td, gfns(3, 4), true);
    // What a conversion has taken away can be added once more.
    assert_eq!(building.add(building.region(3, 1)), (Ok(()), 1));
    let states: Vec<_> = building.td.arch().with_sept(|sept| sept.states().collect());
    assert_eq!(states, (2..8).map(|n| (gfn(n), SeptState::Present)).collect::<Vec<_>>());

    let exit = building.vcpu.immediate_exit();
    exit.set(true);
    assert_eq!(building.add(building.region(1, 1)), (Err(Errno::EINTR), 0));
    exit.set(false);
    assert_eq!(building.add(building.region(1, 1)), (Ok(()), 1));
    assert_eq!(building.td.arch().bugs(), []);
}

#[test]
fn a_closed_file_has_no_pages() {
    let Building { td, mut vcpu, file, source } = Building::new();
    drop(file);
    let mut region = InitMemRegion { source_addr: source.hva(), gpa: PAGE, nr_pages: 1 };
    assert_eq!(errno(vcpu.init_mem_region(&mut region, true)), Err(Errno::EFAULT));
    assert_eq!(td.arch().with_sept(|sept| sept.states().count()), 0);
}
