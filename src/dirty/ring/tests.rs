//! Rings whose other end is played by the test, entry by entry.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::gmem::GuestMemfd;
use crate::hypervisor::{Cap, MemoryAttributes, MemoryRegion, Platform};

#[derive(Debug, Clone)]
struct Memory(Arc<[DirtyGfn]>);

impl Memory {
    fn new(entries: usize) -> Self {
        Self((0..entries).map(|_| DirtyGfn::default()).collect())
    }
}

impl DirtyRingMemory for Memory {
    fn entries(&self) -> &[DirtyGfn] {
        &self.0
    }
}

/// KVM, as far as resets go: takes back what is harvested, at most as many as it is told per call.
#[derive(Debug)]
#[allow(unsafe_code)]
struct Kvm {
    memory: Memory,
    reset_index: AtomicU64,
    answers: Mutex<Vec<Result<u64, Errno>>>,
}

impl Kvm {
    fn new(memory: &Memory) -> Self {
        Self { memory: memory.clone(), reset_index: AtomicU64::new(0), answers: Mutex::default() }
    }
}

#[allow(unsafe_code)]
impl Hypervisor for Kvm {
    fn platform(&self) -> Platform {
        Platform::DEFAULT
    }
    fn check_extension(&self, _: Cap) -> u64 {
        0
    }
    fn enable_cap(&self, _: Cap, _: [u64; 4]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }
    fn create_guest_memfd(&self, _: u64, _: u64) -> Result<GuestMemfd, Errno> {
        Err(Errno::EINVAL)
    }
    unsafe fn set_user_memory_region2(&self, _: &MemoryRegion) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }
    fn set_memory_attributes(&self, _: &MemoryAttributes) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn reset_dirty_rings(&self) -> Result<u64, Errno> {
        let scripted = self.answers.lock().unwrap().pop();
        let most = scripted.transpose()?.unwrap_or(u64::MAX);
        let mut taken = 0;
        while taken < most {
            let at = self.reset_index.load(Ordering::Relaxed);
            let entry = &self.memory.0[usize::try_from(at).unwrap() % self.memory.0.len()];
            if entry.flags() & DirtyGfn::RESET == 0 {
                break;
            }
            entry.set_empty();
            self.reset_index.store(at + 1, Ordering::Relaxed);
            taken += 1;
        }
        Ok(taken)
    }
}

/// Slot n belongs to 100 + n, and has a thousand pages; up to slot 3.
struct Table;

impl Owners for Table {
    fn owner(&self, slot: SlotId) -> Option<(u64, u64)> {
        (slot.as_id == 0 && slot.id <= 3).then_some((100 + u64::from(slot.id), 1000))
    }
}

/// All of it, as far as the rings tell.
const fn all(runs: Vec<OwnerRun>) -> (Vec<OwnerRun>, bool) {
    (runs, false)
}

impl Harvest<'_> {
    /// The runs, and whether there may be more.
    fn reset_to_runs(self, vm: &Kvm) -> Result<(Vec<OwnerRun>, bool), ResetError> {
        self.reset(vm).map(|harvested| (harvested.runs().collect(), harvested.overrun()))
    }
}

const fn run(owner: u64, first: u64, pages: u64) -> OwnerRun {
    OwnerRun { owner, first, pages }
}

fn rings(memory: &Memory) -> DirtyRings {
    let mut rings = DirtyRings::new();
    rings.add(Box::new(memory.clone()));
    rings
}

/// A ring of eight that has been through six entries: 6, 7, 0 and 1 are dirty. Four come out, and four are taken back.
#[test]
fn r04_around_the_end_of_a_ring() {
    let memory = Memory::new(8);
    let kvm = Kvm::new(&memory);
    let mut rings = rings(&memory);
    (0..6).for_each(|at| memory.0[at].set_dirty(1, at as u64));
    assert_eq!(rings.harvest(&Table).reset_to_runs(&kvm), Ok(all(vec![run(101, 0, 6)])));
    for (at, page) in [(6, 20), (7, 21), (0, 22), (1, 50)] {
        memory.0[at].set_dirty(1, page);
    }
    let harvest = rings.harvest(&Table);
    assert_eq!(harvest.entries(), 4);
    assert_eq!(harvest.reset_to_runs(&kvm), Ok(all(vec![run(101, 20, 3), run(101, 50, 1)])));
    assert_eq!(rings.rings[0].fetch, 10);
    assert_eq!(kvm.reset_index.load(Ordering::Relaxed), 10);
    assert_eq!(
        rings.stats(),
        RingStats { entries: 10, resets: 2, overruns: 0, strays: 0, fulls: 0, fullest: 6, size: 8 }
    );
}

