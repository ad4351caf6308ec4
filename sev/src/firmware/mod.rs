//! OVMF images: what they say about how an SNP guest is to be launched with them.
//!
//! An image ends at 4 GiB and is imported there. Near its end stands a table of GUIDs; entries of it say where the
//! sections are that the launch has to prepare (memory of the first phase, secrets, CPUID, ...), where other vCPUs start,
//! and where the hashes of a kernel go that the firmware is to trust. The image is untrusted input: everything it says is
//! checked, and an image that does not say what SNP needs is refused rather than measured in a way that cannot boot.
//!
//! Mirrors edk2's `OvmfPkg/ResetVector` (`OvmfSevMetadata.asm`, `Ia16/ResetVectorVtf0.asm`) and what QEMU does with it.

mod hashes;
mod metadata;
mod table;

use crate::cpuid::CpuidTable;
use crate::import::{Import, ImportList, InvalidImport};
use crate::page::{PAGE_BYTES, Page};
use crate::vmsa::{CpuSignature, Vmsa};

pub use hashes::{KernelHashes, TABLE_BYTES};
pub use metadata::{Section, SectionType};

/// Images end here.
const FOUR_GIB: u64 = 1 << 32;

/// Why an image cannot be launched. Offsets and sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FirmwareError {
    /// It is not whole pages, or does not fit below 4 GiB.
    #[error("a firmware image of {size:#x} bytes")]
    Size {
        /// Its size.
        size: u64,
    },
    /// There is no table of GUIDs at its end.
    #[error("no table of guids at the end of the image")]
    NoTable,
    /// An entry of the table is longer than what is left of it, shorter than its head, or the table longer than the image.
    #[error("table of guids: {size:#x} bytes at {offset:#x}")]
    TableEntry {
        /// Where the entry ends in the image.
        offset: usize,
        /// The size that it claims.
        size: u16,
    },
    /// The table has two entries of one kind.
    #[error("table of guids: {entry} twice")]
    Duplicate {
        /// Which.
        entry: &'static str,
    },
    /// An entry that is needed is not in the table, or is too short.
    #[error("table of guids: no {entry}")]
    Missing {
        /// Which.
        entry: &'static str,
    },
    /// The metadata are not where the table says, or are of another kind or version.
    #[error("sev metadata at {offset:#x} before the end: {reason}")]
    Metadata {
        /// Bytes before the end of the image.
        offset: u32,
        /// What is wrong.
        reason: &'static str,
    },
    /// A section of a type that this library does not know. It cannot be left out: the digest would differ.
    #[error("section of unknown type {section_type:#x} at {gpa:#x}, {size:#x} bytes")]
    UnknownSection {
        /// Its type.
        section_type: u32,
        /// Guest physical address.
        gpa: u32,
        /// In bytes.
        size: u32,
    },
    /// A section of one page that has another size.
    #[error("{section:?} is not one page")]
    NotOnePage {
        /// The section.
        section: Section,
    },
    /// Hashes of a kernel were given, and the image has no place for them.
    #[error("the image has no section for kernel hashes")]
    NoHashes,
    /// The place for hashes of a kernel is not within the section for it.
    #[error("kernel hashes at {gpa:#x}, {size:#x} bytes, not in {section:?}")]
    HashesOutside {
        /// Guest physical address.
        gpa: u32,
        /// In bytes.
        size: u32,
        /// The section.
        section: Section,
    },
    /// A section is not aligned.
    #[error(transparent)]
    Import(#[from] InvalidImport),
}

/// An OVMF image for SNP guests.
///
/// ```no_run
/// use cvm_memory_sev::cpuid::CpuidTable;
/// use cvm_memory_sev::firmware::Ovmf;
/// use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE};
///
/// let image = std::fs::read("OVMF.fd")?;
/// let firmware = Ovmf::parse(&image)?;
/// let cpu = CpuSignature::of_cpu_type("EPYC-v4").ok_or("unknown processor")?;
/// let list = firmware.import_list(&CpuidTable::default(), None)?;
/// println!("{}", list.digest(&firmware.vmsas(1, cpu, SNP_ACTIVE)?));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Ovmf<'a> {
    image: &'a [u8],
    gpa: u64,
    sections: Vec<Section>,
    reset: Option<u32>,
    hashes: Option<(u32, u32)>,
}

