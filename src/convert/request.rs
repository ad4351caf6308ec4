//! From what a guest says to a request that can be planned.
//!
//! The guest is hostile: every field of a hypercall or a fault is checked here, before anything else looks at it, and a
//! bad one is an errno to the guest or an error to the VMM, never an effect. What a request may *touch* (holes, slots
//! without private memory) is checked against the layout by the planner; this file knows no layout.
//!
//! Mirrors `KVM_HC_MAP_GPA_RANGE` (`Documentation/virt/kvm/x86/hypercalls.rst`) and `KVM_EXIT_MEMORY_FAULT`.

use std::fmt;

use crate::addr::{AddrError, GfnRange, PAGE_SIZE};
use crate::hypervisor::{HypercallExit, MemoryFault};

/// Which of a page's two states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Host and devices see it.
    Shared,
    /// Only the guest sees it.
    Private,
}

impl State {
    /// Private if `private`.
    pub const fn from_private(private: bool) -> Self {
        if private { Self::Private } else { Self::Shared }
    }

    /// Whether this is [`Private`](Self::Private).
    pub const fn is_private(self) -> bool {
        matches!(self, Self::Private)
    }

    /// The other one.
    pub const fn opposite(self) -> Self {
        Self::from_private(!self.is_private())
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Shared => "shared",
            Self::Private => "private",
        })
    }
}

/// What was wrong with a guest's request, before the layout was even looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Zero, unaligned, wrapping or beyond the top.
    #[error("page state change of a bad range")]
    Range(
        #[from]
        #[source]
        AddrError,
    ),
    /// The page count does not even fit an address.
    #[error("page state change of {pages:#x} pages at {gpa:#x}: too many")]
    TooMany {
        /// First byte.
        gpa: u64,
        /// Pages asked for.
        pages: u64,
    },
    /// Attribute bits that mean nothing, or a page size that does not exist.
    #[error("page state change at {gpa:#x}: unknown attributes {attributes:#x}")]
    Attributes {
        /// First byte.
        gpa: u64,
        /// `args[2]`.
        attributes: u64,
    },
    /// A memory fault with flags that mean nothing to this library.
    #[error("memory fault at {gpa:#x}: unknown flags {flags:#x}")]
    Flags {
        /// Faulting address.
        gpa: u64,
        /// Its flags.
        flags: u64,
    },
}

/// A change of page state that somebody wants. Well formed; not yet held against the layout.
///
/// ```
/// use cvm_memory::convert::{Request, State};
///
/// // MAP_GPA_RANGE: 512 pages at 4 GiB, encrypted, with a hint that 2 MiB pages are in use.
/// let request = Request::map_gpa_range([0x1_0000_0000, 512, 0x11, 0, 0, 0])?;
/// assert_eq!(request.to, State::Private);
/// assert_eq!(request.range.bytes(), 2 << 20);
///
/// // The page size alone says nothing about privacy.
/// assert_eq!(Request::map_gpa_range([0, 512, 0x01, 0, 0, 0])?.to, State::Shared);
///
/// assert!(Request::map_gpa_range([0x800, 1, 0x10, 0, 0, 0]).is_err());
/// assert!(Request::map_gpa_range([0, u64::MAX, 0x10, 0, 0, 0]).is_err());
/// assert!(Request::map_gpa_range([0, 1, 0x20, 0, 0, 0]).is_err());
/// # Ok::<(), cvm_memory::convert::RequestError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The frames; never empty when made by a constructor.
    pub range: GfnRange,
    /// The state wanted.
    pub to: State,
}

impl Request {
    /// `KVM_MAP_GPA_RANGE_ENC_STAT`: the guest wants the range private.
    const ENCRYPTED: u64 = 1 << 4;
    /// Bits 3:0: 0 for 4 KiB, 1 for 2 MiB, 2 for 1 GiB. A hint, and no more than that: the count is in base pages.
    const PAGE_SIZE_HINT: u64 = 0xf;
    const LARGEST_HINT: u64 = 2;

    /// From the arguments of a `KVM_HC_MAP_GPA_RANGE` hypercall: byte address, number of base pages, attributes.
    ///
    /// # Errors
    /// [`RequestError`] for anything that is not a well-formed request; `EINVAL` to the guest.
    pub fn map_gpa_range(args: [u64; 6]) -> Result<Self, RequestError> {
        let [gpa, pages, attributes, ..] = args;
        if attributes & !(Self::ENCRYPTED | Self::PAGE_SIZE_HINT) != 0
            || attributes & Self::PAGE_SIZE_HINT > Self::LARGEST_HINT
        {
            return Err(RequestError::Attributes { gpa, attributes });
        }
        let size = pages.checked_mul(PAGE_SIZE).ok_or(RequestError::TooMany { gpa, pages })?;
        let range = GfnRange::from_bytes(gpa, size)?;
        Ok(Self { range, to: State::from_private(attributes & Self::ENCRYPTED != 0) })
    }

    /// From a hypercall exit, or `None` if it is another hypercall than `KVM_HC_MAP_GPA_RANGE`.
    ///
    /// # Errors
    /// As [`map_gpa_range`](Self::map_gpa_range).
    pub fn from_hypercall(exit: &HypercallExit<'_>) -> Option<Result<Self, RequestError>> {
        (exit.nr == HypercallExit::MAP_GPA_RANGE).then(|| Self::map_gpa_range(exit.args))
    }

    /// From a memory fault: the page, in the state that the access had.
    ///
    /// # Errors
    /// [`RequestError::Flags`] for flags other than "private", [`RequestError::Range`] for a range that KVM never gives.
    pub fn from_fault(fault: &MemoryFault) -> Result<Self, RequestError> {
        if fault.flags & !MemoryFault::PRIVATE != 0 {
            return Err(RequestError::Flags { gpa: fault.gpa, flags: fault.flags });
        }
        let range = GfnRange::from_bytes(fault.gpa, fault.size)?;
        Ok(Self { range, to: State::from_private(fault.flags & MemoryFault::PRIVATE != 0) })
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfns {} to {}", self.range, self.to)
    }
}
