//! The facade: what it refuses and why, what a failure leaves behind (nothing), and in what order it all goes away.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use cvm_memory::addr::{FilePage, Gfn, GfnRange, Gpa, PAGE_SIZE};
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::convert::{PinError, Request, State};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Cap, Hypervisor};
use cvm_memory::layout::{BindError, LayoutError, SlotFlags, SlotId};
use cvm_memory::memory::{
    AccessError, BuildError, Builder, CommitOptions, CvmMemory, EditError, Materialise, SlotError, SlotSpec,
};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Call, Recorder, gfn};
use nix::errno::Errno;

const MIB: u64 = 1 << 20;

/// A VM without one of its capabilities, or with another value of it.
fn without(cap: Cap, value: u64) -> Arc<Recorder<SoftVm>> {
    let vm = Recorder::new(SoftVm::software_protected());
    vm.answer(cap, value);
    Arc::new(vm)
}

fn refused(builder: Builder) -> BuildError {
    let recorder = Recorder::new(SoftVm::software_protected());
    let error = builder.build(Arc::new(recorder.clone())).expect_err("refused");
    let slots = recorder.count_matching(|call| matches!(call, Call::SetUserMemoryRegion2(_)));
    assert_eq!(slots, 0, "refused before the first slot: {error}");
    error
}

fn slot(file: &Arc<GuestMemfd>, gpa: u64, size: u64, page: u64) -> SlotSpec {
    SlotSpec {
        id: None,
        gpa,
        size,
        shared: SharedSlice { backing: Arc::new(SharedMemory::new(size).unwrap()), offset: 0 },
        private: Some((Arc::clone(file), FilePage::new(page).unwrap())),
        flags: SlotFlags::empty(),
    }
}

#[test]
fn each_missing_capability_is_named() {
    let needed =
        [Cap::USER_MEMORY2, Cap::GUEST_MEMFD, Cap::MEMORY_FAULT_INFO, Cap::MEMORY_ATTRIBUTES, Cap::EXIT_HYPERCALL];
    for cap in needed {
        match CvmMemory::builder().ram(0, MIB).build(without(cap, 0)) {
            Err(BuildError::Missing(missing)) => {
                assert_eq!(missing.cap, cap);
                assert!(missing.to_string().contains(cap.name().unwrap()), "{missing}");
            }
            other => panic!("{cap}: {other:?}"),
        }
    }
    // Another attribute than the one needed is as good as none.
    let result = CvmMemory::builder().ram(0, MIB).build(without(Cap::MEMORY_ATTRIBUTES, 7));
    assert!(matches!(result, Err(BuildError::Missing(m)) if m.cap == Cap::MEMORY_ATTRIBUTES));
}

#[test]
fn a_vm_without_private_memory_can_have_plain_memory_only() {
    let built = CvmMemory::builder().plain_ram(0, MIB).build(Arc::new(SoftVm::default_type()));
    assert_eq!(built.unwrap().state(Gfn::ZERO), Some(State::Shared));
    let refused = CvmMemory::builder().ram(0, MIB).build(Arc::new(SoftVm::default_type()));
    assert!(matches!(refused, Err(BuildError::Missing(_))), "{refused:?}");
}

#[test]
fn lazy_is_refused_where_the_attribute_alone_decides() {
    let error = refused(CvmMemory::builder().ram(0, MIB).materialise(Materialise::Lazy));
    assert!(matches!(error, BuildError::LazyNeedsTaggedAccesses { .. }));
    assert!(error.to_string().contains("silently be shared"), "{error}");
}

#[test]
fn bad_ranges_are_refused_with_the_reason() {
    let top = u64::MAX - 0xfff;
    for (gpa, size) in [(0, 0), (1, PAGE_SIZE), (0, 5), (top, PAGE_SIZE), (PAGE_SIZE, top)] {
        let error = refused(CvmMemory::builder().ram(gpa, size));
        assert!(matches!(error, BuildError::Range { gpa: g, size: s, .. } if (g, s) == (gpa, size)), "{error:?}");
    }
    let half = 1 << 62;
    let error = refused(CvmMemory::builder().ram(0, half).ram(half, half));
    assert!(matches!(error, BuildError::TooMuch { bytes } if bytes == half), "{error:?}");
    let error = refused(CvmMemory::builder().ram(0, 2 * MIB).ram(MIB, 2 * MIB));
    assert!(matches!(error, BuildError::Slot(SlotError::Layout(LayoutError::GfnOverlap { .. }))), "{error:?}");
    let error = refused(CvmMemory::builder().ram(1 << 40, MIB).address_bits(40));
    assert!(matches!(error, BuildError::Slot(SlotError::Layout(_))), "{error:?}");
}

