//! The page set beside what one would take instead.
//!
//! Every group gives each candidate one turn per round, in fresh random order, so that whatever else the machine does
//! hits all alike; what counts is the *ratio* to the group's baseline within a round, of which the median is shown.
//! Every candidate's every page is really written first: a bitmap that was only mapped reads as one cached zero page,
//! which flatters it 2.6 times.
//!
//! `--quick` (and `--test`, which `cargo test --benches` passes) runs everything once, small. `CVM_BENCH_GATE=1` fails
//! the run if a gate is missed.
#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // 64-bit hosts; nanoseconds as f64.

#[path = "page_set/harness.rs"]
mod harness;
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
    bytes();
    lookups(&mut harness);
    converts(&mut harness);
    iterates(&mut harness);
    harness.finish()
}

/// All candidates in one state: after boot, and if `frag` with 4 GiB of alternating pages.
fn prepared(frag: bool) -> Vec<Box<dyn Store>> {
    let stores = stores::all(PAGES);
    for store in &stores {
        store.touch();
        boot(store.as_ref());
        if frag {
            (0..FRAG).step_by(2).for_each(|page| store.set(range(page, 1), false));
        }
    }
    stores
}

fn lookups(harness: &mut Harness) {
    let rounds = harness.scale(25, 1);
    let looks = harness.scale(300_000, 2_000);
    let boot = prepared(false);
    for (name, span) in [("lookup_hot", 4096), ("lookup_tib", PAGES)] {
        lookup_pair(harness, name, &boot, span, rounds, looks);
    }
    drop(boot);
    let frag = prepared(true);
    lookup_pair(harness, "lookup_frag", &frag, FRAG, rounds, looks / 4);
}

/// Independent lookups (throughput), and each depending on the answer before (latency).
fn lookup_pair(harness: &mut Harness, name: &str, stores: &[Box<dyn Store>], span: u64, rounds: u64, looks: u64) {
    let mut group = Group::new(&format!("{name}_indep"), "flat", looks);
    group.run(rounds, stores, |store, seed| {
        black_box(store.count_random(seed, span, looks));
    });
    harness.report(&group);
    let mut group = Group::new(&format!("{name}_dep"), "flat", looks);
    group.run(rounds, stores, |store, seed| {
        black_box(store.chase_random(seed, span, looks));
    });
    harness.report(&group);
}

fn converts(harness: &mut Harness) {
    let stores = prepared(false);
    let ops = harness.scale(4_000, 200);
    for (name, span) in [("convert_4k_hot", 4096), ("convert_4k_rand_64g", 64 * PAGES_PER_1G)] {
        let mut group = Group::new(name, "flat", 2 * ops);
        group.run(harness.scale(11, 1), &stores, |store, seed| {
            // There and back, so that each round meets the same state.
            for value in [false, true] {
                let mut rng = Rng::new(seed);
                (0..ops).for_each(|_| store.set(range(rng.below(span), 1), value));
            }
        });
        harness.report(&group);
    }
    let sizes = [("convert_2m", PAGES_PER_2M, 200), ("convert_1g", PAGES_PER_1G, 4), ("convert_tib", PAGES, 1)];
    for (name, pages, ops) in sizes {
        let mut group = Group::new(name, "flat", 2 * ops);
        if pages == PAGES {
            group.skip = &["vm-memory"]; // One atomic operation per bit: seconds.
        }
        group.run(harness.scale(5, 1), &stores, |store, seed| {
            for value in [false, true] {
                let mut rng = Rng::new(seed);
                (0..ops).for_each(|_| store.set(range(rng.below(PAGES / pages) * pages, pages), value));
            }
        });
        harness.report(&group);
    }
}

fn iterates(harness: &mut Harness) {
    let stores = prepared(false);
    let mut group = Group::new("iterate_boot_tib", "flat", 5);
    group.skip = &["vm-memory"]; // Bit by bit: most of a second.
    group.run(harness.scale(7, 1), &stores, |store, _| {
        (0..5).for_each(|_| _ = black_box(store.runs(whole(), false)));
    });
    harness.report(&group);
    drop(stores);
    let stores = prepared(true);
    let mut group = Group::new("iterate_frag", "btreemap+rwlock", FRAG / 2);
    group.run(harness.scale(7, 1), &stores, |store, _| {
        black_box(store.runs(range(0, FRAG), false));
    });
    harness.report(&group);
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
