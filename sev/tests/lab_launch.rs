//! Launches on KVM's own SNP code, over the emulated firmware of the lab: its digest is the one predicted here.

#[path = "kit/emulation.rs"]
mod emulation;
mod kit;

use std::sync::Arc;

use cvm_memory::hypervisor::kvm::KvmVcpu;
use cvm_memory::memory::CvmMemory;
use cvm_memory_sev::commands::{
    CommandError, FirmwareStatus, IdBlock, Init, LaunchFinish, LaunchUpdate, SnpCommands, Source,
};
use cvm_memory_sev::cpuid::{CpuidFunction, CpuidTable};
use cvm_memory_sev::digest::{LaunchDigest, PageType};
use cvm_memory_sev::firmware::Ovmf;
use cvm_memory_sev::import::{Import, ImportList};
use cvm_memory_sev::kvm::{KvmSnp, set_registers};
use cvm_memory_sev::launch::{FinishError, FinishOptions, ImportError, Launch, New, Policy, StartOptions, Started};
use cvm_memory_sev::page::Page;
use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE, Vmsa};
use emulation::{Emulation, snp_vm};
use kit::{firmware, firmware_vectors, sha384};
use kvm_bindings::CpuId;
use nix::errno::Errno;

const MIB: u64 = 1 << 20;

/// A VM with memory at 0 and where firmware goes.
struct Machine {
    memory: CvmMemory,
    vcpus: Vec<KvmVcpu>,
    commands: Arc<KvmSnp>,
}

fn cpuid() -> CpuId {
    kvm_ioctls::Kvm::new().unwrap().get_supported_cpuid(256).unwrap()
}

fn machine(vcpus: u64) -> Option<(Machine, Launch<New>)> {
    let vm = snp_vm()?;
    let commands = Arc::new(KvmSnp::open(vm.clone()).unwrap());
    let launch = Launch::init(Arc::clone(&commands) as Arc<dyn SnpCommands>, &Init::default()).unwrap();
    let vcpus = (0..vcpus)
        .map(|id| {
            let vcpu = vm.create_vcpu(id).unwrap();
            vcpu.fd().set_cpuid2(&cpuid()).unwrap();
            vcpu
        })
        .collect();
    let builder = CvmMemory::builder().ram(0, 16 * MIB).ram(0xffc0_0000, 4 * MIB);
    let memory = builder.build(Arc::new(vm)).unwrap();
    Some((Machine { memory, vcpus, commands }, launch))
}

fn started(launch: Launch<New>, gosvw: u8) -> Launch<Started> {
    let options = StartOptions { gosvw: [gosvw; 16], ..StartOptions::default() };
    launch.start(&options).map_err(|(_, error)| error).unwrap()
}

fn vmsas(vcpus: u32) -> Vec<Vmsa> {
    of_this_host(Vmsa::of_all(vcpus, 0x0080_b004, CpuSignature::of_cpu_type("EPYC-v4").unwrap(), SNP_ACTIVE))
}

/// The lab's kernel is built without machine checks, which no kernel of a real host is.
fn of_this_host(vmsas: Vec<Vmsa>) -> Vec<Vmsa> {
    let machine_checks = std::fs::exists("/sys/devices/system/machinecheck").unwrap();
    vmsas.into_iter().map(|vmsa| vmsa.on_host(machine_checks)).collect()
}

impl Machine {
    fn finish(&mut self, launch: Launch<Started>, vmsas: &[Vmsa]) -> Result<LaunchDigest, FinishError> {
        for (vcpu, vmsa) in self.vcpus.iter().zip(vmsas) {
            set_registers(vcpu, vmsa).unwrap();
        }
        let mut vcpus: Vec<&mut KvmVcpu> = self.vcpus.iter_mut().collect();
        launch.finish(&mut vcpus, vmsas, FinishOptions::default()).map(|launched| launched.digest)
    }
}

