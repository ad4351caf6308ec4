//! Guests on the model: acceptance, page state changes, and what the RMP says after each, as the kernel contract has it.

#![allow(unsafe_code, reason = "one test makes slots of its own")]

#[path = "kit/soft.rs"]
mod soft;

use cvm_memory::addr::{FileRange, Gfn, GfnRange};
use cvm_memory::convert::{DiscardPolicy, Request, State};
use cvm_memory::hypervisor::{Exit, Vcpu as _};
use cvm_memory::memory::{CvmMemory, Materialise};
use cvm_memory::prefault::PrefaultOptions;
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_sev::ghcb::{Operation, msr};
use cvm_memory_sev::rmp::PageState;
use cvm_memory_sev::soft::{GuestFailed, SnpGuest, vmgexit};
use nix::errno::Errno;
use soft::{Guests, launched};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

fn ram(bytes: u64) -> cvm_memory::memory::Builder {
    CvmMemory::builder().ram(0, bytes)
}

fn state(guests: &Guests, gpa: u64) -> PageState {
    guests.snp.rmp_entry(Gfn::containing(gpa)).map_or(PageState::Hypervisor, |entry| entry.state())
}

#[test]
fn a_page_is_assigned_when_touched_and_used_when_accepted() {
    let mut guests = launched(ram(4 * MIB), 1);
    assert_eq!(state(&guests, 0x5000), PageState::Hypervisor);
    let touched = guests.vcpus[0].read(0x5000, 8);
    assert!(
        matches!(touched, Err(GuestFailed::Exception { .. })),
        "not accepted: #VC, of which the host does not hear"
    );
    assert_eq!(state(&guests, 0x5000), PageState::GuestInvalid);
    let guest = &mut guests.vcpus[0];
    guest.pvalidate(0x5000, 1, true).unwrap();
    guest.write(0x5000, b"mine").unwrap();
    assert_eq!(guest.read(0x5000, 4).unwrap(), b"mine");
    let again = guest.pvalidate(0x5000, 1, true);
    assert!(matches!(again, Err(GuestFailed::Pvalidate { code: 255, .. })), "nothing was changed: Linux gives up");
    assert_eq!(state(&guests, 0x5000), PageState::GuestValid);
    assert_eq!(state(&guests, 0x6000), PageState::Hypervisor, "the block is private in KVM, the page is untouched");
}

#[test]
fn there_and_back_again() {
    let mut guests = launched(ram(4 * MIB), 1);
    let guest = &mut guests.vcpus[0];
    guest.accept(0x8000, 2).unwrap();
    guest.write(0x8000, b"secret").unwrap();
    guest.share(0x8000, 1).unwrap();
    guest.write_shared(0x8000, b"public").unwrap();
    let mut seen = [0; 6];
    guests.memory.read(cvm_memory::addr::Gpa(0x8000), &mut seen).unwrap();
    assert_eq!(&seen, b"public");
    // The private page was freed at once: its entry is gone, its neighbour's is not.
    assert_eq!((state(&guests, 0x8000), state(&guests, 0x9000)), (PageState::Hypervisor, PageState::GuestValid));
    let guest = &mut guests.vcpus[0];
    guest.accept(0x8000, 1).unwrap();
    assert_eq!(guest.read(0x8000, 6).unwrap(), [0; 6], "never the old secret");
}

/// Neither a changed attribute nor a deleted slot touches the RMP; only freeing the page does.
#[test]
fn only_freeing_unassigns() {
    let builder = ram(4 * MIB).discard(DiscardPolicy::Never);
    let mut guests = launched(builder, 1);
    guests.vcpus[0].accept(0x8000, 1).unwrap();
    let range = GfnRange::from_bytes(0x8000, PAGE).unwrap();
    let to = |to| guests.memory.convert(&Request { range, to }).unwrap().converted().unwrap();
    to(State::Shared);
    assert_eq!(state(&guests, 0x8000), PageState::GuestValid);
    to(State::Private);
    // It comes back as it was: accepted, contents and all. That is why Linux takes validation back first.
    guests.vcpus[0].write(0x8000, b"x").unwrap();
    let slot = guests.memory.space().layout().table().slots().next().unwrap().id;
    let (file, offset) = guests.memory.reader().lookup(Gfn::containing(0x8000)).unwrap().file.unwrap();
    let file = guests.memory.space().file(file).cloned().unwrap();
    guests.memory.remove_slot(slot).unwrap();
    assert_eq!(state(&guests, 0x8000), PageState::GuestValid);
    file.punch_hole(FileRange::from_bytes(offset, PAGE).unwrap()).unwrap();
    assert_eq!(state(&guests, 0x8000), PageState::Hypervisor);
}

