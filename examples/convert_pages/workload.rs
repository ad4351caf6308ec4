//! What a guest asks for: which pages of its area, in which state, in which order.

use std::ops::Range;

use cvm_memory::addr::PAGES_PER_2M;
use cvm_memory::convert::State;

use crate::args::Workload;
use crate::model::mix;

/// SplitMix64: small, seeded, good enough to choose pages.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub const fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x5851_f42d_4c95_7f2d))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `[range.start, range.end)`; its start if that is empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % range.end.saturating_sub(range.start).max(1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.within(0..n) == 0
    }
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    pub first: u64,
    pub pages: u64,
    pub to: State,
}

/// The requests of one vCPU, without end.
pub struct Script {
    workload: Workload,
    pages: u64,
    /// The bounce buffer: as Linux does it for confidential guests, a sixteenth of memory.
    pool: u64,
    count: u64,
    window: Ask,
    rng: Rng,
}

impl Script {
    pub const fn new(workload: Workload, pages: u64, rng: Rng) -> Self {
        let pool = if pages < 16 { 1 } else { pages / 16 };
        Self { workload, pages, pool, count: 0, window: Ask { first: 0, pages: 1, to: State::Shared }, rng }
    }

    pub fn next(&mut self) -> Ask {
        let count = self.count;
        self.count += 1;
        match self.workload {
            Workload::Boot => self.share_pool(count).unwrap_or_else(|| self.driver()),
            Workload::Swiotlb => self.share_pool(count).unwrap_or_else(|| self.bounce()),
            Workload::Pingpong => self.pingpong(count),
            Workload::Scatter => self.single(0..self.pages),
        }
    }

    /// The bounce buffer is shared at boot, in requests of 2 MiB.
    fn share_pool(&self, count: u64) -> Option<Ask> {
        let first = count.checked_mul(PAGES_PER_2M).filter(|first| *first < self.pool)?;
        Some(Ask { first, pages: PAGES_PER_2M.min(self.pool - first), to: State::Shared })
    }

    /// Drivers share a page here and there, free one now and then, and ask for what they have.
    fn driver(&mut self) -> Ask {
        if self.rng.one_in(8) {
            let first = self.rng.within(0..self.pool);
            return Ask { first, pages: 16.min(self.pool - first), to: State::Shared };
        }
        if self.rng.one_in(8) {
            return Ask { to: State::Private, ..self.window };
        }
        // They crowd where the guest's allocator began.
        let first = (0..4).map(|_| self.rng.within(self.pool..self.pages)).min().unwrap_or(self.pool);
        self.window = Ask { first, pages: 1, to: State::Shared };
        self.window
    }

    /// A window of the bounce buffer becomes private, and shared again.
    fn bounce(&mut self) -> Ask {
        if self.window.to == State::Shared {
            let first = self.rng.within(0..self.pool);
            let pages = self.rng.within(1..33).min(self.pool - first);
            self.window = Ask { first, pages, to: State::Private };
        } else {
            self.window.to = State::Shared;
        }
        self.window
    }

    /// Eight windows of 1 to 16 pages, each shared and made private again in turn.
    fn pingpong(&self, count: u64) -> Ask {
        let window = count / 2 % 8;
        let pages = (1 << (window % 5)).min(self.pages.div_ceil(8));
        Ask { first: self.pages / 8 * window, pages, to: State::from_private(count % 2 == 1) }
    }

    fn single(&mut self, range: Range<u64>) -> Ask {
        Ask { first: self.rng.within(range), pages: 1, to: State::from_private(self.rng.one_in(2)) }
    }
}
