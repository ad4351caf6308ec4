//! What the RMP says, whatever two guests and their VMM do to their memory: against a page-by-page account, after every
//! operation.

#[path = "kit/soft.rs"]
mod soft;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cvm_memory::addr::{FilePage, FileRange, Gfn, GfnRange};
use cvm_memory::convert::{Request, State};
use cvm_memory::edit::Prefer;
use cvm_memory::hypervisor::{Hypervisor as _, MemoryAttributes};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{CommitOptions, CvmMemory, SlotSpec};
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_sev::rmp::Size;
use cvm_memory_sev::soft::{Machine, pvalidate, validated};
use proptest::collection::vec;
use proptest::prelude::*;
use soft::{Guests, launched_on};

const PAGE: u64 = 4096;
const PAGES: u64 = 24;

#[derive(Debug, Clone)]
enum Op {
    /// The guest accepts a page, or gives it back.
    Validate {
        page: u64,
        to: bool,
    },
    /// It writes to a page as if that were shared.
    WriteShared {
        page: u64,
    },
    /// It, or the VMM for it, converts pages.
    Convert {
        page: u64,
        pages: u64,
        to: State,
    },
    /// KVM's attribute goes to shared and back.
    Flip {
        page: u64,
        pages: u64,
    },
    /// A page of the file is freed under the guest.
    Punch {
        page: u64,
    },
    /// All slots go, and come back as they were.
    Replace,
    /// The layout is edited: the same memory, in other slots.
    Split {
        page: u64,
    },
    Merge,
}

fn op() -> impl Strategy<Value = Op> {
    let (page, pages) = (0..PAGES, 1..8_u64);
    prop_oneof![
        6 => (page.clone(), any::<bool>()).prop_map(|(page, to)| Op::Validate { page, to }),
        2 => page.clone().prop_map(|page| Op::WriteShared { page }),
        4 => (page.clone(), pages.clone(), any::<bool>())
            .prop_map(|(page, pages, to)| Op::Convert { page, pages, to: State::from_private(to) }),
        2 => (page.clone(), pages).prop_map(|(page, pages)| Op::Flip { page, pages }),
        1 => page.clone().prop_map(|page| Op::Punch { page }),
        1 => Just(Op::Replace),
        2 => page.prop_map(|page| Op::Split { page }),
        1 => Just(Op::Merge),
    ]
}

fn frames(page: u64, pages: u64) -> GfnRange {
    GfnRange::from_bytes(page * PAGE, pages.min(PAGES - page) * PAGE).unwrap()
}

fn specs(memory: &CvmMemory) -> Vec<SlotSpec> {
    let space = memory.space();
    let spec = |slot: &cvm_memory::layout::Memslot| {
        let (file, range) = slot.file_range().unwrap();
        SlotSpec {
            id: Some(slot.id),
            gpa: slot.gfns.start_byte(),
            size: slot.gfns.bytes(),
            shared: space.shared(slot.id).unwrap().clone(),
            private: Some((Arc::clone(space.file(file).unwrap()), range.start())),
            flags: SlotFlags::empty(),
        }
    };
    space.layout().table().slots().map(spec).collect()
}

/// A guest, and what the RMP should say of its frames: whether they are accepted, if they are in it at all.
struct Account {
    guests: Guests,
    expected: BTreeMap<Gfn, bool>,
}

