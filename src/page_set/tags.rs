//! Two bits for every chunk: none of its pages, all of them, or "look at the leaf". Thirty-two chunks share a word.
//!
//! Every change of a part of a word is a compare-and-swap, so that neighbours in the word never lose theirs and so that
//! every word a reader loads continues the release sequence of whoever published a `Mixed` still standing in it. Only a
//! writer that replaces all 32 tags at once stores plainly.

use crate::sync::{AtomicU64, Ordering};
use crate::words::Words;

/// What a chunk's tag says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    /// Every page of the chunk is in the set, or none is.
    Uniform(bool),
    /// The chunk's leaf words say it page by page.
    Mixed,
}

/// log2 of the chunks per word.
pub(super) const CHUNKS_SHIFT: u32 = 5;
const CHUNKS_PER_WORD: u64 = 1 << CHUNKS_SHIFT;
const FIELD: u64 = 0b11;
const MIXED: u64 = 0b10;
/// The low bit of each of the 32 tags, which is also the word of 32 chunks that are all in.
const LOW_BITS: u64 = 0x5555_5555_5555_5555;

impl Tag {
    const fn bits(self) -> u64 {
        match self {
            Self::Uniform(false) => 0,
            Self::Uniform(true) => 1,
            Self::Mixed => MIXED,
        }
    }
}

/// The tag word of 32 chunks that are all uniformly `value`.
const fn uniform_word(value: bool) -> u64 {
    if value { LOW_BITS } else { 0 }
}

/// Place of a chunk's tag within its word.
const fn shift_of(chunk: u64) -> u32 {
    ((chunk & (CHUNKS_PER_WORD - 1)) as u32) << 1
}

pub(super) struct Tags(Words);

impl Tags {
    pub(super) fn new(chunks: u64) -> Result<Self, nix::Error> {
        Words::zeroed(chunks.div_ceil(CHUNKS_PER_WORD)).map(Self)
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val::<[AtomicU64]>(&self.0)
    }

    #[inline]
    fn word_of(&self, chunk: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(chunk >> CHUNKS_SHIFT).ok()?)
    }

    /// The tag of `chunk`; a chunk beyond the end has no page in the set.
    #[inline]
    pub(super) fn load(&self, chunk: u64) -> Tag {
        let Some(word) = self.word_of(chunk) else { return Tag::Uniform(false) };
        let tag = word.load(Ordering::Acquire).wrapping_shr(shift_of(chunk));
        if tag & MIXED == 0 { Tag::Uniform(tag & 1 != 0) } else { Tag::Mixed }
    }

    /// Changes the tag of `chunk` from `old` to `new`; false if it is not `old` (any more).
    pub(super) fn replace(&self, chunk: u64, old: Tag, new: Tag) -> bool {
        let Some(word) = self.word_of(chunk) else { return false };
        let shift = shift_of(chunk);
        let mut seen = word.load(Ordering::Acquire);
        while seen.wrapping_shr(shift) & FIELD == old.bits() {
            let wanted = seen ^ (old.bits() ^ new.bits()).wrapping_shl(shift);
            match word.compare_exchange_weak(seen, wanted, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Makes every chunk of `[first, end)` uniformly `value`, whatever it was, a word at a time.
    pub(super) fn set_uniform(&self, first: u64, end: u64, value: bool) {
        let mut chunk = first;
        while chunk < end {
            let Some(word) = self.word_of(chunk) else { return };
            let next = (chunk | (CHUNKS_PER_WORD - 1)).saturating_add(1);
            let above = u64::MAX.wrapping_shl(shift_of(chunk));
            let mask = if next <= end { above } else { above & !u64::MAX.wrapping_shl(shift_of(end)) };
            set_masked(word, mask, uniform_word(value));
            chunk = next;
        }
    }

    /// The first chunk of `[chunk, end)` whose tag is not `Uniform(value)`, or some chunk from `end` on. One load per word.
    #[inline]
    pub(super) fn find_not(&self, chunk: u64, end: u64, value: bool) -> u64 {
        let first = chunk >> CHUNKS_SHIFT;
        let words = usize::try_from(first).ok().and_then(|first| self.0.get(first..)).unwrap_or_default();
        let last = end.div_ceil(CHUNKS_PER_WORD);
        let mut asked = u64::MAX.wrapping_shl(shift_of(chunk));
        for (at, word) in (first..last).zip(words) {
            let differ = (word.load(Ordering::Acquire) ^ uniform_word(value)) & asked;
            if differ != 0 {
                return at << CHUNKS_SHIFT | u64::from(differ.trailing_zeros() >> 1);
            }
            asked = u64::MAX;
        }
        // Beyond the last word no chunk has a page in the set.
        let beyond = chunk.max(u64::try_from(self.0.len()).unwrap_or(u64::MAX) << CHUNKS_SHIFT);
        if value { beyond.min(end) } else { end }
    }

    /// Chunks whose leaf is in use.
    pub(super) fn mixed(&self) -> u64 {
        self.0.iter().map(|word| u64::from((word.load(Ordering::Acquire) & (LOW_BITS << 1)).count_ones())).sum()
    }
}

/// Gives the bits of `mask` the value they have in `pattern`. Writes nothing if they have it.
fn set_masked(word: &AtomicU64, mask: u64, pattern: u64) {
    let mut seen = word.load(Ordering::Acquire);
    loop {
        let wanted = (seen & !mask) | (pattern & mask);
        if seen == wanted {
            return;
        }
        if mask == u64::MAX {
            return word.store(pattern, Ordering::Release);
        }
        match word.compare_exchange_weak(seen, wanted, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}
