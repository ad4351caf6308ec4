//! Plans as lists of steps, worked out by hand.

mod convert_kit;

use convert_kit::*;
use cvm_memory::addr::GfnRange;
use cvm_memory::convert::{
    DiscardPolicy, Plan, PrivateDiscard, Refusal, Request, Rules, SharedDiscard, Snapshot, State, Step, admit, plan,
    plan_materialise,
};
use cvm_memory::layout::SlotId;
use cvm_memory_testkit::file_pages;

use State::{Private, Shared};

const RULES: Rules = Rules { discard: DiscardPolicy::Immediate, chunk: 1 << 14, listeners: true };

/// Slots of frames [16, 32), [32, 48) and [64, 80), one behind the other in one file; [80, 84) has no private side.
fn world(own_backings: bool) -> World {
    let slots = vec![(16, 16), (32, 16), (64, 16)];
    World::new(&Config { slots, plain: vec![(80, 4)], own_backings, listeners: 0, ..Config::default() })
}

fn slot(id: u16) -> SlotId {
    SlotId { as_id: 0, id }
}

fn seen(differing: &[GfnRange]) -> Snapshot {
    Snapshot { differing: differing.to_vec(), attributes: differing.to_vec(), unsettled: vec![] }
}

#[test]
fn to_shared() {
    let world = world(false);
    let private = |gfns, start, end| {
        Step::DiscardPrivate(PrivateDiscard { gfns, file: world.file.id(), pages: file_pages(start, end) })
    };
    let memory = [gfns(16, 48), gfns(64, 80)];
    let made = plan(Shared, &memory, &seen(&[gfns(20, 36), gfns(70, 72)]), &world.memory.space(), &RULES);
    assert_eq!(
        made,
        Plan {
            to: Shared,
            steps: vec![
                Step::SetAttributes(gfns(20, 36), Shared),
                Step::SetAttributes(gfns(70, 72), Shared),
                Step::Publish(gfns(20, 36), Shared),
                Step::Publish(gfns(70, 72), Shared),
                Step::Map(gfns(20, 36)),
                Step::Map(gfns(70, 72)),
                private(gfns(20, 36), 4, 20),
                private(gfns(70, 72), 38, 40),
            ],
            changed: vec![gfns(20, 36), gfns(70, 72)],
            pages: 48,
        }
    );
    assert_eq!(made.pages_changed(), 18);
    let last: Vec<bool> = made.steps.iter().map(Step::is_final).collect();
    assert_eq!(last, [false, false, false, false, false, false, true, true]);
    assert_eq!(made.steps.last().unwrap().gfns(), gfns(70, 72));
}

/// Mappings of their own divide the shared side, the file does not divide the private one.
#[test]
fn to_private() {
    let shared = |gfns, id, offset| Step::DiscardShared(SharedDiscard { gfns, slot: slot(id), offset });
    let expected = |discards: Vec<Step>| {
        let mut steps = vec![
            Step::Unmap(gfns(20, 36)),
            Step::SetAttributes(gfns(20, 36), Private),
            Step::Publish(gfns(20, 36), Private),
        ];
        steps.extend(discards);
        steps
    };
    let differing = seen(&[gfns(20, 36)]);
    let one = plan(Private, &[gfns(16, 48)], &differing, &world(false).memory.space(), &RULES);
    assert_eq!(one.steps, expected(vec![shared(gfns(20, 36), 0, 0x4000)]));
    let own = plan(Private, &[gfns(16, 48)], &differing, &world(true).memory.space(), &RULES);
    assert_eq!(own.steps, expected(vec![shared(gfns(20, 32), 0, 0x4000), shared(gfns(32, 36), 1, 0)]));
}

/// Attributes and discards are cut, what has nobody wait is not; cut pieces keep their place in file and mapping.
#[test]
fn chunks() {
    let world = world(false);
    let rules = Rules { chunk: 6, ..RULES };
    let file = world.file.id();
    let private = |gfns, start, end| Step::DiscardPrivate(PrivateDiscard { gfns, file, pages: file_pages(start, end) });
    let made = plan(Shared, &[gfns(16, 48)], &seen(&[gfns(30, 43)]), &world.memory.space(), &rules);
    assert_eq!(
        made.steps,
        [
            Step::SetAttributes(gfns(30, 36), Shared),
            Step::SetAttributes(gfns(36, 42), Shared),
            Step::SetAttributes(gfns(42, 43), Shared),
            Step::Publish(gfns(30, 43), Shared),
            Step::Map(gfns(30, 43)),
            private(gfns(30, 36), 14, 20),
            private(gfns(36, 42), 20, 26),
            private(gfns(42, 43), 26, 27),
        ]
    );
    let shared = |gfns, offset| Step::DiscardShared(SharedDiscard { gfns, slot: slot(0), offset });
    let made = plan(Private, &[gfns(16, 48)], &seen(&[gfns(30, 43)]), &world.memory.space(), &rules);
    assert_eq!(
        made.steps.get(5..).unwrap(),
        [shared(gfns(30, 36), 0xe000), shared(gfns(36, 42), 0x1_4000), shared(gfns(42, 43), 0x1_a000)]
    );
}

