//! One bit for every page, at the place its number gives it; in use only where the chunk's tag says so.
//!
//! Words are written by the holder of the chunk's stripe alone, so a load and a store do; they are read by anybody at
//! any time.

use super::CHUNK_SHIFT;
use crate::sync::{AtomicU64, Ordering};
use crate::words::Words;

/// log2 of the pages per word.
const PAGES_SHIFT: u32 = 6;
const PAGES_PER_WORD: u64 = 1 << PAGES_SHIFT;
/// log2 of the words per chunk.
const WORDS_SHIFT: u32 = CHUNK_SHIFT - PAGES_SHIFT;

pub(super) struct Leaf(Words);

impl Leaf {
    pub(super) fn new(chunks: u64) -> Result<Self, nix::Error> {
        Words::zeroed(chunks << WORDS_SHIFT).map(Self)
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val::<[AtomicU64]>(&self.0)
    }

    /// Where the mapping lies.
    #[cfg(all(test, not(any(loom, miri))))]
    pub(super) fn address(&self) -> usize {
        self.0.as_ptr().addr()
    }

    #[inline]
    fn word_of(&self, page: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(page >> PAGES_SHIFT).ok()?)
    }

    fn chunk(&self, chunk: u64) -> &[AtomicU64] {
        let words = usize::try_from(chunk << WORDS_SHIFT).ok().and_then(|first| self.0.get(first..));
        words.and_then(|words| words.get(..1 << WORDS_SHIFT)).unwrap_or_default()
    }

    #[inline]
    pub(super) fn contains(&self, page: u64) -> bool {
        self.word_of(page).is_some_and(|word| word.load(Ordering::Acquire).wrapping_shr(bit_of(page)) & 1 != 0)
    }

    /// Gives every page of `chunk` the state `value`.
    pub(super) fn fill(&self, chunk: u64, value: bool) {
        for word in self.chunk(chunk) {
            word.store(uniform_word(value), Ordering::Release);
        }
    }

    /// Whether every page of `chunk` has the state `value`.
    pub(super) fn is_uniform(&self, chunk: u64, value: bool) -> bool {
        self.chunk(chunk).iter().all(|word| word.load(Ordering::Acquire) == uniform_word(value))
    }

    /// Gives the pages `[first, end)` of one chunk the state `value`. Whether that leaves every page of the words they
    /// lie in with this state.
    pub(super) fn set(&self, first: u64, end: u64, value: bool) -> bool {
        let mut page = first;
        let mut uniform = true;
        while page < end {
            let Some(word) = self.word_of(page) else { return false };
            let next = next_word(page);
            let above = u64::MAX.wrapping_shl(bit_of(page));
            let mask = if next <= end { above } else { above & !u64::MAX.wrapping_shl(bit_of(end)) };
            let old = word.load(Ordering::Relaxed);
            let new = if value { old | mask } else { old & !mask };
            // Also if nothing changes: to guess wrong whether it does costs more than the store.
            word.store(new, Ordering::Release);
            uniform &= new == uniform_word(value);
            page = next;
        }
        uniform
    }

    /// The first page from `page` to the end of its chunk whose state is `value`, and the states from it to the end of
    /// its word, the page's own lowest.
    #[inline]
    pub(super) fn find_in_chunk(&self, page: u64, value: bool) -> Option<(u64, u64)> {
        let first = page >> PAGES_SHIFT;
        let end = (page >> CHUNK_SHIFT).saturating_add(1) << WORDS_SHIFT;
        let words = self.0.get(usize::try_from(first).ok()?..usize::try_from(end).ok()?)?;
        let mut asked = u64::MAX.wrapping_shl(bit_of(page));
        for (at, word) in (first..).zip(words) {
            let states = word.load(Ordering::Acquire);
            let wanted = (states ^ uniform_word(!value)) & asked;
            if wanted != 0 {
                let bit = wanted.trailing_zeros();
                return Some((at << PAGES_SHIFT | u64::from(bit), states.wrapping_shr(bit)));
            }
            asked = u64::MAX;
        }
        None
    }
}

/// The word of 64 pages whose state is `value`.
pub(super) const fn uniform_word(value: bool) -> u64 {
    if value { u64::MAX } else { 0 }
}

/// Place of a page's bit within its word.
const fn bit_of(page: u64) -> u32 {
    (page & (PAGES_PER_WORD - 1)) as u32
}

/// The first page of the word after that of `page`.
pub(super) const fn next_word(page: u64) -> u64 {
    (page | (PAGES_PER_WORD - 1)).saturating_add(1)
}
