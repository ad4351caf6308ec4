//! What the guests differ in: how a step becomes register contents.

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::Placement;
use super::support::Support;

/// What a stub does in one go. Addresses in bytes; lengths are not zero.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// From memory to the exchange buffer. One instruction where one does it: 1, 2, 4 or 8 bytes.
    In { gpa: u64, len: u64 },
    /// From the exchange buffer to memory. Likewise.
    Out { gpa: u64, len: u64 },
    /// The byte, all over memory.
    Fill { gpa: u64, len: u64, byte: u8 },
    /// Memory against the byte.
    Check { gpa: u64, len: u64, byte: u8 },
    /// A call of code in memory.
    Fetch { gpa: u64 },
    /// A hypercall.
    Hypercall { nr: u64, args: [u64; 4] },
}

impl Step {
    /// Address and length of the memory it touches, besides the guest's own.
    pub const fn target(&self) -> Option<(u64, u64)> {
        match *self {
            Self::In { gpa, len }
            | Self::Out { gpa, len }
            | Self::Fill { gpa, len, .. }
            | Self::Check { gpa, len, .. } => Some((gpa, len)),
            Self::Fetch { gpa } => Some((gpa, 1)),
            Self::Hypercall { .. } => None,
        }
    }
}

/// What has to be known of the processor.
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    /// Bits of a guest physical address.
    pub physical_bits: u32,
    /// Whether hypercalls are made with `vmmcall`, not `vmcall`.
    pub vmmcall: bool,
}

/// How a guest is set up to do a step.
pub trait Mode: Sized {
    /// Bytes of its own memory.
    const SIZE: u64;
    /// The most bytes that one step may touch.
    const CHUNK: u64;
    /// Code that returns to the caller.
    const RETURN: &'static [u8];

    /// Where it lives if nobody says, on a KVM with so many slots.
    fn place(slots: u64, vcpu: u64) -> Placement;
    /// Puts its code in place.
    fn new(support: &Support, cpu: Cpu) -> Self;
    /// The address it cannot reach any more.
    fn limit(&self) -> u64;
    /// Changes what is needed of the system registers.
    fn sregs(&self, support: &Support, sregs: &mut kvm_sregs, step: &Step);
    /// The registers to start with; `rcx` counts down.
    fn regs(&mut self, support: &Support, step: &Step) -> kvm_regs;
}