#[test]
fn slots_of_the_callers_are_checked_before_kvm_sees_them() {
    let vm = SoftVm::software_protected();
    let recorder = Recorder::new(vm.clone());
    let memory = CvmMemory::builder().ram(0, MIB).build(Arc::new(recorder.clone())).unwrap();
    let file = Arc::new(recorder.create_guest_memfd(4 * MIB, 0).unwrap());
    recorder.take();
    let at = 1u64 << 30;

    let mut short = slot(&file, at, MIB, 0);
    short.shared.offset = PAGE_SIZE;
    let error = memory.add_slots(vec![short]).unwrap_err();
    assert!(matches!(error, SlotError::SharedTooShort { available: MIB, .. }), "{error:?}");

    let error = memory.add_slots(vec![slot(&file, at, 4 * MIB, 1)]).unwrap_err();
    let beyond = matches!(error, SlotError::Layout(LayoutError::Bind { source: BindError::BeyondFile { .. }, .. }));
    assert!(beyond, "{error:?}");

    let both = vec![slot(&file, at, 2 * MIB, 0), slot(&file, at + 2 * MIB, 2 * MIB, 511)];
    let error = memory.add_slots(both).unwrap_err();
    let overlap = matches!(error, SlotError::Layout(LayoutError::Bind { source: BindError::Overlap { .. }, .. }));
    assert!(overlap, "{error:?}");

    for flags in [SlotFlags::LOG_DIRTY, SlotFlags::READONLY] {
        let error = memory.add_slots(vec![SlotSpec { flags, ..slot(&file, at, MIB, 0) }]).unwrap_err();
        assert!(matches!(error, SlotError::Layout(_)), "{error:?}");
    }
    let error =
        memory.add_slots(vec![SlotSpec { id: Some(SlotId::from_raw(0)), ..slot(&file, at, MIB, 0) }]).unwrap_err();
    assert!(matches!(error, SlotError::Layout(LayoutError::IdInUse { .. })), "{error:?}");
    let far = SlotSpec { id: Some(SlotId::from_raw(32764)), ..slot(&file, at, MIB, 0) };
    let error = memory.add_slots(vec![far]).unwrap_err();
    assert!(matches!(error, SlotError::Layout(LayoutError::IdTooHigh { .. })), "{error:?}");
    // Beyond what the record was made for.
    let error = memory.add_slots(vec![slot(&file, at, MIB, 0)]).unwrap_err();
    assert!(matches!(error, SlotError::Record { .. }), "{error:?}");

    assert_eq!(recorder.calls(), [], "nothing was tried");
    assert_eq!(vm.slots().len(), 1);
}

#[test]
fn a_failure_at_any_call_leaves_nothing_behind() {
    for eager in [false, true] {
        let vm = if eager { SoftVm::software_protected() } else { SoftVm::tagged() };
        let recorder = Recorder::new(vm.clone());
        let memory = CvmMemory::builder().ram(0, MIB).address_limit(1 << 30).build(Arc::new(recorder.clone())).unwrap();
        let file = Arc::new(recorder.create_guest_memfd(6 * MIB, 0).unwrap());
        let before = (vm.slots(), vm.private_gfns());
        let specs = || (1..4).map(|n| slot(&file, n * 4 * MIB, 2 * MIB, (n - 1) * 512)).collect::<Vec<_>>();
        let mut failures = 0;
        loop {
            recorder.fail_nth(failures + 1, Errno::ENOMEM);
            let result = memory.add_slots(specs());
            recorder.clear_faults();
            let Err(error) = result else { break };
            failures += 1;
            assert!(matches!(error, SlotError::Kvm { .. } | SlotError::Step { .. }), "{error:?}");
            assert_eq!((vm.slots(), vm.private_gfns()), before, "failure {failures}");
            assert_eq!(memory.state(gfn(1024)), None);
            assert_eq!(memory.converter().declared().count(GfnRange::from_bytes(4 * MIB, 12 * MIB).unwrap()), 0);
        }
        // Three slots, and three attributes if they are set at once.
        assert_eq!(failures, if eager { 6 } else { 3 });
        assert_eq!(vm.slots().len(), 4);
        assert_eq!(memory.state(gfn(1024)), Some(State::Private));
        // Removing one that KVM will not remove keeps it.
        recorder.fail_nth(1, Errno::EIO);
        let error = memory.remove_slot(SlotId::from_raw(2)).unwrap_err();
        assert!(matches!(error, SlotError::Kvm { errno: Errno::EIO, .. }), "{error:?}");
        assert_eq!((vm.slots().len(), memory.state(gfn(2048))), (4, Some(State::Private)));
    }
}

