//! The buffer of page state changes in a GHCB page: up to 253 entries, worked off in batches.
//!
//! ```text
//! header: cur_entry u16, end_entry u16 (inclusive), reserved u32
//! entry:  bits 11:0 cur_page, 51:12 gfn, 55:52 operation, 56 page of 2 MiB, 63:57 reserved
//! ```
//! [`Cursor::next`] is `snp_begin_psc()`: it skips what is done, gathers a batch and either asks for a hypercall exit or is
//! finished; [`Cursor::complete`] is what follows userspace's answer. The buffer belongs to the guest, who may change it at
//! any time: each entry is copied once per look.

use super::{MapGpaRange, Operation};

/// Bytes of the header, and of an entry.
const BYTES: u64 = 8;
/// Entries of a buffer that starts where the shared buffer of a GHCB does.
pub const MAX_ENTRIES: u16 = 253;
/// Pages of 4 KiB in an entry of 2 MiB.
const LARGE: u16 = 512;

/// Entries that fit between the scratch address and the end of the shared buffer.
pub fn max_entries(scratch_bytes: u64) -> u16 {
    let entries = scratch_bytes.saturating_sub(BYTES) / BYTES;
    u16::try_from(entries).unwrap_or(u16::MAX).min(MAX_ENTRIES)
}

/// Which entries are to be worked off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// The next one.
    pub cur_entry: u16,
    /// The last one.
    pub end_entry: u16,
}

/// One entry. Numbers as they stand, within their bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Pages of 4 KiB that are done.
    pub cur_page: u16,
    /// First frame.
    pub gfn: u64,
    /// What is asked for.
    pub operation: u8,
    /// Whether it is 2 MiB.
    pub large: bool,
}

impl Header {
    /// From its bytes.
    pub const fn from_raw(raw: u64) -> Self {
        let [a, b, c, d, ..] = raw.to_le_bytes();
        Self { cur_entry: u16::from_le_bytes([a, b]), end_entry: u16::from_le_bytes([c, d]) }
    }

    /// Its bytes.
    pub const fn raw(self) -> u64 {
        self.cur_entry as u64 | (self.end_entry as u64) << 16
    }
}

/// A header's bytes with another `cur_entry`. What is reserved stays.
const fn at_entry(raw: u64, cur_entry: u16) -> u64 {
    raw & !(u16::MAX as u64) | cur_entry as u64
}

impl Entry {
    /// A whole page, for a guest to ask for.
    pub const fn new(gfn: u64, operation: Operation, large: bool) -> Self {
        Self { cur_page: 0, gfn, operation: operation.raw(), large }
    }

    /// From its bytes. Reserved bits are not looked at.
    pub const fn from_raw(raw: u64) -> Self {
        let [low, high, .., operation, size] = raw.to_le_bytes();
        Self {
            cur_page: u16::from_le_bytes([low, high & 0xf]),
            gfn: (raw >> 12) & ((1 << 40) - 1),
            operation: operation >> 4,
            large: size & 1 != 0,
        }
    }

    /// Its bytes.
    pub const fn raw(self) -> u64 {
        (self.cur_page & 0xfff) as u64
            | (self.gfn & ((1 << 40) - 1)) << 12
            | ((self.operation & 0xf) as u64) << 52
            | (self.large as u64) << 56
    }

    /// Pages of 4 KiB.
    const fn pages(self) -> u16 {
        if self.large { LARGE } else { 1 }
    }
}

/// `SW_EXITINFO2` of a finished request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum Completion {
    /// Everything is done.
    Done = 0,
    /// The header speaks of entries that there cannot be.
    InvalidHeader = 0x1_0000_0001,
    /// An entry is impossible.
    InvalidEntry = 0x1_0000_0002,
    /// Userspace refused, or hypercalls do not exit.
    Failed = 0x100_0000_0000,
}

impl Completion {
    /// Its number.
    pub const fn raw(self) -> u64 {
        self as u64
    }
}

/// The buffer in guest memory.
pub trait Buffer {
    /// What went wrong with the memory.
    type Error;

    /// Reads the 8 bytes at `offset`, which is within the buffer.
    ///
    /// # Errors
    /// The memory is not there.
    fn read(&mut self, offset: u64) -> Result<u64, Self::Error>;

