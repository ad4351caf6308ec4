//! What planning an edit costs beside the least that any plan must do (sort its keys) and beside a map of ranges; and how many
//! calls and stops of the vCPUs an edit takes beside deleting all slots and adding all.
//!
//! All candidates take turns in each round, and ratios are medians of the ratios of a round. The keys that are sorted are the
//! operations' first frames, in memory beforehand. `edit::steps` is planning: a draft is begun, every operation is held against
//! the layout and those before it, and the calls come out with their ids. The map of ranges does less: it refuses nothing and
//! gives no ids. `edit::plan` also makes the layout that they lead to, with every check that KVM makes, as only a commit needs
//! it. The program starts itself anew with an allocator that keeps its memory: otherwise half of what is measured is the
//! kernel clearing pages that the round before gave back. `CVM_BENCH_GATE=1` fails if a goal is missed. Counts are exact, and
//! the same on every machine; the software KVM carries the edits out.

#![allow(missing_docs, reason = "a program")]

use std::hint::black_box;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Instant;

use cvm_memory::addr::{Gfn, GfnRange};
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::edit::{self, Draft, Operation, Prefer, Region, plan};
use cvm_memory::layout::{Layout, Limits, Memslot, SlotFlags, SlotId};
use cvm_memory::memory::{CommitOptions, CvmMemory, Edit, EditError, SlotSpec};
use cvm_memory::soft::SoftVm;
use cvm_memory_benches::{Rng, is_quick, median, ratio, verdict};
use rangemap::RangeMap;

const SLOTS: u64 = 8_000;
const EACH: u64 = 5_000;
const PAGES: u64 = 16;

/// Slot `at` of a layout in which every other place is free.
fn region(at: u64, host: u64) -> Region {
    let gfns = GfnRange::with_len(Gfn::new(at * PAGES).expect("a frame"), PAGES).expect("a range");
    Region { gfns, hva: host + at * PAGES * 4096, mapping: host, flags: SlotFlags::empty(), binding: None }
}

const HOST: u64 = 1 << 40;

/// 5,000 of the slots go, and 5,000 come between the others, in no order.
fn operations(rng: &mut Rng) -> Vec<Operation> {
    let mut old: Vec<u64> = (0..SLOTS).map(|at| 2 * at).collect();
    let mut new: Vec<u64> = (0..SLOTS).map(|at| 2 * at + 1).collect();
    rng.shuffle(&mut old);
    rng.shuffle(&mut new);
    let count = usize::try_from(EACH).expect("a count");
    let deleted = old.iter().take(count).map(|at| Operation::Delete(region(*at, HOST).gfns));
    let created = new.iter().take(count).map(|at| Operation::Create(region(*at, HOST)));
    let mut operations: Vec<Operation> = deleted.chain(created).collect();
    rng.shuffle(&mut operations);
    operations
}

fn key(operation: &Operation) -> u64 {
    match operation {
        Operation::Delete(gfns) => gfns.start().get(),
        Operation::Create(region) => region.gfns.start().get(),
        _ => 0,
    }
}

/// What a map of ranges does for the same: every piece with its offset to the host, and then what differs from before.
fn with_rangemap(before: &RangeMap<u64, u64>, operations: &[Operation]) -> usize {
    let mut map = before.clone();
    for operation in operations {
        match operation {
            Operation::Delete(gfns) => map.remove(gfns.start().get()..gfns.end().get()),
            Operation::Create(region) => {
                let gfns = region.gfns;
                map.insert(gfns.start().get()..gfns.end().get(), region.hva.wrapping_sub(gfns.start_byte()));
            }
            _ => {}
        }
    }
    let gone = before.iter().filter(|(range, _)| map.get_key_value(&range.start).is_none_or(|(now, _)| now != *range));
    let come = map.iter().filter(|(range, _)| before.get_key_value(&range.start).is_none_or(|(was, _)| was != *range));
    gone.count() + come.count()
}

fn timed<T>(work: impl FnOnce() -> T) -> f64 {
    let start = Instant::now();
    black_box(work());
    start.elapsed().as_secs_f64()
}

/// At most so many times the sort, and at least so many times as fast as the map of ranges.
const GOALS: (f64, f64) = (5.0, 6.0);

