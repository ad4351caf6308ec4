//! The kernel's `set_memory_region_test`: which memslots there can be.
//!
//! First through the seam, with nothing checked before the ioctl, so that the software KVM is held against the kernel errno
//! by errno; then through the library, whose own reasons are precise, and given before any ioctl is made.

mod selftest_kit;

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use cvm_memory::addr::{AddrError, FilePage, Gfn, GfnRange};
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::gmem::{GmemFlags, GuestMemfd};
use cvm_memory::hypervisor::{Cap, Exit, Hypervisor, MemoryRegion, Mmio, Platform};
use cvm_memory::layout::{BindError, LayoutError, SlotFlags, SlotId};
use cvm_memory::memory::{CvmMemory, SlotError, SlotSpec};
use cvm_memory_testkit::{Call, Guest, GuestOp, Outcome, Recorder};
use nix::errno::Errno;
use selftest_kit::*;

const GPA: u64 = 0xc000_0000;
const SIZE: u64 = 2 * MIB;
const SLOT: u32 = 10;

fn vms<M: Machine>() -> Vec<M> {
    [Platform::DEFAULT, Platform::SOFTWARE_PROTECTED].into_iter().filter_map(M::create).collect()
}

// --- through the seam ------------------------------------------------------------------------------------------------

/// The guest reads the slot, then what is not there, then the slot again: as it was left.
fn deleted_and_added_again<M: Machine>() {
    for vm in vms::<M>() {
        let ram = leaked(SIZE);
        let region = plain_slot(SLOT, GPA, SIZE, ram.hva());
        let mut guest = vm.guest(0);
        for round in 0..10_u8 {
            set(&vm, &region).unwrap();
            assert_eq!(set(&vm, &region), Ok(()), "nothing changes");
            fill(ram, 0, PAGE, round + 1);
            assert_eq!(guest.perform(GuestOp::Check { gpa: GPA, len: PAGE, byte: round + 1 }), Outcome::Same);
            set(&vm, &deletion(&region)).unwrap();
            assert_eq!(set(&vm, &deletion(&region)), Err(Errno::EINVAL), "there is none");

            let mut seen = Vec::new();
            let read = guest.complete(GuestOp::Read { gpa: GPA, len: 1 }, &mut |exit| match exit {
                Exit::Mmio(Mmio::Read { gpa, data }) => {
                    seen.push((gpa, data.len()));
                    data.fill(0xef);
                }
                exit => panic!("{exit:?}"),
            });
            assert_eq!((read, seen), (Outcome::Data(vec![0xef]), vec![(GPA, 1)]));
        }
    }
}

/// A slot without a file moves; the guest finds it in its new place only. One with a file does not.
fn moved<M: Machine>() {
    for vm in vms::<M>() {
        let ram = leaked(SIZE);
        let region = plain_slot(SLOT, GPA, SIZE, ram.hva());
        set(&vm, &region).unwrap();
        fill(ram, 0, PAGE, 1);
        fill(ram, PAGE, PAGE, 2);
        let mut guest = vm.guest(0);
        assert_eq!(guest.perform(GuestOp::Check { gpa: GPA, len: PAGE, byte: 1 }), Outcome::Same);
        set(&vm, &MemoryRegion { guest_phys_addr: GPA - PAGE, ..region }).unwrap();
        assert_eq!(guest.perform(GuestOp::Check { gpa: GPA - PAGE, len: PAGE, byte: 1 }), Outcome::Same);
        assert_eq!(guest.perform(GuestOp::Check { gpa: GPA, len: PAGE, byte: 2 }), Outcome::Same);

        let file = vm.create_guest_memfd(SIZE, 0).unwrap();
        let region = gmem_slot(SLOT + 1, 2 * GPA, SIZE, fd(&file), 0);
        set(&vm, &region).unwrap();
        for changed in [
            region,
            MemoryRegion { guest_phys_addr: 2 * GPA - PAGE, ..region },
            MemoryRegion { flags: 0, ..region },
            MemoryRegion { flags: GUEST_MEMFD | LOG_DIRTY, ..region },
            MemoryRegion { memory_size: PAGE, ..region },
            MemoryRegion { userspace_addr: ram.hva(), ..region },
            MemoryRegion { guest_memfd_offset: PAGE, memory_size: SIZE - PAGE, ..region },
        ] {
            assert_eq!(set(&vm, &changed), Err(Errno::EINVAL), "{changed:x?}");
        }
        set(&vm, &deletion(&region)).unwrap();
    }
}

