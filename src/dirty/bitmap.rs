//! Which pages of one backing were written: a bit each, and above them a summary that says where to look.
//!
//! Keyed by the page *in the backing*, not by the guest frame: a bit stays where it is when slots are moved, split or replaced.
//! It knows no slot and no ring. Any number of threads may set, take and look at once.
//!
//! # How a bit cannot get lost
//! A summary bit stands for one cache line of words (512 pages). Whoever sets bits changes the word first and looks at the
//! summary then; whoever takes clears the summary first and swaps the words then. Both change the *word* with one atomic
//! operation, so they agree on who came first: if the setter, the taker gets the bit; if the taker, the setter has seen what
//! the taker did before, so finds the summary bit clear and sets it again. For that, every word of the line is swapped, those
//! that look empty too. A summary bit without a page under it is harmless.
//!
//! Setting a bit comes after the write that it tells of, and taking it before the copy: each is an acquire and a release.

use std::fmt;
use std::iter::FusedIterator;

use nix::errno::Errno;

use crate::addr::{FilePage, FileRange};
use crate::sync::Ordering;
use crate::words::Words;

/// Bits per word, words per line, and pages per line: a cache line of 64 bytes.
const BITS: u64 = 64;
#[cfg(not(loom))]
const LINE: usize = 8;
#[cfg(loom)]
const LINE: usize = 2;
const PAGES_PER_LINE: u64 = BITS * LINE as u64;
/// How many summary words ahead of the one at hand lines are fetched.
const AHEAD: usize = 8;

/// The written pages of one backing. Any number of threads may set, take and look at once.
///
/// ```
/// use cvm_memory::addr::{FilePage, FileRange};
/// use cvm_memory::dirty::DirtyBitmap;
///
/// let range = |start, end| FileRange::new(FilePage::new(start).unwrap(), FilePage::new(end).unwrap()).unwrap();
/// let dirty = DirtyBitmap::new(1 << 28)?; // 1 TiB; costs memory where it is written
/// dirty.set(range(60, 70));
/// dirty.set(range(70, 71));
/// dirty.set(range(1 << 20, (1 << 20) + 1));
/// assert_eq!(dirty.runs().collect::<Vec<_>>(), [range(60, 71), range(1 << 20, (1 << 20) + 1)]);
/// assert_eq!(dirty.take().next(), Some(range(60, 71)));
/// // What was not taken is still there.
/// assert_eq!(dirty.runs().collect::<Vec<_>>(), [range(1 << 20, (1 << 20) + 1)]);
/// # Ok::<(), nix::errno::Errno>(())
/// ```
pub struct DirtyBitmap {
    pages: u64,
    words: Words,
    summary: Words,
}

