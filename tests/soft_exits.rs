//! Why a vCPU comes back: memory faults, MMIO, emulation failures, hypercalls; and how each is taken up again.

mod soft_kit;

use std::sync::Arc;

use cvm_memory::hypervisor::{Cap, Exit, Hypervisor, MemoryRegion, Mmio, Platform, Vcpu};
use cvm_memory::soft::{
    Access, Arch, Denied, GmemPage, GuestOp, GuestView, Instruction, OpResult, SoftVcpu, SoftVm, Step, Tagged,
};
use nix::errno::Errno;
use soft_kit::*;

const GPA: u64 = 0xc000_0000;
const ENOSYS: u64 = (-1000_i64).cast_unsigned();
const EINVAL: u64 = (-22_i64).cast_unsigned();

/// private_mem_kvm_exits_test: (a) the slot is deleted while the vCPU reads, (b) the slot has no guest_memfd.
#[test]
fn private_mem_kvm_exits() {
    let vm = SoftVm::software_protected();
    let file = vm.create_guest_memfd(PAGE, 0).unwrap();
    set_region(&vm, &gmem_slot(1, GPA, PAGE, 0, &file, 0)).unwrap();
    set_private(&vm, GPA, PAGE, true);
    let mut vcpu = vm.create_vcpu();
    let spinning = std::thread::spawn(move || {
        loop {
            vcpu.start(read(GPA, 8, true));
            match vcpu.run() {
                Ok(Exit::Halt) => {}
                Ok(Exit::MemoryFault(fault)) => return fault,
                other => panic!("{other:?}"),
            }
        }
    });
    set_region(&vm, &delete(1)).unwrap();
    let exit = spinning.join().unwrap();
    assert_eq!((exit.errno, exit.flags, exit.gpa, exit.size), (Errno::EFAULT, 8, GPA, PAGE));

    set_region(&vm, &shared_slot(1, GPA, PAGE, Ram::new(1).hva())).unwrap();
    let exit = fault(&mut vm.create_vcpu(), read(GPA + 9, 8, true));
    assert_eq!((exit.errno, exit.flags, exit.gpa, exit.size), (Errno::EFAULT, 8, GPA, PAGE));
}

/// An access that differs from the attribute exits before anything is looked up, and goes on where it was when it is repaired.
#[test]
fn mismatch() {
    let vm = SoftVm::tagged();
    let mut vcpu = vm.create_vcpu();
    assert_eq!(fault(&mut vcpu, read(GPA + 5, 1, true)).flags, 8, "no slot, attribute shared");
    set_private(&vm, GPA, 3 * PAGE, true);
    let exit = fault(&mut vcpu, GuestOp::Fetch { gpa: GPA + 5, private: false });
    assert_eq!((exit.errno, exit.flags, exit.gpa), (Errno::EFAULT, 0, GPA));

    let file = vm.create_guest_memfd(3 * PAGE, 0).unwrap();
    set_region(&vm, &gmem_slot(1, GPA, 3 * PAGE, Ram::new(3).hva(), &file, 0)).unwrap();
    set_private(&vm, GPA + PAGE, PAGE, false);
    // The second of three pages stops the write; the first is done and is not done again.
    let exit = fault(&mut vcpu, fill(GPA + 100, 2 * PAGE, 0x77, true));
    assert_eq!((exit.gpa, exit.flags), (GPA + PAGE, 8));
    assert!(matches!(vcpu.run(), Ok(Exit::MemoryFault(again)) if again == exit));
    set_private(&vm, GPA + PAGE, PAGE, true);
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    assert_eq!(vcpu.take_result(), Some(OpResult::Done));
    assert_eq!(vcpu.take_result(), None);
    assert_eq!(finish(&mut vcpu, check(GPA, 100, 0, true)), OpResult::Done);
    assert_eq!(finish(&mut vcpu, check(GPA + 100, 2 * PAGE, 0x77, true)), OpResult::Done);
    let differs = OpResult::Differs { gpa: GPA + 100 + 2 * PAGE, found: 0 };
    assert_eq!(finish(&mut vcpu, check(GPA + 100, 3 * PAGE - 100, 0x77, true)), differs);
}