fn mixed_list() -> ImportList {
    let noise: Vec<u8> = (0..5 * 4096_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect();
    let function = CpuidFunction { eax_in: 0, eax: 0x10, ..CpuidFunction::default() };
    [
        Import::normal(0xffff_b000, &noise),
        Import::zero(0x80_0000, 0x9000),
        Import::unmeasured(0x80_a000, &noise[..0x3000]),
        // 0x809000 is a hole: nothing is launched there.
        Import::secrets(0x80_d000),
        Import::shared(0x10_0000, &noise[0x1000..0x3000]),
        Import::cpuid(0x80_e000, CpuidTable::new(&[function]).unwrap()),
        Import::normal(0x80_f000, &[0; 0x1000]),
        Import::normal(0, &noise[0x2000..]),
    ]
    .into_iter()
    .collect::<Result<_, _>>()
    .unwrap()
}

/// Every digest of the firmware's, page by page, is ours.
fn compare(list: &ImportList, vmsas: &[Vmsa], updates: &[emulation::Line]) {
    let mut digest = LaunchDigest::INITIAL;
    let mut updates = updates.iter();
    let mut check = |page_type: PageType, gpa: u64, contents: &Page, digest: &LaunchDigest| {
        let update = updates.next().expect("as many updates as pages");
        assert_eq!(update["type"], page_type.to_string());
        assert_eq!(update["gpa"], format!("{gpa:#x}"));
        if page_type.measures_contents() {
            assert_eq!(update["contents"], sha384(&**contents), "contents of {page_type} page at {gpa:#x}");
        }
        assert_eq!(update["digest"], digest.to_string(), "after {page_type} page at {gpa:#x}");
    };
    for import in list {
        let Some(page_type) = import.page_type() else { continue };
        for (nr, gfn) in import.gfns().into_iter().enumerate() {
            let page = import.pages().get(nr).cloned().unwrap_or_default();
            digest.add(page_type, gfn, &page);
            check(page_type, gfn.start_byte(), &page, &digest);
        }
    }
    for vmsa in vmsas {
        digest.add_vmsa(vmsa.page());
        check(PageType::Vmsa, 0xffff_ffff_f000, vmsa.page(), &digest);
    }
    assert!(updates.next().is_none());
}

#[test]
fn every_page_type_and_the_save_areas() {
    let Some(emulation) = Emulation::here() else { return };
    let before = emulation.counter("rmp_assigned");
    let Some((mut machine, launch)) = machine(2) else { return };
    let mut launch = started(launch, 0x11);
    let (list, vmsas) = (mixed_list(), vmsas(2));
    let mut heard = Vec::new();
    launch.import(&machine.memory, &list, &mut |progress| heard.push((progress.done, progress.total))).unwrap();
    assert_eq!((heard.first(), heard.last()), (Some(&(0, 25)), Some(&(25, 25))));
    let predicted = launch.digest_with(&vmsas);
    assert_eq!(predicted, list.digest(&vmsas));
    assert_eq!(machine.finish(launch, &vmsas), Ok(predicted));

    let (guest, updates) = emulation.guest([0x11; 16]);
    compare(&list, &vmsas, &updates);
    assert_eq!((guest["state"].as_str(), guest["digest"].as_str()), ("running", predicted.to_string().as_str()));
    assert_eq!(guest["policy"], "0x30000");

    let state = |gpa| emulation.rmp_state(&guest["asid"], gpa);
    for import in list.iter().filter(|import| import.page_type().is_some()) {
        for gfn in import.gfns() {
            assert_eq!(state(gfn.start_byte()).as_deref(), Some("guest-valid"), "{import}");
        }
    }
    assert_eq!((state(0x80_9000), state(0x10_0000), state(0x81_0000)), (None, None, None));
    let mut shared = [0; 0x2000];
    machine.memory.read(cvm_memory::addr::Gpa(0x10_0000), &mut shared).unwrap();
    assert_eq!(Page::split(&shared), list.iter().find(|import| import.page_type().is_none()).unwrap().pages());

    drop(machine);
    emulation.assigned_falls_to(before);
}

#[test]
fn real_firmware() {
    let Some(emulation) = Emulation::here() else { return };
    let Some((mut machine, launch)) = machine(1) else { return };
    let image = firmware("bookworm-OVMF.fd");
    let ovmf = Ovmf::parse(&image).unwrap();
    let list = ovmf.import_list(&CpuidTable::default(), None).unwrap();
    let standard = ovmf.vmsas(1, CpuSignature::of_cpu_type("EPYC-v4").unwrap(), SNP_ACTIVE).unwrap();
    let vmsas = of_this_host(standard.clone());
    let mut launch = started(launch, 0x22);
    launch.import(&machine.memory, &list, &mut |_| {}).unwrap();
    let digest = machine.finish(launch, &vmsas).unwrap();
    let (guest, updates) = emulation.guest([0x22; 16]);
    assert_eq!(guest["digest"], digest.to_string());
    compare(&list, &vmsas, &updates);
    // Without the save area the firmware has what other programs compute for this file. The save area differs in that one
    // bit from the one that they assume.
    let vectors = firmware_vectors();
    let of_file = vectors.as_array().unwrap().iter().find(|vector| vector["sha256"] == kit::sha256(&image)).unwrap();
    assert_eq!(updates[511]["digest"], of_file["snp_ovmf_hash"].as_str().unwrap());
    let mut with_standard: [u8; 48] = [0; 48];
    for (at, byte) in with_standard.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&updates[updates.len() - 2]["digest"][2 * at..2 * at + 2], 16).unwrap();
    }
    let mut with_standard = LaunchDigest::new(with_standard);
    with_standard.add_vmsa(standard[0].page());
    assert_eq!(
        with_standard.to_string(),
        of_file["snp_launch_digest"]["EPYC-v4 vcpus=1 features=0x1"].as_str().unwrap()
    );
}

