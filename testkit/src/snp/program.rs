//! What is launched: a program in private memory that does as it is told, with page tables, a handler for `#VC`, a stack for
//! each vCPU, and the save areas that vCPUs start with.
//!
//! Virtual addresses below 512 GiB are private memory at the same guest physical address; 512 GiB higher is the same memory
//! shared. The mailbox of a vCPU, in shared memory:
//!
//! | offset | what |
//! |---|---|
//! | 0x00 | the number of the request, written last by the host |
//! | 0x08 | what to do |
//! | 0x10 | RAX, RCX, RDX, RSI, RDI: operands |
//! | 0x38 | the number of the request that is done |
//! | 0x40 | RAX and carry afterwards |
//! | 0x50 | the error code of `#VC`, if there was one instead; else zero |
//!
//! It waits, and says that it is done, by the request for a reset hold (`0x006` of the GHCB register): an exit that needs no
//! GHCB page, leaves everything as it is, and goes on with the next run.
#![allow(unsafe_code, reason = "the program is assembled into this one, and read as bytes")]

use cvm_memory_sev::page::Page;
use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE, Vmsa, VmsaOptions};

/// `KVM_EXIT_AP_RESET_HOLD`: the program waits.
pub const WAITS: u32 = 32;

/// Virtual addresses from here on are shared memory.
pub const SHARED: u64 = 1 << 39;
/// Guest physical addresses that the program can reach.
pub const LIMIT: u64 = 1 << 39;

pub(super) mod mailbox {
    pub const REQUEST: u64 = 0x00;
    pub const WHAT: u64 = 0x08;
    pub const OPERANDS: u64 = 0x10;
    pub const DONE: u64 = 0x38;
    pub const RAX: u64 = 0x40;
    pub const CARRY: u64 = 0x48;
    pub const EXCEPTION: u64 = 0x50;
}

/// What the program can be told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Do {
    /// `rep movsb`
    CopyBytes = 1,
    /// `rep movsq`
    CopyWords = 2,
    /// Calls the code at RDI.
    Call = 3,
    /// PVALIDATE of RAX, ECX, EDX.
    Pvalidate = 4,
    /// RMPADJUST of RAX, RCX, RDX.
    Rmpadjust = 5,
    /// VMGEXIT with RAX in the register of the GHCB.
    Vmgexit = 6,
}

// R15: the mailbox. R14: the top of the stack. R12: the number of the request in hand.
core::arch::global_asm!(
    ".pushsection .rodata",
    "snp_program:",
    "2:",
    "mov ecx, 0xc0010130",
    "mov eax, 6",
    "xor edx, edx",
    "wrmsr",
    "rep vmmcall",
    "mov r12, [r15]",
    "mov rbx, [r15 + 0x08]",
    "mov rax, [r15 + 0x10]",
    "mov rcx, [r15 + 0x18]",
    "mov rdx, [r15 + 0x20]",
    "mov rsi, [r15 + 0x28]",
    "mov rdi, [r15 + 0x30]",
    "cmp rbx, 1",
    "je 3f",
    "cmp rbx, 2",
    "je 4f",
    "cmp rbx, 3",
    "je 5f",
    "cmp rbx, 4",
    "je 6f",
    "cmp rbx, 5",
    "je 7f",
    "cmp rbx, 6",
    "je 8f",
    // Nothing yet.
    "jmp 2b",
    "3: rep movsb",
    "jmp 9f",
    "4: rep movsq",
    "jmp 9f",
    "5: call rdi",
    "jmp 9f",
    "6: .byte 0xf2, 0x0f, 0x01, 0xff", // pvalidate
    "jmp 9f",
    "7: .byte 0xf3, 0x0f, 0x01, 0xfe", // rmpadjust
    "jmp 9f",
    "8:",
    "mov rdx, rax",
    "shr rdx, 32",
    "mov ecx, 0xc0010130",
    "wrmsr",
    "rep vmmcall",
    "rdmsr",
    "shl rdx, 32",
    "mov eax, eax",
    "or rax, rdx",
    "9:",
    "setc cl",
    "movzx ecx, cl",
    "mov [r15 + 0x40], rax",
    "mov [r15 + 0x48], rcx",
    "mov qword ptr [r15 + 0x50], 0",
    "mov [r15 + 0x38], r12",
    "jmp 2b",
    "snp_program_vc:",
    "pop rax",
    "mov [r15 + 0x50], rax",
    "mov rsp, r14",
    "mov [r15 + 0x38], r12",
    "jmp 2b",
    "snp_program_end:",
    ".popsection",
);

unsafe extern "C" {
    static snp_program: u8;
    static snp_program_vc: u8;
    static snp_program_end: u8;
}

