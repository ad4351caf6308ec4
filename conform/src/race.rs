//! Two vCPUs, and a thread that converts, punches, deletes and recreates what they stand on.
//!
//! What is seen then depends on who comes first, so two machines cannot be compared with each other. Each is held against an
//! exact condition instead: for every page on its own, there is an order of what was done to it, compatible with when each
//! operation began and ended, in which the contract explains everything that was observed (the page is *linearisable*). That
//! leaves no room for a stale byte, an exit without a reason, or a write that is lost. At the end all pages are read once more,
//! and have to be explained too.
//!
//! Not here: prefaults beside the deletion of a slot on VMs of the default type. Linux 7.3.4 can repeat such a prefault for ever,
//! until a signal comes.

mod order;
mod page;

use std::fmt;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use cvm_memory_testkit::kvm_guest::{SPURIOUS, is_emulated};
use nix::errno::Errno;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::live::{Live, guests};
use crate::machine::Machine;
use crate::observation::{End, Observation, Seen as Exits};
use crate::patience::bounded;
use crate::scenario::{Area, Descriptor, File, Hva, Kind, MMIO_BYTE, Operation};
use order::{Timed, explain};
use page::{Access, Change, Page, Saw};

const PAGE: u64 = 4096;
/// The first page that is fought for.
const BASE: u64 = 0x1000_0000;
/// Pages. Each belongs to one vCPU, in turn, and nobody else writes it.
const PAGES: u64 = 8;
/// Two slots share them, bound at an offset.
const SLOTS: [(u32, u64, u64); 2] = [(1, 0, 4), (2, 4, 8)];
const FILE_OFFSET: u64 = 2;
const FILE: File = File(0);
const GUEST_MEMFD: u32 = 4;
const LOG_DIRTY: u32 = 1;
const PUNCH_HOLE: u32 = 3;
const PRIVATE: u64 = 8;
const VCPUS: u8 = 2;

/// What everybody is told to do, in order.
#[derive(Debug, Clone)]
pub struct Race {
    kind: Kind,
    changes: Vec<Change>,
    accesses: [Vec<(u64, bool)>; 2],
}

/// A page whose history nobody can explain.
#[derive(Debug)]
pub struct Unexplained {
    /// Which race.
    pub seed: u64,
    /// On which machine.
    pub machine: &'static str,
    text: String,
}

impl fmt::Display for Unexplained {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "race {} on {}: no order explains this", self.seed, self.machine)?;
        out.write_str(&self.text)
    }
}

/// The race of one seed.
pub fn race(kind: Kind, seed: u64) -> Race {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let range = (0..PAGES, 1..=PAGES).prop_map(|(start, len)| (start, (start + len).min(PAGES)));
    let slot = select(SLOTS.to_vec());
    let private = prop_oneof![
        4 => (range.clone(), any::<bool>()).prop_map(|((start, end), private)| vec![Change::Attribute { start, end, private }]),
        3 => range.prop_map(|(start, end)| vec![Change::Punch { start, end }]),
        2 => slot.clone().prop_map(|(slot, start, end)| vec![
            Change::Delete { slot, start, end },
            Change::Create { slot, start, end, flags: GUEST_MEMFD },
        ]),
    ];
    let plain = (slot, select(vec![0, LOG_DIRTY])).prop_map(|((slot, start, end), flags)| {
        vec![Change::Delete { slot, start, end }, Change::Create { slot, start, end, flags }]
    });
    let change = if kind == Kind::Default { plain.boxed() } else { private.boxed() };
    // Mostly the same pages over and over, so that what one access leaves is what the next finds.
    let accesses = || vec((0..PAGES / 2, any::<bool>()), 80..160);
    let all = (vec(change, 20..40), accesses(), accesses());
    let (changes, first, second) = all.new_tree(&mut runner).expect("a race").current();
    Race { kind, changes: changes.into_iter().flatten().collect(), accesses: [first, second] }
}

impl Race {
    fn operation(&self, change: Change) -> Operation {
        match change {
            Change::Attribute { start, end, private } => Operation::Attributes {
                gpa: BASE + start * PAGE,
                size: (end - start) * PAGE,
                attributes: if private { PRIVATE } else { 0 },
                flags: 0,
            },
            Change::Punch { start, end } => Operation::Fallocate {
                file: FILE,
                mode: PUNCH_HOLE,
                offset: (FILE_OFFSET + start) * PAGE,
                len: (end - start) * PAGE,
            },
            Change::Delete { slot, .. } => Operation::delete(slot),
            Change::Create { slot, start, end, flags } => Operation::Region {
                slot,
                flags,
                gpa: BASE + start * PAGE,
                size: (end - start) * PAGE,
                hva: Hva::In(Area::Memory(0), start * PAGE),
                file: if self.kind == Kind::Default { Descriptor::None } else { Descriptor::File(FILE) },
                offset: (FILE_OFFSET + start) * PAGE,
            },
        }
    }

