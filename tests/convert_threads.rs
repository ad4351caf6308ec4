//! Conversions from several threads at once, beside device accesses, listeners that come and go, and themselves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use cvm_memory::addr::{Gfn, GfnRange, Gpa, PAGE_SIZE};
use cvm_memory::convert::{
    AddListenerError, ConvertError, DiscardPolicy, Listener, ListenerError, LockError, Outcome, PinError, PinPolicy,
    RangeLock, Request, SharedRun, State,
};
use cvm_memory::layout::SlotId;
use cvm_memory::memory::{CvmMemory, SlotError};
use cvm_memory::soft::SoftVm;

const MIB: u64 = 1 << 20;

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start).unwrap(), Gfn::new(end).unwrap()).unwrap()
}

fn page(n: u64) -> GfnRange {
    range(n, n + 1)
}

fn memory(pins: PinPolicy) -> (SoftVm, Arc<CvmMemory>) {
    let vm = SoftVm::software_protected();
    let memory = CvmMemory::builder().ram(0, 4 * MIB).pins(pins).build(Arc::new(vm.clone())).unwrap();
    (vm, Arc::new(memory))
}

/// Counts what is mapped of each frame, and insists that it is at most once.
#[derive(Debug, Default)]
struct Counting(Mutex<BTreeMap<u64, i64>>);

impl Counting {
    fn add(&self, run: &SharedRun, by: i64) {
        let mut counts = self.0.lock().unwrap();
        for gfn in run.gfns {
            let count = counts.entry(gfn.get()).or_default();
            *count += by;
            assert!((0..=1).contains(count), "gfn {gfn:#x} is mapped {count} times");
        }
    }

    fn mapped(&self) -> Vec<u64> {
        self.0.lock().unwrap().iter().filter(|(_, count)| **count == 1).map(|(gfn, _)| *gfn).collect()
    }
}

impl Listener for Counting {
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        self.add(run, 1);
        Ok(())
    }

    fn unmap(&self, run: &SharedRun) {
        self.add(run, -1);
    }
}

fn listener(counting: &Arc<Counting>) -> Arc<dyn Listener> {
    Arc::clone(counting) as Arc<dyn Listener>
}

fn shared(memory: &CvmMemory) -> Vec<u64> {
    (0..1024).filter(|n| memory.state(Gfn::new(*n).unwrap()) == Some(State::Shared)).collect()
}

/// C15: the pages of one 64-page word, each thread its own eight of them, ending in a state of its own choosing.
#[test]
fn c15_threads_convert_pages_of_one_word() {
    const ROUNDS: u64 = 200;
    let (vm, memory) = memory(PinPolicy::Refuse);
    let counting = Arc::new(Counting::default());
    memory.add_listener(&listener(&counting)).unwrap();
    thread::scope(|scope| {
        for worker in 0..8 {
            let memory = &memory;
            scope.spawn(move || {
                for round in 0..=ROUNDS {
                    for n in (worker..64).step_by(8) {
                        let to = State::from_private((round + n / 8) % 2 == 0);
                        let outcome = memory.convert(&Request { range: page(n), to }).unwrap();
                        let expected = round > 0 || !to.is_private();
                        assert_eq!(matches!(outcome, Outcome::Converted { pages: 1 }), expected, "{outcome:?}");
                    }
                }
            });
        }
    });
    let expected: Vec<u64> = (0..64).filter(|n| !(ROUNDS + n / 8).is_multiple_of(2)).collect();
    assert_eq!(shared(&memory), expected);
    assert_eq!(counting.mapped(), expected);
    let private: u64 = vm.private_gfns().iter().map(GfnRange::pages).sum();
    assert_eq!(private, 1024 - expected.len() as u64);
}