/// Where the attribute alone decides, no access can differ from it.
#[test]
fn attribute_decides() {
    let vm = SoftVm::software_protected();
    let file = vm.create_guest_memfd(PAGE, 0).unwrap();
    let ram = Ram::new(1);
    set_region(&vm, &gmem_slot(1, GPA, PAGE, ram.hva(), &file, 0)).unwrap();
    let mut vcpu = vm.create_vcpu();
    assert_eq!(finish(&mut vcpu, fill(GPA, PAGE, 0x11, true)), OpResult::Done);
    assert!(ram.is_all(0..PAGE, 0x11), "shared, whatever the guest says");
    set_private(&vm, GPA, PAGE, true);
    assert_eq!(finish(&mut vcpu, check(GPA, PAGE, 0, false)), OpResult::Done);
    assert_eq!(finish(&mut vcpu, fill(GPA, PAGE, 0x22, false)), OpResult::Done);
    assert!(ram.is_all(0..PAGE, 0x11));
}

fn mmio_reads(vcpu: &mut SoftVcpu, byte: u8) -> Vec<(u64, usize)> {
    let mut exits = Vec::new();
    loop {
        match vcpu.run() {
            Ok(Exit::Mmio(Mmio::Read { gpa, data })) => {
                exits.push((gpa, data.len()));
                data.fill(byte);
            }
            Ok(Exit::Halt) => return exits,
            other => panic!("{other:?}"),
        }
    }
}

/// Shared accesses without a slot: pieces of at most eight bytes, none across a page; a write has retired when it exits.
#[test]
fn mmio() {
    let vm = SoftVm::default_type();
    let mut vcpu = vm.create_vcpu();
    vcpu.start(read(GPA + PAGE - 12, 22, false));
    let at = GPA + PAGE;
    assert_eq!(mmio_reads(&mut vcpu, 0xef), [(at - 12, 8), (at - 4, 4), (at, 8), (at + 8, 2)]);
    assert_eq!(vcpu.take_result(), Some(OpResult::Read(vec![0xef; 22])));

    let data: Vec<u8> = (0..10).collect();
    vcpu.start(GuestOp::Write { gpa: GPA, data: data.clone(), private: false });
    let first = vcpu
        .run()
        .map(|exit| matches!(exit, Exit::Mmio(Mmio::Write { gpa: GPA, data }) if data == [0, 1, 2, 3, 4, 5, 6, 7]));
    assert_eq!(first, Ok(true));
    // Memory appears; the write that has retired does not reach it, the rest does.
    let ram = Ram::new(1);
    set_region(&vm, &shared_slot(0, GPA, PAGE, ram.hva())).unwrap();
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    assert!(ram.is_all(0..8, 0));
    assert_eq!([ram.byte(8), ram.byte(9)], [8, 9]);

    // A read of which half is MMIO.
    vcpu.start(check(GPA + PAGE - 2, 4, 0, false));
    assert_eq!(mmio_reads(&mut vcpu, 1), [(GPA + PAGE, 2)]);
    assert_eq!(vcpu.take_result(), Some(OpResult::Differs { gpa: GPA + PAGE, found: 1 }));
}

#[test]
fn read_only_slots() {
    let vm = SoftVm::default_type();
    let ram = Ram::new(1);
    ram.fill(0x33);
    set_region(&vm, &MemoryRegion { flags: READONLY, ..shared_slot(0, GPA, PAGE, ram.hva()) }).unwrap();
    let mut vcpu = vm.create_vcpu();
    assert_eq!(finish(&mut vcpu, check(GPA, PAGE, 0x33, false)), OpResult::Done);
    vcpu.start(fill(GPA, 3, 0x44, false));
    let exit = vcpu.run().map(|exit| matches!(exit, Exit::Mmio(Mmio::Write { gpa: GPA, data }) if data == [0x44; 3]));
    assert_eq!(exit, Ok(true));
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    assert!(ram.is_all(0..PAGE, 0x33));
}

/// A slot over an address that is not mapped: the run fails, without an exit, and can be repeated.
#[test]
fn bad_address() {
    let vm = SoftVm::default_type();
    set_region(&vm, &shared_slot(0, GPA, PAGE, 0)).unwrap();
    let mut vcpu = vm.create_vcpu();
    for op in [read(GPA, 1, false), fill(GPA, 1, 1, false), GuestOp::Fetch { gpa: GPA, private: false }] {
        vcpu.start(op);
        assert_eq!(vcpu.run().unwrap_err(), Errno::EFAULT);
    }
    set_region(&vm, &delete(0)).unwrap();
    set_region(&vm, &shared_slot(0, GPA, PAGE, Ram::new(1).hva())).unwrap();
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
}

