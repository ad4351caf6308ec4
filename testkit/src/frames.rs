//! Short words for frames and ranges of them, for tests that write many down.

use cvm_memory::addr::{FilePage, FileRange, Gfn, GfnRange};

/// Guest frame number `n`.
///
/// # Panics
/// If there is no such frame. So for all words here.
#[track_caller]
pub fn gfn(n: u64) -> Gfn {
    Gfn::new(n).expect("a frame")
}

/// Guest frames `[start, end)`.
#[track_caller]
pub fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::new(gfn(start), gfn(end)).expect("a range")
}

/// Pages `[start, end)` of a file.
#[track_caller]
pub fn file_pages(start: u64, end: u64) -> FileRange {
    let page = |n| FilePage::new(n).expect("a page");
    FileRange::new(page(start), page(end)).expect("a range")
}
