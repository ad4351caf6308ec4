//! Exactly which calls a conversion costs, and in which order.

mod convert_kit;

use convert_kit::*;
use cvm_memory::addr::AddrError;
use cvm_memory::convert::{ConvertError, DiscardPolicy, Outcome, Refusal, Request, RequestError, State};
use cvm_memory::hypervisor::MemoryFault;
use nix::errno::Errno;

use State::{Private, Shared};

const PAGE: u64 = 4096;

fn punches(done: &[Did]) -> usize {
    done.iter().filter(|did| matches!(did, Did::Punch(_))).count()
}

/// To shared: attribute, record, listeners, and the hole last; a second time, nothing at all.
#[test]
fn to_shared_in_order_and_once() {
    let world = World::new(&Config { slots: vec![(0x10000, 1024)], ..Config::default() });
    assert_eq!(world.converted(0x10000, 0x10200, Shared), 512);
    assert_eq!(
        world.take(),
        [Did::Attributes(0x10000..0x10200, Shared), Did::Map(0, 0x10000..0x10200), Did::Punch(0..512)]
    );
    world.check(false);
    assert!(matches!(world.convert(0x10000, 0x10200, Shared), Ok(Outcome::Unchanged)));
    assert_eq!((world.take(), world.recorder.count()), (vec![], 2));
}

/// To private: no device reaches a page whose attribute has changed.
#[test]
fn to_private_in_order_and_once() {
    let world = World::new(&Config { initial: Shared, listeners: 2, ..Config::default() });
    assert_eq!(world.converted(0x100, 0x300, Private), 512);
    assert_eq!(
        world.take(),
        [
            Did::Unmap(1, 0x100..0x300),
            Did::Unmap(0, 0x100..0x300),
            Did::Attributes(0x100..0x300, Private),
            Did::DiscardShared(0, 0x100..0x300),
        ]
    );
    world.check(false);
    assert_eq!(world.converted(0x100, 0x300, Private), 0);
    assert_eq!(world.take(), []);
}

/// Of 512 pages of which half are shared already, the other half costs one call of each kind.
#[test]
fn only_what_differs() {
    let world = World::new(&Config::default());
    world.converted(0, 256, Shared);
    world.take();
    assert_eq!(world.converted(0, 512, Shared), 256);
    assert_eq!(world.take(), [Did::Attributes(256..512, Shared), Did::Map(0, 256..512), Did::Punch(256..512)]);
}

#[test]
fn malformed_requests_make_no_call() {
    let bad = |gpa, size| MemoryFault { gpa, size, flags: MemoryFault::PRIVATE, errno: Errno::EFAULT };
    for fault in [bad(0x1000_0800, PAGE), bad(0x1000_0000, 0), bad(0x1000_0000, 0x1800), bad(!0xfff, PAGE * 2)] {
        assert!(matches!(Request::from_fault(&fault), Err(RequestError::Range(_))), "{fault:?}");
    }
    let unknown = MemoryFault { gpa: 0, size: PAGE, flags: 1, errno: Errno::EFAULT };
    assert_eq!(Request::from_fault(&unknown), Err(RequestError::Flags { gpa: 0, flags: 1 }));
    assert!(matches!(
        Request::map_gpa_range([0x1000_0800, 1, 0, 0, 0, 0]),
        Err(RequestError::Range(AddrError::Unaligned { .. }))
    ));
    assert!(matches!(Request::map_gpa_range([0, 0, 0x10, 0, 0, 0]), Err(RequestError::Range(_))));
    assert!(matches!(Request::map_gpa_range([0, 1 << 52, 0x10, 0, 0, 0]), Err(RequestError::TooMany { .. })));
    for attributes in [0x3, 0x20, 1 << 63, 0x13] {
        assert_eq!(
            Request::map_gpa_range([0, 1, attributes, 0, 0, 0]),
            Err(RequestError::Attributes { gpa: 0, attributes })
        );
    }
}

/// Device windows and holes: shared is what they are, private they cannot be.
#[test]
fn what_is_not_memory() {
    let world = World::new(&Config::default());
    for (start, end) in [(0x80000, 0xc0000), (0xfec00, 0xfec01)] {
        assert!(matches!(world.convert(start, end, Shared), Ok(Outcome::Unchanged)));
        assert_eq!(
            world.convert(start, end, Private).unwrap_err(),
            ConvertError::Refused(Refusal::Hole { range: gfns(start, end), hole: gfns(start, end) })
        );
    }
    // Memory with a hole behind it: to private not even the memory; to shared the memory.
    assert_eq!(
        world.convert(1000, 1030, Private).unwrap_err(),
        ConvertError::Refused(Refusal::Hole { range: gfns(1000, 1030), hole: gfns(1024, 1030) })
    );
    assert_eq!(world.take(), []);
    assert_eq!(world.converted(1000, 1030, Shared), 24);
    assert_eq!(world.take(), [Did::Attributes(1000..1024, Shared), Did::Map(0, 1000..1024), Did::Punch(1000..1024)]);
    world.check(false);
}

