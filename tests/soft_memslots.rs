//! The errno of every memslot request, in KVM's order, as the kernel's selftests and `kvm_set_memory_region()` have them.

mod soft_kit;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use cvm_memory::hypervisor::{Cap, Exit, Hypervisor, MemoryRegion, PreFaultMemory, Vcpu};
use cvm_memory::layout::SlotId;
use cvm_memory::soft::{Event, GuestOp, OpResult, SoftVm};
use nix::errno::Errno;
use soft_kit::*;

const MIB: u64 = 1 << 20;
const GPA: u64 = 0xc000_0000;

fn types() -> [SoftVm; 3] {
    [SoftVm::default_type(), SoftVm::software_protected(), SoftVm::tagged()]
}

/// set_memory_region_test: each of the 32 flag bits alone.
#[test]
fn flag_bits() {
    for vm in types() {
        let file = vm.create_guest_memfd(2 * MIB, 0).unwrap();
        for bit in 0..32 {
            let flags = 1 << bit;
            let region =
                MemoryRegion { flags, guest_memfd: fd(&file), ..shared_slot(0, GPA, 2 * MIB, Ram::new(1).hva()) };
            let legal = match flags {
                LOG_DIRTY | GUEST_MEMFD => true,
                READONLY => vm.check_extension(Cap::READONLY_MEM) == 1,
                _ => false,
            };
            assert_eq!(set_region(&vm, &region), if legal { Ok(()) } else { Err(Errno::EINVAL) }, "bit {bit}");
            if legal {
                set_region(&vm, &delete(0)).unwrap();
            }
        }
        for other in [LOG_DIRTY, READONLY] {
            let region = gmem_slot(0, GPA, 2 * MIB, 0, &file, 0);
            let region = MemoryRegion { flags: GUEST_MEMFD | other, ..region };
            assert_eq!(set_region(&vm, &region), Err(Errno::EINVAL));
        }
    }
    assert_eq!(SoftVm::default_type().check_extension(Cap::READONLY_MEM), 1);
    assert_eq!(SoftVm::software_protected().check_extension(Cap::READONLY_MEM), 1);
}

/// set_memory_region_test: as many slots as KVM_CAP_NR_MEMSLOTS says, and not one more.
#[test]
fn number_of_slots() {
    let vm = SoftVm::software_protected();
    assert_eq!(vm.check_extension(Cap::NR_MEMSLOTS), 32764);
    for slot in 0..32764_u32 {
        set_region(&vm, &shared_slot(slot, u64::from(slot) * PAGE, PAGE, 0)).unwrap();
    }
    for slot in 32764..32770 {
        assert_eq!(set_region(&vm, &shared_slot(slot, u64::from(slot) * PAGE, PAGE, 0)), Err(Errno::EINVAL));
    }
}

/// set_memory_region_test: what is no guest_memfd of this VM.
#[test]
fn file_descriptors() {
    let vm = SoftVm::software_protected();
    let other_vm = SoftVm::software_protected();
    let foreign = other_vm.create_guest_memfd(2 * MIB, 0).unwrap();
    let memfd = memfd::MemfdOptions::new().create("plain").unwrap();
    let null = File::open("/dev/null").unwrap();
    let with = |fd| MemoryRegion { flags: GUEST_MEMFD, guest_memfd: fd, ..shared_slot(10, GPA, 2 * MIB, 0) };
    for fd in [fd(&foreign), memfd.as_file().as_raw_fd(), null.as_raw_fd()] {
        assert_eq!(set_region(&vm, &with(fd)), Err(Errno::EINVAL));
    }
    for fd in [-1, i32::MAX, i32::MIN] {
        assert_eq!(set_region(&vm, &with(fd)), Err(Errno::EBADF));
    }
    let file = vm.create_guest_memfd(2 * MIB, 0).unwrap();
    for offset in 1..PAGE {
        assert_eq!(set_region(&vm, &gmem_slot(10, GPA, 2 * MIB, 0, &file, offset)), Err(Errno::EINVAL));
    }
    // Beyond the end, and sums that are negative as a signed number or wrap.
    let top = i64::MAX.unsigned_abs() & !(PAGE - 1);
    for offset in [PAGE, 2 * MIB, top, top + PAGE, !(PAGE - 1), 0_u64.wrapping_sub(2 * MIB)] {
        assert_eq!(set_region(&vm, &gmem_slot(10, GPA, 2 * MIB, 0, &file, offset)), Err(Errno::EINVAL), "{offset:#x}");
    }
    assert_eq!(vm.slots(), []);
    set_region(&vm, &gmem_slot(10, GPA, 2 * MIB, 0, &file, 0)).unwrap();
}

