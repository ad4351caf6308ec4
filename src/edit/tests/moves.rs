//! Moves, circles of them included: every choice of slots to delete, and every order of moving the others, is tried.

use super::model::{cost, run};
use super::*;

/// The best (slots, calls) or (pages interrupted, calls). No host page is at two places.
fn best(old: &[Slot], wanted: &[Page], prefer: Prefer) -> (u64, u64) {
    let page_of = |host: u64| wanted.iter().position(|page| page.is_some_and(|page| page.page == host));
    let fits = |slot: &Slot| {
        (slot.start..slot.end()).all(|at| {
            let page = wanted.get(usize::try_from(at).unwrap()).copied().flatten();
            page.is_some_and(|page| page.page == slot.host + at - slot.start)
        })
    };
    let mut found = None;
    for kept in 0..1_u32 << old.len() {
        let deleted = old.len() as u64 - u64::from(kept.count_ones());
        let kept: Vec<Slot> = old.iter().enumerate().filter(|(at, _)| kept >> at & 1 == 1).map(|(_, s)| *s).collect();
        let target = |slot: &Slot| {
            let start = page_of(slot.host)? as u64;
            Some(Slot { start, ..*slot }).filter(fits)
        };
        let Some(targets) = kept.iter().map(target).collect::<Option<Vec<_>>>() else { continue };
        let moving: Vec<usize> = (0..kept.len()).filter(|at| kept[*at] != targets[*at]).collect();
        if !can_move(&mut kept.clone(), &targets, &moving) {
            continue;
        }
        // Creations fill what is left, one for each gap in memory that continues.
        let covered = |at: u64| targets.iter().any(|slot| (slot.start..slot.end()).contains(&at));
        let mut gaps = 0;
        for at in 0..wanted.len() {
            let Some(page) = wanted[at].filter(|_| !covered(at as u64)) else { continue };
            let below = at.checked_sub(1).filter(|below| !covered(*below as u64)).and_then(|below| wanted[below]);
            gaps += u64::from(below.is_none_or(|below| below.page + 1 != page.page));
        }
        let calls = deleted + moving.len() as u64 + gaps;
        let stays =
            |at: u64| kept.iter().zip(&targets).any(|(slot, to)| slot == to && (slot.start..slot.end()).contains(&at));
        let was = |at: u64| old.iter().any(|slot| (slot.start..slot.end()).contains(&at));
        let interrupted = (0..wanted.len() as u64).filter(|at| wanted[usize::try_from(*at).unwrap()].is_some());
        let interrupted = interrupted.filter(|at| was(*at) && !stays(*at)).count() as u64;
        let cost = match prefer {
            Prefer::FewSlots => (targets.len() as u64 + gaps, calls),
            Prefer::NoInterruption => (interrupted, calls),
        };
        found = found.into_iter().chain([cost]).min();
    }
    found.unwrap()
}

/// Whether the slots at `moving` can go to their targets in some order.
pub fn can_move(now: &mut Vec<Slot>, targets: &[Slot], moving: &[usize]) -> bool {
    moving.is_empty()
        || moving.iter().enumerate().any(|(at, &slot)| {
            let free = now.iter().enumerate().all(|(other, place)| other == slot || !place.overlaps(&targets[slot]));
            if !free {
                return false;
            }
            let mut rest = moving.to_vec();
            rest.remove(at);
            let before = std::mem::replace(&mut now[slot], targets[slot]);
            let can = can_move(now, targets, &rest);
            now[slot] = before;
            can
        })
}

