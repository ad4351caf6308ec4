//! In which order slots move, so that each finds its target free.
//!
//! A slot can move once those whose places it takes have gone. Where they wait for each other in a circle, one of them must
//! be deleted and created instead; which ones is searched for exhaustively while the circles are small.

use super::assign::Assignment;
use super::draft::Slots;
use super::movers::Renewed;

/// Circles of more slots than this are broken one by one instead of in the best way.
const EXHAUSTIVE: usize = 10;

/// An assignment whose moves have an order, in that order. `assign` makes one in which the slots given do not move.
pub(super) fn acyclic(old: &Slots, assign: impl Fn(&[usize]) -> Assignment) -> Assignment {
    let mut stuck: Vec<usize> = Vec::new();
    loop {
        let mut first = assign(&stuck);
        let circles = sort(&mut first, old);
        if circles.is_empty() {
            return first;
        }
        if circles.len() <= EXHAUSTIVE {
            let choices = 1_u32..1_u32.checked_shl(u32::try_from(circles.len()).unwrap_or(0)).unwrap_or(1);
            let tries = choices.filter_map(|choice| {
                let chosen = circles.iter().enumerate().filter(|(bit, _)| choice >> bit & 1 == 1);
                let stuck: Vec<usize> = stuck.iter().copied().chain(chosen.map(|(_, at)| *at)).collect();
                let mut assignment = assign(&stuck);
                sort(&mut assignment, old).is_empty().then_some(assignment)
            });
            // With all of them chosen none of them moves; should that lay bare another circle, it goes on below.
            if let Some(best) = tries.min_by_key(Assignment::calls) {
                return best;
            }
        }
        stuck.extend(circles.first());
    }
}

/// Puts the moves in order. Returns the old slots that are in circles, or wait for one.
fn sort(assignment: &mut Assignment, old: &Slots) -> Vec<usize> {
    let moved = &assignment.moved;
    // Where the movers are now: positions in `moved`, ascending by frame.
    let mut places: Vec<_> =
        moved.iter().enumerate().filter_map(|(at, of)| Some((old.get(of.old)?.gfns, at))).collect();
    places.sort_unstable();
    // For each mover, those who wait for it, and for how many it waits.
    let mut waiting: Vec<Vec<usize>> = vec![Vec::new(); moved.len()];
    let mut waits = vec![0_usize; moved.len()];
    for (at, Renewed { region, .. }) in moved.iter().enumerate() {
        let first = places.partition_point(|(place, _)| place.end() <= region.gfns.start());
        for (_, by) in places.iter().skip(first).take_while(|(place, _)| place.start() < region.gfns.end()) {
            if *by != at
                && let (Some(list), Some(count)) = (waiting.get_mut(*by), waits.get_mut(at))
            {
                list.push(at);
                *count = count.saturating_add(1);
            }
        }
    }
    let mut ready: Vec<usize> = (0..moved.len()).rev().filter(|at| waits.get(*at) == Some(&0)).collect();
    let mut sorted = Vec::with_capacity(moved.len());
    while let Some(at) = ready.pop() {
        sorted.extend(moved.get(at));
        for &other in waiting.get(at).into_iter().flatten() {
            if let Some(count) = waits.get_mut(other) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    ready.push(other);
                }
            }
        }
    }
    let stuck = moved.iter().zip(&waits).filter(|(_, count)| **count != 0).map(|(of, _)| of.old).collect();
    assignment.moved = sorted;
    stuck
}
