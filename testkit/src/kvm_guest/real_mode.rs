//! Real mode, for a KVM that runs nothing else: reaches the first MiB.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::Placement;
use super::mode::{Cpu, Mode, Step};
use super::support::{EXCHANGE, STACK_TOP, STUBS, Support, TABLES};

const COPY: u64 = 0x00;
const FILL: u64 = 0x10;
const CHECK: u64 = 0x20;
const CALL: u64 = 0x30;
const VMCALL: u64 = 0x40;
const VMMCALL: u64 = 0x50;
/// A far pointer, offset and segment, for [`CALL`].
const POINTER: u64 = 0x60;

const CODE: [(u64, &[u8]); 6] = [
    // cld; rep movsb %ds:(%si),%es:(%di); hlt
    (COPY, &[0xfc, 0xf3, 0xa4, 0xf4]),
    // cld; rep stosb %al,%es:(%di); hlt
    (FILL, &[0xfc, 0xf3, 0xaa, 0xf4]),
    // cld; repe scasb %es:(%di),%al; hlt
    (CHECK, &[0xfc, 0xf3, 0xae, 0xf4]),
    // lcall *%cs:(%bx); hlt
    (CALL, &[0x2e, 0xff, 0x1f, 0xf4]),
    // vmcall; hlt
    (VMCALL, &[0x0f, 0x01, 0xc1, 0xf4]),
    // vmmcall; hlt
    (VMMCALL, &[0x0f, 0x01, 0xd9, 0xf4]),
];

/// A guest in real mode.
#[derive(Debug)]
pub struct RealMode {
    cpu: Cpu,
}

/// The segment whose base is the paragraph of `gpa`. The rest is the offset.
fn segment(gpa: u64, type_: u8) -> kvm_segment {
    let base = gpa & !0xf;
    let selector = u16::try_from(base >> 4).expect("an address below 1 MiB");
    kvm_segment { base, limit: 0xffff, selector, type_, present: 1, s: 1, ..Default::default() }
}

impl Mode for RealMode {
    const SIZE: u64 = TABLES;
    /// What a segment holds behind the worst offset into its first paragraph.
    const CHUNK: u64 = 0xfff0;
    /// `lret`
    const RETURN: &'static [u8] = &[0xcb];

    fn place(slots: u64, vcpu: u64) -> Placement {
        assert!(vcpu < 4, "the first MiB has room for four guests");
        Placement { slot: super::high_slot(slots, vcpu), gpa: 0xe_0000 - vcpu * 0x2_0000 }
    }

    fn new(support: &Support, cpu: Cpu) -> Self {
        for (offset, code) in CODE {
            support.write(STUBS + offset, code);
        }
        Self { cpu }
    }

    fn limit(&self) -> u64 {
        1 << 20
    }

    fn sregs(&self, support: &Support, sregs: &mut kvm_sregs, step: &Step) {
        let data = |gpa| segment(gpa, 0b0011);
        let (target, exchange) = (step.target().map_or(0, |(gpa, _)| gpa), support.gpa(EXCHANGE));
        sregs.cs = segment(support.gpa(STUBS), 0b1011);
        sregs.ss = data(support.gpa(0));
        (sregs.ds, sregs.es) = match step {
            Step::In { .. } => (data(target), data(exchange)),
            _ => (data(exchange), data(target)),
        };
    }

    fn regs(&mut self, support: &Support, step: &Step) -> kvm_regs {
        let offset = |gpa: u64| gpa & 0xf;
        let (stub, regs) = match *step {
            Step::In { gpa, len } => (COPY, kvm_regs { rsi: offset(gpa), rcx: len, ..Default::default() }),
            Step::Out { gpa, len } => (COPY, kvm_regs { rdi: offset(gpa), rcx: len, ..Default::default() }),
            Step::Fill { gpa, len, byte } => {
                (FILL, kvm_regs { rax: byte.into(), rdi: offset(gpa), rcx: len, ..Default::default() })
            }
            Step::Check { gpa, len, byte } => {
                (CHECK, kvm_regs { rax: byte.into(), rdi: offset(gpa), rcx: len, ..Default::default() })
            }
            Step::Fetch { gpa } => {
                support.write_u64(STUBS + POINTER, (gpa >> 4 << 16) | offset(gpa));
                (CALL, kvm_regs { rbx: POINTER, ..Default::default() })
            }
            Step::Hypercall { nr, args: [rbx, rcx, rdx, rsi] } => {
                let stub = if self.cpu.vmmcall { VMMCALL } else { VMCALL };
                (stub, kvm_regs { rax: nr, rbx, rcx, rdx, rsi, ..Default::default() })
            }
        };
        kvm_regs { rip: STUBS + stub, rsp: STACK_TOP, rflags: 0x2, ..regs }
    }
}
