//! 64-bit mode, with paging: reaches every guest physical address.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::Placement;
use super::mode::{Cpu, Mode, Step};
use super::support::{EXCHANGE, STACK_TOP, STUBS, Support, TABLES};
use super::tables::{SIZE, SPAN, Tables};

// The stubs. All begin with a reload of CR3. A stale translation would do no harm, as every one there ever is says the same;
// but a processor may also remember where a table is, and after a reset of the pool another one is there. (An emulated
// processor may not, so no test in the lab would miss the reload.)
const COPY: u64 = 0x00;
const FILL: u64 = 0x10;
const CHECK: u64 = 0x20;
const CALL: u64 = 0x30;
const VMCALL: u64 = 0x40;
const VMMCALL: u64 = 0x50;
/// Handles page faults by trying again. Everything a stub touches is mapped, so there is none to be had; but a processor
/// that is itself emulated (QEMU's TCG with several threads) raises one now and then for a page that is mapped.
const PAGE_FAULT: u64 = 0x60;
/// Moves of 1, 2, 4 and 8 bytes, each one instruction to read and one to write.
const MOVE: [u64; 4] = [0x70, 0x80, 0x90, 0xa0];
/// Null, code, data: what returning from a fault reloads.
const GDT: u64 = 0x100;
const DESCRIPTORS: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Up to vector 14, the page fault; the gates below it are not present.
const IDT: u64 = 0x200;
const PAGE_FAULT_VECTOR: u64 = 14;

const CODE: [(u64, &[u8]); 11] = [
    // mov %r8,%cr3; rep movsb (%rsi),(%rdi); hlt
    (COPY, &[0x41, 0x0f, 0x22, 0xd8, 0xf3, 0xa4, 0xf4]),
    // mov %r8,%cr3; rep stosb %al,(%rdi); hlt
    (FILL, &[0x41, 0x0f, 0x22, 0xd8, 0xf3, 0xaa, 0xf4]),
    // mov %r8,%cr3; repe scasb (%rdi),%al; hlt
    (CHECK, &[0x41, 0x0f, 0x22, 0xd8, 0xf3, 0xae, 0xf4]),
    // mov %r8,%cr3; call *%rdi; hlt
    (CALL, &[0x41, 0x0f, 0x22, 0xd8, 0xff, 0xd7, 0xf4]),
    // mov %r8,%cr3; vmcall; hlt
    (VMCALL, &[0x41, 0x0f, 0x22, 0xd8, 0x0f, 0x01, 0xc1, 0xf4]),
    // mov %r8,%cr3; vmmcall; hlt
    (VMMCALL, &[0x41, 0x0f, 0x22, 0xd8, 0x0f, 0x01, 0xd9, 0xf4]),
    // mov %r8,%cr3; mov (%rsi),%al; mov %al,(%rdi); hlt; and with %ax, %eax, %rax
    (MOVE[0], &[0x41, 0x0f, 0x22, 0xd8, 0x8a, 0x06, 0x88, 0x07, 0xf4]),
    (MOVE[1], &[0x41, 0x0f, 0x22, 0xd8, 0x66, 0x8b, 0x06, 0x66, 0x89, 0x07, 0xf4]),
    (MOVE[2], &[0x41, 0x0f, 0x22, 0xd8, 0x8b, 0x06, 0x89, 0x07, 0xf4]),
    (MOVE[3], &[0x41, 0x0f, 0x22, 0xd8, 0x48, 0x8b, 0x06, 0x48, 0x89, 0x07, 0xf4]),
    // add $8,%rsp (the error code); mov %r8,%cr3; iretq
    (PAGE_FAULT, &[0x48, 0x83, 0xc4, 0x08, 0x41, 0x0f, 0x22, 0xd8, 0x48, 0xcf]),
];

/// A guest in 64-bit mode.
#[derive(Debug)]
pub struct LongMode {
    cpu: Cpu,
    tables: Tables,
}