#[test]
fn c13_the_record_survives_its_slot() {
    for vm in [SoftVm::software_protected(), SoftVm::tagged()] {
        let file = Arc::new(vm.create_guest_memfd(4 * MIB, 0).unwrap());
        let memory = CvmMemory::builder()
            .slot(slot(&file, 0, 4 * MIB, 0))
            .materialise(Materialise::Eager)
            .build(Arc::new(vm.clone()))
            .unwrap();
        let shared = GfnRange::from_bytes(MIB, MIB).unwrap();
        memory.convert(&Request { range: shared, to: State::Shared }).unwrap().converted().unwrap();
        let attributes = vm.private_gfns();

        memory.remove_slot(SlotId::from_raw(0)).unwrap();
        assert_eq!((memory.state(gfn(0)), vm.private_gfns()), (None, attributes.clone()));
        // Back in two halves.
        let halves = vec![slot(&file, 0, 2 * MIB, 0), slot(&file, 2 * MIB, 2 * MIB, 512)];
        memory.add_slots(halves).unwrap();
        assert_eq!(vm.private_gfns(), attributes);
        for n in 0..1024 {
            let state = State::from_private(!shared.contains(gfn(n)));
            assert_eq!((memory.state(gfn(n)), vm.is_private(gfn(n))), (Some(state), state.is_private()), "gfn {n:#x}");
        }
    }
}

/// What became of a VM, in the order in which it did: slots, then files (closed, as the software KVM counts them).
#[test]
fn everything_goes_in_order_even_when_building_fails_or_somebody_panics() {
    let vm = SoftVm::software_protected();
    let recorder = Recorder::new(vm.clone());
    let file = {
        let memory = CvmMemory::builder().ram(0, MIB).ram(1 << 30, MIB).build(Arc::new(recorder.clone())).unwrap();
        let file = Arc::clone(memory.space().files().next().unwrap());
        recorder.take();
        drop(memory);
        file
    };
    let gone: Vec<(u32, u64)> = recorder
        .take()
        .iter()
        .map(|call| match call {
            Call::SetUserMemoryRegion2(region) => (region.slot, region.memory_size),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(gone, [(1, 0), (0, 0)], "slots, the last one first");
    assert!(vm.slots().is_empty());
    // Nothing but this holds the file now, and it outlives everything else.
    assert_eq!(Arc::strong_count(&file), 1);

    // A build that fails half-way.
    recorder.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.slot == 1), Errno::ENOMEM);
    CvmMemory::builder().ram(0, MIB).ram(1 << 30, MIB).build(Arc::new(recorder.clone())).unwrap_err();
    assert!(vm.slots().is_empty());
    assert_eq!(vm.private_gfns(), []);

    // A panic beside it.
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let memory = CvmMemory::builder().ram(0, MIB).build(Arc::new(recorder.clone())).unwrap();
        assert!(memory.state(Gfn::ZERO).is_none(), "on purpose");
    }));
    assert!(panicked.is_err() && vm.slots().is_empty());
}

#[test]
fn a_file_can_be_let_go_once_nothing_is_bound_to_it() {
    let vm = SoftVm::software_protected();
    let file = Arc::new(vm.create_guest_memfd(MIB, 0).unwrap());
    let memory = CvmMemory::builder().slot(slot(&file, 0, MIB, 0)).build(Arc::new(vm)).unwrap();
    assert!(matches!(memory.release_file(file.id()), Err(SlotError::FileInUse { .. })));
    memory.remove_slot(SlotId::from_raw(0)).unwrap();
    assert_eq!(Arc::strong_count(&file), 2, "its pages are kept for whoever adds the slot again");
    memory.release_file(file.id()).unwrap();
    assert_eq!(Arc::strong_count(&file), 1);
    // It is nobody's now, and can be bound again.
    memory.add_slots(vec![slot(&file, 0, MIB, 0)]).unwrap();
}

