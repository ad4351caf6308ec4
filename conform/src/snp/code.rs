//! What a guest on KVM's SNP code executes. Its registers are nobody's business once it is launched, so it waits (`hlt`) until
//! it is told what to do in a page of shared memory, does it, and says there what came of it.
//!
//! | page | of the guest's own memory |
//! |---|---|
//! | 0 to 2 | page tables, private: all memory is mapped twice, below [`SHARED`] as private and above it as shared |
//! | 3 | code, interrupt and segment descriptors, private |
//! | 4 | stack, private |
//! | 5 | what to do, and what came of it, shared |
//! | 6 | data on its way in or out, shared |
//! | 7 | the GHCB page, shared |
#![allow(unsafe_code, reason = "where code begins and ends is known to the assembler alone")]

use std::arch::global_asm;
use std::ptr::addr_of;

/// Where the C-bit is; addresses end there, too.
pub(super) const C_BIT: u32 = 39;
/// What is mapped as private at an address is mapped as shared so much higher.
pub(super) const SHARED: u64 = 1 << C_BIT;
/// Pages of private memory, from the first on.
pub(super) const PRIVATE_PAGES: u64 = 5;
/// All of its memory.
pub(super) const PAGES: u64 = 8;

const PAGE: u64 = 4096;
pub(super) const CODE: u64 = 3 * PAGE;
pub(super) const STACK_TOP: u64 = 5 * PAGE;
pub(super) const ORDERS: u64 = 5 * PAGE;
pub(super) const DATA: u64 = 6 * PAGE;
pub(super) const GHCB: u64 = 7 * PAGE;

/// Offsets from [`ORDERS`].
pub(super) mod order {
    pub const WHAT: u64 = 0;
    pub const ADDRESS: u64 = 8;
    pub const COUNT: u64 = 16;
    pub const VALUE: u64 = 24;
    pub const RESULT: u64 = 32;
    pub const STATUS: u64 = 40;
}

/// What it can be told.
pub(super) mod what {
    pub const LOAD: u64 = 1;
    pub const STORE: u64 = 2;
    pub const COPY: u64 = 3;
    pub const CALL: u64 = 4;
    pub const PVALIDATE: u64 = 5;
    pub const VMGEXIT: u64 = 6;
}

/// What it says.
pub(super) mod status {
    pub const DONE: u64 = 1;
    /// #VC; the result is its error code.
    pub const NOT_AUTOMATIC: u64 = 2;
    // 3: it was interrupted in what it was at, and has given that up. 4: another exception.
}

/// The interrupt by which it is made to give up.
pub(super) const GIVE_UP: u8 = 0x40;