impl<'a> Ovmf<'a> {
    /// Reads what the image says.
    ///
    /// # Errors
    /// [`FirmwareError`]: it says nothing about SNP, or something wrong.
    pub fn parse(image: &'a [u8]) -> Result<Self, FirmwareError> {
        let size = u64::try_from(image.len()).unwrap_or(u64::MAX);
        let gpa = FOUR_GIB.checked_sub(size).filter(|_| size > 0 && image.len().is_multiple_of(PAGE_BYTES));
        let gpa = gpa.ok_or(FirmwareError::Size { size })?;
        let table = table::parse(image)?;
        let sections = metadata::parse(image, table.metadata_offset()?)?;
        Ok(Self { image, gpa, sections, reset: table.reset(), hashes: table.hashes() })
    }

    /// Where its first byte belongs.
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }

    /// The sections in their order, empty ones included.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Linear address at which vCPUs other than the first start.
    ///
    /// # Errors
    /// [`FirmwareError::Missing`].
    pub fn start_of_others(&self) -> Result<u32, FirmwareError> {
        self.reset.ok_or(FirmwareError::Missing { entry: "reset block" })
    }

    /// The save areas of `vcpus` vCPUs after reset.
    ///
    /// # Errors
    /// [`FirmwareError::Missing`] if there are several and the image does not say where the others start.
    pub fn vmsas(&self, vcpus: u32, cpu: CpuSignature, features: u64) -> Result<Vec<Vmsa>, FirmwareError> {
        let start = if vcpus > 1 { self.start_of_others()? } else { 0 };
        Ok(Vmsa::of_all(vcpus, start, cpu, features))
    }

    /// What to launch: the image, then its sections in their order. Empty sections are left out, since KVM refuses them.
    ///
    /// # Errors
    /// [`FirmwareError`]: a section is not aligned or has a wrong size; there is no place for `hashes`.
    pub fn import_list(&self, cpuid: &CpuidTable, hashes: Option<&KernelHashes>) -> Result<ImportList, FirmwareError> {
        let mut list = ImportList::default();
        list.push(Import::normal(self.gpa, self.image)?);
        for section in self.sections.iter().filter(|section| section.size != 0) {
            list.push(self.import(section, cpuid, hashes)?);
        }
        if hashes.is_some() && !self.sections.iter().any(|section| section.section_type == SectionType::KernelHashes) {
            return Err(FirmwareError::NoHashes);
        }
        Ok(list)
    }

    fn import(
        &self,
        section: &Section,
        cpuid: &CpuidTable,
        hashes: Option<&KernelHashes>,
    ) -> Result<Import, FirmwareError> {
        let (gpa, size) = (u64::from(section.gpa), u64::from(section.size));
        let one_page = || {
            let is_one = size == cvm_memory::addr::PAGE_SIZE;
            if is_one { Ok(()) } else { Err(FirmwareError::NotOnePage { section: *section }) }
        };
        Ok(match (section.section_type, hashes) {
            (SectionType::Memory | SectionType::CallingArea, _) | (SectionType::KernelHashes, None) => {
                Import::zero(gpa, size)?
            }
            (SectionType::Secrets, _) => {
                one_page()?;
                Import::secrets(gpa)?
            }
            (SectionType::Cpuid, _) => {
                one_page()?;
                Import::cpuid(gpa, cpuid.clone())?
            }
            (SectionType::KernelHashes, Some(hashes)) => {
                one_page()?;
                Import::normal(gpa, &**self.hashes_page(section, hashes)?)?
            }
        })
    }

    /// The page of the section, with the table where the image wants it.
    fn hashes_page(&self, section: &Section, hashes: &KernelHashes) -> Result<Box<Page>, FirmwareError> {
        let (gpa, size) = self.hashes.ok_or(FirmwareError::Missing { entry: "kernel hashes" })?;
        let offset = gpa.checked_sub(section.gpa).and_then(|offset| usize::try_from(offset).ok());
        let fits = |offset: &usize| {
            offset.checked_add(TABLE_BYTES).is_some_and(|end| end <= PAGE_BYTES)
                && usize::try_from(size).is_ok_and(|size| size >= TABLE_BYTES)
        };
        let offset = offset.filter(fits).ok_or(FirmwareError::HashesOutside { gpa, size, section: *section })?;
        let mut page = Box::new(Page::ZERO);
        page.put(offset, &hashes.table());
        Ok(page)
    }
}
