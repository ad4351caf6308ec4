//! Pre-copy of a running guest's memory: rounds of "what was written meanwhile?" and copying that, then the guest is stopped
//! for the rest, and the copy is held against its memory byte for byte.
//!
//! ```text
//! cargo run --release --example dirty_log -- --mechanism ring --vcpus 2
//! ```
//!
//! The exit status is 0 only if the copy is the memory.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use cvm_memory::addr::{FileRange, PAGE_SIZE};
use cvm_memory::backing::{SharedMemory, SharedSlice};
use cvm_memory::dirty::{
    Clearing, DirtyBitmap, Mechanism, Offer, OwnWrites, Situation, Stage, Tracker, Unloggable, Wish, negotiate,
};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Exit, Hypervisor, Platform};
use cvm_memory::layout::{SlotFlags, SlotId};
use cvm_memory::memory::{CvmMemory, SlotSpec};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Guest, GuestOp, KvmGuest, SoftGuest, chain};
use nix::errno::Errno;

type Failure = Box<dyn Error + Send + Sync>;

/// Where the memory is; beyond what the guests of the test kit have for themselves.
const GPA: u64 = 4 << 30;

/// Copies a running guest's memory in rounds.
#[derive(Debug, Parser)]
struct Args {
    /// Who runs the guest.
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    backend: Backend,
    /// What says which pages were written.
    #[arg(long, value_enum, default_value_t = Choice::Best)]
    mechanism: Choice,
    /// Bytes of each ring.
    #[arg(long, default_value_t = 65536)]
    ring_bytes: u64,
    /// Memory in MiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65536))]
    memory: u64,
    /// vCPUs that write to it.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    vcpus: u64,
    /// Rounds at most, before the guest is stopped.
    #[arg(long, default_value_t = 8)]
    rounds: u32,
    /// Stop the guest once a round copies no more pages than this.
    #[arg(long, default_value_t = 64)]
    enough: u64,
    /// Milliseconds from one round to the next, at least.
    #[arg(long, default_value_t = 20)]
    pause: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Backend {
    /// KVM if there is one, else the software KVM.
    Auto,
    /// The software KVM.
    Soft,
    /// KVM.
    Kvm,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Choice {
    Bitmap,
    ByHand,
    Ring,
    Best,
}

/// The VM, and how it makes vCPUs.
enum Vm {
    Soft(SoftVm),
    Kvm(KvmVm),
}

impl Vm {
    fn new(backend: Backend) -> Result<Self, Failure> {
        let kvm = || -> Result<Self, Failure> {
            let kvm = kvm_ioctls::Kvm::new().map_err(|error| format!("open /dev/kvm: {error}"))?;
            Ok(Self::Kvm(KvmVm::create(&kvm, Platform::DEFAULT)?))
        };
        match backend {
            Backend::Soft => Ok(Self::Soft(SoftVm::default_type())),
            Backend::Kvm => kvm(),
            Backend::Auto => Ok(kvm().unwrap_or_else(|reason| {
                eprintln!("backend: soft, because there is no kvm here: {}", chain(reason.as_ref()));
                Self::Soft(SoftVm::default_type())
            })),
        }
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Soft(_) => "the software KVM",
            Self::Kvm(_) => "kvm",
        }
    }

    fn hypervisor(&self) -> Arc<dyn Hypervisor> {
        match self {
            Self::Soft(vm) => Arc::new(vm.clone()),
            Self::Kvm(vm) => Arc::new(vm.clone()),
        }
    }

    fn guest(&self, id: u64) -> Box<dyn Guest> {
        match self {
            Self::Soft(vm) => Box::new(SoftGuest::new(vm)),
            Self::Kvm(vm) => Box::new(KvmGuest::new(vm, id)),
        }
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    let vm = Vm::new(args.backend)?;
    let hypervisor = vm.hypervisor();

    // Rings have to be enabled before the first vCPU, and whatever cannot work is said here and not when a page is lost.
    let offer = Offer::probe(hypervisor.as_ref());
    let situation =
        Situation { has_vcpus: false, has_slots: false, kernel_devices: false, own_writes: OwnWrites::None };
    let wish = match args.mechanism {
        Choice::Bitmap => Wish::Bitmap(Clearing::ByLooking),
        Choice::ByHand => Wish::Bitmap(Clearing::ByHandFromAll),
        Choice::Ring => Wish::Ring { bytes: args.ring_bytes },
        Choice::Best => Wish::Best,
    };
    let choice = negotiate(&offer, &situation, wish)?;
    choice.mechanism.enable(hypervisor.as_ref(), &offer)?;
    println!("on {}: {:?}", vm.name(), choice.mechanism);
    choice.passed_over.iter().for_each(|refusal| println!("  not better, because {refusal}"));

    let size = args.memory << 20;
    let ram = Arc::new(SharedMemory::new(size)?);
    let shared = SharedSlice { backing: ram.clone(), offset: 0 };
    let (id, flags) = (Some(SlotId::new(0)), SlotFlags::LOG_DIRTY);
    let slot = SlotSpec { id, gpa: GPA, size, shared, private: None, flags };
    let tracker = Arc::new(Tracker::new(Arc::clone(&hypervisor), choice.mechanism));
    // Should the layout be edited, the tracker follows.
    let memory = CvmMemory::builder().slot(slot).harvest(tracker.clone()).build(hypervisor)?;
    let dirty = tracker.add_backing(ram.as_ref())?;
    let mut guests: Vec<Box<dyn Guest>> = (0..args.vcpus).map(|id| vm.guest(id)).collect();
    if let Mechanism::Ring { bytes, .. } = choice.mechanism {
        guests.iter().try_for_each(|guest| guest.dirty_ring(bytes).map(|ring| tracker.add_ring(ring)))?;
    }
    tracker.start(memory.space().layout(), Unloggable::Refuse)?;
    // A copy of everything to begin with.
    dirty.set(FileRange::from_bytes(0, size)?);

    let stop = AtomicBool::new(false);
    let mut copy = Copy { ram: &ram, dirty: &dirty, to: vec![0; usize::try_from(size)?] };
    thread::scope(|scope| {
        let running: Vec<_> = guests
            .iter_mut()
            .zip(0_u64..)
            .map(|(guest, id)| {
                scope.spawn({
                    let (tracker, stop) = (&tracker, &stop);
                    move || write_until(guest.as_mut(), id, size, tracker, stop)
                })
            })
            .collect();
        let rounds = pre_copy(args, &tracker, &mut copy);
        stop.store(true, Ordering::Relaxed);
        let writes = running
            .into_iter()
            .map(|guest| guest.join().map_err(|_| "a vCPU panicked")?)
            .sum::<Result<u64, Failure>>()?;
        println!("guests stopped after {writes} writes");
        rounds
    })?;
    copy.round("last", || tracker.sync(Stage::Last).map(drop))?;

    let mut found = vec![0; copy.to.len()];
    ram.read(0, &mut found)?;
    if let Some(at) = found.iter().zip(&copy.to).position(|(a, b)| a != b) {
        return Err(format!("the copy differs from the memory at {at:#x}").into());
    }
    println!("the copy is the memory: {size:#x} bytes");
    if let Mechanism::Ring { .. } = choice.mechanism {
        println!("{:?}", tracker.ring_stats());
    }
    Ok(())
}

/// Rounds until little is left.
fn pre_copy(args: &Args, tracker: &Tracker, copy: &mut Copy<'_>) -> Result<(), Failure> {
    println!("{:>6} {:>9} {:>12} {:>12} {:>12}", "round", "pages", "sync", "copy", "MiB/s");
    for round in 0..args.rounds {
        let pages = copy.round(&round.to_string(), || tracker.sync(Stage::Running).map(drop))?;
        if pages <= args.enough {
            break;
        }
        thread::sleep(Duration::from_millis(args.pause));
    }
    Ok(())
}

/// The other side of a migration.
struct Copy<'a> {
    ram: &'a SharedMemory,
    dirty: &'a DirtyBitmap,
    to: Vec<u8>,
}

impl Copy<'_> {
    /// Asks what was written, and copies it.
    fn round<E: Into<Failure>>(&mut self, name: &str, sync: impl FnOnce() -> Result<(), E>) -> Result<u64, Failure> {
        let start = Instant::now();
        sync().map_err(Into::into)?;
        let synced = start.elapsed();
        let mut pages = 0;
        for run in self.dirty.take() {
            let (from, to) = (usize::try_from(run.start_byte())?, usize::try_from(run.end_byte())?);
            let target = self.to.get_mut(from..to).ok_or("a page beyond the memory")?;
            self.ram.read(run.start_byte(), target)?;
            pages += run.pages();
        }
        let copied = start.elapsed().saturating_sub(synced);
        let rate = (pages * PAGE_SIZE) as f64 / f64::from(1 << 20) / copied.as_secs_f64().max(1e-9);
        println!("{name:>6} {pages:>9} {synced:>12.1?} {copied:>12.1?} {rate:>12.0}");
        Ok(pages)
    }
}

/// What a vCPU thread does: numbers into pages, most of them in a small part of the memory. Returns how many.
fn write_until(
    guest: &mut dyn Guest,
    id: u64,
    size: u64,
    tracker: &Tracker,
    stop: &AtomicBool,
) -> Result<u64, Failure> {
    let pages = size / PAGE_SIZE;
    let mut random = id.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut writes = 0;
    while !stop.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let among = if random.is_multiple_of(16) { pages } else { pages.min(32) };
        let gpa = GPA + (random >> 20) % among * PAGE_SIZE + id * 8;
        guest.start(GuestOp::Write { gpa, data: random.to_le_bytes().to_vec() });
        loop {
            match guest.run() {
                Ok(Exit::Halt) => break,
                Ok(Exit::DirtyRingFull) => drop(tracker.ring_full()?),
                Ok(exit) => return Err(format!("unexpected exit: {exit:?}").into()),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(format!("KVM_RUN: {errno}").into()),
            }
        }
        let _outcome = guest.result();
        writes += 1;
    }
    Ok(writes)
}
