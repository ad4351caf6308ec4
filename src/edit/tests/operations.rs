//! No other plan is better for what operations lead to either: every tiling of the memory that is wanted, and every choice
//! of slots to keep, move and delete, is tried. Here pieces have a past, and slots may have to begin at some frames.

use super::drafts::{any_operation, any_range};
use super::model::{cost, run, tilings};
use super::moves::can_move;
use super::*;
use crate::edit::pieces::Pieces;
use crate::layout::LayoutError;

/// Frames that the slots begin with.
const FRAMES: u64 = 7;
/// No operation reaches further.
const COUNT: u64 = 24;

/// The pages of a draft.
fn wanted_by(draft: &Draft) -> Vec<Page> {
    let mut pages = vec![None; usize::try_from(COUNT).unwrap()];
    for region in draft.regions() {
        for (gfn, page) in region.gfns.iter().zip(region.hva >> 12..) {
            pages[usize::try_from(gfn.get()).unwrap()] = Some(Host { page, flags: region.flags.bits() });
        }
    }
    pages
}

fn pages_in(slots: &[Slot]) -> impl Iterator<Item = u64> {
    slots.iter().flat_map(|slot| slot.host..slot.host + slot.pages)
}

/// Whether one of them is there twice.
fn twice(pages: impl Iterator<Item = u64>) -> bool {
    let mut seen = std::collections::BTreeSet::new();
    !pages.into_iter().all(|page| seen.insert(page))
}

/// Where slots must begin, and where none may begin or end.
fn rules(draft: &Draft, count: usize) -> (Vec<bool>, Vec<bool>) {
    let (mut cuts, mut whole) = (vec![false; count], vec![false; count]);
    match &draft.pieces {
        Some(Pieces(pieces)) => {
            for piece in pieces {
                let (start, end) = (piece.gfns().start().get(), piece.gfns().end().get());
                cuts[usize::try_from(start).unwrap()] |= piece.cut;
                for at in start + 1..end {
                    whole[usize::try_from(at).unwrap()] = piece.whole;
                }
            }
        }
        None => unreachable!("something was asked for"),
    }
    (cuts, whole)
}

fn check_rules(slots: &[Slot], (cuts, whole): &(Vec<bool>, Vec<bool>)) {
    for at in 1..COUNT {
        let index = usize::try_from(at).unwrap();
        let begins = slots.iter().any(|slot| slot.start == at);
        let within = slots.iter().any(|slot| slot.start < at && at < slot.end());
        assert!(!(cuts[index] && within), "no slot begins at {at}");
        assert!(!(whole[index] && begins), "a slot begins at {at}");
    }
}

/// The best (slots, calls) or (pages interrupted, calls). No host page is at two places, before or after.
fn best(
    old: &[Slot],
    wanted: &[Page],
    (cuts, whole): &(Vec<bool>, Vec<bool>),
    limit: u64,
    prefer: Prefer,
) -> (u64, u64) {
    let mut found: Option<(u64, u64)> = None;
    for new in tilings(wanted, cuts, whole) {
        if new.iter().any(|slot| slot.pages > limit) {
            continue;
        }
        let fixed = |slot: &Slot| (slot.pages, slot.host, slot.flags.contains(SlotFlags::READONLY));
        let target = |slot: &Slot| new.iter().find(|new| fixed(new) == fixed(slot)).copied();
        let could: Vec<(Slot, Slot)> = old.iter().filter_map(|slot| Some((*slot, target(slot)?))).collect();
        for kept in 0..1_u32 << could.len() {
            let kept: Vec<_> =
                could.iter().enumerate().filter(|(at, _)| kept >> at & 1 == 1).map(|(_, both)| *both).collect();
            let (mut now, targets): (Vec<Slot>, Vec<Slot>) = kept.iter().copied().unzip();
            let moving: Vec<usize> = (0..kept.len()).filter(|at| now[*at].start != targets[*at].start).collect();
            if !can_move(&mut now, &targets, &moving) {
                continue;
            }
            let stays: Vec<Slot> =
                kept.iter().filter(|(old, new)| old.start == new.start).map(|(old, _)| *old).collect();
            let changed = kept.iter().filter(|(old, new)| old != new).count();
            let calls = (old.len() - kept.len() + changed + new.len() - kept.len()) as u64;
            let cost = match prefer {
                Prefer::FewSlots => (new.len() as u64, calls),
                Prefer::NoInterruption => {
                    let leaving =
                        old.iter().filter(|slot| !stays.contains(slot)).flat_map(|slot| slot.start..slot.end());
                    let both =
                        leaving.filter(|at| wanted.get(usize::try_from(*at).unwrap()).is_some_and(Option::is_some));
                    (both.count() as u64, calls)
                }
            };
            found = found.into_iter().chain([cost]).min();
        }
    }
    found.unwrap()
}

