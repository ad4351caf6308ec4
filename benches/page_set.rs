//! The page set beside what one would take instead.
//!
//! Every group gives each candidate one turn per round, in fresh random order, so that whatever else the machine does
//! hits all alike, and times it by what its thread had of the processor. What counts is the *ratio* to the group's
//! baseline within a round, of which the median is shown.
//! Every candidate's every page is really written first: a bitmap that was only mapped reads as one cached zero page,
//! which flatters it 2.6 times.
//!
//! An argument picks the groups whose names contain it (`bytes` and `pairs` too). `--quick` (and `--test`, which
//! `cargo test --benches` passes) runs everything once, small. `CVM_BENCH_GATE=1` fails the run if a gate is missed;
//! goals are only printed.
#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // 64-bit hosts; nanoseconds as f64.

#[path = "page_set/harness.rs"]
mod harness;
#[path = "page_set/pairs.rs"]
mod pairs;
#[path = "page_set/stores.rs"]
mod stores;

use std::hint::black_box;
use std::process::ExitCode;

use cvm_memory::addr::{Gfn, GfnRange, PAGES_PER_1G, PAGES_PER_2M};
use cvm_memory_benches::Rng;
use harness::{Group, Harness};
use stores::Store;

/// 1 TiB of guest.
const PAGES: u64 = 1024 * PAGES_PER_1G;

fn range(first: u64, pages: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(first).unwrap(), pages).unwrap()
}

fn whole() -> GfnRange {
    range(0, PAGES)
}

/// After boot: all private but a shared GiB and 2048 scattered shared pages.
fn boot(store: &dyn Store) {
    let mut rng = Rng::new(7);
    store.set(whole(), true);
    store.set(range(3 * PAGES_PER_1G, PAGES_PER_1G), false);
    (0..2048).for_each(|_| store.set(range(rng.below(PAGES), 1), false));
}

/// Pages from 0 on of which every other is shared in the fragmented pattern: 4 GiB.
const FRAG: u64 = 4 * PAGES_PER_1G;

fn main() -> ExitCode {
    let mut harness = Harness::from_args();
    if harness.wants("bytes") {
        bytes();
    }
    lookups(&mut harness);
    converts(&mut harness);
    iterates(&mut harness);
    if harness.wants("pairs") {
        pairs::pairs(&mut harness, &prepared(false));
    }
    harness.finish()
}

/// All candidates in one state: after boot, and if `frag` with 4 GiB of alternating pages.
fn prepared(frag: bool) -> Vec<Box<dyn Store>> {
    let stores = stores::all(PAGES);
    for store in &stores {
        store.touch();
        boot(store.as_ref());
        if frag {
            // The shared GiB lies within: without this it would stay as it is.
            store.set(range(0, FRAG), true);
            (0..FRAG).step_by(2).for_each(|page| store.set(range(page, 1), false));
        }
    }
    stores
}

fn lookups(harness: &mut Harness) {
    let rounds = harness.scale(25, 1);
    let looks = harness.scale(300_000, 2_000);
    if harness.wants("lookup_hot") || harness.wants("lookup_tib") {
        let mut stores = prepared(false);
        stores.push(stores::generator());
        for (name, span) in [("lookup_hot", 4096), ("lookup_tib", PAGES)] {
            lookup_pair(harness, name, &stores, span, rounds, looks);
        }
    }
    if harness.wants("lookup_frag") || harness.wants("lookup_patchy") {
        let mut stores = prepared(true);
        stores.push(stores::generator());
        lookup_pair(harness, "lookup_frag", &stores, FRAG, rounds, looks / 4);
        // Every fourth chunk uniform, in no order: now a processor cannot guess whether there is a second load.
        let mut rng = Rng::new(13);
        let chunks: Vec<u64> = (0..FRAG / PAGES_PER_2M).filter(|_| rng.below(4) == 0).collect();
        for store in &stores {
            chunks.iter().for_each(|chunk| store.set(range(chunk * PAGES_PER_2M, PAGES_PER_2M), false));
        }
        lookup_pair(harness, "lookup_patchy", &stores, FRAG, rounds, looks / 4);
    }
}

/// Independent lookups (throughput), and each depending on the answer before (latency).
fn lookup_pair(harness: &mut Harness, name: &str, stores: &[Box<dyn Store>], span: u64, rounds: u64, looks: u64) {
    harness.run(Group::new(&format!("{name}_indep"), "flat", looks), rounds, stores, |store, seed| {
        black_box(store.count_random(seed, span, looks));
    });
    harness.run(Group::new(&format!("{name}_dep"), "flat", looks), rounds, stores, |store, seed| {
        black_box(store.chase_random(seed, span, looks));
    });
}

fn converts(harness: &mut Harness) {
    if !harness.wants("convert") {
        return;
    }
    let stores = prepared(false);
    let ops = harness.scale(4_000, 200);
    for (name, span) in [("convert_4k_hot", 4096), ("convert_4k_rand_64g", 64 * PAGES_PER_1G)] {
        let rounds = harness.scale(11, 1);
        harness.run(Group::new(name, "flat", 2 * ops), rounds, &stores, |store, seed| {
            // There and back, so that each round meets the same state.
            for value in [false, true] {
                let mut rng = Rng::new(seed);
                (0..ops).for_each(|_| store.set(range(rng.below(span), 1), value));
            }
        });
    }
    let sizes = [("convert_2m", PAGES_PER_2M, 200), ("convert_1g", PAGES_PER_1G, 4), ("convert_tib", PAGES, 4)];
    for (name, pages, ops) in sizes {
        let mut group = Group::new(name, "flat", 2 * ops);
        if pages == PAGES {
            group.skip = &["vm-memory"]; // One atomic operation per bit: seconds.
        }
        let rounds = harness.scale(5, 1);
        harness.run(group, rounds, &stores, |store, seed| {
            for value in [false, true] {
                let mut rng = Rng::new(seed);
                (0..ops).for_each(|_| store.set(range(rng.below(PAGES / pages) * pages, pages), value));
            }
        });
    }
}

fn iterates(harness: &mut Harness) {
    let rounds = harness.scale(7, 1);
    if harness.wants("iterate_boot") {
        let mut group = Group::new("iterate_boot_tib", "flat", 5);
        group.skip = &["vm-memory"]; // Bit by bit: most of a second.
        harness.run(group, rounds, &prepared(false), |store, _| {
            (0..5).for_each(|_| _ = black_box(store.runs(whole(), false)));
        });
    }
    if harness.wants("iterate_frag") {
        let group = Group::new("iterate_frag", "btreemap+rwlock", FRAG / 2);
        harness.run(group, rounds, &prepared(true), |store, _| {
            black_box(store.runs(range(0, FRAG), false));
        });
    }
}

/// Bytes in memory after each pattern, as the kernel counts them. Every store is kept, so that none gets the pages that
/// another gave back.
fn bytes() {
    println!("bytes in memory: boot pattern / 4 GiB of alternating pages");
    let fills: [fn(&dyn Store); 2] =
        [boot, |store| (0..FRAG).step_by(2).for_each(|page| store.set(range(page, 1), true))];
    let mut kept = Vec::new();
    for kind in 0..stores::KINDS {
        let sizes = fills.map(|fill| {
            let before = resident();
            let store = stores::one(kind, PAGES);
            fill(store.as_ref());
            kept.push(store);
            resident().saturating_sub(before)
        });
        println!("  {:<20} {:>12} {:>12}", kept.last().unwrap().name(), sizes[0], sizes[1]);
    }
}

/// Bytes this process has in memory.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
