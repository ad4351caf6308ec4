//! Two vCPUs hammer memory while another thread edits it, around and under them: no exit that is not explained, no wrong
//! byte, no dirty bit lost. 1,000 transactions; `CVM_EDIT_TRANSACTIONS` sets another number.

mod edit_kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use cvm_memory::backing::SharedBacking;
use cvm_memory::convert::{Request, State};
use cvm_memory::edit::Prefer;
use cvm_memory::gate::Kick;
use cvm_memory::hypervisor::{Hypervisor, Platform};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{CommitOptions, CvmMemory, EditError};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Guest, GuestOp, KvmGuest, Numbers, Outcome, SoftGuest, kvm, private_kvm};
use edit_kit::random::{ALL, USED, edit_something, transactions};
use edit_kit::{Bits, Done, PAGE, Runner, gfns, plain, slice};

/// What one vCPU does: writes its pages with a value that grows, and finds it there again. Even pages are its private ones.
fn hammer<G: Guest>(runner: &mut Runner<G>, who: u64, done: &AtomicBool, visits: &AtomicU64, mixed: bool) {
    let code = runner.guest.return_code();
    let mine: Vec<u64> = (0..USED).filter(|page| page / 2 % 2 == who).collect();
    let mut value = vec![0_u64; mine.len()];
    while !done.load(Ordering::Acquire) {
        for (page, value) in mine.iter().zip(&mut value) {
            runner.guest.set_private(mixed && page % 2 == 0);
            let gpa = page * PAGE;
            let found = runner.perform(GuestOp::Read { gpa, len: 8 });
            assert_eq!(found, Outcome::Data(value.to_le_bytes().to_vec()), "page {page} of vcpu {who}");
            *value += 1;
            runner.perform(GuestOp::Write { gpa, data: value.to_le_bytes().to_vec() });
            if page % 16 < 2 {
                let fill = u8::try_from(*value % 251).unwrap();
                runner.perform(GuestOp::Fill { gpa: gpa + 1024, len: 512, byte: fill });
                assert_eq!(runner.perform(GuestOp::Check { gpa: gpa + 1024, len: 512, byte: fill }), Outcome::Same);
                runner.perform(GuestOp::Write { gpa: gpa + 2048, data: code.to_vec() });
                assert_eq!(runner.perform(GuestOp::Fetch { gpa: gpa + 2048 }), Outcome::Done);
            }
            visits.fetch_add(1, Ordering::AcqRel);
        }
    }
    assert_eq!(runner.unexplained, Vec::<String>::new(), "vcpu {who}");
    assert_eq!(runner.completed, 0, "vcpu {who} was never inside while memory was in flux");
}

