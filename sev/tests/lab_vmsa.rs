//! A vCPU that the guest itself has started, from a save area in its own memory, on KVM's own SNP code: what takes it away, and
//! that edits of the layout do not.

#[path = "../../tests/edit_kit/mod.rs"]
mod edit_kit;
#[path = "kit/lab.rs"]
mod lab;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use cvm_memory::addr::{FilePage, FileRange, Gfn};
use cvm_memory::convert::{DiscardPolicy, Request, State};
use cvm_memory::edit::{Hazard, Prefer};
use cvm_memory::gate::Kick;
use cvm_memory::hypervisor::{Hypervisor as _, MemoryRegion};
use cvm_memory::memory::{CommitOptions, CvmMemory, EditError};
use cvm_memory::soft::{GuestOp as Step, OpResult};
use cvm_memory_testkit::snp::{Emulation, SnpGuest, SnpVcpu};
use cvm_memory_testkit::{Guest as _, GuestOp, Numbers, Outcome};
use edit_kit::random::{ALL, USED, edit_something, transactions};
use edit_kit::{Done, PAGE, Runner, gfns};
use lab::{CREATE, DESTROY, Lab, NoEntry, launched};

/// The save area: the last of the pages that are always there.
const VMSA: u64 = (USED - 1) * PAGE;
const LOST: Result<OpResult, NoEntry> = Err(NoEntry(u64::MAX));

/// Two vCPUs, of which the second has its save area at `VMSA`.
fn guests(emulation: &Emulation, policy: DiscardPolicy, gosvw: u8) -> Option<Lab> {
    let builder = CvmMemory::builder().ram(0, ALL * PAGE).initial(State::Shared).discard(policy);
    let mut lab = launched(emulation, builder, 2, gosvw)?;
    // Even pages are private, as far as there always are any; and so is the save area.
    for page in (0..USED).step_by(2).chain([VMSA / PAGE]) {
        lab.memory.convert(&Request { range: gfns(page, page + 1), to: State::Private }).unwrap().converted().unwrap();
    }
    lab.start_second(VMSA);
    runs(&mut lab);
    let (_, _, is_vmsa) = emulation.pages(&lab.asid)[&Gfn::containing(VMSA)].clone();
    assert!(is_vmsa);
    Some(lab)
}

fn look(lab: &mut Lab) -> Result<OpResult, NoEntry> {
    lab.step(1, Step::Read { gpa: PAGE, len: 1, private: false })
}

fn runs(lab: &mut Lab) {
    assert_eq!(look(lab), Ok(OpResult::Read(vec![0])));
}

/// Whatever the second vCPU was told, it cannot be entered any more; the first one, whose save area is KVM's own, can.
fn is_lost(lab: &mut Lab) {
    assert_eq!(look(lab), LOST);
    for _ in 0..3 {
        assert_eq!(lab.go_on(1), LOST);
    }
    assert_eq!(lab.step(0, Step::Read { gpa: PAGE, len: 1, private: false }), Ok(OpResult::Read(vec![0])));
}

/// The slot of page 0, deleted or made again past the library.
fn naively(lab: &Lab, there: bool) {
    let space = lab.memory.space();
    let slot = *space.layout().table().lookup(Gfn::containing(0)).unwrap();
    let (file, range) = slot.file_range().unwrap();
    let region = MemoryRegion {
        slot: slot.id.raw(),
        flags: 4, // KVM_MEM_GUEST_MEMFD
        guest_phys_addr: slot.gfns.start_byte(),
        memory_size: if there { slot.gfns.bytes() } else { 0 },
        userspace_addr: slot.hva,
        guest_memfd_offset: range.start_byte(),
        guest_memfd: std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&**space.file(file).unwrap())),
    };
    // SAFETY: the slot is the library's own, whose memory stays where it is.
    #[allow(unsafe_code, reason = "what the library is there to prevent")]
    unsafe { lab.vm.set_user_memory_region2(&region) }.unwrap();
}

