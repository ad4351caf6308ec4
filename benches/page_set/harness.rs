//! Interleaved rounds, ratios, gates.

use std::process::ExitCode;
use std::time::Instant;

use cvm_memory_benches::{Rng, is_quick, ratio, verdict};

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
    pub fn run(&mut self, rounds: u64, stores: &[Box<dyn Store>], act: impl Fn(&dyn Store, u64)) {
        let mut rng = Rng::new(11);
        let mut order: Vec<&dyn Store> = stores.iter().map(|store| store.as_ref()).collect();
        order.retain(|store| !self.skip.contains(&store.name()));
        self.times = order.iter().map(|store| (store.name(), Vec::new())).collect();
        for round in 0..=rounds {
            rng.shuffle(&mut order);
            let seed = rng.next();
            for store in &order {
                let start = Instant::now();
                act(*store, seed);
                let nanos = start.elapsed().as_nanos() as f64 / self.ops as f64;
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

/// A ratio that may not be exceeded: group, candidate, peer, most.
const GATES: &[(&str, &str, &str, f64)] = &[
    ("lookup_tib_indep", "page_set", "flat", 0.55),
    ("lookup_tib_dep", "page_set", "flat", 0.55),
    ("lookup_tib_indep", "page_set", "rangemap+rwlock", 1.0 / 13.0),
];

/// Prints, remembers which gates were missed, and knows how long to run.
pub struct Harness {
    quick: bool,
    missed: Vec<String>,
    started: Instant,
}

impl Harness {
    pub fn from_args() -> Self {
        Self { quick: is_quick(), missed: Vec::new(), started: Instant::now() }
    }

    /// `full`, or `quick` if that is asked for.
    pub fn scale(&self, full: u64, quick: u64) -> u64 {
        if self.quick { quick } else { full }
    }

    pub fn report(&mut self, group: &Group) {
        println!("\n{:<22} {:>12} {:>14}", group.name, "ns/op (best)", format!("x {}", group.baseline));
        for (name, times) in &group.times {
            let best = times.iter().copied().fold(f64::INFINITY, f64::min);
            println!("  {name:<20} {best:>12.1} {:>14.3}", group.ratio(name, group.baseline));
        }
        for (_, candidate, peer, most) in GATES.iter().filter(|(name, ..)| *name == group.name) {
            let ratio = group.ratio(candidate, peer);
            let verdict = if ratio <= *most { "held" } else { "MISSED" };
            let line = format!("gate {verdict}: {} {candidate} / {peer} = {ratio:.3}, at most {most:.3}", group.name);
            println!("  {line}");
            if ratio > *most {
                self.missed.push(line);
            }
        }
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
