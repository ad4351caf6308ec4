//! Random histories with random failures, against a model that knows each page by itself and nothing of how it is done.

mod convert_kit;

use std::collections::BTreeSet;

use convert_kit::*;
use cvm_memory::convert::{ConvertError, DiscardPolicy, Outcome, Refusal, State};
use cvm_memory::layout::SlotId;
use proptest::prelude::*;

use State::{Private, Shared};

/// First frame and pages of each slot, in the order of their file pages: neighbours, and one behind a gap.
const SLOTS: [(u64, u64); 4] = [(12, 4), (4, 8), (16, 9), (30, 7)];
const END: u64 = 40;

#[derive(Debug, Clone)]
enum Op {
    Convert { start: u64, len: u64, to: State, failing: Vec<u64> },
    Trim { budget: u64, failing: Vec<u64> },
    Materialise { start: u64, len: u64, failing: Vec<u64> },
    Remove { slot: usize, failing: Vec<u64> },
    Add { slot: usize, failing: Vec<u64> },
    Fill { start: u64, len: u64, byte: u8 },
}

fn op() -> impl Strategy<Value = Op> {
    let state = prop::bool::ANY.prop_map(State::from_private);
    // Some calls here and there, or one and those that follow it.
    let some = || {
        let run = (0..14u64, 1..8u64).prop_map(|(first, more)| (first..first + more).collect());
        prop_oneof![4 => Just(vec![]), 1 => prop::collection::vec(0..14u64, 1..4), 1 => run]
    };
    let one = || prop_oneof![2 => Just(vec![]), 1 => prop::collection::vec(0..6u64, 1)];
    let slot = || 0..SLOTS.len();
    prop_oneof![
        6 => (0..END, 1..20u64, state, some())
            .prop_map(|(start, len, to, failing)| Op::Convert { start, len, to, failing }),
        2 => (prop_oneof![Just(u64::MAX), 0..40_000u64], one()).prop_map(|(budget, failing)| Op::Trim { budget, failing }),
        1 => (0..END, 1..20u64, some()).prop_map(|(start, len, failing)| Op::Materialise { start, len, failing }),
        1 => (slot(), one()).prop_map(|(slot, failing)| Op::Remove { slot, failing }),
        2 => (slot(), one()).prop_map(|(slot, failing)| Op::Add { slot, failing }),
        3 => (0..END, 1..20u64, 1..=u8::MAX).prop_map(|(start, len, byte)| Op::Fill { start, len, byte }),
    ]
}

#[derive(Debug, Clone, Copy, Default)]
struct Page {
    exists: bool,
    private: bool,
    /// What its private and its shared side hold; a side that was given up holds nothing.
    holds: [u8; 2],
}

struct Model {
    pages: Vec<Page>,
    ids: [Option<SlotId>; SLOTS.len()],
    never: bool,
}

impl Model {
    fn page(&mut self, gfn: u64) -> &mut Page {
        &mut self.pages[usize::try_from(gfn).unwrap()]
    }

    fn of(&self, gfn: u64) -> Page {
        self.pages[usize::try_from(gfn).unwrap()]
    }

    fn flip(&mut self, gfn: u64) {
        let never = self.never;
        let page = self.page(gfn);
        if !never {
            page.holds[usize::from(!page.private)] = 0;
        }
        page.private = !page.private;
    }

    /// What the guest sees.
    fn visible(&self, gfn: u64) -> u8 {
        let page = self.of(gfn);
        page.holds[usize::from(!page.private)]
    }

    fn existing(&self) -> impl Iterator<Item = u64> {
        (0..END).filter(|gfn| self.of(*gfn).exists)
    }

    fn exists(&mut self, slot: usize, exists: bool) {
        let (start, pages) = SLOTS[slot];
        (start..start + pages).for_each(|gfn| self.page(gfn).exists = exists);
    }
}

fn flat(ranges: &[cvm_memory::addr::GfnRange]) -> Vec<u64> {
    ranges.iter().flat_map(frames).collect()
}

fn convert(world: &World, model: &mut Model, start: u64, end: u64, to: State) {
    let changing: Vec<u64> = model
        .existing()
        .filter(|gfn| (start..end).contains(gfn) && model.of(*gfn).private != (to == Private))
        .collect();
    let hole = (start..end).any(|gfn| gfn >= END || !model.of(gfn).exists);
    match world.convert(start, end, to) {
        Err(ConvertError::Refused(Refusal::Hole { .. })) => assert!(hole && to == Private),
        Ok(_) if hole && to == Private => panic!("a hole became private"),
        Ok(Outcome::Unchanged) => assert!(changing.is_empty()),
        Ok(Outcome::Converted { pages }) => {
            assert!(!changing.is_empty());
            assert_eq!(pages, changing.len() as u64);
            changing.into_iter().for_each(|gfn| model.flip(gfn));
        }
        Ok(Outcome::RolledBack { .. }) => assert!(world.failed() > 0 && !changing.is_empty()),
        Ok(Outcome::Poisoned { done, unmapped, .. }) => {
            assert!(world.failed() > 0);
            let done = flat(&done);
            assert!(done.iter().all(|gfn| changing.contains(gfn)));
            done.into_iter().for_each(|gfn| model.flip(gfn));
            // Another chance for those who listen.
            world.check_but(world.tagged, &flat(&unmapped).into_iter().collect());
            world.arm(&[]);
            for run in &unmapped {
                for to in [Private, Shared] {
                    assert_eq!(world.converted(run.start().get(), run.end().get(), to), run.pages());
                    frames(run).for_each(|gfn| model.flip(gfn));
                }
            }
        }
        other => panic!("{other:?}"),
    }
}

