//! Random lives of a TD's pages, against a model that knows one thing per page: not there, pending, or the guest's with one
//! byte in it.

mod td_kit;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use cvm_memory::addr::{FilePage, FileRange, Gfn, GfnRange};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Exit, Hypervisor, MemoryFault, PreFaultMemory, Vcpu};
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_tdx::mechanism::{InitVm, TdVm};
use cvm_memory_tdx::model::sept::{Command, Sept, SeptState};
use cvm_memory_tdx::model::{Death, SoftTd, SoftTdVcpu, accept as accepted};
use cvm_memory_tdx::width::Width;
use nix::errno::Errno;
use proptest::prelude::*;
use td_kit::*;

/// Two slots of this many pages side by side, in one file, the second one's part first.
const SLOT: u64 = 8;

#[derive(Debug, Clone)]
enum Op {
    Attributes(u64, u64, bool),
    /// A hole in the memory of these frames.
    Punch(u64, u64),
    Slot(u32),
    Prefault(u64, u64),
    Accept(u64),
    Fill(u64, u8),
    Check(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let page = 0..2 * SLOT;
    let run = (0..2 * SLOT, 1..6_u64).prop_map(|(start, pages)| (start, pages.min(2 * SLOT - start)));
    prop_oneof![
        2 => (run.clone(), any::<bool>()).prop_map(|((start, pages), private)| Op::Attributes(start, pages, private)),
        1 => run.clone().prop_map(|(start, pages)| Op::Punch(start, pages)),
        1 => (0..2_u32).prop_map(Op::Slot),
        2 => run.prop_map(|(start, pages)| Op::Prefault(start, pages)),
        6 => page.clone().prop_map(Op::Accept),
        4 => (page.clone(), any::<u8>()).prop_map(|(page, byte)| Op::Fill(page, byte)),
        3 => page.prop_map(Op::Check),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    Pending,
    Holds(u8),
}

struct World {
    td: SoftTd,
    vcpu: SoftTdVcpu,
    file: GuestMemfd,
    // What should be.
    private: [bool; 16],
    slots: [bool; 2],
    pages: BTreeMap<u64, Page>,
}

impl World {
    fn new() -> Self {
        let (td, vcpu) = initialised(&InitVm::new(Width::Bits52));
        let file = td.create_guest_memfd(2 * SLOT * PAGE, 0).unwrap();
        let mut world = Self { td, vcpu, file, private: [true; 16], slots: [false; 2], pages: BTreeMap::new() };
        set_private(&world.td, gfns(0, 2 * SLOT), true);
        world.toggle(0);
        world.toggle(1);
        world.td.finalize().unwrap();
        world.td.arch().with_sept(Sept::record);
        world
    }

    fn has_slot(&self, page: u64) -> bool {
        self.slots[usize::try_from(page / SLOT).unwrap()]
    }

    fn is_private(&self, page: u64) -> bool {
        self.private[usize::try_from(page).unwrap()]
    }

    fn toggle(&mut self, slot: u32) {
        let (start, present) = (u64::from(slot) * SLOT, &mut self.slots[usize::try_from(slot).unwrap()]);
        let size = if *present { 0 } else { SLOT * PAGE };
        set_slot(&self.td, slot, start * PAGE, size, &self.file, (SLOT - start) * PAGE).unwrap();
        *present = !*present;
        self.pages.retain(|page, _| !(start..start + SLOT).contains(page));
    }

    /// Runs an operation to its end: a result, a private fault, or the VM's death.
    fn run(&mut self, op: GuestOp) -> Result<Result<OpResult, MemoryFault>, Errno> {
        self.vcpu.start(op);
        match self.vcpu.run()? {
            Exit::Halt => {}
            Exit::MemoryFault(fault) => return Ok(Err(fault)),
            other => panic!("{other:?}"),
        }
        Ok(Ok(self.vcpu.take_result().unwrap()))
    }

    /// Carries out `op` on both; false if the guest is dead, as it should be.
    fn step(&mut self, op: &Op) -> bool {
        match *op {
            Op::Attributes(start, pages, private) => {
                set_private(&self.td, gfns(start, start + pages), private);
                for page in start..start + pages {
                    self.private[usize::try_from(page).unwrap()] = private;
                    if !private {
                        self.pages.remove(&page);
                    }
                }
            }
            Op::Punch(start, pages) => {
                for page in start..start + pages {
                    let file_page = (page + SLOT) % (2 * SLOT);
                    let range = FileRange::page(FilePage::new(file_page).unwrap());
                    self.file.punch_hole(range).unwrap();
                    self.pages.remove(&page);
                }
            }
            Op::Slot(slot) => self.toggle(slot),
            Op::Prefault(start, pages) => self.prefault(start, pages),
            Op::Accept(page) => {
                let result = self.run(accept(page * PAGE, 0)).unwrap();
                if !self.is_private(page) || !self.has_slot(page) {
                    assert_eq!(result, Err(fault(page)));
                } else if let Some(Page::Holds(_)) = self.pages.get(&page) {
                    assert_eq!(result, Ok(OpResult::Instruction(accepted::ALREADY_ACCEPTED)));
                } else {
                    assert_eq!(result, Ok(OpResult::Instruction(accepted::SUCCESS)));
                    self.pages.insert(page, Page::Holds(0));
                }
            }
            Op::Fill(page, byte) => {
                let alive = self.touch(page, fill(page * PAGE, PAGE, byte, true));
                if let Some(Page::Holds(held)) = self.pages.get_mut(&page) {
                    *held = byte;
                }
                return alive;
            }
            Op::Check(page) => {
                let held = self.pages.get(&page).copied();
                let byte = if let Some(Page::Holds(byte)) = held { byte } else { 0 };
                return self.touch(page, check(page * PAGE, PAGE, byte, true));
            }
        }
        true
    }

    fn prefault(&mut self, start: u64, pages: u64) {
        let mut range = PreFaultMemory { gpa: start * PAGE, size: pages * PAGE, flags: 0 };
        let result = self.vcpu.pre_fault_memory(&mut range);
        let good = |page: &u64| self.is_private(*page) && self.has_slot(*page);
        // Shared pages have nothing behind them here.
        let done = (start..start + pages).take_while(good).count() as u64;
        assert_eq!(range.size, (pages - done) * PAGE);
        assert_eq!(result.is_ok(), done > 0, "{result:?}");
        for page in start..start + done {
            self.pages.entry(page).or_insert(Page::Pending);
        }
    }

    /// An access to one page that is the guest's, or the end.
    fn touch(&mut self, page: u64, op: GuestOp) -> bool {
        let result = self.run(op);
        if !self.is_private(page) || !self.has_slot(page) {
            assert_eq!(result, Ok(Err(fault(page))));
        } else if let Some(Page::Holds(_)) = self.pages.get(&page) {
            assert_eq!(result, Ok(Ok(OpResult::Done)));
        } else {
            assert_eq!(result, Err(Errno::EIO));
            assert_eq!(self.td.arch().death(), Some(Death::PendingTouch { gfn: gfn(page) }));
            return false;
        }
        true
    }

    fn compare(&self) {
        let found: Vec<_> = self.td.arch().with_sept(|sept| sept.states().collect());
        let state = |page: &Page| match page {
            Page::Pending => SeptState::Pending,
            Page::Holds(_) => SeptState::Present,
        };
        let expected: Vec<(Gfn, SeptState)> = self.pages.iter().map(|(page, what)| (gfn(*page), state(what))).collect();
        assert_eq!(found, expected);
        assert_eq!(self.td.arch().bugs(), []);
        // What the module has and what KVM has mapped are the same frames.
        let mapped: Vec<GfnRange> = self.td.vm().mappings().into_iter().map(|mapping| mapping.gfns).collect();
        assert_eq!(mapped.iter().map(GfnRange::pages).sum::<u64>(), self.pages.len() as u64);
    }
}

fn fault(page: u64) -> MemoryFault {
    MemoryFault { errno: Errno::EFAULT, flags: MemoryFault::PRIVATE, gpa: page * PAGE, size: PAGE }
}

/// vCPUs accept and prefault what the host converts meanwhile, again and again: whoever wins, every command finds what it
/// needs.
#[test]
fn races_are_won_by_somebody() {
    let World { td, vcpu, file, .. } = World::new();
    let other = td.vm().create_vcpu();
    let (stop, met) = (AtomicBool::new(false), AtomicU64::new(0));
    let may_fail = |result: Result<Exit<'_>, Errno>| match result {
        Ok(Exit::Halt | Exit::MemoryFault(_)) => {}
        other => panic!("{other:?}"),
    };
    thread::scope(|scope| {
        let (stop, met, may_fail) = (&stop, &met, &may_fail);
        scope.spawn(move || {
            let mut vcpu = vcpu;
            for round in 0.. {
                vcpu.start(accept(round % 16 * PAGE, 0));
                may_fail(vcpu.run());
                if vcpu.take_result() == Some(OpResult::Instruction(accepted::SUCCESS)) {
                    met.fetch_add(1, Ordering::Relaxed);
                }
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        scope.spawn(move || {
            let mut vcpu = other;
            for round in 0.. {
                vcpu.start(accept((15 - round % 16) * PAGE, 0));
                may_fail(vcpu.run());
                let mut range = PreFaultMemory { gpa: round % 13 * PAGE, size: 3 * PAGE, flags: 0 };
                let _may_fail = vcpu.pre_fault_memory(&mut range);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        // As long as it takes until the guest was served often enough to have met with every change.
        for round in 0_u64.. {
            if round >= 2000 && met.load(Ordering::Relaxed) >= 200 {
                break;
            }
            let start = round * 7 % 13;
            match round % 5 {
                0 => file.punch_hole(FileRange::with_len(FilePage::new(start).unwrap(), 3).unwrap()).unwrap(),
                1 if round % 50 == 1 => {
                    set_slot(&td, 0, 0, 0, &file, 0).unwrap();
                    set_slot(&td, 0, 0, SLOT * PAGE, &file, SLOT * PAGE).unwrap();
                }
                _ => set_private(&td, gfns(start, start + 3), round % 2 == 0),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let arch = td.arch().clone();
    drop((td, file));
    assert_eq!(arch.bugs(), []);
    assert_eq!(arch.death(), None);
    let log = arch.with_sept(Sept::take_log);
    audit(&log);
    let removed = log.iter().filter(|command| matches!(command, Command::Remove(_))).count();
    assert!(removed >= 200, "{removed}: what was accepted is gone");
}

/// Reads the commands as they were issued: what is accessible was added or accepted, what goes was blocked and tracked first.
fn audit(log: &[Command]) {
    let mut pages: BTreeMap<Gfn, SeptState> = BTreeMap::new();
    let mut tracked: BTreeMap<Gfn, bool> = BTreeMap::new();
    for command in log {
        match command {
            Command::Add(_) => panic!("added to a td that runs"),
            Command::Aug(gfn) => assert_eq!(pages.insert(*gfn, SeptState::Pending), None, "{gfn:?}"),
            Command::Accept(gfn) => {
                assert_eq!(pages.insert(*gfn, SeptState::Present), Some(SeptState::Pending), "{gfn:?}");
            }
            Command::Block(gfn) => assert_eq!(tracked.insert(*gfn, false), None, "{gfn:?}"),
            Command::Track => tracked.values_mut().for_each(|tracked| *tracked = true),
            Command::Remove(gfn) => {
                assert_eq!(tracked.remove(gfn), Some(true), "{gfn:?}");
                assert!(pages.remove(gfn).is_some());
            }
        }
    }
    assert!(tracked.is_empty(), "left blocked: {tracked:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn pages_live_as_they_should(ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World::new();
        for op in &ops {
            if !world.step(op) {
                break;
            }
            world.compare();
        }
        let arch = world.td.arch().clone();
        drop(world);
        prop_assert_eq!(arch.with_sept(|sept| sept.states().count()), 0);
        prop_assert_eq!(arch.bugs(), []);
        audit(&arch.with_sept(Sept::take_log));
    }

    /// As above, by a guest that touches only what it has accepted: it never dies.
    #[test]
    fn a_careful_guest_lives(ops in prop::collection::vec(op(), 1..80)) {
        let mut world = World::new();
        for op in &ops {
            if let Op::Fill(page, _) | Op::Check(page) = op {
                let usable = matches!(world.pages.get(page), Some(Page::Holds(_)));
                if world.is_private(*page) && world.has_slot(*page) && !usable {
                    prop_assert!(world.step(&Op::Accept(*page)));
                }
            }
            prop_assert!(world.step(op));
            world.compare();
        }
        prop_assert_eq!(world.td.arch().death(), None);
        audit(&world.td.arch().with_sept(Sept::take_log));
    }
}
