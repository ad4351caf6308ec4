//! Two threads at once on one store: what each does to the other.
//!
//! Wall clock, since waiting is what is measured; so a busy machine shows, and these figures only print. Each turn of a
//! store goes through all the scenes, and a ratio is of two scenes or two stores in the same round.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cvm_memory::addr::PAGES_PER_1G;

use cvm_memory_benches::{Rng, median};

use crate::harness::Harness;
use crate::range;
use crate::stores::Store;

/// What a thread does to a store, again and again.
type Act = fn(&dyn Store, &mut Rng);

/// Lookups or conversions per batch.
const BATCH: u64 = 64;

fn reads(store: &dyn Store, rng: &mut Rng) {
    black_box(store.count_random(rng.next(), PAGES_PER_1G, BATCH));
}

/// Single pages of one GiB.
fn converts_4k(store: &dyn Store, rng: &mut Rng) {
    convert_within(store, rng, PAGES_PER_1G);
}

/// Single pages of 256 MiB.
fn converts_near(store: &dyn Store, rng: &mut Rng) {
    convert_within(store, rng, PAGES_PER_1G / 4);
}

/// There and back, so that the store is left as it was found.
fn convert_within(store: &dyn Store, rng: &mut Rng, span: u64) {
    for _ in 0..BATCH / 2 {
        let page = range(rng.below(span), 1);
        [false, true].into_iter().for_each(|value| store.set(page, value));
    }
}

fn converts_1g(store: &dyn Store, _: &mut Rng) {
    [false, true].into_iter().for_each(|value| store.set(range(0, PAGES_PER_1G), value));
}

/// Its name, what is timed, and what the other thread does meanwhile.
const SCENES: [(&str, Act, Option<Act>); 5] = [
    ("read", reads, None),
    ("read/read", reads, Some(reads)),
    ("read/4k", reads, Some(converts_4k)),
    ("read/1g p99", reads, Some(converts_1g)),
    ("4k/4k near", converts_near, Some(converts_near)),
];
const READ: usize = 0;
const READ_READ: usize = 1;
const READ_4K: usize = 2;
const READ_1G: usize = 3;
const NEAR: usize = 4;

/// Nanoseconds per operation: the mean, or of `READ_1G` the 99th percentile of batches.
fn play(store: &dyn Store, scene: usize, seed: u64, time: Duration) -> f64 {
    let (_, act, other) = SCENES[scene];
    let (done, ready) = (AtomicBool::new(false), Barrier::new(2));
    let batches = thread::scope(|scope| {
        scope.spawn(|| {
            ready.wait();
            let mut rng = Rng::new(seed ^ 0x5555);
            while let Some(other) = other.filter(|_| !done.load(Ordering::Relaxed)) {
                other(store, &mut rng);
            }
        });
        ready.wait();
        let (mut rng, start) = (Rng::new(seed), Instant::now());
        let mut batches = Vec::new();
        while start.elapsed() < time {
            let batch = Instant::now();
            act(store, &mut rng);
            batches.push(batch.elapsed().as_nanos() as f64 / BATCH as f64);
        }
        done.store(true, Ordering::Relaxed);
        batches
    });
    if scene == READ_1G {
        let mut batches = batches;
        batches.sort_by(f64::total_cmp);
        return batches[batches.len() * 99 / 100];
    }
    batches.iter().sum::<f64>() / batches.len() as f64
}

/// Plays every scene with every store.
pub fn pairs(harness: &mut Harness, stores: &[Box<dyn Store>]) {
    let rounds = harness.scale(15, 1) as usize;
    let time = Duration::from_millis(harness.scale(10, 1));
    let mut rng = Rng::new(17);
    // By store, scene, round.
    let mut times = vec![[const { Vec::new() }; SCENES.len()]; stores.len()];
    let mut order: Vec<usize> = (0..stores.len()).collect();
    for _ in 0..rounds {
        for last in (1..order.len()).rev() {
            order.swap(last, rng.below(last as u64 + 1) as usize);
        }
        let seed = rng.next();
        for &store in &order {
            for (scene, times) in times[store].iter_mut().enumerate() {
                times.push(play(stores[store].as_ref(), scene, seed, time));
            }
        }
    }
    print!("\n{:<22}", "pairs, median ns/op");
    SCENES.iter().for_each(|(name, ..)| print!(" {name:>12}"));
    println!();
    for (store, times) in stores.iter().zip(&times) {
        print!("  {:<20}", store.name());
        times.iter().for_each(|times| print!(" {:>12.1}", median(times.clone())));
        println!();
    }
    let of = |name: &str| &times[stores.iter().position(|store| store.name() == name).unwrap()];
    let ratio = |a: &[f64], b: &[f64]| median(a.iter().zip(b).map(|(a, b)| a / b).collect());
    let (own, tree) = (of("page_set"), of("btreemap+rwlock"));
    let best_locked = |scene: usize| {
        let locked = stores.iter().zip(&times).filter(|(store, _)| store.name().ends_with("+rwlock"));
        locked.map(|(_, times)| ratio(&own[scene], &times[scene])).fold(0.0, f64::max)
    };
    harness.goal("pairs: read/read beside read", ratio(&own[READ_READ], &own[READ]), 1.25);
    harness.goal("pairs: read/read, page_set beside the best behind a lock", best_locked(READ_READ), 1.0 / 25.0);
    harness.goal("pairs: read/4k beside read/read", ratio(&own[READ_4K], &own[READ_READ]), 3.0);
    harness.goal("pairs: read/4k, page_set beside the best behind a lock", best_locked(READ_4K), 1.0 / 20.0);
    harness.goal("pairs: read/1g p99, page_set / btreemap+rwlock", ratio(&own[READ_1G], &tree[READ_1G]), 1.0 / 30.0);
    harness.goal("pairs: 4k/4k near, page_set / btreemap+rwlock", ratio(&own[NEAR], &tree[NEAR]), 1.0 / 8.0);
}