#[cfg(feature = "igvm")]
#[test]
fn an_igvm_file_with_its_own_save_area() {
    use cvm_memory_sev::igvm::{IgvmImage, Parameters};
    let Some(emulation) = Emulation::here() else { return };
    let Some((mut machine, launch)) = machine(1) else { return };
    let image = IgvmImage::parse(&firmware("trixie.igvm"), &Parameters::default()).unwrap();
    let vmsas = of_this_host(image.vmsas().to_vec());
    let mut launch = started(launch, 0x2a);
    launch.import(&machine.memory, image.import_list(), &mut |_| {}).unwrap();
    let digest = machine.finish(launch, &vmsas).unwrap();
    let (guest, updates) = emulation.guest([0x2a; 16]);
    compare(image.import_list(), &vmsas, &updates);
    assert_eq!(guest["digest"], digest.to_string());
}

#[test]
fn a_cpuid_page_is_corrected_once() {
    let Some(emulation) = Emulation::here() else { return };
    let Some((mut machine, launch)) = machine(1) else { return };
    let mut launch = started(launch, 0x33);
    let mut bad =
        CpuidTable::new(&[CpuidFunction { eax_in: 1, eax: 2, ..CpuidFunction::default() }]).unwrap().page().clone();
    bad[16 + 40] = 0xad; // reserved
    let list: ImportList =
        [Import::cpuid(0x80_e000, CpuidTable::from_page(bad.clone())).unwrap()].into_iter().collect();
    launch.import(&machine.memory, &list, &mut |_| {}).unwrap();
    let digest = launch.digest();
    let mut vcpus: Vec<&mut KvmVcpu> = machine.vcpus.iter_mut().collect();
    set_registers(vcpus[0], &vmsas(1)[0]).unwrap();
    let launched = launch.finish(&mut vcpus, &vmsas(1), FinishOptions::default()).unwrap();
    bad[16 + 40] = 0;
    assert_eq!(launched.corrected.len(), 1);
    assert_eq!((launched.corrected[0].gpa, launched.corrected[0].table.page()), (0x80_e000, &bad));
    let (_, updates) = emulation.guest([0x33; 16]);
    assert_eq!(updates[0]["digest"], digest.to_string());

    // More than the firmware takes: it has nothing better to offer.
    let Some((machine, launch)) = self::machine(0) else { return };
    let mut launch = started(launch, 0x34);
    let mut page = Page::ZERO;
    page[0] = 65;
    let list: ImportList = [Import::cpuid(0, CpuidTable::from_page(page)).unwrap()].into_iter().collect();
    let error = launch.import(&machine.memory, &list, &mut |_| {}).unwrap_err();
    assert!(
        matches!(
            error,
            ImportError::Command {
                gpa: 0,
                page_type: PageType::Cpuid,
                error: CommandError { firmware: FirmwareStatus::INVALID_PARAM, errno: Errno::EIO, .. }
            }
        ),
        "{error:?}"
    );
    assert_eq!(launch.digest(), LaunchDigest::INITIAL);
}