fn any(numbers: &mut Numbers, slots: &[Slot]) -> Operation {
    let one = usize::try_from(numbers.below(6)).unwrap();
    let range = slots.get(one).map_or_else(|| any_range(numbers), |slot| gfns(slot.start, slot.end()));
    let (start, end) = (range.start().get(), range.end().get());
    let host = if numbers.below(3) == 0 { start + 20 } else { numbers.below(FRAMES) };
    match numbers.below(16) {
        0..4 => Operation::Delete(range),
        4..7 => Operation::Create(region(start, end, host, SlotFlags::empty())),
        7..9 => Operation::Move { from: range, to: gfn(numbers.below(FRAMES)) },
        9 => Operation::SetFlags(range, SlotFlags::LOG_DIRTY),
        10 => Operation::Split(range.start()),
        11 => Operation::Merge(range.hull(&any_range(numbers))),
        12 => Operation::Truncate { of: range.start(), pages: 1 },
        13 => Operation::Grow { of: range.start(), pages: range.pages() + 1 },
        14 => Operation::PunchHole(any_range(numbers)),
        _ => any_operation(numbers),
    }
}

#[test]
fn no_plan_for_operations_is_better() {
    let mut numbers = Numbers(11);
    let (mut moves, mut few_ids, mut checked) = (0, 0, 0);
    while checked < 6_000 {
        let mut slots: Vec<Slot> = Vec::new();
        let mut start = numbers.below(2);
        while start < FRAMES && slots.len() < 5 {
            let pages = 1 + numbers.below(3);
            let flags = if numbers.below(5) == 0 { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
            slots.push(Slot { start, pages: pages.min(FRAMES - start), host: start, flags });
            start += pages + numbers.below(3) / 2;
        }
        let ids = u32::try_from(slots.len()).unwrap() + u32::try_from(numbers.below(5)).unwrap();
        let layout = layout_of(Limits { slots_per_address_space: ids, ..Limits::default() }, &slots);
        let mut draft = draft_of(&layout);
        for _ in 0..1 + numbers.below(3) {
            if numbers.below(2) == 0 {
                let ops = (0..1 + numbers.below(3)).map(|_| any(&mut numbers, &slots)).collect();
                let _refused = draft.apply_all(ops);
            } else {
                let _refused = draft.apply(any(&mut numbers, &slots));
            }
        }
        if draft.pieces.is_none() {
            continue;
        }
        let wanted = wanted_by(&draft);
        if twice(wanted.iter().flatten().map(|host| host.page)) {
            continue;
        }
        checked += 1;
        let rules = rules(&draft, wanted.len());
        for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
            let best = best(&slots, &wanted, &rules, u64::MAX, prefer);
            let plan = match plan(&layout, &draft, prefer) {
                Ok(plan) => plan,
                Err(PlanError::NoFreeId { needed, free }) => {
                    assert!(needed > free);
                    few_ids += 1;
                    continue;
                }
                Err(other) => panic!("{other}"),
            };
            let after = run(&layout, &plan, &wanted);
            check_rules(&after, &rules);
            assert_eq!(cost(&plan, prefer), best, "{prefer:?} {draft:?}: {:?}", plan.steps);
            moves += usize::from(plan.steps.iter().any(|step| step.kind() == "move"));
        }
    }
    assert!(moves > 500 && few_ids > 100, "{moves} with moves, {few_ids} without ids");
}

/// Where a plan need not be the best, it is still right: runs longer than a slot may be, and memory that is at two places.
#[test]
fn plans_with_long_runs_and_aliases_are_right() {
    let mut numbers = Numbers(13);
    let (mut long, mut aliases, mut moves) = (0, 0, 0);
    for _ in 0..4_000 {
        let limit = 1 + numbers.below(3);
        let mut slots: Vec<Slot> = Vec::new();
        let mut start = numbers.below(2);
        while start < FRAMES && slots.len() < 5 {
            let pages = 1 + numbers.below(limit);
            let flags = if numbers.below(5) == 0 { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
            let host = if numbers.below(8) == 0 { 0 } else { start };
            slots.push(Slot { start, pages: pages.min(FRAMES - start), host, flags });
            start += pages + numbers.below(3) / 2;
        }
        let layout = layout_of(Limits { pages_per_slot: limit, ..Limits::default() }, &slots);
        let mut draft = draft_of(&layout);
        for _ in 0..1 + numbers.below(4) {
            let ops = (0..1 + numbers.below(2)).map(|_| any(&mut numbers, &slots)).collect();
            let _refused = draft.apply_all(ops);
        }
        if draft.pieces.is_none() {
            continue;
        }
        let wanted = wanted_by(&draft);
        let aliased = [twice(wanted.iter().flatten().map(|host| host.page)), twice(pages_in(&slots))].contains(&true);
        aliases += usize::from(aliased);
        let rules = rules(&draft, wanted.len());
        for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
            let plan = match plan(&layout, &draft, prefer) {
                Ok(plan) => plan,
                // Only what was asked to be one slot is ever too long for one.
                Err(PlanError::Layout(LayoutError::TooLarge { .. })) if rules.1.contains(&true) => continue,
                Err(other) => panic!("{other}: {draft:?}"),
            };
            let after = run(&layout, &plan, &wanted);
            long += usize::from(after.windows(2).any(|two| two[0].end() == two[1].start));
            check_rules(&after, &rules);
            moves += usize::from(plan.steps.iter().any(|step| step.kind() == "move"));
            if !aliased {
                let (found, best) = (cost(&plan, prefer), best(&slots, &wanted, &rules, limit, prefer));
                assert!(found.0 == best.0 && found.1 <= best.1 + 1, "{prefer:?} {draft:?}: {:?}", plan.steps);
            }
        }
    }
    assert!(long > 2_000 && aliases > 500 && moves > 300, "{long} long, {aliases} aliases, {moves} with moves");
}
