//! Dirty bitmaps and rings beside their peers, interleaved in one run, judged by ratios and not by times.
//!
//! `cargo bench --bench dirty`; with `CVM_BENCH_GATE=1`, a ratio that is missed fails the run. Every bitmap is of 1 TiB and has
//! had every page of it written: memory that was never touched is all the same page of zeros, which flatters whoever scans it.
#![allow(missing_docs, reason = "a program")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use cvm_memory::addr::{FilePage, FileRange};
use cvm_memory::dirty::{DirtyBitmap, DirtyRings, Owners};
use cvm_memory::hypervisor::{Cap, DirtyGfn, Hypervisor, Vcpu};
use cvm_memory::layout::SlotId;
use cvm_memory::soft::SoftVm;
use cvm_memory_benches::{Rng, is_quick, ratio, verdict};
use roaring::RoaringBitmap;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

const PAGES: u64 = 1 << 28;
const ENTRIES: u64 = 65536;

fn run(start: u64, end: u64) -> FileRange {
    FileRange::new(FilePage::new(start).unwrap(), FilePage::new(end).unwrap()).unwrap()
}

/// What takes turns, and how long each took, in each round.
#[derive(Default)]
struct Times(BTreeMap<&'static str, Vec<f64>>);

impl Times {
    fn time<T>(&mut self, name: &'static str, act: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = black_box(act());
        self.0.entry(name).or_default().push(start.elapsed().as_secs_f64());
        result
    }

    /// Median over the rounds of one by the other.
    fn ratio(&self, a: &str, b: &str) -> f64 {
        ratio(&self.0[a], &self.0[b])
    }

    /// Prints them, and whether `ours` takes at most so many times as long as `peer`.
    fn report(&self, group: &str, ours: &str, peer: &str, most: f64) -> bool {
        println!("\n{group:<26} {:>12} {:>14}", "us (best)", format!("x {peer}"));
        for (name, times) in &self.0 {
            let best = times.iter().copied().fold(f64::INFINITY, f64::min) * 1e6;
            println!("  {name:<24} {best:>12.1} {:>14.4}", self.ratio(name, peer));
        }
        let ratio = self.ratio(ours, peer);
        let held = ratio <= most;
        println!("  gate {}: {ours} / {peer} = {ratio:.4}, at most {most}", if held { "held" } else { "MISSED" });
        held
    }
}

struct Bitmaps {
    ours: DirtyBitmap,
    flat: Vec<AtomicU64>,
    vm_memory: AtomicBitmap,
    roaring: RoaringBitmap,
}

impl Bitmaps {
    fn new() -> Self {
        let ours = DirtyBitmap::new(PAGES).unwrap();
        ours.set(run(0, PAGES));
        ours.clear();
        let flat: Vec<AtomicU64> = (0..PAGES / 64).map(|_| AtomicU64::new(u64::MAX)).collect();
        flat.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        let page = NonZeroUsize::new(4096).unwrap();
        let vm_memory = AtomicBitmap::new(usize::try_from(PAGES).unwrap() * 4096, page);
        vm_memory.set_addr_range(0, usize::try_from(PAGES).unwrap() * 4096);
        vm_memory.get_and_reset();
        Self { ours, flat, vm_memory, roaring: RoaringBitmap::new() }
    }

    fn set(&mut self, page: u64) {
        self.ours.set(run(page, page + 1));
        self.flat[usize::try_from(page / 64).unwrap()].fetch_or(1 << (page % 64), Ordering::Relaxed);
        self.vm_memory.mark_dirty(usize::try_from(page).unwrap() * 4096, 1);
        self.roaring.insert(u32::try_from(page).unwrap());
    }

    /// Every dirty page, as whoever has nothing but words finds them.
    fn scan(&self) -> u64 {
        let mut sum = 0_u64;
        for (at, word) in (0_u64..).zip(&self.flat) {
            let mut bits = word.load(Ordering::Relaxed);
            while bits != 0 {
                sum = sum.wrapping_add(at * 64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
        sum
    }

    fn iterate(&self, times: &mut Times) {
        let ours = times.time("cvm-memory", || self.ours.runs().flat_map(|run| run.iter()).map(FilePage::get).sum());
        let flat = times.time("u64 scan", || self.scan());
        let roaring = times.time("roaring", || self.roaring.iter().map(u64::from).sum());
        assert_eq!([ours, flat], [flat, roaring]);
    }

    /// Takes everything out of ours and vm-memory's. As many pages as there were, by either.
    fn take(&self, times: &mut Times, pages: u64) {
        let ours: u64 = times.time("cvm-memory", || self.ours.take().map(|run| run.pages()).sum());
        let words = times.time("vm-memory", || self.vm_memory.get_and_reset());
        assert_eq!(ours, pages);
        assert_eq!(words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>(), pages);
    }

    fn clear(&mut self) {
        self.ours.clear();
        self.flat.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        self.vm_memory.get_and_reset();
        self.roaring.clear();
    }
}

struct OneSlot;

impl Owners for OneSlot {
    fn owner(&self, slot: SlotId) -> Option<(u64, u64)> {
        (slot.id == 1).then_some((1, PAGES))
    }
}

/// A full ring, drained to runs and merely counted.
fn drain(rounds: u64, run_length: u64) -> Times {
    let vm = SoftVm::default_type();
    let bytes = u32::try_from(ENTRIES * 16).unwrap();
    vm.enable_cap(Cap::DIRTY_LOG_RING, [bytes.into(), 0, 0, 0]).unwrap();
    let vcpu = vm.create_vcpu();
    // The vCPU never runs: what a guest would have written is put into its ring here.
    let ring = vcpu.dirty_ring(bytes).unwrap();
    let mut rings = DirtyRings::new();
    rings.add(vcpu.dirty_ring(bytes).unwrap());
    let (mut times, mut rng) = (Times::default(), Rng::new(7));
    for _ in 0..rounds {
        let mut pages = Vec::new();
        while (pages.len() as u64) < ENTRIES {
            let first = rng.below(PAGES - run_length);
            pages.extend(first..first + run_length);
        }
        let fill = || ring.entries().iter().zip(&pages).for_each(|(entry, page)| entry.set_dirty(1, *page));
        fill();
        let counted = times.time("count only", || {
            // As every harvest must read them; only nothing is made of it but a sum, so that it is read.
            let (mut count, mut sum) = (0_u64, 0_u64);
            for entry in ring.entries() {
                if entry.flags() != DirtyGfn::DIRTY {
                    break;
                }
                let (slot, page) = entry.page();
                entry.set_harvested();
                sum = sum.wrapping_add(page ^ u64::from(slot));
                count += 1;
            }
            (count, sum)
        });
        let sum = pages.iter().fold(0_u64, |sum, page| sum.wrapping_add(page ^ 1));
        assert_eq!(counted, (ENTRIES, sum));
        fill();
        let harvest = times.time("to runs", || rings.harvest(&OneSlot));
        let harvested = harvest.reset(&vm).unwrap();
        assert_eq!(harvested.runs().map(|run| run.pages).sum::<u64>(), ENTRIES);
        rings.recycle(harvested);
    }
    times
}

fn main() -> ExitCode {
    let rounds = if is_quick() { 2 } else { 21 };
    let mut held = true;
    let mut bitmaps = Bitmaps::new();
    let mut rng = Rng::new(3);
    for (name, dirty, most) in [("iterate, nothing dirty", 0, 0.02), ("iterate, 1e-4 dirty", PAGES / 10_000, 0.5)] {
        bitmaps.clear();
        (0..dirty).for_each(|_| bitmaps.set(rng.below(PAGES)));
        let mut times = Times::default();
        (0..rounds).for_each(|_| bitmaps.iterate(&mut times));
        held &= times.report(name, "cvm-memory", "u64 scan", most);
    }
    for (name, dirty) in [("take, nothing dirty", 0), ("take, 1e-4 dirty", PAGES / 10_000)] {
        let mut times = Times::default();
        for _ in 0..rounds {
            bitmaps.clear();
            (0..dirty).for_each(|_| bitmaps.set(rng.below(PAGES)));
            let pages = bitmaps.roaring.len();
            bitmaps.take(&mut times, pages);
        }
        held &= times.report(name, "cvm-memory", "vm-memory", 0.25);
    }
    for (name, run_length, most) in [("drain a ring, random", 1, 1.9), ("drain a ring, runs of 32", 32, 1.9)] {
        held &= drain(rounds * 5, run_length).report(name, "to runs", "count only", most);
    }
    verdict(held)
}
