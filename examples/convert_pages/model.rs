//! What every page of an area should be, by this program's own bookkeeping.

use cvm_memory::addr::{Gfn, PAGE_SIZE};
use cvm_memory::convert::State;

use crate::ram::Window;

/// Which pattern a side of a page holds; zero is zeros.
pub type Stamp = u32;

pub const ZEROS: Stamp = 0;
/// Whatever others have left there.
pub const UNKNOWN: Stamp = Stamp::MAX;

#[derive(Debug, Clone, Copy)]
pub struct Page {
    pub state: State,
    pub private: Stamp,
    pub shared: Stamp,
}

impl Page {
    /// As memory starts.
    pub const NEW: Self = Self { state: State::Private, private: ZEROS, shared: ZEROS };

    pub const fn side(&self, side: State) -> Stamp {
        match side {
            State::Private => self.private,
            State::Shared => self.shared,
        }
    }

    const fn side_mut(&mut self, side: State) -> &mut Stamp {
        match side {
            State::Private => &mut self.private,
            State::Shared => &mut self.shared,
        }
    }

    /// What the guest should see.
    pub const fn current(&self) -> Stamp {
        self.side(self.state)
    }
}

/// Which side of a page keeps its contents while the other one is in use.
#[derive(Debug, Clone, Copy)]
pub struct Keeps {
    pub private: bool,
    pub shared: bool,
}

/// The pages of one area.
pub struct Model {
    pages: Vec<Page>,
    keeps: Keeps,
    seed: u64,
    last: Stamp,
}

impl Model {
    pub fn new(pages: impl Iterator<Item = Page>, keeps: Keeps, seed: u64) -> Self {
        Self { pages: pages.collect(), keeps, seed, last: ZEROS }
    }

    pub fn page(&self, number: usize) -> Page {
        self.pages[number]
    }

    /// Whether what a side held comes back with it.
    pub const fn keeps(&self, side: State) -> bool {
        match side {
            State::Private => self.keeps.private,
            State::Shared => self.keeps.shared,
        }
    }

    /// The pages have been converted: those that changed are fresh, unless nothing is ever freed.
    pub fn turn(&mut self, window: &Window, to: State) {
        let keeps = self.keeps(to);
        for (number, _) in window.pages() {
            let page = &mut self.pages[number];
            if page.state != to && !keeps {
                *page.side_mut(to) = ZEROS;
            }
            page.state = to;
        }
    }

    /// Fills a window with a pattern that was never there before, and returns the bytes.
    pub fn fill(&mut self, window: &Window) -> Vec<u8> {
        self.last += 1;
        let mut bytes = Vec::new();
        for (number, gfn) in window.pages() {
            let state = self.pages[number].state;
            *self.pages[number].side_mut(state) = self.last;
            bytes.extend(words(self.seed, gfn, self.last).flat_map(u64::to_le_bytes));
        }
        bytes
    }

    /// The first byte of that page with that stamp.
    pub fn first_byte(&self, gfn: Gfn, stamp: Stamp) -> u8 {
        let word = words(self.seed, gfn, stamp).next().unwrap_or(0);
        if stamp == ZEROS { 0 } else { word.to_le_bytes()[0] }
    }

    /// Whether these are the bytes of that page with that stamp.
    pub fn is(&self, gfn: Gfn, stamp: Stamp, bytes: &[u8]) -> bool {
        if stamp == ZEROS {
            return bytes.iter().all(|byte| *byte == 0);
        }
        bytes.chunks_exact(8).zip(words(self.seed, gfn, stamp)).all(|(found, word)| found == word.to_le_bytes())
    }
}

/// The 512 words of a page: no two pages, stamps or seeds have any in common, as far as chance goes.
fn words(seed: u64, gfn: Gfn, stamp: Stamp) -> impl Iterator<Item = u64> {
    let start = mix(mix(seed ^ gfn.get().rotate_left(32)) ^ u64::from(stamp));
    (0..PAGE_SIZE / 8).map(move |at| start.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// The finaliser of SplitMix64.
pub const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
