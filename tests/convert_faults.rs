//! Every call of a conversion made to fail, one after the other, and calls of its undoing too: afterwards everything is as
//! it was, or what stayed converted is told exactly.

mod convert_kit;

use std::collections::BTreeSet;

use convert_kit::*;
use cvm_memory::convert::{DiscardPolicy, Outcome, State, StepError};
use nix::errno::Errno;

use State::{Private, Shared};

/// The frames converted below: across three slots, with runs on both sides of slot boundaries and a gap before the last;
/// the first two lie the other way round in the file.
const RANGE: (u64, u64) = (2, 40);

fn configs() -> Vec<Config> {
    let mut configs = Vec::new();
    for discard in [DiscardPolicy::Immediate, DiscardPolicy::DEFERRED, DiscardPolicy::Never] {
        for (tagged, lazy) in [(false, false), (true, true)] {
            for listeners in 0..=3 {
                for chunk_pages in [3, 1 << 14] {
                    configs.push(Config {
                        tagged,
                        lazy,
                        discard,
                        chunk_pages,
                        listeners,
                        slots: vec![(8, 8), (0, 8), (24, 24)],
                        own_backings: listeners.is_multiple_of(2),
                        ..Config::default()
                    });
                }
            }
        }
    }
    configs
}

/// Some pages shared, some private, some of both with a past; every page filled.
fn prepare(config: &Config, to: State) -> World {
    let world = World::new(config);
    if config.lazy {
        // The first slots are in use; most of the last has never been.
        world.memory.converter().materialise(gfns(0, 28)).unwrap().converted().unwrap();
    }
    for (start, end, to) in [(4, 6, Shared), (10, 14, Shared), (24, 27, Shared), (12, 13, Private), (25, 26, Private)] {
        world.converted(start, end, to);
    }
    if to == Private {
        // Most of it the other way round: four runs are to change.
        world.converted(0, 11, Shared);
        world.converted(13, 16, Shared);
        world.converted(26, 46, Shared);
    }
    let old = world.declared();
    let lazy: BTreeSet<u64> = old.difference(&world.materialised()).copied().collect();
    world.guest_fill(world.convertible().into_iter().filter(|gfn| !lazy.contains(gfn)), tag);
    world.check(config.lazy);
    world
}

/// What a page holds, different from its neighbours and never zero.
fn tag(gfn: u64) -> u8 {
    u8::try_from(gfn % 200 + 1).unwrap()
}

fn set(ranges: &[cvm_memory::addr::GfnRange]) -> BTreeSet<u64> {
    ranges.iter().flat_map(frames).collect()
}

/// One conversion with the calls `failing` failing. Returns how many of them were reached, and how it ended.
fn attempt(config: &Config, to: State, failing: &[u64]) -> (u64, &'static str) {
    let world = prepare(config, to);
    let (old, old_kvm) = (world.declared(), world.attributes());
    let deferred = world.memory.statistics().deferred_bytes;
    let memory: BTreeSet<u64> = world.convertible().into_iter().filter(|n| (RANGE.0..RANGE.1).contains(n)).collect();
    let changing: BTreeSet<u64> = memory.iter().copied().filter(|gfn| old.contains(gfn) != (to == Private)).collect();
    world.arm(failing);
    // To shared, the range may cover the gap; to private it may not.
    let ranges = if to == Shared { vec![RANGE] } else { vec![(2, 16)] };
    let changing: BTreeSet<u64> =
        changing.into_iter().filter(|gfn| ranges.iter().any(|(start, end)| (start..end).contains(&gfn))).collect();
    let outcome = world.convert(ranges[0].0, ranges[0].1, to).unwrap();
    let context = format!("{config:?} to {to}, failing {failing:?}: {outcome:?}, {:?}", world.take());
    let failed = world.failed();
    let expected = |done: &BTreeSet<u64>, set: &BTreeSet<u64>| -> BTreeSet<u64> {
        if to == Private { set | done } else { set - done }
    };
    let none = BTreeSet::new();
    let (done, kind) = match &outcome {
        Outcome::Converted { pages } => {
            assert_eq!((*pages, failed), (changing.len() as u64, 0), "{context}");
            (changing.clone(), "converted")
        }
        Outcome::RolledBack { cause } => {
            assert!(failed > 0, "{context}");
            assert!(set(&[at(cause)]).is_subset(&memory), "{context}");
            (none.clone(), "rolled back")
        }
        Outcome::Poisoned { done, cause, at: place, .. } => {
            assert!(failed > 0, "{context}");
            assert_eq!(at(cause), *place, "{context}");
            assert!(done.windows(2).all(|two| two[0].end() < two[1].start()), "not merged: {context}");
            (set(done), "poisoned")
        }
        Outcome::Unchanged => panic!("{context}"),
    };
    assert!(done.is_subset(&changing), "{context}");
    assert_eq!(world.declared(), expected(&done, &old), "declared: {context}");
    assert_eq!(world.attributes(), expected(&done, &old_kvm), "KVM: {context}");
    let unmapped = match &outcome {
        Outcome::Poisoned { unmapped, .. } => set(unmapped),
        _ => none,
    };
    assert!(unmapped.is_empty() || config.listeners > 0, "{context}");
    assert!(unmapped.is_disjoint(&world.declared()) && unmapped.is_subset(&changing), "{context}");
    world.check_but(config.lazy, &unmapped);
    // Nobody's memory was freed but what changed sides.
    let kvm = world.attributes();
    let in_use = |gfn: &u64| !old.contains(gfn) || old_kvm.contains(gfn);
    let kept: Vec<u64> = world.convertible().into_iter().filter(|gfn| !done.contains(gfn) && in_use(gfn)).collect();
    assert!(kept.iter().all(|gfn| kvm.contains(gfn) == old.contains(gfn)), "{context}");
    world.guest_check(kept, tag);
    if config.discard == DiscardPolicy::Immediate && kind == "rolled back" {
        assert_eq!(world.memory.statistics().deferred_bytes, deferred, "{context}");
    }
    // Whatever happened, a page that changes sides reads as zeros, now and after any way back.
    if config.discard != DiscardPolicy::Never {
        world.arm(&[]);
        world.guest_check(done.iter().copied(), |_| 0);
        for gfn in &unmapped {
            world.converted(*gfn, gfn + 1, Private);
            world.converted(*gfn, gfn + 1, Shared);
        }
        world.check(config.lazy);
        for to in [to.opposite(), to] {
            for gfn in &done {
                world.converted(*gfn, gfn + 1, to);
            }
            world.guest_check(done.iter().copied(), |_| 0);
        }
        world.memory.trim(u64::MAX).unwrap();
        assert_eq!(world.memory.statistics().deferred_bytes, 0);
        world.check(config.lazy);
        // Every page that is in use on one side holds nothing on the other.
        let resident = world.memory.resident();
        let both = resident.private_bytes.unwrap() + resident.shared_bytes.unwrap();
        assert!(both <= world.convertible().len() as u64 * 4096, "{context}: {resident:?}");
    }
    (failed, kind)
}

