//! Every operation against sets of page numbers, and the edges at both ends of the space.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn gfn(n: u64) -> Gfn {
    Gfn::new(n).unwrap()
}

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(gfn(start), gfn(end)).unwrap()
}

fn pages(range: &GfnRange) -> BTreeSet<u64> {
    range.iter().map(Gfn::get).collect()
}

fn set(ranges: &[GfnRange]) -> BTreeSet<u64> {
    ranges.iter().flat_map(pages).collect()
}

/// An ascending, disjoint list from a set: what the list functions take.
fn list(pages: &BTreeSet<u64>) -> Vec<GfnRange> {
    merge_adjacent(pages.iter().map(|&n| GfnRange::page(gfn(n))))
}

fn is_canonical(ranges: &[GfnRange]) -> bool {
    ranges.iter().all(|r| !r.is_empty()) && ranges.windows(2).all(|w| w[0].end() <= w[1].start())
}

fn any_range() -> impl Strategy<Value = GfnRange> {
    (0u64..160, 0u64..80).prop_map(|(start, len)| range(start, start + len))
}

fn any_set() -> impl Strategy<Value = BTreeSet<u64>> {
    prop::collection::btree_set(0u64..96, 0..48)
}

#[test]
fn bytes_at_the_edges_of_the_space() {
    let top = MAX_PAGES * PAGE_SIZE;
    assert_eq!(GfnRange::from_bytes(0, 0), Err(AddrError::Empty { start: 0 }));
    assert_eq!(GfnRange::from_bytes(1, 4096), Err(AddrError::Unaligned { start: 1, size: 4096 }));
    assert_eq!(GfnRange::from_bytes(4096, 1), Err(AddrError::Unaligned { start: 4096, size: 1 }));
    // The last page below the top is a range; the page at the top would end at 2^64.
    assert_eq!(GfnRange::from_bytes(top - 4096, 4096).unwrap().end(), Gfn::MAX);
    assert_eq!(GfnRange::from_bytes(top, 4096), Err(AddrError::BeyondTop { start: top, size: 4096 }));
    assert_eq!(GfnRange::from_bytes(4096, top), Err(AddrError::BeyondTop { start: 4096, size: top }));
    assert_eq!(GfnRange::from_bytes(0, top).unwrap().pages(), MAX_PAGES);
    assert_eq!(GfnRange::from_bytes(0, top).unwrap().end_byte(), top);
    assert!(matches!(GfnRange::with_len(Gfn::MAX, 1), Err(AddrError::BeyondTop { .. })));
    assert!(matches!(GfnRange::with_len(gfn(1), u64::MAX), Err(AddrError::BeyondTop { .. })));
    assert!(matches!(GfnRange::new(gfn(2), gfn(1)), Err(AddrError::Inverted { start: 2, end: 1 })));
}

#[test]
fn nothing_wraps_at_the_top() {
    let last = GfnRange::with_len(Gfn::MAX.checked_sub(3).unwrap(), 3).unwrap();
    assert_eq!(last.align_out(512).end(), Gfn::MAX);
    assert_eq!(last.align_in(512), None);
    assert_eq!((last.align_out(u64::MAX).start(), last.align_in(u64::MAX)), (Gfn::ZERO, None));
    assert_eq!(last.chunks(u64::MAX).count(), 1);
    assert_eq!(last.iter().count(), 3);
    assert_eq!(last.chunks(2).map(|c| c.pages()).sum::<u64>(), 3);
    assert_eq!(GfnRange::page(Gfn::MAX).pages(), 0);
    assert_eq!(last.rebase(last.start(), FilePage::MAX.checked_sub(2).unwrap()), None);
    assert_eq!(last.rebase(Gfn::MAX, FilePage::ZERO), None);
}

#[test]
fn messages_carry_the_range_in_hex() {
    assert_eq!(
        GfnRange::from_bytes(0x1001, 0x2000).unwrap_err().to_string(),
        "unaligned range: start 0x1001, size 0x2000, page size 0x1000"
    );
    assert_eq!(format!("{:?} {}", range(1, 16), gfn(16)), "[0x1, 0x10) 0x10");
}

