//! The page set against a plain `Vec<bool>`, at every border it has, and under threads.

#![allow(clippy::cast_possible_truncation, clippy::cast_lossless)] // 64-bit hosts, and numbers of a test's own.

use std::sync::Barrier;
use std::thread;

use proptest::prelude::*;

use super::*;
#[cfg(not(miri))]
use crate::addr::PAGES_PER_1G;
use crate::addr::PAGES_PER_2M;

/// Pages under one tag word.
const TAG_WORD: u64 = 32 * PAGES_PER_2M;
/// A little over one tag word, ending within a leaf word.
const CAPACITY: u64 = TAG_WORD + 3 * PAGES_PER_2M + 100;

fn gfn(n: u64) -> Gfn {
    Gfn::new(n).unwrap()
}

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(gfn(start), gfn(end)).unwrap()
}

/// What a set should hold, page by page.
#[derive(Clone)]
struct Model(Vec<bool>);

impl Model {
    fn set(&mut self, range: GfnRange, value: bool) {
        for page in range {
            self.0[page.get() as usize] = value;
        }
    }

    fn contains(&self, page: Gfn) -> bool {
        self.0.get(page.get() as usize).copied().unwrap_or(false)
    }

    fn runs(&self, range: GfnRange) -> Vec<(GfnRange, bool)> {
        let mut runs: Vec<(GfnRange, bool)> = Vec::new();
        for page in range {
            match runs.last_mut() {
                Some((run, value)) if *value == self.contains(page) => *run = run.hull(&GfnRange::page(page)),
                _ => runs.push((GfnRange::page(page), self.contains(page))),
            }
        }
        runs
    }
}

/// Every question the set can be asked about `asked`.
fn check(set: &PageSet, model: &Model, asked: GfnRange) {
    let runs = model.runs(asked);
    let of = |wanted: bool| runs.iter().filter(move |(_, value)| *value == wanted).map(|(run, _)| *run);
    assert_eq!(set.runs(asked).collect::<Vec<_>>(), runs);
    assert_eq!(set.member_runs(asked).collect::<Vec<_>>(), of(true).collect::<Vec<_>>());
    assert_eq!(set.count(asked), of(true).map(|run| run.pages()).sum::<u64>());
    for value in [false, true] {
        assert_eq!(set.differing_runs(asked, value).collect::<Vec<_>>(), of(!value).collect::<Vec<_>>());
        assert_eq!(set.find(asked, value), of(value).next().map_or(asked.end(), |run| run.start()));
    }
    assert_eq!(set.uniform(asked), if let [(_, value)] = runs[..] { Some(value) } else { None });
}

/// A page near a border of a leaf word, chunk, tag word or the capacity, or any page.
fn any_page() -> impl Strategy<Value = u64> {
    let near = |unit: u64| (0..=CAPACITY / unit, 0u64..5).prop_map(move |(n, by)| (n * unit + by).saturating_sub(2));
    prop_oneof![
        1 => near(64),
        4 => near(PAGES_PER_2M),
        2 => near(TAG_WORD),
        1 => (0u64..5).prop_map(|by| CAPACITY - by),
        1 => 0..=CAPACITY,
    ]
}

fn any_range() -> impl Strategy<Value = GfnRange> {
    let clipped = |page: u64| page.min(CAPACITY);
    prop_oneof![
        (any_page(), any_page()).prop_map(move |(a, b)| range(clipped(a.min(b)), clipped(a.max(b)))),
        (any_page(), 0u64..70).prop_map(move |(a, pages)| range(clipped(a), clipped(a + pages))),
    ]
}

fn config() -> ProptestConfig {
    let cases = if cfg!(miri) { 1 } else { 96 };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_sequence_leaves_the_pages_of_a_vec(
        steps in prop::collection::vec((any_range(), any::<bool>(), any_range()), 1..if cfg!(miri) { 4 } else { 40 }),
    ) {
        let set = PageSet::new(CAPACITY).unwrap();
        let mut model = Model(vec![false; CAPACITY as usize]);
        for (changed, value, asked) in steps {
            set.set(changed, value).unwrap();
            model.set(changed, value);
            check(&set, &model, asked);
        }
        // Miri has time for the last borders only.
        let first = if cfg!(miri) { TAG_WORD - PAGES_PER_2M } else { 0 };
        check(&set, &model, range(first, CAPACITY + if cfg!(miri) { 70 } else { 2 * TAG_WORD }));
        for page in range(first, CAPACITY + 70) {
            prop_assert_eq!(set.contains(page), model.contains(page));
        }
    }
}

