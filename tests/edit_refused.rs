//! Edits that are refused, with the reason and before anything happens: what makes no sense, what would do harm on a platform,
//! what would wait for itself.

mod edit_kit;

use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use cvm_memory::addr::{AddrError, FilePage, Gpa};
use cvm_memory::backing::{SharedBacking, SharedSlice};
use cvm_memory::convert::{Listener, ListenerError, LockError, SharedRun, State};
use cvm_memory::edit::{Harvest, Hazard, Operation, PlanError, Region};
use cvm_memory::gate::{Gate, GateError, Kick};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Hazards, Hypervisor};
use cvm_memory::layout::{Layout, LayoutError, Memslot, SlotFlags, SlotId};
use cvm_memory::memory::{CommitOptions, CvmMemory, EditError, SlotError, SlotSpec};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Call, Recorder, Window, chain};
use edit_kit::*;
use nix::errno::Errno;

#[test]
fn what_makes_no_sense_is_refused_before_the_first_call() {
    let (vm, memory) = private_vm(SoftVm::software_protected(), 64);
    let file = Arc::clone(memory.space().files().next().unwrap());
    let refused = |edit: cvm_memory::memory::Edit<'_>| {
        let error = edit.commit(&BESIDE).unwrap_err();
        assert_eq!(vm.take(), [], "{error}");
        error
    };
    let mut edit = memory.edit();
    let range =
        |result: Result<&mut cvm_memory::memory::Edit<'_>, EditError>| matches!(result, Err(EditError::Range { .. }));
    assert!(
        range(edit.delete(1, PAGE)) && range(edit.delete(0, 0)) && range(edit.punch_hole(u64::MAX - 0xfff, 2 * PAGE))
    );
    assert!(matches!(edit.delete_slot(SlotId::new(7)), Err(EditError::Refused(_))));
    // Which operation and why: each once.
    let error = edit.name("vga").unwrap().punch_hole(MIB, PAGE).unwrap_err();
    assert_eq!(chain(&error), "operation 0, punch hole (vga): gfns [0x100, 0x101) are not memory");
    // S06: the pages are bound.
    let private = Some((Arc::clone(&file), FilePage::new(32).unwrap()));
    let spec =
        SlotSpec { id: None, gpa: MIB, size: 64 * PAGE, shared: slice(64 * PAGE), private, flags: SlotFlags::empty() };
    edit.create(SlotSpec { size: 16 * PAGE, ..spec.clone() }).unwrap();
    assert!(matches!(refused(edit), EditError::Plan(PlanError::Layout(LayoutError::Bind { .. }))));
    // Longer than its file, longer than its mapping.
    let mut edit = memory.edit();
    edit.grow(0, 65 * PAGE).unwrap();
    assert!(matches!(refused(edit), EditError::Plan(PlanError::Layout(LayoutError::Bind { .. }))));
    let mut edit = memory.edit();
    assert!(matches!(edit.create(SlotSpec { shared: slice(PAGE), ..spec }), Err(EditError::SharedTooShort { .. })));
    // S07.
    for flags in [SlotFlags::LOG_DIRTY, SlotFlags::READONLY] {
        let mut edit = memory.edit();
        edit.set_flags(0, 64 * PAGE, flags).unwrap();
        assert!(matches!(refused(edit), EditError::Plan(PlanError::Layout(_))));
    }
    // Private memory cannot become memory that is never private under the guest's feet.
    let mut edit = memory.edit();
    edit.delete(0, 64 * PAGE).unwrap();
    edit.create(plain(0, 64 * PAGE, &slice(64 * PAGE).backing, 0, SlotFlags::empty())).unwrap();
    assert!(matches!(refused(edit), EditError::StillPrivate { gfns: still } if still == gfns(0, 64)));
    let (vm, memory, _) = plain_vm(64, SlotFlags::empty());
    let mut edit = memory.edit();
    edit.grow(0, 129 * PAGE).unwrap();
    assert!(matches!(edit.commit(&FEW).unwrap_err(), EditError::SharedTooShort { .. }));
    assert_eq!(vm.take(), []);
}