#[test]
fn failures_in_the_middle_are_exact() {
    let Some(emulation) = Emulation::here() else { return };
    let Some((mut machine, launch)) = machine(1) else { return };
    let mut launch = started(launch, 0x44);
    let data: Vec<u8> = (1..=8_u8).flat_map(|byte| [byte; 4096]).collect();
    let list = |gpa, data: &[u8]| [Import::normal(gpa, data).unwrap()].into_iter().collect::<ImportList>();

    // The third page fails in the firmware: two pages are launched, then the error with its code.
    emulation.inject("cmd 0xa1 skip 2 count 2 error 0x17");
    let error = launch.import(&machine.memory, &list(0x10_0000, &data), &mut |_| {}).unwrap_err();
    let ImportError::Command { gpa: 0x10_2000, error, .. } = error else { panic!("{error:?}") };
    assert_eq!((error.errno, error.firmware), (Errno::EIO, FirmwareStatus::RESOURCE_LIMIT));
    assert_eq!(error.to_string(), "KVM_SEV_SNP_LAUNCH_UPDATE, firmware status 0x17 (resource limit)");
    emulation.inject("clear");
    assert_eq!(launch.digest(), list(0x10_0000, &data[..0x2000]).digest(&[]));
    // The same list again is refused before anything happens; the rest of it goes on.
    let again = launch.import(&machine.memory, &list(0x10_0000, &data), &mut |_| {}).unwrap_err();
    assert!(matches!(again, ImportError::Again { gfns } if gfns.pages() == 2 && gfns.start_byte() == 0x10_0000));
    launch.import(&machine.memory, &list(0x10_2000, &data[0x2000..]), &mut |_| {}).unwrap();
    assert_eq!(launch.digest(), list(0x10_0000, &data).digest(&[]));

    // A failed RMPUPDATE looks like a signal: EIO, firmware not called. The next try succeeds.
    emulation.inject("rmpupdate 1 skip 0 count 1 error 2");
    launch.import(&machine.memory, &list(0x20_0000, &data), &mut |_| {}).unwrap();
    // If it fails for good, it is given up.
    emulation.inject("rmpupdate 1 skip 0 count 100 error 2");
    let error = launch.import(&machine.memory, &list(0x30_0000, &data), &mut |_| {}).unwrap_err();
    assert!(
        matches!(error, ImportError::Command { gpa: 0x30_0000, error, .. } if error.firmware == FirmwareStatus::SUCCESS)
    );
    emulation.inject("clear");

    let vmsas = vmsas(1);
    let digest = machine.finish(launch, &vmsas).unwrap();
    assert_eq!(emulation.guest([0x44; 16]).0["digest"], digest.to_string());
}

#[test]
fn the_commands_themselves() {
    let Some(emulation) = Emulation::here() else { return };
    let before = emulation.counter("rmp_assigned");
    let Some((machine, launch)) = machine(1) else { return };
    let commands = &machine.commands;
    let pages = Page::split(&[7; 0x4000]);
    let errno = |result: Result<(), CommandError>| result.map_err(|error| (error.errno, error.firmware.0));
    let update = |gfn_start, len, page_type: u8, flags| {
        let mut update = LaunchUpdate { gfn_start, len, page_type, flags };
        let result = commands.launch_update(&mut update, Source::Pages(&pages));
        (errno(result), update.gfn_start, update.len)
    };
    assert_eq!(errno(commands.init(&Init::default())), Err((Errno::EPERM, 0)), "initialised already");
    assert_eq!(update(0, 0x1000, 1, 0).0, Err((Errno::EINVAL, 0)), "not started");
    // Policies that the firmware or KVM refuses may be corrected.
    let (launch, error) =
        launch.start(&StartOptions { policy: Policy::new(0x3_ffff).unwrap(), gosvw: [0x55; 16] }).unwrap_err();
    assert_eq!(error.firmware, FirmwareStatus::POLICY_FAILURE);
    let launch = started(launch, 0x55);

    for (gfn, len, page_type, flags) in [
        (0, 0, 1, 0),
        (0, 0x800, 1, 0),
        (0, 0x1000, 2, 0),
        (0, 0x1000, 0, 0),
        (0, 0x1000, 1, 1),
        (0x1000, 0x1000, 1, 0),
    ] {
        assert_eq!(
            update(gfn, len, page_type, flags),
            (Err((Errno::EINVAL, 0)), gfn, len),
            "{gfn:#x} {len:#x} {page_type} {flags}"
        );
    }
    assert_eq!(update(0, 0x5000, 1, 0).0, Err((Errno::EFAULT, 0)), "the source is shorter");
    // Declared private, but KVM has not been told: not private.
    assert_eq!(update(4, 0x1000, 1, 0), (Err((Errno::EIO, 0)), 4, 0x1000));
    let private = cvm_memory::addr::GfnRange::from_bytes(0x4000, 0x2000).unwrap();
    machine.memory.converter().materialise(private).unwrap().converted().unwrap();
    // The rest of its block is private now too, except what a guest shares.
    let shared = cvm_memory::convert::Request {
        range: cvm_memory::addr::GfnRange::from_bytes(0x6000, 0x1000).unwrap(),
        to: cvm_memory::convert::State::Shared,
    };
    machine.memory.convert(&shared).unwrap().converted().unwrap();
    assert_eq!(update(4, 0x4000, 1, 0), (Ok(()), 6, 0x2000), "two of four");
    assert_eq!(update(6, 0x1000, 1, 0).0, Err((Errno::EIO, 0)));
    assert_eq!(update(4, 0x1000, 1, 0).0, Err((Errno::EIO, 0)), "launched already");

    // FINISH after FINISH, UPDATE after FINISH.
    set_registers(&machine.vcpus[0], &vmsas(1)[0]).unwrap();
    commands.launch_finish(&LaunchFinish::default()).unwrap();
    assert_eq!(errno(commands.launch_finish(&LaunchFinish::default())), Err((Errno::EINVAL, 0)));
    machine
        .memory
        .converter()
        .materialise(cvm_memory::addr::GfnRange::from_bytes(0x8000, 0x1000).unwrap())
        .unwrap()
        .converted()
        .unwrap();
    assert_eq!(update(8, 0x1000, 1, 0).0, Err((Errno::EIO, FirmwareStatus::INVALID_GUEST_STATE.0)));
    drop((launch, machine));
    emulation.assigned_falls_to(before);
}