/// Each of the 32 flags alone, and those that exclude a file.
fn flags<M: Machine>() {
    for vm in vms::<M>() {
        let ram = leaked(SIZE);
        let file = vm.create_guest_memfd(SIZE, 0).unwrap();
        let region = MemoryRegion { guest_memfd: fd(&file), ..plain_slot(SLOT, GPA, SIZE, ram.hva()) };
        let readonly = if vm.check_extension(Cap::READONLY_MEM) != 0 { READONLY } else { 0 };
        for bit in 0..32 {
            let flags = 1 << bit;
            let legal = flags & (LOG_DIRTY | readonly | GUEST_MEMFD) != 0;
            let region = MemoryRegion { flags, ..region };
            assert_eq!(set(&vm, &region), if legal { Ok(()) } else { Err(Errno::EINVAL) }, "{flags:#x}");
            if legal {
                set(&vm, &deletion(&region)).unwrap();
            }
        }
        for other in [LOG_DIRTY, READONLY, LOG_DIRTY | READONLY] {
            let flags = GUEST_MEMFD | other;
            assert_eq!(set(&vm, &MemoryRegion { flags, ..region }), Err(Errno::EINVAL), "{flags:#x}");
        }
    }
}

/// Descriptors of everything but a guest_memfd of this VM.
fn files_of_other_kinds<M: Machine>() {
    for vm in vms::<M>() {
        let other = M::create(vm.platform()).unwrap();
        let theirs = other.create_guest_memfd(SIZE, 0).unwrap();
        let memfd = memfd::MemfdOptions::new().create("not a guest's").unwrap().into_file();
        memfd.set_len(SIZE).unwrap();
        let null = File::open("/dev/null").unwrap();
        let mut kinds: Vec<(&str, RawFd)> =
            vec![("another VM's", fd(&theirs)), ("a memfd", memfd.as_raw_fd()), ("a device", null.as_raw_fd())];
        // Whoever has a real one has these as well.
        let dev_kvm = File::open("/dev/kvm");
        if let Ok(file) = &dev_kvm {
            kinds.push(("/dev/kvm", file.as_raw_fd()));
        }
        kinds.extend(vm.vm_fd().map(|fd| ("the VM", fd)));
        for (kind, fd) in kinds {
            assert_eq!(set(&vm, &gmem_slot(SLOT, GPA, SIZE, fd, 0)), Err(Errno::EINVAL), "{kind}");
        }
        for closed in [-1, RawFd::MAX] {
            assert_eq!(set(&vm, &gmem_slot(SLOT, GPA, SIZE, closed, 0)), Err(Errno::EBADF), "{closed}");
        }
        let own = vm.create_guest_memfd(SIZE, 0).unwrap();
        set(&vm, &gmem_slot(SLOT, GPA, SIZE, fd(&own), 0)).unwrap();
    }
}

/// Every offset that is not a page's.
fn unaligned_offsets<M: Machine>() {
    for vm in vms::<M>() {
        let file = vm.create_guest_memfd(2 * SIZE, 0).unwrap();
        for offset in 1..PAGE {
            assert_eq!(set(&vm, &gmem_slot(SLOT, GPA, SIZE, fd(&file), offset)), Err(Errno::EINVAL), "{offset:#x}");
        }
        for offset in [SIZE + PAGE, 2 * SIZE, 0u64.wrapping_sub(PAGE)] {
            assert_eq!(set(&vm, &gmem_slot(SLOT, GPA, SIZE, fd(&file), offset)), Err(Errno::EINVAL), "{offset:#x}");
        }
        set(&vm, &gmem_slot(SLOT, GPA, SIZE, fd(&file), SIZE)).unwrap();
    }
}