#[test]
fn private_memory_that_goes_with_its_slot_is_not_lost_unasked() {
    let (vm, memory) = hazardous(Hazards { slot_delete_loses_private: true, ..Hazards::NONE });
    let split = |options: &CommitOptions| {
        let mut edit = memory.edit();
        edit.split(32 * PAGE).unwrap();
        edit.commit(options)
    };
    let error = split(&BESIDE).unwrap_err();
    assert!(matches!(error, EditError::Hazard(Hazard::LosesPrivate { gfns: lost, .. }) if lost == gfns(0, 64)));
    assert_eq!(vm.take(), []);
    // Memory beside it is another matter.
    let mut edit = memory.edit();
    let private = Some((Arc::new(vm.create_guest_memfd(MIB, 0).unwrap()), FilePage::ZERO));
    edit.create(SlotSpec { id: None, gpa: MIB, size: MIB, shared: slice(MIB), private, flags: SlotFlags::empty() })
        .unwrap();
    edit.commit(&BESIDE).unwrap();
    split(&CommitOptions { lose_private: true, ..BESIDE }).unwrap();
    // Nor is anything lost that is shared.
    share(&memory, 0, 64);
    let mut edit = memory.edit();
    edit.merge(0, 64 * PAGE).unwrap();
    edit.commit(&BESIDE).unwrap();
}

#[test]
fn where_vcpus_keep_their_state_in_memory_nothing_private_goes_and_all_stop() {
    let (_, memory) = hazardous(Hazards { vcpu_state_in_private_memory: true, ..Hazards::NONE });
    let mut edit = memory.edit();
    edit.truncate(0, 32 * PAGE).unwrap();
    let error = edit.clone().commit(&BESIDE).unwrap_err();
    assert!(matches!(error, EditError::Hazard(Hazard::LosesVcpu { gfns: lost, .. }) if lost == gfns(32, 64)));
    // The same pages at the same frames: nobody is lost, as long as nobody looks meanwhile.
    let mut split = memory.edit();
    split.split(32 * PAGE).unwrap();
    assert!(split.commit(&BESIDE).unwrap().stopped.is_some());
    // Memory that goes for good stops nobody elsewhere; here it does.
    share(&memory, 32, 64);
    let mut gone = memory.edit();
    gone.delete(32 * PAGE, 32 * PAGE).unwrap();
    assert!(gone.commit(&BESIDE).unwrap().stopped.is_some());
}

#[test]
fn a_page_appears_at_another_frame_only_once_it_is_freed() {
    let (vm, memory) = hazardous(Hazards { pages_keep_their_frame: true, ..Hazards::NONE });
    let file = memory.space().files().next().unwrap().id();
    let mut edit = memory.edit();
    edit.move_to(16 * PAGE, 16 * PAGE, MIB).unwrap();
    let error = edit.clone().commit(&BESIDE).unwrap_err();
    let EditError::Hazard(Hazard::Rebound { was, wanted, pages, .. }) = error else { panic!("{error}") };
    assert_eq!((was, wanted, pages.pages()), (gfn(16), gfn(256), 16));
    assert_eq!(vm.take(), []);
    edit.commit(&CommitOptions { free_rebound: true, ..BESIDE }).unwrap();
    let punched: Vec<_> = vm.take().into_iter().filter(Call::is_punch_hole).collect();
    let (offset, len) = (16 * i64::try_from(PAGE).unwrap(), 16 * i64::try_from(PAGE).unwrap());
    assert!(
        matches!(punched.as_slice(), [Call::Fallocate { file: f, offset: o, len: l, .. }] if (*f, *o, *l) == (file, offset, len))
    );
    // Away for a while, the pages remember all the same; back where they were, there is nothing to free.
    let mut edit = memory.edit();
    edit.delete(MIB, 16 * PAGE).unwrap();
    edit.commit(&BESIDE).unwrap();
    let back = |gpa: u64| {
        let space = memory.space();
        let private = Some((Arc::clone(space.file(file).unwrap()), FilePage::new(16).unwrap()));
        let mut edit = memory.edit();
        let shared = slice(16 * PAGE);
        edit.create(SlotSpec { id: None, gpa, size: 16 * PAGE, shared, private, flags: SlotFlags::empty() }).unwrap();
        edit.commit(&BESIDE)
    };
    assert!(matches!(back(16 * PAGE), Err(EditError::Hazard(Hazard::Rebound { .. }))));
    back(MIB).unwrap();
}