impl Account {
    fn carry_out(&mut self, op: &Op) {
        let memory = Arc::clone(&self.guests.memory);
        let guest = &mut self.guests.vcpus[0];
        match *op {
            Op::Validate { page, to } => {
                // Whatever state it was in: a page that is accepted is private and assigned before.
                let gfn = Gfn::new(page).unwrap();
                let result = guest.perform(pvalidate(page * PAGE, Size::Small, to)).unwrap();
                let before = self.expected.insert(gfn, to).unwrap_or(false);
                let OpResult::Instruction(result) = result else { panic!("{result:?}") };
                assert_eq!(validated(result), Ok(before != to), "{op:?}");
                assert_eq!(memory.state(gfn), Some(State::Private));
            }
            Op::WriteShared { page } => {
                let gfn = Gfn::new(page).unwrap();
                let told = self.guests.snp.vm().private_gfns().iter().any(|gfns| gfns.contains(gfn));
                guest.write_shared(page * PAGE, b"x").unwrap();
                // Of memory that nobody has used as private yet KVM has not been told that it is.
                if told {
                    self.expected.remove(&gfn);
                    assert_eq!(memory.state(gfn), Some(State::Shared));
                }
            }
            Op::Convert { page, pages, to } => {
                let range = frames(page, pages);
                memory.convert(&Request { range, to }).unwrap().converted().unwrap();
                if to == State::Shared {
                    self.expected.retain(|gfn, _| !range.contains(*gfn));
                }
            }
            Op::Flip { page, pages } => {
                let range = frames(page, pages);
                let is_set = |gfn: Gfn| self.guests.snp.vm().private_gfns().iter().any(|gfns| gfns.contains(gfn));
                for gfn in range.iter().filter(|gfn| is_set(*gfn)) {
                    for attributes in [0, 8] {
                        let attributes =
                            MemoryAttributes { address: gfn.start_byte(), size: PAGE, attributes, flags: 0 };
                        self.guests.snp.vm().set_memory_attributes(&attributes).unwrap();
                    }
                }
            }
            Op::Punch { page } => {
                let (file, offset) = memory.reader().lookup(Gfn::new(page).unwrap()).unwrap().file.unwrap();
                let page_of_file = FileRange::page(FilePage::containing(offset));
                memory.space().file(file).unwrap().punch_hole(page_of_file).unwrap();
                self.expected.remove(&Gfn::new(page).unwrap());
            }
            Op::Replace => {
                let specs = specs(&memory);
                specs.iter().for_each(|spec| memory.remove_slot(spec.id.unwrap()).unwrap());
                memory.add_slots(specs).unwrap();
            }
            Op::Split { page } => {
                let mut edit = memory.edit();
                // Refused where there is a boundary already, or nothing to cut.
                if edit.split(page * PAGE).is_ok() {
                    edit.commit(&CommitOptions { prefer: Prefer::FewSlots, ..CommitOptions::default() }).unwrap();
                }
            }
            Op::Merge => {
                let mut edit = memory.edit();
                edit.merge(0, PAGES * PAGE).unwrap();
                edit.commit(&CommitOptions { prefer: Prefer::FewSlots, ..CommitOptions::default() }).unwrap();
            }
        }
    }

    /// What the RMP says of this guest's own memory.
    fn found(&self) -> BTreeMap<Gfn, bool> {
        let asid = self.guests.snp.asid().unwrap();
        let own = |gfn: Gfn| gfn.get() < PAGES;
        self.guests.snp.machine().rmp(|rmp| {
            let entries = rmp.iter().map(|(_, entry)| entry).filter(|entry| entry.asid == asid && own(entry.gfn));
            entries.map(|entry| (entry.gfn, entry.validated)).collect()
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn only_use_assigns_and_only_freeing_takes_back(ops in vec((any::<bool>(), op()), 0..60)) {
        let machine = Machine::new();
        let mut accounts = [0, 1].map(|_| {
            let guests = launched_on(&machine, CvmMemory::builder().ram(0, PAGES * PAGE), 1);
            Account { guests, expected: BTreeMap::new() }
        });
        let others = machine.assigned();
        for (who, op) in ops {
            accounts[usize::from(who)].carry_out(&op);
            for account in &accounts {
                prop_assert_eq!(account.found(), account.expected.clone(), "after {:?} of {}", op, who);
            }
            // One frame of one guest for each page, one page for each frame of a guest; nothing is anybody else's.
            let keys: BTreeSet<_> =
                machine.rmp(|rmp| rmp.iter().map(|(_, entry)| (entry.asid, entry.gfn)).collect());
            prop_assert_eq!(keys.len(), machine.assigned());
            prop_assert_eq!(machine.assigned(), others + accounts.iter().map(|account| account.expected.len()).sum::<usize>());
            prop_assert_eq!(machine.counters().failed, 0);
        }
        // What is not accepted any more, or not yet, cannot be used.
        for account in &mut accounts {
            for (gfn, valid) in account.expected.clone() {
                let read = GuestOp::Read { gpa: gfn.start_byte(), len: 1, private: true };
                let result = account.guests.vcpus[0].perform(read).unwrap();
                prop_assert_eq!(result == OpResult::Exception, !valid, "{:?}: {:?}", gfn, result);
            }
        }
        drop(accounts);
        prop_assert_eq!(machine.assigned(), 0);
    }
}