/// KVM takes back three of four and no more: an error, and the pages come with the next reset.
#[test]
fn r04_a_reset_that_falls_short() {
    let memory = Memory::new(8);
    let kvm = Kvm::new(&memory);
    let mut rings = rings(&memory);
    (0..4).for_each(|at| memory.0[at].set_dirty(2, at as u64));
    let mut answers = vec![Ok(0); PATIENCE as usize];
    answers.push(Ok(3));
    *kvm.answers.lock().unwrap() = answers;
    assert_eq!(rings.harvest(&Table).reset_to_runs(&kvm), Err(ResetError::Short { harvested: 4, reset: 3 }));
    memory.0[4].set_dirty(2, 9);
    assert_eq!(rings.harvest(&Table).reset_to_runs(&kvm), Ok(all(vec![run(102, 0, 4), run(102, 9, 1)])));
}

/// Signals cut resets short, which is no error.
#[test]
fn a_reset_in_pieces() {
    let memory = Memory::new(8);
    let kvm = Kvm::new(&memory);
    let mut rings = rings(&memory);
    (0..5).for_each(|at| memory.0[at].set_dirty(0, at as u64));
    *kvm.answers.lock().unwrap() = vec![Ok(2), Ok(0), Ok(0), Ok(1)];
    assert_eq!(rings.harvest(&Table).reset_to_runs(&kvm), Ok(all(vec![run(100, 0, 5)])));
    assert_eq!(rings.stats().resets, 5);
}

/// An entry that nobody here has harvested is taken back: somebody else has its page.
#[test]
fn somebody_else_harvests() {
    let memory = Memory::new(8);
    let kvm = Kvm::new(&memory);
    let mut rings = rings(&memory);
    (0..2).for_each(|at| memory.0[at].set_dirty(0, at as u64));
    let harvest = rings.harvest(&Table);
    memory.0[2].set_dirty(0, 2);
    memory.0[2].set_harvested();
    assert_eq!(harvest.reset_to_runs(&kvm), Err(ResetError::Foreign { harvested: 2, reset: 3 }));
    // What was ours is ours.
    assert_eq!(rings.harvest(&Table).reset_to_runs(&kvm), Ok(all(vec![run(100, 0, 2)])));
}

/// A harvest that is dropped, or whose reset fails, is part of the next.
#[test]
fn nothing_is_lost_without_a_reset() {
    let memory = Memory::new(8);
    let kvm = Kvm::new(&memory);
    let mut rings = rings(&memory);
    memory.0[0].set_dirty(0, 7);
    drop(rings.harvest(&Table));
    memory.0[1].set_dirty(0, 8);
    kvm.answers.lock().unwrap().push(Err(Errno::EIO));
    assert_eq!(rings.harvest(&Table).reset_to_runs(&kvm), Err(ResetError::Call(Errno::EIO)));
    memory.0[2].set_dirty(0, 9);
    let harvest = rings.harvest(&Table);
    assert_eq!(harvest.entries(), 3);
    assert_eq!(harvest.reset_to_runs(&kvm), Ok(all(vec![run(100, 7, 1), run(100, 8, 1), run(100, 9, 1)])));
    // And without entries there is nothing to call for.
    let before = rings.stats().resets;
    assert_eq!(rings.harvest(&Table).reset_to_runs(&kvm), Ok(all(vec![])));
    assert_eq!(rings.stats().resets, before);
}

/// Reading stops at the first entry that is not dirty, whatever lies behind it.
#[test]
fn no_entry_is_skipped() {
    let memory = Memory::new(8);
    let kvm = Kvm::new(&memory);
    let mut rings = rings(&memory);
    memory.0[1].set_dirty(0, 1);
    assert_eq!(rings.harvest(&Table).entries(), 0);
    memory.0[0].set_dirty(0, 0);
    assert_eq!(rings.harvest(&Table).reset_to_runs(&kvm), Ok(all(vec![run(100, 0, 2)])));
}

/// Entries that name no page there is are taken back like all others, and told of.
#[test]
fn strays() {
    let memory = Memory::new(8);
    let kvm = Kvm::new(&memory);
    let mut rings = rings(&memory);
    let entries = [(3, 999), (3, 1000), (4, 0), (1 << 16, 0), (0xffff_ffff, u64::MAX), (3, u64::MAX), (2, 0)];
    for (at, (slot, page)) in entries.into_iter().enumerate() {
        memory.0[at].set_dirty(slot, page);
    }
    let harvest = rings.harvest(&Table);
    assert_eq!(harvest.entries(), 7);
    assert_eq!(harvest.reset_to_runs(&kvm), Ok(all(vec![run(103, 999, 1), run(102, 0, 1)])));
    assert_eq!(rings.stats().strays, 5);
    let stray = rings.take_stray();
    assert_eq!(stray, Some(Stray { slot: SlotId::new(3), page: 1000 }));
    assert_eq!(rings.take_stray(), None);
}

