//! guest_memfd files: creation, fallocate, clipping of punched holes, closing, broken pages. Numbers from the kernel's
//! guest_memfd_test and from the clipping vectors of `kvm_gmem_invalidate_start()`.

mod soft_kit;

use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};

use cvm_memory::addr::{FilePage, GfnRange};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Cap, Hypervisor, PreFaultMemory, Vcpu};
use cvm_memory::soft::attributes::Flavour;
use cvm_memory::soft::{Counters, Event, OpResult, SoftVm};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use soft_kit::*;

const KEEP: FallocateFlags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
const PUNCH: FallocateFlags = FallocateFlags::FALLOC_FL_KEEP_SIZE.union(FallocateFlags::FALLOC_FL_PUNCH_HOLE);

fn call(file: &GuestMemfd, mode: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
    file.ops().fallocate(mode, offset.cast_signed(), len.cast_signed())
}

#[test]
fn sizes_and_flags() {
    for (vm, legal) in [(SoftVm::default_type(), 3), (SoftVm::software_protected(), 1), (SoftVm::tagged(), 1)] {
        assert_eq!(vm.check_extension(Cap::GUEST_MEMFD_FLAGS), legal);
        for size in (1..PAGE).chain([0, PAGE + 1, 1 << 63, !(PAGE - 1)]) {
            assert_eq!(vm.create_guest_memfd(size, 0).unwrap_err(), Errno::EINVAL, "{size:#x}");
        }
        for bit in 0..64 {
            let flags = 1_u64 << bit;
            let made = vm.create_guest_memfd(4 * PAGE, flags).map(|file| file.flags().bits());
            assert_eq!(made, if flags & legal == flags { Ok(flags) } else { Err(Errno::EINVAL) }, "bit {bit}");
        }
        assert!(vm.create_guest_memfd(1 << 40, 0).is_ok(), "memory is allocated lazily");
    }
}

#[test]
fn two_files_are_two_inodes_and_close_on_exec() {
    let vm = SoftVm::software_protected();
    let files = [vm.create_guest_memfd(PAGE, 0).unwrap(), vm.create_guest_memfd(2 * PAGE, 0).unwrap()];
    let stat = files.each_ref().map(|file| std::fs::metadata(format!("/proc/self/fd/{}", fd(file))).unwrap());
    assert_ne!(stat[0].ino(), stat[1].ino());
    assert_eq!([stat[0].size(), stat[1].size()], [PAGE, 2 * PAGE]);
    assert_eq!(stat[0].blksize(), PAGE);
    let flags = nix::fcntl::fcntl(&files[0], nix::fcntl::FcntlArg::F_GETFD).unwrap();
    assert_eq!(flags, nix::libc::FD_CLOEXEC);
}

#[test]
fn fallocate() {
    let vm = SoftVm::software_protected();
    let size = 4 * PAGE;
    let file = vm.create_guest_memfd(size, 0).unwrap();
    assert_eq!(call(&file, KEEP, 0, size), Ok(()));
    assert_eq!(call(&file, PUNCH, 0, size), Ok(()));
    for mode in [KEEP, PUNCH] {
        assert_eq!(call(&file, mode, PAGE - 1, PAGE), Err(Errno::EINVAL));
        assert_eq!(call(&file, mode, 0, PAGE - 1), Err(Errno::EINVAL));
        assert_eq!(call(&file, mode, 0, 0), Err(Errno::EINVAL));
        assert_eq!(call(&file, mode, PAGE.wrapping_neg(), PAGE), Err(Errno::EINVAL));
        let top = i64::MAX.unsigned_abs() & !(PAGE - 1);
        assert_eq!(call(&file, mode, top, PAGE), Err(Errno::EFBIG));
    }
    for (offset, len) in [(size, PAGE), (size - PAGE, 2 * PAGE), (size + PAGE, PAGE), (0, size + PAGE)] {
        assert_eq!(call(&file, KEEP, offset, len), Err(Errno::EINVAL));
        assert_eq!(call(&file, PUNCH, offset, len), Ok(()));
    }
    // Punching: every pair of these offsets and lengths that is not aligned, or has no length.
    for offset in [0, 1, PAGE] {
        for len in [0, 1, PAGE - 1, PAGE, PAGE + 1] {
            let legal = offset % PAGE == 0 && len % PAGE == 0 && len != 0;
            assert_eq!(call(&file, PUNCH, offset, len), if legal { Ok(()) } else { Err(Errno::EINVAL) });
        }
    }
    // Every mode but those two.
    for bits in (0..0x100).filter(|bits| ![KEEP.bits(), PUNCH.bits()].contains(bits)) {
        let mode = FallocateFlags::from_bits_retain(bits);
        assert_eq!(call(&file, mode, 0, PAGE), Err(Errno::EOPNOTSUPP), "mode {bits:#x}");
    }
}