fn stress<G: Guest + Send>(memory: &Arc<CvmMemory>, guests: [(G, Arc<dyn Kick>); 2], mixed: bool, bits: Option<&Bits>) {
    let (done, visits) = (AtomicBool::new(false), [AtomicU64::new(0), AtomicU64::new(0)]);
    if mixed {
        // Odd pages are shared.
        for page in (1..ALL).step_by(2) {
            memory.convert(&Request { range: gfns(page, page + 1), to: State::Shared }).unwrap().converted().unwrap();
        }
    }
    let (mut calls, mut stops, mut naive, mut refused, mut seen) = (0, 0, 0, 0_u64, [0; 2]);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for ((guest, kick), who) in guests.into_iter().zip(0..) {
            let (done, visits) = (&done, &visits[usize::try_from(who).unwrap()]);
            threads.push(scope.spawn(move || {
                let mut runner = Runner::new(memory, guest, kick);
                hammer(&mut runner, who, done, visits, mixed);
            }));
        }
        // Also should this thread panic.
        let _done = Done(&done);
        let mut numbers = Numbers(5);
        for _ in 0..transactions(1_000) {
            // Each gets on in between, so that all the edits find them at something else.
            for (visits, seen) in visits.iter().zip(&mut seen) {
                while visits.load(Ordering::Acquire) == *seen && threads.iter().all(|thread| !thread.is_finished()) {
                    thread::yield_now();
                }
                *seen = visits.load(Ordering::Acquire);
            }
            let mut edit = memory.edit();
            edit_something(&mut edit, &mut numbers);
            let prefer = if numbers.below(2) == 0 { Prefer::FewSlots } else { Prefer::NoInterruption };
            let patience = std::time::Duration::from_secs(60);
            let result = match edit.commit(&CommitOptions { prefer, patience, ..CommitOptions::default() }) {
                Ok(result) => result,
                // Memory that was moved back grows beyond its mapping or into pages that are bound: refused, and no harm done.
                Err(EditError::SharedTooShort { .. } | EditError::Plan(_)) => {
                    refused += 1;
                    continue;
                }
                Err(other) => panic!("{other}"),
            };
            (calls, naive) = (calls + result.steps.len(), naive + result.naive_calls);
            stops += u64::from(result.stopped.is_some());
            // A vCPU thread that has failed is not waited for.
            assert!(threads.iter().all(|thread| !thread.is_finished()), "a vcpu has ended");
        }
    });
    assert!(refused < transactions(1_000) / 2, "{refused} refused");
    if let Some(bits) = bits {
        bits.collect(memory);
        assert_eq!(bits.state().lost, Vec::<u64>::new(), "pages that changed without a dirty bit");
        assert!(bits.state().harvests > 0);
    }
    let visits = visits.map(AtomicU64::into_inner);
    assert!(visits.iter().all(|visits| *visits >= transactions(1_000)), "both ran: {visits:?}");
    let edits = transactions(1_000);
    println!(
        "{edits} edits: {calls} calls, {stops} stops (delete-all-add-all: {naive} and {edits}); pages visited: {visits:?}"
    );
}

fn soft_guests(vm: &SoftVm) -> [(SoftGuest, Arc<dyn Kick>); 2] {
    [(); 2].map(|()| {
        let guest = SoftGuest::new(vm);
        let kick: Arc<dyn Kick> = Arc::new(guest.kick());
        (guest, kick)
    })
}

fn private_memory(vm: Arc<dyn Hypervisor>) -> Arc<CvmMemory> {
    let memory = CvmMemory::builder().address_limit(1 << 30).ram(0, ALL * PAGE).build(vm).unwrap();
    Arc::new(memory)
}

fn plain_memory(vm: Arc<dyn Hypervisor>, flags: SlotFlags) -> Arc<CvmMemory> {
    let backing: Arc<dyn SharedBacking> = slice(ALL * PAGE).backing;
    let slot = plain(0, ALL * PAGE, &backing, 0, flags);
    Arc::new(CvmMemory::builder().address_limit(1 << 30).slot(slot).build(vm).unwrap())
}

#[test]
fn software_kvm_software_protected() {
    let vm = SoftVm::software_protected();
    stress(&private_memory(Arc::new(vm.clone())), soft_guests(&vm), true, None);
}

#[test]
fn software_kvm_tagged() {
    let vm = SoftVm::tagged();
    stress(&private_memory(Arc::new(vm.clone())), soft_guests(&vm), true, None);
}

#[test]
fn software_kvm_default() {
    let vm = SoftVm::default_type();
    stress(&plain_memory(Arc::new(vm.clone()), SlotFlags::empty()), soft_guests(&vm), false, None);
}

#[test]
fn kvm_default_with_a_dirty_log() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let memory = plain_memory(Arc::new(vm.clone()), SlotFlags::LOG_DIRTY);
    let bits = Bits::new(&vm);
    memory.set_harvest(Some(Arc::<Bits>::clone(&bits))).unwrap();
    let guests = [0, 1].map(|id| {
        let guest = KvmGuest::new(&vm, id);
        let kick: Arc<dyn Kick> = Arc::new(guest.kick());
        (guest, kick)
    });
    stress(&memory, guests, false, Some(&bits));
}

#[test]
fn kvm_software_protected() {
    let Some(vm) = private_kvm() else { return };
    let memory = private_memory(Arc::new(vm.clone()));
    let guests = [0, 1].map(|id| {
        let guest = KvmGuest::new(&vm, id);
        let kick: Arc<dyn Kick> = Arc::new(guest.kick());
        (guest, kick)
    });
    stress(&memory, guests, true, None);
}