fn at(cause: &StepError) -> cvm_memory::addr::GfnRange {
    match cause {
        StepError::Attributes { gfns, .. }
        | StepError::Listener { gfns, .. }
        | StepError::Private { gfns, .. }
        | StepError::Shared { gfns, .. }
        | StepError::Record { gfns, .. } => *gfns,
    }
}

/// Each call once.
#[test]
fn every_call_fails_once() {
    let (mut rolled_back, mut poisoned, mut most) = (0, 0, 0);
    for config in configs() {
        for to in [Shared, Private] {
            for k in 0.. {
                let (failed, kind) = attempt(&config, to, &[k]);
                rolled_back += u64::from(kind == "rolled back");
                poisoned += u64::from(kind == "poisoned");
                most = most.max(k);
                if failed == 0 {
                    break;
                }
            }
        }
    }
    eprintln!("{rolled_back} rolled back, {poisoned} poisoned, at most {most} calls");
    assert!(rolled_back > 300 && poisoned > 20 && most > 15, "{rolled_back} {poisoned} {most}");
}

/// Each call, and each call of its undoing too.
#[test]
fn every_undo_fails_too() {
    let mut poisoned = 0;
    let few = |config: &Config| config.chunk_pages == 3 && config.listeners.is_multiple_of(2);
    for config in configs().into_iter().filter(few) {
        for to in [Shared, Private] {
            for k in 0.. {
                let mut reached = 0;
                for second in k + 1.. {
                    let (failed, kind) = attempt(&config, to, &[k, second]);
                    poisoned += u64::from(kind == "poisoned");
                    reached = failed;
                    if failed < 2 {
                        break;
                    }
                }
                if reached == 0 {
                    break;
                }
            }
        }
    }
    eprintln!("{poisoned} poisoned");
    assert!(poisoned > 100, "{poisoned}");
}

/// The first call that fails, and all that are made after it.
#[test]
fn nothing_can_be_undone() {
    for config in configs() {
        for to in [Shared, Private] {
            for k in 0.. {
                let failing: Vec<u64> = (k..k + 64).collect();
                if attempt(&config, to, &failing).0 == 0 {
                    break;
                }
            }
        }
    }
}

/// The second of two listeners cannot map: the first unmaps again, and the page is private as before.
#[test]
fn a_listener_that_cannot_map() {
    let world = World::new(&Config { listeners: 2, ..Config::default() });
    world.guest_fill(0..2, tag);
    // The attribute, the first listener, the second one.
    world.arm(&[2]);
    let Ok(Outcome::RolledBack { cause: StepError::Listener { gfns: at, error } }) = world.convert(1, 2, Shared) else {
        panic!()
    };
    assert_eq!(at, gfns(1, 2));
    assert_eq!(error.inner().downcast_ref(), Some(&Errno::ENOMEM));
    assert_eq!(
        world.take(),
        [
            Did::Attributes(1..2, Shared),
            Did::Map(0, 1..2),
            Did::Map(1, 1..2),
            Did::Unmap(0, 1..2),
            Did::Attributes(1..2, Private),
        ]
    );
    world.check(false);
    world.guest_check(0..2, tag);
}

/// What no listener could map again is told, is not unmapped twice, and is mapped when it becomes shared the next time.
#[test]
fn shared_but_unmapped() {
    let world = World::new(&Config { initial: Shared, listeners: 2, ..Config::default() });
    // The attribute of [0, 4), and the mapping of it by the first listener again.
    world.arm(&[0, 1]);
    let Ok(Outcome::Poisoned { done, unmapped, .. }) = world.convert(0, 4, Private) else { panic!() };
    assert_eq!((done, unmapped), (vec![], vec![gfns(0, 4)]));
    world.check_but(false, &(0..4).collect());
    world.take();
    // A part of it and a page that is mapped: only that one is unmapped.
    world.arm(&[]);
    world.converted(3, 5, Private);
    assert_eq!(world.take().first_chunk(), Some(&[Did::Unmap(1, 4..5), Did::Unmap(0, 4..5)]));
    world.converted(3, 5, Shared);
    world.check_but(false, &(0..3).collect());
    // A slot that goes and comes back is mapped whole.
    let slot = world.memory.space().layout().table().slots().next().unwrap().id;
    world.memory.remove_slot(slot).unwrap();
    world.check(false);
    world.memory.add_slots(world.specs.clone()).unwrap();
    world.check(false);
}