#[test]
fn fetch_without_a_slot() {
    let vm = SoftVm::default_type();
    let mut vcpu = vm.create_vcpu();
    let op = GuestOp::Fetch { gpa: GPA, private: false };
    vcpu.start(op.clone());
    assert!(matches!(vcpu.run(), Ok(Exit::InternalError { suberror: Some(1) })));
    // The guest has a #UD queued, and takes it even if memory appears.
    set_region(&vm, &shared_slot(0, GPA, PAGE, Ram::new(1).hva())).unwrap();
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    assert_eq!(vcpu.take_result(), Some(OpResult::Exception));
    set_region(&vm, &delete(0)).unwrap();
    // With the capability nothing is queued: the fetch is repeated.
    assert_eq!(vm.enable_cap(Cap::EXIT_ON_EMULATION_FAILURE, [2, 0, 0, 0]), Err(Errno::EINVAL));
    vm.enable_cap(Cap::EXIT_ON_EMULATION_FAILURE, [1, 0, 0, 0]).unwrap();
    vcpu.start(op);
    for _ in 0..2 {
        assert!(matches!(vcpu.run(), Ok(Exit::InternalError { suberror: Some(1) })));
    }
    set_region(&vm, &shared_slot(0, GPA, PAGE, Ram::new(1).hva())).unwrap();
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    assert_eq!(vcpu.take_result(), Some(OpResult::Done));
}

fn map_gpa_range(gpa: u64, pages: u64, attributes: u64) -> GuestOp {
    GuestOp::Hypercall { nr: 12, args: [gpa, pages, attributes, 0] }
}

#[test]
fn map_gpa_range_is_checked_before_it_exits() {
    let vm = SoftVm::default_type();
    let mut vcpu = vm.create_vcpu();
    assert_eq!(finish(&mut vcpu, map_gpa_range(GPA, 1, 0x10)), OpResult::Hypercall(ENOSYS), "not enabled");
    assert_eq!(vm.check_extension(Cap::EXIT_HYPERCALL), 0x1000);
    assert_eq!(vm.enable_cap(Cap::EXIT_HYPERCALL, [0x2000, 0, 0, 0]), Err(Errno::EINVAL));
    vm.enable_cap(Cap::EXIT_HYPERCALL, [0x1000, 0, 0, 0]).unwrap();
    for (gpa, pages) in [(GPA + 1, 1), (GPA, 0), (GPA, u64::MAX), (GPA, 0_u64.wrapping_sub(GPA >> 12))] {
        assert_eq!(finish(&mut vcpu, map_gpa_range(gpa, pages, 0)), OpResult::Hypercall(EINVAL));
    }
    let other = GuestOp::Hypercall { nr: 11, args: [0; 4] };
    assert_eq!(finish(&mut vcpu, other), OpResult::Hypercall(ENOSYS));
}

#[test]
fn map_gpa_range_answers() {
    for (vm, answer, result) in [
        (SoftVm::default_type(), 4711, Ok(())),
        (SoftVm::software_protected(), 4711, Ok(())),
        (SoftVm::tagged(), 0, Ok(())),
        (SoftVm::tagged(), 22, Ok(())),
        (SoftVm::tagged(), 11, Ok(())),
        (SoftVm::tagged(), 4711, Err(Errno::EINVAL)),
    ] {
        vm.enable_cap(Cap::EXIT_HYPERCALL, [0x1000, 0, 0, 0]).unwrap();
        let mut vcpu = vm.create_vcpu();
        vcpu.start(map_gpa_range(GPA, 0x201, 0x11));
        let Ok(Exit::Hypercall(exit)) = vcpu.run() else { panic!() };
        assert_eq!((exit.nr, exit.args, *exit.ret), (12, [GPA, 0x201, 0x11, 0, 0, 0], 0));
        *exit.ret = answer;
        assert_eq!(vcpu.run().map(|exit| assert!(matches!(exit, Exit::Halt))), result);
        if result.is_ok() {
            assert_eq!(vcpu.take_result(), Some(OpResult::Hypercall(answer)));
        }
    }
}