#[test]
fn touching_a_page_in_the_other_state_converts_it() {
    let mut guests = launched(ram(4 * MIB), 1);
    let guest = &mut guests.vcpus[0];
    guest.accept(0x8000, 1).unwrap();
    // KVM has been told that the block is private: a shared access exits and converts.
    guest.write_shared(0x8000, b"shared").unwrap();
    assert_eq!(guest.counts().converted, 1);
    // And back. The page is a fresh one, and not accepted.
    assert!(matches!(guest.read(0x8000, 1), Err(GuestFailed::Exception { .. })));
    assert_eq!(guest.counts().converted, 2);
    assert_eq!(state(&guests, 0x8000), PageState::GuestInvalid);
}

#[test]
fn the_register_protocol() {
    let mut guests = launched(ram(4 * MIB), 1);
    let guest = &mut guests.vcpus[0];
    let mut ask = |value| match guest.perform(vmgexit(value)).unwrap() {
        OpResult::Instruction(value) => value,
        other => panic!("{other:?}"),
    };
    assert_eq!(ask(0x002), 0x0002_0001_3300_0001, "versions 2 to 1, C-bit 51");
    assert_eq!(ask(0x010), 0xffff_ffff_ffff_f011);
    assert_eq!(ask(0x080), 0x3081);
    assert_eq!(ask(0x1_2345_6012), 0x1_2345_6013);
    assert_eq!(ask(2 << 52 | 0x5000 | 0x014), 0x015);
    // Not memory; an operation that there is not; a frame of all 40 bits.
    assert_eq!(ask(1 << 52 | 0x4000_0000 | 0x014), 0x8000_0000_0000_0015);
    assert_eq!(ask(3 << 52 | 0x5000 | 0x014), 0x8000_0000_0000_0015);
    assert_eq!(ask(0x00ff_ffff_ffff_f014 & !(0xe << 52)), 0x8000_0000_0000_0015);
    // What is no request stays as it is.
    assert_eq!([ask(0x7ff), ask(0x016)], [0x7ff, 0x016]);
    assert_eq!(guests.memory.state(Gfn::containing(0x5000)), Some(State::Shared));
    // Giving up leaves KVM with a system event.
    let vcpu = guests.vcpus[0].vcpu();
    vcpu.start(vmgexit(0x100));
    assert!(matches!(vcpu.run(), Ok(Exit::Other(Some(24)))));
}

/// A guest that is never answered "try again", even while a device holds the page.
#[test]
fn a_refused_change_is_an_error_to_the_guest_and_nothing_else() {
    let mut guests = launched(ram(4 * MIB), 1);
    guests.vcpus[0].change(0x8000, 4, Operation::Shared).unwrap();
    let memory = std::sync::Arc::clone(&guests.memory);
    let _pin = memory.pin(GfnRange::from_bytes(0x8000, PAGE).unwrap()).unwrap();
    let answer = guests.vcpus[0].perform(vmgexit(msr::page_state_request(8, Operation::Private))).unwrap();
    assert_eq!(answer, OpResult::Instruction(0x8000_0000_0000_0015));
    assert_eq!(memory.state(Gfn::containing(0x8000)), Some(State::Shared));
}

#[test]
fn no_acceptance_before_the_launch_is_finished() {
    let snp = cvm_memory_sev::soft::SoftSnp::new();
    let memory = std::sync::Arc::new(ram(MIB).build(std::sync::Arc::new(snp.vm().clone())).unwrap());
    let mut guest = SnpGuest::new(&snp, &memory);
    assert!(matches!(guest.read(0, 1), Err(GuestFailed::Run(Errno::EINVAL))), "not initialised");
    let mut prefault = cvm_memory::hypervisor::PreFaultMemory { gpa: 0, size: PAGE, flags: 0 };
    assert_eq!(guest.vcpu().pre_fault_memory(&mut prefault), Err(Errno::EOPNOTSUPP));
}

