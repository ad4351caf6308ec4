//! One sequence of commands, on the model and on KVM's own SNP code in the lab: the same errnos, firmware codes and progress.

#[path = "kit/emulation.rs"]
mod emulation;

use std::sync::Arc;

use cvm_memory::addr::{FileRange, Gfn, GfnRange};
use cvm_memory::convert::{Request, State};
use cvm_memory::hypervisor::Hypervisor;
use cvm_memory::memory::CvmMemory;
use cvm_memory_sev::commands::{
    CommandError, FirmwareStatus, Init, LaunchFinish, LaunchStart, LaunchUpdate, SnpCommands, Source,
};
use cvm_memory_sev::kvm::KvmSnp;
use cvm_memory_sev::page::Page;
use cvm_memory_sev::soft::{Machine, SoftSnp};
use nix::errno::Errno;

const POLICY: u64 = 0x3_0000;

fn range(gpa: u64, size: u64) -> GfnRange {
    GfnRange::from_bytes(gpa, size).unwrap()
}

/// A VM before `KVM_SEV_INIT2`, and what makes it a vCPU.
struct Vm {
    commands: Arc<dyn SnpCommands>,
    vm: Arc<dyn Hypervisor>,
    add_vcpu: Box<dyn FnMut()>,
}

/// What every command gave, as text.
#[derive(Default)]
struct Log(Vec<String>);

impl Log {
    fn note(&mut self, what: impl std::fmt::Display, result: Result<(), CommandError>) {
        let result = result.map_err(|error| (error.command, error.errno, error.firmware.0));
        self.0.push(format!("{what}: {result:?}"));
    }

    fn update(&mut self, commands: &dyn SnpCommands, what: &str, update: LaunchUpdate, source: Source<'_>) {
        let mut after = update;
        let result = commands.launch_update(&mut after, source);
        assert!(result.is_ok() || after == update, "a failure changes nothing");
        self.note(format_args!("{what}, {update:x?}, then {:#x} {:#x}", after.gfn_start, after.len), result);
    }
}

const fn at(gfn_start: u64, len: u64, page_type: u8, flags: u16) -> LaunchUpdate {
    LaunchUpdate { gfn_start, len, page_type, flags }
}

/// The sequence. Returns what every command gave.
fn sequence(mut new: impl FnMut() -> Vm) -> Vec<String> {
    let mut log = Log::default();
    let start = |policy, flags| LaunchStart { policy, flags, gosvw: [0; 16] };

    // INIT2.
    let Vm { commands, .. } = new();
    log.note("start before init", commands.launch_start(&start(POLICY, 0)));
    for (vmsa_features, flags, ghcb_version) in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 3), (1 << 63, 0, 0)] {
        let init = Init { vmsa_features, flags, ghcb_version };
        log.note(format_args!("{init:x?}"), commands.init(&init));
    }
    log.note("init", commands.init(&Init { ghcb_version: 2, ..Init::default() }));
    log.note("init again", commands.init(&Init::default()));
    drop(commands);

    let Vm { commands, mut add_vcpu, .. } = new();
    add_vcpu();
    log.note("init after a vcpu", commands.init(&Init::default()));
    drop((commands, add_vcpu));

    let Vm { commands, vm, mut add_vcpu } = new();
    log.note("init", commands.init(&Init::default()));
    add_vcpu();
    let memory = CvmMemory::builder().ram(0, 4 << 20).plain_ram(1 << 30, 1 << 20).build(vm).unwrap();
    let commands = commands.as_ref();
    let pages = Page::split(&[0x5a; 0x4000]);

    // LAUNCH_START.
    log.update(commands, "not started", at(0, 0x1000, 1, 0), Source::Pages(&pages));
    log.note("finish not started", commands.launch_finish(&LaunchFinish::default()));
    let no_migration = POLICY | 1 << 18;
    for (policy, flags) in
        [(0, 0), (0x1_0000, 0), (no_migration, 0), (POLICY | 1 << 26, 0), (POLICY, 1), (POLICY | 0xffff, 0)]
    {
        log.note(format_args!("start {policy:#x} {flags}"), commands.launch_start(&start(policy, flags)));
    }
    log.note("start", commands.launch_start(&start(POLICY, 0)));
    log.note("start again", commands.launch_start(&start(POLICY, 0)));

    // LAUNCH_UPDATE. Pages 8 to 11 are private but for page 10.
    memory.converter().materialise(range(0x8000, 0x4000)).unwrap().converted().unwrap();
    memory.convert(&Request { range: range(0xa000, 0x1000), to: State::Shared }).unwrap().converted().unwrap();
    for bad in [
        at(8, 0, 1, 0),
        at(8, 0x800, 1, 0),
        at(8, 0x1000, 0, 0),
        at(8, 0x1000, 2, 0),
        at(8, 0x1000, 7, 0),
        at(8, 0x1000, 1, 1),
    ] {
        log.update(commands, "bad argument", bad, Source::Pages(&pages));
    }
    let source = || Source::Pages(&pages);
    log.update(commands, "no source", at(8, 0x1000, 1, 0), Source::None);
    log.update(commands, "a short source", at(8, 0x5000, 1, 0), source());
    log.update(commands, "no slot", at(0x8_0000, 0x1000, 1, 0), source());
    log.update(commands, "a slot without a file", at(0x4_0000, 0x1000, 1, 0), source());
    log.update(commands, "shared", at(10, 0x1000, 1, 0), source());
    log.update(commands, "two of four", at(8, 0x4000, 1, 0), source());
    log.update(commands, "launched", at(8, 0x1000, 1, 0), source());
    log.update(commands, "zeroes", at(11, 0x1000, 3, 0), Source::None);
    memory.converter().materialise(range(0x3f_e000, 0x2000)).unwrap().converted().unwrap();
    log.update(commands, "beyond the end of the slot", at(0x3fe, 0x4000, 4, 0), source());

    memory.converter().materialise(range(0x1_0000, 0x8000)).unwrap().converted().unwrap();
    log.update(commands, "secrets", at(0x10, 0x1000, 5, 0), source());
    let mut table = Page::ZERO;
    (table[0], table[16 + 40]) = (1, 0xee);
    log.update(commands, "cpuid, to be corrected", at(0x11, 0x1000, 6, 0), Source::Correctable(&mut table));
    assert_eq!((table[0], table[16 + 40]), (1, 0));
    log.update(commands, "cpuid, corrected", at(0x11, 0x1000, 6, 0), Source::Correctable(&mut table));
    table[0] = 65;
    log.update(commands, "cpuid, too long", at(0x12, 0x1000, 6, 0), Source::Correctable(&mut table));
    assert_eq!(table[0], 65);
    // A page that was launched can be launched again once it has left the file.
    let (file, offset) = memory.reader().lookup(Gfn::containing(0x8000)).unwrap().file.unwrap();
    memory.space().file(file).unwrap().punch_hole(FileRange::from_bytes(offset, 0x1000).unwrap()).unwrap();
    log.update(commands, "after a hole", at(8, 0x1000, 1, 0), source());

    // LAUNCH_FINISH.
    log.note("finish with a flag", commands.launch_finish(&LaunchFinish { flags: 1, ..LaunchFinish::default() }));
    log.note("finish", commands.launch_finish(&LaunchFinish::default()));
    log.note("finish again", commands.launch_finish(&LaunchFinish::default()));
    log.update(commands, "afterwards", at(0x13, 0x1000, 1, 0), source());
    log.0
}