/// A ring without a free entry has been written over, for all that one can tell from here.
#[test]
fn a_ring_that_is_full_to_the_last_entry() {
    let memory = Memory::new(8);
    let kvm = Kvm::new(&memory);
    let mut rings = rings(&memory);
    (0..8).for_each(|at| memory.0[at].set_dirty(0, at as u64));
    drop(rings.harvest(&Table));
    let harvested = rings.harvest(&Table).reset_to_runs(&kvm);
    assert_eq!(harvested, Ok((vec![run(100, 0, 8)], true)));
    (0..7).for_each(|at| memory.0[at].set_dirty(0, at as u64));
    assert_eq!(rings.harvest(&Table).reset_to_runs(&kvm), Ok(all(vec![run(100, 0, 7)])));
    assert_eq!(rings.stats().overruns, 1);
}

/// What is in a ring, from `fetch` on, and how much.
fn gathered<E: Entry>(entries: &[E], fetch: &mut u32) -> (u32, Vec<OwnerRun>) {
    let mut harvested = Harvested::default();
    let count = gather(entries, fetch, &Table, &mut harvested, &mut Strays::default());
    (count, harvested.runs().collect())
}

/// Indices run on freely, and wrap around after 2^32 entries.
#[test]
fn the_index_wraps_around() {
    let entries: Vec<DirtyGfn> = (0..8).map(|_| DirtyGfn::default()).collect();
    let mut fetch = u32::MAX - 1;
    for (page, at) in [(0, 6), (1, 7), (3, 0), (4, 1)] {
        entries[at].set_dirty(2, page);
    }
    assert_eq!(gathered(&entries, &mut fetch), (4, vec![run(102, 0, 2), run(102, 3, 2)]));
    assert_eq!(fetch, 2);
}

/// A kernel that fills entries which were not reset: all of its entry is dirty whenever somebody looks.
#[derive(Debug)]
struct AlwaysDirty;

impl Entry for AlwaysDirty {
    fn flags(&self) -> u32 {
        DirtyGfn::DIRTY
    }
    fn page(&self) -> (u32, u64) {
        (0, 1)
    }
    fn set_harvested(&self) {}
}

/// It does not hold us.
#[test]
fn a_ring_that_never_ends() {
    let mut fetch = 3;
    let (count, runs) = gathered(&[const { AlwaysDirty }; 8], &mut fetch);
    assert_eq!((count, fetch, runs), (8, 11, vec![run(100, 1, 1); 8]));
}

/// Against one entry after the other: slots that change, runs, repetitions, strays, any start, several rings' worth at once.
#[test]
fn as_one_by_one() {
    let mut random = 1_u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for _ in 0..2000 {
        let entries: Vec<DirtyGfn> = (0..64).map(|_| DirtyGfn::default()).collect();
        let (mut harvested, mut strays) = (Harvested::default(), Strays::default());
        let (mut expected, mut expected_strays) = (Vec::new(), 0);
        for _ in 0..2 {
            let start = u32::try_from(next(1 << 32)).unwrap();
            let dirty = next(65);
            let (mut slot, mut page) = (0, 0);
            for at in 0..dirty {
                match next(8) {
                    0 => slot = u32::try_from(next(5)).unwrap(),
                    1 => page = next(1100),
                    2 => {}
                    _ => page += 1,
                }
                let at = start.wrapping_add(u32::try_from(at).unwrap());
                entries[usize::try_from(at).unwrap() % 64].set_dirty(slot, page);
                if slot <= 3 && page < 1000 {
                    expected.push((100 + u64::from(slot), page));
                } else {
                    expected_strays += 1;
                }
            }
            let mut fetch = start;
            let count = gather(&entries, &mut fetch, &Table, &mut harvested, &mut strays);
            assert_eq!((u64::from(count), u64::from(fetch.wrapping_sub(start))), (dirty, dirty));
            entries.iter().for_each(DirtyGfn::set_empty);
        }
        let runs: Vec<OwnerRun> = harvested.runs().collect();
        let pages: Vec<_> =
            runs.iter().flat_map(|run| (run.first..run.first + run.pages).map(|page| (run.owner, page))).collect();
        assert_eq!((pages, strays.count), (expected, expected_strays));
    }
}
