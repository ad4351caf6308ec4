//! TDVF metadata: what a firmware image says about how a TD has to be built from it.
//!
//! The image ends in a table of GUIDs; one of its entries says how far from the end a descriptor lies, which lists sections:
//! parts of the image with where to put them, and memory that has to be there from the start. The file is not trusted:
//! everything is checked against its real size and against each other before anything is built from it. An image that was cut
//! (OVMF's CODE-only builds still describe the whole) is refused.
//!
//! It does not look for the descriptor in any other way, and knows no kernel. Mirrors chapter 11 of the TDVF design guide and
//! `OvmfPkg/ResetVector/X64/IntelTdxMetadata.asm`.

use std::ops::Range;

use bitflags::bitflags;
use cvm_memory::addr::{AddrError, GfnRange};
use uuid::{Uuid, uuid};

use crate::import::{Import, overlap};

/// Ends the table of GUIDs.
const TABLE: Uuid = uuid!("96b582de-1fb2-45f7-baea-a366c55a082d");
/// The entry with the descriptor's distance from the end.
const METADATA: Uuid = uuid!("e47a6535-984a-4798-865e-4685a7bf8ec2");
/// Bytes behind the table: the reset vector.
const BEHIND_TABLE: usize = 32;
/// What ends each entry of the table, and the table: a length, which counts itself, and a GUID.
const TRAILER: usize = 18;
const SIGNATURE: [u8; 4] = *b"TDVF";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const SECTION_BYTES: usize = 32;
/// The most memory that all sections together may want: they lie where 32-bit code can reach them.
const MOST_BYTES: u64 = 1 << 32;

/// What a section is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// BFV: the firmware's code.
    Bfv,
    /// CFV: the firmware's variables.
    Cfv,
    /// Where the VMM puts the list of the TD's memory ([`hob`](crate::hob)).
    TdHob,
    /// Memory that firmware works with until it has accepted some.
    TempMem,
    /// Memory that is to stay as it is.
    PermMem,
}

impl SectionKind {
    const fn from_raw(raw: u32) -> Option<Self> {
        Some(match raw {
            0 => Self::Bfv,
            1 => Self::Cfv,
            2 => Self::TdHob,
            3 => Self::TempMem,
            4 => Self::PermMem,
            _ => return None,
        })
    }

    /// Whether it is a part of the image.
    const fn has_data(self) -> bool {
        matches!(self, Self::Bfv | Self::Cfv)
    }
}

bitflags! {
    /// How a section is to be added.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Attributes: u32 {
        /// Its contents are measured.
        const MEASURED = 1 << 0;
        /// Not at all: the guest accepts it when it runs.
        const AUGMENTED = 1 << 1;
    }
}

/// One section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it is.
    pub kind: SectionKind,
    /// How to add it.
    pub attributes: Attributes,
    /// Where.
    pub gfns: GfnRange,
    /// Its bytes in the image; empty for memory. Never more than `gfns` hold; the rest is zeroes.
    pub data: Range<usize>,
}

/// Why an image cannot be built from. Sections by their position in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TdvfError {
    /// There is no table of GUIDs, or it is longer than the image.
    #[error("no table of guids at the end of the image of {size:#x} bytes")]
    NoTable {
        /// Size of the image.
        size: usize,
    },
    /// An entry of the table reaches beyond it.
    #[error("bad entry in the table of guids, which ends at {at:#x}")]
    BadTable {
        /// End of the entry, as an offset into the image.
        at: usize,
    },
    /// The table has no entry for TDX.
    #[error("the image has no TDVF metadata")]
    NoMetadata,
    /// The descriptor is not within the image, or not what it should be.
    #[error("no TDVF descriptor {offset:#x} bytes before the end of the image of {size:#x} bytes")]
    BadDescriptor {
        /// Where the table says it is.
        offset: u32,
        /// Size of the image.
        size: usize,
    },
    /// Another version than 1.
    #[error("TDVF metadata of version {version}")]
    Version {
        /// Which.
        version: u32,
    },
    /// The number of sections does not agree with the descriptor's length, or runs past the end of the image.
    #[error("TDVF metadata of {length:#x} bytes with {sections:#x} sections")]
    Length {
        /// The descriptor's length in bytes.
        length: u32,
        /// Its number of sections.
        sections: u32,
    },
    /// A section of a type that nobody has defined, or that this library does not build.
    #[error("section {index}: unknown type {kind:#x}")]
    Kind {
        /// Which.
        index: usize,
        /// Its type.
        kind: u32,
    },
    /// Attributes that mean nothing, or nothing together.
    #[error("section {index}: attributes {attributes:#x}")]
    Attributes {
        /// Which.
        index: usize,
        /// Its attributes.
        attributes: u32,
    },
    /// Its memory is no range of pages.
    #[error("section {index}: bad memory range")]
    Memory {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        error: AddrError,
    },
    /// Its data runs past the end of the image.
    #[error("section {index}: data at {offset:#x}, {size:#x} bytes, in an image of {image:#x} bytes")]
    PastEnd {
        /// Which.
        index: usize,
        /// Where its data starts.
        offset: u32,
        /// How long it is.
        size: u32,
        /// Size of the image.
        image: usize,
    },
    /// It has more data than memory, none although it is a part of the image, or some although it is not.
    #[error("section {index}: {size:#x} bytes of data for gfns {gfns}")]
    Data {
        /// Which.
        index: usize,
        /// How long its data is.
        size: u32,
        /// Its memory.
        gfns: GfnRange,
    },
    /// The sections want more memory than there can be where firmware starts.
    #[error("the sections up to {index} want more than {MOST_BYTES:#x} bytes")]
    TooMuch {
        /// The first that is too much.
        index: usize,
    },
    /// Two sections overlap.
    #[error("sections {first} and {second} both have gfns {gfns}")]
    Overlap {
        /// One of them.
        first: usize,
        /// The other.
        second: usize,
        /// What they share.
        gfns: GfnRange,
    },
    /// There is no code, or more than one place for the list of memory.
    #[error("{bfv} sections with code, {td_hob} for the list of memory")]
    Count {
        /// BFV sections; one or more.
        bfv: usize,
        /// TD_HOB sections; one at most.
        td_hob: usize,
    },
    /// The list of memory does not fit its section.
    #[error("a list of memory of {bytes:#x} bytes for gfns {gfns:?}")]
    HobTooLarge {
        /// Size of the list.
        bytes: usize,
        /// The section; `None` if there is none.
        gfns: Option<GfnRange>,
    },
}