/// With immediate exit set, what was pending completes, and the guest is not entered.
#[test]
fn immediate_exit() {
    let vm = SoftVm::software_protected();
    vm.enable_cap(Cap::EXIT_HYPERCALL, [0x1000, 0, 0, 0]).unwrap();
    let mut vcpu = vm.create_vcpu();
    let leave = vcpu.immediate_exit();
    vcpu.start(map_gpa_range(GPA, 1, 0x10));
    assert!(matches!(vcpu.run(), Ok(Exit::Hypercall(_))));
    leave.set(true);
    assert_eq!(vcpu.run().unwrap_err(), Errno::EINTR);
    assert_eq!(vcpu.take_result(), Some(OpResult::Hypercall(0)));
    vcpu.start(fill(GPA, 1, 1, false));
    assert_eq!(vcpu.run().unwrap_err(), Errno::EINTR);
    leave.set(false);
    assert!(matches!(vcpu.run(), Ok(Exit::Mmio(Mmio::Write { gpa: GPA, .. }))));
}

#[test]
fn counters() {
    let vm = SoftVm::default_type();
    let mut vcpu = vm.create_vcpu();
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)), "nothing to do");
    let _ = vcpu.run();
    assert!(set_region(&vm, &delete(0)).is_err());
    let counters = vm.counters();
    assert_eq!((counters.run, counters.set_memory_region, counters.set_memory_attributes), (2, 1, 0));
}

/// A platform with hooks: separate page tables, sticky MMIO, pages that lose their contents, an instruction of its own.
#[derive(Debug, Default)]
struct Platformish {
    log: std::sync::Mutex<Vec<String>>,
}

impl Platformish {
    fn log(&self, line: String) {
        self.log.lock().unwrap().push(line);
    }
}

impl Arch for Platformish {
    fn platform(&self) -> Platform {
        Tagged.platform()
    }
    fn separate_private_root(&self) -> bool {
        true
    }
    fn sticky_mmio(&self) -> bool {
        true
    }
    fn make_private(&self, page: GmemPage, gfn: cvm_memory::addr::Gfn) -> Result<(), Errno> {
        self.log(format!("make_private {} at {gfn}", page.page));
        Ok(())
    }
    fn reclaim(&self, _: u64, pages: cvm_memory::addr::FileRange) {
        self.log(format!("reclaim {pages}"));
    }
    fn invalidate_range(&self, gfns: cvm_memory::addr::GfnRange) {
        self.log(format!("invalidate {gfns}"));
    }
    fn zapped_private(&self, gfn: cvm_memory::addr::Gfn, _: GmemPage) -> bool {
        self.log(format!("zapped {gfn}"));
        false
    }
    fn check_access(&self, access: &Access) -> Result<(), Denied> {
        if access.gfn.get() == 3 { Err(Denied::KillVm) } else { Ok(()) }
    }
    fn instruction(&self, view: &dyn GuestView, instruction: &Instruction) -> Step {
        let target = cvm_memory::addr::Gfn::containing(instruction.args[0]);
        match (view.gmem_page(target, true), instruction.answer) {
            (None, _) => Step::Fault { gfn: target, kind: cvm_memory::soft::AccessKind::Write, private: true },
            (Some(_), None) => Step::Hypercall { nr: 12, args: [7; 6] },
            (Some(_), Some(11)) => Step::Hypercall { nr: 12, args: [8; 6] },
            (Some(page), Some(_)) => Step::Done(page.page.get()),
        }
    }
}

fn platformish() -> (SoftVm, Arc<Platformish>, cvm_memory::gmem::GuestMemfd) {
    let arch = Arc::new(Platformish::default());
    let vm = SoftVm::with_arch(Arc::clone(&arch) as Arc<dyn Arch>);
    let file = vm.create_guest_memfd(4 * PAGE, 0).unwrap();
    set_region(&vm, &gmem_slot(0, 0, 2 * PAGE, Ram::new(2).hva(), &file, PAGE)).unwrap();
    (vm, arch, file)
}

