//! The candidates. Each is asked in batches, so that the call through `dyn` is paid once per batch and not per page.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

use cvm_memory::addr::{Gfn, GfnRange, PAGE_SIZE};
use cvm_memory::page_set::PageSet;
use cvm_memory_benches::Rng;
use rangemap::RangeMap;
use roaring::RoaringBitmap;
use vm_memory::bitmap::AtomicBitmap;

pub trait Store: Sync {
    fn name(&self) -> &'static str;
    fn set(&self, range: GfnRange, value: bool);
    /// Number of maximal runs of `value`.
    fn runs(&self, range: GfnRange, value: bool) -> u64;
    /// Members among `looks` random pages below `span`: nothing waits for an answer.
    fn count_random(&self, seed: u64, span: u64, looks: u64) -> u64;
    /// The same, each page depending on the answer before.
    fn chase_random(&self, seed: u64, span: u64, looks: u64) -> u64;
    /// Writes every page of memory the store will ever use, where it uses a fixed amount.
    fn touch(&self) {}
}

/// How many candidates there are.
pub const KINDS: usize = 6;

/// Candidate number `kind`, empty.
pub fn one(kind: usize, pages: u64) -> Box<dyn Store> {
    let page_size = NonZeroUsize::new(PAGE_SIZE as usize).unwrap();
    match kind {
        0 => Box::new(PageSet::new(pages).unwrap()),
        1 => Box::new(Flat((0..pages / 64).map(|_| AtomicU64::new(0)).collect())),
        2 => Box::new(AtomicBitmap::new((pages * PAGE_SIZE) as usize, page_size)),
        3 => Box::new(RwLock::new(RangeMap::from_iter([(0..pages, false)]))),
        4 => Box::new(RwLock::new(Borders(BTreeMap::from([(0, false)])))),
        _ => Box::new(RwLock::new(Absent(RoaringBitmap::from_iter(0..0)))),
    }
}

pub fn all(pages: u64) -> Vec<Box<dyn Store>> {
    (0..KINDS).map(|kind| one(kind, pages)).collect()
}

/// The two lookup loops over any `contains`.
macro_rules! lookups {
    ($store:ident, $page:ident, $contains:expr) => {
        fn count_random(&self, seed: u64, span: u64, looks: u64) -> u64 {
            let ($store, mut rng) = (self, Rng::new(seed));
            let once = |$page: u64| -> bool { $contains };
            (0..looks).map(|_| u64::from(once(rng.below(span)))).sum()
        }
        fn chase_random(&self, seed: u64, span: u64, looks: u64) -> u64 {
            let ($store, mut rng) = (self, Rng::new(seed));
            let once = |$page: u64| -> bool { $contains };
            (0..looks).for_each(|_| {
                let found = once(rng.below(span));
                rng.mix(std::hint::black_box(found));
            });
            rng.next()
        }
    };
}

impl Store for PageSet {
    fn name(&self) -> &'static str {
        "page_set"
    }
    fn set(&self, range: GfnRange, value: bool) {
        PageSet::set(self, range, value).unwrap();
    }
    fn runs(&self, range: GfnRange, value: bool) -> u64 {
        self.differing_runs(range, !value).map(|run| std::hint::black_box(run).pages().min(1)).sum()
    }
    /// Every tag and every leaf word: a chunk is mixed once each way.
    fn touch(&self) {
        for page in (0..self.capacity()).step_by(512) {
            PageSet::set(self, GfnRange::with_len(Gfn::new(page).unwrap(), 1).unwrap(), true).unwrap();
        }
        PageSet::set(self, GfnRange::with_len(Gfn::ZERO, self.capacity()).unwrap(), false).unwrap();
    }
    lookups!(set, page, set.contains(Gfn::containing(page * PAGE_SIZE)));
}

/// What the pages asked for cost to think of: the least that a lookup can take here.
pub fn generator() -> Box<dyn Store> {
    Box::new(Generator)
}

struct Generator;

impl Store for Generator {
    fn name(&self) -> &'static str {
        "generator alone"
    }
    fn set(&self, _: GfnRange, _: bool) {}
    fn runs(&self, _: GfnRange, _: bool) -> u64 {
        0
    }
    lookups!(generator, page, {
        let _: &Self = generator;
        page & 1 != 0
    });
}

/// One bit per page, and nothing else.
struct Flat(Box<[AtomicU64]>);

impl Flat {
    fn find(&self, from: u64, end: u64, value: bool) -> u64 {
        let mut page = from;
        while page < end {
            let word = self.0[(page >> 6) as usize].load(Ordering::Acquire);
            let wanted = (if value { word } else { !word }) >> (page & 63);
            if wanted != 0 {
                return (page + u64::from(wanted.trailing_zeros())).min(end);
            }
            page = (page | 63) + 1;
        }
        end
    }
}

