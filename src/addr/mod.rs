//! Typed, checked frame arithmetic: the only place where a page number becomes an address or the other way round.
//!
//! Two kinds of page number exist in a VM with private memory, and mixing them up is how clipping goes wrong: a *guest
//! frame* ([`Gfn`], a page of guest physical address space) and a *file page* ([`FilePage`], a page of a guest_memfd).
//! Each is a type; a range of either is a [`PageRange`], half-open, never wrapping, and small enough that every byte
//! address derived from it fits a `u64`. The set algebra on ranges is written once, for both.
//!
//! This module does no I/O, holds no state and knows nothing of slots. It mirrors the range checks of
//! `kvm_set_memory_region()` and `kvm_vm_ioctl_set_mem_attributes()` (`virt/kvm/kvm_main.c`): zero sizes, unaligned
//! addresses and sums that wrap are refused here, once, before anything is built on them.

mod list;
mod range;

pub use list::{intersect_lists, merge_adjacent, subtract_lists};
pub use range::{Chunks, FileRange, Frames, GfnRange, PageRange};

use std::fmt;

/// log2 of the size of a base page in bytes. x86-64 has no other base page.
pub const PAGE_SHIFT: u32 = 12;
/// Size of a base page, in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Pages in 2 MiB: the unit of lazy materialisation, of the tag words of a page set, and of a large SPTE.
pub const PAGES_PER_2M: u64 = 512;
/// Pages in 1 GiB.
pub const PAGES_PER_1G: u64 = 512 * 512;
/// One past the highest page number that a range may contain.
///
/// `MAX_PAGES * PAGE_SIZE` is the highest page-aligned `u64`, so a range's end always has a byte address, as KVM demands
/// when it refuses `address + size` that wraps (a sum of exactly 2^64 wraps too).
pub const MAX_PAGES: u64 = u64::MAX >> PAGE_SHIFT;

/// What was wrong with an address, a size or a range, with the numbers in hex.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddrError {
    /// The size was zero bytes or zero pages.
    #[error("empty range at {start:#x}")]
    Empty {
        /// Start of the range in bytes.
        start: u64,
    },
    /// The address or the size is not a multiple of 4096 bytes.
    #[error("unaligned range: start {start:#x}, size {size:#x}, page size 0x1000")]
    Unaligned {
        /// Start in bytes.
        start: u64,
        /// Size in bytes.
        size: u64,
    },
    /// `start + size` exceeds the highest address a range can end at.
    #[error("range beyond the top: start {start:#x}, size {size:#x}")]
    BeyondTop {
        /// Start in bytes, or in pages if `pages` was given.
        start: u64,
        /// Size, in the unit of `start`.
        size: u64,
    },
    /// The end lies below the start.
    #[error("inverted range: start page {start:#x}, end page {end:#x}")]
    Inverted {
        /// First page.
        start: u64,
        /// End page, exclusive.
        end: u64,
    },
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Gfn {}
    impl Sealed for super::FilePage {}
}

/// A kind of page number. Implemented by [`Gfn`] and [`FilePage`] and sealed: a third kind would need rules of its own.
pub trait Frame: sealed::Sealed + Copy + Ord + Eq + fmt::Debug + std::hash::Hash + Send + Sync + 'static {
    /// The page number `index`, or `None` above [`MAX_PAGES`].
    fn from_index(index: u64) -> Option<Self>;
    /// The page number as a plain integer, at most [`MAX_PAGES`].
    fn index(self) -> u64;
}

macro_rules! frame {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Page number zero.
            pub const ZERO: Self = Self(0);
            /// The highest page number that may stand as an exclusive end.
            pub const MAX: Self = Self(MAX_PAGES);

            /// The page number `index`, or `None` above [`MAX_PAGES`].
            pub const fn new(index: u64) -> Option<Self> {
                if index <= MAX_PAGES { Some(Self(index)) } else { None }
            }

            /// The page that holds byte `address` (rounds down).
            pub const fn containing(address: u64) -> Self {
                Self(address >> PAGE_SHIFT)
            }

            /// The page number as a plain integer.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// Byte address of the page's first byte. Never overflows.
            pub const fn start_byte(self) -> u64 {
                self.0 << PAGE_SHIFT
            }

            /// This page number plus `pages`, or `None` above [`MAX_PAGES`].
            pub const fn checked_add(self, pages: u64) -> Option<Self> {
                match self.0.checked_add(pages) {
                    Some(index) => Self::new(index),
                    None => None,
                }
            }

            /// This page number minus `pages`, or `None` below zero.
            pub const fn checked_sub(self, pages: u64) -> Option<Self> {
                match self.0.checked_sub(pages) {
                    Some(index) => Some(Self(index)),
                    None => None,
                }
            }

            /// Pages from `origin` to here, or `None` if `origin` is higher.
            pub const fn pages_from(self, origin: Self) -> Option<u64> {
                self.0.checked_sub(origin.0)
            }
        }

        impl Frame for $name {
            fn from_index(index: u64) -> Option<Self> {
                Self::new(index)
            }
            fn index(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

frame! {
    /// A guest frame number: a guest physical address divided by 4096. Carries no shared bit.
    ///
    /// ```
    /// use cvm_memory::addr::Gfn;
    /// let gfn = Gfn::containing(0x1_0000_0fff);
    /// assert_eq!(gfn.get(), 0x10_0000);
    /// assert_eq!(gfn.start_byte(), 0x1_0000_0000);
    /// assert_eq!(Gfn::MAX.checked_add(1), None);
    /// ```
    Gfn
}

frame! {
    /// A page of a guest_memfd: a file offset divided by 4096.
    ///
    /// ```
    /// use cvm_memory::addr::FilePage;
    /// assert_eq!(FilePage::new(3).and_then(|p| p.checked_sub(4)), None);
    /// ```
    FilePage
}

/// A guest physical address, in bytes, not necessarily aligned. Carries no shared bit.
///
/// ```
/// use cvm_memory::addr::{Gfn, Gpa};
/// let gpa = Gpa(0x2fff);
/// assert_eq!(gpa.gfn(), Gfn::new(2).unwrap());
/// assert!(!gpa.is_aligned());
/// assert_eq!(gpa.to_string(), "0x2fff");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gpa(
    /// The address in bytes.
    pub u64,
);

impl Gpa {
    /// The frame that holds this address (rounds down).
    pub const fn gfn(self) -> Gfn {
        Gfn::containing(self.0)
    }

    /// The address in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether the address is a multiple of 4096.
    pub const fn is_aligned(self) -> bool {
        self.0 & (PAGE_SIZE - 1) == 0
    }

    /// Byte offset within the page.
    pub const fn page_offset(self) -> u64 {
        self.0 & (PAGE_SIZE - 1)
    }

    /// This address plus `bytes`, or `None` if it wraps.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl From<Gfn> for Gpa {
    fn from(gfn: Gfn) -> Self {
        Self(gfn.start_byte())
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests;