/// Memory without a private side is refused either way, and so is a range that touches it.
#[test]
fn memory_without_a_private_side() {
    let world = World::new(&Config { plain: vec![(1024, 16)], ..Config::default() });
    for (start, end) in [(1024, 1040), (1020, 1025)] {
        for to in [Private, Shared] {
            let refusal = world.convert(start, end, to).unwrap_err();
            let expected = Refusal::NotConvertible { range: gfns(start, end), part: gfns(1024, end), slot: 1 };
            assert_eq!(refusal, ConvertError::Refused(expected));
        }
    }
    assert_eq!(world.take(), []);
    world.check(false);
}

/// Single pages, put off, are freed as one aligned run of 64 MiB.
#[test]
fn single_pages_are_freed_together() {
    let world = World::new(&Config {
        slots: vec![(0, 16384)],
        discard: DiscardPolicy::Deferred { budget: 1 << 40 },
        ..Config::default()
    });
    for gfn in 0..16384 {
        assert_eq!(world.converted(gfn, gfn + 1, Shared), 1);
    }
    let done = world.take();
    assert_eq!((done.len(), punches(&done)), (2 * 16384, 0));
    assert_eq!(world.memory.statistics().deferred_bytes, 64 << 20);
    assert_eq!(world.memory.trim(u64::MAX).unwrap(), 64 << 20);
    assert_eq!(world.take(), [Did::Punch(0..16384)]);
    assert_eq!(world.memory.statistics().deferred_bytes, 0);
    assert_eq!(world.memory.trim(u64::MAX).unwrap(), 0);
    assert_eq!(world.take(), []);
}

/// Wherever the run begins, no more than one hole per 64 MiB touched.
#[test]
fn one_hole_per_64_mib() {
    let world = World::new(&Config {
        slots: vec![(0, 1 << 16)],
        listeners: 0,
        discard: DiscardPolicy::DEFERRED,
        ..Config::default()
    });
    world.converted(100, 40_000, Shared);
    world.take();
    world.memory.trim(u64::MAX).unwrap();
    let done = world.take();
    let mut next = 100;
    for did in &done {
        let Did::Punch(pages) = did else { panic!("{done:?}") };
        assert_eq!(pages.start, next);
        assert!(pages.end - pages.start <= 16384);
        next = pages.end;
    }
    assert_eq!(next, 40_000);
    // Pages 100..40,000 touch the blocks 0, 1 and 2.
    assert!(done.len() <= 3, "{done:?}");
}

/// A conversion that exceeds the budget frees everything, whichever side.
#[test]
fn a_budget_is_kept() {
    let config = Config { discard: DiscardPolicy::Deferred { budget: 8 * PAGE }, listeners: 0, ..Config::default() };
    let world = World::new(&config);
    world.converted(0, 8, Shared);
    assert_eq!(world.take(), [Did::Attributes(0..8, Shared)]);
    world.converted(8, 9, Shared);
    assert_eq!(world.take(), [Did::Attributes(8..9, Shared), Did::Punch(0..9)]);
    assert_eq!(world.memory.statistics().deferred_bytes, 0);
}

/// What was put off is freed before that side is used again, that part of it only.
#[test]
fn put_off_until_it_is_used_again() {
    let world = World::new(&Config { discard: DiscardPolicy::DEFERRED, ..Config::default() });
    world.guest_fill(0..16, |_| 0x5a);
    world.converted(0, 16, Shared);
    world.guest_check(0..16, |_| 0);
    world.guest_fill(0..16, |_| 0xa5);
    world.take();
    world.converted(4, 8, Private);
    assert_eq!(world.take(), [Did::Punch(4..8), Did::Unmap(0, 4..8), Did::Attributes(4..8, Private)]);
    world.guest_check(4..8, |_| 0);
    assert_eq!(world.memory.statistics().deferred_bytes, 16 * PAGE);
    world.converted(4, 8, Shared);
    assert_eq!(world.take(), [Did::DiscardShared(0, 4..8), Did::Attributes(4..8, Shared), Did::Map(0, 4..8)]);
    world.guest_check(4..8, |_| 0);
    world.guest_check((0..4).chain(8..16), |_| 0xa5);
    assert_eq!(world.memory.trim(u64::MAX).unwrap(), 16 * PAGE);
    assert_eq!(world.take(), [Did::Punch(0..16)]);
}

/// Never means never.
#[test]
fn never_frees_nothing() {
    let world = World::new(&Config { discard: DiscardPolicy::Never, listeners: 0, ..Config::default() });
    world.guest_fill(0..4, |_| 0x5a);
    world.converted(0, 4, Shared);
    world.converted(0, 4, Private);
    assert_eq!(world.memory.trim(u64::MAX).unwrap(), 0);
    assert_eq!(world.take(), [Did::Attributes(0..4, Shared), Did::Attributes(0..4, Private)]);
    world.guest_check(0..4, |_| 0x5a);
}

