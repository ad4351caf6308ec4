//! The table in which the processor keeps whose each page is (the RMP), held against the library's record and the file.
//!
//! A page is in the table from its first private use until its memory is freed. So:
//! - what the guest has used as private, and still may, is in the table and accepted;
//! - nothing else is, once everything is freed that is to be; if nothing ever is, nothing that was in the table has left it;
//! - what is in the table has memory in the file, and nothing else has.

use cvm_memory::addr::{GfnRange, merge_adjacent, subtract_lists};
use cvm_memory::convert::State;
use cvm_memory_testkit::chain;

use crate::args::Discard;
use crate::backend::Backend;
use crate::worker::{Surroundings, Worker};

/// How far the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It has not run yet.
    Launched { prefaulted: bool },
    /// Every page that a vCPU has for itself was used in the state it is in.
    Used,
    /// Every page was.
    AllUsed,
}

/// What was compared.
#[derive(Debug, Default)]
pub struct Checks {
    pub phases: u64,
    /// Pages in the table, summed.
    pub pages: u64,
    /// What was in it the last time.
    before: Vec<GfnRange>,
    /// Pages that have been put into it so far: after the launch, after a prefault, at the end.
    counts: Vec<u64>,
}

impl Checks {
    /// Counts what has been put into the table.
    pub fn count(&mut self, backend: &Backend) {
        self.counts.extend(backend.assignments());
    }

    /// Pages that were put into the table by a prefault, and at their first use.
    pub fn assigned(&self) -> (u64, u64) {
        match self.counts[..] {
            [launched, prefaulted, .., last] => (prefaulted - launched, last - prefaulted),
            _ => (0, 0),
        }
    }

    /// Compares, if somebody can look at the table. While no vCPU runs.
    pub fn check(&mut self, workers: &mut [Worker<'_>], phase: Phase) {
        let own: Vec<GfnRange> = workers.iter().flat_map(|worker| worker.area.gfns().to_vec()).collect();
        let own = merge_adjacent(own);
        let Some(worker) = workers.iter_mut().find(|worker| !worker.failed) else { return };
        let Surroundings { backend, memory, ram, .. } = worker.around;
        if let Err(error) = memory.trim(u64::MAX) {
            worker.expect(false, || format!("free what was left: {}", chain(&error)));
        }
        let Some(table) = backend.assigned() else { return };
        let all: Vec<GfnRange> = ram.slots().collect();
        let inside = |wanted: bool| {
            let runs = table.iter().filter(move |(_, accepted)| *accepted || !wanted);
            merge_adjacent(runs.flat_map(|(run, _)| all.iter().filter_map(|slot| slot.intersection(run))))
        };
        let (assigned, accepted) = (inside(false), inside(true));
        self.phases += 1;
        self.pages += pages(&assigned);

        let private_of = |gfns: &[GfnRange]| {
            let frames = gfns.iter().flat_map(|gfns| gfns.into_iter());
            merge_adjacent(frames.filter(|gfn| memory.state(*gfn) == Some(State::Private)).map(GfnRange::page))
        };
        let private = private_of(&all);
        let used = match phase {
            Phase::Launched { prefaulted: false } => Vec::new(),
            Phase::Launched { prefaulted: true } | Phase::AllUsed => private.clone(),
            Phase::Used => private_of(&own),
        };
        let is_in = if matches!(phase, Phase::Launched { .. }) { &assigned } else { &accepted };
        let missing = subtract_lists(&used, is_in);
        worker.expect(missing.is_empty(), || format!("{phase:?}: private, but not in the table: {missing:x?}"));

        let (extra, gone) = match (phase, worker.discard) {
            (Phase::Launched { .. }, _) => (subtract_lists(&assigned, &used), Vec::new()),
            (_, Discard::Immediate | Discard::Deferred) => (subtract_lists(&assigned, &private), Vec::new()),
            (_, Discard::Never) => (Vec::new(), subtract_lists(&self.before, &assigned)),
        };
        worker.expect(extra.is_empty(), || format!("{phase:?}: in the table, but not private: {extra:x?}"));
        worker.expect(gone.is_empty(), || format!("{phase:?}: no longer in the table: {gone:x?}"));

        let held = |gfns: &[GfnRange]| gfns.iter().map(|gfns| ram.held(*gfns, State::Private)).sum::<Option<u64>>();
        let bytes = |gfns: &[GfnRange]| gfns.iter().map(GfnRange::bytes).sum::<u64>();
        for (gfns, expected) in [(&assigned, bytes(&assigned)), (&all, bytes(&assigned))] {
            let held = held(gfns).unwrap_or(expected);
            worker.expect(held == expected, || {
                format!("{phase:?}: the file holds {held:#x} bytes, and {expected:#x} are in the table: {assigned:x?}")
            });
        }
        self.before = assigned;
    }
}

fn pages(gfns: &[GfnRange]) -> u64 {
    gfns.iter().map(GfnRange::pages).sum()
}
