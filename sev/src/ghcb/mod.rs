//! How an SNP guest asks its host for page state changes: by a register ([`msr`]) or by a page ([`psc`]).
//!
//! These are the protocols alone, from KVM's side: what a request means, what KVM makes of it (which hypercall exits userspace
//! sees, in which order), and what the guest is told. Guests are hostile: every value is taken as it comes, and each entry of a
//! buffer is copied before it is looked at.
//!
//! Mirrors the GHCB specification and `arch/x86/kvm/svm/sev.c` (`sev_handle_vmgexit_msr_protocol()`, `snp_begin_psc()`).

pub mod msr;
pub mod page;
pub mod psc;

use cvm_memory::addr::Gfn;

/// What a page is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Private to the guest.
    Private,
    /// Shared with the host.
    Shared,
}

impl Operation {
    /// Its number in both protocols.
    pub const fn raw(self) -> u8 {
        match self {
            Self::Private => 1,
            Self::Shared => 2,
        }
    }

    /// The operation of that number. KVM knows no others.
    pub const fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            1 => Some(Self::Private),
            2 => Some(Self::Shared),
            _ => None,
        }
    }
}

/// A `KVM_EXIT_HYPERCALL` for [MAP_GPA_RANGE](cvm_memory::hypervisor::HypercallExit::MAP_GPA_RANGE), as userspace sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MapGpaRange {
    /// First frame. From untrusted input: any number of 40 bits.
    pub gfn: u64,
    /// Pages of 4 KiB.
    pub pages: u64,
    /// What they are to become.
    pub operation: Operation,
    /// Whether the guest spoke of pages of 2 MiB: a hint.
    pub large: bool,
}

impl MapGpaRange {
    /// The arguments of the exit: address in bytes, pages, attributes (bits 3:0 page size, bit 4 private).
    pub const fn args(&self) -> [u64; 6] {
        let encrypted = matches!(self.operation, Operation::Private) as u64;
        [self.gfn.wrapping_shl(12), self.pages, encrypted << 4 | self.large as u64, 0, 0, 0]
    }

    /// The first frame, if it can be one.
    pub fn first(&self) -> Option<Gfn> {
        Gfn::new(self.gfn)
    }
}
