//! A guest on KVM's own SNP code, in the lab: page state changes by register, lazy assignment, acceptance, and a shared
//! access to a private page, each as the library's user sees it and as the RMP has it.

#[path = "kit/emulation.rs"]
mod emulation;

use std::sync::Arc;

use cvm_memory::addr::Gpa;
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::hypervisor::{Exit, Vcpu as _};
use cvm_memory::memory::CvmMemory;
use cvm_memory_sev::commands::{Init, SnpCommands};
use cvm_memory_sev::ghcb::{Operation, msr};
use cvm_memory_sev::import::{Import, ImportList};
use cvm_memory_sev::kvm::KvmSnp;
use cvm_memory_sev::launch::{FinishOptions, Launch, StartOptions};
use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE, Vmsa};
use emulation::{Emulation, snp_vm};
use kvm_bindings::{kvm_regs, kvm_segment};

/// Where the lab's processors have the C-bit.
const C_BIT: u64 = 1 << 39;
const CODE: u64 = 0x6000;
const STACK_TOP: u64 = 0x8000;
/// Virtual addresses from here on are the same memory from zero, shared.
const SHARED: u64 = 0x20_0000;
/// The page that is converted.
const PAGE: u64 = 0x10_0000;

/// Long mode: the first 2 MiB private where they are, and shared 2 MiB higher; then the code.
fn image() -> Vec<u8> {
    let mut image = vec![0; 0x7000];
    let mut entry = |at: u64, value: u64| {
        let at = usize::try_from(at - 0x1000).unwrap();
        image[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    entry(0x1000, 0x2007 | C_BIT);
    entry(0x2000, 0x3007 | C_BIT);
    entry(0x3000, 0x4007 | C_BIT);
    entry(0x3008, 0x5007 | C_BIT);
    for page in 0..512 {
        entry(0x4000 + page * 8, page << 12 | 7 | C_BIT);
        entry(0x5000 + page * 8, page << 12 | 7);
    }
    let start = usize::try_from(CODE - 0x1000).unwrap();
    let code = code();
    image[start..start + code.len()].copy_from_slice(&code);
    image
}

/// In RDI and RBX the requests, in RSI the page.
fn code() -> Vec<u8> {
    // The value in RAX to the register of the GHCB, VMGEXIT, the answer to RAX.
    let ghcb: &[u8] = &[
        0x48, 0x89, 0xc2, // mov rdx, rax
        0x48, 0xc1, 0xea, 0x20, // shr rdx, 32
        0xb9, 0x30, 0x01, 0x01, 0xc0, // mov ecx, 0xc0010130
        0x0f, 0x30, // wrmsr
        0xf3, 0x0f, 0x01, 0xd9, // vmgexit
        0x0f, 0x32, // rdmsr
        0x48, 0xc1, 0xe2, 0x20, // shl rdx, 32
        0x89, 0xc0, // mov eax, eax
        0x48, 0x09, 0xd0, // or rax, rdx
        0xc3, // ret
    ];
    // A jump over the function, whose calls are relative.
    let mut code = vec![0xeb, u8::try_from(ghcb.len()).unwrap()];
    let target = i32::try_from(code.len()).unwrap();
    code.extend(ghcb);
    let call = |code: &mut Vec<u8>| {
        let next = i32::try_from(code.len()).unwrap() + 5;
        code.push(0xe8);
        code.extend((target - next).to_le_bytes());
    };
    code.extend([0x48, 0x89, 0xf8]); // mov rax, rdi
    call(&mut code);
    code.extend([0x49, 0x89, 0xc0]); // mov r8, rax
    code.extend([0xc7, 0x86, 0, 0, 0x20, 0, 0x55, 0, 0, 0]); // mov dword [rsi + SHARED], 0x55
    code.extend([0x48, 0x89, 0xd8]); // mov rax, rbx
    call(&mut code);
    code.extend([0x49, 0x89, 0xc1]); // mov r9, rax
    code.extend([0x48, 0x89, 0xf0, 0x31, 0xc9, 0xba, 1, 0, 0, 0]); // mov rax, rsi; xor ecx, ecx; mov edx, 1
    code.extend([0xf2, 0x0f, 0x01, 0xff]); // pvalidate
    code.extend([0x41, 0x89, 0xc2]); // mov r10d, eax
    code.extend([0xc7, 0x06, 0x77, 0, 0, 0]); // mov dword [rsi], 0x77
    code.extend([0x44, 0x8b, 0x1e]); // mov r11d, [rsi]
    code.extend([0xc7, 0x86, 0, 0, 0x20, 0, 0x66, 0, 0, 0]); // mov dword [rsi + SHARED], 0x66
    code.extend([0x4c, 0x89, 0x86, 8, 0, 0x20, 0]); // mov [rsi + SHARED + 8], r8
    code.extend([0x4c, 0x89, 0x8e, 16, 0, 0x20, 0]); // mov [rsi + SHARED + 16], r9
    code.extend([0x4c, 0x89, 0x96, 24, 0, 0x20, 0]); // mov [rsi + SHARED + 24], r10
    code.extend([0x4c, 0x89, 0x9e, 32, 0, 0x20, 0]); // mov [rsi + SHARED + 32], r11
    code.extend([0xb8, 0, 1, 0, 0]); // mov eax, 0x100: the guest gives up
    call(&mut code);
    code.push(0xf4);
    code
}

#[test]
fn there_and_back_again() {
    let Some(emulation) = Emulation::here() else { return };
    let before = emulation.counter("rmp_assigned");
    let Some(vm) = snp_vm() else { return };
    let commands: Arc<dyn SnpCommands> = Arc::new(KvmSnp::open(vm.clone()).unwrap());
    let launch = Launch::init(commands, &Init::default()).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = kvm_ioctls::Kvm::new().unwrap().get_supported_cpuid(256).unwrap();
    vcpu.fd().set_cpuid2(&cpuid).unwrap();
    let memory = Arc::new(CvmMemory::builder().ram(0, 4 << 20).build(Arc::new(vm)).unwrap());

    let mut sregs = vcpu.fd().get_sregs().unwrap();
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0031, 0x1000 | C_BIT, 0x620, 0x500);
    let code =
        kvm_segment { limit: u32::MAX, selector: 8, type_: 0xb, present: 1, s: 1, l: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
    (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (code, data, data, data);
    vcpu.fd().set_sregs(&sregs).unwrap();
    let request = |operation| msr::page_state_request(PAGE >> 12, operation);
    let regs = kvm_regs {
        rip: CODE,
        rsp: STACK_TOP,
        rflags: 2,
        rdi: request(Operation::Shared),
        rbx: request(Operation::Private),
        rsi: PAGE,
        ..Default::default()
    };
    vcpu.fd().set_regs(&regs).unwrap();

    let list: ImportList = [Import::normal(0x1000, &image()).unwrap()].into_iter().collect();
    let gosvw = [0x71; 16];
    let mut launch = launch.start(&StartOptions { gosvw, ..StartOptions::default() }).map_err(|(_, e)| e).unwrap();
    launch.import(&memory, &list, &mut |_| {}).unwrap();
    // Not what this vCPU starts from: the digest is of no interest here.
    let vmsas = Vmsa::of_all(1, 0, CpuSignature(0), SNP_ACTIVE);
    launch.finish(&mut [&mut vcpu], &vmsas, FinishOptions::default()).unwrap();
    let asid = emulation.guest(gosvw).0["asid"].clone();
    let state = || emulation.rmp_state(&asid, PAGE);

    let mut exits = VcpuExits::new(Arc::clone(&memory));
    let mut seen = Vec::new();
    for _ in 0..20 {
        let mut exit = vcpu.run().unwrap();
        match &exit {
            Exit::Hypercall(call) => seen.push(format!("hypercall {:x?}, {:?}", &call.args[..3], state())),
            Exit::MemoryFault(fault) => seen.push(format!("fault {:#x} {:#x}, {:?}", fault.gpa, fault.flags, state())),
            other => {
                seen.push(format!("{other:?}"));
                break;
            }
        }
        let action = exits.handle(&mut exit);
        assert!(
            matches!(action, Action::Resume(Handled::Converted { pages: 1 } | Handled::Materialised { .. })),
            "{action:?}"
        );
    }
    println!("{seen:#?}");
    assert_eq!(seen[0], "hypercall [100000, 1, 0], None", "to shared, by the register");
    assert_eq!(seen[1], "hypercall [100000, 1, 10], None", "back to private");
    // KVM assigns the page when it is accepted; the guest then writes it as shared.
    assert_eq!(seen[2], "fault 0x100000 0x0, Some(\"guest-valid\")");
    assert!(seen[3].contains("24"), "a system event: {}", seen[3]);
    assert_eq!(seen.len(), 4);
    assert_eq!(state(), None, "the conversion has freed the page");

    let word = |offset: u64| {
        let mut bytes = [0; 8];
        memory.read(Gpa(PAGE + offset), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    assert_eq!([0, 8, 16, 24, 32].map(word), [0x66, msr::page_state(true), msr::page_state(true), 0, 0x77]);
    drop((exits, memory, vcpu));
    emulation.assigned_falls_to(before);
}