/// 1 GiB is sixteen calls of 64 MiB, of each kind that holds a lock of the VM.
#[test]
fn a_gibibyte_in_sixteen_calls() {
    let world = World::new(&Config { slots: vec![(0, 1 << 18)], ..Config::default() });
    assert_eq!(world.converted(0, 1 << 18, Shared), 1 << 18);
    let chunk = |n: u64| n * 16384..(n + 1) * 16384;
    let mut expected: Vec<Did> = (0..16).map(|n| Did::Attributes(chunk(n), Shared)).collect();
    expected.push(Did::Map(0, 0..1 << 18));
    expected.extend((0..16).map(|n| Did::Punch(chunk(n))));
    assert_eq!(world.take(), expected);
}

/// Slots are no boundary where their memory goes on in the file and in the mapping.
#[test]
fn several_slots_one_call() {
    let slots = vec![(0, 64), (64, 64), (128, 64)];
    let world = World::new(&Config { slots: slots.clone(), ..Config::default() });
    world.converted(32, 160, Shared);
    assert_eq!(world.take(), [Did::Attributes(32..160, Shared), Did::Map(0, 32..160), Did::Punch(32..160)]);
    world.converted(32, 160, Private);
    assert_eq!(
        world.take(),
        [Did::Unmap(0, 32..160), Did::Attributes(32..160, Private), Did::DiscardShared(0, 32..160)]
    );
    // With mappings of their own, the shared side is freed in three.
    let world = World::new(&Config { slots, own_backings: true, initial: Shared, ..Config::default() });
    world.converted(32, 160, Private);
    assert_eq!(
        world.take(),
        [
            Did::Unmap(0, 32..160),
            Did::Attributes(32..160, Private),
            Did::DiscardShared(0, 32..64),
            Did::DiscardShared(1, 0..64),
            Did::DiscardShared(2, 0..32),
        ]
    );
    world.check(false);
}

/// A gap between slots divides, though the file goes on.
#[test]
fn a_gap_divides_attributes_not_the_file() {
    let world = World::new(&Config { slots: vec![(0, 64), (100, 64)], listeners: 0, ..Config::default() });
    world.converted(0, 164, Shared);
    assert_eq!(
        world.take(),
        [Did::Attributes(0..64, Shared), Did::Attributes(100..164, Shared), Did::Punch(0..64), Did::Punch(64..128)]
    );
}

/// A backing of 2 MiB pages frees whole ones, and keeps the rest.
#[test]
fn large_pages_are_freed_whole() {
    let world = World::new(&Config { initial: Shared, granule: 2 << 20, listeners: 0, ..Config::default() });
    world.converted(8, 9, Private);
    assert_eq!(world.take(), [Did::Attributes(8..9, Private)]);
    world.converted(500, 1024, Private);
    assert_eq!(world.take(), [Did::Attributes(500..1024, Private), Did::DiscardShared(0, 512..1024)]);
}

/// A page declared private and never used costs no attribute on its way to shared; one asked for does on its way back.
#[test]
fn lazy_pages_cost_no_attribute() {
    let world = World::new(&Config { tagged: true, lazy: true, listeners: 0, ..Config::default() });
    world.memory.converter().materialise_around(gfn(0)).unwrap().converted().unwrap();
    assert_eq!(world.take(), [Did::Attributes(0..512, Private)]);
    world.memory.converter().materialise_around(gfn(511)).unwrap().converted().unwrap();
    assert_eq!(world.take(), []);
    world.converted(500, 600, Shared);
    assert_eq!(world.take(), [Did::Attributes(500..512, Shared), Did::Punch(500..600)]);
    world.converted(590, 600, Private);
    assert_eq!(world.take(), [Did::Attributes(590..600, Private), Did::DiscardShared(0, 590..600)]);
    world.memory.converter().materialise_around(gfn(700)).unwrap().converted().unwrap();
    assert_eq!(world.take(), [Did::Attributes(600..1024, Private)]);
    world.check(true);
}

/// Neighbouring frames whose file pages are not neighbours are freed where they are, in the order of the frames.
#[test]
fn slots_out_of_order_in_the_file() {
    let world = World::new(&Config { slots: vec![(64, 64), (0, 64)], listeners: 0, ..Config::default() });
    world.guest_fill(0..128, |_| 0x5a);
    world.converted(60, 70, Shared);
    assert_eq!(world.take(), [Did::Attributes(60..70, Shared), Did::Punch(124..128), Did::Punch(0..6)]);
    world.guest_check((0..60).chain(70..128), |_| 0x5a);
    world.guest_fill(60..70, |_| 0xa5);
    world.converted(62, 66, Private);
    assert_eq!(
        world.take(),
        [Did::Attributes(62..66, Private), Did::DiscardShared(0, 126..128), Did::DiscardShared(0, 0..2)]
    );
    world.guest_check(62..66, |_| 0);
    world.guest_check((60..62).chain(66..70), |_| 0xa5);
}
