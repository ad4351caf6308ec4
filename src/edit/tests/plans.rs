//! No other plan is better: every way to cut the wanted memory into slots is tried.

use super::model::{PAGES, best, cost, geometries, run};
use super::*;

const PREFERENCES: [Prefer; 2] = [Prefer::FewSlots, Prefer::NoInterruption];

/// What a slot or a page may be: ordinary, logged, read-only, or other memory.
const KINDS: [(u64, SlotFlags); 4] =
    [(0, SlotFlags::empty()), (0, SlotFlags::LOG_DIRTY), (0, SlotFlags::READONLY), (100, SlotFlags::empty())];

fn slots(geometry: &[(u64, u64)], kinds: &[usize]) -> Vec<Slot> {
    let slot = |(&(start, end), &kind): (&(u64, u64), &usize)| {
        let (memory, flags) = KINDS[kind];
        Slot { start, pages: end - start, host: memory + start, flags }
    };
    geometry.iter().zip(kinds).map(slot).collect()
}

/// Every sequence of `len` numbers below `bound`.
fn sequences(len: usize, bound: usize) -> impl Iterator<Item = Vec<usize>> {
    let count = bound.pow(u32::try_from(len).unwrap());
    (0..count).map(move |mut number| {
        let digit = |_| {
            let digit = number % bound;
            number /= bound;
            digit
        };
        (0..len).map(digit).collect()
    })
}

fn wanted(kinds: &[usize], none: usize) -> Vec<Page> {
    let page = |(at, &kind): (u64, &usize)| {
        let (memory, flags) = *KINDS.get(kind).filter(|_| kind != none)?;
        Some(Host { page: memory + at, flags: flags.bits() })
    };
    (0..).zip(kinds).map(page).collect()
}

/// One region per page: whoever wants more in a slot has it merged.
fn regions(pages: &[Page]) -> Vec<Region> {
    let pages = (0..).zip(pages).filter_map(|(at, page): (u64, _)| Some((at, (*page)?)));
    pages.map(|(at, host)| region(at, at + 1, host.page, SlotFlags::from_bits(host.flags).unwrap())).collect()
}

fn check(old: &[Slot], wanted: &[Page], cuts: &[bool]) {
    let layout = layout_of(Limits::default(), old);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::ReplaceAll(regions(wanted))).unwrap();
    for at in (0..PAGES).filter(|at| cuts[usize::try_from(*at).unwrap()]) {
        draft.apply(Operation::Split(gfn(at))).unwrap();
    }
    for prefer in PREFERENCES {
        let plan = plan(&layout, &draft, prefer).unwrap();
        run(&layout, &plan, wanted);
        let found = cost(&plan, prefer);
        assert_eq!(found, best(old, wanted, cuts, prefer), "{old:?} to {wanted:?}, {prefer:?}: {:?}", plan.steps);
    }
}

/// From each of the 233 ways to have slots in six pages (up to 5 slots, and the one with 6) to each other one, slots
/// ending exactly where they do in that.
#[test]
fn every_geometry_to_every_other() {
    let all = geometries();
    assert_eq!(all.len(), 233);
    for old in &all {
        let old = slots(old, &[0; 6]);
        for new in &all {
            let mut kinds = [4; 6];
            let mut cuts = [false; 6];
            for &(start, end) in new {
                cuts[usize::try_from(start).unwrap()] = true;
                kinds[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(0);
            }
            check(&old, &wanted(&kinds, 4), &cuts);
        }
    }
}

/// The same with slots and pages of two kinds, logged or not, slots ending where they may: of 1.5 million pairs every 31st,
/// in another order for each kind of difference. All of them with `--ignored`.
fn kinds_of_slots(kinds: [usize; 2], step: usize) {
    let pages: Vec<_> = sequences(6, 3)
        .map(|page| page.iter().map(|k| kinds.get(*k).copied().unwrap_or(9)).collect())
        .collect::<Vec<Vec<_>>>();
    let mut turn = 0_usize;
    for geometry in geometries().iter().filter(|slots| slots.len() <= 5) {
        for of_slots in sequences(geometry.len(), 2) {
            let of_slots: Vec<_> = of_slots.iter().map(|k| kinds[*k]).collect();
            let old = slots(geometry, &of_slots);
            for page in &pages {
                turn += 1;
                if turn.is_multiple_of(step) {
                    check(&old, &wanted(page, 9), &[false; 6]);
                }
            }
        }
    }
    assert_eq!(turn, 1_506_843);
}

#[test]
fn logged_or_not() {
    kinds_of_slots([0, 1], 31);
}

#[test]
fn read_only_or_not() {
    kinds_of_slots([0, 2], 37);
}

#[test]
fn this_memory_or_that() {
    kinds_of_slots([0, 3], 41);
}

#[test]
#[ignore = "takes minutes: every pair of the three tests above"]
fn all_kinds_of_slots() {
    for other in 1..KINDS.len() {
        kinds_of_slots([0, other], 1);
    }
}
