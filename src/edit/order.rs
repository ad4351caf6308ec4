//! In which order slots move, so that each finds its target free.
//!
//! A slot can move once those whose places it takes have gone. Where they wait for each other in a circle, one of them must
//! be deleted and created instead; which ones is searched for exhaustively while the circles are small.

use super::assign::{Assignment, Final};
use super::draft::Slots;

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
    let Assignment { finals, moves, .. } = assignment;
    // Where the movers are now: positions in `moves`, ascending by frame.
    let place = |of: &Final| Some(old.get(of.old?)?.gfns);
    let target = |index: &usize| finals.get(*index);
    let mut places: Vec<_> =
        moves.iter().enumerate().filter_map(|(at, index)| Some((place(target(index)?)?, at))).collect();
    places.sort_unstable();
    // For each mover, those who wait for it, and for how many it waits.
    let mut waiting: Vec<Vec<usize>> = vec![Vec::new(); moves.len()];
    let mut waits = vec![0_usize; moves.len()];
    for (at, index) in moves.iter().enumerate() {
        let Some(gfns) = target(index).map(|of| of.region.gfns) else { continue };
        let first = places.partition_point(|(place, _)| place.end() <= gfns.start());
        for (_, by) in places.iter().skip(first).take_while(|(place, _)| place.start() < gfns.end()) {
            if *by != at
                && let (Some(list), Some(count)) = (waiting.get_mut(*by), waits.get_mut(at))
            {
                list.push(at);
                *count = count.saturating_add(1);
            }
        }
    }
    let mut ready: Vec<usize> = (0..moves.len()).rev().filter(|at| waits.get(*at) == Some(&0)).collect();
    let mut sorted = Vec::with_capacity(moves.len());
    while let Some(at) = ready.pop() {
        sorted.extend(moves.get(at));
        for &other in waiting.get(at).into_iter().flatten() {
            if let Some(count) = waits.get_mut(other) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    ready.push(other);
                }
            }
        }
    }
    let stuck = moves.iter().zip(&waits).filter(|(_, count)| **count != 0);
    let stuck = stuck.filter_map(|(index, _)| target(index)?.old).collect();
    *moves = sorted;
    stuck
}