/// What a VMM does that deletes a slot and makes it again while a vCPU may run.
#[test]
fn a_naive_delete_loses_it() {
    let Some(emulation) = Emulation::here() else { return };
    let Some(mut lab) = guests(&emulation, DiscardPolicy::Immediate, 0x81) else { return };
    let before = emulation.pages(&lab.asid);
    naively(&lab, false);
    assert_eq!(look(&mut lab), LOST);
    naively(&lab, true);
    // The page is there again, with the entry it had: KVM has forgotten where the save area was.
    assert_eq!(emulation.pages(&lab.asid), before);
    for _ in 0..3 {
        assert_eq!(lab.go_on(1), LOST);
    }
    // Only the guest can start it again; then it goes on with what it was told.
    assert_eq!(lab.ask(CREATE, VMSA), [0, 0]);
    assert_eq!(lab.go_on(1), Ok(OpResult::Read(vec![0])));
}

/// The same calls, with nobody in the guest in between: the page is found again.
#[test]
fn with_all_vcpus_out_it_is_kept() {
    let Some(emulation) = Emulation::here() else { return };
    let Some(mut lab) = guests(&emulation, DiscardPolicy::Immediate, 0x82) else { return };
    let before = emulation.pages(&lab.asid);
    for _ in 0..3 {
        naively(&lab, false);
        naively(&lab, true);
        runs(&mut lab);
    }
    assert_eq!(emulation.pages(&lab.asid), before);
}

#[test]
fn attributes_do_not_take_it_but_freeing_does() {
    let Some(emulation) = Emulation::here() else { return };
    let Some(mut lab) = guests(&emulation, DiscardPolicy::Never, 0x83) else { return };
    for to in [State::Shared, State::Private] {
        lab.memory.convert(&Request { range: gfns(USED - 1, USED), to }).unwrap().converted().unwrap();
        runs(&mut lab);
    }
    let (file, offset) = lab.memory.reader().lookup(Gfn::containing(VMSA)).unwrap().file.unwrap();
    let page = FileRange::page(FilePage::containing(offset));
    lab.memory.space().file(file).unwrap().punch_hole(page).unwrap();
    // A fresh page is no save area: the processor refuses it.
    is_lost(&mut lab);
    lab.start_second(VMSA);
    assert_eq!(lab.go_on(1), Ok(OpResult::Read(vec![0])));
}

#[test]
fn a_conversion_that_frees_takes_it() {
    let Some(emulation) = Emulation::here() else { return };
    let Some(mut lab) = guests(&emulation, DiscardPolicy::Immediate, 0x84) else { return };
    lab.memory.convert(&Request { range: gfns(USED - 1, USED), to: State::Shared }).unwrap().converted().unwrap();
    is_lost(&mut lab);
    lab.memory.convert(&Request { range: gfns(USED - 1, USED), to: State::Private }).unwrap().converted().unwrap();
    lab.start_second(VMSA);
    assert_eq!(lab.go_on(1), Ok(OpResult::Read(vec![0])));
    assert_eq!(lab.ask(DESTROY, 0), [0, 0]);
    // It would sleep now. Started once more, it goes on where it was.
    assert_eq!(lab.ask(CREATE, VMSA), [0, 0]);
    runs(&mut lab);
}

/// What one vCPU does: writes its pages with a value that grows, and finds it there again. Even pages are private.
fn hammer(runner: &mut Runner<SnpGuest<SnpVcpu>>, who: u64, done: &AtomicBool, visits: &AtomicU64) {
    let mine: Vec<u64> = (0..VMSA / PAGE).filter(|page| page / 2 % 2 == who).collect();
    let mut value = vec![0_u64; mine.len()];
    while !done.load(Ordering::Acquire) {
        for (page, value) in mine.iter().zip(&mut value) {
            runner.guest.set_private(page % 2 == 0);
            let gpa = page * PAGE;
            let found = runner.perform(GuestOp::Read { gpa, len: 8 });
            assert_eq!(found, Outcome::Data(value.to_le_bytes().to_vec()), "page {page} of vcpu {who}");
            *value += 1;
            runner.perform(GuestOp::Write { gpa, data: value.to_le_bytes().to_vec() });
            if page % 2 == 0 && *value % 16 == 1 {
                runner.perform(GuestOp::Write { gpa: gpa + 2048, data: runner.guest.return_code().to_vec() });
                assert_eq!(runner.perform(GuestOp::Fetch { gpa: gpa + 2048 }), Outcome::Done);
            }
            visits.fetch_add(1, Ordering::AcqRel);
        }
    }
    assert_eq!(runner.unexplained, Vec::<String>::new(), "vcpu {who}");
    assert_eq!(runner.completed, 0, "vcpu {who} was never inside while memory was in flux");
}