/// Two neighbours, and a third that wants half of one of them: of its file pages, or of its addresses.
fn overlaps<M: Machine>() {
    for vm in vms::<M>() {
        let bound = pages_are_bound(&vm);
        println!("{}, {}: file pages that are bound give {bound:?}", M::NAME, vm.platform().name);
        let file = vm.create_guest_memfd(4 * SIZE, 0).unwrap();
        set(&vm, &gmem_slot(SLOT, GPA, 2 * SIZE, fd(&file), 0)).unwrap();
        // Next to it in both senses.
        let next = gmem_slot(SLOT + 1, GPA + 2 * SIZE, 2 * SIZE, fd(&file), 2 * SIZE);
        set(&vm, &next).unwrap();
        set(&vm, &deletion(&next)).unwrap();

        let third = |gpa, offset| gmem_slot(SLOT + 1, gpa, 2 * SIZE, fd(&file), offset);
        // Front and back of the file pages, at addresses of its own.
        let middle = vm.create_guest_memfd(4 * SIZE, 0).unwrap();
        set(&vm, &gmem_slot(SLOT + 2, 2 * GPA, 2 * SIZE, fd(&middle), SIZE)).unwrap();
        let of_middle = |offset| gmem_slot(SLOT + 3, 3 * GPA, 2 * SIZE, fd(&middle), offset);
        assert_eq!(set(&vm, &third(GPA * 4, SIZE)), Err(bound));
        assert_eq!(set(&vm, &of_middle(0)), Err(bound), "front");
        assert_eq!(set(&vm, &of_middle(2 * SIZE)), Err(bound), "back");
        // Front and back of the addresses, with file pages of its own.
        assert_eq!(set(&vm, &third(GPA - SIZE, 2 * SIZE)), Err(Errno::EEXIST), "front");
        assert_eq!(set(&vm, &third(GPA + SIZE, 2 * SIZE)), Err(Errno::EEXIST), "back");
        // Nothing of that has left anything behind.
        set(&vm, &third(GPA + 2 * SIZE, 2 * SIZE)).unwrap();
    }
}

// --- through the library ---------------------------------------------------------------------------------------------

/// A VM whose calls are counted, with one slot: frames from [`GPA`] on, the middle half of its file.
struct Library<M: Machine> {
    vm: Recorder<M>,
    memory: CvmMemory,
    file: Arc<GuestMemfd>,
    shared: Arc<dyn SharedBacking>,
}

impl<M: Machine> Library<M> {
    /// On a VM without private memory the file is one that starts shared.
    fn new(vm: M) -> Self {
        let flags = if vm.platform().private_memory { GmemFlags::empty() } else { GmemFlags::all() };
        let vm = Recorder::new(vm);
        let file = Arc::new(vm.create_guest_memfd(4 * SIZE, flags.bits()).unwrap());
        let shared: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(4 * SIZE).unwrap());
        let memory = CvmMemory::builder().address_limit(8 << 30).build(Arc::new(vm.clone())).unwrap();
        let library = Self { vm, memory, file, shared };
        library.memory.add_slots(vec![library.spec(SLOT, GPA, Some(SIZE))]).unwrap();
        library
    }

    /// The slot that is there and any other have shared memory of their own.
    fn spec(&self, id: u32, gpa: u64, offset: Option<u64>) -> SlotSpec {
        let part = if id == SLOT { 0 } else { 2 * SIZE };
        SlotSpec {
            id: Some(SlotId::from_raw(id)),
            gpa,
            size: 2 * SIZE,
            shared: SharedSlice { backing: Arc::clone(&self.shared), offset: part },
            private: offset.map(|offset| (Arc::clone(&self.file), FilePage::containing(offset))),
            flags: SlotFlags::empty(),
        }
    }

    /// The reason for which a slot is refused, and that nobody was called for it.
    fn refused(&self, spec: SlotSpec) -> SlotError {
        let before = self.vm.count();
        let error = self.memory.add_slots(vec![spec]).unwrap_err();
        assert_eq!(self.vm.count(), before, "{error}: {:x?}", self.vm.calls().get(before..));
        error
    }

    fn layout(&self, spec: SlotSpec) -> LayoutError {
        match self.refused(spec) {
            SlotError::Layout(error) => error,
            other => panic!("{other:?}"),
        }
    }
}