/// The code, and the offset of the handler in it.
fn code() -> (&'static [u8], u64) {
    let (start, handler, end) = (&raw const snp_program, &raw const snp_program_vc, &raw const snp_program_end);
    let (len, handler) = (end.addr() - start.addr(), handler.addr() - start.addr());
    // SAFETY: the symbols enclose the bytes assembled above, which are there as long as the program and never change.
    (unsafe { std::slice::from_raw_parts(start, len) }, handler as u64)
}

const PAGE: u64 = 0x1000;
/// Offsets in the image.
const TOP: u64 = 0;
const PRIVATE_GIB: u64 = PAGE;
const SHARED_GIB: u64 = 2 * PAGE;
const CODE: u64 = 3 * PAGE;
const TABLES: u64 = 4 * PAGE;
const GDT: u64 = TABLES + 0x800;
const STACKS: u64 = 5 * PAGE;
/// `#VC`
const VC: u64 = 29;

/// The program of a VM, for so many vCPUs.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    gpa: u64,
    vcpus: u64,
    c_bit: u32,
}

impl Program {
    /// The program at `gpa`, which is aligned to pages and below [`LIMIT`], for a processor whose page tables say with bit
    /// `c_bit` that a page is private.
    pub const fn new(gpa: u64, vcpus: u64, c_bit: u32) -> Self {
        Self { gpa, vcpus, c_bit }
    }

    /// Where the image is.
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes of the image.
    pub const fn size(&self) -> u64 {
        STACKS + self.vcpus * PAGE
    }

    /// What is to be launched at [`gpa`](Self::gpa).
    pub fn image(&self) -> Vec<u8> {
        let private = 1 << self.c_bit;
        let mut image = vec![0; index(self.size())];
        let mut put = |at: u64, value: u64| image[index(at)..][..8].copy_from_slice(&value.to_le_bytes());
        // Present, writable, accessed; and dirty and large.
        for (half, table) in [PRIVATE_GIB, SHARED_GIB].into_iter().enumerate() {
            put(TOP + 8 * half as u64, (self.gpa + table) | private | 0x23);
        }
        for gib in 0..512 {
            put(PRIVATE_GIB + 8 * gib, gib << 30 | private | 0xe3);
            put(SHARED_GIB + 8 * gib, gib << 30 | 0xe3);
        }
        let (code, handler) = code();
        let handler = self.gpa + CODE + handler;
        // An interrupt gate, present, of 64 bits, to the code segment.
        put(TABLES + VC * 16, (handler & 0xffff) | 0x08 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48);
        put(TABLES + VC * 16 + 8, handler >> 32);
        put(GDT + 8, 0x00af_9b00_0000_ffff);
        put(GDT + 16, 0x00cf_9300_0000_ffff);
        image[index(CODE)..][..code.len()].copy_from_slice(code);
        image
    }

    /// The save area with which `vcpu` starts the program, its mailbox at the guest physical address `mailbox`.
    pub fn vmsa(&self, vcpu: u64, mailbox: u64) -> Vmsa {
        assert!(vcpu < self.vcpus, "a stack for vCPU {vcpu}");
        let reset = VmsaOptions { start: 0, cpu: CpuSignature::new(0, 0, 0), features: SNP_ACTIVE };
        let mut page = Page::clone(Vmsa::at_reset(reset).page());
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        let mut segment = |at: usize, selector: u16, attributes: u16, limit: u32, base: u64| {
            let words = [selector.to_le_bytes(), attributes.to_le_bytes()].concat();
            put(at, &[&words[..], &limit.to_le_bytes(), &base.to_le_bytes()].concat());
        };
        segment(0x10, 8, 0xa9b, u32::MAX, 0); // CS: long, readable
        for data in [0x00, 0x20, 0x30, 0x40, 0x50] {
            segment(data, 16, 0xc93, u32::MAX, 0);
        }
        segment(0x60, 0, 0, 8 * 3 - 1, self.gpa + GDT);
        segment(0x80, 0, 0, 0x7ff, self.gpa + TABLES);
        let stack = self.gpa + STACKS + (vcpu + 1) * PAGE;
        for (at, value) in [
            (0x0d0, 0x1500),                             // EFER: SVME, LMA, LME
            (0x148, 0x620),                              // CR4: OSXMMEXCPT, OSFXSR, PAE
            (0x150, (self.gpa + TOP) | 1 << self.c_bit), // CR3
            (0x158, 0x8000_0031_u64),                    // CR0: PG, NE, ET, PE
            (0x178, self.gpa + CODE),                    // RIP
            (0x1d8, stack),                              // RSP
            (0x310, 0),                                  // RDX
            (0x370, stack),                              // R14
            (0x378, SHARED + mailbox),                   // R15
        ] {
            put(at, &value.to_le_bytes());
        }
        Vmsa::from_page(page)
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit addresses")
}