/// set_memory_region_test: overlaps at the front and at the back, in the file and in guest memory, are EEXIST all four.
#[test]
fn overlaps() {
    let vm = SoftVm::software_protected();
    let file = vm.create_guest_memfd(8 * MIB, 0).unwrap();
    set_region(&vm, &gmem_slot(10, GPA, 2 * MIB, 0, &file, 0)).unwrap();
    set_region(&vm, &gmem_slot(11, GPA + 4 * MIB, 2 * MIB, 0, &file, 4 * MIB)).unwrap();
    for offset in [MIB, 3 * MIB] {
        assert_eq!(set_region(&vm, &gmem_slot(12, 0, 2 * MIB, 0, &file, offset)), Err(Errno::EEXIST));
    }
    for gpa in [GPA + MIB, GPA + 3 * MIB] {
        assert_eq!(set_region(&vm, &gmem_slot(12, gpa, 2 * MIB, 0, &file, 6 * MIB)), Err(Errno::EEXIST));
    }
    // Ranges that touch do not overlap.
    set_region(&vm, &gmem_slot(12, GPA + 2 * MIB, 2 * MIB, 0, &file, 2 * MIB)).unwrap();
    set_region(&vm, &delete(12)).unwrap();
    // Deleting gives the file range back.
    set_region(&vm, &gmem_slot(13, 0, 2 * MIB, 0, &file, 2 * MIB)).unwrap();
}

/// The first check that fails decides.
#[test]
fn order_of_checks() {
    let vm = SoftVm::software_protected();
    let file = vm.create_guest_memfd(4 * MIB, 0).unwrap();
    set_region(&vm, &gmem_slot(1, GPA, 2 * MIB, 0, &file, 0)).unwrap();
    // GPA overlap before the descriptor.
    let region = MemoryRegion { guest_memfd: -1, ..gmem_slot(2, GPA, 2 * MIB, 0, &file, 0) };
    assert_eq!(set_region(&vm, &region), Err(Errno::EEXIST));
    // Bad flags and alignment before GPA overlap.
    assert_eq!(set_region(&vm, &MemoryRegion { flags: 0x5, ..region }), Err(Errno::EINVAL));
    assert_eq!(set_region(&vm, &MemoryRegion { guest_phys_addr: GPA + 1, ..region }), Err(Errno::EINVAL));
    // Descriptor before the limit of guest addresses, that limit before the file overlap.
    let high = MemoryRegion { guest_phys_addr: 1 << 52, ..gmem_slot(2, 0, 2 * MIB, 0, &file, 0) };
    assert_eq!(set_region(&vm, &MemoryRegion { guest_memfd: -1, ..high }), Err(Errno::EBADF));
    assert_eq!(set_region(&vm, &high), Err(Errno::EINVAL));
    assert_eq!(set_region(&vm, &gmem_slot(2, 0, 2 * MIB, 0, &file, 0)), Err(Errno::EEXIST));
    // The last legal frame.
    set_region(&vm, &shared_slot(3, (1 << 52) - PAGE, PAGE, 0)).unwrap();
    assert_eq!(set_region(&vm, &shared_slot(4, (1 << 52) - PAGE, 2 * PAGE, 0)), Err(Errno::EEXIST));
}

