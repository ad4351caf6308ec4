//! How wide a TD's guest physical addresses are, and which of their bits says "shared".
//!
//! The topmost bit of an address is no address bit: it is clear for private accesses and set for shared ones. Outside the
//! guest's own page tables addresses go without it, in KVM's interface as in this library; MapGPA is the one place where the
//! guest sends it along. Mirrors `tdx_td_init()` and `gfn_direct_bits` (`arch/x86/kvm/vmx/tdx.c`).

use cvm_memory::addr::{Gfn, Gpa};
use cvm_memory::convert::State;

/// A TD's GPAW, in CPUID 0x8000_0008 EAX bits 23:16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Width {
    /// Bit 47 says "shared".
    Bits48,
    /// Bit 51 says "shared". Needs five-level EPT.
    Bits52,
}

impl Width {
    /// The width of so many bits, if a TD can have it.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        match bits {
            48 => Some(Self::Bits48),
            52 => Some(Self::Bits52),
            _ => None,
        }
    }

    /// The number of bits.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits48 => 48,
            Self::Bits52 => 52,
        }
    }

    /// The shared bit, as a mask.
    pub const fn shared_bit(self) -> u64 {
        match self {
            Self::Bits48 => 1 << 47,
            Self::Bits52 => 1 << 51,
        }
    }

    /// The first frame that has no address: the shared bit as a frame number.
    pub const fn end(self) -> Gfn {
        Gfn::containing(self.shared_bit())
    }

    /// An address as the guest has it, taken apart: the plain address, and how it accesses that. `None` above the shared
    /// bit.
    ///
    /// ```
    /// use cvm_memory::{addr::Gpa, convert::State};
    /// use cvm_memory_tdx::width::Width;
    ///
    /// assert_eq!(Width::Bits48.split(0x8000_0000_1000), Some((Gpa(0x1000), State::Shared)));
    /// assert_eq!(Width::Bits52.split(0x8000_0000_1000), Some((Gpa(0x8000_0000_1000), State::Private)));
    /// assert_eq!(Width::Bits48.split(1 << 48), None);
    /// ```
    pub const fn split(self, address: u64) -> Option<(Gpa, State)> {
        let shared = self.shared_bit();
        if address >= shared << 1 {
            return None;
        }
        Some((Gpa(address & !shared), State::from_private(address & shared == 0)))
    }

    /// The address by which the guest accesses `gpa` in that way.
    pub const fn join(self, gpa: Gpa, state: State) -> u64 {
        match state {
            State::Private => gpa.get(),
            State::Shared => gpa.get() | self.shared_bit(),
        }
    }
}
