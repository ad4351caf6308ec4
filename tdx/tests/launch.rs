//! Building TDs on the model: whole ones, interrupted ones, impossible ones.

mod firmware_kit;
mod td_kit;

use std::collections::VecDeque;
use std::error::Error;
use std::ops::ControlFlow;
use std::sync::Arc;

use cvm_memory::addr::Gpa;
use cvm_memory::convert::{Request, State};
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::hypervisor::{Exit, PreFaultMemory, Vcpu};
use cvm_memory::memory::CvmMemory;
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_tdx::hob::{memory_list, td_hob};
use cvm_memory_tdx::import::{Import, ImportList};
use cvm_memory_tdx::launch::{Added, Image, LaunchError, Progress, Start, Vcpus};
use cvm_memory_tdx::mechanism::{Failure, InitVm, TdVcpu};
use cvm_memory_tdx::model::sept::Command;
use cvm_memory_tdx::model::{Death, SoftTd, SoftTdVcpu};
use cvm_memory_tdx::mrtd::{Measurement, Order};
use cvm_memory_tdx::tdvf::Tdvf;
use cvm_memory_tdx::uapi::InitMemRegion;
use cvm_memory_tdx::width::Width;
use kvm_bindings::kvm_cpuid_entry2;
use nix::errno::Errno;
use proptest::prelude::*;
use td_kit::*;

/// A vCPU whose INIT_MEM_REGION gets so many pages far and then fails; with no errno, it fails no more.
#[derive(Debug)]
struct Balky {
    vcpu: SoftTdVcpu,
    script: VecDeque<(u64, Errno)>,
    /// What to say when the script is at its end.
    then: Option<Errno>,
    calls: u64,
}

impl Balky {
    fn new(vcpu: SoftTdVcpu, script: &[(u64, Errno)], then: Option<Errno>) -> Self {
        Self { vcpu, script: script.iter().copied().collect(), then, calls: 0 }
    }
}

impl Vcpu for Balky {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.vcpu.pre_fault_memory(range)
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        self.vcpu.run()
    }
}

impl TdVcpu for Balky {
    fn init_vcpu(&mut self, rcx: u64) -> Result<(), Failure> {
        self.vcpu.init_vcpu(rcx)
    }

    fn td_cpuid(&mut self) -> Result<Vec<kvm_cpuid_entry2>, Failure> {
        self.vcpu.td_cpuid()
    }

    fn init_mem_region(&mut self, region: &mut InitMemRegion, measure: bool) -> Result<(), Failure> {
        self.calls += 1;
        let (pages, errno) = match self.script.pop_front().or(self.then.map(|errno| (0, errno))) {
            Some((pages, errno)) if pages < region.nr_pages => (pages, errno),
            _ => return self.vcpu.init_mem_region(region, measure),
        };
        if pages > 0 {
            let mut part = InitMemRegion { nr_pages: pages, ..*region };
            self.vcpu.init_mem_region(&mut part, measure)?;
            *region = InitMemRegion { nr_pages: region.nr_pages - pages, ..part };
        }
        Err(Failure::errno(errno))
    }
}

fn import(start: u64, pages: u64, measured: bool, byte: u8) -> Import {
    Import { gfns: gfns(start, start + pages), measured, contents: vec![byte; usize::try_from(pages * PAGE).unwrap()] }
}

fn list(imports: Vec<Import>) -> ImportList {
    ImportList::new(imports, Width::Bits48).unwrap()
}

/// A TD with one vCPU, and its memory.
fn begun(script: &[(u64, Errno)], then: Option<Errno>) -> (Vcpus<SoftTd, Balky>, CvmMemory) {
    let td = SoftTd::new();
    let mut vcpus = Start::new(td.clone()).init(&InitVm::new(Width::Bits48)).unwrap();
    vcpus.add(Balky::new(td.create_vcpu().unwrap(), script, then), 0).unwrap();
    let memory = CvmMemory::builder().ram(0, 16 * MIB).build(Arc::new(td)).unwrap();
    (vcpus, memory)
}

fn read(vcpu: &mut SoftTdVcpu, gpa: u64, len: u64) -> Result<Vec<u8>, Errno> {
    vcpu.start(GuestOp::Read { gpa, len, private: true });
    match vcpu.run()? {
        Exit::Halt => {}
        other => panic!("{other:?}"),
    }
    let Some(OpResult::Read(bytes)) = vcpu.take_result() else { panic!() };
    Ok(bytes)
}

