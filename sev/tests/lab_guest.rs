//! A guest on KVM's own SNP code, in the lab: page state changes by register, lazy assignment, acceptance, and a shared
//! access to a private page, each as the library's user sees it and as the RMP has it.

#[path = "kit/emulation.rs"]
mod emulation;

use std::sync::Arc;

use cvm_memory::addr::{GfnRange, Gpa};
use cvm_memory::convert::{Request, State};
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::hypervisor::kvm::KvmVcpu;
use cvm_memory::hypervisor::{Exit, Vcpu as _};
use cvm_memory::memory::CvmMemory;
use cvm_memory_sev::commands::{Init, SnpCommands};
use cvm_memory_sev::ghcb::page::{
    EXIT_CODE, EXIT_INFO_1, EXIT_INFO_2, EXIT_PSC, SCRATCH, SHARED_BUFFER, SHARED_BUFFER_BYTES, VALID_BITMAP, VERSION,
};
use cvm_memory_sev::ghcb::psc::{Buffer, Cursor, Entry, Header, Next, max_entries};
use cvm_memory_sev::ghcb::{Operation, msr};
use cvm_memory_sev::import::{Import, ImportList};
use cvm_memory_sev::kvm::KvmSnp;
use cvm_memory_sev::launch::{FinishOptions, Launch, StartOptions};
use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE, Vmsa};
use cvm_memory_testkit::Numbers;
use emulation::{Emulation, snp_vm};
use kvm_bindings::{kvm_regs, kvm_segment};

/// Where the lab's processors have the C-bit.
const C_BIT: u64 = 1 << 39;
const CODE: u64 = 0x6000;
const STACK_TOP: u64 = 0x8000;
/// The page that is converted, or the GHCB.
const PAGE: u64 = 0x10_0000;

/// Long mode: the first 2 MiB private where they are, and shared 2 MiB higher (SHARED, below); then the code.
fn image(code: &[u8]) -> Vec<u8> {
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
    image[start..start + code.len()].copy_from_slice(code);
    image
}

/// Code that starts with a function, and calls of it.
struct Code(Vec<u8>);

impl Code {
    fn new() -> Self {
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
        code.extend(ghcb);
        Self(code)
    }