    /// Writes them.
    ///
    /// # Errors
    /// The memory is not there.
    fn write(&mut self, offset: u64, value: u64) -> Result<(), Self::Error>;
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Userspace is asked; then comes [`Cursor::complete`].
    Exit(MapGpaRange),
    /// The request is finished.
    Finished(Completion),
}

/// How far KVM is with a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    max: u16,
    /// First entry and number of entries that userspace is being asked for.
    in_flight: (u16, u16),
}

const fn at(entry: u16) -> u64 {
    BYTES.saturating_add((entry as u64).saturating_mul(BYTES))
}

impl Cursor {
    /// For a buffer of so many entries.
    pub const fn new(max: u16) -> Self {
        Self { max, in_flight: (0, 0) }
    }

    /// Finds the next batch.
    ///
    /// # Errors
    /// The buffer's.
    pub fn next<B: Buffer>(&mut self, buffer: &mut B) -> Result<Next, B::Error> {
        loop {
            let raw = buffer.read(0)?;
            let Header { cur_entry: start, end_entry: end } = Header::from_raw(raw);
            if end >= self.max {
                return Ok(Next::Finished(Completion::InvalidHeader));
            }
            let mut found = None;
            for nr in start..=end {
                let entry = Entry::from_raw(buffer.read(at(nr))?);
                if entry.cur_page > entry.pages() || !entry.gfn.is_multiple_of(u64::from(entry.pages())) {
                    return Ok(Next::Finished(Completion::InvalidEntry));
                }
                if entry.cur_page < entry.pages() {
                    found = Some((nr, entry));
                    break;
                }
                buffer.write(0, at_entry(raw, nr.saturating_add(1)))?;
            }
            let Some((first, entry)) = found else { return Ok(Next::Finished(Completion::Done)) };
            let (count, pages) = self.gather(buffer, first, end, entry)?;
            self.in_flight = (first, count);
            match Operation::from_raw(entry.operation) {
                Some(operation) => {
                    let gfn = entry.gfn.saturating_add(u64::from(entry.cur_page));
                    return Ok(Next::Exit(MapGpaRange { gfn, pages, operation, large: entry.large }));
                }
                // KVM carries out no other, and says that it has.
                None => self.mark_done(buffer)?,
            }
        }
    }

    /// The entries after `first` that go with it: the same operation and size, and frames that follow. Returns entries and pages.
    fn gather<B: Buffer>(&self, buffer: &mut B, first: u16, end: u16, entry: Entry) -> Result<(u16, u64), B::Error> {
        // What is left of a page of 2 MiB that was begun is 4 KiB pages, and goes by itself with such.
        let large = entry.large && entry.cur_page == 0;
        let mut pages = u64::from(entry.pages().saturating_sub(entry.cur_page));
        let mut count = 1_u16;
        for nr in first.saturating_add(1)..=end {
            let next = Entry::from_raw(buffer.read(at(nr))?);
            let follows = Some(next.gfn) == entry.gfn.checked_add(pages);
            if next.operation != entry.operation || !follows || next.cur_page != 0 || next.large != large {
                break;
            }
            count = count.saturating_add(1);
            pages = pages.saturating_add(u64::from(next.pages()));
        }
        Ok((count, pages))
    }

    /// Userspace has answered.
    ///
    /// # Errors
    /// The buffer's.
    pub fn complete<B: Buffer>(&mut self, buffer: &mut B, answer: u64) -> Result<Next, B::Error> {
        if answer != 0 {
            return Ok(Next::Finished(Completion::Failed));
        }
        self.mark_done(buffer)?;
        self.next(buffer)
    }

    fn mark_done<B: Buffer>(&mut self, buffer: &mut B) -> Result<(), B::Error> {
        let (first, count) = self.in_flight;
        let end = first.saturating_add(count);
        for nr in first..end {
            let raw = buffer.read(at(nr))?;
            buffer.write(at(nr), raw & !0xfff | u64::from(Entry::from_raw(raw).pages()))?;
        }
        self.in_flight = (end, 0);
        let raw = buffer.read(0)?;
        buffer.write(0, at_entry(raw, end))
    }
}