#[test]
fn a_real_firmware_starts() {
    let image = firmware_kit::image("trixie-OVMF.fd.xz");
    let tdvf = Tdvf::parse(&image).unwrap();
    let td = SoftTd::new();
    let mut vcpus = Start::new(td.clone()).init(&InitVm::new(Width::Bits48)).unwrap();
    let hob_at = tdvf.td_hob().unwrap().gfns.start_byte();
    for _ in 0..2 {
        vcpus.add(td.create_vcpu().unwrap(), hob_at).unwrap();
    }
    let memory =
        CvmMemory::builder().ram(0, 64 * MIB).ram((1 << 32) - 4 * MIB, 4 * MIB).build(Arc::new(td.clone())).unwrap();
    let entries = memory_list(&[gfns(0, 0x4000)], &tdvf.added_memory()).unwrap();
    let hob = td_hob(Gpa(hob_at), &entries).unwrap();
    let launched =
        vcpus.image(list(tdvf.imports(&hob).unwrap()), &memory).unwrap().add_all().unwrap().finalize().unwrap();

    // As others have computed it, as the module has it, as predicted.
    let expected = "bdc6fb145880f06f30c8b346b8dce2a99d9351b56892df22f80fcf6574caa9f9c31df8e8576d53b4d0cd1c3f28910e11";
    assert_eq!(launched.mrtd.to_string(), expected);
    assert_eq!(td.arch().mrtd(), launched.mrtd);

    // The guest finds code, variables, the list, and zeroes to work with, none of which it has to accept.
    let [mut boot, other]: [SoftTdVcpu; 2] = launched.vcpus.try_into().unwrap();
    assert_eq!((boot.first_rcx(), other.first_rcx()), (Some(hob_at), Some(hob_at)));
    let whole = read(&mut boot, (1 << 32) - 4 * MIB, 4 * MIB).unwrap();
    assert!(whole == image);
    assert_eq!(read(&mut boot, hob_at, hob.len() as u64).unwrap(), hob);
    assert_eq!(read(&mut boot, 0x81_1000, 0xf000).unwrap(), [0; 0xf000]);
    // Everything else it has to: the page before the last section, and the first one behind it.
    let mut exits = VcpuExits::new(Arc::new(memory));
    boot.start(accept(0x82_0000, 0));
    let mut exit = boot.run().unwrap();
    assert!(matches!(exits.handle(&mut exit), Action::Resume(Handled::Materialised { .. })));
    assert!(matches!(boot.run(), Ok(Exit::Halt)));
    assert_eq!(read(&mut boot, 0x82_0000, 8).unwrap(), [0; 8]);
    assert_eq!(read(&mut boot, 0x81_0000, 8), Err(Errno::EIO));
    assert_eq!(td.arch().death(), Some(Death::PendingTouch { gfn: gfn(0x810) }));
    assert_eq!(td.arch().bugs(), []);
}

/// Each page is added once and in order, however often KVM is interrupted.
#[test]
fn interrupted_and_taken_up_again() {
    let imports = || list(vec![import(1024, 600, true, 3), import(8, 1, false, 4), import(2, 3, true, 5)]);
    let expected = imports().mrtd(Order::SinglePass);
    let script = [(0, Errno::EINTR), (7, Errno::EINTR), (0, Errno::EAGAIN), (0, Errno::EAGAIN), (500, Errno::EAGAIN)];
    let (vcpus, memory) = begun(&script, None);
    vcpus.td().arch().with_sept(|sept| sept.record());
    let complete = vcpus.image(imports(), &memory).unwrap().add_all().unwrap();
    assert_eq!(complete.mrtd(), expected);
    let launched = complete.finalize().unwrap();
    let arch = launched.td.arch();
    assert_eq!((launched.mrtd, arch.mrtd()), (expected, expected));
    let order = (1024..1624).chain([8]).chain(2..5).map(|n| Command::Add(gfn(n)));
    assert_eq!(arch.with_sept(|sept| sept.take_log()), order.collect::<Vec<_>>());
    let mut vcpu = launched.vcpus.into_iter().next().unwrap();
    // 512 pages, of which five calls did 507; 88; 1; 3.
    assert_eq!(vcpu.calls, 6 + 3);
    assert_eq!(read(&mut vcpu.vcpu, 1623 * PAGE, PAGE).unwrap(), [3; 4096]);
    assert_eq!(read(&mut vcpu.vcpu, 8 * PAGE, PAGE).unwrap(), [4; 4096]);
}

