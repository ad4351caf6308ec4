//! The layout against the contract's vectors, against per-page brute force, and against a naive model.

mod clip;
mod edges;
mod sequences;
mod space;

use proptest::prelude::*;

use super::*;
use crate::addr::FilePage;

pub fn gfn(n: u64) -> Gfn {
    Gfn::new(n).unwrap()
}

pub fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::new(gfn(start), gfn(end)).unwrap()
}

pub fn file_page(n: u64) -> FilePage {
    FilePage::new(n).unwrap()
}

pub fn file_pages(start: u64, end: u64) -> FileRange {
    FileRange::new(file_page(start), file_page(end)).unwrap()
}

/// A slot without a file.
pub fn shared(id: SlotId, gfns: GfnRange) -> Memslot {
    Memslot { id, gfns, hva: 0x7f00_0000_0000, flags: SlotFlags::empty(), binding: None }
}

/// A slot over `file` from page `start`.
pub fn private(id: SlotId, gfns: GfnRange, file: FileId, start: u64) -> Memslot {
    let binding = Some(FileBinding { file, start: file_page(start) });
    Memslot { flags: SlotFlags::GUEST_MEMFD, binding, ..shared(id, gfns) }
}

/// Fewer cases where each is a thousand times slower, and no files where there is no file system.
pub fn cases(n: u32) -> ProptestConfig {
    if cfg!(miri) {
        ProptestConfig { cases: (n / 256).max(2), failure_persistence: None, ..ProptestConfig::default() }
    } else {
        ProptestConfig { cases: n, ..ProptestConfig::default() }
    }
}

/// Small limits, so that random slots run into them.
pub fn small() -> Limits {
    Limits {
        slots_per_address_space: 12,
        address_spaces: 2,
        pages_per_slot: 40,
        top: gfn(120),
        readonly: false,
        ..Limits::default()
    }
}