/// The guest may use pages until their slot goes, and again should it come back: what was freed is not free for ever.
#[test]
fn pages_that_were_freed_for_nothing_still_have_their_frame() {
    let (vm, memory) = hazardous(Hazards { pages_keep_their_frame: true, ..Hazards::NONE });
    let move_to = |gpa: u64, free_rebound: bool| {
        let mut edit = memory.edit();
        edit.move_to(0, 64 * PAGE, gpa).unwrap();
        edit.commit(&CommitOptions { free_rebound, ..BESIDE })
    };
    vm.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.memory_size != 0), Errno::ENOMEM);
    assert!(matches!(move_to(MIB, true), Err(EditError::Kvm { errno: Errno::ENOMEM, .. })));
    assert!(vm.take().iter().any(Call::is_punch_hole));
    assert_eq!(memory.gate().closures(), 1, "nobody uses them between that and the end of their slot");
    for gpa in [MIB, 2 * MIB] {
        assert!(matches!(move_to(gpa, false), Err(EditError::Hazard(Hazard::Rebound { .. }))));
    }
    // What was there for a moment before a later call failed, its guest may have used as well.
    let file = Arc::new(vm.create_guest_memfd(2 * MIB, 0).unwrap());
    let create = |edit: &mut cvm_memory::memory::Edit<'_>, gpa: u64, page: u64| {
        let private = Some((Arc::clone(&file), FilePage::new(page).unwrap()));
        let (size, shared, flags) = (MIB, slice(MIB), SlotFlags::empty());
        edit.create(SlotSpec { id: None, gpa, size, shared, private, flags }).map(|_| ()).unwrap();
    };
    let mut edit = memory.edit();
    create(&mut edit, MIB, 0);
    create(&mut edit, 2 * MIB, 256);
    vm.fail_matching(
        |call| matches!(call, Call::SetUserMemoryRegion2(r) if r.guest_phys_addr == 2 * MIB),
        Errno::ENOMEM,
    );
    assert!(matches!(edit.commit(&BESIDE), Err(EditError::Kvm { errno: Errno::ENOMEM, .. })));
    let mut edit = memory.edit();
    create(&mut edit, 4 * MIB, 0);
    assert!(matches!(edit.commit(&BESIDE), Err(EditError::Hazard(Hazard::Rebound { .. }))));
    let mut edit = memory.edit();
    create(&mut edit, 4 * MIB, 256);
    edit.commit(&BESIDE).unwrap();
    // The same where slots are added.
    let file = Arc::new(vm.create_guest_memfd(2 * MIB, 0).unwrap());
    let spec = |gpa: u64, page: u64| {
        let private = Some((Arc::clone(&file), FilePage::new(page).unwrap()));
        SlotSpec { id: None, gpa, size: MIB, shared: slice(MIB), private, flags: SlotFlags::empty() }
    };
    vm.fail_matching(
        |call| matches!(call, Call::SetUserMemoryRegion2(r) if r.guest_phys_addr == 7 * MIB),
        Errno::ENOMEM,
    );
    assert!(matches!(memory.add_slots(vec![spec(6 * MIB, 0), spec(7 * MIB, 256)]), Err(SlotError::Kvm { .. })));
    assert!(matches!(memory.add_slots(vec![spec(8 * MIB, 0)]), Err(SlotError::Rebound { .. })));
    memory.add_slots(vec![spec(6 * MIB, 0), spec(8 * MIB, 256)]).unwrap();
}

