//! Tilings against every choice of slots that could be part of one.

use super::super::tile::{Aim, Fit, Run, Tile};
use super::*;
use proptest::prelude::*;

const END: u64 = 24;

/// The fewest (slots, calls), of all choices of fits that are apart. New slots fill each gap.
fn best(fits: &[Fit], limit: u64, aim: Aim) -> (i64, i64) {
    let choices = 0..1_u32 << fits.len();
    let costs = choices.filter_map(|choice| {
        let (mut slots, mut calls, mut next) = (0, 0, 0);
        let fill = |low: u64, high: u64| high.checked_sub(low).map(|pages| pages.div_ceil(limit).cast_signed());
        for (_, fit) in fits.iter().enumerate().filter(|(bit, _)| choice >> bit & 1 == 1) {
            let new = fill(next, fit.gfns.start().get())?;
            (slots, calls, next) = (slots + new + 1, calls + new + fit.extra, fit.gfns.end().get());
        }
        let new = fill(next, END)?;
        let (slots, calls) = (slots + new, calls + new);
        Some(if aim == Aim::Slots { (slots, calls) } else { (calls, slots) })
    });
    costs.min().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn the_best_of_all_choices(
        places in prop::collection::vec((0..END, 1..6_u64, -1..=1_i64), 0..9),
        limit in prop_oneof![1..END, END..2 * END],
        calls in any::<bool>(),
    ) {
        let aim = if calls { Aim::Calls } else { Aim::Slots };
        let fit = |(old, (start, pages, extra)): (usize, &(u64, u64, i64))| {
            let end = start + (*pages).min(limit);
            (end <= END).then(|| Fit { gfns: gfns(*start, end), old, extra: *extra })
        };
        let mut fits: Vec<Fit> = places.iter().enumerate().filter_map(fit).collect();
        fits.sort_by_key(|fit| fit.gfns.start());
        let run = Run { gfns: gfns(0, END), wholes: &[], limit };
        let tiles = run.cover(run.gfns, &fits, aim);
        let mut next = run.gfns.start();
        let mut found = (0, 0);
        for Tile { gfns, old } in tiles {
            prop_assert!(gfns.start() == next && !gfns.is_empty() && gfns.pages() <= limit);
            next = gfns.end();
            let fit = old.map(|old| fits.iter().find(|fit| fit.old == old).unwrap());
            prop_assert!(fit.is_none_or(|fit| fit.gfns == gfns));
            found = (found.0 + 1, found.1 + fit.map_or(1, |fit| fit.extra));
        }
        prop_assert_eq!(next, run.gfns.end());
        let found = if aim == Aim::Slots { found } else { (found.1, found.0) };
        prop_assert_eq!(found, best(&fits, limit, aim));
    }
}
