//! The table of GUIDs near the end of an image, read from its end backwards.
//!
//! ```text
//! ... data, size u16, guid 16 | data, size u16, guid 16 | size u16, footer guid 16 | 32 bytes, end of the image
//! ```
//! Sizes include what stands in the same entry, data first; the footer's is the whole table's.

use super::FirmwareError;

/// GUIDs as they stand in memory.
mod guid {
    /// 96b582de-1fb2-45f7-baea-a366c55a082d
    pub const FOOTER: [u8; 16] =
        [0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d];
    /// dc886566-984a-4798-a75e-5585a7bf67cc
    pub const METADATA: [u8; 16] =
        [0x66, 0x65, 0x88, 0xdc, 0x4a, 0x98, 0x98, 0x47, 0xa7, 0x5e, 0x55, 0x85, 0xa7, 0xbf, 0x67, 0xcc];
    /// 00f771de-1a7e-4fcb-890e-68c77e2fb44e
    pub const RESET: [u8; 16] =
        [0xde, 0x71, 0xf7, 0x00, 0x7e, 0x1a, 0xcb, 0x4f, 0x89, 0x0e, 0x68, 0xc7, 0x7e, 0x2f, 0xb4, 0x4e];
    /// 7255371f-3a3b-4b04-927b-1da6efa8d454
    pub const HASHES: [u8; 16] =
        [0x1f, 0x37, 0x55, 0x72, 0x3b, 0x3a, 0x04, 0x4b, 0x92, 0x7b, 0x1d, 0xa6, 0xef, 0xa8, 0xd4, 0x54];
}

/// Bytes between the table and the end of the image.
const TAIL: usize = 32;
/// Size and GUID of an entry.
const HEAD: usize = 18;

/// What the table says, as far as it is needed here.
#[derive(Debug, Default)]
pub(super) struct Table<'a> {
    metadata: Option<&'a [u8]>,
    reset: Option<&'a [u8]>,
    hashes: Option<&'a [u8]>,
}

impl Table<'_> {
    /// Where the metadata start, in bytes before the end of the image.
    pub(super) fn metadata_offset(&self) -> Result<u32, FirmwareError> {
        self.metadata.and_then(|data| word(data, 0)).ok_or(FirmwareError::Missing { entry: "sev metadata" })
    }

    /// Where other vCPUs start.
    pub(super) fn reset(&self) -> Option<u32> {
        word(self.reset?, 0)
    }

    /// Address and size of the place for kernel hashes; an address of zero means none.
    pub(super) fn hashes(&self) -> Option<(u32, u32)> {
        let data = self.hashes?;
        Some((word(data, 0).filter(|gpa| *gpa != 0)?, word(data, 4)?))
    }
}

/// A little-endian word.
pub(super) fn word(data: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*data.get(offset..)?.first_chunk()?))
}

/// What stands before the size and the GUID that end `data`, the size and the GUID.
fn split(data: &[u8]) -> Option<(&[u8], u16, &[u8; 16])> {
    let (rest, guid) = data.split_last_chunk::<16>()?;
    let (rest, size) = rest.split_last_chunk::<2>()?;
    Some((rest, u16::from_le_bytes(*size), guid))
}

pub(super) fn parse(image: &[u8]) -> Result<Table<'_>, FirmwareError> {
    let end = image.len().checked_sub(TAIL).ok_or(FirmwareError::NoTable)?;
    let (rest, size, footer) = image.get(..end).and_then(split).ok_or(FirmwareError::NoTable)?;
    if *footer != guid::FOOTER {
        return Err(FirmwareError::NoTable);
    }
    let bad = |offset| FirmwareError::TableEntry { offset, size };
    let len = usize::from(size).checked_sub(HEAD).ok_or_else(|| bad(end))?;
    let start = rest.len().checked_sub(len).ok_or_else(|| bad(end))?;
    let mut left = rest.get(start..).unwrap_or_default();
    let mut table = Table::default();
    while let Some((before, size, guid)) = split(left) {
        let bad = FirmwareError::TableEntry { offset: start.saturating_add(left.len()), size };
        let data = usize::from(size).checked_sub(HEAD).and_then(|len| before.len().checked_sub(len));
        let (rest, data) = data.and_then(|at| before.split_at_checked(at)).ok_or(bad)?;
        let (entry, name) = match *guid {
            guid::METADATA => (&mut table.metadata, "sev metadata"),
            guid::RESET => (&mut table.reset, "reset block"),
            guid::HASHES => (&mut table.hashes, "kernel hashes"),
            _ => {
                left = rest;
                continue;
            }
        };
        if entry.replace(data).is_some() {
            return Err(FirmwareError::Duplicate { entry: name });
        }
        left = rest;
    }
    Ok(table)
}