/// Rule 3a: while there is no slot, no shared access may find one missing.
#[test]
fn memory_that_goes_is_sealed_where_holes_stick() {
    let (vm, memory) = hazardous(Hazards { holes_stick: true, ..Hazards::NONE });
    share(&memory, 0, 64);
    assert_eq!(vm.inner().private_gfns(), []);
    let truncate = || {
        let mut edit = memory.edit();
        edit.truncate(0, 32 * PAGE).unwrap();
        edit.commit(&BESIDE)
    };
    // A failure takes it back.
    vm.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.memory_size != 0), Errno::ENOMEM);
    truncate().unwrap_err();
    assert_eq!(vm.inner().private_gfns(), []);
    truncate().unwrap();
    assert_eq!(vm.inner().private_gfns(), [gfns(32, 64)]);
    let mut edit = memory.edit();
    edit.grow(0, 64 * PAGE).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(vm.inner().private_gfns(), [], "shared, as the guest has been told");
    assert_eq!(memory.state(gfn(40)), Some(State::Shared));
    memory.write(Gpa(40 * PAGE), b"x").unwrap();
}

/// The same, slot by slot; and a slot that cannot be added leaves the hole as it was.
#[test]
fn a_slot_that_goes_is_sealed_until_it_is_back() {
    let (vm, memory) = hazardous(Hazards { holes_stick: true, ..Hazards::NONE });
    share(&memory, 0, 64);
    let space = memory.space();
    let slot = *space.layout().table().slots().next().unwrap();
    let (file, pages) = slot.file_range().unwrap();
    let spec = SlotSpec {
        id: Some(slot.id),
        gpa: 0,
        size: slot.gfns.bytes(),
        shared: space.shared(slot.id).unwrap().clone(),
        private: Some((Arc::clone(space.file(file).unwrap()), pages.start())),
        flags: SlotFlags::empty(),
    };
    memory.remove_slot(slot.id).unwrap();
    assert_eq!(vm.inner().private_gfns(), [gfns(0, 64)]);
    vm.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.memory_size != 0), Errno::ENOMEM);
    memory.add_slots(vec![spec.clone()]).unwrap_err();
    assert_eq!(vm.inner().private_gfns(), [gfns(0, 64)]);
    memory.add_slots(vec![spec]).unwrap();
    assert_eq!(vm.inner().private_gfns(), []);
    // A slot that cannot be removed stays as it was.
    vm.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.memory_size == 0), Errno::ENOMEM);
    memory.remove_slot(slot.id).unwrap_err();
    assert_eq!(vm.inner().private_gfns(), []);
    memory.write(Gpa(0), b"x").unwrap();
}

#[test]
fn nobody_waits_for_himself() {
    let (vm, memory, _) = plain_vm(64, SlotFlags::empty());
    #[derive(Debug)]
    struct Deaf;
    impl Kick for Deaf {
        fn entering(&self) {}
        fn kick(&self) {}
    }
    let pass = Gate::register(memory.gate(), Arc::new(Deaf));
    let commit = |options: &CommitOptions| {
        let mut edit = memory.edit();
        edit.split(32 * PAGE).unwrap();
        edit.commit(options)
    };
    // From a vCPU's thread that is in the guest.
    let inside = pass.enter().unwrap();
    let before = kvm_slots(&vm);
    assert!(matches!(commit(&BESIDE), Err(EditError::Gate(GateError::Inside { .. }))));
    // A vCPU that never leaves.
    thread::scope(|scope| {
        let impatient = CommitOptions { patience: Duration::from_millis(1), ..BESIDE };
        let error = scope.spawn(move || commit(&impatient)).join().unwrap().unwrap_err();
        assert!(matches!(error, EditError::Gate(GateError::NeverLeft { ref inside, .. }) if *inside == [pass.id()]));
    });
    assert_eq!((kvm_slots(&vm), region_calls(&vm)), (before, vec![]));
    drop(inside);
    // From a vCPU's thread that is not: nothing wrong with that.
    commit(&BESIDE).unwrap();
}

