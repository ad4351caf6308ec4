//! From a guest frame to what is behind it: the slot alone, and the slot and the page's state, as a fault asks for them.
//!
//! Every lookup depends on the answer before, and the pages are random; the floor is their generator and one load from the
//! first cache. All candidates take turns in each round, in fresh random order, timed by what the thread had of its processor,
//! and ratios are medians of the ratios of a round. Slots cover 1 TiB without a hole; the state is that after boot, as in
//! `page_set`. Ours read the layout as `CvmMemory`'s `Reader` does: through a cached `arc_swap` pointer. Goals are only printed.

#![allow(missing_docs, reason = "a program")]
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "64-bit hosts; nanoseconds as f64")]

use std::hint::black_box;
use std::sync::{Arc, RwLock};

use arc_swap::{ArcSwap, Cache};
use cvm_memory::addr::{Gfn, GfnRange, PAGE_SIZE, PAGES_PER_1G};
use cvm_memory::edit::Region;
use cvm_memory::layout::{Layout, Limits, Memslot, SlotFlags, SlotId};
use cvm_memory::page_set::PageSet;
use cvm_memory_benches::{Rng, is_quick, median, processor_time, ratio};
use rangemap::RangeMap;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};

/// 1 TiB.
const PAGES: u64 = 1024 * PAGES_PER_1G;
const HOST: u64 = 1 << 40;
/// Pages of the hot case.
const HOT: u64 = 4096;

fn gfns(first: u64, pages: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(first).expect("a frame"), pages).expect("a range")
}

fn gfn(page: u64) -> Gfn {
    Gfn::containing(page * PAGE_SIZE)
}

/// Nanoseconds of `looks` lookups below `span`, each waiting for the one before.
fn chase(span: u64, looks: u64, seed: u64, mut lookup: impl FnMut(u64) -> u64) -> f64 {
    let (mut rng, start) = (Rng::new(seed), processor_time());
    for _ in 0..looks {
        let page = rng.below(span);
        rng.mix(black_box(lookup(page)) & 1 == 1);
    }
    black_box(rng.next());
    (processor_time() - start).as_nanos() as f64 / looks as f64
}

const NAMES: [&str; 5] = ["floor", "slot", "slot + state", "vm-memory atomic", "rangemap + arc-swap"];
const FLOOR: usize = 0;
const SLOT: usize = 1;
const BOTH: usize = 2;
const ATOMIC: usize = 3;
const LOCKED: usize = 4;

/// What each candidate took in each round.
fn measure(slots: u64, span: u64, rounds: usize, looks: u64) -> [Vec<f64>; 5] {
    let pages = PAGES / slots;
    let slot = |at: u64| {
        let (gfns, hva) = (gfns(at * pages, pages), HOST + at * pages * PAGE_SIZE);
        let region = Region { gfns, hva, mapping: hva, flags: SlotFlags::empty(), binding: None };
        region.slot(SlotId::new(u16::try_from(at).expect("an id")))
    };
    let all: Vec<Memslot> = (0..slots).map(slot).collect();
    let layout = ArcSwap::from_pointee(Layout::from_slots(Limits::default(), [], all.clone()).expect("a layout"));
    let sorted = ArcSwap::from_pointee(all);
    let bytes = usize::try_from(pages * PAGE_SIZE).expect("a size");
    let regions: Vec<_> = (0..slots).map(|at| (GuestAddress(at * pages * PAGE_SIZE), bytes)).collect();
    let atomic = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::from_ranges(&regions).expect("address space"));
    // After boot: all private but a GiB and 2048 pages.
    let set = PageSet::new(PAGES).expect("a set");
    let mut map = RangeMap::from_iter([(0..PAGES, true)]);
    set.insert(gfns(0, PAGES)).expect("within");
    let mut rng = Rng::new(7);
    let scattered = (0..2048).map(|_| gfns(rng.below(PAGES), 1));
    for shared in scattered.chain([gfns(3 * PAGES_PER_1G, PAGES_PER_1G)]) {
        set.remove(shared).expect("within");
        map.insert(shared.start().get()..shared.end().get(), false);
    }
    let map = RwLock::new(map);
    let near: [u64; 64] = std::array::from_fn(|at| at as u64);

    let mut times: [Vec<f64>; 5] = Default::default();
    for round in 0..=rounds {
        let mut order = [FLOOR, SLOT, BOTH, ATOMIC, LOCKED];
        rng.shuffle(&mut order);
        let seed = rng.next();
        for candidate in order {
            let mut cache = Cache::<&ArcSwap<Layout>, Arc<Layout>>::new(&layout);
            let time = match candidate {
                FLOOR => chase(span, looks, seed, |page| near[(page & 63) as usize]),
                SLOT => chase(span, looks, seed, |page| {
                    cache.load().table().locate(gfn(page)).map_or(0, |location| location.hva)
                }),
                BOTH => chase(span, looks, seed, |page| {
                    let location = cache.load().table().locate(gfn(page));
                    location.map_or(0, |location| location.hva) ^ u64::from(set.contains(gfn(page)))
                }),
                ATOMIC => chase(span, looks, seed, |page| {
                    let host = atomic.memory().get_host_address(GuestAddress(page * PAGE_SIZE));
                    host.map_or(0, |host| host.addr() as u64)
                }),
                _ => chase(span, looks, seed, |page| {
                    let slots = sorted.load();
                    let at = slots.partition_point(|slot| slot.gfns.end() <= gfn(page));
                    let hva = slots.get(at).and_then(|slot| slot.hva_of(gfn(page))).unwrap_or(0);
                    hva ^ u64::from(map.read().expect("a lock").get(&page).copied().unwrap_or(false))
                }),
            };
            if round > 0 {
                times[candidate].push(time);
            }
        }
    }
    times
}

fn main() {
    let (rounds, looks) = if is_quick() { (1, 1_000) } else { (21, 200_000) };
    let translate = (SLOT, ATOMIC, 1.0 / 4.0);
    for (slots, span, goals) in [
        (8, HOT, vec![(BOTH, FLOOR, 2.6), (BOTH, LOCKED, 1.0 / 2.5), translate]),
        (8, PAGES, vec![(BOTH, FLOOR, 4.0), (BOTH, LOCKED, 1.0 / 5.5), translate]),
        (512, PAGES, vec![translate]),
    ] {
        let times = measure(slots, span, rounds, looks);
        println!("\n{slots} slots, pages below {span:#x}: ns per lookup, median and best; generator included");
        for (name, times) in NAMES.iter().zip(&times) {
            let best = times.iter().copied().fold(f64::INFINITY, f64::min);
            println!("  {name:<20} {:>8.1} {best:>8.1}", median(times.clone()));
        }
        for (ours, peer, most) in goals {
            let ratio = ratio(&times[ours], &times[peer]);
            let verdict = if ratio <= most { "held" } else { "MISSED" };
            println!("  goal {verdict}: {} / {} = {ratio:.3}, at most {most:.3}", NAMES[ours], NAMES[peer]);
        }
    }
}