    /// Runs it on `live`, which nobody has used, and returns the number of operations.
    ///
    /// # Errors
    /// The first page that cannot be explained.
    ///
    /// # Panics
    /// If a call fails: none has a reason to.
    pub fn run(&self, seed: u64, mut live: Live) -> Result<u64, Box<Unexplained>> {
        let play = |live: &mut Live, operation: &Operation| {
            let answer = bounded(live.name(), operation, || live.play(operation));
            assert_eq!(answer, Observation::Call(Ok(())), "{operation}");
        };
        play(&mut live, &Operation::Create { file: FILE, size: (FILE_OFFSET + PAGES) * PAGE, flags: 0 });
        let flags = if self.kind == Kind::Default { 0 } else { GUEST_MEMFD };
        for (slot, start, end) in SLOTS {
            play(&mut live, &self.operation(Change::Create { slot, start, end, flags }));
        }

        let clock = AtomicU64::new(0);
        let tick = || clock.fetch_add(1, Ordering::SeqCst);
        let together = Barrier::new(3);
        let guests = live.take_guests();
        let (changes, ran) = std::thread::scope(|scope| {
            let vcpus: Vec<_> = guests
                .into_iter()
                .zip(0_u64..)
                .map(|(mut guest, vcpu)| {
                    let (together, tick) = (&together, &tick);
                    scope.spawn(move || {
                        together.wait();
                        let mut log = Vec::new();
                        for (number, (page, write)) in
                            (1_u64..).zip(&self.accesses[usize::try_from(vcpu).expect("two")])
                        {
                            // Half of the pages are this vCPU's.
                            let page = page * 2 % PAGES + vcpu;
                            let access = if *write { Access::Store((vcpu + 1) << 32 | number) } else { Access::Load };
                            let begin = tick();
                            let saw = act(&mut *guest, page, access);
                            log.push((page, Timed { begin, what: (access, saw), end: tick() }));
                        }
                        (guest, log)
                    })
                })
                .collect();
            together.wait();
            let mut changes = Vec::new();
            for change in &self.changes {
                let begin = tick();
                play(&mut live, &self.operation(*change));
                changes.push(Timed { begin, what: *change, end: tick() });
            }
            (changes, vcpus.into_iter().map(|vcpu| vcpu.join().expect("a vCPU")).collect::<Vec<_>>())
        });

        let (mut guests, logs): (Vec<_>, Vec<_>) = ran.into_iter().unzip();
        let mut log: Vec<_> = logs.into_iter().flatten().collect();
        for page in 0..PAGES {
            let begin = tick();
            let saw = act(&mut *guests[0], page, Access::Load);
            log.push((page, Timed { begin, what: (Access::Load, saw), end: tick() }));
        }
        let machine = live.name();
        live.put_guests(guests);
        drop(live);
        for page in 0..PAGES {
            let accesses: Vec<_> = log.iter().filter(|(of, _)| *of == page).map(|(_, access)| access.clone()).collect();
            explain(Page::new(self.kind, page), &changes, &accesses)
                .map_err(|text| Box::new(Unexplained { seed, machine, text: format!("page {page}\n{text}") }))?;
        }
        Ok(changes.len() as u64 + log.len() as u64)
    }
}

/// One instruction of a guest, in the middle of a page.
fn act(guest: &mut dyn cvm_memory_testkit::Guest, page: u64, access: Access) -> Saw {
    let gpa = BASE + page * PAGE + 8;
    let written = if let Access::Store(value) = access { value.to_le_bytes() } else { [0; 8] };
    let operation = match access {
        Access::Load => Operation::Load { vcpu: 0, gpa, len: 8, private: false },
        Access::Store(value) => Operation::Store { vcpu: 0, gpa, len: 8, value, private: false },
    };
    let played = bounded("a racing guest", &operation, || guests::play(guest, &operation));
    let Observation::Guest { seen, end } = played else { return Saw::Other("nothing".into()) };
    if end == End::InternalError && is_emulated() {
        // KVM cannot make out an ordinary move: it was not given one. The race is not judged then.
        SPURIOUS.fetch_add(1, Ordering::Relaxed);
    }
    match (seen.as_slice(), &end) {
        ([], End::Done) => Saw::Stored,
        ([], End::Data(data)) => Saw::Loaded(u64::from_le_bytes(data.as_slice().try_into().expect("8 bytes"))),
        ([], End::Fault { errno: Errno::EFAULT, flags, gpa: at, size }) if (*at, *size) == (gpa - 8, PAGE) => {
            Saw::Fault(*flags)
        }
        ([Exits::MmioRead { gpa: at, len: 8 }], End::Data(data)) if *at == gpa && *data == [MMIO_BYTE; 8] => Saw::Mmio,
        ([Exits::MmioWrite { gpa: at, data }], End::Done) if *at == gpa && *data == written => Saw::Mmio,
        _ => Saw::Other(Observation::Guest { seen, end }.to_string()),
    }
}

/// The number of vCPUs that a race needs.
pub const fn vcpus() -> u8 {
    VCPUS
}
