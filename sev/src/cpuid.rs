//! The CPUID page: what the guest is told about its processor, which the firmware checks and the guest trusts.
//!
//! Its contents do not enter the launch digest. Mirrors `struct snp_cpuid_table` (`arch/x86/include/asm/sev.h`) and the
//! firmware ABI's section "CPUID page".

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::page::Page;

/// The most functions that a table holds.
pub const MAX_FUNCTIONS: usize = 64;

/// Where the first function stands in the page, and how long each is.
const FIRST: usize = 16;
const BYTES: usize = 48;

/// One function of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidFunction {
    /// Input.
    pub eax_in: u32,
    /// Input, zero for functions without subfunctions.
    pub ecx_in: u32,
    /// The XCR0 for which the answer holds; zero but for function 0xd.
    pub xcr0_in: u64,
    /// The XSS for which the answer holds; zero but for function 0xd.
    pub xss_in: u64,
    /// Answer.
    pub eax: u32,
    /// Answer.
    pub ebx: u32,
    /// Answer.
    pub ecx: u32,
    /// Answer.
    pub edx: u32,
}

impl From<&kvm_cpuid_entry2> for CpuidFunction {
    /// As Linux guests expect it: they compute the size of the XSAVE area themselves from the subfunctions, so that
    /// functions 0xd.0 and 0xd.1 describe only the area of the initial XCR0.
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        /// The legacy region and the header of an XSAVE area.
        const BASE_AREA: u32 = 0x240;
        let has_index = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        let ecx_in = if has_index { entry.index } else { 0 };
        let base = entry.function == 0xd && ecx_in <= 1;
        Self {
            eax_in: entry.function,
            ecx_in,
            xcr0_in: u64::from(base),
            xss_in: 0,
            eax: entry.eax,
            ebx: if base { BASE_AREA } else { entry.ebx },
            ecx: entry.ecx,
            edx: entry.edx,
        }
    }
}

/// More functions than a table can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{functions} cpuid functions, at most {MAX_FUNCTIONS}")]
pub struct TooManyFunctions {
    /// How many.
    pub functions: usize,
}

/// A CPUID page.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuidTable {
    page: Page,
}

impl CpuidTable {
    /// A table of these functions.
    ///
    /// # Errors
    /// [`TooManyFunctions`].
    pub fn new(functions: &[CpuidFunction]) -> Result<Self, TooManyFunctions> {
        let count = match u32::try_from(functions.len()) {
            Ok(count) if functions.len() <= MAX_FUNCTIONS => count,
            _ => return Err(TooManyFunctions { functions: functions.len() }),
        };
        let mut page = Page::ZERO;
        page.put(0, &count.to_le_bytes());
        for (nr, function) in functions.iter().enumerate() {
            let start = FIRST.saturating_add(nr.saturating_mul(BYTES));
            let CpuidFunction { eax_in, ecx_in, xcr0_in, xss_in, eax, ebx, ecx, edx } = *function;
            page.put(start, &eax_in.to_le_bytes());
            page.put(start.saturating_add(4), &ecx_in.to_le_bytes());
            page.put(start.saturating_add(8), &xcr0_in.to_le_bytes());
            page.put(start.saturating_add(16), &xss_in.to_le_bytes());
            for (nr, register) in [eax, ebx, ecx, edx].into_iter().enumerate() {
                page.put(start.saturating_add(24).saturating_add(nr.saturating_mul(4)), &register.to_le_bytes());
            }
        }
        Ok(Self { page })
    }

    /// A table of what the vCPUs are told (`KVM_SET_CPUID2`).
    ///
    /// # Errors
    /// [`TooManyFunctions`].
    pub fn from_kvm(entries: &[kvm_cpuid_entry2]) -> Result<Self, TooManyFunctions> {
        Self::new(&entries.iter().map(CpuidFunction::from).collect::<Vec<_>>())
    }

    /// A page as given, not checked: that is the firmware's business.
    pub const fn from_page(page: Page) -> Self {
        Self { page }
    }

    /// The page.
    pub const fn page(&self) -> &Page {
        &self.page
    }

    /// The functions in it, as many as the page claims and holds.
    pub fn functions(&self) -> impl Iterator<Item = CpuidFunction> {
        let count = usize::try_from(u32::from_le_bytes(self.page.get(0))).unwrap_or(MAX_FUNCTIONS);
        (0..count.min(MAX_FUNCTIONS)).map(|nr| {
            let start = FIRST.saturating_add(nr.saturating_mul(BYTES));
            let word = |offset: usize| u32::from_le_bytes(self.page.get(start.saturating_add(offset)));
            let long = |offset: usize| u64::from_le_bytes(self.page.get(start.saturating_add(offset)));
            CpuidFunction {
                eax_in: word(0),
                ecx_in: word(4),
                xcr0_in: long(8),
                xss_in: long(16),
                eax: word(24),
                ebx: word(28),
                ecx: word(32),
                edx: word(36),
            }
        })
    }
}
