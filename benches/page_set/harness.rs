//! Interleaved rounds, ratios, gates.

use std::process::ExitCode;
use std::time::Instant;

use cvm_memory_benches::{Rng, is_quick, processor_time, ratio, verdict};

use crate::stores::Store;

/// One question put to every candidate.
pub struct Group {
    name: String,
    baseline: &'static str,
    ops: u64,
    /// Candidates that sit this one out.
    pub skip: &'static [&'static str],
    /// Per candidate: its name, and nanoseconds per operation in each round.
    times: Vec<(&'static str, Vec<f64>)>,
}

impl Group {
    pub fn new(name: &str, baseline: &'static str, ops: u64) -> Self {
        Self { name: name.to_owned(), baseline, ops, skip: &[], times: Vec::new() }
    }

    /// `rounds` rounds, and one before them that does not count. `act` gets the same seed from all in a round.
    fn run(&mut self, rounds: u64, stores: &[Box<dyn Store>], act: impl Fn(&dyn Store, u64)) {
        let mut rng = Rng::new(11);
        let mut order: Vec<&dyn Store> = stores.iter().map(|store| store.as_ref()).collect();
        order.retain(|store| !self.skip.contains(&store.name()));
        self.times = order.iter().map(|store| (store.name(), Vec::new())).collect();
        for round in 0..=rounds {
            rng.shuffle(&mut order);
            let seed = rng.next();
            for store in &order {
                let start = processor_time();
                act(*store, seed);
                let nanos = (processor_time() - start).as_nanos() as f64 / self.ops as f64;
                let times = self.times.iter_mut().find(|(name, _)| *name == store.name());
                if round > 0 {
                    times.unwrap().1.push(nanos);
                }
            }
        }
    }

    fn of(&self, name: &str) -> &[f64] {
        &self.times.iter().find(|(candidate, _)| *candidate == name).unwrap().1
    }

    /// Median over the rounds of `a` by `b` of the same round.
    fn ratio(&self, a: &str, b: &str) -> f64 {
        ratio(self.of(a), self.of(b))
    }
}

/// A ratio that should not be exceeded: group, candidate, peer, most.
type Limit = (&'static str, &'static str, &'static str, f64);

/// What is hoped for. Not every processor gives it, and a busy machine even less.
const GOALS: &[Limit] = &[
    ("lookup_tib_indep", "page_set", "flat", 0.4),
    ("lookup_tib_dep", "page_set", "flat", 0.35),
    ("lookup_frag_indep", "page_set", "flat", 2.0),
    ("lookup_frag_dep", "page_set", "flat", 1.35),
    ("lookup_hot_indep", "page_set", "rangemap+rwlock", 1.0 / 9.0),
    ("lookup_frag_indep", "page_set", "rangemap+rwlock", 1.0 / 60.0),
    ("convert_4k_hot", "page_set", "flat", 3.5),
    ("convert_4k_hot", "page_set", "rangemap+rwlock", 1.0 / 15.0),
    ("convert_4k_rand_64g", "page_set", "flat", 3.5),
    ("convert_4k_rand_64g", "page_set", "rangemap+rwlock", 1.0 / 15.0),
    ("convert_1g", "page_set", "flat", 0.15),
    ("convert_tib", "page_set", "flat", 0.03),
    ("iterate_boot_tib", "page_set", "flat", 0.05),
    ("iterate_frag", "page_set", "btreemap+rwlock", 0.65),
];

/// What has to be: limits held everywhere, and by far.
const GATES: &[Limit] = &[
    ("lookup_tib_indep", "page_set", "flat", 0.55),
    ("lookup_tib_dep", "page_set", "flat", 0.55),
    ("lookup_tib_indep", "page_set", "rangemap+rwlock", 1.0 / 13.0),
    ("lookup_frag_indep", "page_set", "rangemap+rwlock", 1.0 / 30.0),
    ("convert_4k_hot", "page_set", "rangemap+rwlock", 1.0 / 15.0),
    ("convert_1g", "page_set", "flat", 0.15),
    ("convert_tib", "page_set", "flat", 0.03),
    ("iterate_frag", "page_set", "btreemap+rwlock", 0.65),
];

/// Prints, remembers which gates were missed, and knows how long to run.
pub struct Harness {
    quick: bool,
    /// Only groups whose names contain this.
    only: String,
    missed: Vec<String>,
    started: Instant,
}

impl Harness {
    pub fn from_args() -> Self {
        let only = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
        Self { quick: is_quick(), only, missed: Vec::new(), started: Instant::now() }
    }

    /// Whether a group is asked for whose name begins with `family`.
    pub fn wants(&self, family: &str) -> bool {
        family.contains(&self.only) || self.only.starts_with(family)
    }

    /// Runs and reports a group, if it is asked for.
    pub fn run(&mut self, mut group: Group, rounds: u64, stores: &[Box<dyn Store>], act: impl Fn(&dyn Store, u64)) {
        if group.name.contains(&self.only) {
            group.run(rounds, stores, act);
            self.report(&group);
        }
    }

    /// `full`, or `quick` if that is asked for.
    pub fn scale(&self, full: u64, quick: u64) -> u64 {
        if self.quick { quick } else { full }
    }

    fn report(&mut self, group: &Group) {
        println!("\n{:<22} {:>12} {:>14}", group.name, "ns/op (best)", format!("x {}", group.baseline));
        for (name, times) in &group.times {
            let best = times.iter().copied().fold(f64::INFINITY, f64::min);
            println!("  {name:<20} {best:>12.1} {:>14.3}", group.ratio(name, group.baseline));
        }
        for (kind, limits) in [("goal", GOALS), ("gate", GATES)] {
            for (_, candidate, peer, most) in limits.iter().filter(|(name, ..)| *name == group.name) {
                let what = format!("{} {candidate} / {peer}", group.name);
                let missed = judge(kind, &what, group.ratio(candidate, peer), *most);
                self.missed.extend(missed.filter(|_| kind == "gate"));
            }
        }
    }

    /// Says whether a goal was reached.
    pub fn goal(&self, what: &str, ratio: f64, most: f64) {
        judge("goal", what, ratio, most);
    }

    /// Says which gates were missed, and whether that fails the run.
    pub fn finish(self) -> ExitCode {
        println!("\n{} s", self.started.elapsed().as_secs());
        let verdict = verdict(self.missed.is_empty());
        if verdict == ExitCode::FAILURE {
            self.missed.iter().for_each(|line| eprintln!("{line}"));
        }
        verdict
    }
}

/// Prints whether a limit was held, and returns the line if not.
fn judge(kind: &str, what: &str, ratio: f64, most: f64) -> Option<String> {
    let held = ratio <= most;
    let line = format!("{kind} {}: {what} = {ratio:.3}, at most {most:.3}", if held { "held" } else { "MISSED" });
    println!("  {line}");
    (!held).then_some(line)
}
