//! Lookup, segments and span against a linear scan; the index at its edges.

use super::*;

/// Where slots are strewn: GiB boundaries, the end of the index, and the top.
const ANCHORS: [u64; 7] = [
    0,
    PAGES_PER_GIB - 8,
    2 * PAGES_PER_GIB - 3,
    5 * PAGES_PER_GIB,
    (PAGES_PER_GIB << 14) - 10,
    1 << 40,
    (1 << 52) - 200,
];
const PAGES_PER_GIB: u64 = 1 << 18;

/// Disjoint slots: per anchor a train of gaps and lengths. Lengths reach over GiB boundaries and over several GiB.
fn trains() -> impl Strategy<Value = Vec<Memslot>> {
    let length = prop_oneof![4 => 1u64..6, 1 => Just(PAGES_PER_GIB), 1 => Just(3 * PAGES_PER_GIB + 2)];
    let train = (0..ANCHORS.len(), prop::collection::vec((0u64..5, length), 0..8));
    // Under Miri every change of a space that reaches high rebuilds 64 KiB of index at a crawl.
    prop::collection::vec(train, 0..if cfg!(miri) { 2 } else { 5 }).prop_map(|trains| {
        let mut slots: Vec<Memslot> = Vec::new();
        for (anchor, cars) in trains {
            let mut at = ANCHORS[anchor];
            for (gap, len) in cars {
                let Ok(range) = GfnRange::with_len(gfn((at + gap).min(Gfn::MAX.get())), len) else { break };
                at = range.end().get();
                if slots.iter().all(|slot| !slot.gfns.overlaps(&range)) {
                    slots.push(shared(SlotId::new(u16::try_from(slots.len()).unwrap()), range));
                }
            }
        }
        slots
    })
}

/// Frames worth asking for: around every edge of every slot, every anchor and every GiB near one.
fn probes(slots: &[Memslot]) -> Vec<Gfn> {
    let edges = slots.iter().flat_map(|slot| [slot.gfns.start().get(), slot.gfns.end().get()]);
    let gibs = edges.clone().flat_map(|n| [n & !(PAGES_PER_GIB - 1), (n | (PAGES_PER_GIB - 1)) + 1]);
    let all = edges.chain(gibs).chain(ANCHORS).chain([PAGES_PER_GIB << 14, 1 << 52]);
    all.flat_map(|n| (n.saturating_sub(2)..=n + 2).filter_map(Gfn::new)).collect()
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn lookup_is_the_linear_scan(slots in trains()) {
        let table = SlotTable::new(slots.clone());
        for gfn in probes(&slots) {
            let scan = slots.iter().find(|slot| slot.gfns.contains(gfn));
            prop_assert_eq!(table.lookup(gfn), scan, "{:?}", gfn);
            prop_assert_eq!(table.locate(gfn).map(|at| at.slot), scan);
        }
        for slot in &slots {
            prop_assert_eq!(table.get(slot.id), Some(slot));
        }
        prop_assert_eq!(table.len(), slots.len());
        let low = slots.iter().map(|slot| slot.gfns.start()).min();
        let high = slots.iter().map(|slot| slot.gfns.end()).max();
        match (low, high) {
            (Some(low), Some(high)) => prop_assert_eq!(table.span(), GfnRange::new(low, high).unwrap()),
            _ => prop_assert!(table.span().is_empty()),
        }
    }

    #[test]
    fn one_at_a_time_is_all_at_once(slots in trains(), keep in prop::collection::vec(any::<bool>(), 40)) {
        let mut table = SlotTable::default();
        slots.iter().for_each(|slot| table.insert(*slot));
        prop_assert_eq!(&table, &SlotTable::new(slots.clone()));
        let (kept, gone): (Vec<Memslot>, Vec<Memslot>) = slots.iter().partition(|slot| keep[usize::from(slot.id.id)]);
        for slot in gone {
            prop_assert_eq!(table.remove(slot.id), Some(slot));
            prop_assert_eq!(table.remove(slot.id), None);
        }
        prop_assert_eq!(&table, &SlotTable::new(kept));
    }

    #[test]
    fn segments_are_the_frames_one_by_one(
        cars in prop::collection::vec((0u64..5, 1u64..6), 0..12), start in 0u64..60, len in 0u64..60,
    ) {
        let mut slots: Vec<Memslot> = Vec::new();
        let mut at = 0;
        for (gap, len) in cars {
            slots.push(shared(SlotId::new(u16::try_from(slots.len()).unwrap()), gfns(at + gap, at + gap + len)));
            at += gap + len;
        }
        let table = SlotTable::new(slots.clone());
        let range = gfns(start, start + len);
        let segments: Vec<Segment<'_>> = table.segments(range).collect();
        let of = |gfn: Gfn| slots.iter().find(|slot| slot.gfns.contains(gfn));
        let brute: Vec<_> = range.iter().map(|gfn| (gfn, of(gfn))).collect();
        let flat: Vec<_> = segments.iter().flat_map(|piece| piece.gfns.iter().map(|gfn| (gfn, piece.slot))).collect();
        prop_assert_eq!(flat, brute);
        // As few pieces as there can be.
        prop_assert!(segments.iter().all(|piece| !piece.gfns.is_empty()));
        prop_assert!(segments.windows(2).all(|pair| pair[0].slot != pair[1].slot));
    }
}

