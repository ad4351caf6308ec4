//! Many scenarios, each from a seed of its own, and what came of them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cvm_memory_testkit::kvm_guest::SPURIOUS;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use crate::machine::Shape;
use crate::play::{Difference, Played};
use crate::random;
use crate::scenario::{Kind, Scenario};

/// Plays a scenario on new machines.
pub type Play<'a> = dyn Fn(&Scenario, &mut Tally) -> Result<Played, Box<Difference>> + Sync + 'a;

/// How many scenarios, and which.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Scenario `n` comes from seed `seed + n`.
    pub seed: u64,
    /// At most so many.
    pub scenarios: u64,
    /// Not for longer than that.
    pub time: Option<Duration>,
    /// On so many threads.
    pub threads: usize,
}

impl Plan {
    /// `scenarios` from seed 0, unless the environment says otherwise: `CVM_SCENARIOS`, `CVM_SEED`, `CVM_SECONDS`.
    ///
    /// # Panics
    /// If one of them is no number.
    pub fn from_env(scenarios: u64) -> Self {
        let number = |name: &str| {
            std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
        };
        let time = number("CVM_SECONDS").map(Duration::from_secs);
        Self {
            seed: number("CVM_SEED").unwrap_or(0),
            scenarios: number("CVM_SCENARIOS").unwrap_or(if time.is_some() { u64::MAX } else { scenarios }),
            time,
            threads: std::thread::available_parallelism().map_or(1, Into::into),
        }
    }
}

/// What came of a run without a difference.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Scenarios played.
    pub scenarios: u64,
    /// Summed over all.
    pub played: Played,
    /// Differences that were not seen again when the scenario was played again, on a processor that is emulated.
    pub unsteady: u64,
    /// How often each operation came to what.
    pub outcomes: BTreeMap<(String, String), u64>,
}

impl Tally {
    /// Whether an emulated processor did no more of its own than can be put up with: in one scenario of a hundred, or two.
    pub const fn is_steady(&self) -> bool {
        self.unsteady * 100 <= self.scenarios + 100
    }

    /// The same as a JSON object.
    pub fn json(&self, kind: Kind) -> serde_json::Value {
        let outcomes = self.outcomes.iter().map(|((operation, outcome), count)| {
            serde_json::json!({ "operation": operation, "outcome": outcome, "count": count })
        });
        serde_json::json!({
            "kind": format!("{kind:?}"),
            "scenarios": self.scenarios,
            "operations": self.played.operations,
            "readings": self.played.readings,
            "not_played": self.played.skipped,
            "explained": self.played.explained,
            "unsteady": self.unsteady,
            "outcomes": outcomes.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Played { operations, readings, skipped, explained } = self.played;
        writeln!(
            out,
            "{} scenarios, {operations} operations and {readings} readings at their ends, {skipped} not played, {explained} explained by \
             a known difference",
            self.scenarios
        )?;
        let spurious = SPURIOUS.load(Ordering::Relaxed);
        if spurious > 0 {
            writeln!(out, "{spurious} accesses done again after an exception of the emulated processor")?;
        }
        if self.unsteady > 0 {
            writeln!(out, "{} differences of the emulated processor's, which did not come again", self.unsteady)?;
        }
        let mut last = "";
        for ((operation, outcome), count) in &self.outcomes {
            let name = if operation == last { "" } else { operation };
            writeln!(out, "  {name:<14} {outcome:<24} {count:>9}")?;
            last = operation;
        }
        Ok(())
    }
}

/// A scenario on which the machines differ, as small as it could be made.
#[derive(Debug)]
pub struct Failure {
    /// What it came from.
    pub seed: u64,
    /// The small one.
    pub scenario: Scenario,
    /// What is seen with it.
    pub difference: Box<Difference>,
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "seed {} (CVM_SEED={0} CVM_SCENARIOS=1), shrunk to:", self.seed)?;
        write!(out, "{}\n{}", self.scenario, self.difference)
    }
}

