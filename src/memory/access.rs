//! Accesses of the host to guest memory, as devices make them: to shared pages only, which stay shared while it lasts.

use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::addr::{AddrError, GfnRange, Gpa, PAGE_SIZE};
use crate::backing::SharedSlice;
use crate::convert::{Pin, PinError};

use super::CvmMemory;

/// Why the host may not read or write guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The bytes wrap or lie beyond the top.
    #[error("access of {len:#x} bytes at {gpa:#x}")]
    Range {
        /// First byte.
        gpa: Gpa,
        /// Bytes.
        len: u64,
        /// Why.
        #[source]
        error: AddrError,
    },
    /// Some of it is private, no memory, or being converted by this very thread.
    #[error("access of {len:#x} bytes at {gpa:#x}")]
    Pin {
        /// First byte.
        gpa: Gpa,
        /// Bytes.
        len: u64,
        /// Why.
        #[source]
        error: PinError,
    },
}

/// Bytes that are contiguous in one mapping.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) memory: SharedSlice,
    /// So many of them.
    pub(crate) bytes: u64,
}

impl CvmMemory {
    /// Reads shared memory, as a device may: never a private page.
    ///
    /// # Errors
    /// [`AccessError`]; `bytes` is untouched then.
    pub fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), AccessError> {
        let mut rest = bytes;
        self.each_part(gpa, rest.len() as u64, |_, slice| {
            if let Some((now, later)) = std::mem::take(&mut rest).split_at_mut_checked(slice.len()) {
                slice.copy_to(now);
                rest = later;
            }
        })
    }

    /// Writes shared memory: never a private page. Read-only memory too, which is how firmware gets there; a device has no
    /// business to, and [`SharedView`](crate::view::SharedView) refuses it. Who [keeps](Self::set_harvest) dirty bits is told.
    ///
    /// # Errors
    /// [`AccessError`]; nothing is written then.
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), AccessError> {
        let mut rest = bytes;
        self.each_part(gpa, rest.len() as u64, |part, slice| {
            if let Some((now, later)) = rest.split_at_checked(slice.len()) {
                slice.copy_from(now);
                rest = later;
                self.wrote(&part.memory, part.bytes);
            }
        })
    }

    /// Visits the bytes of a range, ascending, while they are pinned.
    fn each_part(
        &self,
        gpa: Gpa,
        len: u64,
        mut visit: impl FnMut(&Part, VolatileSlice<'_>),
    ) -> Result<(), AccessError> {
        if len == 0 {
            return Ok(());
        }
        let (_pin, parts) = self.access(gpa, len)?;
        for part in &parts {
            if let Some(slice) = part.memory.backing.slice(part.memory.offset, part.bytes) {
                visit(part, slice);
            }
        }
        Ok(())
    }

    /// Pins the pages of a range that is not empty, and says where its bytes lie: all of them.
    pub(crate) fn access(&self, gpa: Gpa, len: u64) -> Result<(Pin<'_>, Vec<Part>), AccessError> {
        let in_page = gpa.page_offset();
        let gfns = len
            .checked_add(in_page)
            .and_then(|bytes| bytes.checked_next_multiple_of(PAGE_SIZE))
            .ok_or(AddrError::BeyondTop { start: gpa.get(), size: len })
            .and_then(|bytes| GfnRange::from_bytes(gpa.get().saturating_sub(in_page), bytes))
            .map_err(|error| AccessError::Range { gpa, len, error })?;
        let pin = self.pin(gfns).map_err(|error| AccessError::Pin { gpa, len, error })?;
        let space = self.space();
        let end = gpa.get().saturating_add(len);
        let (mut parts, mut found) = (Vec::new(), 0_u64);
        for piece in space.shared_pieces(gfns) {
            let first = gpa.get().max(piece.gfns.start_byte());
            let bytes = end.min(piece.gfns.end_byte()).saturating_sub(first);
            let offset = piece.offset.saturating_add(first.saturating_sub(piece.gfns.start_byte()));
            let Some(SharedSlice { backing, .. }) = space.shared(piece.slot) else { continue };
            if backing.slice(offset, bytes).is_some() {
                found = found.saturating_add(bytes);
                parts.push(Part { memory: SharedSlice { backing: Arc::clone(backing), offset }, bytes });
            }
        }
        if found != len {
            // Slots have gone since it was pinned.
            return Err(AccessError::Pin { gpa, len, error: PinError::NotShared { range: gfns, part: gfns } });
        }
        Ok((pin, parts))
    }

    /// Whoever keeps dirty bits is told that `bytes` bytes of `memory` have been written. It is looked up now: who began to
    /// keep them while the bytes were being written has not seen these yet.
    pub(crate) fn wrote(&self, memory: &SharedSlice, bytes: u64) {
        if let Some(harvester) = self.harvester() {
            harvester.wrote(memory, bytes);
        }
    }
}