#[test]
fn addresses_and_sizes() {
    let vm = SoftVm::default_type();
    let user_end = (1 << 47) - PAGE;
    let bad = [
        shared_slot(0, 0, PAGE + 1, 0),
        shared_slot(0, 1, PAGE, 0),
        shared_slot(0, 0, PAGE, 1),
        shared_slot(0, 0, PAGE, user_end),
        shared_slot(0, 0, PAGE, !(PAGE - 1)),
        shared_slot(0, !(PAGE - 1), PAGE, 0),
        shared_slot(0, PAGE, 0_u64.wrapping_sub(PAGE), 0),
        shared_slot(0, 0, PAGE << 31, 0),
        shared_slot(2 << 16, 0, PAGE, 0),
        shared_slot(0, 0, 0, 0),
    ];
    for region in bad {
        assert_eq!(set_region(&vm, &region), Err(Errno::EINVAL), "{region:x?}");
    }
    set_region(&vm, &shared_slot(0, 0, ((1 << 31) - 1) * PAGE, 0)).unwrap();
    set_region(&vm, &delete(0)).unwrap();
    set_region(&vm, &shared_slot(0, 0, PAGE, user_end - PAGE)).unwrap();
    // A second address space exists only without private memory, with ids and addresses of its own.
    set_region(&vm, &shared_slot(1 << 16, 0, PAGE, 0)).unwrap();
    assert_eq!(vm.check_extension(Cap::MULTI_ADDRESS_SPACE), 2);
    for vm in [SoftVm::software_protected(), SoftVm::tagged()] {
        assert_eq!(vm.check_extension(Cap::MULTI_ADDRESS_SPACE), 1);
        assert_eq!(set_region(&vm, &shared_slot(1 << 16, 0, PAGE, 0)), Err(Errno::EINVAL));
    }
    // The fields of a DELETE are checked as well, but its descriptor is not.
    assert_eq!(set_region(&vm, &MemoryRegion { userspace_addr: 1, ..delete(0) }), Err(Errno::EINVAL));
    set_region(&vm, &MemoryRegion { flags: GUEST_MEMFD, guest_memfd: -1, ..delete(0) }).unwrap();
}

/// What a request on an existing slot is, and how many swaps it takes.
#[test]
fn classification() {
    let vm = SoftVm::default_type();
    let ram = Ram::new(4);
    let slot = shared_slot(5, GPA, 2 * PAGE, ram.hva());
    let generation = || vm.generation(0);
    let swaps = |before: u64| (generation() - before) / 2;

    let before = generation();
    assert_eq!(before, 0);
    set_region(&vm, &slot).unwrap();
    assert_eq!(swaps(before), 1);
    let before = generation();
    set_region(&vm, &slot).unwrap();
    assert_eq!(swaps(before), 0, "nothing differs");
    for bad in [
        MemoryRegion { userspace_addr: ram.hva() + PAGE, ..slot },
        MemoryRegion { memory_size: PAGE, ..slot },
        MemoryRegion { flags: READONLY, ..slot },
        MemoryRegion { flags: GUEST_MEMFD, guest_memfd: -1, ..slot },
    ] {
        assert_eq!(set_region(&vm, &bad), Err(Errno::EINVAL), "{bad:x?}");
    }
    set_region(&vm, &MemoryRegion { flags: LOG_DIRTY, ..slot }).unwrap();
    assert_eq!(swaps(before), 1, "flags only");
    let before = generation();
    set_region(&vm, &MemoryRegion { guest_phys_addr: GPA - PAGE, ..slot }).unwrap();
    assert_eq!(swaps(before), 2, "move");
    assert_eq!(vm.slots()[0].gfns, gfns((GPA >> 12) - 1, (GPA >> 12) + 1));
    let before = generation();
    set_region(&vm, &delete(5)).unwrap();
    assert_eq!(swaps(before), 2, "delete");
    assert_eq!(set_region(&vm, &delete(5)), Err(Errno::EINVAL));

    // A slot with a file can only be created and deleted.
    let file = vm.create_guest_memfd(2 * PAGE, 0).unwrap();
    let slot = gmem_slot(5, GPA, 2 * PAGE, 0, &file, 0);
    set_region(&vm, &slot).unwrap();
    for bad in [slot, MemoryRegion { guest_phys_addr: 0, ..slot }, MemoryRegion { flags: 0, ..slot }] {
        assert_eq!(set_region(&vm, &bad), Err(Errno::EINVAL), "{bad:x?}");
    }
}