#[test]
fn finishing() {
    let Some(emulation) = Emulation::here() else { return };
    let before = emulation.counter("rmp_assigned");
    // Not what was expected: KVM is not asked.
    let Some((mut machine, launch)) = machine(1) else { return };
    let launch = started(launch, 0x61);
    let mut vcpus: Vec<&mut KvmVcpu> = machine.vcpus.iter_mut().collect();
    let wrong = FinishOptions { expected: Some(LaunchDigest::new([9; 48])), ..FinishOptions::default() };
    let error = launch.finish(&mut vcpus, &vmsas(1), wrong).unwrap_err();
    assert!(matches!(error, FinishError::Digest { .. }));
    assert_eq!(emulation.guest([0x61; 16]).0["state"], "launch");
    drop(machine);

    // An ID block that vouches for the digest; and one that does not.
    for (gosvw, good) in [(0x62, true), (0x63, false)] {
        let Some((mut machine, launch)) = self::machine(1) else { return };
        let mut launch = started(launch, gosvw);
        launch.import(&machine.memory, &mixed_list(), &mut |_| {}).unwrap();
        let vmsas = vmsas(1);
        set_registers(&machine.vcpus[0], &vmsas[0]).unwrap();
        let digest = launch.digest_with(&vmsas);
        let mut block = [0; 96];
        block[..48].copy_from_slice(digest.bytes());
        block[0] ^= u8::from(!good);
        block[80] = 1; // version
        block[88..].copy_from_slice(&0x3_0000_u64.to_le_bytes());
        let id_block = Some(IdBlock { block, auth: Box::default(), author_key: false });
        let mut vcpus: Vec<&mut KvmVcpu> = machine.vcpus.iter_mut().collect();
        let options = FinishOptions { id_block, host_data: [gosvw; 32], ..FinishOptions::default() };
        let result = launch.finish(&mut vcpus, &vmsas, options);
        let (guest, _) = emulation.guest([gosvw; 16]);
        if good {
            assert_eq!(result.unwrap().digest.to_string(), guest["digest"]);
            assert_eq!(guest["host_data"], kit::hex(&[gosvw; 32]));
        } else {
            let Err(FinishError::Command(error)) = result else { panic!("{result:?}") };
            assert_eq!(error.firmware, FirmwareStatus::BAD_MEASUREMENT);
            // The save area has been measured: there is no second time.
            let again = machine.commands.launch_finish(&LaunchFinish::default()).unwrap_err();
            assert_eq!(again.errno, Errno::EINVAL);
        }
        drop(machine);
    }
    emulation.assigned_falls_to(before);
}
