//! Grows and shrinks a running guest's memory, as virtio-mem does, and shows what the guest saw: nothing.
//!
//! One large slot, more or less of it plugged, in blocks of 2 MiB. A guest writes and verifies all memory that it has been
//! told of, all the time. The host plugs a block and then tells the guest; to unplug, it tells the guest, waits until the
//! guest has let go, and takes the block away. Each time the one slot is replaced by a longer or a shorter one, under the
//! guest's feet.
//!
//!     cargo run --release --example resize_memory [-- BLOCKS]
//!
//! Runs on `/dev/kvm` if there is one, else on the software KVM.

#![allow(missing_docs, reason = "a program")]

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::edit::Prefer;
use cvm_memory::exits::{Action, VcpuExits};
use cvm_memory::gate::{Gate, Kick};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Exit, Hypervisor, Platform};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{CommitOptions, CvmMemory, SlotSpec};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Guest, GuestOp, KvmGuest, Outcome, SoftGuest, chain};
use nix::errno::Errno;

const BLOCK: u64 = 2 << 20;
const PAGE: u64 = 4096;

type Error = Box<dyn std::error::Error>;

/// What host and guest tell each other, in blocks.
#[derive(Debug, Default)]
struct Mailbox {
    /// The host: so many may be used.
    plugged: AtomicU64,
    /// The guest: so many are.
    used: AtomicU64,
    done: AtomicBool,
    /// Accesses, and exits for anything but the gate.
    accesses: AtomicU64,
    exits: AtomicU64,
}

/// The vCPU's thread: writes each page with what it should hold, and finds it there.
fn run_guest<G: Guest>(
    guest: &mut G,
    kick: Arc<dyn Kick>,
    memory: &Arc<CvmMemory>,
    mailbox: &Mailbox,
) -> Result<(), String> {
    let pass = Gate::register(memory.gate(), kick);
    let mut exits = VcpuExits::new(Arc::clone(memory));
    let mut perform = |op: GuestOp| -> Result<Outcome, String> {
        guest.start(op);
        loop {
            let inside = pass.enter().map_err(|error| error.to_string())?;
            let result = guest.run();
            drop(inside);
            match result {
                Ok(Exit::Halt) => return guest.result().ok_or_else(|| "a halt without a result".to_owned()),
                Ok(mut exit) => {
                    mailbox.exits.fetch_add(1, Ordering::Relaxed);
                    let what = format!("{exit:x?}");
                    let Action::Resume(_) = exits.handle(&mut exit) else { return Err(what) };
                }
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(errno.to_string()),
            }
        }
    };
    let mut round = 0_u64;
    while !mailbox.done.load(Ordering::Acquire) {
        let blocks = mailbox.plugged.load(Ordering::Acquire);
        mailbox.used.store(blocks, Ordering::Release);
        round += 1;
        for block in 0..blocks {
            let gpa = block * BLOCK + (round % (BLOCK / PAGE)) * PAGE;
            let value = (gpa ^ round.rotate_left(40)).to_le_bytes().to_vec();
            perform(GuestOp::Write { gpa, data: value.clone() })?;
            let found = perform(GuestOp::Read { gpa, len: 8 })?;
            if found != Outcome::Data(value) {
                return Err(format!("{found:?} at {gpa:#x}"));
            }
            mailbox.accesses.fetch_add(2, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// The host: up to all blocks, and down to one, in steps of all sizes.
fn resize(memory: &CvmMemory, mailbox: &Mailbox, blocks: u64) -> Result<(), Error> {
    let options = CommitOptions { prefer: Prefer::FewSlots, ..CommitOptions::default() };
    let (mut calls, mut longest) = (0, Duration::ZERO);
    println!("{:>10} {:>8} {:>8} {:>6} {:>10}", "memory", "was", "is", "calls", "stopped");
    let mut now = 1;
    for target in [2, blocks, blocks / 2, blocks / 2 + 1, blocks / 4, blocks, 1].map(|target| target.clamp(1, blocks)) {
        // The guest has used what it has before it has more or less.
        let seen = mailbox.accesses.load(Ordering::Acquire);
        while mailbox.accesses.load(Ordering::Acquire) < seen + 4 * now && !mailbox.done.load(Ordering::Acquire) {
            thread::yield_now();
        }
        if target < now {
            mailbox.plugged.store(target, Ordering::Release);
            while mailbox.used.load(Ordering::Acquire) > target && !mailbox.done.load(Ordering::Acquire) {
                thread::yield_now();
            }
        }
        let mut edit = memory.edit();
        if target < now {
            edit.name("unplug")?.truncate(0, target * BLOCK)?;
        } else {
            edit.name("plug")?.grow(0, target * BLOCK)?;
        }
        let done = edit.commit(&options)?;
        mailbox.plugged.store(target, Ordering::Release);
        let stopped = done.stopped.unwrap_or_default();
        println!("{:>6} MiB {now:>8} {target:>8} {:>6} {stopped:>10.1?}", (target * BLOCK) >> 20, done.steps.len());
        (calls, longest, now) = (calls + done.steps.len(), longest.max(stopped), target);
    }
    println!("{calls} calls, the longest stop {longest:.1?}; one slot at all times");
    Ok(())
}

fn run<G: Guest>(vm: Arc<dyn Hypervisor>, mut guest: G, kick: Arc<dyn Kick>, blocks: u64) -> Result<(), Error> {
    let backing: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(blocks * BLOCK)?);
    let shared = SharedSlice { backing, offset: 0 };
    let slot = SlotSpec { id: None, gpa: 0, size: BLOCK, shared, private: None, flags: SlotFlags::empty() };
    let memory = Arc::new(CvmMemory::builder().slot(slot).build(vm)?);
    let mailbox = Mailbox { plugged: AtomicU64::new(1), ..Mailbox::default() };
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            let result = run_guest(&mut guest, kick, &memory, &mailbox);
            mailbox.done.store(true, Ordering::Release);
            result
        });
        let resized = resize(&memory, &mailbox, blocks);
        mailbox.done.store(true, Ordering::Release);
        vcpu.join().map_err(|_| "the guest's thread panicked")??;
        resized
    })?;
    let (accesses, exits) = (mailbox.accesses.into_inner(), mailbox.exits.into_inner());
    println!("the guest: {accesses} accesses, all right; exits that it caused: {exits}");
    if exits == 0 { Ok(()) } else { Err("the guest saw it".into()) }
}

fn main() -> ExitCode {
    let blocks = std::env::args().nth(1).map_or(Ok(256), |text| text.parse());
    let Some(blocks) = blocks.ok().filter(|blocks| (4..=1024).contains(blocks)) else {
        eprintln!("usage: resize_memory [BLOCKS], from 4 to 1024 blocks of 2 MiB");
        return ExitCode::from(2);
    };
    let kvm = kvm_ioctls::Kvm::new().ok().and_then(|kvm| KvmVm::create(&kvm, Platform::DEFAULT).ok());
    let result = if let Some(vm) = kvm {
        println!("on /dev/kvm");
        let guest = KvmGuest::new(&vm, 0);
        let kick = Arc::new(guest.kick());
        run(Arc::new(vm), guest, kick, blocks)
    } else {
        println!("on the software KVM");
        let vm = SoftVm::default_type();
        let guest = SoftGuest::new(&vm);
        let kick = Arc::new(guest.kick());
        run(Arc::new(vm), guest, kick, blocks)
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
