//! Operations, page by page: whatever is asked for, the draft says what a table of single pages says.

use super::model::PAGES;
use super::*;

const SPAN: u64 = PAGES + 2;

/// Frames as positions in a table of pages.
struct Pages;

impl Pages {
    fn range(gfns: GfnRange) -> std::ops::Range<usize> {
        usize::try_from(gfns.start().get()).unwrap()..usize::try_from(gfns.end().get()).unwrap()
    }
}

/// The pages of a draft.
fn pages_of(draft: &Draft) -> Vec<Page> {
    (0..SPAN)
        .map(|at| {
            let region = draft.regions().find(|region| region.gfns.contains(gfn(at)))?;
            let skip = at - region.gfns.start().get();
            Some(Host { page: (region.hva >> 12) + skip, flags: region.flags.bits() })
        })
        .collect()
}

/// What `op` makes of `pages`; `None` if it makes no sense of pages alone. Operations on slots are asked for by page.
fn apply(pages: &[Page], op: &Operation) -> Option<Vec<Page>> {
    let mut next = pages.to_vec();
    let has = |gfns: GfnRange, some: bool| {
        let part = pages.get(Pages::range(gfns));
        !gfns.is_empty() && part.is_some_and(|part| part.iter().all(|page| page.is_some() == some))
    };
    match op {
        Operation::Create(region) => {
            if !has(region.gfns, false) {
                return None;
            }
            for (page, host) in next[Pages::range(region.gfns)].iter_mut().zip(region.hva >> 12..) {
                *page = Some(Host { page: host, flags: region.flags.bits() });
            }
        }
        Operation::PunchHole(gfns) => {
            if !has(*gfns, true) {
                return None;
            }
            next[Pages::range(*gfns)].fill(None);
        }
        Operation::Move { from, to } => {
            let target = GfnRange::with_len(*to, from.pages()).ok()?;
            if !has(*from, true) || target.end().get() > SPAN {
                return None;
            }
            next[Pages::range(*from)].fill(None);
            if next[Pages::range(target)].iter().any(Option::is_some) {
                return None;
            }
            next[Pages::range(target)].copy_from_slice(&pages[Pages::range(*from)]);
        }
        Operation::SetFlags(gfns, flags) => {
            if !has(*gfns, true) {
                return None;
            }
            next[Pages::range(*gfns)].iter_mut().flatten().for_each(|host| host.flags = flags.bits());
        }
        _ => return None,
    }
    Some(next)
}

pub fn any_range(numbers: &mut Numbers) -> GfnRange {
    let start = numbers.below(SPAN);
    gfns(start, (start + 1 + numbers.below(3)).min(SPAN))
}

pub fn any_operation(numbers: &mut Numbers) -> Operation {
    let range = any_range(numbers);
    let flags =
        [SlotFlags::empty(), SlotFlags::LOG_DIRTY, SlotFlags::READONLY][usize::try_from(numbers.below(3)).unwrap()];
    match numbers.below(4) {
        0 => Operation::Create(region(range.start().get(), range.end().get(), numbers.below(30), flags)),
        1 => Operation::PunchHole(range),
        2 => Operation::Move { from: range, to: gfn(numbers.below(SPAN - range.pages())) },
        _ => Operation::SetFlags(range, flags),
    }
}

#[test]
fn operations_do_to_pages_what_they_say() {
    let mut numbers = Numbers(1);
    let (mut done, mut refused) = (0, 0);
    for _ in 0..300 {
        let layout = layout_of(Limits::default(), &[Slot { start: 1, pages: 4, host: 1, flags: SlotFlags::empty() }]);
        let mut draft = draft_of(&layout);
        for _ in 0..20 {
            let (op, before) = (any_operation(&mut numbers), pages_of(&draft));
            let expected = apply(&before, &op);
            let result = draft.apply(op.clone()).map(|_| ()).ok();
            assert_eq!(result.is_some(), expected.is_some(), "{op:?} on {before:?}");
            if expected.is_some() {
                done += 1;
            } else {
                refused += 1;
            }
            assert_eq!(pages_of(&draft), expected.unwrap_or(before), "{op:?}");
        }
        let mut regions: Vec<_> = draft.regions().collect();
        regions.sort_by_key(|region| region.gfns);
        assert!(regions.is_sorted_by(|low, high| low.gfns.end() <= high.gfns.start()), "ascending and disjoint");
    }
    assert!(done > 1_000 && refused > 1_000, "{done} done, {refused} refused");
}