impl DirtyBitmap {
    /// For a backing of `pages` pages, all clean.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new(pages: u64) -> Result<Self, Errno> {
        // Whole lines, so that none has to be told from another.
        let lines = pages.div_ceil(PAGES_PER_LINE).max(1);
        let words = Words::zeroed(lines.checked_mul(LINE as u64).ok_or(Errno::ENOMEM)?)?;
        Ok(Self { pages, words, summary: Words::zeroed(lines.div_ceil(BITS))? })
    }

    /// Pages of the backing.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Notes that `pages` were written, of which those beyond the end do not count.
    pub fn set(&self, pages: FileRange) {
        let (mut at, end) = (pages.start().get(), pages.end().get().min(self.pages));
        while at < end {
            let line_end = (at / PAGES_PER_LINE).saturating_add(1).saturating_mul(PAGES_PER_LINE).min(end);
            let line = at / PAGES_PER_LINE;
            while at < line_end {
                let word_end = (at / BITS).saturating_add(1).saturating_mul(BITS).min(line_end);
                self.set_word(at / BITS, mask(at % BITS, word_end.saturating_sub(at)));
                at = word_end;
            }
            self.set_summary(line);
        }
    }

    /// Notes what a bitmap tells of the pages from `first` on: bit `n % 64` of word `n / 64` is page `first + n`. Bits beyond
    /// the end do not count.
    pub fn merge(&self, first: FilePage, bitmap: &[u64]) {
        let first = first.get();
        let shift = first % BITS;
        let mut at = first / BITS;
        // What did not fit into the word before.
        let mut carry = 0;
        let mut line = None;
        for bits in bitmap.iter().copied().chain([0]) {
            let low = carry | bits.checked_shl(narrow(shift)).unwrap_or(0);
            carry = bits.checked_shr(narrow(BITS.saturating_sub(shift))).unwrap_or(0);
            let start = at.saturating_mul(BITS);
            let kept = low & mask(0, self.pages.saturating_sub(start));
            if kept != 0 {
                let here = start / PAGES_PER_LINE;
                if let Some(before) = line.filter(|before| *before != here) {
                    self.set_summary(before);
                }
                line = Some(here);
                self.set_word(at, kept);
            }
            at = at.saturating_add(1);
        }
        if let Some(line) = line {
            self.set_summary(line);
        }
    }

    /// Whether `page` was written.
    pub fn contains(&self, page: FilePage) -> bool {
        let word = usize::try_from(page.get() / BITS).ok().and_then(|at| self.words.get(at));
        word.is_some_and(|word| word.load(Ordering::Acquire) & mask(page.get() % BITS, 1) != 0)
    }

    /// How many pages were written.
    pub fn count(&self) -> u64 {
        self.runs().map(|run| run.pages()).fold(0, u64::saturating_add)
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.runs().next().is_none()
    }

    /// The written pages in runs, ascending. Pages that are set or taken meanwhile may or may not be among them.
    pub fn runs(&self) -> Runs<'_> {
        Runs(Walk::new(self, false))
    }

    /// As [`runs`](Self::runs), and takes them: each written page is in the runs of one taker only. Copy a run after it was
    /// taken: what is written later is in the bitmap again. If the iterator is dropped before its end, what it had not given
    /// out yet goes back into the bitmap.
    pub const fn take(&self) -> Take<'_> {
        Take(Walk::new(self, true))
    }

    /// Takes the written pages of `range` only, in runs, ascending.
    pub fn take_within(&self, range: FileRange) -> Vec<FileRange> {
        let mut runs: Vec<FileRange> = Vec::new();
        let (mut at, end) = (range.start().get(), range.end().get().min(self.pages));
        while at < end {
            let line_end = (at / PAGES_PER_LINE).saturating_add(1).saturating_mul(PAGES_PER_LINE);
            let line = at / PAGES_PER_LINE;
            let summary = self.summary_word(line).map_or(0, |word| word.load(Ordering::Acquire));
            // Its bit stays: others may have pages in the line.
            if summary & mask(line % BITS, 1) == 0 {
                at = line_end;
                continue;
            }
            let word_end = (at / BITS).saturating_add(1).saturating_mul(BITS).min(end);
            let wanted = mask(at % BITS, word_end.saturating_sub(at));
            let word = usize::try_from(at / BITS).ok().and_then(|at| self.words.get(at));
            let mut bits = word.map_or(0, |word| word.fetch_and(!wanted, Ordering::AcqRel) & wanted);
            let base = (at / BITS).saturating_mul(BITS);
            while bits != 0 {
                let skip = u64::from(bits.trailing_zeros());
                let ones = u64::from((bits >> skip).trailing_ones());
                bits &= !mask(skip, ones);
                let start = base.saturating_add(skip);
                let Some(run) = self::range((start, start.saturating_add(ones))) else { continue };
                match runs.last_mut() {
                    Some(last) if last.end() == run.start() => *last = last.hull(&run),
                    _ => runs.push(run),
                }
            }
            at = word_end;
        }
        runs
    }

    /// Forgets all written pages.
    pub fn clear(&self) {
        self.take().for_each(drop);
    }

    fn set_word(&self, at: u64, bits: u64) {
        if let Some(word) = usize::try_from(at).ok().and_then(|at| self.words.get(at)) {
            word.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// After the words of the line were changed.
    fn set_summary(&self, line: u64) {
        let (Some(word), bit) = (self.summary_word(line), mask(line % BITS, 1)) else { return };
        if word.load(Ordering::Acquire) & bit == 0 {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    fn summary_word(&self, line: u64) -> Option<&crate::sync::AtomicU64> {
        self.summary.get(usize::try_from(line / BITS).ok()?)
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap").field("pages", &self.pages).finish_non_exhaustive()
    }
}

/// `count` bits from bit `first` on, as far as the word goes.
const fn mask(first: u64, count: u64) -> u64 {
    let bits = if count >= BITS { u64::MAX } else { !(u64::MAX << count) };
    bits << (first % BITS)
}

/// A number of bits, as shifts want it.
#[allow(clippy::cast_possible_truncation, reason = "at most 64")]
const fn narrow(bits: u64) -> u32 {
    bits as u32
}

/// The way through a bitmap: summary words, the lines they name, the words of those, the runs in these.
struct Walk<'a> {
    bitmap: &'a DirtyBitmap,
    take: bool,
    /// The summary word at hand, and which of its bits were not visited yet.
    summary_at: usize,
    summary: u64,
    /// The line at hand, and the first page that its first word is about.
    line: [u64; LINE],
    base: u64,
    /// The word of the line at hand.
    at: usize,
    /// A run that may go on in the next word.
    open: Option<(u64, u64)>,
}

impl<'a> Walk<'a> {
    const fn new(bitmap: &'a DirtyBitmap, take: bool) -> Self {
        Self { bitmap, take, summary_at: 0, summary: 0, line: [0; LINE], base: 0, at: LINE, open: None }
    }

    fn next_run(&mut self) -> Option<FileRange> {
        loop {
            while let Some(bits) = self.line.get_mut(self.at) {
                if *bits == 0 {
                    self.at = self.at.saturating_add(1);
                    continue;
                }
                let skip = bits.trailing_zeros();
                let ones = (*bits >> skip).trailing_ones();
                *bits &= !mask(u64::from(skip), u64::from(ones));
                let start =
                    self.base.saturating_add((self.at as u64).saturating_mul(BITS)).saturating_add(u64::from(skip));
                let end = start.saturating_add(u64::from(ones));
                match &mut self.open {
                    Some((_, last)) if *last == start => *last = end,
                    open => {
                        if let Some(run) = open.replace((start, end)) {
                            return range(run);
                        }
                    }
                }
            }
            if !self.next_line() {
                return self.open.take().and_then(range);
            }
        }
    }

    /// Lines are far apart where few pages are written: each would have to be waited for.
    fn prefetch(&self, summary_at: usize) {
        let mut bits = self.bitmap.summary.get(summary_at).map_or(0, |word| word.load(Ordering::Relaxed));
        let first = summary_at.saturating_mul(64);
        while bits != 0 {
            let line = first.saturating_add(bits.trailing_zeros() as usize);
            self.bitmap.words.prefetch(line.saturating_mul(LINE));
            bits &= bits.wrapping_sub(1);
        }
    }

    /// Goes to the next line that the summary names.
    fn next_line(&mut self) -> bool {
        while self.summary == 0 {
            let Some(word) = self.bitmap.summary.get(self.summary_at) else { return false };
            self.summary = word.load(Ordering::Acquire);
            self.prefetch(self.summary_at.saturating_add(AHEAD));
            self.summary_at = self.summary_at.saturating_add(1);
        }
        let bit = self.summary & self.summary.wrapping_neg();
        self.summary &= !bit;
        let at = self.summary_at.saturating_sub(1);
        let line = (at as u64).saturating_mul(BITS).saturating_add(u64::from(bit.trailing_zeros()));
        if self.take
            && let Some(word) = self.bitmap.summary.get(at)
        {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
        self.base = line.saturating_mul(PAGES_PER_LINE);
        self.at = 0;
        let first = usize::try_from(line).unwrap_or(usize::MAX).saturating_mul(LINE);
        let words = self.bitmap.words.get(first..).unwrap_or_default();
        for (to, word) in self.line.iter_mut().zip(words) {
            *to = if self.take { word.swap(0, Ordering::AcqRel) } else { word.load(Ordering::Acquire) };
        }
        true
    }
}

fn range((start, end): (u64, u64)) -> Option<FileRange> {
    FileRange::new(FilePage::new(start)?, FilePage::new(end)?).ok()
}

/// Runs of written pages. See [`DirtyBitmap::runs`].
pub struct Runs<'a>(Walk<'a>);

impl Iterator for Runs<'_> {
    type Item = FileRange;

    fn next(&mut self) -> Option<FileRange> {
        self.0.next_run()
    }
}

impl FusedIterator for Runs<'_> {}

impl fmt::Debug for Runs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runs").field("bitmap", self.0.bitmap).finish_non_exhaustive()
    }
}

/// Runs of written pages that are taken. See [`DirtyBitmap::take`].
#[must_use = "nothing is taken until it is iterated"]
pub struct Take<'a>(Walk<'a>);

impl Iterator for Take<'_> {
    type Item = FileRange;

    fn next(&mut self) -> Option<FileRange> {
        self.0.next_run()
    }
}

impl FusedIterator for Take<'_> {}

impl Drop for Take<'_> {
    fn drop(&mut self) {
        let Walk { bitmap, line, base, open, .. } = &self.0;
        if let Some(run) = open.and_then(range) {
            bitmap.set(run);
        }
        if line.iter().any(|bits| *bits != 0)
            && let Some(first) = FilePage::new(*base)
        {
            bitmap.merge(first, line);
        }
    }
}

impl fmt::Debug for Take<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Take").field("bitmap", self.0.bitmap).finish_non_exhaustive()
    }
}

#[cfg(all(test, loom))]
mod models;
#[cfg(all(test, not(loom)))]
mod tests;