/// Somebody has stopped the vCPUs to look at the memory, which a commit keeps from him while it wants to stop them itself.
#[test]
fn a_commit_does_not_wait_for_ever_for_a_gate_that_is_kept_closed() {
    let (vm, memory, _) = plain_vm(64, SlotFlags::empty());
    let (before, closed) = (kvm_slots(&vm), memory.gate().close(Duration::ZERO).unwrap());
    let (done, wait) = std::sync::mpsc::channel();
    let other = Arc::clone(&memory);
    thread::spawn(move || {
        let mut edit = other.edit();
        edit.split(32 * PAGE).unwrap();
        done.send(edit.commit(&CommitOptions { patience: Duration::from_millis(1), ..BESIDE })).unwrap();
    });
    memory.read(Gpa(31 * PAGE), &mut [0; 8192]).unwrap();
    let result = wait.recv_timeout(Duration::from_secs(60)).expect("an answer");
    assert!(matches!(result, Err(EditError::Gate(GateError::KeptClosed { .. }))), "{result:?}");
    assert_eq!((kvm_slots(&vm), region_calls(&vm)), (before, vec![]));
    drop(closed);
}

/// What a device is at must not go; what lies between two ranges that go is none of theirs.
#[test]
fn only_accesses_to_what_goes_are_waited_for() {
    let (_, memory, backing) = plain_vm(16, SlotFlags::empty());
    let slot = |at: u64| plain(at * PAGE, 4 * PAGE, &backing, at * PAGE, SlotFlags::empty());
    memory.add_slots(vec![slot(18), slot(24)]).unwrap();
    let _pin = memory.pin(gfns(18, 20)).unwrap();
    let mut edit = memory.edit();
    edit.truncate(0, 8 * PAGE).unwrap().delete(24 * PAGE, 4 * PAGE).unwrap();
    edit.commit(&BESIDE).unwrap();
    let mut edit = memory.edit();
    edit.truncate(0, 4 * PAGE).unwrap().truncate(18 * PAGE, PAGE).unwrap();
    let refused = edit.commit(&BESIDE);
    assert!(matches!(refused, Err(EditError::Locked(LockError::Pinned { .. }))), "{refused:?}");
}

/// Edits its memory when it is told of a change, which must not be.
#[derive(Debug)]
struct Meddler(Weak<CvmMemory>, Mutex<Vec<Result<(), String>>>);

impl Listener for Meddler {
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        if let Some(memory) = self.0.upgrade() {
            let mut edit = memory.edit();
            edit.split(PAGE).unwrap();
            let result = edit.commit(&BESIDE).map(drop);
            let reentrant = matches!(result, Err(EditError::Locked(LockError::Reentrant { .. })));
            self.1.lock().unwrap().push(if reentrant { Ok(()) } else { Err(format!("{run:?}: {result:?}")) });
        }
        Ok(())
    }

    fn unmap(&self, _: &SharedRun) {}
}

#[test]
fn a_listener_cannot_edit() {
    let (_, memory, _) = plain_vm(64, SlotFlags::empty());
    let meddler = Arc::new(Meddler(Arc::downgrade(&memory), Mutex::default()));
    let listener: Arc<dyn Listener> = Arc::clone(&meddler) as Arc<dyn Listener>;
    let mut edit = memory.edit();
    edit.truncate(0, 32 * PAGE).unwrap();
    edit.commit(&FEW).unwrap();
    memory.add_listener(&listener).unwrap_or_else(|error| panic!("{error}"));
    let mut edit = memory.edit();
    edit.grow(0, 40 * PAGE).unwrap();
    edit.commit(&FEW).unwrap();
    assert_eq!(*meddler.1.lock().unwrap(), [Ok(()), Ok(())]);
}

/// Keeps dirty bits, and edits when it is asked about memory or told of slots, which must not be.
#[derive(Debug, Default)]
struct Busybody(Mutex<Weak<CvmMemory>>, Mutex<Vec<bool>>);

impl Busybody {
    fn edit(&self) {
        let memory = self.0.lock().unwrap().upgrade();
        if let Some(memory) = memory {
            let mut edit = memory.edit();
            edit.split(PAGE).unwrap();
            let refused = matches!(edit.commit(&BESIDE), Err(EditError::Locked(LockError::Reentrant { .. })));
            self.1.lock().unwrap().push(refused);
        }
    }
}

impl Harvest for Busybody {
    fn memory(&self, _: &Arc<dyn SharedBacking>) -> Result<(), Errno> {
        self.edit();
        Ok(())
    }
    fn harvest(&self, _: &Memslot, _: &SharedSlice) -> Result<(), Errno> {
        Ok(())
    }
    fn edited(&self, _: &Layout) {
        self.edit();
    }
    fn wrote(&self, _: &SharedSlice, _: u64) {}
}