/// Returns whether the goals were reached.
fn planning(rounds: usize) -> bool {
    let mut rng = Rng::new(1);
    let slots = (0..SLOTS).map(|at| region(2 * at, HOST).slot(SlotId::new(u16::try_from(at).expect("an id"))));
    let layout = Layout::from_slots(Limits::default(), [], slots).expect("a layout");
    let map: RangeMap<u64, u64> =
        layout.table().slots().map(|slot| (slot.gfns.start().get()..slot.gfns.end().get(), HOST)).collect();
    let mut times: [Vec<f64>; 4] = Default::default();
    let mut steps = 0;
    for round in 0..=rounds {
        let operations = operations(&mut rng);
        let mut keys: Vec<u64> = operations.iter().map(key).collect();
        let copy = operations.clone();
        let sorted = timed(|| keys.sort_unstable());
        let planned = timed(|| {
            let mut draft = Draft::new(&layout, 0, |_: &Memslot| HOST);
            draft.apply_all(copy).expect("operations that make sense");
            edit::steps(&layout, &draft, Prefer::NoInterruption).expect("steps")
        });
        let copy = operations.clone();
        let whole = timed(|| {
            let mut draft = Draft::new(&layout, 0, |_: &Memslot| HOST);
            draft.apply_all(copy).expect("operations that make sense");
            let plan = plan(&layout, &draft, Prefer::NoInterruption).expect("a plan");
            steps = plan.steps.len();
            plan
        });
        let mapped = timed(|| with_rangemap(&map, &operations));
        if round > 0 {
            times.iter_mut().zip([sorted, planned, mapped, whole]).for_each(|(times, time)| times.push(time));
        }
    }
    let [sorted, planned, mapped, whole] = &times;
    println!("{} operations over {SLOTS} slots, {steps} calls planned; ns per operation, median and best:", 2 * EACH);
    for (name, times) in
        [("sort_unstable", sorted), ("edit::steps", planned), ("rangemap", mapped), ("edit::plan", whole)]
    {
        let best = times.iter().copied().fold(f64::INFINITY, f64::min);
        let each = |time: f64| time * 1e9 / (2 * EACH) as f64;
        println!("  {name:<16} {:>8.1} {:>8.1}", each(median(times.clone())), each(best));
    }
    let (floor, peer) = (ratio(planned, sorted), ratio(mapped, planned));
    let (most, least) = GOALS;
    let met = floor <= most && peer >= least;
    println!("  {floor:.2} times the sort, {peer:.2} times as fast as rangemap");
    let verdict = if met { "reached" } else { "MISSED" };
    println!("  goals {verdict}: at most {most} times the sort, at least {least} times as fast as rangemap");
    met
}

type Ask = fn(&mut Edit<'_>) -> Result<(), EditError>;

/// What an edit takes, on 64 slots of 1 MiB.
fn counts() {
    const MIB: u64 = 1 << 20;
    let edits: [(&str, Ask); 7] = [
        ("split", |edit| edit.split(10 * MIB + 0x8000).map(drop)),
        ("merge two", |edit| edit.merge(10 * MIB, 2 * MIB).map(drop)),
        ("truncate the last", |edit| edit.truncate(63 * MIB, 0x8_0000).map(drop)),
        ("grow the last", |edit| edit.grow(63 * MIB, 2 * MIB).map(drop)),
        ("punch a hole", |edit| edit.punch_hole(20 * MIB + 0x8000, 0x8000).map(drop)),
        ("move one away", |edit| edit.move_to(30 * MIB, MIB, 1 << 30).map(drop)),
        ("log all", |edit| edit.set_flags(0, 64 * MIB, SlotFlags::LOG_DIRTY).map(drop)),
    ];
    println!("\n{:<20} {:>6} {:>6}   delete-all-add-all: calls, stops", "64 slots", "calls", "stops");
    for (name, ask) in edits {
        let backing: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(65 * MIB).expect("memory"));
        let slots = (0..64).map(|at| SlotSpec {
            id: None,
            gpa: at * MIB,
            size: MIB,
            shared: SharedSlice { backing: Arc::clone(&backing), offset: at * MIB },
            private: None,
            flags: SlotFlags::empty(),
        });
        let builder = slots.fold(CvmMemory::builder(), |builder, slot| builder.slot(slot));
        let memory = builder.build(Arc::new(SoftVm::default_type())).expect("memory");
        let mut edit = memory.edit();
        ask(&mut edit).expect("an edit that makes sense");
        let done = edit.commit(&CommitOptions::default()).expect("an edit that succeeds");
        println!(
            "{name:<20} {:>6} {:>6}   {:>6} {:>6}",
            done.steps.len(),
            memory.gate().closures(),
            done.naive_calls,
            1
        );
    }
}

/// Has the allocator keep what it has. It reads this when a program starts.
fn keep_memory() {
    const NAME: &str = "GLIBC_TUNABLES";
    if std::env::var_os(NAME).is_none() {
        let program = std::env::current_exe().expect("the path of this program");
        let mut again = Command::new(program);
        again.args(std::env::args_os().skip(1));
        again.env(NAME, "glibc.malloc.trim_threshold=1073741824:glibc.malloc.mmap_threshold=1073741824");
        // Returns only if it fails; then the figures are worse, and nothing else is.
        eprintln!("{}", again.exec());
    }
}

fn main() -> ExitCode {
    keep_memory();
    let met = planning(if is_quick() { 3 } else { 200 });
    counts();
    verdict(met)
}