/// What was put off on the wanted side is freed before anything else, as far as it is wanted.
#[test]
fn settle_comes_first() {
    let world = world(false);
    let seen = Snapshot {
        differing: vec![gfns(16, 24), gfns(40, 44)],
        attributes: vec![gfns(16, 24), gfns(40, 44)],
        unsettled: vec![gfns(20, 42), gfns(46, 48)],
    };
    let rules = Rules { discard: DiscardPolicy::DEFERRED, ..RULES };
    let private = |gfns, start, end| {
        Step::SettlePrivate(PrivateDiscard { gfns, file: world.file.id(), pages: file_pages(start, end) })
    };
    let made = plan(Private, &[gfns(16, 48)], &seen, &world.memory.space(), &rules);
    assert_eq!(
        made.steps,
        [
            private(gfns(20, 24), 4, 8),
            private(gfns(40, 42), 24, 26),
            Step::Unmap(gfns(16, 24)),
            Step::Unmap(gfns(40, 44)),
            Step::SetAttributes(gfns(16, 24), Private),
            Step::SetAttributes(gfns(40, 44), Private),
            Step::Publish(gfns(16, 24), Private),
            Step::Publish(gfns(40, 44), Private),
            Step::Defer(gfns(16, 24), Shared),
            Step::Defer(gfns(40, 44), Shared),
        ]
    );
    assert!(!made.steps.iter().any(Step::is_final));
    let made = plan(Shared, &[gfns(16, 48)], &seen, &world.memory.space(), &rules);
    let settled = SharedDiscard { gfns: gfns(20, 24), slot: slot(0), offset: 0x4000 };
    assert_eq!(made.steps.first(), Some(&Step::SettleShared(settled)));
    assert_eq!(made.steps.last(), Some(&Step::Defer(gfns(40, 44), Private)));
}

/// The record may be ahead of KVM: then only the record changes.
#[test]
fn attributes_only_where_they_differ() {
    let world = world(false);
    let rules = Rules { discard: DiscardPolicy::Never, listeners: false, ..RULES };
    let seen = Snapshot { differing: vec![gfns(16, 32)], attributes: vec![gfns(18, 20)], unsettled: vec![] };
    let made = plan(Shared, &[gfns(16, 48)], &seen, &world.memory.space(), &rules);
    assert_eq!(made.steps, [Step::SetAttributes(gfns(18, 20), Shared), Step::Publish(gfns(16, 32), Shared)]);
    assert_eq!(made.changed, [gfns(16, 32)]);
}

/// Nothing outside the admitted memory is touched, whatever the record says of it.
#[test]
fn nothing_but_memory() {
    let world = world(false);
    let rules = Rules { discard: DiscardPolicy::DEFERRED, ..RULES };
    let seen = Snapshot {
        differing: vec![gfns(0, 100)],
        attributes: vec![gfns(0, 100)],
        unsettled: vec![gfns(0, 17), gfns(90, 100)],
    };
    let made = plan(Shared, &[gfns(16, 48), gfns(64, 80)], &seen, &world.memory.space(), &rules);
    let memory = |frames: GfnRange| gfns(16, 48).contains_range(&frames) || gfns(64, 80).contains_range(&frames);
    assert!(made.steps.iter().all(|step| memory(step.gfns())), "{made:?}");
    assert_eq!((made.pages, made.pages_changed()), (48, 48));
    let made = plan(Shared, &[gfns(16, 48)], &Snapshot::default(), &world.memory.space(), &rules);
    assert_eq!(made, Plan { to: Shared, steps: vec![], changed: vec![], pages: 32 });
}

#[test]
fn materialising() {
    let rules = Rules { chunk: 4, ..RULES };
    assert_eq!(
        plan_materialise(&[gfns(0, 6), gfns(10, 11)], &rules),
        Plan {
            to: Private,
            steps: vec![
                Step::SetAttributes(gfns(0, 4), Private),
                Step::SetAttributes(gfns(4, 6), Private),
                Step::SetAttributes(gfns(10, 11), Private),
            ],
            changed: vec![gfns(0, 6), gfns(10, 11)],
            pages: 7,
        }
    );
    assert_eq!(plan_materialise(&[], &rules).steps, []);
}

#[test]
fn admission() {
    let world = world(true);
    let space = world.memory.space();
    let ask = |start, end, to| admit(&Request { range: gfns(start, end), to }, &space);
    let hole = |start, end, from, to| Refusal::Hole { range: gfns(start, end), hole: gfns(from, to) };
    let plain =
        |start, end, from, to| Refusal::NotConvertible { range: gfns(start, end), part: gfns(from, to), slot: 3 };
    // Neighbouring slots are one run of memory.
    assert_eq!(ask(20, 40, Private), Ok(vec![gfns(20, 40)]));
    assert_eq!(ask(79, 80, Private), Ok(vec![gfns(79, 80)]));
    // Holes matter on the way to private only.
    assert_eq!(ask(0, 70, Shared), Ok(vec![gfns(16, 48), gfns(64, 70)]));
    assert_eq!(ask(0, 16, Shared), Ok(vec![]));
    assert_eq!(ask(15, 17, Private), Err(hole(15, 17, 15, 16)));
    assert_eq!(ask(40, 70, Private), Err(hole(40, 70, 48, 64)));
    assert_eq!(ask(1 << 40, 1 << 41, Private), Err(hole(1 << 40, 1 << 41, 1 << 40, 1 << 41)));
    // Memory without a private side is refused either way.
    assert_eq!(ask(79, 82, Shared), Err(plain(79, 82, 80, 82)));
    assert_eq!(ask(80, 84, Private), Err(plain(80, 84, 80, 84)));
    assert_eq!(ask(82, 90, Shared), Err(plain(82, 90, 82, 84)));
}
