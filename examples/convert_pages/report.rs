//! What came of it: a table and a picture for people, one JSON object for programs.

use std::io::IsTerminal;
use std::time::Duration;

use clap::ValueEnum;
use cvm_memory::hypervisor::Platform;
use cvm_memory::memory::{CvmMemory, Statistics};
use cvm_memory::stats::Syscalls;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::Failure;
use crate::args::{Args, MaterialiseChoice};
use crate::backend::Backend;
use crate::ram::Ram;
use crate::rmp::Checks;
use crate::worker::Worker;

/// Characters per slot.
const WIDTH: u64 = 64;

#[derive(Debug, Serialize)]
pub struct Report {
    backend: &'static str,
    vm_type: &'static str,
    memory_bytes: u64,
    slots: u16,
    vcpus: u16,
    workload: String,
    discard: String,
    materialise: String,
    prefault: bool,
    seed: u64,
    /// What the guest set out to do, and what the library was asked for on the way.
    requests: u64,
    conversions: u64,
    pages_requested: u64,
    pages_converted: u64,
    pages_unchanged: u64,
    syscalls: Calls,
    naive_syscalls: Calls,
    faults: Faults,
    implicit_conversions: ImplicitConversions,
    /// How often the platform's table of pages was held against the record, and pages in it; none where nobody can look.
    table: Option<Table>,
    /// Pages whose every byte was compared, from whichever side.
    pages_verified: u64,
    /// Pages that came back with what the guest had left in them.
    stale_pages: u64,
    pub mismatches: u64,
    resident: Resident,
    deferred_bytes: u64,
    conversion_latency_ns: Latency,
    elapsed_ms: u64,
    #[serde(skip)]
    picture: String,
}

#[derive(Debug, Serialize)]
struct Calls {
    set_memory_attributes: u64,
    punch_hole: u64,
    discard_shared: u64,
    allocate: u64,
    pre_fault: u64,
    set_user_memory_region2: u64,
}

impl From<Syscalls> for Calls {
    fn from(calls: Syscalls) -> Self {
        Self {
            set_memory_attributes: calls.set_memory_attributes,
            punch_hole: calls.punch_hole,
            discard_shared: calls.discard_shared,
            allocate: calls.allocate,
            pre_fault: calls.pre_fault,
            set_user_memory_region2: calls.set_user_memory_region2,
        }
    }
}

#[derive(Debug, Serialize)]
struct Faults {
    private: u64,
    shared: u64,
    /// Pages whose attribute was set by a private fault, ahead of a prefault, or with their slot.
    materialised: u64,
}

/// Of pages that the guest accessed in the state they were not in, by memory faults.
#[derive(Debug, Serialize)]
struct ImplicitConversions {
    to_private: u64,
    to_shared: u64,
}

#[derive(Debug, Serialize)]
struct Table {
    phases: u64,
    pages: u64,
    /// Pages that came into it by a prefault.
    prefaulted: u64,
    /// Pages that came into it when they were first used.
    lazily: u64,
}

