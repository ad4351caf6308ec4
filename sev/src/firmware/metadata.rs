//! SEV metadata: the sections of guest memory that a launch has to prepare.

use super::FirmwareError;
use super::table::word;

/// `ASEV`.
const SIGNATURE: [u8; 4] = *b"ASEV";
/// Signature, size, version, number of sections.
const HEADER: usize = 16;
/// Address, size and type.
const SECTION: usize = 12;

/// What a section is for, as edk2 numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum SectionType {
    /// Memory of the first phase: zeroes.
    Memory = 1,
    /// The secrets page.
    Secrets = 2,
    /// The CPUID page.
    Cpuid = 3,
    /// The calling area of an SVSM: zeroes.
    CallingArea = 4,
    /// Hashes of kernel, initial RAM disk and command line; zeroes without a kernel.
    KernelHashes = 0x10,
}

/// A section. Address and size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// Guest physical address.
    pub gpa: u32,
    /// Size; may be zero.
    pub size: u32,
    /// What it is for.
    pub section_type: SectionType,
}

/// The sections that stand `offset` bytes before the end of the image.
pub(super) fn parse(image: &[u8], offset: u32) -> Result<Vec<Section>, FirmwareError> {
    let bad = |reason| FirmwareError::Metadata { offset, reason };
    let start = usize::try_from(offset).ok().and_then(|offset| image.len().checked_sub(offset));
    let data = start.and_then(|start| image.get(start..)).ok_or_else(|| bad("not in the image"))?;
    let (header, _) = data.split_first_chunk::<HEADER>().ok_or_else(|| bad("cut off"))?;
    if !header.starts_with(&SIGNATURE) {
        return Err(bad("no signature"));
    }
    let field = |nr| word(header, nr).unwrap_or(0);
    if field(8) != 1 {
        return Err(bad("not of version 1"));
    }
    let size = usize::try_from(field(4)).map_err(|_| bad("cut off"))?;
    let items = data.get(HEADER..size).ok_or_else(|| bad("cut off"))?;
    let count = usize::try_from(field(12))
        .ok()
        .filter(|count| count.checked_mul(SECTION).is_some_and(|bytes| bytes <= items.len()));
    let count = count.ok_or_else(|| bad("more sections than there is room for"))?;
    items.chunks_exact(SECTION).take(count).map(section).collect()
}

fn section(item: &[u8]) -> Result<Section, FirmwareError> {
    let field = |offset| word(item, offset).unwrap_or(0);
    let (gpa, size, raw) = (field(0), field(4), field(8));
    let section_type = match raw {
        1 => SectionType::Memory,
        2 => SectionType::Secrets,
        3 => SectionType::Cpuid,
        4 => SectionType::CallingArea,
        0x10 => SectionType::KernelHashes,
        _ => return Err(FirmwareError::UnknownSection { section_type: raw, gpa, size }),
    };
    Ok(Section { gpa, size, section_type })
}