/// A machine that is busy for long is not one that is stuck.
#[test]
fn many_interruptions_in_a_row() {
    let (vcpus, memory) = begun(&[(0, Errno::EINTR); 900], None);
    let complete = vcpus.image(list(vec![import(0, 2, true, 1)]), &memory).unwrap().add_all().unwrap();
    assert_eq!(complete.finalize().unwrap().vcpus[0].calls, 901);
}

#[test]
fn the_caller_may_stop_it_and_go_on() {
    let imports = || list(vec![import(0, 700, true, 1), import(1000, 5, true, 2)]);
    let (vcpus, memory) = begun(&[(10, Errno::EINTR)], None);
    let mut image = vcpus.image(imports(), &memory).unwrap();
    let mut seen = Vec::new();
    let complete = loop {
        let mut stop = |progress: Progress| {
            seen.push(progress.done);
            ControlFlow::Break(())
        };
        match image.add_with(&mut stop).unwrap() {
            Added::Complete(complete) => break complete,
            Added::Stopped(rest) => image = rest,
        }
    };
    // One call goes to the next multiple of what can be staged at most.
    assert_eq!(seen, [10, 512, 700, 705]);
    assert_eq!(complete.finalize().unwrap().mrtd, imports().mrtd(Order::SinglePass));
}

#[test]
fn a_command_that_never_gets_on_is_given_up() {
    for errno in [Errno::EINTR, Errno::EIO, Errno::ENOMEM] {
        let (vcpus, memory) = begun(&[(3, errno)], Some(errno));
        let image = vcpus.image(list(vec![import(16, 8, true, 1)]), &memory).unwrap();
        match image.add_all().unwrap_err() {
            LaunchError::Page { gfn: at, failure } => assert_eq!((at, failure.errno), (gfn(19), errno)),
            other => panic!("{other}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_interruptions(
        script in prop::collection::vec((0..200_u64, prop::sample::select(vec![Errno::EINTR, Errno::EAGAIN])), 0..12),
        sizes in prop::collection::vec((1..300_u64, any::<bool>()), 1..4),
    ) {
        let place = |(nr, (pages, measured)): (usize, &(u64, bool))| {
            import(nr as u64 * 512, *pages, *measured, u8::try_from(nr).unwrap())
        };
        let imports = || list(sizes.iter().enumerate().map(place).collect());
        let (vcpus, memory) = begun(&script, None);
        let launched = vcpus.image(imports(), &memory).unwrap().add_all().unwrap().finalize().unwrap();
        prop_assert_eq!(launched.mrtd, imports().mrtd(Order::SinglePass));
        prop_assert_eq!(launched.td.arch().mrtd(), launched.mrtd);
    }
}

/// A kernel that says to have done what cannot be is not believed, and not asked for ever.
#[test]
fn progress_that_is_none() {
    #[derive(Debug)]
    struct Liar(SoftTdVcpu, fn(&mut InitMemRegion));

    impl Vcpu for Liar {
        fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
            self.0.pre_fault_memory(range)
        }

        fn run(&mut self) -> Result<Exit<'_>, Errno> {
            self.0.run()
        }
    }

    impl TdVcpu for Liar {
        fn init_vcpu(&mut self, rcx: u64) -> Result<(), Failure> {
            self.0.init_vcpu(rcx)
        }

        fn td_cpuid(&mut self) -> Result<Vec<kvm_cpuid_entry2>, Failure> {
            self.0.td_cpuid()
        }

        fn init_mem_region(&mut self, region: &mut InitMemRegion, _measure: bool) -> Result<(), Failure> {
            self.1(region);
            Ok(())
        }
    }

    let lies: [fn(&mut InitMemRegion); 5] = [
        |_| {},
        |region| region.nr_pages += 1,
        |region| region.nr_pages -= 1,
        |region| region.gpa += PAGE,
        |region| {
            region.nr_pages = 0;
            region.gpa += 4 * PAGE;
        },
    ];
    for lie in lies {
        let td = SoftTd::new();
        let mut vcpus = Start::new(td.clone()).init(&InitVm::new(Width::Bits48)).unwrap();
        vcpus.add(Liar(td.create_vcpu().unwrap(), lie), 0).unwrap();
        let memory = CvmMemory::builder().ram(0, 4 * MIB).build(Arc::new(td)).unwrap();
        let image = vcpus.image(list(vec![import(16, 4, true, 1)]), &memory).unwrap();
        assert!(matches!(image.add_all(), Err(LaunchError::Progress { .. })));
    }
}