#[derive(Debug, Serialize)]
struct Resident {
    private_bytes: Option<u64>,
    shared_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Latency {
    p50: u64,
    p99: u64,
}

impl Report {
    pub fn new(
        args: &Args,
        backend: &Backend,
        statistics: Statistics,
        picture: String,
        table: &Checks,
        workers: &[Worker<'_>],
        elapsed: Duration,
    ) -> Self {
        let Statistics { requests, issued, naive, deferred_bytes, resident, .. } = statistics;
        let platform = backend.vm().platform();
        let sum = |of: fn(&Worker<'_>) -> u64| workers.iter().map(of).sum();
        Self {
            backend: backend.name(),
            vm_type: platform.name,
            memory_bytes: args.memory,
            slots: args.slots,
            vcpus: args.vcpus,
            workload: name(&args.workload),
            discard: name(&args.discard),
            materialise: name(&args.materialise.unwrap_or(default_materialise(platform))),
            prefault: args.prefault,
            seed: args.seed,
            requests: sum(|worker| worker.done),
            conversions: requests.requests,
            pages_requested: requests.pages_requested,
            pages_converted: requests.pages_converted,
            pages_unchanged: requests.pages_unchanged,
            syscalls: issued.into(),
            naive_syscalls: naive.into(),
            faults: Faults {
                private: requests.private_faults,
                shared: requests.shared_faults,
                materialised: requests.pages_materialised,
            },
            implicit_conversions: ImplicitConversions {
                to_private: sum(|worker| worker.cpu.implicit.to_private),
                to_shared: sum(|worker| worker.cpu.implicit.to_shared),
            },
            table: (table.phases > 0).then(|| {
                let (prefaulted, lazily) = table.assigned();
                Table { phases: table.phases, pages: table.pages, prefaulted, lazily }
            }),
            pages_verified: sum(|worker| worker.verified),
            stale_pages: sum(|worker| worker.stale),
            mismatches: sum(|worker| worker.mismatches),
            resident: Resident { private_bytes: resident.private_bytes, shared_bytes: resident.shared_bytes },
            deferred_bytes,
            conversion_latency_ns: latency(workers),
            elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            picture,
        }
    }

    pub fn print(&self, json: bool) -> Result<(), Failure> {
        if json {
            println!("{}", serde_json::to_string(self)?);
        } else {
            self.table();
        }
        Ok(())
    }

    fn table(&self) {
        let Self { syscalls: issued, naive_syscalls: naive, faults, resident, conversion_latency_ns: latency, .. } =
            self;
        println!("{}", self.picture);
        line(
            "guest",
            format_args!(
                "{} on {} ({}), {} slots, {} vCPUs",
                Bytes(Some(self.memory_bytes)),
                self.backend,
                self.vm_type,
                self.slots,
                self.vcpus
            ),
        );
        line(
            "workload",
            format_args!(
                "{}, seed {}; discard {}, materialise {}{}",
                self.workload,
                self.seed,
                self.discard,
                self.materialise,
                if self.prefault { ", prefault" } else { "" }
            ),
        );
        line("requests", format_args!("{} ({} conversions)", self.requests, self.conversions));
        line("pages requested", self.pages_requested);
        line("pages converted", self.pages_converted);
        line("pages unchanged", self.pages_unchanged);
        line(
            "faults",
            format_args!(
                "{} private, {} shared; {} pages materialised",
                faults.private, faults.shared, faults.materialised
            ),
        );
        let ImplicitConversions { to_private, to_shared } = self.implicit_conversions;
        line("conversions by faults", format_args!("{to_private} to private, {to_shared} to shared"));
        if let Some(Table { phases, pages, prefaulted, lazily }) = &self.table {
            line("pages into the rmp", format_args!("{prefaulted} prefaulted, {lazily} when used"));
            line("rmp", format_args!("as the record has it, {phases} times, {pages} pages"));
        }
        println!("{:<24}{:>12}{:>16}", "system calls", "issued", "page by page");
        for (call, issued, naive) in [
            ("set_memory_attributes", issued.set_memory_attributes, naive.set_memory_attributes),
            ("punch_hole", issued.punch_hole, naive.punch_hole),
            ("discard_shared", issued.discard_shared, naive.discard_shared),
            ("allocate", issued.allocate, naive.allocate),
            ("pre_fault", issued.pre_fault, naive.pre_fault),
            ("set_user_memory_region2", issued.set_user_memory_region2, naive.set_user_memory_region2),
        ] {
            println!("  {call:<24}{issued:>10}{naive:>16}");
        }
        line("conversion latency", format_args!("p50 {} ns, p99 {} ns", latency.p50, latency.p99));
        line(
            "resident",
            format_args!(
                "{} private, {} shared; {} left to be freed",
                Bytes(resident.private_bytes),
                Bytes(resident.shared_bytes),
                Bytes(Some(self.deferred_bytes))
            ),
        );
        line("pages verified", self.pages_verified);
        if self.stale_pages > 0 {
            line("pages with old contents", self.stale_pages);
        }
        line("mismatches", self.mismatches);
        line("elapsed", format_args!("{} ms", self.elapsed_ms));
    }
}

fn line(name: &str, value: impl std::fmt::Display) {
    println!("{name:<24}{value}");
}

fn latency(workers: &[Worker<'_>]) -> Latency {
    let mut all = Histogram::<u64>::new(3).ok();
    for worker in workers {
        // Histograms of one precision, which grow, can always be added.
        let _added = all.as_mut().map(|all| all.add(&worker.cpu.latency));
    }
    let at = |quantile| all.as_ref().map_or(0, |all| all.value_at_quantile(quantile));
    Latency { p50: at(0.5), p99: at(0.99) }
}

/// A number of bytes in MiB, if it is known.
struct Bytes(Option<u64>);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "{}.{} MiB", bytes >> 20, (bytes >> 10) % 1024 * 10 / 1024),
            None => f.write_str("unknown"),
        }
    }
}

/// A choice as the user would type it.
fn name(choice: &impl ValueEnum) -> String {
    choice.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

const fn default_materialise(platform: Platform) -> MaterialiseChoice {
    if platform.accesses_carry_privacy { MaterialiseChoice::Lazy } else { MaterialiseChoice::Eager }
}

/// A line of cells for each slot: private, shared, or some of both.
pub fn picture(memory: &CvmMemory, ram: &Ram) -> String {
    let map = memory.map();
    let cell = |(private, pages): (u64, u64)| match private {
        0 => '·',
        _ if private == pages => '█',
        _ => '▒',
    };
    let mut lines = vec![String::from("█ private  · shared  ▒ mixed")];
    for (id, gfns) in ram.slots().enumerate() {
        let cells: String = map.shares(gfns, WIDTH).into_iter().map(cell).collect();
        lines.push(format!("slot {id:<4} {:#x}  {cells}", gfns.start_byte()));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// On stderr, if that is a terminal and a person is to read it.
pub fn progress(args: &Args) -> ProgressBar {
    if args.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:>22} {wide_bar} {pos}/{len} {elapsed}");
    ProgressBar::new(args.requests).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