/// A firmware image whose metadata is sound.
///
/// ```no_run
/// use cvm_memory_tdx::{import::ImportList, mrtd::Order, tdvf::Tdvf, width::Width};
///
/// let image = std::fs::read("OVMF.fd")?;
/// let tdvf = Tdvf::parse(&image)?;
/// // The list of memory is not measured by any known firmware.
/// let imports = ImportList::new(tdvf.imports(&[])?, Width::Bits48)?;
/// println!("{}", imports.mrtd(Order::SinglePass));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tdvf<'a> {
    image: &'a [u8],
    sections: Vec<Section>,
}

impl<'a> Tdvf<'a> {
    /// Reads the metadata of a whole image.
    ///
    /// # Errors
    /// [`TdvfError`] for the first thing that is wrong.
    pub fn parse(image: &'a [u8]) -> Result<Self, TdvfError> {
        let offset = descriptor_offset(image)?;
        let sections = sections(image, offset)?;
        if let Some((first, second, gfns)) = overlap(sections.iter().map(|section| section.gfns)) {
            return Err(TdvfError::Overlap { first, second, gfns });
        }
        let count = |kind| sections.iter().filter(|section| section.kind == kind).count();
        let (bfv, td_hob) = (count(SectionKind::Bfv), count(SectionKind::TdHob));
        if bfv == 0 || td_hob > 1 {
            return Err(TdvfError::Count { bfv, td_hob });
        }
        Ok(Self { image, sections })
    }

    /// The sections, in the order in which they are added and measured.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Where the list of memory goes.
    pub fn td_hob(&self) -> Option<&Section> {
        self.sections.iter().find(|section| section.kind == SectionKind::TdHob)
    }

    /// Memory that is there from the start, parts of the image left out: what the list of memory must not call unaccepted.
    pub fn added_memory(&self) -> Vec<GfnRange> {
        let added =
            |section: &&Section| !section.kind.has_data() && !section.attributes.contains(Attributes::AUGMENTED);
        self.sections.iter().filter(added).map(|section| section.gfns).collect()
    }

    /// What to add, in order, with `hob` as the list of memory.
    ///
    /// # Errors
    /// [`TdvfError::HobTooLarge`] if there is no place for it.
    pub fn imports(&self, hob: &[u8]) -> Result<Vec<Import>, TdvfError> {
        let gfns = self.td_hob().map(|section| section.gfns);
        let room = gfns.and_then(|gfns| usize::try_from(gfns.bytes()).ok()).unwrap_or(0);
        if hob.len() > room {
            return Err(TdvfError::HobTooLarge { bytes: hob.len(), gfns });
        }
        let added = self.sections.iter().filter(|section| !section.attributes.contains(Attributes::AUGMENTED));
        let import = |section: &Section| Import {
            gfns: section.gfns,
            measured: section.attributes.contains(Attributes::MEASURED),
            contents: match section.kind {
                SectionKind::TdHob => hob.to_vec(),
                _ => self.image.get(section.data.clone()).unwrap_or_default().to_vec(),
            },
        };
        Ok(added.map(import).collect())
    }
}

