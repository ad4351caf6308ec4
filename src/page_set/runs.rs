//! Runs: stretches of pages of one state, found a tag word or a leaf word at a time.
//!
//! Beside writers every page is still reported in a state that it had during the iteration, every page exactly once, and
//! the states of neighbouring runs differ; but the whole is no snapshot.

use crate::addr::{Gfn, GfnRange};

use super::tags::Tag;
use super::{CHUNK_SHIFT, PAGES_PER_CHUNK, Pages};

impl Pages {
    /// The first page of `range` whose state is `value`, or the range's end.
    ///
    /// Skips 64 MiB of the other state per load.
    ///
    /// ```
    /// # use cvm_memory::{addr::{Gfn, GfnRange}, page_set::PageSet};
    /// # let set = PageSet::new(1 << 20)?;
    /// # let all = GfnRange::new(Gfn::ZERO, Gfn::new(1 << 20).unwrap())?;
    /// set.insert(GfnRange::page(Gfn::new(0x1234).unwrap()))?;
    /// assert_eq!(set.find(all, true), Gfn::new(0x1234).unwrap());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn find(&self, range: GfnRange, value: bool) -> Gfn {
        let found = self.find_page(range.start().get(), range.end().get(), value);
        Gfn::new(found).unwrap_or(range.end()).min(range.end())
    }

    /// The first page of `[first, end)` whose state is `value`, or something from `end` on.
    #[inline]
    fn find_page(&self, first: u64, end: u64, value: bool) -> u64 {
        let end_chunk = end.div_ceil(PAGES_PER_CHUNK);
        let mut page = first;
        while page < end {
            let chunk = page >> CHUNK_SHIFT;
            let found = match self.tags.load(chunk) {
                Tag::Uniform(now) => (now == value).then_some(page),
                Tag::Mixed => self.leaf.find_in_chunk(page, value),
            };
            if let Some(found) = found {
                return found;
            }
            page = self.tags.find_not(chunk.saturating_add(1), end_chunk, !value) << CHUNK_SHIFT;
        }
        end
    }

    /// Whether every page of `range` is in the set, or none is. `None` if some are, and for an empty range.
    ///
    /// Pages beyond the capacity are not in the set. Stops at the first page that differs.
    ///
    /// ```
    /// # use cvm_memory::{addr::{Gfn, GfnRange}, page_set::PageSet};
    /// # let set = PageSet::new(1 << 20)?;
    /// let range = GfnRange::from_bytes(0x1000, 0x3000)?;
    /// assert_eq!(set.uniform(range), Some(false));
    /// set.insert(range)?;
    /// assert_eq!(set.uniform(range), Some(true));
    /// assert_eq!(set.uniform(GfnRange::from_bytes(0, 0x3000)?), None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn uniform(&self, range: GfnRange) -> Option<bool> {
        let mut runs = self.runs(range);
        let (first, value) = runs.next()?;
        (first == range).then_some(value)
    }

    /// The runs that make up `range`, ascending: each is of one state and as long as can be, and states alternate.
    ///
    /// ```
    /// # use cvm_memory::{addr::{Gfn, GfnRange}, page_set::PageSet};
    /// # let r = |s, e| GfnRange::new(Gfn::new(s).unwrap(), Gfn::new(e).unwrap()).unwrap();
    /// # let set = PageSet::new(1 << 20)?;
    /// set.insert(r(3, 5))?;
    /// assert_eq!(set.runs(r(0, 8)).collect::<Vec<_>>(), [(r(0, 3), false), (r(3, 5), true), (r(5, 8), false)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn runs(&self, range: GfnRange) -> impl Iterator<Item = (GfnRange, bool)> {
        let (mut page, end) = (range.start().get(), range.end().get());
        let mut value = self.contains(range.start());
        std::iter::from_fn(move || {
            if page >= end {
                return None;
            }
            // `page` has been seen in state `value`: every run has a page, beside writers too.
            let stop = self.find_page(page.saturating_add(1), end, !value).min(end);
            let run = run_of(page, stop)?;
            (page, value) = (stop, !value);
            Some((run, !value))
        })
    }

    /// The maximal runs of `range` that are in the set, ascending.
    pub fn member_runs(&self, range: GfnRange) -> impl Iterator<Item = GfnRange> {
        self.differing_runs(range, false)
    }

    /// The maximal runs of `range` whose state is not `value`, ascending: what [`PageSet::set`](super::PageSet::set) would change.
    ///
    /// Skips 64 MiB of the wanted state per load, and allocates nothing.
    pub fn differing_runs(&self, range: GfnRange, value: bool) -> impl Iterator<Item = GfnRange> {
        let (mut page, end) = (range.start().get(), range.end().get());
        std::iter::from_fn(move || {
            let start = self.find_page(page, end, !value);
            if start >= end {
                return None;
            }
            let stop = self.find_page(start.saturating_add(1), end, value).min(end);
            // `stop` has been seen in state `value`: the next run cannot touch this one, beside writers too.
            page = stop.saturating_add(1);
            run_of(start, stop)
        })
    }

    /// Pages of `range` that are in the set.
    pub fn count(&self, range: GfnRange) -> u64 {
        self.member_runs(range).map(|run| run.pages()).fold(0, u64::saturating_add)
    }
}

/// `[first, end)`, both of them from within a range.
#[inline]
fn run_of(first: u64, end: u64) -> Option<GfnRange> {
    GfnRange::new(Gfn::new(first)?, Gfn::new(end)?).ok()
}
