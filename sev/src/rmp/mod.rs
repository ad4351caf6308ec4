//! The reverse map table: which guest owns a physical page, and at which of its addresses.
//!
//! [`Rmp`] is the table with the instructions that change it, as the processor carries them out; [`Host`] is what Linux does
//! with it for guest_memfd pages: assign a page when it is first used as private, take it back when it leaves the file. Both
//! are models: they know pages by number and hold no contents. Entries of 2 MiB and smashing are there, although Linux 7.3
//! makes entries of 4 KiB only.
//!
//! Mirrors the AMD64 manual (volume 2, section 15.36; the instructions' pages in volume 3), `arch/x86/virt/svm/sev.c`,
//! `sev_gmem_make_private()` and `sev_gmem_invalidate()` (`arch/x86/kvm/svm/sev.c`).

mod host;
mod table;

use std::fmt;

use cvm_memory::addr::Gfn;

pub use host::{Host, HostCounters, MakePrivateError};
pub use table::{Fault, Pvalidate, Rmp, RmpUpdate};

/// Pages of 4 KiB in an entry of 2 MiB.
pub const PAGES_PER_2M: u64 = 512;

/// The number of a physical page of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The first page of the 2 MiB that this one is in.
    pub const fn head(self) -> Self {
        Self(self.0 & !(PAGES_PER_2M - 1))
    }

    /// Whether it is the first page of 2 MiB.
    pub const fn is_head(self) -> bool {
        self.0.is_multiple_of(PAGES_PER_2M)
    }

    /// `pages` further on, as far as numbers go.
    #[must_use]
    pub const fn add(self, pages: u64) -> Self {
        Self(self.0.saturating_add(pages))
    }
}

/// How much an entry covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Size {
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Large,
}

impl Size {
    /// In pages of 4 KiB.
    pub const fn pages(self) -> u64 {
        match self {
            Self::Small => 1,
            Self::Large => PAGES_PER_2M,
        }
    }
}

/// The entry of an assigned page. Pages without one are the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The guest's frame.
    pub gfn: Gfn,
    /// The guest.
    pub asid: u32,
    /// The firmware's: the host must not change it.
    pub immutable: bool,
    /// The guest has accepted it.
    pub validated: bool,
    /// It may hold a save area.
    pub vmsa: bool,
    /// What VMPL 1, 2 and 3 may do; VMPL 0 may do everything.
    pub permissions: [u8; 3],
}

/// What a page is, as the firmware ABI names the states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageState {
    /// The host's.
    Hypervisor,
    /// Being launched.
    PreGuest,
    /// Assigned, not accepted.
    GuestInvalid,
    /// Assigned and accepted.
    GuestValid,
}

impl Entry {
    /// Its state.
    pub const fn state(&self) -> PageState {
        match (self.immutable, self.validated) {
            (true, _) => PageState::PreGuest,
            (false, true) => PageState::GuestValid,
            (false, false) => PageState::GuestInvalid,
        }
    }
}

impl fmt::Display for PageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hypervisor => "hypervisor",
            Self::PreGuest => "pre-guest",
            Self::GuestInvalid => "guest-invalid",
            Self::GuestValid => "guest-valid",
        })
    }
}

/// Why an instruction did nothing: what it leaves in EAX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u32)]
pub enum Failure {
    /// An operand is invalid.
    #[error("invalid operand")]
    Input = 1,
    /// Not allowed.
    #[error("not permitted")]
    Permission = 2,
    /// Another processor uses the page.
    #[error("in use")]
    InUse = 3,
    /// Entries of both sizes would overlap.
    #[error("entries would overlap")]
    Overlap = 4,
    /// The guest's size is not the entry's.
    #[error("size mismatch")]
    SizeMismatch = 6,
}

impl Failure {
    /// The value in EAX.
    pub const fn code(self) -> u32 {
        self as u32
    }
}