#[test]
fn segments_take_work_by_slot_and_not_by_page() {
    let table = SlotTable::new(vec![shared(SlotId::new(0), gfns(1 << 30, (1 << 30) + 1))]);
    let pieces: Vec<_> = table.segments(gfns(0, Gfn::MAX.get())).collect();
    let ranges: Vec<_> = pieces.iter().map(|piece| (piece.gfns, piece.slot.is_some())).collect();
    let slot = gfns(1 << 30, (1 << 30) + 1);
    let above = GfnRange::new(slot.end(), Gfn::MAX).unwrap();
    assert_eq!(ranges, [(gfns(0, 1 << 30), false), (slot, true), (above, false)]);
}

#[test]
fn address_spaces_are_apart() {
    let smm = SlotId { as_id: 1, id: 0 };
    let slots = [shared(SlotId::new(0), gfns(0, 8)), shared(smm, gfns(4, 12))];
    let mut table = SlotTable::new(slots.to_vec());
    assert_eq!(table.lookup(gfn(5)), Some(&slots[0]));
    assert_eq!(table.lookup(gfn(9)), None);
    assert_eq!(table.space(1).lookup(gfn(5)), Some(&slots[1]));
    assert_eq!(table.space(2).lookup(gfn(5)), None);
    assert_eq!(table.span(), gfns(0, 8));
    assert_eq!(table.slots().copied().collect::<Vec<_>>(), slots);
    assert_eq!(table.remove(smm), Some(slots[1]));
    assert_eq!(table, SlotTable::new(slots[..1].to_vec()));
}

#[test]
fn a_full_table_finds_every_frame() {
    // Three slots per GiB boundary or so, with holes: all ids of an address space.
    let count = if cfg!(miri) { 300 } else { 32_764_u16 };
    let slots: Vec<_> = (0..count)
        .map(|n| shared(SlotId::new(n), gfns(u64::from(n) * 90_000 + 7, u64::from(n) * 90_000 + 80_000)))
        .collect();
    let layout = Layout::from_slots(Limits::default(), [], slots.iter().rev().copied()).unwrap();
    assert_eq!(layout.table().len(), usize::from(count));
    for slot in &slots {
        let (start, end) = (slot.gfns.start(), slot.gfns.end());
        assert_eq!(layout.table().lookup(start), Some(slot));
        assert_eq!(layout.table().lookup(end.checked_sub(1).unwrap()), Some(slot));
        assert_eq!(layout.table().lookup(end), None);
        assert_eq!(layout.table().lookup(start.checked_sub(1).unwrap()), None);
        assert_eq!(layout.table().get(slot.id), Some(slot));
    }
}

#[test]
fn a_high_slot_costs_no_more_index_than_a_low_one() {
    // One page at the top of the space: were the index as long as the span, this would be 16 GiB of it.
    let slot = shared(SlotId::new(0), GfnRange::new(gfn((1 << 52) - 2), Gfn::MAX).unwrap());
    let table = SlotTable::new(vec![slot]);
    assert_eq!(table.lookup(slot.gfns.start()), Some(&slot));
    assert!(table.space(0).index_len() <= (1 << 14) + 2);
}