/// The file page is bound elsewhere without having been freed: KVM maps it, and the guest faults for ever, but can be stopped.
#[test]
fn bound_elsewhere_without_a_hole_the_guest_spins() {
    use cvm_memory::hypervisor::{Hypervisor, MemoryAttributes, MemoryRegion};
    let guests = launched(ram(MIB), 1);
    let vm = guests.snp.vm();
    let file = vm.create_guest_memfd(PAGE, 0).unwrap();
    let bind = |gpa: u64, size: u64| {
        let region = MemoryRegion {
            slot: 9,
            flags: 4,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: 0x1000,
            guest_memfd_offset: 0,
            guest_memfd: std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&file)),
        };
        // SAFETY: a model; its guest makes no shared access here.
        unsafe { vm.set_user_memory_region2(&region) }.unwrap();
    };
    vm.set_memory_attributes(&MemoryAttributes { address: 1 << 30, size: 2 * PAGE, attributes: 8, flags: 0 }).unwrap();
    let Guests { mut vcpus, .. } = guests;
    let vcpu = vcpus[0].vcpu();
    bind(1 << 30, PAGE);
    vcpu.start(cvm_memory_sev::soft::pvalidate(1 << 30, cvm_memory_sev::rmp::Size::Small, true));
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    bind(1 << 30, 0);
    bind((1 << 30) + PAGE, PAGE);
    vcpu.start(GuestOp::Read { gpa: (1 << 30) + PAGE, len: 1, private: true });
    let stop = vcpu.immediate_exit();
    let seen = std::thread::scope(|scope| {
        let running = scope.spawn(|| vcpu.run().map(drop));
        while vm_faults(vm) == 0 {
            std::thread::yield_now();
        }
        stop.set(true);
        running.join().unwrap()
    });
    assert_eq!(seen, Err(Errno::EINTR));
    stop.set(false);
    // With a hole in between it is a new page.
    file.punch_hole(FileRange::from_bytes(0, PAGE).unwrap()).unwrap();
    assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    assert_eq!(vcpu.take_result(), Some(OpResult::Exception), "assigned to the new frame, and not accepted");
}

/// Whether the frame at the new address has been mapped.
fn vm_faults(vm: &cvm_memory::soft::SoftVm) -> usize {
    let at = Gfn::containing((1 << 30) + PAGE);
    vm.mappings().iter().filter(|mapping| mapping.gfns.contains(at)).count()
}