#[test]
fn who_keeps_dirty_bits_cannot_edit() {
    let (_, memory, _) = plain_vm(64, SlotFlags::empty());
    let busybody = Arc::new(Busybody::default());
    *busybody.0.lock().unwrap() = Arc::downgrade(&memory);
    let (done, wait) = std::sync::mpsc::channel();
    // Whoever waits for himself does so for ever.
    let (other, keeper) = (Arc::clone(&memory), Arc::clone(&busybody));
    thread::spawn(move || {
        other.set_harvest(Some(keeper)).unwrap();
        let backing = slice(16 * PAGE).backing;
        other.add_slots(vec![plain(MIB, 16 * PAGE, &backing, 0, SlotFlags::empty())]).unwrap();
        let mut edit = other.edit();
        edit.create(plain(2 * MIB, 16 * PAGE, &slice(16 * PAGE).backing, 0, SlotFlags::empty())).unwrap();
        edit.commit(&BESIDE).unwrap();
        done.send(()).unwrap();
    });
    wait.recv_timeout(Duration::from_secs(60)).expect("nobody waits for himself");
    assert_eq!(*busybody.1.lock().unwrap(), [true; 6]);
}

#[test]
fn two_edits_at_once_both_happen() {
    let (_, memory, _) = plain_vm(1024, SlotFlags::empty());
    thread::scope(|scope| {
        for who in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                for at in 0..16 {
                    let mut edit = memory.edit();
                    edit.punch_hole((who + 4 * at) * 16 * PAGE, PAGE).unwrap();
                    // Made on an older layout than it is committed on, more often than not.
                    thread::yield_now();
                    edit.commit(&BESIDE).unwrap();
                }
            });
        }
    });
    let expected: Vec<_> = (0..64).map(|at| gfns(at * 16 + 1, at * 16 + 16)).collect();
    assert_eq!(slots(&memory), expected);
}

#[test]
fn s01_s02_memory_that_begins_and_ends_anywhere() {
    let vm = SoftVm::software_protected();
    let file = Arc::new(vm.create_guest_memfd(MIB, 0).unwrap());
    let shared = SharedSlice { offset: 0x1800, ..slice(MIB) };
    let section = |gpa, size, offset| {
        SlotSpec::whole_pages(gpa, size, shared.clone(), Some((Arc::clone(&file), offset)), SlotFlags::empty())
    };
    // S01: the offsets advance by what is cut off.
    let slot = section(0x1800, 0x3000, 0x1800).unwrap().unwrap();
    assert_eq!((slot.gpa, slot.size, slot.shared.offset), (0x2000, 0x2000, 0x2000));
    assert_eq!(slot.private.unwrap().1, FilePage::new(2).unwrap());
    // S02: no whole page, no slot, no error.
    for (gpa, size) in [(0x1800, 0x800), (0x1800, 0x400), (0x1800, 0), (0x1001, 0xfff), (u64::MAX - 1, 1)] {
        assert!(section(gpa, size, 0x1800).unwrap().is_none(), "{gpa:#x} {size:#x}");
    }
    let whole = section(0x1000, 0x1000, 0x3000).unwrap().unwrap();
    assert_eq!((whole.gpa, whole.size, whole.private.unwrap().1), (0x1000, 0x1000, FilePage::new(3).unwrap()));
    // What lies within a page of the file is no slot's: the page before would be the guest's instead.
    for (gpa, offset) in [(0x1000, 0x1800), (0x1800, 0), (0x1800, 0x1801)] {
        let refused = section(gpa, 0x3000, offset);
        assert!(matches!(refused, Err(AddrError::Unaligned { .. })), "{gpa:#x} {offset:#x}: {refused:?}");
    }
    for (gpa, size, offset) in [(0x1800, 0x3000, u64::MAX), (0x1000, u64::MAX, 0), (u64::MAX, 1, 0)] {
        assert!(
            matches!(section(gpa, size, offset), Err(AddrError::BeyondTop { .. })),
            "{gpa:#x} {size:#x} {offset:#x}"
        );
    }
}

