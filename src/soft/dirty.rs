//! The bitmap of a slot whose writes are logged. Mirrors `kvm_memory_slot::dirty_bitmap`.

use std::sync::atomic::{AtomicU64, Ordering};

pub(super) const BITS: u64 = 64;

/// The bitmap of a slot: `kvm_memory_slot::dirty_bitmap`.
#[derive(Debug)]
pub(super) struct DirtyBits(Box<[AtomicU64]>);

impl DirtyBits {
    /// `kvm_alloc_dirty_bitmap()`.
    pub(super) fn new(pages: u64, set: bool) -> Self {
        let words = (0..pages.div_ceil(BITS)).map(|word| {
            let within = pages.saturating_sub(word.saturating_mul(BITS));
            AtomicU64::new(if set { low_bits(within) } else { 0 })
        });
        Self(words.collect())
    }

    pub(super) fn set(&self, page: u64) {
        if let Some(word) = self.word_of(page) {
            word.fetch_or(1 << (page % BITS), Ordering::Release);
        }
    }

    pub(super) fn word_of(&self, page: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(page / BITS).ok()?)
    }

    pub(super) fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

/// The lowest `count` bits, all if there are no more than 64.
const fn low_bits(count: u64) -> u64 {
    if count >= BITS { u64::MAX } else { !(u64::MAX << count) }
}