// RBX: where orders are, by their shared address. R14: top of the stack.
global_asm!(
    ".pushsection .rodata.cvm_snp_guest, \"a\"",
    "cvm_snp_guest:",
    "2: hlt",
    "mov rsp, r14",
    "cld",
    "mov rdi, [rbx + 8]",
    "mov rcx, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "lea rsi, [rbx + 0x1000]",
    "mov rax, [rbx]",
    "cmp eax, 1",
    "je 10f",
    "cmp eax, 2",
    "je 20f",
    "cmp eax, 3",
    "je 30f",
    "cmp eax, 4",
    "je 40f",
    "cmp eax, 5",
    "je 50f",
    "cmp eax, 6",
    "je 60f",
    "ud2",
    // One instruction that reads.
    "10: xor eax, eax",
    "cmp ecx, 1",
    "je 11f",
    "cmp ecx, 2",
    "je 12f",
    "cmp ecx, 4",
    "je 14f",
    "mov rax, [rdi]",
    "jmp 90f",
    "11: mov al, [rdi]",
    "jmp 90f",
    "12: mov ax, [rdi]",
    "jmp 90f",
    "14: mov eax, [rdi]",
    "jmp 90f",
    // One that writes.
    "20: cmp ecx, 1",
    "je 21f",
    "cmp ecx, 2",
    "je 22f",
    "cmp ecx, 4",
    "je 24f",
    "mov [rdi], rdx",
    "jmp 90f",
    "21: mov [rdi], dl",
    "jmp 90f",
    "22: mov [rdi], dx",
    "jmp 90f",
    "24: mov [rdi], edx",
    "jmp 90f",
    // From there to the data.
    "30: xchg rsi, rdi",
    "rep movsb",
    "jmp 90f",
    "40: call rdi",
    "jmp 90f",
    // Result in EAX; the carry flag above it.
    "50: mov rax, rdi",
    ".byte 0xf2, 0x0f, 0x01, 0xff",
    "setc cl",
    "movzx ecx, cl",
    "shl rcx, 32",
    "mov eax, eax",
    "or rax, rcx",
    "jmp 90f",
    "60: mov rax, rdi",
    "mov rdx, rdi",
    "shr rdx, 32",
    "mov ecx, 0xc0010130",
    "wrmsr",
    ".byte 0xf3, 0x0f, 0x01, 0xd9",
    "rdmsr",
    "shl rdx, 32",
    "mov eax, eax",
    "or rax, rdx",
    "90: mov [rbx + 32], rax",
    "mov qword ptr [rbx + 40], 1",
    "jmp 2b",
    "cvm_snp_guest_vc: pop rax",
    "mov [rbx + 32], rax",
    "mov qword ptr [rbx + 40], 2",
    "jmp 2b",
    "cvm_snp_guest_irq: mov qword ptr [rbx + 40], 3",
    "jmp 2b",
    "cvm_snp_guest_ud: mov eax, 6",
    "jmp 99f",
    "cvm_snp_guest_gp: mov eax, 13",
    "jmp 99f",
    "cvm_snp_guest_pf: mov rax, cr2",
    "99: mov [rbx + 32], rax",
    "mov qword ptr [rbx + 40], 4",
    "jmp 2b",
    "cvm_snp_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    safe static cvm_snp_guest: u8;
    safe static cvm_snp_guest_vc: u8;
    safe static cvm_snp_guest_irq: u8;
    safe static cvm_snp_guest_ud: u8;
    safe static cvm_snp_guest_gp: u8;
    safe static cvm_snp_guest_pf: u8;
    safe static cvm_snp_guest_end: u8;
}

/// Offsets from the page of [`CODE`].
pub(super) const INTERRUPTS: u64 = 0x800;
pub(super) const INTERRUPTS_BYTES: u16 = 0x410;
pub(super) const SEGMENTS: u64 = 0xf00;
pub(super) const SEGMENTS_BYTES: u16 = 0x18;

/// The private pages of a guest whose memory begins at `gpa`.
pub(super) fn image(gpa: u64) -> Vec<u8> {
    let mut image = vec![0; usize::try_from(PRIVATE_PAGES * PAGE).expect("small")];
    let mut put = |at: u64, value: u64| {
        let at = usize::try_from(at).expect("small");
        image[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    // Present, writable, accessed, written: nothing has to be set there by the processor.
    let table = |page: u64| (gpa + page * PAGE) | 0x63 | 1 << C_BIT;
    put(0, table(1));
    put(8, table(2));
    for gibibyte in 0..512_u64 {
        // Pages of 1 GiB.
        let entry = gibibyte << 30 | 0xe3;
        put(PAGE + gibibyte * 8, entry | 1 << C_BIT);
        put(2 * PAGE + gibibyte * 8, entry);
    }
    let start = addr_of!(cvm_snp_guest);
    let handlers = [
        (6, addr_of!(cvm_snp_guest_ud)),
        (13, addr_of!(cvm_snp_guest_gp)),
        (14, addr_of!(cvm_snp_guest_pf)),
        (29, addr_of!(cvm_snp_guest_vc)),
        (u64::from(GIVE_UP), addr_of!(cvm_snp_guest_irq)),
    ];
    for (vector, handler) in handlers {
        let address = gpa + CODE + (handler.addr() - start.addr()) as u64;
        let gate = CODE + INTERRUPTS + vector * 16;
        put(gate, address & 0xffff | 8 << 16 | 0x8e00 << 32 | (address >> 16 & 0xffff) << 48);
        put(gate + 8, address >> 32);
    }
    put(CODE + SEGMENTS + 8, 0x00af_9b00_0000_ffff);
    put(CODE + SEGMENTS + 16, 0x00cf_9300_0000_ffff);
    let bytes = addr_of!(cvm_snp_guest_end).addr() - start.addr();
    assert!(bytes as u64 <= INTERRUPTS, "code and descriptors are one page");
    // SAFETY: the assembler has put so many bytes there, which nobody writes.
    let code = unsafe { std::slice::from_raw_parts(start, bytes) };
    let at = usize::try_from(CODE).expect("small");
    image[at..at + bytes].copy_from_slice(code);
    image
}