impl Store for Flat {
    fn name(&self) -> &'static str {
        "flat"
    }
    fn set(&self, range: GfnRange, value: bool) {
        let (mut page, end) = (range.start().get(), range.end().get());
        while page < end {
            let next = ((page | 63) + 1).min(end);
            let mask = (u64::MAX >> (64 - (next - page))) << (page & 63);
            let word = &self.0[(page >> 6) as usize];
            match (mask, value) {
                (u64::MAX, true) => word.store(u64::MAX, Ordering::Release),
                (u64::MAX, false) => word.store(0, Ordering::Release),
                (_, true) => _ = word.fetch_or(mask, Ordering::AcqRel),
                (_, false) => _ = word.fetch_and(!mask, Ordering::AcqRel),
            }
            page = next;
        }
    }
    fn runs(&self, range: GfnRange, value: bool) -> u64 {
        let (mut page, end, mut runs) = (range.start().get(), range.end().get(), 0);
        loop {
            let start = self.find(page, end, value);
            if start == end {
                return runs;
            }
            page = std::hint::black_box(self.find(start, end, !value));
            runs += 1;
        }
    }
    fn touch(&self) {
        self.0.iter().for_each(|word| word.store(1, Ordering::Relaxed));
        self.0.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
    lookups!(flat, page, flat.0[(page >> 6) as usize].load(Ordering::Acquire) >> (page & 63) & 1 != 0);
}

impl Store for AtomicBitmap {
    fn name(&self) -> &'static str {
        "vm-memory"
    }
    fn set(&self, range: GfnRange, value: bool) {
        let (start, bytes) = (range.start_byte() as usize, range.bytes() as usize);
        if value { self.set_addr_range(start, bytes) } else { self.reset_addr_range(start, bytes) }
    }
    /// It has no search; bit by bit is all there is.
    fn runs(&self, range: GfnRange, value: bool) -> u64 {
        let mut before = !value;
        let mut runs = 0;
        for page in range {
            let now = self.is_bit_set(page.get() as usize);
            runs += u64::from(now == value && before != value);
            before = now;
        }
        runs
    }
    lookups!(bitmap, page, bitmap.is_bit_set(page as usize));
}

impl Store for RwLock<RangeMap<u64, bool>> {
    fn name(&self) -> &'static str {
        "rangemap+rwlock"
    }
    fn set(&self, range: GfnRange, value: bool) {
        self.write().unwrap().insert(range.start().get()..range.end().get(), value);
    }
    fn runs(&self, range: GfnRange, value: bool) -> u64 {
        let map = self.read().unwrap();
        map.overlapping(range.start().get()..range.end().get())
            .map(|run| u64::from(*std::hint::black_box(run).1 == value))
            .sum()
    }
    lookups!(map, page, map.read().unwrap().get(&page).copied().unwrap_or(false));
}

/// Where the state changes, and to what.
pub struct Borders(BTreeMap<u64, bool>);

impl Borders {
    fn at(&self, page: u64) -> bool {
        self.0.range(..=page).next_back().is_some_and(|(_, value)| *value)
    }
}

impl Store for RwLock<Borders> {
    fn name(&self) -> &'static str {
        "btreemap+rwlock"
    }
    fn set(&self, range: GfnRange, value: bool) {
        let (start, end) = (range.start().get(), range.end().get());
        let mut map = self.write().unwrap();
        let after = map.at(end);
        let before = start > 0 && map.at(start - 1);
        let inside: Vec<u64> = map.0.range(start..=end).map(|(page, _)| *page).collect();
        for page in inside {
            map.0.remove(&page);
        }
        if before != value || start == 0 {
            map.0.insert(start, value);
        }
        if after != value {
            map.0.insert(end, after);
        }
    }
    fn runs(&self, range: GfnRange, value: bool) -> u64 {
        let map = self.read().unwrap();
        let inside = map.0.range(range.start().get()..range.end().get());
        inside.map(|run| u64::from(*std::hint::black_box(run).1 == value)).sum()
    }
    lookups!(map, page, map.read().unwrap().at(page));
}

/// A compressed bitmap of the pages that are *not* in the set: of the two, by far the sparser.
pub struct Absent(RoaringBitmap);

impl Store for RwLock<Absent> {
    fn name(&self) -> &'static str {
        "roaring+rwlock"
    }
    fn set(&self, range: GfnRange, value: bool) {
        let mut absent = self.write().unwrap();
        let pages = range.start().get() as u32..range.end().get() as u32;
        if value {
            absent.0.remove_range(pages)
        } else {
            absent.0.insert_range(pages)
        };
    }
    fn runs(&self, range: GfnRange, _value: bool) -> u64 {
        let absent = self.read().unwrap();
        let mut pages = absent.0.range(range.start().get() as u32..range.end().get() as u32);
        let mut runs = 0;
        while let Some(run) = pages.next_range() {
            std::hint::black_box(run);
            runs += 1;
        }
        runs
    }
    lookups!(absent, page, !absent.read().unwrap().0.contains(page as u32));
}
