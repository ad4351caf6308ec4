//! Into which slots a run of contiguous memory is cut. Pure arithmetic on frames.

use std::collections::BTreeMap;

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
        let mut search = Search { run: self, gap, fits, aim, best: Vec::new(), ended: BTreeMap::new(), below: None };
        for fit in fits {
            search.push(fit);
        }
        let mut tiles = Vec::new();
        let mut end = gap.end();
        let mut last = search.before(end).and_then(|(_, last)| last);
        loop {
            let fit = last.and_then(|last| fits.get(last));
            let low = fit.map_or(gap.start(), |fit| fit.gfns.end());
            let chunks: Vec<_> = GfnRange::new(low, end).into_iter().flat_map(|gap| self.chunks(gap)).collect();
            tiles.extend(chunks.into_iter().rev().map(|gfns| Tile { gfns, old: None }));
            let Some(fit) = fit else { break };
            tiles.push(Tile { gfns: fit.gfns, old: Some(fit.old) });
            end = fit.gfns.start();
            last = last.and_then(|last| search.best.get(last)).and_then(|(_, by)| *by);
        }
        tiles.reverse();
        tiles
    }
}

/// Slots and calls, what is to be few first.
type Cost = (i64, i64);

/// The search for a tiling: fit by fit, as they begin.
struct Search<'a> {
    run: &'a Run<'a>,
    gap: GfnRange,
    fits: &'a [Fit],
    aim: Aim,
    /// For each fit so far, the best tiling that ends with it: its cost, and the fit before it.
    best: Vec<(Cost, Option<usize>)>,
    /// By the frame at which they end, the cheapest of those.
    ended: BTreeMap<Gfn, (Cost, usize)>,
    /// The cheapest of those that end below all that are in `ended`.
    below: Option<(Cost, usize)>,
}

impl Search<'_> {
    /// The next fit.
    fn push(&mut self, fit: &Fit) {
        let (before, by) = self.before(fit.gfns.start()).unwrap_or(((i64::MAX, i64::MAX), None));
        let cost = add(before, self.cost(1, fit.extra));
        let cheapest = (cost, self.best.len());
        self.best.push((cost, by));
        self.ended.entry(fit.gfns.end()).and_modify(|held| *held = cheapest.min(*held)).or_insert(cheapest);
    }

    /// The best tiling of all below `at`, and the fit with which it ends. `at` ascends from call to call.
    fn before(&mut self, at: Gfn) -> Option<(Cost, Option<usize>)> {
        while let Some(ended) = self.ended.first_entry().filter(|ended| *ended.key() < at) {
            let cheapest = ended.remove();
            self.below = Some(self.below.map_or(cheapest, |below| cheapest.min(below)));
        }
        let first = GfnRange::new(self.gap.start(), at).ok().map(|gap| (self.new_slots(gap), None));
        if self.gap.pages() > self.run.limit {
            return first.into_iter().chain((0..self.best.len()).filter_map(|index| self.with_last(index, at))).min();
        }
        // One new slot fills any gap, however long: of the fits that end somewhere below, only the cheapest matters.
        let lasts = [self.below, self.ended.get(&at).copied()].into_iter().flatten();
        first.into_iter().chain(lasts.filter_map(|(_, index)| self.with_last(index, at))).min()
    }

    /// The best tiling of all below `at` that has `index` as its last fit.
    fn with_last(&self, index: usize, at: Gfn) -> Option<(Cost, Option<usize>)> {
        let gap = GfnRange::new(self.fits.get(index)?.gfns.end(), at).ok()?;
        Some((add(self.best.get(index)?.0, self.new_slots(gap)), Some(index)))
    }

    fn new_slots(&self, gap: GfnRange) -> Cost {
        let count = i64::try_from(self.run.chunks(gap).count()).unwrap_or(i64::MAX);
        self.cost(count, count)
    }

    const fn cost(&self, slots: i64, calls: i64) -> Cost {
        match self.aim {
            Aim::Slots => (slots, calls),
            Aim::Calls => (calls, slots),
        }
    }
}

const fn add(cost: Cost, more: Cost) -> Cost {
    (cost.0.saturating_add(more.0), cost.1.saturating_add(more.1))
}
