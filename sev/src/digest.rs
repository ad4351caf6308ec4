//! The launch digest: a chain of hashes over the pages of the initial image, which the attestation report shows.
//!
//! It is what the firmware computes while `SNP_LAUNCH_UPDATE` is called page by page; computing it here as well says
//! beforehand what the report must show. How the pages are spread over calls does not matter, but their order, addresses
//! and types do.
//!
//! Mirrors `PAGE_INFO` of the SEV-SNP firmware ABI (section "SNP_LAUNCH_UPDATE").

use std::fmt;

use cvm_memory::addr::{Gfn, Gpa};
use sha2::{Digest as _, Sha384};

use crate::page::Page;

/// Where the firmware says that KVM's VMSAs are: `u64::MAX` as a page address of 48 bits.
pub const VMSA_GPA: Gpa = Gpa(0xffff_ffff_f000);

/// `PAGE_INFO` is that long.
const PAGE_INFO_BYTES: u16 = 0x70;

/// Types of launched pages, as the firmware numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum PageType {
    /// Contents are measured.
    Normal = 1,
    /// The save area of a vCPU. KVM launches these itself.
    Vmsa = 2,
    /// The firmware zeroes the page.
    Zero = 3,
    /// Contents are encrypted but not measured.
    Unmeasured = 4,
    /// The firmware writes keys into the page.
    Secrets = 5,
    /// A CPUID table, which the firmware checks.
    Cpuid = 6,
}

impl PageType {
    /// Its number.
    pub const fn raw(self) -> u8 {
        self as u8
    }

    /// The type of that number.
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::Normal,
            2 => Self::Vmsa,
            3 => Self::Zero,
            4 => Self::Unmeasured,
            5 => Self::Secrets,
            6 => Self::Cpuid,
            _ => return None,
        })
    }

    /// Whether the contents of such a page enter the digest.
    pub const fn measures_contents(self) -> bool {
        matches!(self, Self::Normal | Self::Vmsa)
    }
}

impl fmt::Display for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Normal => "normal",
            Self::Vmsa => "vmsa",
            Self::Zero => "zero",
            Self::Unmeasured => "unmeasured",
            Self::Secrets => "secrets",
            Self::Cpuid => "cpuid",
        })
    }
}

/// A launch digest, so far.
///
/// ```
/// use cvm_memory::addr::Gfn;
/// use cvm_memory_sev::digest::{LaunchDigest, PageType};
/// use cvm_memory_sev::page::Page;
///
/// let mut digest = LaunchDigest::INITIAL;
/// digest.add(PageType::Normal, Gfn::ZERO, &Page::ZERO);
/// assert!(digest.to_string().starts_with("9d13634b6014bb21"));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaunchDigest([u8; 48]);

impl LaunchDigest {
    /// Before the first page.
    pub const INITIAL: Self = Self([0; 48]);

    /// A digest that somebody else has computed.
    pub const fn new(bytes: [u8; 48]) -> Self {
        Self(bytes)
    }

    /// As it stands in the attestation report.
    pub const fn bytes(&self) -> &[u8; 48] {
        &self.0
    }

    /// Adds the page at `gfn`. `contents` are looked at only if the type [measures](PageType::measures_contents) them.
    pub fn add(&mut self, page_type: PageType, gfn: Gfn, contents: &Page) {
        self.chain(page_type, gfn.start_byte(), contents);
    }

    /// Adds the save area of a vCPU, as `KVM_SEV_SNP_LAUNCH_FINISH` does: in the order of the vCPUs, after all else.
    pub fn add_vmsa(&mut self, vmsa: &Page) {
        self.chain(PageType::Vmsa, VMSA_GPA.get(), vmsa);
    }

    fn chain(&mut self, page_type: PageType, gpa: u64, contents: &Page) {
        let hash: [u8; 48] = if page_type.measures_contents() { Sha384::digest(**contents).into() } else { [0; 48] };
        let mut info = Sha384::new();
        info.update(self.0);
        info.update(hash);
        info.update(PAGE_INFO_BYTES.to_le_bytes());
        // The type; not a page for migration; no permissions for VMPL 3, 2, 1; reserved.
        info.update([page_type.raw(), 0, 0, 0, 0, 0]);
        info.update(gpa.to_le_bytes());
        self.0 = info.finalize().into();
    }
}

impl Default for LaunchDigest {
    fn default() -> Self {
        Self::INITIAL
    }
}

impl fmt::Display for LaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LaunchDigest({self})")
    }
}
