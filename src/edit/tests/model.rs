//! What KVM would make of a plan's steps, slot by slot and page by page, written for clarity and nothing else.

use super::*;

pub const PAGES: u64 = 6;

/// What is behind a page: a page of host memory and the flags of its slot.
pub type Page = Option<Host>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Host {
    pub page: u64,
    pub flags: SlotFlagsBits,
}

/// `SlotFlags` does not order; its bits do.
pub type SlotFlagsBits = u32;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot {
    pub start: u64,
    pub pages: u64,
    pub host: u64,
    pub flags: SlotFlags,
}

impl Slot {
    pub fn of(slot: &Memslot) -> Self {
        let (start, pages) = (slot.gfns.start().get(), slot.gfns.pages());
        Self { start, pages, host: slot.hva >> 12, flags: slot.flags }
    }

    pub fn end(&self) -> u64 {
        self.start + self.pages
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// Page by page what slots provide.
pub fn pages_of(slots: &[Slot], count: u64) -> Vec<Page> {
    let page = |gfn| {
        let slot = slots.iter().find(|slot| (slot.start..slot.end()).contains(&gfn))?;
        Some(Host { page: slot.host + (gfn - slot.start), flags: slot.flags.bits() })
    };
    (0..count).map(page).collect()
}

/// The table of slots in KVM: every rule of `kvm_set_memory_region()` that a plan could break.
pub struct Table(pub std::collections::BTreeMap<SlotId, Memslot>);

impl Table {
    pub fn new(layout: &Layout) -> Self {
        Self(layout.table().slots().map(|slot| (slot.id, *slot)).collect())
    }

    fn check_free(&self, slot: &Memslot) {
        for other in self.0.values().filter(|other| other.id != slot.id) {
            assert!(!other.gfns.overlaps(&slot.gfns), "{slot} overlaps {other}");
        }
    }

    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::Delete(slot) => assert_eq!(self.0.remove(&slot.id), Some(*slot)),
            Step::Create(slot) => {
                self.check_free(slot);
                assert_eq!(self.0.insert(slot.id, *slot), None, "the id is in use");
            }
            Step::Move { .. } => {
                let (from, to) = (&step.before().unwrap(), &step.after().unwrap());
                self.check_free(to);
                assert_ne!(from.gfns, to.gfns);
                let read_only = |slot: &Memslot| slot.flags.contains(SlotFlags::READONLY);
                assert_eq!((from.hva, from.gfns.pages(), from.id), (to.hva, to.gfns.pages(), to.id));
                assert_eq!(read_only(from), read_only(to));
                assert!(!from.flags.contains(SlotFlags::GUEST_MEMFD));
                assert_eq!(self.0.insert(to.id, *to), Some(*from));
            }
            Step::SetFlags { .. } => {
                let (from, to) = (&step.before().unwrap(), &step.after().unwrap());
                assert_eq!(from.flags.symmetric_difference(to.flags), SlotFlags::LOG_DIRTY);
                assert!(!from.flags.contains(SlotFlags::GUEST_MEMFD));
                assert_eq!(Memslot { flags: to.flags, ..*from }, *to);
                assert_eq!(self.0.insert(to.id, *to), Some(*from));
            }
        }
    }

    pub fn slots(&self) -> Vec<Slot> {
        let mut slots: Vec<Slot> = self.0.values().map(Slot::of).collect();
        slots.sort_by_key(|slot| slot.start);
        slots
    }
}

/// Carries a plan out, step by step, and checks everything that can be said without knowing the best plan.
pub fn run(layout: &Layout, plan: &Plan, wanted: &[Page]) -> Vec<Slot> {
    let mut table = Table::new(layout);
    let count = wanted.len() as u64;
    let before = pages_of(&table.slots(), count);
    let mut missing = vec![false; wanted.len()];
    let mut created = false;
    for step in &plan.steps {
        assert!(!(created && matches!(step, Step::Delete(_))), "a deletion after a creation");
        created |= matches!(step, Step::Create(_));
        table.apply(step);
        // While a slot moves, it is nowhere.
        let moving = if let Step::Move { slot, from, .. } = step { vec![*from, slot.gfns] } else { Vec::new() };
        for (at, page) in pages_of(&table.slots(), count).iter().enumerate() {
            let in_motion = moving.iter().any(|gfns| gfns.contains(gfn(at as u64)));
            missing[at] |= page.is_none() || in_motion;
        }
    }
    let slots = table.slots();
    assert_eq!(pages_of(&slots, count), wanted);
    let planned: Vec<_> = plan.layout.table().slots().copied().collect();
    let mut real: Vec<_> = table.0.values().copied().collect();
    real.sort_by_key(|slot| slot.gfns.start());
    assert_eq!(planned, real, "the layout that the plan promises");
    // What was missing for a moment and is memory before and after has been announced.
    for at in 0..wanted.len() {
        let replaced = plan.replaced.iter().any(|gfns| gfns.contains(gfn(at as u64)));
        let both = before[at].is_some() && wanted[at].is_some();
        assert_eq!(replaced, both && missing[at], "page {at} of {:?}", plan.steps);
    }
    slots
}