/// Many at once come to what one after the other does, refusals included.
#[test]
fn all_at_once_is_one_by_one() {
    let mut numbers = Numbers(3);
    let (mut done, mut refused) = (0, 0);
    for _ in 0..4_000 {
        let slots: Vec<_> = [(0, 2), (2, 4), (5, 6), (7, 8)]
            .iter()
            .filter(|_| numbers.below(3) != 0)
            .map(|&(start, end)| Slot { start, pages: end - start, host: start, flags: SlotFlags::empty() })
            .collect();
        let layout = layout_of(Limits::default(), &slots);
        let whole = |numbers: &mut Numbers| {
            let slot = slots.get(usize::try_from(numbers.below(4)).unwrap());
            slot.map_or_else(|| any_range(numbers), |slot| gfns(slot.start, slot.end()))
        };
        let count = numbers.below(4) + 1;
        let ops: Vec<_> = (0..count)
            .map(|_| match numbers.below(8) {
                0..4 => Operation::Delete(whole(&mut numbers)),
                4..7 => {
                    let range = if numbers.below(2) == 0 { any_range(&mut numbers) } else { whole(&mut numbers) };
                    Operation::Create(region(
                        range.start().get(),
                        range.end().get(),
                        range.start().get(),
                        SlotFlags::empty(),
                    ))
                }
                _ => any_operation(&mut numbers),
            })
            .collect();
        let mut one_by_one = draft_of(&layout);
        let error = ops.iter().find_map(|op| one_by_one.apply(op.clone()).err());
        let mut at_once = draft_of(&layout);
        let result = at_once.apply_all(ops.clone()).map(|_| ()).err();
        assert_eq!(result, error, "{ops:?}");
        if error.is_some() {
            refused += 1;
            assert_eq!(at_once, draft_of(&layout), "nothing of it was applied");
        } else {
            done += 1;
            assert_eq!(at_once.pieces, one_by_one.pieces, "{ops:?}");
            assert!(at_once.operations().eq(one_by_one.operations()));
        }
    }
    assert!(done > 500 && refused > 500, "{done} done, {refused} refused");
}

#[test]
fn truncating_and_growing_are_about_the_end() {
    let layout = layout_of(Limits::default(), &[Slot { start: 2, pages: 4, host: 2, flags: SlotFlags::empty() }]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::Truncate { of: gfn(3), pages: 1 }).unwrap();
    assert_eq!(draft.regions().collect::<Vec<_>>(), [region(2, 3, 2, SlotFlags::empty())]);
    draft.apply(Operation::Grow { of: gfn(2), pages: 6 }).unwrap();
    let grown: Vec<_> = draft.regions().collect();
    assert_eq!(grown, [region(2, 3, 2, SlotFlags::empty()), region(3, 8, 3, SlotFlags::empty())]);
    let refused = |draft: &mut Draft, op| draft.apply(op).unwrap_err().reason;
    let longer = refused(&mut draft, Operation::Truncate { of: gfn(2), pages: 2 });
    assert_eq!(longer, Reason::Length { now: 1, wanted: 2 });
    let nothing = refused(&mut draft, Operation::Truncate { of: gfn(2), pages: 0 });
    assert_eq!(nothing, Reason::Length { now: 1, wanted: 0 });
    let shorter = refused(&mut draft, Operation::Grow { of: gfn(4), pages: 2 });
    assert_eq!(shorter, Reason::Length { now: 5, wanted: 2 });
    let occupied = refused(&mut draft, Operation::Grow { of: gfn(2), pages: 2 });
    assert_eq!(occupied, Reason::Occupied { gfns: gfns(3, 4) });
    let nowhere = refused(&mut draft, Operation::Grow { of: gfn(1), pages: 2 });
    assert_eq!(nowhere, Reason::NotMemory { gfns: gfns(1, 2) });
}