/// What follows a mapping in this process is none of its business: only what was brought comes before the guest.
#[test]
fn no_memory_but_what_was_brought_is_shown_to_the_guest() {
    let whole = slice(8 * PAGE).backing;
    let window = |at: u64| -> Arc<dyn SharedBacking> { Arc::new(Window::new(&whole, 4 * at * PAGE, 4 * PAGE)) };
    let (low, high) = (window(0), window(1));
    let vm = Recorder::new(SoftVm::default_type());
    let lower = plain(0, 4 * PAGE, &low, 0, SlotFlags::empty());
    let upper = plain(MIB, 4 * PAGE, &high, 0, SlotFlags::empty());
    let memory = CvmMemory::builder().slot(lower.clone()).slot(upper).build(Arc::new(vm.clone())).unwrap();
    vm.take();
    for options in [BESIDE, FEW] {
        let mut edit = memory.edit();
        edit.grow(0, 6 * PAGE).unwrap();
        let result = edit.commit(&options);
        assert!(matches!(result, Err(EditError::SharedTooShort { .. })), "{result:?}");
        for hva in [0, low.hva() - PAGE, low.hva() + 3 * PAGE, high.hva() + 3 * PAGE] {
            for mapping in [0, hva, low.hva(), high.hva()] {
                let region = Region { gfns: gfns(512, 514), hva, mapping, flags: SlotFlags::empty(), binding: None };
                let mut edit = memory.edit();
                edit.apply_all(vec![Operation::Create(region)]).unwrap();
                let result = edit.commit(&options);
                assert!(matches!(result, Err(EditError::SharedTooShort { .. })), "{region:x?}: {result:?}");
            }
        }
        assert_eq!(vm.take(), []);
    }
    // Mappings that begin alike are told apart by where they end.
    let all = plain(MIB, 8 * PAGE, &whole, 0, SlotFlags::empty());
    let memory = CvmMemory::builder().slot(lower).slot(all).build(Arc::new(SoftVm::default_type())).unwrap();
    for options in [BESIDE, FEW] {
        let mut edit = memory.edit();
        edit.truncate(MIB, 6 * PAGE).unwrap();
        edit.commit(&options).unwrap();
        let mut edit = memory.edit();
        edit.grow(MIB, 8 * PAGE).unwrap();
        edit.commit(&FEW).unwrap();
    }
}

/// A file that an edit brings for memory that does not come to be stays its owner's alone.
#[test]
fn files_of_memory_that_never_was_are_let_go() {
    let (vm, memory) = private_vm(SoftVm::software_protected(), 64);
    let file = || Arc::new(vm.create_guest_memfd(MIB, 0).unwrap());
    let spec = |gpa, file: &Arc<GuestMemfd>| {
        let private = Some((Arc::clone(file), FilePage::ZERO));
        SlotSpec { id: None, gpa, size: MIB, shared: slice(MIB), private, flags: SlotFlags::empty() }
    };
    let (refused, gone, stays) = (file(), file(), file());
    let mut edit = memory.edit();
    assert!(matches!(edit.create(spec(0, &refused)), Err(EditError::Refused(_))));
    edit.create(spec(MIB, &gone)).unwrap();
    edit.delete(MIB, MIB).unwrap();
    edit.create(spec(2 * MIB, &stays)).unwrap();
    edit.commit(&BESIDE).unwrap();
    assert_eq!([&refused, &gone, &stays].map(|file| memory.space().file(file.id()).is_some()), [false, false, true]);
    assert_eq!([&refused, &gone, &stays].map(|file| Arc::strong_count(file) > 1), [false, false, true]);
    // They come when they are wanted; what the VM has had it keeps.
    let mut edit = memory.edit();
    edit.delete(2 * MIB, MIB).unwrap();
    edit.create(spec(MIB, &gone)).unwrap();
    edit.commit(&BESIDE).unwrap();
    memory.add_slots(vec![spec(3 * MIB, &refused), spec(2 * MIB, &stays)]).unwrap();
    assert_eq!([&refused, &gone, &stays].map(|file| memory.space().file(file.id()).is_some()), [true; 3]);
}
