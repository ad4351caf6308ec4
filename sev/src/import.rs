//! The initial image: which pages, of which type, in which order; validated as a whole before anything happens.
//!
//! The order of a list is the order of the launch, and the digest depends on it. What a list does not name is left alone:
//! a hole between two imports (such as the page that firmware shares with the host before it can convert it) is neither
//! launched nor measured. A list owns its contents, so nobody can change them between measuring and launching.
//!
//! It launches nothing itself. Mirrors the page types of `KVM_SEV_SNP_LAUNCH_UPDATE`
//! (`Documentation/virt/kvm/x86/amd-memory-encryption.rst`).

use std::fmt;

use cvm_memory::addr::{AddrError, GfnRange, PAGE_SIZE, merge_adjacent, subtract_lists};

use crate::cpuid::CpuidTable;
use crate::digest::{LaunchDigest, PageType};
use crate::page::Page;
use crate::vmsa::Vmsa;

/// What is imported at a range of frames.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Contents {
    Normal(Vec<Page>),
    Zero,
    Unmeasured(Vec<Page>),
    Secrets,
    Cpuid(Box<CpuidTable>),
    Shared(Vec<Page>),
}

/// An import that cannot be described.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} at {gpa:#x}, {size:#x} bytes")]
pub struct InvalidImport {
    /// What was to be imported.
    pub what: &'static str,
    /// First byte.
    pub gpa: u64,
    /// In bytes.
    pub size: u64,
    /// Why.
    #[source]
    pub error: AddrError,
}

/// A run of frames that are imported in the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    gfns: GfnRange,
    contents: Contents,
}

/// Bytes as the address arithmetic wants them.
fn bytes(data: &[u8]) -> u64 {
    u64::try_from(data.len()).unwrap_or(u64::MAX)
}

fn frames(what: &'static str, gpa: u64, size: u64) -> Result<GfnRange, InvalidImport> {
    let invalid = |error| InvalidImport { what, gpa, size, error };
    GfnRange::from_bytes(gpa, size).map_err(invalid)
}

impl Import {
    /// Measured contents, whole pages, at `gpa`.
    ///
    /// # Errors
    /// [`InvalidImport`] if address or size is not aligned to pages, nothing is there, or it goes beyond the top.
    pub fn normal(gpa: u64, data: &[u8]) -> Result<Self, InvalidImport> {
        let gfns = frames("contents", gpa, bytes(data))?;
        Ok(Self { gfns, contents: Contents::Normal(Page::split(data)) })
    }

    /// `size` bytes that the firmware zeroes.
    ///
    /// # Errors
    /// As [`normal`](Self::normal).
    pub fn zero(gpa: u64, size: u64) -> Result<Self, InvalidImport> {
        Ok(Self { gfns: frames("zeroes", gpa, size)?, contents: Contents::Zero })
    }

    /// Contents of which only address and type are measured.
    ///
    /// # Errors
    /// As [`normal`](Self::normal).
    pub fn unmeasured(gpa: u64, data: &[u8]) -> Result<Self, InvalidImport> {
        let gfns = frames("unmeasured contents", gpa, bytes(data))?;
        Ok(Self { gfns, contents: Contents::Unmeasured(Page::split(data)) })
    }

    /// The page that the firmware writes the guest's keys to.
    ///
    /// # Errors
    /// As [`normal`](Self::normal).
    pub fn secrets(gpa: u64) -> Result<Self, InvalidImport> {
        Ok(Self { gfns: frames("secrets", gpa, PAGE_SIZE)?, contents: Contents::Secrets })
    }

    /// The page that tells the guest about its processor.
    ///
    /// # Errors
    /// As [`normal`](Self::normal).
    pub fn cpuid(gpa: u64, table: CpuidTable) -> Result<Self, InvalidImport> {
        Ok(Self { gfns: frames("cpuid", gpa, PAGE_SIZE)?, contents: Contents::Cpuid(Box::new(table)) })
    }

    /// Contents that the guest finds in memory that is shared from the start. The firmware knows nothing of them.
    ///
    /// # Errors
    /// As [`normal`](Self::normal).
    pub fn shared(gpa: u64, data: &[u8]) -> Result<Self, InvalidImport> {
        let gfns = frames("shared contents", gpa, bytes(data))?;
        Ok(Self { gfns, contents: Contents::Shared(Page::split(data)) })
    }

    /// The frames.
    pub const fn gfns(&self) -> GfnRange {
        self.gfns
    }

    /// The type of its pages; `None` if they are shared, and not launched.
    pub const fn page_type(&self) -> Option<PageType> {
        Some(match self.contents {
            Contents::Normal(_) => PageType::Normal,
            Contents::Zero => PageType::Zero,
            Contents::Unmeasured(_) => PageType::Unmeasured,
            Contents::Secrets => PageType::Secrets,
            Contents::Cpuid(_) => PageType::Cpuid,
            Contents::Shared(_) => return None,
        })
    }

