//! What pieces were before the edit is known so that nobody has to look it up: it is true, and no plan would be another
//! without it.

use super::drafts::{any_operation, any_range};
use super::*;
use crate::edit::pieces::{Pieces, Was};

/// The draft of somebody who has kept track of nothing.
fn forgetful(draft: &Draft) -> Draft {
    let mut draft = draft.clone();
    for piece in draft.pieces.iter_mut().flat_map(|Pieces(pieces)| pieces) {
        piece.was = Was::Unknown;
    }
    draft
}

#[test]
fn what_is_known_of_the_past_is_true_and_changes_no_plan() {
    let mut numbers = Numbers(5);
    let (mut untouched, mut fresh, mut planned, mut without_id) = (0, 0, 0, 0);
    for _ in 0..6_000 {
        let mut slots = Vec::new();
        let mut start = 0;
        while start < 9 {
            let pages = 1 + numbers.below(2);
            if numbers.below(4) != 0 {
                let flags = if numbers.below(4) == 0 { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
                slots.push(Slot { start, pages, host: start, flags });
            }
            start += pages;
        }
        // Few ids, so that those of slots that go are needed again.
        let ids = u32::try_from(slots.len()).unwrap() + u32::try_from(numbers.below(4)).unwrap();
        let layout = layout_of(Limits { slots_per_address_space: ids, ..Limits::default() }, &slots);
        let mut draft = draft_of(&layout);
        if numbers.below(2) == 0 {
            draft.apply_all(many(&mut numbers, &slots)).unwrap();
        }
        for _ in 0..numbers.below(3) {
            let ops = (0..1 + numbers.below(4)).map(|_| any(&mut numbers, &slots)).collect();
            let _refused = draft.apply_all(ops);
        }
        for piece in draft.pieces.iter().flat_map(|Pieces(pieces)| pieces) {
            match piece.was {
                Was::Slot(at) => {
                    untouched += 1;
                    assert_eq!(draft.old.region(at.into()), Some(piece.region));
                }
                Was::Nothing => {
                    fresh += 1;
                    let had = draft.old.all().iter().any(|slot| slot.gfns.intersection(&piece.gfns()).is_some());
                    assert!(!had, "{piece:?} was {:?}", draft.old.all());
                }
                Was::Unknown => {}
            }
        }
        for prefer in [Prefer::NoInterruption, Prefer::FewSlots] {
            let known = steps(&layout, &draft, prefer);
            assert_eq!(known, steps(&layout, &forgetful(&draft), prefer), "{draft:?} {prefer:?}");
            planned += usize::from(known.as_ref().is_ok_and(|steps| !steps.is_empty()));
            without_id += usize::from(known.is_err());
        }
    }
    let seen = [untouched, fresh, planned, without_id];
    assert!(untouched > 5_000 && fresh > 500 && planned > 4_000 && without_id > 50, "{seen:?}");
}

/// Slots that go, and pages that come where no slot is or where one has gone, in no order.
fn many(numbers: &mut Numbers, slots: &[Slot]) -> Vec<Operation> {
    let has = |slot: &Slot, at: u64| (slot.start..slot.end()).contains(&at);
    let (gone, kept): (Vec<Slot>, Vec<Slot>) = slots.iter().partition(|_| numbers.below(2) == 0);
    let mut ops: Vec<_> = gone.iter().rev().map(|slot| Operation::Delete(gfns(slot.start, slot.end()))).collect();
    for at in 0..9 {
        if numbers.below(3) == 0 && !kept.iter().any(|slot| has(slot, at)) {
            let new = Operation::Create(region(at, at + 1, at + 20 * numbers.below(2), SlotFlags::empty()));
            let early = numbers.below(2) == 0 && !gone.iter().any(|slot| has(slot, at));
            ops.insert(if early { 0 } else { ops.len() }, new);
        }
    }
    ops
}

/// An operation, more often than not one on a slot as it was.
fn any(numbers: &mut Numbers, slots: &[Slot]) -> Operation {
    let one = usize::try_from(numbers.below(10)).unwrap();
    let range = slots.get(one).map_or_else(|| any_range(numbers), |slot| gfns(slot.start, slot.end()));
    let (start, end) = (range.start().get(), range.end().get());
    match numbers.below(12) {
        0..4 => Operation::Delete(range),
        4..7 => Operation::Create(region(start, end, start + 20 * numbers.below(2), SlotFlags::empty())),
        7 => Operation::Split(range.start()),
        8 => Operation::Merge(range.hull(&any_range(numbers))),
        9 => Operation::Truncate { of: range.start(), pages: 1 },
        10 => Operation::Grow { of: range.start(), pages: range.pages() + 1 },
        _ => any_operation(numbers),
    }
}
