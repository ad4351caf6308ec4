//! Every step of every plan fails, and so does every step of undoing it.

use std::cell::{Cell, RefCell};

use nix::errno::Errno;

use super::model::{Table, geometries};
use super::*;

/// KVM's table of slots, and which calls are to fail.
struct Kvm {
    table: RefCell<Table>,
    calls: Cell<usize>,
    /// As positions in the order of calls.
    failing: Vec<usize>,
}

impl Kvm {
    fn new(layout: &Layout, failing: Vec<usize>) -> Self {
        Self { table: RefCell::new(Table::new(layout)), calls: Cell::new(0), failing }
    }

    fn slots(&self) -> Vec<Memslot> {
        let mut slots: Vec<_> = self.table.borrow().0.values().copied().collect();
        slots.sort_by_key(|slot| slot.gfns.start());
        slots
    }
}

impl Effects for Kvm {
    fn step(&self, step: &Step) -> Result<(), Errno> {
        let call = self.calls.replace(self.calls.get() + 1);
        if self.failing.contains(&call) {
            return Err(Errno::ENOMEM);
        }
        // As KVM does: what overlaps is refused. Anything else that is wrong panics.
        let table = &mut self.table.borrow_mut();
        if let Step::Create(slot) | Step::Move { slot, .. } = step
            && table.0.values().any(|other| other.id != slot.id && other.gfns.overlaps(&slot.gfns))
        {
            return Err(Errno::EEXIST);
        }
        table.apply(step);
        Ok(())
    }
}

/// Edits of which the plans have up to eight steps, of all kinds.
fn edits() -> Vec<(Layout, Plan)> {
    let mut numbers = Numbers(11);
    let all = geometries();
    let mut edits = Vec::new();
    let kinds = [SlotFlags::empty(), SlotFlags::LOG_DIRTY, SlotFlags::READONLY];
    for _ in 0..400 {
        let mut pick = |flags: bool| -> Vec<Slot> {
            let geometry = &all[usize::try_from(numbers.below(all.len() as u64)).unwrap()];
            let slot = |&(start, end): &(u64, u64)| {
                let flags = if flags { kinds[usize::try_from(numbers.below(3)).unwrap()] } else { kinds[0] };
                Slot { start, pages: end - start, host: start + numbers.below(3), flags }
            };
            geometry.iter().map(slot).collect()
        };
        let layout = layout_of(Limits::default(), &pick(true));
        let new = pick(true);
        let mut draft = draft_of(&layout);
        let regions = new.iter().map(|slot| region(slot.start, slot.end(), slot.host, slot.flags)).collect();
        draft.apply(Operation::ReplaceAll(regions)).unwrap();
        for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
            let plan = plan(&layout, &draft, prefer).unwrap();
            if (1..=8).contains(&plan.steps.len()) {
                edits.push((layout.clone(), plan));
            }
        }
    }
    assert!(
        ["delete", "create", "move", "set flags"]
            .iter()
            .all(|kind| edits.iter().any(|(_, p)| kinds_of(p).contains(kind)))
    );
    assert!(edits.iter().any(|(_, plan)| plan.steps.len() == 8));
    edits
}

fn kinds_of(plan: &Plan) -> Vec<&'static str> {
    kinds(plan)
}

/// T14, for every plan and every step: the old layout is back, ids and flags included.
#[test]
fn t14_a_failure_at_any_step_restores_the_old_layout() {
    for (layout, plan) in edits() {
        let old: Vec<_> = layout.table().slots().copied().collect();
        for failing in 0..plan.steps.len() {
            let kvm = Kvm::new(&layout, vec![failing]);
            let failed = commit(&plan.steps, &kvm).unwrap_err();
            assert_eq!((failed.at, failed.errno, failed.left.as_slice()), (failing, Errno::ENOMEM, [].as_slice()));
            assert_eq!(kvm.slots(), old);
            assert_eq!(failed.layout(&layout).unwrap(), layout);
            assert_eq!(kvm.calls.get(), 2 * failing + 1, "each step is taken back once");
        }
        let kvm = Kvm::new(&layout, Vec::new());
        commit(&plan.steps, &kvm).unwrap();
        assert_eq!(kvm.slots(), plan.layout.table().slots().copied().collect::<Vec<_>>());
    }
}

/// Undoing fails as well, at any one step or at all of them: what is left is said, and it is what KVM has.
#[test]
fn what_cannot_be_restored_is_said_precisely() {
    let mut left = 0;
    for (layout, plan) in edits() {
        for failing in 1..plan.steps.len() {
            let all = (failing..=2 * failing).collect();
            for second in (1..=failing).map(|undo| vec![failing, failing + undo]).chain([all]) {
                let kvm = Kvm::new(&layout, second);
                let failed = commit(&plan.steps, &kvm).unwrap_err();
                assert!(!failed.left.is_empty());
                left += failed.left.len();
                let after = failed.layout(&layout).unwrap();
                assert_eq!(after.table().slots().copied().collect::<Vec<_>>(), kvm.slots());
            }
        }
    }
    assert!(left > 1_000);
}
