//! In which order slots move, so that each finds its target free.
//!
//! A slot can move once those whose places it takes have gone. Where they wait for each other in a circle, one of them must
//! be deleted and created instead; which ones is searched for exhaustively while the circles are small.

use super::assign::Assignment;
use super::draft::Slots;
use super::movers::Renewed;

/// If more slots than this are in circles, one of each circle goes, whichever it is.
const EXHAUSTIVE: usize = 10;

/// An assignment whose moves have an order, in that order. `assign` makes one in which the slots given,
/// ascending, do not move.
pub(super) fn acyclic(old: &Slots, assign: impl Fn(&[usize]) -> Assignment) -> Assignment {
    let mut stuck: Vec<usize> = Vec::new();
    loop {
        let mut first = assign(&stuck);
        let Circles { caught, breaking } = sort(&mut first, old);
        if caught.is_empty() {
            return first;
        }
        if caught.len() <= EXHAUSTIVE {
            let choices = 1_u32..1_u32.checked_shl(u32::try_from(caught.len()).unwrap_or(0)).unwrap_or(1);
            let tries = choices.filter_map(|choice| {
                let chosen = caught.iter().enumerate().filter(|(bit, _)| choice >> bit & 1 == 1);
                let mut stuck: Vec<usize> = stuck.iter().copied().chain(chosen.map(|(_, at)| *at)).collect();
                stuck.sort_unstable();
                let mut assignment = assign(&stuck);
                sort(&mut assignment, old).caught.is_empty().then_some(assignment)
            });
            // With all of them chosen none of them moves; should that lay bare another circle, it goes on below.
            if let Some(best) = tries.min_by_key(Assignment::calls) {
                return best;
            }
        }
        stuck.extend(breaking);
        stuck.sort_unstable();
    }
}

/// Old slots that wait for each other.
struct Circles {
    /// Those that are in circles, or wait for one.
    caught: Vec<usize>,
    /// One of each circle: without these there is none.
    breaking: Vec<usize>,
}

/// Puts the moves in order, those that can be.
fn sort(assignment: &mut Assignment, old: &Slots) -> Circles {
    let moved = &assignment.moved;
    // Where the movers are now: positions in `moved`, ascending by frame.
    let mut places: Vec<_> =
        moved.iter().enumerate().filter_map(|(at, of)| Some((old.get(of.old)?.gfns, at))).collect();
    places.sort_unstable();
    let mut queue = Queue {
        waiting: vec![Vec::new(); moved.len()],
        blockers: vec![Vec::new(); moved.len()],
        waits: vec![0_usize; moved.len()],
    };
    for (at, Renewed { region, .. }) in moved.iter().enumerate() {
        let first = places.partition_point(|(place, _)| place.end() <= region.gfns.start());
        for (_, by) in places.iter().skip(first).take_while(|(place, _)| place.start() < region.gfns.end()) {
            if *by != at
                && let (Some(waiting), Some(blockers), Some(count)) =
                    (queue.waiting.get_mut(*by), queue.blockers.get_mut(at), queue.waits.get_mut(at))
            {
                waiting.push(at);
                blockers.push(*by);
                *count = count.saturating_add(1);
            }
        }
    }
    let mut sorted = Vec::with_capacity(moved.len());
    let ready = (0..moved.len()).rev().filter(|at| !queue.is_caught(*at)).collect();
    queue.go(ready, |at| sorted.extend(moved.get(at)));
    let old_at = |at: usize| moved.get(at).map(|of| of.old);
    let caught = (0..moved.len()).filter(|at| queue.is_caught(*at)).filter_map(old_at).collect();
    let mut breaking = Vec::new();
    for at in 0..moved.len() {
        while queue.is_caught(at) {
            let breaker = queue.in_circle(at);
            breaking.extend(old_at(breaker));
            queue.waits.get_mut(breaker).into_iter().for_each(|count| *count = 0);
            queue.go(vec![breaker], |_| ());
        }
    }
    assignment.moved = sorted;
    Circles { caught, breaking }
}

/// Who waits for whom, as positions among the movers.
struct Queue {
    /// For each mover, those who wait for it.
    waiting: Vec<Vec<usize>>,
    /// Those it waits for.
    blockers: Vec<Vec<usize>>,
    /// For how many of them it still waits.
    waits: Vec<usize>,
}

impl Queue {
    fn is_caught(&self, at: usize) -> bool {
        self.waits.get(at).is_some_and(|count| *count != 0)
    }

    /// Those in `ready` go, and whoever waits for nobody else then.
    fn go(&mut self, mut ready: Vec<usize>, mut gone: impl FnMut(usize)) {
        while let Some(at) = ready.pop() {
            gone(at);
            for &other in self.waiting.get(at).into_iter().flatten() {
                if let Some(count) = self.waits.get_mut(other).filter(|count| **count != 0) {
                    *count = count.saturating_sub(1);
                    if *count == 0 {
                        ready.push(other);
                    }
                }
            }
        }
    }

    /// One of the circle that `at` is in or waits for, in the end.
    fn in_circle(&self, mut at: usize) -> usize {
        let mut seen = std::collections::BTreeSet::new();
        while seen.insert(at) {
            let blockers = self.blockers.get(at).into_iter().flatten();
            at = blockers.copied().find(|by| self.is_caught(*by)).unwrap_or(at);
        }
        at
    }
}
