//! What becomes of the side of a page that lost, and what has been left for later.
//!
//! A page has two backings, its shared memory and its guest_memfd page; after a conversion one of them is of no use. When
//! it is freed is the user's choice. What is put off is remembered by frame, so that neighbours merge however they came,
//! and is freed by [`trim`](super::Converter::trim), by budget, at teardown, or at the latest just before that side is used
//! again: putting off never brings back a stale byte.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{GfnRange, PAGE_SIZE};
use crate::page_set::{PageSet, PageSetError};

use super::request::State;

/// When the side of a page that lost is freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiscardPolicy {
    /// At once, as part of the conversion.
    Immediate,
    /// Later, in larger pieces.
    Deferred {
        /// Bytes that may be left; a conversion that exceeds them frees everything.
        budget: u64,
    },
    /// Never: the memory is held twice, and a page that comes back may show its old contents to the guest.
    Never,
}

impl DiscardPolicy {
    /// Deferred, up to 256 MiB.
    pub const DEFERRED: Self = Self::Deferred { budget: 256 << 20 };
}

/// Frames whose private or shared side is still to be freed.
#[derive(Debug)]
pub(super) struct DiscardQueue {
    private: PageSet,
    shared: PageSet,
    pages: AtomicU64,
}

impl DiscardQueue {
    pub(super) fn new(capacity: u64) -> Result<Self, PageSetError> {
        Ok(Self { private: PageSet::new(capacity)?, shared: PageSet::new(capacity)?, pages: AtomicU64::new(0) })
    }

    fn side(&self, side: State) -> &PageSet {
        match side {
            State::Private => &self.private,
            State::Shared => &self.shared,
        }
    }

    /// Leaves `side` of `gfns` for later. The caller holds the range's lock.
    pub(super) fn defer(&self, gfns: GfnRange, side: State) -> Result<(), PageSetError> {
        let known = self.side(side).count(gfns);
        self.side(side).insert(gfns)?;
        self.pages.fetch_add(gfns.pages().saturating_sub(known), Ordering::Relaxed);
        Ok(())
    }

    /// `side` of `gfns` has been freed. The caller holds the range's lock.
    pub(super) fn settle(&self, gfns: GfnRange, side: State) -> Result<(), PageSetError> {
        let known = self.side(side).count(gfns);
        self.side(side).remove(gfns)?;
        // The sum over disjoint ranges; each is changed only under its lock, so it never falls below zero.
        self.pages.fetch_sub(known, Ordering::Relaxed);
        Ok(())
    }

    /// What is left of `side` within `gfns`.
    pub(super) fn left(&self, gfns: GfnRange, side: State) -> Vec<GfnRange> {
        if self.is_empty() { Vec::new() } else { self.side(side).member_runs(gfns).collect() }
    }

    /// The first run that is left of `side` within `gfns`.
    pub(super) fn first(&self, gfns: GfnRange, side: State) -> Option<GfnRange> {
        if self.is_empty() { None } else { self.side(side).member_runs(gfns).next() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages.load(Ordering::Relaxed) == 0
    }

    /// Bytes that are left, of both sides.
    pub(super) fn bytes(&self) -> u64 {
        self.pages.load(Ordering::Relaxed).saturating_mul(PAGE_SIZE)
    }
}
