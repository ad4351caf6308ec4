//! MapGPA: how a TD asks for memory to be shared or private, in the shape in which KVM hands it to userspace.
//!
//! The guest names a range of any size, with the shared bit saying which way. KVM checks it, then asks userspace for one
//! piece after another, each a hypercall of at most 2 MiB *counted from the start address*, and stops in between when the
//! guest has an interrupt to take. Whatever has been done stays done: the guest is told how far it got, and asks for the
//! rest.
//!
//! It converts nothing: the pieces arrive at [`exits`](cvm_memory::exits) as `KVM_HC_MAP_GPA_RANGE`. Mirrors
//! `tdx_map_gpa()`, `__tdx_map_gpa()` and `tdx_complete_vmcall_map_gpa()` (`arch/x86/kvm/vmx/tdx.c`) and
//! `TDG.VP.VMCALL<MapGPA>` of the GHCI specification.

use cvm_memory::addr::{Gpa, PAGE_SIZE};
use cvm_memory::convert::State;

use crate::width::Width;

/// Bytes that KVM asks userspace for at a time.
const CHUNK: u64 = 2 << 20;
/// `KVM_MAP_GPA_RANGE_ENCRYPTED`; no hint of a page size comes with it.
const ENCRYPTED: u64 = 1 << 4;

/// What the guest finds in r10.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// All of it was done.
    Success,
    /// A part of it was done; the guest is to ask for the rest.
    Retry,
    /// The range is no good, or userspace has refused it.
    InvalidOperand,
    /// Address or size is not a multiple of 4096.
    AlignError,
    /// Userspace does not want to hear of it.
    SubfuncUnsupported,
}

impl Status {
    /// As the guest finds it.
    pub const fn code(self) -> u64 {
        match self {
            Self::Success => 0,
            Self::Retry => 1,
            Self::InvalidOperand => 0x8000_0000_0000_0000,
            Self::AlignError => 0x8000_0000_0000_0002,
            Self::SubfuncUnsupported => 0x8000_0000_0000_0003,
        }
    }
}

/// What goes back to the guest: r10 and r11.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// How it went.
    pub status: Status,
    /// The address from which on nothing was done, with the shared bit if it was asked for with it. Means nothing after
    /// success.
    pub gpa: u64,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Ask userspace for this piece: the arguments of `KVM_HC_MAP_GPA_RANGE`.
    Ask([u64; 6]),
    /// Answer the guest.
    Answer(Answer),
}

/// A MapGPA that KVM has accepted, and how far it has come.
///
/// ```
/// use cvm_memory_tdx::mapgpa::{MapGpa, Next, Status};
/// use cvm_memory_tdx::width::Width;
///
/// // 3 MiB at 1 MiB, to be shared.
/// let shared = Width::Bits48.shared_bit();
/// let (mut request, first) = MapGpa::start(Width::Bits48, shared | 0x10_0000, 0x30_0000, true).unwrap();
/// assert_eq!(first, Next::Ask([0x10_0000, 512, 0, 0, 0, 0]));
/// assert_eq!(request.answered(0, false), Next::Ask([0x30_0000, 256, 0, 0, 0, 0]));
/// let Next::Answer(answer) = request.answered(0, false) else { panic!() };
/// assert_eq!(answer.status, Status::Success);
/// # Ok::<(), cvm_memory_tdx::mapgpa::Answer>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapGpa {
    width: Width,
    to: State,
    /// The piece that userspace has been asked for starts here; without the shared bit.
    next: u64,
    end: u64,
}

impl MapGpa {
    /// The guest asks for `size` bytes at `address`, which has the shared bit or not. `exits` is whether userspace has asked
    /// to hear of such requests (`KVM_CAP_EXIT_HYPERCALL`).
    ///
    /// # Errors
    /// What the guest is told at once, with nothing done.
    pub fn start(width: Width, address: u64, size: u64, exits: bool) -> Result<(Self, Next), Answer> {
        let refuse = |status| Err(Answer { status, gpa: address });
        if !exits {
            return refuse(Status::SubfuncUnsupported);
        }
        let last = size.checked_sub(1).and_then(|size| address.checked_add(size));
        let ends = width.split(address).zip(last.and_then(|last| width.split(last)));
        let Some(((Gpa(next), to), (Gpa(last), end_to))) = ends else { return refuse(Status::InvalidOperand) };
        if to != end_to {
            return refuse(Status::InvalidOperand);
        }
        if (address | size) & (PAGE_SIZE - 1) != 0 {
            return refuse(Status::AlignError);
        }
        let request = Self { width, to, next, end: last.saturating_add(1) };
        Ok((request, request.ask()))
    }

    /// Userspace has answered; `interrupted` is whether the guest has an interrupt to take.
    ///
    /// KVM lets userspace answer with 0, `EINVAL` and `EAGAIN` only.
    pub fn answered(&mut self, ret: u64, interrupted: bool) -> Next {
        const EAGAIN: u64 = nix::errno::Errno::EAGAIN as u64;
        match ret {
            0 => {}
            EAGAIN => return self.answer(Status::Retry),
            _ => return self.answer(Status::InvalidOperand),
        }
        self.next = self.next.saturating_add(self.piece());
        if self.next >= self.end {
            return self.answer(Status::Success);
        }
        if interrupted {
            return self.answer(Status::Retry);
        }
        self.ask()
    }

    fn piece(&self) -> u64 {
        self.end.saturating_sub(self.next).min(CHUNK)
    }

    fn ask(&self) -> Next {
        let attributes = if self.to.is_private() { ENCRYPTED } else { 0 };
        Next::Ask([self.next, self.piece() / PAGE_SIZE, attributes, 0, 0, 0])
    }

    fn answer(&self, status: Status) -> Next {
        Next::Answer(Answer { status, gpa: self.width.join(Gpa(self.next), self.to) })
    }
}
