//! Loom's models of the ring: a vCPU that fills it, and this end of it, with the orderings the code asks for.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --lib dirty`. KVM's part of an entry is spelled out here as its source has it.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use loom::thread;

use super::*;
use crate::addr::{FilePage, FileRange};
use crate::dirty::DirtyBitmap;
use crate::sync::Ordering;

#[derive(Default)]
struct Gfn {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

impl Gfn {
    /// `kvm_dirty_ring_push()`.
    fn push(&self, slot: u32, offset: u64) {
        self.slot.store(slot, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
        self.flags.store(1, Ordering::Release);
    }

    /// `kvm_dirty_ring_reset()`, for one entry.
    fn reset(&self) -> Option<(u32, u64)> {
        if self.flags.load(Ordering::Acquire) & 2 == 0 {
            return None;
        }
        let page = (self.slot.load(Ordering::Relaxed), self.offset.load(Ordering::Relaxed));
        self.flags.store(0, Ordering::Release);
        Some(page)
    }
}

impl Entry for Gfn {
    fn flags(&self) -> u32 {
        self.flags.load(Ordering::Acquire)
    }

    fn page(&self) -> (u32, u64) {
        (self.slot.load(Ordering::Relaxed), self.offset.load(Ordering::Relaxed))
    }

    fn set_harvested(&self) {
        self.flags.store(3, Ordering::Release);
    }
}

/// A slot belongs to its own number.
struct Anybody;

impl Owners for Anybody {
    fn owner(&self, slot: SlotId) -> Option<(u64, u64)> {
        Some((u64::from(slot.raw()), 100))
    }
}

/// What is in a ring, from `fetch` on: slots and pages.
fn gathered(ring: &[Gfn], fetch: &mut u32) -> Vec<(u32, u64)> {
    let mut harvested = Harvested::default();
    let count = gather(ring, fetch, &Anybody, &mut harvested, &mut Strays::default());
    let pages = harvested.runs().flat_map(|run| (run.first..run.first + run.pages).map(move |page| (run.owner, page)));
    let pages: Vec<_> = pages.map(|(owner, page)| (u32::try_from(owner).unwrap(), page)).collect();
    assert_eq!(u32::try_from(pages.len()).unwrap(), count);
    pages
}

/// Every entry comes out once and in order, though the ring is shorter than they are many.
#[test]
fn no_entry_is_lost_where_the_ring_wraps_around() {
    const PAGES: u64 = 3;
    // Both ends wait for each other, which makes for endless interleavings without a bound.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let ring: Arc<[Gfn; 2]> = Arc::new([Gfn::default(), Gfn::default()]);
        let reset_index = Arc::new(AtomicU32::new(0));
        let (theirs, there) = (Arc::clone(&ring), Arc::clone(&reset_index));
        let vcpu = thread::spawn(move || {
            for page in 0..PAGES {
                let at = u32::try_from(page).unwrap();
                while at.wrapping_sub(there.load(Ordering::Acquire)) >= 2 {
                    thread::yield_now();
                }
                theirs[usize::try_from(page).unwrap() & 1].push(page as u32 + 10, page);
            }
        });
        let (mut fetch, mut reset, mut seen) = (0, 0, Vec::new());
        while seen.len() < 3 {
            let pages = gathered(&*ring, &mut fetch);
            let count = pages.len();
            seen.extend(pages);
            let mut taken = 0;
            while let Some(page) = ring[reset & 1].reset() {
                assert_eq!(page, (reset as u32 + 10, reset as u64), "KVM sees the page that it had put there");
                reset += 1;
                taken += 1;
                reset_index.store(u32::try_from(reset).unwrap(), Ordering::Release);
            }
            assert_eq!(taken, count);
            if count == 0 {
                thread::yield_now();
            }
        }
        vcpu.join().unwrap();
        assert_eq!(seen, (0..PAGES).map(|page| (page as u32 + 10, page)).collect::<Vec<_>>());
    });
}

/// Whoever sees a page in the bitmap may copy it: KVM has protected it again by then.
#[test]
fn r07_no_bit_before_the_reset_has_returned() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(1).unwrap());
        let protected = Arc::new(AtomicBool::new(false));
        let (there, theirs) = (Arc::clone(&bitmap), Arc::clone(&protected));
        let reader = thread::spawn(move || {
            if there.contains(FilePage::ZERO) {
                assert!(theirs.load(Ordering::Relaxed), "copied too early");
            }
        });
        let ring = [Gfn::default()];
        ring[0].push(0, 0);
        let pages = gathered(&ring, &mut 0);
        ring[0].reset().unwrap();
        protected.store(true, Ordering::Relaxed);
        for (_, page) in pages {
            bitmap.set(FileRange::page(FilePage::new(page).unwrap()));
        }
        reader.join().unwrap();
    });
}