#[test]
fn hooks_in_order() {
    let (vm, arch, file) = platformish();
    let take = || std::mem::take(&mut *arch.log.lock().unwrap());
    let mut vcpu = vm.create_vcpu();
    finish(&mut vcpu, fill(0, PAGE, 0x11, false));
    assert_eq!(take(), [] as [&str; 0]);
    set_private(&vm, 0, 2 * PAGE, true);
    assert_eq!(mapped(&vm), []);
    finish(&mut vcpu, fill(0, 2 * PAGE, 0x22, true));
    assert_eq!(take(), ["make_private 0x1 at 0x0", "make_private 0x2 at 0x1"]);
    // Zap, then the platform hears of it, then the page leaves the file.
    file.punch_hole(file_pages(0, 2)).unwrap();
    assert_eq!(take(), ["zapped 0x0", "invalidate [0x0, 0x1)", "reclaim [0x1, 0x2)"]);
    // An attribute change zaps, and that is all it does; here it costs the contents.
    set_private(&vm, PAGE, PAGE, false);
    set_private(&vm, PAGE, PAGE, true);
    assert_eq!(take(), ["zapped 0x1"]);
    assert_eq!(finish(&mut vcpu, check(PAGE, PAGE, 0, true)), OpResult::Done);
    assert_eq!(take(), ["make_private 0x2 at 0x1"]);
    set_region(&vm, &delete(0)).unwrap();
    assert_eq!(take(), ["zapped 0x1", "invalidate [0x0, 0x2)"]);
    drop(file);
    assert_eq!(take(), ["reclaim [0x2, 0x3)"]);
}

/// With page tables of its own, private memory is not zapped by what concerns shared memory only, and the reverse.
#[test]
fn separate_page_tables_are_zapped_apart() {
    let (vm, _, file) = platformish();
    let mut vcpu = vm.create_vcpu();
    finish(&mut vcpu, fill(0, 2 * PAGE, 0x11, false));
    file.punch_hole(file_pages(0, 4)).unwrap();
    assert_eq!(mapped(&vm), [gfns(0, 2)], "a hole in a private file takes private mappings only");
    set_private(&vm, 0, PAGE, true);
    assert_eq!(mapped(&vm), [gfns(1, 2)]);
}

#[test]
fn sticky_mmio() {
    let (vm, _, _file) = platformish();
    let mut vcpu = vm.create_vcpu();
    vcpu.start(read(8 * PAGE, 1, false));
    assert_eq!(mmio_reads(&mut vcpu, 1), [(8 * PAGE, 1)]);
    set_region(&vm, &shared_slot(1, 8 * PAGE, 2 * PAGE, Ram::new(2).hva())).unwrap();
    vcpu.start(read(8 * PAGE, 1, false));
    assert_eq!(mmio_reads(&mut vcpu, 1), [(8 * PAGE, 1)], "the slot stays out of reach");
    assert_eq!(finish(&mut vcpu, read(9 * PAGE, 1, false)), OpResult::Read(vec![0]));
}

#[test]
fn a_platforms_instruction() {
    let (vm, _, _file) = platformish();
    let mut vcpu = vm.create_vcpu();
    let op = GuestOp::Instruction { nr: 1, args: [PAGE, 0, 0, 0] };
    assert_eq!(fault(&mut vcpu, op).gpa, PAGE);
    set_private(&vm, PAGE, PAGE, true);
    let Ok(Exit::Hypercall(exit)) = vcpu.run() else { panic!() };
    assert_eq!(exit.args, [7; 6]);
    *exit.ret = 11;
    // The next batch comes at once, immediate exit or not.
    vcpu.immediate_exit().set(true);
    assert!(matches!(vcpu.run(), Ok(Exit::Hypercall(exit)) if exit.args == [8; 6]));
    assert_eq!(vcpu.run().unwrap_err(), Errno::EINTR);
    assert_eq!(vcpu.take_result(), Some(OpResult::Instruction(2)));
}

#[test]
fn a_platform_gives_the_vm_up() {
    let (vm, _, _file) = platformish();
    set_region(&vm, &shared_slot(1, 3 * PAGE, PAGE, Ram::new(1).hva())).unwrap();
    let mut vcpu = vm.create_vcpu();
    vcpu.start(read(3 * PAGE, 1, false));
    assert_eq!(vcpu.run().unwrap_err(), Errno::EIO);
    assert_eq!(set_region(&vm, &delete(1)), Err(Errno::EIO));
}