/// Miri takes a thousand times as long, and has no file system to keep failures in.
fn config() -> ProptestConfig {
    if cfg!(miri) {
        ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() }
    } else {
        ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn intersection_and_overlap_are_those_of_sets(a in any_range(), b in any_range()) {
        let both: BTreeSet<u64> = pages(&a).intersection(&pages(&b)).copied().collect();
        prop_assert_eq!(a.intersection(&b).map(|r| pages(&r)).unwrap_or_default(), both.clone());
        prop_assert_eq!(a.overlaps(&b), !both.is_empty());
        prop_assert_eq!(a.contains_range(&b), pages(&b).is_subset(&pages(&a)));
    }

    #[test]
    fn subtraction_is_that_of_sets(a in any_range(), b in any_range()) {
        let rest: Vec<GfnRange> = a.subtract(&b).collect();
        prop_assert!(is_canonical(&rest));
        prop_assert_eq!(set(&rest), pages(&a).difference(&pages(&b)).copied().collect::<BTreeSet<u64>>());
    }

    #[test]
    fn chunks_cover_exactly_and_break_at_multiples(a in any_range(), shift in 0u32..6) {
        let unit = 1u64 << shift;
        let chunks: Vec<GfnRange> = a.chunks(unit).collect();
        prop_assert_eq!(set(&chunks), pages(&a));
        prop_assert!(is_canonical(&chunks));
        for chunk in &chunks {
            prop_assert_eq!(chunk.start().get() / unit, (chunk.end().get() - 1) / unit);
        }
    }

    #[test]
    fn pieces_cover_exactly_and_are_fewest(a in any_range(), size in 1u64..40) {
        let pieces: Vec<GfnRange> = a.split_every(size).collect();
        prop_assert_eq!(set(&pieces), pages(&a));
        prop_assert!(is_canonical(&pieces));
        prop_assert_eq!(pieces.len() as u64, a.pages().div_ceil(size));
        prop_assert!(pieces.iter().all(|piece| piece.pages() <= size));
    }

    #[test]
    fn alignment_is_the_tightest(a in any_range(), shift in 0u32..6) {
        let unit = 1u64 << shift;
        let inner: BTreeSet<u64> =
            (0..512 / unit).filter(|b| (b * unit..(b + 1) * unit).all(|n| a.contains(gfn(n)))).flat_map(|b| b * unit..(b + 1) * unit).collect();
        prop_assert_eq!(a.align_in(unit).map(|r| pages(&r)).unwrap_or_default(), inner);
        let outer: BTreeSet<u64> =
            (0..512 / unit).filter(|b| (b * unit..(b + 1) * unit).any(|n| a.contains(gfn(n)))).flat_map(|b| b * unit..(b + 1) * unit).collect();
        if !a.is_empty() {
            prop_assert_eq!(pages(&a.align_out(unit)), outer);
        }
    }

    #[test]
    fn rebase_maps_page_by_page(start in 0u64..64, len in 0u64..64, origin in 0u64..64, onto in 0u64..64) {
        let moved = range(start, start + len).rebase(gfn(origin), FilePage::new(onto).unwrap());
        if start < origin {
            prop_assert_eq!(moved, None);
        } else {
            let want: Vec<u64> = (start..start + len).map(|n| n - origin + onto).collect();
            prop_assert_eq!(moved.unwrap().iter().map(FilePage::get).collect::<Vec<_>>(), want);
        }
    }

    #[test]
    fn lists_are_sets(a in any_set(), b in any_set()) {
        let (x, y) = (list(&a), list(&b));
        prop_assert_eq!(set(&x), a.clone());
        let minus = subtract_lists(&x, &y);
        prop_assert!(is_canonical(&minus));
        prop_assert_eq!(set(&minus), a.difference(&b).copied().collect::<BTreeSet<u64>>());
        let both = intersect_lists(&x, &y);
        prop_assert!(is_canonical(&both));
        prop_assert_eq!(set(&both), a.intersection(&b).copied().collect::<BTreeSet<u64>>());
    }

    /// Lists whose neighbours touch (slots do) cut and meet correctly too.
    #[test]
    fn touching_neighbours_are_legal_input(a in any_set(), b in any_set()) {
        let touching = |pages: &BTreeSet<u64>| -> Vec<GfnRange> { pages.iter().map(|&n| GfnRange::page(gfn(n))).collect() };
        prop_assert_eq!(set(&subtract_lists(&touching(&a), &touching(&b))), a.difference(&b).copied().collect::<BTreeSet<u64>>());
        prop_assert_eq!(set(&intersect_lists(&touching(&a), &touching(&b))), a.intersection(&b).copied().collect::<BTreeSet<u64>>());
    }
}