/// Slots at random, and their memory put elsewhere at random, whole or in part, with memory of its own in between.
#[test]
fn memory_changes_places() {
    const SPAN: u64 = 10;
    let mut numbers = Numbers(7);
    let (mut circles, mut moves) = (0, 0);
    for _ in 0..6_000 {
        let mut old: Vec<Slot> = Vec::new();
        let mut at = numbers.below(2);
        while old.len() < 5 && at < 8 {
            let pages = 1 + numbers.below(2);
            old.push(Slot { start: at, pages, host: at, flags: SlotFlags::empty() });
            at += pages + numbers.below(3) / 2;
        }
        let mut wanted: Vec<Page> = vec![None; usize::try_from(SPAN).unwrap() + 2];
        for slot in &old {
            // Whole or in part.
            let (skip, pages) = if numbers.below(4) == 0 { (slot.pages - 1, 1) } else { (0, slot.pages) };
            let start = usize::try_from(if numbers.below(4) == 0 { slot.start } else { numbers.below(SPAN) }).unwrap();
            let place = &mut wanted[start..start + usize::try_from(pages).unwrap()];
            if place.iter().all(Option::is_none) {
                for (page, host) in place.iter_mut().zip(slot.host + skip..) {
                    *page = Some(Host { page: host, flags: 0 });
                }
            }
        }
        if numbers.below(3) == 0 {
            let at = numbers.below(SPAN);
            wanted[usize::try_from(at).unwrap()].get_or_insert(Host { page: 100 + at, flags: 0 });
        }
        let layout = layout_of(Limits::default(), &old);
        let mut draft = draft_of(&layout);
        let pages = (0..).zip(&wanted).filter_map(|(at, page): (u64, _)| Some((at, (*page)?)));
        let regions = pages.map(|(at, host)| region(at, at + 1, host.page, SlotFlags::empty())).collect();
        draft.apply(Operation::ReplaceAll(regions)).unwrap();
        for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
            let plan = plan(&layout, &draft, prefer).unwrap();
            run(&layout, &plan, &wanted);
            assert_eq!(cost(&plan, prefer), best(&old, &wanted, prefer), "{old:?} to {wanted:?}: {:?}", plan.steps);
            let same = |slot: &&Memslot| {
                plan.created().any(|new| (new.hva, new.gfns.pages()) == (slot.hva, slot.gfns.pages()))
            };
            moves += usize::from(plan.steps.iter().any(|step| step.kind() == "move"));
            circles += usize::from(
                plan.steps
                    .iter()
                    .filter_map(|s| if let Step::Delete(slot) = s { Some(slot) } else { None })
                    .any(|s| same(&s)),
            );
        }
    }
    // The generator reaches what this is about.
    assert!(moves > 2_000 && circles > 100, "{moves} with moves, {circles} with circles");
}

#[test]
fn two_slots_change_places() {
    let slot = |start, host| Slot { start, pages: 1, host, flags: SlotFlags::empty() };
    let layout = layout_of(Limits::default(), &[slot(0, 10), slot(4, 20)]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::Move { from: gfns(0, 1), to: gfn(8) }).unwrap();
    draft.apply(Operation::Move { from: gfns(4, 5), to: gfn(0) }).unwrap();
    draft.apply(Operation::Move { from: gfns(8, 9), to: gfn(4) }).unwrap();
    let plan = plan(&layout, &draft, Prefer::NoInterruption).unwrap();
    assert_eq!(kinds(&plan), ["delete", "move", "create"]);
}

/// What was asked to be one slot is one, though its parts could be had by moves.
#[test]
fn what_is_merged_is_one_slot_though_its_parts_could_move_there() {
    let slot = |start, host| Slot { start, pages: 2, host, flags: SlotFlags::empty() };
    let layout = layout_of(Limits::default(), &[slot(10, 0), slot(14, 2)]);
    let mut draft = draft_of(&layout);
    let delete = |start| Operation::Delete(gfns(start, start + 2));
    draft.apply_all(vec![delete(10), delete(14), Operation::Create(region(0, 4, 0, SlotFlags::empty()))]).unwrap();
    let kinds_of = |draft: &Draft| kinds(&plan(&layout, draft, Prefer::NoInterruption).unwrap());
    assert_eq!(kinds_of(&draft), ["move", "move"]);
    draft.apply(Operation::Merge(gfns(1, 3))).unwrap();
    assert_eq!(kinds_of(&draft), ["delete", "delete", "create"]);
}

/// Many slots that change places in pairs: each pair needs one deletion, and it takes no time.
#[test]
fn many_pairs_change_places() {
    const PAIRS: u64 = 2_000;
    let slot = |at| Slot { start: at, pages: 1, host: 2 * at, flags: SlotFlags::empty() };
    let slots: Vec<_> = (0..2 * PAIRS).map(slot).collect();
    let layout = layout_of(Limits::default(), &slots);
    let mut draft = draft_of(&layout);
    let swapped = (0..2 * PAIRS).map(|at| region(at, at + 1, 2 * (at ^ 1), SlotFlags::empty())).collect();
    draft.apply(Operation::ReplaceAll(swapped)).unwrap();
    let plan = plan(&layout, &draft, Prefer::NoInterruption).unwrap();
    assert_eq!(plan.steps.len() as u64, 3 * PAIRS);
}