/// Nobody sees a page go private while it is pinned, and nobody waits for ever.
#[test]
fn conversions_beside_device_accesses() {
    let (_, memory) = memory(PinPolicy::Wait(Duration::MAX));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut pinned = 0u64;
                while !done.load(Ordering::Relaxed) || pinned == 0 {
                    match memory.pin(range(2, 6)) {
                        Ok(_pin) => {
                            pinned += 1;
                            assert_eq!(memory.converter().declared().uniform(range(2, 6)), Some(false));
                            thread::yield_now();
                            assert_eq!(memory.converter().declared().uniform(range(2, 6)), Some(false));
                        }
                        Err(PinError::NotShared { .. }) => thread::yield_now(),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        for _ in 0..500 {
            for to in [State::Shared, State::Private] {
                memory.convert(&Request { range: range(0, 8), to }).unwrap().converted().unwrap();
            }
        }
        memory.convert(&Request { range: range(0, 8), to: State::Shared }).unwrap().converted().unwrap();
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_pinned_page_stays_shared() {
    let (vm, memory) = memory(PinPolicy::Refuse);
    memory.convert(&Request { range: range(0, 8), to: State::Shared }).unwrap().converted().unwrap();
    let pin = memory.pin(range(3, 4)).unwrap();
    let counters = vm.counters();
    let refused = memory.convert(&Request { range: range(0, 8), to: State::Private }).unwrap_err();
    assert_eq!(refused, ConvertError::Locked(LockError::Pinned { range: range(0, 8), pinned: range(3, 4) }));
    assert_eq!(vm.counters().since(&counters).set_memory_attributes, 0);
    // Everything else goes on: other pages, and conversions to shared of the very page.
    assert!(matches!(
        memory.convert(&Request { range: range(4, 8), to: State::Private }),
        Ok(Outcome::Converted { .. })
    ));
    assert!(matches!(
        memory.convert(&Request { range: range(0, 8), to: State::Shared }),
        Ok(Outcome::Converted { pages: 4 })
    ));
    memory.write(Gpa(3 * PAGE_SIZE), b"a second access").unwrap();
    drop(pin);
    assert!(matches!(
        memory.convert(&Request { range: range(0, 8), to: State::Private }),
        Ok(Outcome::Converted { pages: 8 })
    ));
    assert!(matches!(memory.pin(range(3, 4)), Err(PinError::NotShared { .. })));
    // A thread does not wait for its own pin, however patient it is.
    let (_, memory) = self::memory(PinPolicy::Wait(Duration::MAX));
    memory.convert(&Request { range: range(0, 8), to: State::Shared }).unwrap().converted().unwrap();
    let _pin = memory.pin(page(0)).unwrap();
    let refused = memory.convert(&Request { range: page(0), to: State::Private }).unwrap_err();
    assert!(matches!(refused, ConvertError::Locked(LockError::Pinned { .. })));
}

/// Waits until `lock` shows that somebody waits. There is no other way to see it, and no clock in it.
fn until_wanted(lock: &RangeLock) {
    while !format!("{lock:?}").contains("Wanted") {
        thread::yield_now();
    }
}

#[test]
fn whoever_waits_is_not_overtaken() {
    let lock = RangeLock::default();
    let order = Mutex::new(Vec::new());
    let waiting = Barrier::new(3);
    thread::scope(|scope| {
        let pin = lock.shared(range(0, 1)).unwrap();
        scope.spawn(|| {
            let _guard = lock.exclusive(range(0, 100), Some(PinPolicy::Wait(Duration::MAX))).unwrap();
            order.lock().unwrap().push("wide");
        });
        until_wanted(&lock);
        for (name, exclusive) in [("narrow", true), ("pin", false)] {
            let (lock, order, waiting) = (&lock, &order, &waiting);
            scope.spawn(move || {
                waiting.wait();
                let _guard = if exclusive { lock.exclusive(range(50, 51), None) } else { lock.shared(range(50, 51)) };
                order.lock().unwrap().push(name);
            });
        }
        // Elsewhere, nobody waits.
        drop(lock.exclusive(range(200, 300), None).unwrap());
        waiting.wait();
        assert!(order.lock().unwrap().is_empty());
        drop(pin);
    });
    let order = order.into_inner().unwrap();
    assert_eq!((order[0], order.len()), ("wide", 3));
}

/// Does what a listener must not do, and keeps what it was told.
#[derive(Debug, Default)]
struct Meddler {
    memory: OnceLock<Weak<CvmMemory>>,
    told: Mutex<Vec<String>>,
}

impl Meddler {
    fn meddle(&self) {
        let Some(memory) = self.memory.get().and_then(Weak::upgrade) else { return };
        let mut told = self.told.lock().unwrap();
        for range in [page(0), page(700)] {
            let converted = memory.convert(&Request { range, to: State::Private });
            assert!(matches!(converted, Err(ConvertError::Locked(LockError::Reentrant { .. }))), "{converted:?}");
            let pinned = memory.pin(range);
            assert!(matches!(pinned, Err(PinError::Locked(LockError::Reentrant { .. }))), "{pinned:?}");
        }
        let removed = memory.remove_slot(SlotId::from_raw(0));
        assert!(matches!(removed, Err(SlotError::Locked(LockError::Reentrant { .. }))), "{removed:?}");
        let other: Arc<dyn Listener> = Arc::new(Counting::default());
        let added = memory.add_listener(&other);
        assert!(matches!(added, Err(AddListenerError::Locked(LockError::Reentrant { .. }))), "{added:?}");
        told.push("refused".to_owned());
    }
}

impl Listener for Meddler {
    fn map(&self, _: &SharedRun) -> Result<(), ListenerError> {
        self.meddle();
        Ok(())
    }

    fn unmap(&self, _: &SharedRun) {
        self.meddle();
    }
}

#[test]
fn a_listener_that_meddles_is_refused_and_nothing_hangs() {
    let (_, memory) = memory(PinPolicy::Wait(Duration::MAX));
    let meddler = Arc::new(Meddler::default());
    memory.add_listener(&(Arc::clone(&meddler) as Arc<dyn Listener>)).unwrap();
    meddler.memory.set(Arc::downgrade(&memory)).unwrap();
    for to in [State::Shared, State::Private] {
        assert!(matches!(memory.convert(&Request { range: range(0, 4), to }), Ok(Outcome::Converted { pages: 4 })));
    }
    assert_eq!(*meddler.told.lock().unwrap(), ["refused", "refused"]);
}

#[test]
fn a_stale_handle_takes_nobody_out() {
    let (_, memory) = memory(PinPolicy::Refuse);
    memory.convert(&Request { range: page(0), to: State::Shared }).unwrap().converted().unwrap();
    let first = memory.add_listener(&listener(&Arc::new(Counting::default()))).unwrap();
    memory.remove_listener(first).unwrap();
    let second = Arc::new(Counting::default());
    memory.add_listener(&listener(&second)).unwrap();
    memory.remove_listener(first).unwrap();
    assert_eq!(second.mapped(), [0]);
}

#[test]
fn listeners_that_come_and_go_miss_nothing() {
    let vm = SoftVm::software_protected();
    let memory = CvmMemory::builder().ram(0, 4 * MIB).discard(DiscardPolicy::DEFERRED).build(Arc::new(vm)).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for worker in 0..2u64 {
            let (memory, done) = (&memory, &done);
            scope.spawn(move || {
                let mut n = worker;
                while !done.load(Ordering::Relaxed) {
                    n = (n * 37 + 11) % 1000;
                    let range = range(n, n + 1 + n % 24);
                    memory
                        .convert(&Request { range, to: State::from_private(n % 2 == 0) })
                        .unwrap()
                        .converted()
                        .unwrap();
                }
            });
        }
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                memory.trim(64 * PAGE_SIZE).unwrap();
            }
        });
        for _ in 0..100 {
            let counting = Arc::new(Counting::default());
            let id = memory.add_listener(&listener(&counting)).unwrap();
            thread::yield_now();
            memory.remove_listener(id).unwrap();
            assert_eq!(counting.mapped(), [] as [u64; 0]);
        }
        done.store(true, Ordering::Relaxed);
    });
    let counting = Arc::new(Counting::default());
    memory.add_listener(&listener(&counting)).unwrap();
    assert_eq!(counting.mapped(), shared(&memory));
    memory.trim(u64::MAX).unwrap();
    assert_eq!(memory.statistics().deferred_bytes, 0);
}