fn soft() -> Vm {
    let snp = Arc::new(SoftSnp::new());
    let vm = snp.vm().clone();
    let add_vcpu = Box::new({
        let vm = vm.clone();
        move || drop(vm.create_vcpu())
    });
    Vm { commands: snp, vm: Arc::new(vm), add_vcpu }
}

#[test]
fn on_the_model() {
    let log = sequence(soft);
    for line in &log {
        println!("{line}");
    }
    let found = |needle: &str| log.iter().filter(|line| line.contains(needle)).count();
    assert_eq!(
        ["EPERM", "ENOTTY", "EFAULT", "EIO, 0)", "EIO, 22)", "EIO, 7)", "EIO, 2)"].map(found),
        [1, 1, 1, 2, 2, 1, 1]
    );
    assert_eq!((found("EINVAL"), found("Ok(())")), (25, 10));
}

#[test]
fn kvm_does_the_same() {
    let Some(_emulation) = emulation::Emulation::here() else { return };
    let Some(_) = emulation::snp_vm() else { return };
    let kvm = || {
        let vm = emulation::snp_vm().unwrap();
        let mut vcpus = Vec::new();
        let add_vcpu = Box::new({
            let vm = vm.clone();
            move || vcpus.push(vm.create_vcpu(0).unwrap())
        });
        Vm { commands: Arc::new(KvmSnp::open(vm.clone()).unwrap()), vm: Arc::new(vm), add_vcpu }
    };
    let (ours, theirs) = (sequence(soft), sequence(kvm));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "the model, then KVM");
    }
    assert_eq!(ours.len(), theirs.len());
}

#[test]
fn asids_are_few_and_come_back() {
    let machine = Machine::with_asids(2);
    let init = |snp: &SoftSnp| snp.init(&Init::default()).map_err(|error| (error.errno, error.firmware));
    let (a, b, c) = (SoftSnp::on(&machine), SoftSnp::on(&machine), SoftSnp::on(&machine));
    assert_eq!((init(&a), init(&b)), (Ok(()), Ok(())));
    assert_ne!(a.asid(), b.asid());
    assert_eq!(init(&c), Err((Errno::EBUSY, FirmwareStatus::SUCCESS)));
    drop(a);
    assert_eq!(init(&c), Ok(()));
}