#[test]
fn residency_and_counters() {
    let vm = SoftVm::software_protected();
    let file = vm.create_guest_memfd(4 * PAGE, 0).unwrap();
    let before = vm.counters();
    file.allocate(file_pages(1, 3)).unwrap();
    assert_eq!(file.resident_bytes().unwrap_or(2 * PAGE), 2 * PAGE);
    file.punch_hole(file_pages(2, 4)).unwrap();
    assert_eq!(file.resident_bytes().unwrap_or(PAGE), PAGE);
    let want = Counters { allocate: 1, punch_hole: 1, ..Counters::default() };
    assert_eq!(vm.counters().since(&before), want);
}

/// Slots A and B over one file, everything mapped.
fn two_slots(vm: &SoftVm) -> GuestMemfd {
    let file = vm.create_guest_memfd(0x50 * PAGE, 0).unwrap();
    set_region(vm, &gmem_slot(0, 0x1000 * PAGE, 0x10 * PAGE, 0, &file, 0x20 * PAGE)).unwrap();
    set_region(vm, &gmem_slot(1, 0x5000 * PAGE, 0x10 * PAGE, 0, &file, 0x30 * PAGE)).unwrap();
    let mut vcpu = vm.create_vcpu();
    for base in [0x1000, 0x5000] {
        set_private(vm, base * PAGE, 0x10 * PAGE, true);
        finish(&mut vcpu, fill(base * PAGE, 0x10 * PAGE, 0xaa, true));
    }
    file
}

/// What is not mapped any more, of the frames of A and B.
fn lost(vm: &SoftVm) -> Vec<GfnRange> {
    let all = [gfns(0x1000, 0x1010), gfns(0x5000, 0x5010)];
    cvm_memory::addr::subtract_lists(&all, &mapped(vm))
}

#[test]
fn holes_are_clipped_to_each_slot() {
    let cases: [(u64, u64, &[GfnRange]); 9] = [
        (0x20, 0x30, &[gfns(0x1000, 0x1010)]),
        (0x00, 0x28, &[gfns(0x1000, 0x1008)]),
        (0x28, 0x40, &[gfns(0x1008, 0x1010), gfns(0x5000, 0x5010)]),
        (0x24, 0x25, &[gfns(0x1004, 0x1005)]),
        (0x10, 0x20, &[]),
        (0x40, 0x48, &[]),
        (0x30, 0x38, &[gfns(0x5000, 0x5008)]),
        (0x00, u64::MAX >> 13, &[gfns(0x1000, 0x1010), gfns(0x5000, 0x5010)]),
        (0x28, 0x38, &[gfns(0x1008, 0x1010), gfns(0x5000, 0x5008)]),
    ];
    for (start, end, want) in cases {
        let vm = SoftVm::software_protected();
        let file = two_slots(&vm);
        assert_eq!(lost(&vm), []);
        let seq = vm.invalidate_seq();
        let events = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&events);
        vm.observe(move |event| log.lock().unwrap().push(*event));
        assert_eq!(call(&file, PUNCH, start * PAGE, (end - start) * PAGE), Ok(()));
        assert_eq!(lost(&vm), want, "[{start:#x}, {end:#x})");
        // The sequence moves only if a slot was met, and then once for all of them; the hull covers all.
        assert_eq!(vm.invalidate_seq() - seq, u64::from(!want.is_empty()));
        let hull = want.iter().fold(gfns(0, 0), |hull, part| hull.hull(part));
        let unmapped = want.iter().map(|gfns| Event::Unmapped { gfns: *gfns, flavour: Flavour::Private, hull });
        let ended = (!want.is_empty()).then_some(Event::Invalidated(seq + 1));
        assert_eq!(*events.lock().unwrap(), unmapped.chain(ended).collect::<Vec<_>>());
        // What is gone is zero, what is left is not; attributes have not changed.
        let mut vcpu = vm.create_vcpu();
        for base in [0x1000, 0x5000] {
            for page in base..base + 0x10 {
                let gone = want.iter().any(|range| range.contains(gfn(page)));
                let byte = if gone { 0 } else { 0xaa };
                assert_eq!(finish(&mut vcpu, check(page * PAGE, PAGE, byte, true)), OpResult::Done, "{page:#x}");
            }
        }
        assert_eq!(vm.private_gfns(), [gfns(0x1000, 0x1010), gfns(0x5000, 0x5010)]);
    }
}