/// A move that fails late has turned the slot INVALID and zapped it; the slot is restored.
#[test]
fn failed_move() {
    let vm = SoftVm::default_type();
    let ram = Ram::new(1);
    let slot = shared_slot(1, GPA, PAGE, ram.hva());
    set_region(&vm, &slot).unwrap();
    set_region(&vm, &shared_slot(2, 0, PAGE, 0)).unwrap();
    let mut vcpu = vm.create_vcpu();
    assert_eq!(finish(&mut vcpu, fill(GPA, 8, 7, false)), OpResult::Done);
    let slots = vm.slots();
    assert_eq!(set_region(&vm, &MemoryRegion { guest_phys_addr: 0, ..slot }), Err(Errno::EEXIST));
    assert_eq!(mapped(&vm).len(), 1, "an overlap is found before anything happens");
    assert_eq!(set_region(&vm, &MemoryRegion { guest_phys_addr: 1 << 52, ..slot }), Err(Errno::EINVAL));
    assert_eq!(mapped(&vm), []);
    assert_eq!(vm.slots(), slots);
    assert_eq!(finish(&mut vcpu, check(GPA, 8, 7, false)), OpResult::Done);
}

/// Between the two swaps of a DELETE: prefault is EAGAIN, a mismatch still exits, other accesses wait for the end.
#[test]
fn window_of_a_delete() {
    let vm = SoftVm::tagged();
    let file = vm.create_guest_memfd(2 * PAGE, 0).unwrap();
    set_region(&vm, &gmem_slot(1, GPA, 2 * PAGE, Ram::new(2).hva(), &file, 0)).unwrap();
    set_private(&vm, GPA, 2 * PAGE, true);
    let waiting = Arc::new(Mutex::new(None));
    let (inner, handle) = (vm.clone(), Arc::clone(&waiting));
    vm.observe(move |event| {
        if *event != Event::SlotInvalid(SlotId::new(1)) {
            return;
        }
        assert!(inner.slots()[0].invalid);
        let mut vcpu = inner.create_vcpu();
        let mut range = PreFaultMemory { gpa: GPA, size: PAGE, flags: 0 };
        assert_eq!(vcpu.pre_fault_memory(&mut range), Err(Errno::EAGAIN));
        assert_eq!(range.size, PAGE);
        assert_eq!(fault(&mut vcpu, read(GPA, 1, false)).flags, 0);
        // Spins in the kernel, until told to leave.
        let mut spinning = inner.create_vcpu();
        let leave = spinning.immediate_exit();
        let thread = std::thread::spawn(move || {
            spinning.start(read(GPA, 1, true));
            spinning.run().map(|exit| format!("{exit:?}"))
        });
        assert!(!thread.is_finished());
        leave.set(true);
        assert_eq!(thread.join().unwrap(), Err(Errno::EINTR));
        // One that is not told to leave finds no slot once the DELETE is through.
        let mut patient = inner.create_vcpu();
        *handle.lock().unwrap() = Some(std::thread::spawn(move || fault(&mut patient, read(GPA + PAGE, 1, true))));
    });
    set_region(&vm, &delete(1)).unwrap();
    vm.stop_observing();
    let fault = waiting.lock().unwrap().take().unwrap().join().unwrap();
    assert_eq!((fault.errno, fault.flags, fault.gpa, fault.size), (Errno::EFAULT, 8, GPA + PAGE, PAGE));
    assert_eq!(vm.slots(), []);
}