/// The scenario of one seed.
pub fn scenario(shape: Shape, seed: u64) -> Scenario {
    tree(shape, seed).1.current()
}

fn tree(shape: Shape, seed: u64) -> (TestRunner, impl ValueTree<Value = Scenario>) {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config =
        Config { failure_persistence: None, max_shrink_iters: 4096, max_shrink_time: 60_000, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let tree = random::scenario(shape).new_tree(&mut runner).expect("a scenario");
    (runner, tree)
}

/// Plays what `plan` says with `play`, which makes new machines for each scenario. `progress` is called with the number of
/// scenarios that are done.
///
/// # Errors
/// The first difference that was found.
pub fn run(plan: Plan, shape: Shape, play: &Play<'_>, progress: &(dyn Fn(u64) + Sync)) -> Result<Tally, Box<Failure>> {
    let start = Instant::now();
    let (next, done, failed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let failure = Mutex::new(None);
    let total = Mutex::new(Tally::default());
    let worker = || {
        let mut tally = Tally::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let late = plan.time.is_some_and(|time| start.elapsed() >= time);
            if number >= plan.scenarios || late || failed.load(Ordering::Relaxed) {
                break;
            }
            let seed = plan.seed.wrapping_add(number);
            let (runner, tree) = tree(shape, seed);
            match play(&tree.current(), &mut tally) {
                Ok(played) => {
                    tally.scenarios += 1;
                    tally.played.operations += played.operations;
                    tally.played.readings += played.readings;
                    tally.played.skipped += played.skipped;
                    tally.played.explained += played.explained;
                    progress(done.fetch_add(1, Ordering::Relaxed) + 1);
                }
                Err(difference) => {
                    failed.store(true, Ordering::Relaxed);
                    *failure.lock().unwrap() = Some(Box::new(shrink(seed, runner, tree, difference, play)));
                }
            }
        }
        total.lock().unwrap().add(&tally);
    };
    std::thread::scope(|scope| {
        for _ in 0..plan.threads.max(1) {
            scope.spawn(worker);
        }
    });
    match failure.into_inner().unwrap() {
        Some(failure) => Err(failure),
        None => Ok(total.into_inner().unwrap()),
    }
}

/// The smallest scenario that proptest finds for which there is a difference still.
fn shrink(
    seed: u64,
    mut runner: TestRunner,
    tree: impl ValueTree<Value = Scenario>,
    difference: Box<Difference>,
    play: &Play<'_>,
) -> Failure {
    let whole = tree.current();
    let outcome = runner.run_one(tree, |scenario| {
        play(&scenario, &mut Tally::default())
            .map(drop)
            .map_err(|difference| proptest::test_runner::TestCaseError::fail(difference.to_string()))
    });
    let scenario = if let Err(TestError::Fail(_, scenario)) = outcome { scenario } else { whole };
    match play(&scenario, &mut Tally::default()) {
        Err(difference) => Failure { seed, scenario, difference },
        Ok(_) => Failure { seed, scenario, difference }, // it does not happen every time: the first sight of it
    }
}

impl Tally {
    /// Counts what came of an operation.
    pub fn count(&mut self, operation: &str, outcome: &str) {
        let word = operation.split(' ').next().unwrap_or_default();
        let mut outcome = outcome.split(' ');
        let mut class = outcome.next().unwrap_or_default().trim_end_matches(';').to_string();
        if let "fault" | "failed" = class.as_str() {
            class.push(' ');
            class.push_str(outcome.next().unwrap_or_default());
        }
        *self.outcomes.entry((word.into(), class)).or_default() += 1;
    }

    fn add(&mut self, other: &Self) {
        self.scenarios += other.scenarios;
        self.played.operations += other.played.operations;
        self.played.readings += other.played.readings;
        self.played.skipped += other.played.skipped;
        self.played.explained += other.played.explained;
        self.unsteady += other.unsteady;
        for (key, count) in &other.outcomes {
            *self.outcomes.entry(key.clone()).or_default() += count;
        }
    }
}