/// What Linux does at boot: a bounce buffer of 64 MiB to shared, a return of it as for kexec, lazy acceptance of 4 MiB at a
/// time, with and without prefault.
#[test]
fn linux_boots() {
    const SWIOTLB: u64 = 16 * MIB;
    let mut guests = launched(ram(160 * MIB).materialise(Materialise::Lazy), 1);
    let guest = &mut guests.vcpus[0];
    guest.set_up_ghcb(0x1000).unwrap();
    // The bounce buffer was accepted with all memory below 128 MiB; here only its first and last pages matter.
    guest.accept(SWIOTLB, 64 * MIB / PAGE).unwrap();
    guest.write(SWIOTLB, b"stale secret").unwrap();
    let before = guest.counts();
    guest.share(SWIOTLB, 64 * MIB / PAGE).unwrap();
    // 32 entries of 2 MiB in a row are one exit.
    assert_eq!(guest.counts().converted - before.converted, 1);
    guest.write_shared(SWIOTLB + 5, b"dma").unwrap();
    let whole = |start: u64, bytes: u64| GfnRange::from_bytes(start, bytes).unwrap();
    let save_area = (whole(0xffff_ffff_f000, PAGE), PageState::GuestValid);
    assert_eq!(guests.snp.rmp_by_gfn(), [save_area], "all of it was freed");
    assert_eq!(guests.memory.state(Gfn::containing(SWIOTLB + 64 * MIB - 1)), Some(State::Shared));

    // kexec: everything back, and nothing of before is to be seen.
    let guest = &mut guests.vcpus[0];
    guest.accept(SWIOTLB, 64 * MIB / PAGE).unwrap();
    assert_eq!(guest.read(SWIOTLB, 12).unwrap(), [0; 12]);
    assert_eq!(guests.snp.rmp_by_gfn(), [(whole(SWIOTLB, 64 * MIB), PageState::GuestValid), save_area]);

    // Memory that was never accepted: each page faults once, unless it was prefaulted.
    let mapped = |guests: &Guests, start: u64| -> u64 {
        let unit = whole(start, 4 * MIB);
        let inside = guests.snp.vm().mappings().into_iter().filter_map(|mapping| mapping.gfns.intersection(&unit));
        inside.map(|gfns| gfns.pages()).sum()
    };
    for (start, prefault) in [(96 * MIB, false), (100 * MIB, true)] {
        if prefault {
            let range = whole(start, 4 * MIB);
            let mut vcpus: Vec<&mut dyn cvm_memory::hypervisor::Vcpu> = vec![guests.vcpus[0].vcpu()];
            let options = PrefaultOptions::default();
            let go_on = &mut |_| std::ops::ControlFlow::Continue(());
            guests.memory.prefault(&[range], &mut vcpus, &options, go_on).unwrap();
        }
        assert_eq!(mapped(&guests, start), if prefault { 1024 } else { 0 });
        let updates = guests.snp.machine().counters().rmpupdate;
        let exits = guests.vcpus[0].counts().total();
        guests.vcpus[0].accept(start, 1024).unwrap();
        assert_eq!(mapped(&guests, start), 1024);
        assert_eq!(guests.snp.machine().counters().rmpupdate - updates, if prefault { 0 } else { 1024 });
        // One request for both entries of 2 MiB changes nothing; then KVM is told of each 2 MiB, unless it has been.
        assert_eq!(guests.vcpus[0].counts().total() - exits, if prefault { 1 } else { 3 });
        assert_eq!(state(&guests, start + 4 * MIB - PAGE), PageState::GuestValid);
    }
    assert_eq!(guests.snp.machine().counters().failed, 0);
    let Guests { snp, memory, vcpus } = guests;
    let machine = std::sync::Arc::clone(snp.machine());
    drop((vcpus, memory, snp));
    assert_eq!(machine.assigned(), 0, "nothing is left after the VM");
}

/// A bounce buffer of 64 MiB that does not begin at a boundary of 2 MiB: entries of both sizes, in three buffers; each run of
/// one size in a buffer is one exit.
#[test]
fn a_bounce_buffer_in_entries_of_both_sizes() {
    const START: u64 = 16 * MIB + PAGE;
    const SIZE: u64 = 64 * MIB;
    let mut guests = launched(ram(160 * MIB).materialise(Materialise::Lazy), 1);
    let guest = &mut guests.vcpus[0];
    guest.set_up_ghcb(0x1000).unwrap();
    guest.accept(START, SIZE / PAGE).unwrap();
    guest.write(START + SIZE - 8, b"secret").unwrap();
    let before = guest.counts();
    guest.share(START, SIZE / PAGE).unwrap();
    // 511 small pages up to the boundary, 31 large ones, and a small one: 253 and 253 entries, then 5, 31 and 1.
    assert_eq!(guest.counts().converted - before.converted, 5);
    assert_eq!(guest.counts().total() - before.total(), 5);
    guest.write_shared(START + SIZE - 8, b"dma").unwrap();
    let shared = GfnRange::from_bytes(START, SIZE).unwrap();
    for (gfn, expected) in [
        (shared.start().get() - 1, State::Private),
        (shared.start().get(), State::Shared),
        (shared.end().get() - 1, State::Shared),
        (shared.end().get(), State::Private),
    ] {
        assert_eq!(guests.memory.state(Gfn::new(gfn).unwrap()), Some(expected), "gfn {gfn:#x}");
    }
    let left = guests.snp.rmp_by_gfn();
    assert!(left.iter().all(|(gfns, _)| !gfns.overlaps(&shared)), "all of it was freed: {left:x?}");
    // And back: nothing of before is to be seen.
    let guest = &mut guests.vcpus[0];
    guest.accept(START, SIZE / PAGE).unwrap();
    assert_eq!(guest.counts().converted - before.converted, 10);
    assert_eq!(guest.read(START + SIZE - 8, 8).unwrap(), [0; 8]);
    assert_eq!(guests.snp.machine().counters().failed, 0);
}