    fn add(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    fn call(&mut self) {
        let next = i32::try_from(self.0.len()).unwrap() + 5;
        self.0.push(0xe8);
        self.0.extend((2 - next).to_le_bytes());
    }

    /// The guest gives up: a system event.
    fn end(mut self) -> Vec<u8> {
        self.add(&[0xb8, 0, 1, 0, 0]); // mov eax, 0x100
        self.call();
        self.0.push(0xf4);
        self.0
    }
}

/// In RDI and RBX the requests, in RSI the page.
fn convert_twice() -> Vec<u8> {
    let mut code = Code::new();
    code.add(&[0x48, 0x89, 0xf8]); // mov rax, rdi
    code.call();
    code.add(&[0x49, 0x89, 0xc0]); // mov r8, rax
    code.add(&[0xc7, 0x86, 0, 0, 0x20, 0, 0x55, 0, 0, 0]); // mov dword [rsi + SHARED], 0x55
    code.add(&[0x48, 0x89, 0xd8]); // mov rax, rbx
    code.call();
    code.add(&[0x49, 0x89, 0xc1]); // mov r9, rax
    code.add(&[0x48, 0x89, 0xf0, 0x31, 0xc9, 0xba, 1, 0, 0, 0]); // mov rax, rsi; xor ecx, ecx; mov edx, 1
    code.add(&[0xf2, 0x0f, 0x01, 0xff]); // pvalidate
    code.add(&[0x41, 0x89, 0xc2]); // mov r10d, eax
    code.add(&[0xc7, 0x06, 0x77, 0, 0, 0]); // mov dword [rsi], 0x77
    code.add(&[0x44, 0x8b, 0x1e]); // mov r11d, [rsi]
    code.add(&[0xc7, 0x86, 0, 0, 0x20, 0, 0x66, 0, 0, 0]); // mov dword [rsi + SHARED], 0x66
    code.add(&[0x4c, 0x89, 0x86, 8, 0, 0x20, 0]); // mov [rsi + SHARED + 8], r8
    code.add(&[0x4c, 0x89, 0x8e, 16, 0, 0x20, 0]); // mov [rsi + SHARED + 16], r9
    code.add(&[0x4c, 0x89, 0x96, 24, 0, 0x20, 0]); // mov [rsi + SHARED + 24], r10
    code.add(&[0x4c, 0x89, 0x9e, 32, 0, 0x20, 0]); // mov [rsi + SHARED + 32], r11
    code.end()
}

/// In RDI the request to register the GHCB page, in RSI that page, which holds a request.
fn ask_by_page() -> Vec<u8> {
    let mut code = Code::new();
    code.add(&[0x48, 0x89, 0xf8]); // mov rax, rdi
    code.call();
    code.add(&[0x48, 0x89, 0xf0]); // mov rax, rsi
    code.call();
    code.end()
}

/// A VM that is launched with `code`, and its only vCPU.
fn launched(
    emulation: &Emulation,
    code: &[u8],
    rdi: u64,
    rbx: u64,
    gosvw: u8,
) -> Option<(Arc<CvmMemory>, KvmVcpu, String)> {
    let vm = snp_vm()?;
    let commands: Arc<dyn SnpCommands> = Arc::new(KvmSnp::open(vm.clone()).unwrap());
    let launch = Launch::init(commands, &Init::default()).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = kvm_ioctls::Kvm::new().unwrap().get_supported_cpuid(256).unwrap();
    vcpu.fd().set_cpuid2(&cpuid).unwrap();
    let memory = Arc::new(CvmMemory::builder().ram(0, 4 << 20).build(Arc::new(vm)).unwrap());

    let mut sregs = vcpu.fd().get_sregs().unwrap();
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0031, 0x1000 | C_BIT, 0x620, 0x500);
    let code_segment =
        kvm_segment { limit: u32::MAX, selector: 8, type_: 0xb, present: 1, s: 1, l: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code_segment };
    (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (code_segment, data, data, data);
    vcpu.fd().set_sregs(&sregs).unwrap();
    let regs = kvm_regs { rip: CODE, rsp: STACK_TOP, rflags: 2, rdi, rbx, rsi: PAGE, ..Default::default() };
    vcpu.fd().set_regs(&regs).unwrap();

    let list: ImportList = [Import::normal(0x1000, &image(code)).unwrap()].into_iter().collect();
    let gosvw = [gosvw; 16];
    let mut launch = launch.start(&StartOptions { gosvw, ..StartOptions::default() }).map_err(|(_, e)| e).unwrap();
    launch.import(&memory, &list, &mut |_| {}).unwrap();
    // Not what this vCPU starts from: the digest is of no interest here.
    let vmsas = Vmsa::of_all(1, 0, CpuSignature(0), SNP_ACTIVE);
    launch.finish(&mut [&mut vcpu], &vmsas, FinishOptions::default()).unwrap();
    let asid = emulation.guest(gosvw).0["asid"].clone();
    Some((memory, vcpu, asid))
}

#[test]
fn there_and_back_again() {
    let Some(emulation) = Emulation::here() else { return };
    let before = emulation.counter("rmp_assigned");
    let request = |operation| msr::page_state_request(PAGE >> 12, operation);
    let (to_shared, to_private) = (request(Operation::Shared), request(Operation::Private));
    let Some((memory, mut vcpu, asid)) = launched(&emulation, &convert_twice(), to_shared, to_private, 0x71) else {
        return;
    };
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

/// A buffer in memory of ours, for the model of the protocol.
struct Memory(Vec<u64>);

impl Buffer for Memory {
    type Error = std::convert::Infallible;

    fn read(&mut self, offset: u64) -> Result<u64, Self::Error> {
        Ok(self.0[usize::try_from(offset / 8).unwrap()])
    }

    fn write(&mut self, offset: u64, value: u64) -> Result<(), Self::Error> {
        self.0[usize::try_from(offset / 8).unwrap()] = value;
        Ok(())
    }
}

/// Whole buffers: KVM asks userspace for what the model asks for, and leaves in the buffer what the model leaves.
#[test]
fn buffers_as_the_model_works_them_off() {
    let Some(emulation) = Emulation::here() else { return };
    let private = |gfn, large| Entry::new(gfn, Operation::Private, large);
    let shared = |gfn, large| Entry::new(gfn, Operation::Shared, large);
    let begun = Entry { cur_page: 500, ..private(512, true) };
    let most: Vec<Entry> = (0..253).map(|nr| private(nr * 512, true)).collect();
    let mut buffers: Vec<(u16, u16, u64, Vec<Entry>)> = vec![
        (0, 3, 0, vec![private(8, false), private(9, false), shared(10, false), shared(12, false)]),
        (0, 2, 0, vec![shared(512, true), shared(1024, true), shared(1536, false)]),
        (1, 2, 0, vec![shared(512, true), Entry { cur_page: 1, ..shared(9, false) }, shared(11, false)]),
        (3, 2, 0, vec![shared(512, true), shared(9, false), shared(11, false)]),
        (0, 252, 0, most.clone()),
        (0, 253, 0, most),
        // Begun, and followed by what might be taken for its neighbour.
        (0, 1, 0, vec![begun, private(524, false)]),
        (0, 1, 0, vec![begun, private(1024, false)]),
        (0, 1, 0, vec![begun, private(524, true)]),
        (0, 1, 0, vec![private(8, false), Entry { cur_page: 2, ..private(9, false) }]),
        (0, 1, 0, vec![private(8, false), private(513, true)]),
        (
            0,
            2,
            0,
            vec![
                Entry { operation: 3, ..private(512, true) },
                Entry { operation: 0, ..private(8, false) },
                shared(9, false),
            ],
        ),
        (0, 1, 22, vec![private(8, false), shared(9, false)]),
    ];
    // And random ones, of few frames, so that neighbours meet.
    let mut numbers = Numbers(5);
    let mut random = |bound| numbers.below(bound);
    for _ in 0..40 {
        let mut gfn = 512 * random(4);
        let entries: Vec<Entry> = (0..1 + random(12))
            .map(|_| {
                let large = random(3) == 0;
                let operation = if random(8) == 0 { 3 } else { 1 + u8::try_from(random(2)).unwrap() };
                let cur_page = [0, 0, 0, 0, 0, 1, 512, u16::try_from(random(514)).unwrap()];
                let entry = Entry { cur_page: cur_page[usize::try_from(random(8)).unwrap()], gfn, operation, large };
                gfn = if random(4) == 0 { 512 * random(4) } else { gfn + if large { 512 } else { 1 } };
                entry
            })
            .collect();
        let end = u16::try_from(entries.len() - 1).unwrap();
        buffers.push((u16::try_from(random(2)).unwrap(), end, 0, entries));
    }
    for (nr, (cur_entry, end_entry, answer, entries)) in (0x80..).zip(buffers) {
        let header = Header { cur_entry, end_entry };
        // What is reserved is not looked at, and stays. Short buffers are somewhere, and not aligned.
        let first = header.raw() | 0xdead_beef << 32;
        let words: Vec<u64> = [first].into_iter().chain(entries.iter().map(|entry| entry.raw())).collect();
        let skip = if entries.len() < 16 { u64::from(nr) * 5 } else { 0 };
        let buffer = SHARED_BUFFER + skip;
        let mut model = Memory(words.clone());
        model.0.resize(if skip == 0 { 254 } else { 16 }, 0);
        let (mut cursor, mut expected) = (Cursor::new(max_entries(SHARED_BUFFER_BYTES - skip)), Vec::new());
        let Ok(mut next) = cursor.next(&mut model);
        let completion = loop {
            match next {
                Next::Finished(completion) => break completion.raw(),
                Next::Exit(change) => expected.push(change.args()),
            }
            next = match cursor.complete(&mut model, answer) {
                Ok(next) => next,
            };
        };

        let register = msr::register_request(PAGE >> 12);
        let Some((memory, mut vcpu, _)) = launched(&emulation, &ask_by_page(), register, 0, nr) else { return };
        let page = GfnRange::from_bytes(PAGE, 0x1000).unwrap();
        memory.convert(&Request { range: page, to: State::Shared }).unwrap().converted().unwrap();
        let put = |offset: u64, value: u64| memory.write(Gpa(PAGE + offset), &value.to_le_bytes()).unwrap();
        for (nr, word) in (0..).zip(&words) {
            put(buffer + nr * 8, *word);
        }
        // Version 2 of the protocol; exit code, both infos and the scratch area are valid.
        memory.write(Gpa(PAGE + VERSION), &2_u16.to_le_bytes()).unwrap();
        memory.write(Gpa(PAGE + VALID_BITMAP + 14), &[0x3c]).unwrap();
        for (offset, value) in [(EXIT_CODE, EXIT_PSC), (SCRATCH, PAGE + buffer)] {
            put(offset, value);
        }
        let mut seen = Vec::new();
        loop {
            match vcpu.run().unwrap() {
                Exit::Hypercall(call) => {
                    seen.push(call.args);
                    *call.ret = answer;
                }
                Exit::Other(Some(24)) => break,
                other => panic!("{other:?}"),
            }
        }
        let word = |offset: u64| {
            let mut bytes = [0; 8];
            memory.read(Gpa(PAGE + offset), &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        assert_eq!(seen, expected, "exits of {header:?} {entries:?}");
        assert_eq!([word(EXIT_INFO_1), word(EXIT_INFO_2)], [0, completion], "{header:?} {entries:?}");
        let after: Vec<u64> = (0..).map(|nr| word(buffer + nr * 8)).take(model.0.len()).collect();
        assert_eq!(after, model.0, "{header:?} {entries:?}");
    }
}