    /// Its contents: as many pages as there are frames; one for the CPUID table; none where the firmware makes them.
    pub fn pages(&self) -> &[Page] {
        match &self.contents {
            Contents::Normal(pages) | Contents::Unmeasured(pages) | Contents::Shared(pages) => pages,
            Contents::Cpuid(table) => std::slice::from_ref(table.page()),
            Contents::Zero | Contents::Secrets => &[],
        }
    }

    /// What the `nr`th frame is measured with.
    pub(crate) fn page(&self, nr: u64) -> &Page {
        let page = usize::try_from(nr).ok().and_then(|nr| self.pages().get(nr));
        page.unwrap_or(const { &Page::ZERO })
    }
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (start, end) = (self.gfns.start_byte(), self.gfns.end_byte());
        match self.page_type() {
            Some(page_type) => write!(f, "{start:#x}..{end:#x} {page_type}"),
            None => write!(f, "{start:#x}..{end:#x} shared"),
        }
    }
}

/// A list that must not be launched. Ranges of frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidList {
    /// Two imports want the same frames. A page can be launched only once.
    #[error("{first} and {second} overlap")]
    Overlap {
        /// The one that starts lower, as text.
        first: String,
        /// The other.
        second: String,
    },
    /// Frames that are to be private have no memory that can be.
    #[error("{import}: no private memory at gfns {missing}")]
    NoPrivateMemory {
        /// The import, as text.
        import: String,
        /// The first frames that are missing.
        missing: GfnRange,
    },
    /// Frames that are to be shared are not memory.
    #[error("{import}: no memory at gfns {missing}")]
    NoMemory {
        /// The import, as text.
        import: String,
        /// The first frames that are missing.
        missing: GfnRange,
    },
}

/// The initial image.
///
/// ```
/// use cvm_memory_sev::import::{Import, ImportList};
///
/// let mut image = ImportList::default();
/// image.push(Import::normal(0xffff_f000, &[0x90; 4096])?);
/// image.push(Import::zero(0x80_0000, 0x9000)?);
/// image.push(Import::secrets(0x80_d000)?);
/// println!("{}", image.digest(&[]));
/// # Ok::<(), cvm_memory_sev::import::InvalidImport>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImportList {
    imports: Vec<Import>,
}

impl ImportList {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { imports: Vec::new() }
    }

    /// Adds an import after all others.
    pub fn push(&mut self, import: Import) {
        self.imports.push(import);
    }

    /// The imports in their order.
    pub fn iter(&self) -> std::slice::Iter<'_, Import> {
        self.imports.iter()
    }

    /// Pages of that type; `None` counts the shared ones.
    pub fn count(&self, page_type: Option<PageType>) -> u64 {
        let same = self.iter().filter(|import| import.page_type() == page_type);
        same.fold(0, |sum: u64, import| sum.saturating_add(import.gfns.pages()))
    }

    /// All pages.
    pub fn pages(&self) -> u64 {
        self.iter().fold(0, |sum: u64, import| sum.saturating_add(import.gfns.pages()))
    }

    /// The digest that the launch of this list will end with, save areas included.
    pub fn digest(&self, vmsas: &[Vmsa]) -> LaunchDigest {
        let mut digest = LaunchDigest::INITIAL;
        for import in self.iter() {
            let Some(page_type) = import.page_type() else { continue };
            for (nr, gfn) in (0_u64..).zip(import.gfns) {
                digest.add(page_type, gfn, import.page(nr));
            }
        }
        for vmsa in vmsas {
            digest.add_vmsa(vmsa.page());
        }
        digest
    }

    /// Whether the list can be launched into memory that can be private at `private` and is there at all at `memory`.
    /// Lists of ranges, ascending and disjoint.
    ///
    /// # Errors
    /// [`InvalidList`], of the first import that is wrong.
    pub fn validate(&self, private: &[GfnRange], memory: &[GfnRange]) -> Result<(), InvalidList> {
        let mut sorted: Vec<&Import> = self.iter().collect();
        sorted.sort_by_key(|import| import.gfns.start());
        for (first, second) in sorted.iter().zip(sorted.iter().skip(1)) {
            if first.gfns.overlaps(&second.gfns) {
                return Err(InvalidList::Overlap { first: first.to_string(), second: second.to_string() });
            }
        }
        let (private, memory) = (merge_adjacent(private.iter().copied()), merge_adjacent(memory.iter().copied()));
        for import in self.iter() {
            let launched = import.page_type().is_some();
            let missing = subtract_lists(&[import.gfns], if launched { &private } else { &memory });
            if let Some(missing) = missing.first().copied() {
                let import = import.to_string();
                return Err(match launched {
                    true => InvalidList::NoPrivateMemory { import, missing },
                    false => InvalidList::NoMemory { import, missing },
                });
            }
        }
        Ok(())
    }
}

impl FromIterator<Import> for ImportList {
    fn from_iter<I: IntoIterator<Item = Import>>(imports: I) -> Self {
        Self { imports: imports.into_iter().collect() }
    }
}

impl<'a> IntoIterator for &'a ImportList {
    type Item = &'a Import;
    type IntoIter = std::slice::Iter<'a, Import>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