#[test]
fn the_host_reaches_shared_memory_and_nothing_else() {
    let memory = CvmMemory::builder()
        .ram(0, 2 * MIB)
        .slot_size(MIB)
        .ram(2 * MIB, MIB)
        .initial(State::Shared)
        .build(Arc::new(SoftVm::software_protected()))
        .unwrap();
    // Across slots, and across mappings.
    let bytes: Vec<u8> = (0..=255).cycle().take(5 * 4096 + 77).collect();
    for start in [MIB - 2 * PAGE_SIZE - 5, 2 * MIB - 3 * PAGE_SIZE + 1] {
        memory.write(Gpa(start), &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        memory.read(Gpa(start), &mut back).unwrap();
        assert!(back == bytes);
    }
    let private = GfnRange::from_bytes(MIB, PAGE_SIZE).unwrap();
    memory.convert(&Request { range: private, to: State::Private }).unwrap().converted().unwrap();
    let mut four = [9; 4];
    for gpa in [MIB, MIB - 1, MIB + PAGE_SIZE - 1, 3 * MIB - 1, 3 * MIB, 1 << 40] {
        let error = memory.read(Gpa(gpa), &mut four).unwrap_err();
        assert!(matches!(error, AccessError::Pin { error: PinError::NotShared { .. }, .. }), "{gpa:#x}: {error:?}");
        assert_eq!(four, [9; 4]);
        memory.write(Gpa(gpa), &four).unwrap_err();
    }
    let error = memory.read(Gpa(u64::MAX - 1), &mut four).unwrap_err();
    assert!(matches!(error, AccessError::Range { .. }), "{error:?}");
    memory.read(Gpa(u64::MAX), &mut []).unwrap();
}

#[test]
fn readers_see_new_slots_and_new_states() {
    let vm = SoftVm::software_protected();
    let memory = CvmMemory::builder().ram(0, MIB).address_limit(8 * MIB).build(Arc::new(vm.clone())).unwrap();
    let mut reader = memory.reader();
    let page = reader.lookup(gfn(3)).unwrap();
    let file = memory.space().files().next().unwrap().id();
    assert_eq!((page.state, page.slot.raw(), page.file), (State::Private, 0, Some((file, 3 * PAGE_SIZE))));
    assert!(reader.lookup(gfn(512)).is_none());
    let other = Arc::new(vm.create_guest_memfd(MIB, 0).unwrap());
    memory.add_slots(vec![slot(&other, 2 * MIB, MIB, 0)]).unwrap();
    memory.convert(&Request { range: GfnRange::page(gfn(513)), to: State::Shared }).unwrap().converted().unwrap();
    let page = reader.lookup(gfn(513)).unwrap();
    assert_eq!((page.state, page.slot.raw(), page.file), (State::Shared, 1, Some((other.id(), PAGE_SIZE))));
    assert_eq!(page.hva, memory.space().hva(gfn(513)).unwrap());
}

#[test]
fn the_map_shows_what_a_person_would_ask() {
    let memory =
        CvmMemory::builder().ram(0, 4 * MIB).plain_ram(1 << 30, MIB).build(Arc::new(SoftVm::tagged())).unwrap();
    let shared = GfnRange::from_bytes(MIB, MIB).unwrap();
    memory.convert(&Request { range: shared, to: State::Shared }).unwrap().converted().unwrap();
    let file = memory.space().files().next().unwrap().id();
    let map = memory.map().to_string();
    let lines: Vec<&str> = map.lines().map(str::trim_end).collect();
    let expected = [
        "2 slots, 5 MiB, top at gfn 0x40100".to_owned(),
        format!("slot 0:0 4 MiB, guest_memfd {file} pages [0x0, 0x400)"),
        "  [0x0, 0x100)             private  1 MiB, not yet told to kvm".to_owned(),
        "  [0x100, 0x200)           shared   1 MiB".to_owned(),
        "  [0x200, 0x400)           private  2 MiB, not yet told to kvm".to_owned(),
        "slot 0:1 1 MiB, never private".to_owned(),
        "  [0x40000, 0x40100)       shared   1 MiB".to_owned(),
    ];
    assert_eq!(lines, expected);
    let whole = GfnRange::from_bytes(0, 4 * MIB).unwrap();
    assert_eq!(memory.map().shares(whole, 4), [(256, 256), (0, 256), (256, 256), (256, 256)]);
}

/// Memory that KVM may still let a guest at is never unmapped.
#[test]
fn what_a_slot_that_cannot_be_deleted_points_at_stays() {
    for (errno, kept) in [(Errno::ENOMEM, true), (Errno::EIO, false)] {
        let vm = SoftVm::software_protected();
        let recorder = Recorder::new(vm.clone());
        let file = Arc::new(vm.create_guest_memfd(2 * MIB, 0).unwrap());
        let deletion = |call: &Call| matches!(call, Call::SetUserMemoryRegion2(r) if r.memory_size == 0);

        // At teardown.
        let backing = Arc::new(SharedMemory::new(MIB).unwrap());
        let shared = SharedSlice { backing: backing.clone(), offset: 0 };
        let spec = SlotSpec { shared, ..slot(&file, 0, MIB, 0) };
        let memory = CvmMemory::builder().slot(spec.clone()).build(Arc::new(recorder.clone())).unwrap();
        drop(spec);
        recorder.fail_matching(deletion, errno);
        drop(memory);
        assert_eq!(Arc::strong_count(&backing), 1 + usize::from(kept), "{errno}");

        // While undoing an addition.
        let recorder = Recorder::new(SoftVm::software_protected());
        let file = Arc::new(recorder.create_guest_memfd(2 * MIB, 0).unwrap());
        let backing = Arc::new(SharedMemory::new(MIB).unwrap());
        let shared = SharedSlice { backing: backing.clone(), offset: 0 };
        let memory = CvmMemory::builder().ram(1 << 30, MIB).build(Arc::new(recorder.clone())).unwrap();
        recorder.fail_matching(|call| matches!(call, Call::SetUserMemoryRegion2(r) if r.slot == 2), Errno::ENOMEM);
        recorder.fail_matching(deletion, errno);
        let first = SlotSpec { shared, ..slot(&file, 0, MIB, 0) };
        memory.add_slots(vec![first, slot(&file, MIB, MIB, 256)]).unwrap_err();
        assert_eq!(Arc::strong_count(&backing), 1 + usize::from(kept), "{errno}");
    }
}

#[derive(Debug)]
struct Panicking;

impl cvm_memory::convert::Listener for Panicking {
    fn map(&self, _: &cvm_memory::convert::SharedRun) -> Result<(), cvm_memory::convert::ListenerError> {
        Ok(())
    }
    fn unmap(&self, _: &cvm_memory::convert::SharedRun) {
        panic!("on purpose");
    }
}

#[test]
fn a_panic_at_teardown_unmaps_nothing_that_has_a_slot() {
    let vm = SoftVm::software_protected();
    let file = Arc::new(vm.create_guest_memfd(MIB, 0).unwrap());
    let backing = Arc::new(SharedMemory::new(MIB).unwrap());
    let shared = SharedSlice { backing: backing.clone(), offset: 0 };
    let spec = SlotSpec { shared, ..slot(&file, 0, MIB, 0) };
    let memory = CvmMemory::builder().slot(spec).initial(State::Shared).build(Arc::new(vm.clone())).unwrap();
    let listener: Arc<dyn cvm_memory::convert::Listener> = Arc::new(Panicking);
    memory.add_listener(&listener).unwrap();
    catch_unwind(AssertUnwindSafe(|| drop(memory))).unwrap_err();
    assert_eq!((vm.slots().len(), Arc::strong_count(&backing)), (1, 2));
}

#[test]
fn shared_memory_cannot_be_truncated_under_its_mapping() {
    let memory = SharedMemory::new(MIB).unwrap();
    for size in [0, MIB / 2, 2 * MIB] {
        memory.file().set_len(size).unwrap_err();
    }
    memory.write(MIB - 1, &[1]).unwrap();
}

/// Several mappings of one file, as of a VMM that has one for all of its memory: each counts what it holds itself.
#[test]
fn parts_of_a_file_are_counted_once() {
    let file = Arc::clone(SharedMemory::new(4 * MIB).unwrap().file());
    let part = |offset, size| Arc::new(SharedMemory::from_file(Arc::clone(&file), offset, size).unwrap());
    let parts = [part(0, MIB), part(MIB, 2 * MIB), part(3 * MIB, MIB)];
    parts[0].write(PAGE_SIZE - 1, &[1, 2]).unwrap();
    parts[2].write(0, &[3]).unwrap();
    let slot = |gpa, part: &Arc<SharedMemory>| {
        let shared = SharedSlice { backing: Arc::clone(part) as Arc<dyn SharedBacking>, offset: 0 };
        SlotSpec { id: None, gpa, size: MIB, shared, private: None, flags: SlotFlags::empty() }
    };
    let builder = (0..).zip(&parts).fold(CvmMemory::builder(), |all, (at, part)| all.slot(slot(at * MIB, part)));
    let memory = builder.build(Arc::new(SoftVm::default_type())).unwrap();
    // Where the kernel can tell.
    let held = parts.each_ref().map(|part| part.resident_bytes().map(|bytes| bytes / PAGE_SIZE));
    assert!(held == [Some(2), Some(0), Some(1)] || held == [None; 3], "{held:?}");
    assert_eq!(memory.resident().shared_bytes, held[0].map(|_| 3 * PAGE_SIZE));
}

#[test]
fn slots_of_other_address_spaces_are_refused() {
    let memory = CvmMemory::builder().plain_ram(0, MIB).build(Arc::new(SoftVm::default_type())).unwrap();
    let shared = SharedSlice { backing: Arc::new(SharedMemory::new(MIB).unwrap()), offset: 0 };
    let id = Some(SlotId { as_id: 1, id: 0 });
    let other = SlotSpec { id, gpa: 0, size: MIB, shared, private: None, flags: SlotFlags::empty() };
    assert!(matches!(memory.add_slots(vec![other]), Err(SlotError::AddressSpace { .. })));
}

/// Shared memory of a slot whose pages change state is nobody else's: freeing it would take it from the other. Held against
/// every pair of slots.
#[test]
fn no_memory_is_shared_twice_if_it_can_be_freed() {
    let mut seed = 9_u64;
    let mut below = |bound: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % bound
    };
    let (mut refused, mut admitted) = (0, 0);
    for _ in 0..600 {
        let backing: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(MIB).unwrap());
        let parts: Vec<(u64, u64, bool)> =
            (0..2 + below(4)).map(|_| (below(24), 1 + below(9), below(3) == 0)).collect();
        let overlap = |a: &(u64, u64, bool), b: &(u64, u64, bool)| a.0 < b.0 + b.1 && b.0 < a.0 + a.1 && (a.2 || b.2);
        let expected = parts.iter().enumerate().any(|(at, a)| parts[at + 1..].iter().any(|b| overlap(a, b)));
        let slot = |(at, &(page, pages, convertible)): (u64, &(u64, u64, bool)), vm: &SoftVm| SlotSpec {
            id: None,
            gpa: at * MIB,
            size: pages * PAGE_SIZE,
            shared: SharedSlice { backing: Arc::clone(&backing), offset: page * PAGE_SIZE },
            private: convertible.then(|| (Arc::new(vm.create_guest_memfd(MIB, 0).unwrap()), FilePage::ZERO)),
            flags: SlotFlags::empty(),
        };
        let machine = || {
            let vm = SoftVm::software_protected();
            let specs: Vec<SlotSpec> = (0..).zip(&parts).map(|part| slot(part, &vm)).collect();
            (CvmMemory::builder().ram(1 << 30, MIB).build(Arc::new(vm)).unwrap(), specs)
        };
        let (memory, specs) = machine();
        let mut edit = memory.edit();
        specs.into_iter().for_each(|spec| edit.create(spec).map(drop).unwrap());
        let edited = edit.commit(&CommitOptions::default());
        assert_eq!(matches!(edited, Err(EditError::SharedTwice { .. })), expected, "{parts:?}: {edited:?}");
        assert_eq!(edited.is_ok(), !expected);
        let (memory, specs) = machine();
        let added = memory.add_slots(specs);
        assert_eq!(matches!(added, Err(SlotError::SharedTwice { .. })), expected, "{parts:?}: {added:?}");
        assert_eq!(added.is_ok(), !expected);
        refused += u32::from(expected);
        admitted += u32::from(!expected);
    }
    assert!(refused > 50 && admitted > 50, "{refused} refused, {admitted} admitted");
}