#[test]
fn a_page_beyond_the_capacity_is_refused_before_any_effect() {
    for capacity in [0, 1, 63, 64, 65, PAGES_PER_2M, TAG_WORD - 1, TAG_WORD, CAPACITY] {
        let set = PageSet::new(capacity).unwrap();
        let too_long = range(0, capacity + 1);
        assert_eq!(set.insert(too_long), Err(PageSetError::BeyondCapacity { range: too_long, capacity }));
        assert_eq!(set.count(range(0, 2 * CAPACITY)), 0);
        set.insert(range(0, capacity)).unwrap();
        assert_eq!(set.count(GfnRange::new(Gfn::ZERO, Gfn::MAX).unwrap()), capacity);
        assert!(!set.contains(gfn(capacity)));
        assert!(!set.contains(Gfn::MAX));
        assert_eq!(set.set(GfnRange::empty_at(Gfn::MAX), true), Ok(()));
    }
}

#[test]
fn the_message_names_range_and_capacity_in_hex() {
    let error = PageSet::new(0x100).unwrap().insert(range(0xff, 0x101)).unwrap_err();
    assert_eq!(error.to_string(), "range [0xff, 0x101) is beyond the page set's capacity of 0x100 pages");
}

#[test]
#[cfg(not(miri))]
fn address_space_that_is_not_there_is_an_error() {
    for capacity in [crate::addr::MAX_PAGES, u64::MAX] {
        assert!(matches!(PageSet::new(capacity), Err(PageSetError::Map { .. })));
    }
}

#[test]
fn a_chunk_is_mixed_only_while_its_pages_differ() {
    let set = PageSet::new(CAPACITY).unwrap();
    let mixed = || set.statistics().mixed_chunks;
    set.insert(range(5, 6)).unwrap();
    assert_eq!(mixed(), 1);
    set.insert(range(0, PAGES_PER_2M)).unwrap();
    assert_eq!(mixed(), 0);
    set.remove(range(PAGES_PER_2M - 1, PAGES_PER_2M + 1)).unwrap();
    assert_eq!(mixed(), 1);
    set.insert(range(PAGES_PER_2M - 1, PAGES_PER_2M)).unwrap();
    assert_eq!(mixed(), 0);
    set.insert(range(PAGES_PER_2M + 1, CAPACITY)).unwrap();
    assert_eq!(mixed(), 2, "the chunk short of a page, and the one cut by the capacity");
}

