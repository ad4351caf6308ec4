//! Runs: stretches of pages of one state, found a tag word or a leaf word at a time.
//!
//! Beside writers every page is still reported in a state that it had during the iteration, every page exactly once, and
//! the states of neighbouring runs differ; but the whole is no snapshot. An iterator remembers what it last loaded, so
//! what is changed ahead of it while it is held may still be reported as it was.

use crate::addr::{Gfn, GfnRange};

use super::leaf::{next_word, uniform_word};
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
        let found = Walk::over(self, range).find(value);
        Gfn::new(found).unwrap_or(range.end()).min(range.end())
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
        // `page` has been seen in state `value`: every run has a page, beside writers too.
        let mut walk = Walk { states: u64::from(value), known: page.saturating_add(1), ..Walk::over(self, range) };
        std::iter::from_fn(move || {
            if page >= end {
                return None;
            }
            let stop = walk.find(!value).min(end);
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
        let mut walk = Walk::over(self, range);
        let end = walk.end;
        std::iter::from_fn(move || {
            let start = walk.find(!value);
            if start >= end {
                return None;
            }
            // Where a run stops, the walk has seen the other state: the next cannot touch it, beside writers too.
            run_of(start, walk.find(value).min(end))
        })
    }

    /// Pages of `range` that are in the set.
    pub fn count(&self, range: GfnRange) -> u64 {
        self.member_runs(range).map(|run| run.pages()).fold(0, u64::saturating_add)
    }
}

/// A way through a range, page by page upwards, that remembers the states it has loaded: a leaf word's, or a uniform
/// chunk's, so that runs within them cost no look at the set.
struct Walk<'a> {
    pages: &'a Pages,
    /// Where the walk is.
    page: u64,
    /// Where the range ends.
    end: u64,
    /// States of the pages `[page, known)`, that of `page` lowest. If there are more than 64, they are all the same.
    states: u64,
    known: u64,
}

impl<'a> Walk<'a> {
    fn over(pages: &'a Pages, range: GfnRange) -> Self {
        let page = range.start().get();
        Self { pages, page, end: range.end().get(), states: 0, known: page }
    }

    /// Goes on to the first page, from this one, whose state is `value`; or to something from the end of the range on.
    #[inline]
    fn find(&mut self, value: bool) -> u64 {
        let wanted = self.states ^ uniform_word(!value);
        let bit = wanted.trailing_zeros();
        let found = self.page.saturating_add(u64::from(bit));
        if wanted != 0 && found < self.known {
            (self.page, self.states) = (found, self.states.wrapping_shr(bit));
        } else {
            self.load(value);
        }
        self.page
    }

    /// The same, from the first page on whose state is not known.
    fn load(&mut self, value: bool) {
        let end_chunk = self.end.div_ceil(PAGES_PER_CHUNK);
        let mut page = self.known;
        while page < self.end {
            let chunk = page >> CHUNK_SHIFT;
            let next = chunk.saturating_add(1);
            match self.pages.tags.load(chunk) {
                Tag::Uniform(now) if now == value => {
                    (self.page, self.states, self.known) = (page, uniform_word(value), next << CHUNK_SHIFT);
                    return;
                }
                Tag::Uniform(_) => {}
                Tag::Mixed => {
                    if let Some((found, states)) = self.pages.leaf.find_in_chunk(page, value) {
                        (self.page, self.states, self.known) = (found, states, next_word(found));
                        return;
                    }
                }
            }
            page = self.pages.tags.find_not(next, end_chunk, !value) << CHUNK_SHIFT;
        }
        (self.page, self.known) = (page, page);
    }
}

/// `[first, end)`, both of them from within a range.
#[inline]
fn run_of(first: u64, end: u64) -> Option<GfnRange> {
    GfnRange::new(Gfn::new(first)?, Gfn::new(end)?).ok()
}