#[test]
fn what_makes_no_sense_says_why() {
    let slot = |start, pages| Slot { start, pages, host: start, flags: SlotFlags::empty() };
    let layout = layout_of(Limits::default(), &[slot(0, 4), slot(6, 2)]);
    let mut draft = draft_of(&layout);
    let before = draft.clone();
    let mut reason = |op| {
        let refused = draft.apply(op).unwrap_err();
        assert_eq!(draft, before, "the draft is as it was");
        refused.reason
    };
    assert_eq!(reason(Operation::Create(region(3, 5, 50, SlotFlags::empty()))), Reason::Occupied { gfns: gfns(3, 4) });
    assert_eq!(reason(Operation::Create(region(5, 5, 50, SlotFlags::empty()))), Reason::Empty { at: gfn(5) });
    assert_eq!(reason(Operation::Delete(gfns(0, 8))), Reason::NotMemory { gfns: gfns(4, 6) });
    assert_eq!(reason(Operation::Delete(gfns(0, 2))), Reason::Partial { slot: gfns(0, 4), part: gfns(0, 2) });
    assert_eq!(reason(Operation::PunchHole(gfns(7, 9))), Reason::NotMemory { gfns: gfns(8, 9) });
    assert_eq!(reason(Operation::Move { from: gfns(0, 4), to: gfn(3) }), Reason::Occupied { gfns: gfns(6, 7) });
    let top = Gfn::MAX;
    assert_eq!(reason(Operation::Move { from: gfns(0, 4), to: top }), Reason::Wraps { at: top, pages: 4 });
    assert_eq!(reason(Operation::Merge(gfns(0, 8))), Reason::NotMemory { gfns: gfns(4, 6) });
    assert_eq!(reason(Operation::Split(gfn(4))), Reason::NotMemory { gfns: gfns(4, 5) });
    let private = SlotFlags::GUEST_MEMFD;
    assert_eq!(reason(Operation::SetFlags(gfns(0, 1), private)), Reason::Flags { flags: private });
    let same = vec![region(0, 2, 0, SlotFlags::empty()), region(1, 3, 0, SlotFlags::empty())];
    assert_eq!(reason(Operation::ReplaceAll(same)), Reason::Occupied { gfns: gfns(1, 2) });
    assert_eq!(draft.slot(SlotId::new(1)).unwrap(), gfns(6, 8));
    let unknown = SlotId::new(9);
    assert_eq!(draft.slot(unknown).unwrap_err().reason, Reason::UnknownSlot { id: unknown });
    let refused = draft.name("shrink").apply(Operation::Split(gfn(4))).unwrap_err();
    assert_eq!(refused.to_string(), "operation 0, split (shrink)");
    assert_eq!(refused.reason.to_string(), "gfns [0x4, 0x5) are not memory");
}

/// Each page of memory has an address and a file page, and so has its end: else parts of it would come to nothing.
#[test]
fn memory_beyond_the_highest_address_is_refused() {
    let top = 1 << 52;
    let file_page = |page| FilePage::new(page).unwrap();
    let bound = |start| Some(FileBinding { file: FileId::next(), start: file_page(start) });
    let plain = region(4, 8, 0, SlotFlags::empty());
    let wraps = [
        Region { hva: (top - 3) << 12, ..plain },
        Region { hva: u64::MAX, ..plain },
        Region { binding: bound(FilePage::MAX.get() - 3), ..plain },
    ];
    let fits = [Region { hva: (top - 5) << 12, ..plain }, Region { binding: bound(FilePage::MAX.get() - 4), ..plain }];
    let layout = layout_of(Limits::default(), &[]);
    let punch = Operation::PunchHole(gfns(4, 7));
    for region in wraps {
        let refused = Reason::Wraps { at: gfn(4), pages: 4 };
        for create in [Operation::Create(region), Operation::ReplaceAll(vec![region])] {
            let mut draft = draft_of(&layout);
            assert_eq!(draft.apply(create.clone()).unwrap_err().reason, refused);
            assert_eq!(draft.apply_all(vec![create]).unwrap_err().reason, refused);
            assert_eq!(draft, draft_of(&layout));
        }
    }
    for region in fits {
        let mut draft = draft_of(&layout);
        draft.apply_all(vec![Operation::Create(region), punch.clone()]).unwrap();
        assert_eq!(draft.regions().map(|region| region.gfns).collect::<Vec<_>>(), [gfns(7, 8)]);
        let refused = draft.apply(Operation::Grow { of: gfn(7), pages: 3 }).unwrap_err().reason;
        assert_eq!(refused, Reason::Wraps { at: gfn(8), pages: 2 });
    }
}

/// What cannot be swept is applied one by one, and comes to the same.
#[test]
fn numbers_that_no_key_has_room_for_are_no_error() {
    let far = 1 << 40;
    let create = |start: u64| Operation::Create(region(start, start + 1, start % far + 9, SlotFlags::empty()));
    let keys = |op: &Operation, at: usize| sweep::key(op, at).is_some();
    assert!(keys(&create(far - 1), (1 << 23) - 1));
    assert!(!keys(&create(far), 0) && !keys(&create(far + 1), 0));
    assert!(!keys(&Operation::Delete(gfns(1, 2)), 1 << 23));
    let limits = Limits { top: Gfn::MAX, ..Limits::default() };
    let layout = layout_of(limits, &[]);
    let ops = vec![create(far + 2), create(far), Operation::Delete(gfns(far, far + 1)), create(far + 1)];
    let mut draft = draft_of(&layout);
    draft.apply_all(ops.clone()).unwrap();
    let mut one_by_one = draft_of(&layout);
    for op in ops {
        one_by_one.apply(op).unwrap();
    }
    assert_eq!(draft.pieces, one_by_one.pieces);
    let plan = plan(&layout, &draft, Prefer::NoInterruption).unwrap();
    assert_eq!(plan.layout.table().slots().map(|slot| slot.gfns).collect::<Vec<_>>(), [gfns(far + 1, far + 3)]);
}