/// The memory of a file outlives every handle of its VM.
#[test]
fn file_outlives_the_vm_handle() {
    let vm = SoftVm::software_protected();
    let file = two_slots(&vm);
    drop(vm);
    file.punch_hole(file.pages()).unwrap();
    file.allocate(file.pages()).unwrap();
}

#[test]
fn closing_a_file_leaves_its_slots() {
    let vm = SoftVm::software_protected();
    let file = two_slots(&vm);
    // From the moment it is being closed, nothing is mapped from it, though the slots are still bound.
    let inner = vm.clone();
    let asked = Arc::new(Mutex::new(None));
    let answer = Arc::clone(&asked);
    vm.observe(move |event| {
        if let Event::Invalidated(_) = event {
            let mut range = PreFaultMemory { gpa: 0x1000 * PAGE, size: PAGE, flags: 0 };
            *answer.lock().unwrap() = Some(inner.create_vcpu().pre_fault_memory(&mut range));
        }
    });
    drop(file);
    vm.stop_observing();
    assert_eq!(*asked.lock().unwrap(), Some(Err(Errno::EFAULT)));
    assert_eq!(mapped(&vm), []);
    assert_eq!(vm.slots().iter().map(|slot| slot.file_open).collect::<Vec<_>>(), [false, false]);
    let mut vcpu = vm.create_vcpu();
    let exit = fault(&mut vcpu, read(0x1003 * PAGE + 5, 1, true));
    assert_eq!((exit.errno, exit.flags, exit.gpa, exit.size), (Errno::EFAULT, 8, 0x1003 * PAGE, PAGE));
    // It still occupies its frames.
    let other = vm.create_guest_memfd(PAGE, 0).unwrap();
    assert_eq!(set_region(&vm, &gmem_slot(2, 0x1000 * PAGE, PAGE, 0, &other, 0)), Err(Errno::EEXIST));
    set_region(&vm, &delete(0)).unwrap();
    set_region(&vm, &delete(1)).unwrap();
    set_region(&vm, &gmem_slot(2, 0x1000 * PAGE, PAGE, 0, &other, 0)).unwrap();
}

/// Rebinding the same file pages at another address keeps their contents; only a hole clears them.
#[test]
fn contents_survive_the_slot() {
    let vm = SoftVm::software_protected();
    let file = two_slots(&vm);
    set_region(&vm, &delete(0)).unwrap();
    set_region(&vm, &gmem_slot(7, 0x9000 * PAGE, 8 * PAGE, 0, &file, 0x28 * PAGE)).unwrap();
    set_private(&vm, 0x9000 * PAGE, 8 * PAGE, true);
    let mut vcpu = vm.create_vcpu();
    assert_eq!(finish(&mut vcpu, check(0x9000 * PAGE, 8 * PAGE, 0xaa, true)), OpResult::Done);
}