fn step(world: &World, model: &mut Model, op: &Op) {
    match op {
        Op::Convert { start, len, to, failing } => {
            world.arm(failing);
            convert(world, model, *start, start + len, *to);
        }
        Op::Trim { budget, failing } => {
            world.arm(failing);
            let before = world.memory.statistics().deferred_bytes;
            if let Ok(freed) = world.memory.trim(*budget) {
                assert_eq!(world.failed(), 0);
                assert_eq!(world.memory.statistics().deferred_bytes, before - freed);
                assert!(freed >= before.min(*budget));
            } else {
                assert!(world.failed() > 0);
            }
        }
        Op::Materialise { start, len, failing } => {
            world.arm(failing);
            let range = *start..start + len;
            let outcome = world.memory.converter().materialise(gfns(range.start, range.end)).unwrap();
            if world.failed() == 0 {
                assert!(matches!(outcome, Outcome::Converted { .. } | Outcome::Unchanged), "{outcome:?}");
                let kvm = world.attributes();
                assert!(
                    model.existing().filter(|n| range.contains(n)).all(|n| kvm.contains(&n) == model.of(n).private)
                );
            }
        }
        Op::Remove { slot, failing } => {
            let Some(id) = model.ids[*slot] else { return };
            world.arm(failing);
            if world.memory.remove_slot(id).is_ok() {
                model.ids[*slot] = None;
                model.exists(*slot, false);
            } else {
                assert!(world.failed() > 0);
            }
        }
        Op::Add { slot, failing } => {
            if model.ids[*slot].is_some() {
                return;
            }
            world.arm(failing);
            if let Ok(ids) = world.memory.add_slots(vec![world.specs[*slot].clone()]) {
                model.ids[*slot] = Some(ids[0]);
                model.exists(*slot, true);
            } else {
                assert!(world.failed() > 0);
            }
        }
        Op::Fill { start, len, byte } => {
            world.arm(&[]);
            let pages: Vec<u64> = model.existing().filter(|gfn| (*start..start + len).contains(gfn)).collect();
            world.memory.converter().materialise(gfns(*start, start + len)).unwrap().converted().unwrap();
            world.guest_fill(pages.iter().copied(), |_| *byte);
            for gfn in pages {
                let page = model.page(gfn);
                page.holds[usize::from(!page.private)] = *byte;
            }
        }
    }
}

fn agree(world: &World, model: &Model) {
    world.check(world.tagged);
    let declared = world.memory.converter().declared();
    for (start, pages) in SLOTS {
        // Whether it is memory at the moment or not.
        for n in start..start + pages {
            assert_eq!(declared.contains(gfn(n)), model.of(n).private, "gfn {n:#x}");
        }
    }
    assert!(world.convertible().into_iter().collect::<BTreeSet<_>>().into_iter().eq(model.existing()));
    let kvm = world.attributes();
    let reachable = model.existing().filter(|gfn| kvm.contains(gfn) == model.of(*gfn).private);
    world.guest_check(reachable, |gfn| model.visible(gfn));
}

fn history(config: &Config, ops: &[Op]) {
    let world = World::new(config);
    let mut model = Model {
        pages: vec![Page::default(); usize::try_from(END).unwrap()],
        ids: std::array::from_fn(|id| Some(SlotId { as_id: 0, id: u16::try_from(id).unwrap() })),
        never: config.discard == DiscardPolicy::Never,
    };
    for (slot, (start, pages)) in SLOTS.into_iter().enumerate() {
        model.exists(slot, true);
        (start..start + pages).for_each(|gfn| model.page(gfn).private = config.initial == Private);
    }
    for op in ops {
        step(&world, &mut model, op);
        agree(&world, &model);
    }
    // What was put off is freed in the end, and then no page is held twice.
    world.arm(&[]);
    world.memory.trim(u64::MAX).unwrap();
    assert_eq!(world.memory.statistics().deferred_bytes, 0);
    if !model.never {
        let resident = world.memory.resident();
        let held: u64 = SLOTS.iter().map(|slot| slot.1).sum::<u64>() * 4096;
        assert!(resident.private_bytes.unwrap() + resident.shared_bytes.unwrap() <= held, "{resident:?}");
    }
    world.memory.converter().materialise(gfns(0, END)).unwrap().converted().unwrap();
    agree(&world, &model);
}

fn config(tagged: bool) -> impl Strategy<Value = Config> {
    let policy = prop_oneof![
        Just(DiscardPolicy::Immediate),
        Just(DiscardPolicy::DEFERRED),
        Just(DiscardPolicy::Deferred { budget: 5 * 4096 }),
        Just(DiscardPolicy::Never),
    ];
    (policy, 0..3usize, prop::bool::ANY, prop_oneof![1..6u64, Just(1 << 14)], prop::bool::ANY).prop_map(
        move |(discard, listeners, own_backings, chunk_pages, private)| Config {
            tagged,
            lazy: tagged,
            initial: State::from_private(private),
            discard,
            chunk_pages,
            materialise_pages: 4,
            slots: SLOTS.to_vec(),
            own_backings,
            listeners,
            ..Config::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn where_the_attribute_decides(config in config(false), ops in prop::collection::vec(op(), 1..40)) {
        history(&config, &ops);
    }

    #[test]
    fn where_accesses_say(config in config(true), ops in prop::collection::vec(op(), 1..40)) {
        history(&config, &ops);
    }
}