/// Deleting one slot of a default VM drops every mapping, unless the quirk is off; other types lose that slot's only.
#[test]
fn what_a_delete_zaps() {
    let ram = Ram::new(2);
    let quirk_off = SoftVm::default_type();
    quirk_off.enable_cap(Cap(213), [1 << 7, 0, 0, 0]).unwrap();
    for (vm, left) in
        [(SoftVm::default_type(), 0), (quirk_off, 1), (SoftVm::software_protected(), 1), (SoftVm::tagged(), 1)]
    {
        set_region(&vm, &shared_slot(1, 0, PAGE, ram.hva())).unwrap();
        set_region(&vm, &shared_slot(2, GPA, PAGE, ram.hva() + PAGE)).unwrap();
        let mut vcpu = vm.create_vcpu();
        finish(&mut vcpu, fill(0, PAGE, 1, false));
        finish(&mut vcpu, fill(GPA, PAGE, 2, false));
        assert_eq!(mapped(&vm).len(), 2);
        set_region(&vm, &delete(1)).unwrap();
        assert_eq!(mapped(&vm).len(), left, "{}", vm.platform().name);
    }
}

/// set_memory_region_test: a slot moves down by a page and back; the reader sees its memory or MMIO, never what lies around
/// that memory.
#[test]
fn move_under_a_reader() {
    let vm = SoftVm::default_type();
    let ram = Ram::new(4);
    ram.fill(2);
    ram.fill_range(PAGE..3 * PAGE, 1);
    let slot = shared_slot(10, GPA, 2 * PAGE, ram.hva() + PAGE);
    set_region(&vm, &slot).unwrap();
    let mut vcpu = vm.create_vcpu();
    let leave = vcpu.immediate_exit();
    let reader = std::thread::spawn(move || {
        let (mut memory, mut mmio) = (0_u32, 0_u32);
        loop {
            vcpu.start(read(GPA, 8, false));
            loop {
                match vcpu.run() {
                    Ok(Exit::Halt) => break,
                    Ok(Exit::Mmio(cvm_memory::hypervisor::Mmio::Read { gpa: GPA, data })) => data.fill(0xbe),
                    Err(Errno::EINTR) => return (memory, mmio),
                    other => panic!("{other:?}"),
                }
            }
            match vcpu.take_result() {
                Some(OpResult::Read(bytes)) if bytes == [1; 8] => memory += 1,
                Some(OpResult::Read(bytes)) if bytes == [0xbe; 8] => mmio += 1,
                other => panic!("{other:?}"),
            }
        }
    });
    for _ in 0..10 {
        set_region(&vm, &MemoryRegion { guest_phys_addr: GPA - PAGE, ..slot }).unwrap();
        set_region(&vm, &slot).unwrap();
    }
    leave.set(true);
    let (memory, mmio) = reader.join().unwrap();
    // The frame is covered before, during and after each move; only the swap itself leaves it without a slot.
    println!("{memory} reads of memory, {mmio} as MMIO");
}

#[test]
fn a_dead_vm_answers_eio() {
    let vm = SoftVm::software_protected();
    let file = vm.create_guest_memfd(2 * PAGE, 0).unwrap();
    let mut vcpu = vm.create_vcpu();
    vm.kill();
    assert_eq!(set_region(&vm, &delete(99_999)), Err(Errno::EIO));
    assert_eq!(vm.create_guest_memfd(1, u64::MAX).unwrap_err(), Errno::EIO);
    let attributes = cvm_memory::hypervisor::MemoryAttributes { flags: 1, ..Default::default() };
    assert_eq!(vm.set_memory_attributes(&attributes), Err(Errno::EIO));
    assert_eq!(vm.enable_cap(Cap(0), [0; 4]), Err(Errno::EIO));
    assert_eq!(vm.check_extension(Cap::GUEST_MEMFD), 0);
    vcpu.start(GuestOp::Fetch { gpa: 0, private: false });
    assert_eq!(vcpu.run().unwrap_err(), Errno::EIO);
    assert_eq!(vcpu.pre_fault_memory(&mut PreFaultMemory { flags: 1, ..Default::default() }), Err(Errno::EIO));
    // File operations do not ask.
    file.allocate(file.pages()).unwrap();
    file.punch_hole(file.pages()).unwrap();
}