/// Where guests live if nobody says.
pub(crate) fn place(slots: u64, vcpu: u64) -> Placement {
    // Right below 4 GiB there are firmware and interrupt controllers; this is the hole for 32-bit PCI devices.
    Placement { slot: super::high_slot(slots, vcpu), gpa: 0xf000_0000 + vcpu * 0x10_0000 }
}

impl Mode for LongMode {
    const SIZE: u64 = TABLES + SIZE;
    const CHUNK: u64 = SPAN;
    /// `ret`
    const RETURN: &'static [u8] = &[0xc3];

    fn place(slots: u64, vcpu: u64) -> Placement {
        place(slots, vcpu)
    }

    fn new(support: &Support, cpu: Cpu) -> Self {
        for (offset, code) in CODE {
            support.write(STUBS + offset, code);
        }
        for (index, descriptor) in (0..).zip(DESCRIPTORS) {
            support.write_u64(GDT + index * 8, descriptor);
        }
        // An interrupt gate, present, of 64 bits, to the code segment.
        let handler = support.gpa(STUBS + PAGE_FAULT);
        let gate = IDT + PAGE_FAULT_VECTOR * 16;
        support.write_u64(gate, (handler & 0xffff) | 0x08 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48);
        support.write_u64(gate + 8, handler >> 32);
        Self { cpu, tables: Tables::new(support) }
    }

    fn limit(&self) -> u64 {
        // Virtual addresses are positive ones.
        1 << self.cpu.physical_bits.min(47)
    }

    fn sregs(&self, support: &Support, sregs: &mut kvm_sregs, _: &Step) {
        // Accessed code and data segments, flat, present, for ring 0, with 4 KiB granularity.
        let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
        let data = kvm_segment { selector: 0x10, type_: 0b0011, db: 1, ..flat };
        sregs.cs = kvm_segment { selector: 0x08, type_: 0b1011, l: 1, ..flat };
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.gdt = kvm_dtable { base: support.gpa(GDT), limit: 8 * 3 - 1, ..Default::default() };
        sregs.idt = kvm_dtable { base: support.gpa(IDT), limit: 16 * 15 - 1, ..Default::default() };
        sregs.cr0 = 0x8000_0031; // PG, NE, ET, PE
        sregs.cr3 = support.gpa(TABLES);
        sregs.cr4 = 0x20; // PAE
        sregs.efer = 0x500; // LMA, LME
    }

    fn regs(&mut self, support: &Support, step: &Step) -> kvm_regs {
        if let Some((gpa, len)) = step.target() {
            self.tables.map(support, gpa, len);
        }
        let exchange = support.gpa(EXCHANGE);
        let (stub, regs) = match *step {
            Step::In { gpa, len } => (copy(len), kvm_regs { rsi: gpa, rdi: exchange, rcx: len, ..Default::default() }),
            Step::Out { gpa, len } => (copy(len), kvm_regs { rsi: exchange, rdi: gpa, rcx: len, ..Default::default() }),
            Step::Fill { gpa, len, byte } => {
                (FILL, kvm_regs { rax: byte.into(), rdi: gpa, rcx: len, ..Default::default() })
            }
            Step::Check { gpa, len, byte } => {
                (CHECK, kvm_regs { rax: byte.into(), rdi: gpa, rcx: len, ..Default::default() })
            }
            Step::Fetch { gpa } => (CALL, kvm_regs { rdi: gpa, ..Default::default() }),
            Step::Hypercall { nr, args: [rbx, rcx, rdx, rsi] } => {
                let stub = if self.cpu.vmmcall { VMMCALL } else { VMCALL };
                (stub, kvm_regs { rax: nr, rbx, rcx, rdx, rsi, ..Default::default() })
            }
        };
        kvm_regs {
            rip: support.gpa(STUBS + stub),
            rsp: support.gpa(STACK_TOP),
            r8: support.gpa(TABLES),
            rflags: 0x2,
            ..regs
        }
    }
}

/// The stub that copies `len` bytes.
const fn copy(len: u64) -> u64 {
    match len {
        1 => MOVE[0],
        2 => MOVE[1],
        4 => MOVE[2],
        8 => MOVE[3],
        _ => COPY,
    }
}