/// `N` bytes at `at`.
fn bytes<const N: usize>(image: &[u8], at: usize) -> Option<[u8; N]> {
    image.get(at..)?.first_chunk().copied()
}

fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    bytes(image, at).map(u32::from_le_bytes)
}

/// The trailer that ends at `end`: where what it belongs to starts, and its GUID.
fn trailer(image: &[u8], end: usize) -> Option<(usize, Uuid)> {
    let at = end.checked_sub(TRAILER)?;
    let length = usize::from(bytes(image, at).map(u16::from_le_bytes)?);
    let guid = Uuid::from_bytes_le(bytes(image, at.checked_add(2)?)?);
    let start = end.checked_sub(length).filter(|start| *start <= at)?;
    Some((start, guid))
}

/// How far from the end the table says that the descriptor is.
fn descriptor_offset(image: &[u8]) -> Result<u32, TdvfError> {
    let size = image.len();
    let end = size.checked_sub(BEHIND_TABLE).ok_or(TdvfError::NoTable { size })?;
    let (start, guid) = trailer(image, end).ok_or(TdvfError::NoTable { size })?;
    if guid != TABLE {
        return Err(TdvfError::NoTable { size });
    }
    // Entries are read from the last to the first; each ends where the next one starts.
    let mut at = end.saturating_sub(TRAILER);
    while at > start {
        let entry = trailer(image, at).filter(|(first, _)| *first >= start);
        let (first, guid) = entry.ok_or(TdvfError::BadTable { at })?;
        if guid == METADATA {
            return u32_at(image, first)
                .filter(|_| at.saturating_sub(first) >= TRAILER + 4)
                .ok_or(TdvfError::BadTable { at });
        }
        at = first;
    }
    Err(TdvfError::NoMetadata)
}

/// The sections of the descriptor that lies `offset` bytes before the end.
fn sections(image: &[u8], offset: u32) -> Result<Vec<Section>, TdvfError> {
    let bad = TdvfError::BadDescriptor { offset, size: image.len() };
    let at = usize::try_from(offset).ok().and_then(|offset| image.len().checked_sub(offset)).ok_or(bad)?;
    let descriptor = image.get(at..).ok_or(bad)?;
    let (Some(signature), Some(length), Some(version), Some(count)) =
        (bytes(descriptor, 0), u32_at(descriptor, 4), u32_at(descriptor, 8), u32_at(descriptor, 12))
    else {
        return Err(bad);
    };
    if signature != SIGNATURE {
        return Err(bad);
    }
    if version != VERSION {
        return Err(TdvfError::Version { version });
    }
    let body = usize::try_from(length).ok().and_then(|length| descriptor.get(HEADER_BYTES..length));
    let expected = usize::try_from(count).ok().and_then(|count| count.checked_mul(SECTION_BYTES));
    let body = body.filter(|body| Some(body.len()) == expected).ok_or(TdvfError::Length { length, sections: count })?;
    let mut sections = Vec::new();
    let mut total = 0_u64;
    for (index, entry) in body.chunks_exact(SECTION_BYTES).enumerate() {
        let section = section(image, index, entry)?;
        total = total.saturating_add(section.gfns.bytes());
        if total > MOST_BYTES {
            return Err(TdvfError::TooMuch { index });
        }
        sections.push(section);
    }
    Ok(sections)
}

fn section(image: &[u8], index: usize, entry: &[u8]) -> Result<Section, TdvfError> {
    let word = |at| u32_at(entry, at).unwrap_or_default();
    let long = |at| bytes(entry, at).map(u64::from_le_bytes).unwrap_or_default();
    let (offset, size, kind, raw_attributes) = (word(0), word(4), word(24), word(28));
    let kind = SectionKind::from_raw(kind).ok_or(TdvfError::Kind { index, kind })?;
    let gfns = GfnRange::from_bytes(long(8), long(16)).map_err(|error| TdvfError::Memory { index, error })?;
    let attributes = Attributes::from_bits(raw_attributes)
        // Memory that is accepted later has no contents yet, and nothing that could be measured.
        .filter(|attributes| *attributes != Attributes::all())
        .filter(|attributes| !attributes.contains(Attributes::AUGMENTED) || kind == SectionKind::PermMem)
        .ok_or(TdvfError::Attributes { index, attributes: raw_attributes })?;
    if kind.has_data() != (size != 0) || u64::from(size) > gfns.bytes() {
        return Err(TdvfError::Data { index, size, gfns });
    }
    let data = (|| {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        (end <= image.len()).then_some(start..end)
    })();
    let data = match data {
        _ if size == 0 => 0..0,
        Some(data) => data,
        None => return Err(TdvfError::PastEnd { index, offset, size, image: image.len() }),
    };
    Ok(Section { kind, attributes, gfns, data })
}