/// Everything above that the kernel refuses with one of two errnos has a reason of its own, and costs no call.
fn the_library_says_why<M: Machine>() {
    for vm in vms::<M>() {
        let library = Library::new(vm);
        let other = SlotId::from_raw(SLOT + 1);
        let held = SlotId::from_raw(SLOT);
        let gfns = |gpa, size| GfnRange::from_bytes(gpa, size).unwrap();
        let file = library.file.id();
        let spec = |gpa, offset| library.spec(SLOT + 1, gpa, offset);

        // The id, and ids that there are not.
        let error = library.layout(library.spec(SLOT, 4 * GPA / 3, None));
        assert_eq!(error, LayoutError::IdInUse { id: held, gfns: gfns(GPA, 2 * SIZE) });
        for id in [32_764, 0x7fff, 0xffff] {
            let error = library.layout(library.spec(id, GPA / 2, None));
            assert_eq!(error, LayoutError::IdTooHigh { id: SlotId::from_raw(id), limit: 32_764 });
        }
        let error = library.layout(library.spec(7 << 16, GPA / 2, None));
        assert!(matches!(error, LayoutError::NoSuchAddressSpace { .. }), "{error:?}");

        // The flags.
        for bit in 3..32 {
            let flags = SlotFlags::from_bits_retain(1 << bit);
            let error = library.layout(SlotSpec { flags, ..spec(GPA / 2, None) });
            assert_eq!(error, LayoutError::UnknownFlags { id: other, unknown: 1 << bit });
        }
        let error = library.layout(SlotSpec { flags: SlotFlags::LOG_DIRTY, ..spec(GPA / 2, Some(3 * SIZE)) });
        assert_eq!(error, LayoutError::LogDirtyWithGuestMemfd { id: other });
        let error = library.layout(SlotSpec { flags: SlotFlags::READONLY, ..spec(GPA / 2, Some(3 * SIZE)) });
        assert_eq!(error, LayoutError::ReadonlyWithGuestMemfd { id: other });
        let error = library.layout(SlotSpec { flags: SlotFlags::GUEST_MEMFD, ..spec(GPA / 2, None) });
        assert_eq!(error, LayoutError::FlagWithoutBinding { id: other });

        // The addresses, front and back.
        for gpa in [GPA - SIZE, GPA + SIZE] {
            let common = gfns(gpa.max(GPA), SIZE);
            assert_eq!(library.layout(spec(gpa, None)), LayoutError::GfnOverlap { id: other, with: held, common });
        }
        // The file pages, front and back, and those beyond the end.
        for (offset, taken) in [(0, SIZE), (2 * SIZE, 2 * SIZE)] {
            let common = file_range(taken, SIZE);
            let source = BindError::Overlap { slot: other, with: held, common };
            assert_eq!(library.layout(spec(GPA / 2, Some(offset))), LayoutError::Bind { file, source });
        }
        for offset in [3 * SIZE, 4 * SIZE, 1 << 40] {
            let pages = file_range(offset, 2 * SIZE);
            let source = BindError::BeyondFile { slot: other, pages, size: 4 * SIZE / PAGE };
            assert_eq!(library.layout(spec(GPA / 2, Some(offset))), LayoutError::Bind { file, source });
        }

        // What is no page; an offset into the file cannot even be said otherwise.
        for unaligned in 1..PAGE {
            let error = library.refused(SlotSpec { gpa: GPA / 2 + unaligned, ..spec(0, None) });
            assert!(matches!(error, SlotError::Range { error: AddrError::Unaligned { .. }, .. }), "{error:?}");
            let error = library.refused(SlotSpec { size: SIZE + unaligned, ..spec(GPA / 2, None) });
            assert!(matches!(error, SlotError::Range { error: AddrError::Unaligned { .. }, .. }), "{error:?}");
        }
        let error = library.refused(SlotSpec { size: 3 * SIZE, ..spec(GPA / 2, None) });
        assert!(matches!(error, SlotError::SharedTooShort { available, .. } if available == 4 * SIZE), "{error:?}");
        assert!(matches!(library.memory.remove_slot(other), Err(SlotError::Layout(LayoutError::UnknownSlot { .. }))));

        // After all that, the slot that fits is one call, and its removal another.
        let before = library.vm.count_matching(|call| matches!(call, Call::SetUserMemoryRegion2(_)));
        assert_eq!(before, 1);
        library.memory.add_slots(vec![spec(GPA + 2 * SIZE, None)]).unwrap();
        library.memory.remove_slot(other).unwrap();
        let after = library.vm.count_matching(|call| matches!(call, Call::SetUserMemoryRegion2(_)));
        assert_eq!(after, before + 2);
    }
}