/// Eight threads on the pages of one leaf word: whatever the interleaving, each page ends as its own thread left it.
#[test]
fn threads_on_one_leaf_word_lose_no_write() {
    let rounds = if cfg!(miri) { 10 } else { 10_000 };
    let set = PageSet::new(CAPACITY).unwrap();
    let barrier = Barrier::new(8);
    let lasts: Vec<[bool; 8]> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8u64)
            .map(|me| {
                let (set, barrier) = (&set, &barrier);
                scope.spawn(move || {
                    let mut last = [false; 8];
                    let mut seed = me + 1;
                    barrier.wait();
                    for _ in 0..rounds {
                        seed ^= seed << 13;
                        seed ^= seed >> 7;
                        seed ^= seed << 17;
                        let (slot, value) = ((seed >> 8) % 8, seed >> 40 & 1 != 0);
                        let page = gfn(slot * 8 + me);
                        set.set(GfnRange::page(page), value).unwrap();
                        assert_eq!(set.contains(page), value);
                        last[slot as usize] = value;
                    }
                    last
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (me, last) in lasts.iter().enumerate() {
        for (slot, value) in last.iter().enumerate() {
            assert_eq!(set.contains(gfn((slot * 8 + me) as u64)), *value);
        }
    }
}

/// Neighbours share a tag word and nothing else: chunks of one word, each turned by a thread of its own, while a range
/// writer turns the other half of the word, and readers watch chunks that nobody changes.
#[test]
fn threads_on_one_tag_word_keep_to_their_chunks() {
    let rounds = if cfg!(miri) { 2 } else { 5_000 };
    let set = PageSet::new(CAPACITY).unwrap();
    let still = range(8 * PAGES_PER_2M, 9 * PAGES_PER_2M);
    set.insert(still).unwrap();
    thread::scope(|scope| {
        for chunk in 0..4u64 {
            let set = &set;
            scope.spawn(move || {
                let whole = range(chunk * PAGES_PER_2M, (chunk + 1) * PAGES_PER_2M);
                let page = range(whole.start().get() + 7, whole.start().get() + 8);
                for _ in 0..rounds {
                    set.insert(page).unwrap();
                    assert_eq!(set.count(whole), 1);
                    set.insert(whole).unwrap();
                    assert_eq!(set.uniform(whole), Some(true));
                    set.remove(page).unwrap();
                    assert_eq!(set.count(whole), PAGES_PER_2M - 1);
                    set.remove(whole).unwrap();
                    assert_eq!(set.uniform(whole), Some(false));
                }
            });
        }
        scope.spawn(|| {
            let half = range(16 * PAGES_PER_2M, 32 * PAGES_PER_2M);
            for round in 0..rounds {
                set.set(half, round % 2 == 0).unwrap();
                assert_eq!(set.uniform(half), Some(round % 2 == 0));
                assert_eq!(set.uniform(still), Some(true));
            }
        });
    });
    assert_eq!(set.count(range(0, 16 * PAGES_PER_2M)), PAGES_PER_2M);
}

/// Bytes of the mapping that starts at `address` which are in memory, as the kernel counts them.
#[cfg(not(miri))]
fn resident(address: usize) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines().skip_while(|line| {
        let span = line.split_once(' ').and_then(|(span, _)| span.split_once('-'));
        let bounds = span.map(|(from, to)| (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)));
        !matches!(bounds, Some((Ok(from), Ok(to))) if (from..to).contains(&address))
    });
    let rss = lines.find(|line| line.starts_with("Rss:")).unwrap();
    rss.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// 192 KiB fixed and 34 MiB at worst for a tebibyte; and the worst case is what the kernel says it is.
#[test]
#[cfg(not(miri))]
fn a_tebibyte_costs_no_more_than_promised() {
    let pages = 1024 * PAGES_PER_1G;
    let set = PageSet::new(pages).unwrap();
    let empty = set.statistics();
    assert!(empty.fixed_bytes <= 192 << 10, "{empty:?}");
    assert!(empty.fixed_bytes + empty.leaf_bytes <= 34 << 20, "{empty:?}");
    for page in (0..pages).step_by(PAGES_PER_2M as usize) {
        set.insert(range(page, page + 1)).unwrap();
    }
    assert_eq!(set.statistics().mixed_chunks, pages / PAGES_PER_2M);
    // Neighbouring mappings may be listed as one, so another test's set can add to the figure, but not double it.
    let leaf = resident(set.leaf.address());
    assert!(leaf >= 32 << 20, "every leaf word's page was written: {leaf:#x}");
}

/// 256 TiB of guest is address space until something is written.
#[test]
#[cfg(not(miri))]
fn capacity_alone_costs_no_memory() {
    let pages = 256 * 1024 * PAGES_PER_1G;
    let set = PageSet::new(pages).unwrap();
    let far = range(pages - 1, pages);
    set.insert(far).unwrap();
    assert!(set.contains(far.start()));
    assert_eq!(set.statistics().mixed_chunks, 1);
    assert!(set.statistics().leaf_bytes == 8 << 30);
    assert_eq!(set.find(GfnRange::new(Gfn::ZERO, far.end()).unwrap(), true), far.start());
    // Alone in its mapping, or beside another set's: nowhere near the 8 GiB of address space.
    assert!(resident(set.leaf.address()) < 1 << 30);
}
