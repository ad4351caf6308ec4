//! A guest that converts its pages between shared and private, and a VMM that checks every byte from both sides.
//!
//! The skeleton of a VMM is in this file: [`run`] makes a VM, gives it memory, and lets its vCPUs go; [`Cpu::perform`] is
//! the loop around a vCPU, which leaves everything about memory to `VcpuExits::handle`. What the guest does is in
//! `workload`, what is checked and against what in `worker` and `model`.
//!
//! ```text
//! cargo run --release --example convert_pages -- --workload swiotlb --vcpus 4
//! ```
//!
//! The exit status is 0 only if every check held.

mod args;
mod backend;
mod devices;
mod model;
mod ram;
mod report;
mod rmp;
mod snp;
mod td;
mod worker;
mod workload;

use std::error::Error;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use cvm_memory::addr::GfnRange;
use cvm_memory::convert::Listener;
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::hypervisor::{Exit, MemoryFault, Vcpu};
use cvm_memory::memory::CvmMemory;
use cvm_memory::prefault::PrefaultOptions;
use cvm_memory_testkit::{Guest, GuestOp, Outcome, chain};
use hdrhistogram::Histogram;
use nix::errno::Errno;

use args::Args;
use backend::Backend;
use devices::Devices;
use ram::Ram;
use report::Report;
use worker::{Surroundings, Worker, on_all};

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    let args = Args::from_command_line();
    let report = run(&args).and_then(|report| report.print(args.json).map(|()| report));
    match report {
        Ok(report) if report.mismatches == 0 => ExitCode::SUCCESS,
        Ok(report) => {
            eprintln!("error: {} mismatches", report.mismatches);
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<Report, Failure> {
    let started = Instant::now();
    let backend = Backend::new(args)?;
    let ram = Arc::new(Ram::new(backend.vm().as_ref(), args.memory, args.slots.into())?);
    let memory = Arc::new(build(args, &backend, &ram)?);
    let devices = Arc::new(Devices::new(&ram));
    let listener: Arc<dyn Listener> = devices.clone();
    memory.add_listener(&listener)?;
    let mut workers =
        worker::crew(args, &Surroundings { backend: &backend, memory: &memory, ram: &ram, devices: &devices })?;
    let mut vcpus: Vec<&mut dyn Vcpu> = workers.iter_mut().map(|worker| worker.cpu.vcpu()).collect();
    backend.launch(&memory, &mut vcpus)?;
    let mut table = rmp::Checks::default();
    table.count(&backend);
    if args.prefault {
        let options = PrefaultOptions::default();
        memory.prefault(&memory.private_memory(), &mut vcpus, &options, &mut |_| ControlFlow::Continue(()))?;
    }

    table.count(&backend);
    table.check(&mut workers, rmp::Phase::Launched { prefaulted: args.prefault });

    let bar = report::progress(args);
    bar.set_message("filling memory");
    on_all(&mut workers, Worker::fill);
    table.check(&mut workers, rmp::Phase::Used);
    bar.set_message("converting");
    on_all(&mut workers, |worker| worker.work(&bar));
    // Before everything is looked at, which allocates what has never been touched.
    let (statistics, picture) = (memory.statistics(), report::picture(&memory, &ram));
    table.check(&mut workers, rmp::Phase::Used);

    bar.set_message("looking at every page");
    on_all(&mut workers, Worker::sweep);
    table.check(&mut workers, rmp::Phase::Used);
    worker::check_common(&mut workers);
    table.check(&mut workers, rmp::Phase::AllUsed);
    table.count(&backend);
    bar.finish_and_clear();
    Ok(Report::new(args, &backend, statistics, picture, &table, &workers, started.elapsed()))
}

/// The library owns the guest's memory from here on.
fn build(args: &Args, backend: &Backend, ram: &Ram) -> Result<CvmMemory, Failure> {
    let mut builder = CvmMemory::builder().discard(args.discard_policy());
    if let Some(when) = args.materialise() {
        builder = builder.materialise(when);
    }
    for spec in ram.specs() {
        builder = builder.slot(spec);
    }
    Ok(backend.extend(builder, args.vcpus.into()).build(backend.vm())?)
}

/// A vCPU, and what handles its exits.
struct Cpu {
    guest: Box<dyn Guest>,
    memory: Arc<CvmMemory>,
    exits: VcpuExits,
    /// Of the exits that converted pages, in nanoseconds.
    latency: Histogram<u64>,
    implicit: Implicit,
}

/// Memory faults that converted a page, because it was accessed in the state it was not in.
#[derive(Debug, Clone, Copy, Default)]
struct Implicit {
    to_private: u64,
    to_shared: u64,
}

impl Cpu {
    fn vcpu(&mut self) -> &mut dyn Vcpu {
        self.guest.as_mut()
    }

    /// Has the guest do `op`, and serves it until that is done.
    fn perform(&mut self, op: GuestOp) -> Result<Outcome, Failure> {
        self.guest.start(op);
        loop {
            let mut exit = match self.guest.run() {
                Ok(Exit::Halt) => match self.guest.result() {
                    Some(outcome) => return Ok(outcome),
                    // A guest that takes several steps halts after each.
                    None => continue,
                },
                Ok(exit) => exit,
                Err(Errno::EINTR | Errno::EAGAIN) => continue,
                Err(errno) => return Err(format!("KVM_RUN: {errno}").into()),
            };
            let fault = match &exit {
                Exit::MemoryFault(fault) => Some(fault.flags & MemoryFault::PRIVATE != 0),
                _ => None,
            };
            let left = Instant::now();
            match self.exits.handle(&mut exit) {
                Action::Resume(Handled::Converted { .. }) => {
                    self.latency.record(u64::try_from(left.elapsed().as_nanos())?)?;
                    match fault {
                        Some(true) => self.implicit.to_private += 1,
                        Some(false) => self.implicit.to_shared += 1,
                        None => {}
                    }
                }
                Action::Resume(_) => {}
                Action::Prefault(gpa) => {
                    let (page, options) = (GfnRange::page(gpa.gfn()), PrefaultOptions::default());
                    let go_on = &mut |_| ControlFlow::Continue(());
                    self.memory.prefault(&[page], &mut [self.guest.as_mut()], &options, go_on)?;
                }
                // A VMM has devices to ask here; this guest has none.
                Action::NotOurs => return Err(format!("unexpected exit: {exit:?}").into()),
                Action::GuestError(error) => return Err(error.into()),
                stop @ (Action::HwPoison(_) | Action::Stuck(_) | Action::Unresolvable(_) | Action::Poisoned(_)) => {
                    return Err(format!("the vCPU cannot go on: {stop:?}").into());
                }
            }
        }
    }
}