/// Every way to cover pages `[0, PAGES)` in part with slots, as pairs of start and end.
pub fn geometries() -> Vec<Vec<(u64, u64)>> {
    fn extend(from: u64, slots: &mut Vec<(u64, u64)>, all: &mut Vec<Vec<(u64, u64)>>) {
        all.push(slots.clone());
        for start in from..PAGES {
            for end in start + 1..=PAGES {
                slots.push((start, end));
                extend(end, slots, all);
                slots.pop();
            }
        }
    }
    let mut all = Vec::new();
    extend(0, &mut Vec::new(), &mut all);
    all
}

/// Every way to cut `wanted` into slots that continue in memory and flags: each begins wherever `cuts` says so, and none begins
/// or ends within what is `whole`.
pub fn tilings(wanted: &[Page], cuts: &[bool], whole: &[bool]) -> impl Iterator<Item = Vec<Slot>> {
    let continues = |at: usize| match (wanted[at - 1], wanted[at]) {
        (Some(low), Some(high)) => low.page + 1 == high.page && low.flags == high.flags && !cuts[at],
        _ => false,
    };
    let free: Vec<usize> = (1..wanted.len()).filter(|at| continues(*at) && !whole[*at]).collect();
    (0..1_u32 << free.len()).map(move |choice| {
        let chosen = |at| free.iter().position(|free| *free == at).is_some_and(|bit| choice >> bit & 1 == 1);
        let mut slots: Vec<Slot> = Vec::new();
        for (at, host) in wanted.iter().enumerate().filter_map(|(at, page)| page.map(|host| (at, host))) {
            if at != 0 && continues(at) && !chosen(at) {
                slots.last_mut().unwrap().pages += 1;
            } else {
                let flags = SlotFlags::from_bits(host.flags).unwrap();
                slots.push(Slot { start: at as u64, pages: 1, host: host.page, flags });
            }
        }
        slots
    })
}

/// The best cost of any tiling of `wanted` into slots that end at `cuts`: (slots, calls) or (pages interrupted, calls, slots),
/// without moves.
pub fn best(old: &[Slot], wanted: &[Page], cuts: &[bool], prefer: Prefer) -> (u64, u64) {
    let whole = vec![false; wanted.len()];
    let costs = tilings(wanted, cuts, &whole).map(|slots| {
        let same = |a: &Slot, b: &Slot| {
            let fixed = |slot: &Slot| slot.flags.contains(SlotFlags::READONLY);
            (a.start, a.pages, a.host, fixed(a)) == (b.start, b.pages, b.host, fixed(b))
        };
        let kept = |slot: &Slot| old.iter().find(|old| same(old, slot));
        let created = slots.iter().filter(|slot| kept(slot).is_none()).count();
        let flags = slots.iter().filter(|slot| kept(slot).is_some_and(|old| old.flags != slot.flags)).count();
        let gone: Vec<_> = old.iter().filter(|old| !slots.iter().any(|slot| same(old, slot))).collect();
        let interrupted = gone.iter().flat_map(|slot| slot.start..slot.end());
        let interrupted = interrupted.filter(|at| wanted[usize::try_from(*at).unwrap()].is_some()).count();
        let calls = (created + flags + gone.len()) as u64;
        match prefer {
            Prefer::FewSlots => (slots.len() as u64, calls),
            Prefer::NoInterruption => (interrupted as u64, calls),
        }
    });
    costs.min().unwrap()
}

/// The same figures of a plan.
pub fn cost(plan: &Plan, prefer: Prefer) -> (u64, u64) {
    let calls = plan.steps.len() as u64;
    match prefer {
        Prefer::FewSlots => (plan.layout.table().len() as u64, calls),
        Prefer::NoInterruption => (plan.replaced.iter().map(GfnRange::pages).sum(), calls),
    }
}