/// A file of another VM is a file of this process as well: only the kernel can tell, and nothing is left of the attempt.
fn another_vms_file_is_the_kernels_to_refuse<M: Machine>() {
    let Some(vm) = M::create(Platform::SOFTWARE_PROTECTED) else { return };
    let theirs = Arc::new(M::create(vm.platform()).unwrap().create_guest_memfd(4 * SIZE, 0).unwrap());
    let library = Library::new(vm);
    let spec = SlotSpec { private: Some((theirs, FilePage::ZERO)), ..library.spec(SLOT + 1, GPA / 2, None) };
    let error = library.memory.add_slots(vec![spec.clone()]).unwrap_err();
    assert!(matches!(error, SlotError::Kvm { slot, errno: Errno::EINVAL, .. } if slot == SLOT + 1), "{error:?}");
    assert_eq!(library.memory.state(Gfn::containing(GPA / 2)), None);
    let own = SlotSpec { private: None, ..spec };
    library.memory.add_slots(vec![own]).unwrap();
}

/// All slots at once, in one call, and one too many in another; all of them go again.
fn as_many_slots_as_there_are<M: Machine>() {
    let Some(vm) = M::create(Platform::DEFAULT) else { return };
    let vm = Recorder::new(vm);
    let memory = CvmMemory::builder().build(Arc::new(vm.clone())).unwrap();
    let most = memory.capabilities().memslots;
    assert_eq!(most, 32_764);
    let shared: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(PAGE).unwrap());
    let spec = |n: u64| SlotSpec {
        id: None,
        gpa: n * PAGE,
        size: PAGE,
        shared: SharedSlice { backing: Arc::clone(&shared), offset: 0 },
        private: None,
        flags: SlotFlags::empty(),
    };
    let start = Instant::now();
    let error = memory.add_slots((0..=most).map(spec).collect()).unwrap_err();
    assert!(matches!(error, SlotError::NoFreeId { limit: 32_764 }), "{error:?}");
    assert_eq!(vm.count(), 0, "none of them was added");

    let ids = memory.add_slots((0..most).map(spec).collect()).unwrap();
    assert_eq!(ids.iter().map(|id| u64::from(id.raw())).collect::<Vec<_>>(), (0..most).collect::<Vec<_>>());
    let added = start.elapsed();
    assert_eq!(vm.count() as u64, most);
    let error = memory.add_slots(vec![spec(most)]).unwrap_err();
    assert!(matches!(error, SlotError::NoFreeId { limit: 32_764 }), "{error:?}");
    assert_eq!(vm.count() as u64, most);
    // The kernel says the same, with whatever id.
    for id in [32_764, 32_765, 0x7fff, 0xffff] {
        let beyond = plain_slot(id, most * PAGE, PAGE, shared.hva());
        assert_eq!(set(vm.inner(), &beyond), Err(Errno::EINVAL), "{id}");
    }

    let start = Instant::now();
    drop(memory);
    assert_eq!(vm.count() as u64, 2 * most);
    let deleted = vm.entries().iter().skip(usize::try_from(most).unwrap()).all(|entry| {
        matches!(entry.call, Call::SetUserMemoryRegion2(MemoryRegion { memory_size: 0, .. }))
            && entry.result == Some(Ok(()))
    });
    assert!(deleted);
    println!("{}: {most} slots added in {added:?}, deleted in {:?}", M::NAME, start.elapsed());
}

on_both_machines!(
    deleted_and_added_again,
    moved,
    flags,
    files_of_other_kinds,
    unaligned_offsets,
    overlaps,
    the_library_says_why,
    another_vms_file_is_the_kernels_to_refuse,
    as_many_slots_as_there_are,
);