#[test]
fn the_image_is_held_against_memory_first() {
    let cases: [(Vec<Import>, u64); 3] = [
        (vec![import(0, 4, true, 1), import(4096, 1, true, 1)], 4096),
        (vec![import(4094, 3, true, 1)], 4096),
        (vec![import(0, 4, true, 1), import(64, 8, true, 1)], 70),
    ];
    for (imports, at) in cases {
        let (vcpus, memory) = begun(&[], None);
        memory.convert(&Request { range: gfns(70, 71), to: State::Shared }).unwrap().converted().unwrap();
        let td = vcpus.td().clone();
        match vcpus.image(list(imports), &memory) {
            Err(LaunchError::NotPrivate { gfn: found }) => assert_eq!(found, gfn(at)),
            other => panic!("{other:?}"),
        }
        assert_eq!(td.arch().with_sept(|sept| sept.states().count()), 0);
        assert_eq!(td.vm().private_gfns(), []);
    }
    let td = SoftTd::new();
    let vcpus: Vcpus<_, SoftTdVcpu> = Start::new(td.clone()).init(&InitVm::new(Width::Bits48)).unwrap();
    let memory = CvmMemory::builder().ram(0, MIB).build(Arc::new(td)).unwrap();
    assert!(matches!(vcpus.image(list(vec![]), &memory), Err(LaunchError::NoVcpu)));
}

/// Where memory is declared private lazily, KVM hears of the image's pages and of no others.
#[test]
fn the_image_is_materialised() {
    let (vcpus, memory) = begun(&[], None);
    let td = vcpus.td().clone();
    let image = vcpus.image(list(vec![import(5, 2, true, 1), import(100, 3, false, 1)]), &memory).unwrap();
    assert_eq!(td.vm().private_gfns(), [gfns(5, 7), gfns(100, 103)]);
    let launched = image.add_all().unwrap().finalize().unwrap();
    assert_eq!(td.arch().mrtd(), launched.mrtd);
}

/// A VM fd that fails in one command, a few times.
mod failing {
    use std::cell::Cell;

    use cvm_memory::gmem::GuestMemfd;
    use cvm_memory::hypervisor::{Cap, Hypervisor, MemoryAttributes, MemoryRegion, Platform};
    use cvm_memory_tdx::mechanism::{Capabilities, TdVm};

    use super::*;

    #[derive(Debug)]
    pub struct Failing {
        pub td: SoftTd,
        pub init: Failure,
        pub finalize: Failure,
        pub times: std::sync::Mutex<Cell<u32>>,
    }

    impl Failing {
        fn next(&self, failure: Failure) -> Result<(), Failure> {
            let times = self.times.lock().unwrap();
            if failure.errno == Errno::UnknownErrno || times.get() == 0 {
                return Ok(());
            }
            times.set(times.get() - 1);
            Err(failure)
        }
    }

    impl Hypervisor for Failing {
        fn platform(&self) -> Platform {
            self.td.platform()
        }

        fn check_extension(&self, cap: Cap) -> u64 {
            self.td.check_extension(cap)
        }

        fn enable_cap(&self, cap: Cap, args: [u64; 4]) -> Result<(), Errno> {
            self.td.enable_cap(cap, args)
        }

        fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<GuestMemfd, Errno> {
            self.td.create_guest_memfd(size, flags)
        }

        #[allow(unsafe_code, reason = "the trait's one unsafe method is passed on")]
        unsafe fn set_user_memory_region2(&self, region: &MemoryRegion) -> Result<(), Errno> {
            // SAFETY: the caller vouches for the address range, under this very contract.
            unsafe { self.td.set_user_memory_region2(region) }
        }

        fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno> {
            self.td.set_memory_attributes(attributes)
        }
    }

    impl TdVm for Failing {
        fn capabilities(&self) -> Result<Capabilities, Failure> {
            self.td.capabilities()
        }

        fn init_vm(&self, init: &InitVm) -> Result<(), Failure> {
            self.next(self.init)?;
            self.td.init_vm(init)
        }

        fn finalize(&self) -> Result<(), Failure> {
            self.next(self.finalize)?;
            self.td.finalize()
        }
    }
}

const NO: Failure = Failure::errno(Errno::UnknownErrno);

fn launch_with(init: Failure, finalize: Failure, times: u32) -> Result<Measurement, LaunchError> {
    let td = SoftTd::new();
    let vm = failing::Failing { td: td.clone(), init, finalize, times: std::sync::Mutex::new(times.into()) };
    let mut vcpus = Start::new(vm).init(&InitVm::new(Width::Bits48))?;
    vcpus.add(td.create_vcpu().unwrap(), 0)?;
    let memory = CvmMemory::builder().ram(0, 4 * MIB).build(Arc::new(td)).unwrap();
    let image: Image<_, _> = vcpus.image(list(vec![import(0, 1, true, 1)]), &memory)?;
    Ok(image.add_all()?.finalize()?.mrtd)
}

#[test]
fn what_the_module_said_is_in_the_error() {
    let failure = Failure { errno: Errno::EINVAL, hw_error: 0xc000_0100_0000_0001 };
    let error = launch_with(failure, NO, 1).unwrap_err();
    assert_eq!(error.to_string(), "KVM_TDX_INIT_VM");
    let source = error.source().unwrap().to_string();
    assert!(source.contains("EINVAL") && source.contains("0xc000010000000001"), "{source}");
    let error = launch_with(NO, Failure { errno: Errno::EIO, ..failure }, 1).unwrap_err();
    assert!(error.source().unwrap().to_string().contains("0xc000010000000001"), "{error}");
    assert_eq!(error.to_string(), "KVM_TDX_FINALIZE_VM");
}

#[test]
fn what_is_busy_for_now_is_tried_again() {
    let good = launch_with(NO, NO, 0).unwrap();
    assert_eq!(launch_with(Failure::errno(Errno::EAGAIN), NO, 3).unwrap(), good);
    assert_eq!(launch_with(NO, Failure::errno(Errno::EBUSY), 3).unwrap(), good);
    assert_eq!(launch_with(Failure::errno(Errno::EINTR), NO, 3).unwrap(), good);
    // Not everything that sounds so: a TD that has vCPUs already will always have.
    for (init, finalize) in [(Errno::EBUSY, None), (Errno::UnknownErrno, Some(Errno::EAGAIN))] {
        let finalize = finalize.map_or(NO, Failure::errno);
        assert!(matches!(launch_with(Failure::errno(init), finalize, 1), Err(LaunchError::Command { .. })));
    }
    // Nor for ever.
    assert!(matches!(launch_with(Failure::errno(Errno::EINTR), NO, u32::MAX), Err(LaunchError::Command { .. })));
}

#[test]
fn what_a_td_cannot_be_like_is_said_before_kvm_is_asked() {
    let refused = |init: &InitVm| Start::new(SoftTd::new()).init::<SoftTdVcpu>(init).map(drop).unwrap_err();
    let good = InitVm::new(Width::Bits48);
    let debug = InitVm { attributes: 1, ..good.clone() };
    assert_eq!(refused(&debug).to_string(), "td attributes 0x1: this machine offers 0x10000000");
    let amx = InitVm { xfam: 3 << 17, ..good.clone() };
    assert_eq!(refused(&amx).to_string(), "extended features 0x60000: this machine offers 0x7");
    assert!(matches!(refused(&InitVm { cpuid: vec![], ..good.clone() }), LaunchError::NoWidth));
    let mut odd = good.clone();
    odd.cpuid[0].eax = 50 << 16;
    assert!(matches!(refused(&odd), LaunchError::NoWidth));
    let many = InitVm { cpuid: vec![good.cpuid[0]; 257], ..good };
    assert!(matches!(refused(&many), LaunchError::TooManyCpuid { entries: 257 }));
}
