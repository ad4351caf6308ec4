//! Into which slots a run of contiguous memory is cut. Pure arithmetic on frames.

use crate::addr::{Gfn, GfnRange};

/// Contiguous memory with equal flags in which slots may end anywhere but in `wholes`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) gfns: GfnRange,
    /// Parts within which no slot may begin or end, ascending.
    pub(super) wholes: &'a [GfnRange],
    /// The most pages of a slot.
    pub(super) limit: u64,
}

/// A slot that exists and fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fit {
    pub(super) gfns: GfnRange,
    /// Which one.
    pub(super) old: usize,
    /// Calls that using it takes beyond those of not using it.
    pub(super) extra: i64,
}

/// Part of a tiling: a slot that exists, or one to be created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) gfns: GfnRange,
    pub(super) old: Option<usize>,
}

/// What is to be few.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Aim {
    /// Slots, then calls.
    Slots,
    /// Calls, then slots.
    Calls,
}

impl Run<'_> {
    /// Whether a slot may end at `at`.
    pub(super) fn may_end(&self, at: Gfn) -> bool {
        let next = self.wholes.partition_point(|whole| whole.end() <= at);
        self.wholes.get(next).is_none_or(|whole| whole.start() >= at)
    }

    /// Whether a slot may be there.
    pub(super) fn admits(&self, gfns: GfnRange) -> bool {
        self.gfns.contains_range(&gfns)
            && (self.wholes.is_empty() || self.may_end(gfns.start()) && self.may_end(gfns.end()))
    }

    /// The fewest new slots that cover `gap`: each as long as it may be.
    fn chunks(&self, gap: GfnRange) -> impl Iterator<Item = GfnRange> {
        let mut rest = gap;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let mut at = rest.start().checked_add(self.limit.max(1)).unwrap_or(Gfn::MAX).min(rest.end());
            if at < rest.end() && !self.may_end(at) {
                let whole = self.wholes.partition_point(|whole| whole.end() <= at);
                let start = self.wholes.get(whole).map_or(at, |whole| whole.start());
                // A part that is too long for any slot is refused with the slot it would be.
                at = if start > rest.start() { start } else { rest.end() };
            }
            let (chunk, later) = rest.split_at(at)?;
            rest = later;
            Some(chunk)
        })
    }

    /// The best tiling of `gap` with slots that exist where they fit, and new ones elsewhere. `fits` ascend by start.
    pub(super) fn cover(&self, gap: GfnRange, fits: &[Fit], aim: Aim) -> Vec<Tile> {
        let cost = |slots: i64, calls: i64| match aim {
            Aim::Slots => (slots, calls),
            Aim::Calls => (calls, slots),
        };
        let new = |gap: GfnRange| i64::try_from(self.chunks(gap).count()).unwrap_or(i64::MAX);
        let between = |low: Gfn, high: Gfn| GfnRange::new(low, high).ok();
        // For each fit, the best tiling that ends with it: its cost, and the fit before it.
        let mut best: Vec<((i64, i64), Option<usize>)> = Vec::with_capacity(fits.len());
        let add = |cost: (i64, i64), more: (i64, i64)| (cost.0.saturating_add(more.0), cost.1.saturating_add(more.1));
        let best_before = |at: Gfn, best: &[((i64, i64), Option<usize>)]| {
            let first = between(gap.start(), at).map(|gap| (cost(new(gap), new(gap)), None));
            let later = best.iter().zip(fits).enumerate().filter_map(|(index, ((before, _), fit))| {
                let made = new(between(fit.gfns.end(), at)?);
                Some((add(*before, cost(made, made)), Some(index)))
            });
            first.into_iter().chain(later).min()
        };
        for fit in fits {
            let found = best_before(fit.gfns.start(), &best);
            let (before, by) = found.unwrap_or(((i64::MAX, i64::MAX), None));
            best.push((add(before, cost(1, fit.extra)), by));
        }
        let mut tiles = Vec::new();
        let mut end = gap.end();
        let mut last = best_before(end, &best).and_then(|(_, last)| last);
        loop {
            let fit = last.and_then(|last| fits.get(last));
            let low = fit.map_or(gap.start(), |fit| fit.gfns.end());
            let chunks: Vec<_> = between(low, end).into_iter().flat_map(|gap| self.chunks(gap)).collect();
            tiles.extend(chunks.into_iter().rev().map(|gfns| Tile { gfns, old: None }));
            let Some(fit) = fit else { break };
            tiles.push(Tile { gfns: fit.gfns, old: Some(fit.old) });
            end = fit.gfns.start();
            last = last.and_then(|last| best.get(last)).and_then(|(_, by)| *by);
        }
        tiles.reverse();
        tiles
    }
}