/// Edits around and under both vCPUs and the save area: nobody is lost, no byte is wrong, and every page is in the RMP as it
/// was. 300 transactions; `CVM_EDIT_TRANSACTIONS` sets another number.
#[test]
fn edits_keep_it() {
    let Some(emulation) = Emulation::here() else { return };
    let Some(mut lab) = guests(&emulation, DiscardPolicy::Immediate, 0x85) else { return };
    // Private memory, and a vCPU's state with it, does not go by an edit.
    let mut edit = lab.memory.edit();
    edit.punch_hole(VMSA, PAGE).unwrap();
    let refused = edit.commit(&CommitOptions::default()).unwrap_err();
    assert!(matches!(refused, EditError::Hazard(Hazard::LosesVcpu { .. })), "{refused}");
    runs(&mut lab);
    // From here on no page comes or goes: all private ones are used once.
    for page in (0..USED).step_by(2) {
        assert_eq!(lab.accept(page * PAGE), OpResult::Instruction(0));
    }
    let rmp = |asid: &str| -> Vec<_> {
        let used = gfns(0, USED);
        emulation.pages(asid).into_iter().filter(|(gfn, _)| used.contains(*gfn)).collect()
    };
    let before = rmp(&lab.asid);
    assert_eq!(before.len(), usize::try_from(USED / 2 + 1).unwrap());

    let Lab { memory, vcpus, asid, .. } = lab;
    let (done, visits) = (AtomicBool::new(false), [AtomicU64::new(0), AtomicU64::new(0)]);
    let edits = transactions(300);
    let (mut calls, mut stops, mut refused, mut seen) = (0, 0, 0_u64, [0; 2]);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (mut guest, who) in vcpus.into_iter().zip(0..) {
            let (done, visits, memory) = (&done, &visits[usize::try_from(who).unwrap()], &memory);
            let kick: Arc<dyn Kick> = Arc::new(guest.processor().kick());
            threads.push(scope.spawn(move || hammer(&mut Runner::new(memory, guest, kick), who, done, visits)));
        }
        // Also should this thread panic.
        let _done = Done(&done);
        let mut numbers = Numbers(5);
        for nr in 0..edits {
            // Each gets on in between, so that all the edits find them at something else.
            for (visits, seen) in visits.iter().zip(&mut seen) {
                while visits.load(Ordering::Acquire) == *seen && threads.iter().all(|thread| !thread.is_finished()) {
                    thread::yield_now();
                }
                *seen = visits.load(Ordering::Acquire);
            }
            assert!(threads.iter().all(|thread| !thread.is_finished()), "a vcpu has ended");
            let mut edit = memory.edit();
            edit_something(&mut edit, &mut numbers);
            let prefer = if numbers.below(2) == 0 { Prefer::FewSlots } else { Prefer::NoInterruption };
            // What is moved is shared: nothing is lost with the file's pages.
            let options =
                CommitOptions { prefer, patience: Duration::from_secs(60), free_rebound: true, ..Default::default() };
            match edit.commit(&options) {
                Ok(result) => {
                    calls += result.steps.len();
                    stops += u64::from(result.stopped.is_some());
                }
                // Memory that was moved back grows beyond its mapping or into pages that are bound.
                Err(EditError::SharedTooShort { .. } | EditError::Plan(_)) => refused += 1,
                Err(other) => panic!("{other}"),
            }
            if nr % 16 == 0 {
                assert_eq!(rmp(&asid), before, "after edit {nr}");
            }
        }
    });
    assert_eq!(rmp(&asid), before);
    let visits = visits.map(AtomicU64::into_inner);
    assert!(visits.iter().all(|visits| *visits >= edits), "both ran: {visits:?}");
    assert!(refused < edits / 2 && stops > edits / 8, "{refused} refused, {stops} stops");
    println!("{edits} edits: {calls} calls, {stops} stops, {refused} refused; pages visited: {visits:?}");
}
