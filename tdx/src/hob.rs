//! The TD HOB: the list of a TD's memory that its firmware finds at the start.
//!
//! Memory that was added while the TD was built is "system memory"; all other is "unaccepted", and firmware or guest must
//! accept it before use. It lists memory only: devices, ACPI tables and the rest reach firmware in other ways. The list is
//! made by the untrusted host, and a guest that cares measures it.
//!
//! Mirrors chapter "TD HOB" of the TDVF design guide and the PI specification, volume 3.

use cvm_memory::addr::{GfnRange, Gpa};

use crate::import::overlap;

const HANDOFF: u16 = 0x0001;
const RESOURCE: u16 = 0x0003;
const END: u16 = 0xffff;
const HANDOFF_BYTES: u16 = 56;
const RESOURCE_BYTES: u16 = 48;
const END_BYTES: u16 = 8;
/// `EFI_HOB_HANDOFF_TABLE_VERSION`.
const VERSION: u32 = 9;
/// `EFI_RESOURCE_SYSTEM_MEMORY`, `EFI_RESOURCE_MEMORY_UNACCEPTED`.
const SYSTEM_MEMORY: u32 = 0;
const UNACCEPTED: u32 = 7;
/// Present, initialised, tested.
const ATTRIBUTES: u32 = 0b111;

/// A run of memory in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryEntry {
    /// The frames.
    pub gfns: GfnRange,
    /// Whether the guest must accept it before use.
    pub unaccepted: bool,
}

/// Why there is no list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HobError {
    /// Two ranges of RAM, or two of added memory, overlap.
    #[error("memory listed twice: gfns {gfns}")]
    Overlap {
        /// What both have.
        gfns: GfnRange,
    },
    /// Memory was added that does not lie within one range of RAM.
    #[error("added gfns {gfns} do not lie within one range of ram")]
    NotRam {
        /// What was added.
        gfns: GfnRange,
    },
    /// The list would be longer than addresses go.
    #[error("a list of memory at {base:#x} of {entries:#x} entries")]
    TooLong {
        /// Where.
        base: Gpa,
        /// How many.
        entries: usize,
    },
}

/// The TD's memory in order of address: `ram`, of which `added` is accepted already.
///
/// # Errors
/// [`HobError`] for memory that is listed twice, and for added memory outside or across ranges of RAM.
///
/// ```
/// use cvm_memory::addr::GfnRange;
/// use cvm_memory_tdx::hob::memory_list;
///
/// let ram = GfnRange::from_bytes(0, 0x100_0000)?;
/// let added = GfnRange::from_bytes(0x80_0000, 0x6000)?;
/// let list = memory_list(&[ram], &[added])?;
/// assert_eq!(list.iter().map(|entry| entry.unaccepted).collect::<Vec<_>>(), [true, false, true]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn memory_list(ram: &[GfnRange], added: &[GfnRange]) -> Result<Vec<MemoryEntry>, HobError> {
    let sorted = |ranges: &[GfnRange]| {
        let mut ranges: Vec<GfnRange> = ranges.iter().copied().filter(|gfns| !gfns.is_empty()).collect();
        ranges.sort_by_key(GfnRange::start);
        match overlap(ranges.iter().copied()) {
            Some((_, _, gfns)) => Err(HobError::Overlap { gfns }),
            None => Ok(ranges),
        }
    };
    let (ram, added) = (sorted(ram)?, sorted(added)?);
    let mut list = Vec::new();
    let mut added = added.into_iter().peekable();
    for whole in ram {
        let mut rest = whole;
        while let Some(gfns) = added.next_if(|gfns| whole.contains_range(gfns)) {
            let unaccepted = GfnRange::new(rest.start(), gfns.start()).unwrap_or(GfnRange::empty_at(rest.start()));
            list.push(MemoryEntry { gfns: unaccepted, unaccepted: true });
            list.push(MemoryEntry { gfns, unaccepted: false });
            rest = GfnRange::new(gfns.end(), whole.end()).unwrap_or(GfnRange::empty_at(whole.end()));
        }
        list.push(MemoryEntry { gfns: rest, unaccepted: true });
    }
    if let Some(gfns) = added.next() {
        return Err(HobError::NotRam { gfns });
    }
    list.retain(|entry| !entry.gfns.is_empty());
    Ok(list)
}

/// The list as firmware reads it, for address `base`.
///
/// # Errors
/// [`HobError::TooLong`]. Whether it fits its section is checked by [`Tdvf::imports`](crate::tdvf::Tdvf::imports).
pub fn td_hob(base: Gpa, memory: &[MemoryEntry]) -> Result<Vec<u8>, HobError> {
    let mut body = Vec::new();
    for entry in memory {
        header(&mut body, RESOURCE, RESOURCE_BYTES);
        // No owner.
        body.extend([0; 16]);
        body.extend(if entry.unaccepted { UNACCEPTED } else { SYSTEM_MEMORY }.to_le_bytes());
        body.extend(ATTRIBUTES.to_le_bytes());
        body.extend(entry.gfns.start_byte().to_le_bytes());
        body.extend(entry.gfns.bytes().to_le_bytes());
    }
    let end = u64::try_from(body.len()).ok().and_then(|len| len.checked_add(u64::from(HANDOFF_BYTES)));
    let end = end.and_then(|len| base.checked_add(len)).ok_or(HobError::TooLong { base, entries: memory.len() })?;
    let mut list = Vec::new();
    header(&mut list, HANDOFF, HANDOFF_BYTES);
    list.extend(VERSION.to_le_bytes());
    // Boot mode: full configuration. Then the four bounds of firmware's own memory, which it chooses by itself.
    list.extend([0; 4 + 4 * 8]);
    list.extend(end.get().to_le_bytes());
    list.extend(body);
    header(&mut list, END, END_BYTES);
    Ok(list)
}

fn header(list: &mut Vec<u8>, kind: u16, bytes: u16) {
    list.extend(kind.to_le_bytes());
    list.extend(bytes.to_le_bytes());
    list.extend([0; 4]);
}