#[test]
fn a_broken_page_stays_until_a_hole_is_punched() {
    let vm = SoftVm::tagged();
    let file = two_slots(&vm);
    vm.poison(&file, FilePage::new(0x24).unwrap()).unwrap();
    assert_eq!(lost(&vm), [gfns(0x1004, 0x1005)]);
    let mut vcpu = vm.create_vcpu();
    for _ in 0..2 {
        let exit = fault(&mut vcpu, read(0x1004 * PAGE, 1, true));
        assert_eq!((exit.errno, exit.flags, exit.gpa), (Errno::EHWPOISON, 8, 0x1004 * PAGE));
    }
    assert_eq!(finish(&mut vcpu, check(0x1005 * PAGE, PAGE, 0xaa, true)), OpResult::Done);
    file.punch_hole(file_pages(0x24, 0x25)).unwrap();
    assert_eq!(finish(&mut vcpu, check(0x1004 * PAGE, PAGE, 0, true)), OpResult::Done);
    assert_eq!(vm.poison(&file, FilePage::new(0x50).unwrap()), Err(Errno::EINVAL));
}

/// guest_memfd_test: a file that can be mapped serves shared accesses too, and the guest and the host see each other's bytes.
#[test]
fn shared_accesses_of_a_mappable_file() {
    let vm = SoftVm::default_type();
    let file = vm.create_guest_memfd(4 * PAGE, MMAP | INIT_SHARED).unwrap();
    // The slot's address in this process is a bad one: no fault looks at it.
    set_region(&vm, &gmem_slot(0, 4 << 30, 4 * PAGE, 0, &file, 0)).unwrap();
    let host = std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", fd(&file))).unwrap();
    let mut vcpu = vm.create_vcpu();
    assert_eq!(finish(&mut vcpu, fill(4 << 30, 4 * PAGE, 0x11, false)), OpResult::Done);
    std::os::unix::fs::FileExt::write_all_at(&host, &[0xaa; 4096], 0).unwrap();
    assert_eq!(finish(&mut vcpu, check(4 << 30, PAGE, 0xaa, false)), OpResult::Done);
    assert_eq!(finish(&mut vcpu, fill(4 << 30, PAGE, 0xff, false)), OpResult::Done);
    let mut seen = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&host, &mut seen, 0).unwrap();
    assert_eq!(seen, [0xff; 4096]);
    // Holes of such a file take shared mappings away.
    file.punch_hole(file_pages(0, 1)).unwrap();
    assert_eq!(mapped(&vm), [gfns((4 << 18) + 1, (4 << 18) + 4)]);
    assert_eq!(finish(&mut vcpu, check(4 << 30, PAGE, 0, false)), OpResult::Done);
    assert_eq!(finish(&mut vcpu, check((4 << 30) + PAGE, 3 * PAGE, 0x11, false)), OpResult::Done);
}

/// `kvm_gmem_populate()`: within one slot, private pages only, the error of the first page alone counts.
#[test]
fn initial_contents() {
    let vm = SoftVm::software_protected();
    let file = vm.create_guest_memfd(8 * PAGE, 0).unwrap();
    set_region(&vm, &gmem_slot(0, 0, 4 * PAGE, 0, &file, 2 * PAGE)).unwrap();
    let source = Ram::new(4);
    source.fill(0x5a);
    let mut pages = Vec::new();
    let mut each = |page: cvm_memory::soft::GmemPage, _, _: &mut [u8]| {
        pages.push(page.page.get());
        Ok(())
    };
    assert_eq!(vm.populate(gfn(9), 1, Some(source.hva()), &mut each), Err(Errno::EINVAL), "no slot");
    assert_eq!(vm.populate(gfn(0), 1, Some(source.hva()), &mut each), Err(Errno::EINVAL), "not private");
    set_private(&vm, 0, 3 * PAGE, true);
    assert_eq!(vm.populate(gfn(0), 1, Some(8), &mut each), Err(Errno::EFAULT), "bad source");
    assert_eq!(vm.populate(gfn(1), 9, Some(source.hva()), &mut each), Ok(2), "the third is not private");
    assert_eq!(pages, [3, 4]);
    let mut vcpu = vm.create_vcpu();
    assert_eq!(finish(&mut vcpu, check(0, PAGE, 0, true)), OpResult::Done);
    assert_eq!(finish(&mut vcpu, check(PAGE, 2 * PAGE, 0x5a, true)), OpResult::Done);
    // A page that the platform refuses is zeroed at its next use.
    assert_eq!(vm.populate(gfn(1), 1, Some(source.hva()), &mut |_, _, _| Err(Errno::EIO)), Err(Errno::EIO));
}
