//! The kernel's `guest_memfd_test`: what a guest_memfd can and cannot be used for.
//!
//! Everything that the library does to a file is checked on both machines. What only a descriptor of the kernel's can be
//! used for (reading, writing, mapping) is not modelled by the software KVM, whose files are ordinary memfds: there, those
//! scenarios say so and skip.
#![allow(unsafe_code, reason = "files are mapped in ways that no safe wrapper allows")]

mod selftest_kit;

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::NonNull;
use std::sync::Arc;

use cvm_memory::addr::FilePage;
use cvm_memory::backing::{SharedBacking, SharedError, SharedMemory, SharedSlice};
use cvm_memory::convert::State;
use cvm_memory::gmem::{GmemError, GmemFlags, GuestMemfd};
use cvm_memory::hypervisor::{Cap, Hypervisor, Platform};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{BuildError, CvmMemory, SlotError, SlotSpec};
use cvm_memory_testkit::skip::require;
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use selftest_kit::*;

const PAGES: u64 = 4;
const SIZE: u64 = PAGES * PAGE;
const KEEP_SIZE: FallocateFlags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
const PUNCH: FallocateFlags = FallocateFlags::FALLOC_FL_PUNCH_HOLE;

/// Both kinds of VM with guest_memfd, as far as the machine has them.
fn vms<M: Machine>() -> Vec<M> {
    [Platform::DEFAULT, Platform::SOFTWARE_PROTECTED].into_iter().filter_map(M::create).collect()
}

fn legal_flags(vm: &dyn Hypervisor) -> u64 {
    vm.check_extension(Cap::GUEST_MEMFD_FLAGS)
}

/// A VM whose files can be mapped and start shared, or a skip.
fn mappable<M: Machine>() -> Option<M> {
    let vm = M::create(Platform::DEFAULT)?;
    require(&vm, Cap::GUEST_MEMFD_FLAGS, GmemFlags::all().bits())?;
    Some(vm)
}

/// Whether descriptors are the kernel's own; or a skip.
///
/// Not one that is promised away: there is no machine on which the software KVM has them.
fn kernel_files<M: Machine>(what: &str) -> Option<()> {
    if M::KERNEL_FILES {
        return Some(());
    }
    eprintln!("skipped: {what}: the software KVM's files are ordinary memfds");
    None
}

/// Sizes are whole pages.
fn sizes<M: Machine>() {
    for vm in vms::<M>() {
        for size in (0..PAGE).chain([PAGE + 1, 1 << 63, !0xfff]) {
            assert_eq!(vm.create_guest_memfd(size, 0).unwrap_err(), Errno::EINVAL, "{size:#x}");
        }
        let largest = i64::MAX.unsigned_abs() & !(PAGE - 1);
        for size in [PAGE, SIZE, 1 << 40, largest] {
            let file = vm.create_guest_memfd(size, 0).unwrap();
            assert_eq!((file.size(), file.pages().bytes()), (size, size));
        }
    }
}

/// Each of the 64 flags, alone and together with the legal ones.
fn flags<M: Machine>() {
    for vm in vms::<M>() {
        let legal = legal_flags(&vm);
        println!("{}, {}: legal flags {legal:#x}", M::NAME, vm.platform().name);
        for bit in 0..64 {
            let flag = 1_u64 << bit;
            for flags in [flag, legal | flag] {
                let result = vm.create_guest_memfd(PAGE, flags).map(|file| file.flags().bits());
                let want = if flags & !legal == 0 { Ok(flags) } else { Err(Errno::EINVAL) };
                assert_eq!(result, want, "{flags:#x} of {legal:#x}");
            }
        }
    }
}

/// Two files are two, each with its size.
fn identity<M: Machine>() {
    for vm in vms::<M>() {
        let files = [vm.create_guest_memfd(SIZE, 0).unwrap(), vm.create_guest_memfd(2 * SIZE, 0).unwrap()];
        let stat = files.each_ref().map(|file| as_file(file).metadata().unwrap());
        assert_eq!(stat.each_ref().map(|stat| stat.size()), [SIZE, 2 * SIZE]);
        assert_eq!(stat.each_ref().map(|stat| stat.blksize()), [PAGE, PAGE]);
        assert_ne!(stat[0].ino(), stat[1].ino());
        assert_ne!(files[0].id(), files[1].id());
    }
}

/// What `fallocate(2)` takes, call by call.
fn fallocate_takes_whole_pages<M: Machine>() {
    let signed = |bytes: u64| i64::try_from(bytes).unwrap();
    for vm in vms::<M>() {
        let file = vm.create_guest_memfd(SIZE, 0).unwrap();
        let call = |mode, offset: u64, len: u64| file.ops().fallocate(mode, signed(offset), signed(len));
        // All of it, then what is unaligned, then what is at and beyond the end.
        assert_eq!(call(KEEP_SIZE, 0, SIZE), Ok(()));
        assert_eq!(call(KEEP_SIZE | PUNCH, PAGE - 1, PAGE), Err(Errno::EINVAL));
        assert_eq!(call(KEEP_SIZE, SIZE, PAGE), Err(Errno::EINVAL));
        assert_eq!(call(KEEP_SIZE, SIZE + PAGE, PAGE), Err(Errno::EINVAL));
        assert_eq!(call(KEEP_SIZE, SIZE - PAGE, 2 * PAGE), Err(Errno::EINVAL));
        assert_eq!(call(KEEP_SIZE | PUNCH, SIZE, PAGE), Ok(()));
        assert_eq!(call(KEEP_SIZE | PUNCH, SIZE + PAGE, PAGE), Ok(()));
        assert_eq!(call(KEEP_SIZE | PUNCH, PAGE, PAGE - 1), Err(Errno::EINVAL));
        assert_eq!(call(KEEP_SIZE | PUNCH, PAGE, PAGE), Ok(()));
        assert_eq!(call(KEEP_SIZE, PAGE, PAGE), Ok(()));
        // The file never changes its size, and knows nothing else.
        for mode in [FallocateFlags::empty(), FallocateFlags::FALLOC_FL_ZERO_RANGE | KEEP_SIZE] {
            assert_eq!(call(mode, 0, PAGE), Err(Errno::EOPNOTSUPP), "{mode:?}");
        }
        assert_eq!(call(KEEP_SIZE, 0, 0), Err(Errno::EINVAL));
        assert_eq!(file.ops().fallocate(KEEP_SIZE, -signed(PAGE), signed(PAGE)), Err(Errno::EINVAL));
        assert_eq!(as_file(&file).metadata().unwrap().size(), SIZE);

        // The library refuses before it calls what kernels answer differently.
        for range in [file_range(SIZE, PAGE), file_range(SIZE - PAGE, 2 * PAGE)] {
            let beyond = GmemError::BeyondFile { range, pages: PAGES };
            assert_eq!(file.punch_hole(range), Err(beyond));
            assert_eq!(file.allocate(range), Err(beyond));
        }
    }
}

/// Ten pairs of offset and length that are no pages.
fn unaligned_holes<M: Machine>() {
    for vm in vms::<M>() {
        let file = vm.create_guest_memfd(SIZE, 0).unwrap();
        let mut bad = 0;
        for offset in [0, 1, PAGE] {
            for len in [1, PAGE - 1, PAGE, PAGE + 1] {
                let aligned = offset % PAGE == 0 && len % PAGE == 0;
                bad += u32::from(!aligned);
                let want = if aligned { Ok(()) } else { Err(Errno::EINVAL) };
                let len = i64::try_from(len).unwrap();
                let result = file.ops().fallocate(KEEP_SIZE | PUNCH, i64::try_from(offset).unwrap(), len);
                assert_eq!(result, want, "{offset:#x}, {len:#x}");
            }
        }
        assert_eq!(bad, 10);
    }
}

/// The furthest offset that an `i64` can say, in a file of which it is beyond the end.
fn the_furthest_offset<M: Machine>() {
    let furthest = i64::MAX.unsigned_abs() & !(PAGE - 1);
    for vm in vms::<M>() {
        let file = Arc::new(vm.create_guest_memfd(SIZE, 0).unwrap());
        let region = gmem_slot(0, 4 << 30, SIZE, fd(&file), furthest);
        let raw = set(&vm, &region);
        println!("{}, {}: offset {furthest:#x} gives {raw:?}", M::NAME, vm.platform().name);
        // Kernels before 7.2 take the sum for a negative number, which is within the file. So they also have the other errno.
        if raw.is_ok() {
            assert!(M::KERNEL_FILES && pages_are_bound(&vm) == Errno::EINVAL);
            set(&vm, &deletion(&region)).unwrap();
        } else {
            assert_eq!(raw, Err(Errno::EINVAL));
        }

        let shared: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(SIZE).unwrap());
        let memory = CvmMemory::builder().address_limit(8 << 30).build(Arc::new(vm.clone())).unwrap();
        let refused = memory.add_slots(vec![SlotSpec {
            id: None,
            gpa: 4 << 30,
            size: SIZE,
            shared: SharedSlice { backing: shared, offset: 0 },
            private: Some((file, FilePage::containing(furthest))),
            flags: SlotFlags::empty(),
        }]);
        let error = refused.unwrap_err();
        assert!(matches!(error, SlotError::Range { .. } | SlotError::Layout(_)), "{error:?}");
        assert_eq!(memory.statistics().issued.set_user_memory_region2, 0);
    }
}

/// A mapping of our own, which goes with it.
struct Mapped {
    at: NonNull<libc::c_void>,
    len: usize,
}

impl Mapped {
    fn new(file: &File, len: u64, prot: ProtFlags, flags: MapFlags) -> Result<Self, Errno> {
        let len = usize::try_from(len).unwrap();
        // SAFETY: a new mapping, of which nobody knows before it is there.
        let at = unsafe { mmap(None, NonZeroUsize::new(len).unwrap(), prot, flags, file, 0) }?;
        Ok(Self { at, len })
    }

    fn shared(file: &File, len: u64) -> Result<Self, Errno> {
        Self::new(file, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED)
    }

    /// The byte at `offset`, touched by the kernel on our behalf: `EFAULT` is what would be a SIGBUS.
    fn touch(&self, offset: u64) -> Result<u8, Errno> {
        let (out, into) = nix::unistd::pipe()?;
        let byte = std::ptr::with_exposed_provenance(self.address(offset, 1));
        // SAFETY: one byte of the mapping, which only the kernel looks at.
        let written = unsafe { libc::write(into.as_raw_fd(), byte, 1) };
        Errno::result(written)?;
        let mut byte = [0];
        assert_eq!(nix::unistd::read(&out, &mut byte)?, 1);
        Ok(byte[0])
    }

    fn fill(&self, offset: u64, len: u64, byte: u8) {
        let bytes: *mut u8 = std::ptr::with_exposed_provenance_mut(self.address(offset, len));
        // SAFETY: within the mapping, which is writable; no reference to it is ever made.
        unsafe { bytes.write_bytes(byte, usize::try_from(len).unwrap()) };
    }

    /// Where `[offset, offset + len)` of the mapping starts.
    fn address(&self, offset: u64, len: u64) -> usize {
        let (offset, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
        assert!(offset + len <= self.len);
        self.at.as_ptr().expose_provenance() + offset
    }

    /// `MADV_COLLAPSE` of `len` bytes, from the first address that is a multiple of it.
    fn collapse(&self, len: u64) -> Result<(), Errno> {
        let len = usize::try_from(len).unwrap();
        let start = self.at.as_ptr().expose_provenance();
        let first = start.next_multiple_of(len);
        assert!(first + len <= start + self.len);
        // SAFETY: within the mapping, and it changes nothing of what the memory holds.
        let result = unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(first), len, libc::MADV_COLLAPSE) };
        Errno::result(result).map(drop)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: nobody but this value knows the mapping.
        unsafe { munmap(self.at, self.len) }.unwrap();
    }
}

/// The file is not there to be read and written.
fn no_reads_and_no_writes<M: Machine>() {
    let Some(()) = kernel_files::<M>("read and write") else { return };
    for vm in vms::<M>() {
        for flags in 0..=legal_flags(&vm) {
            use std::io::{Read, Write};
            let file = vm.create_guest_memfd(SIZE, flags).unwrap();
            let mut file = as_file(&file);
            let mut byte = [0x5a];
            let errnos = [
                file.read(&mut byte).unwrap_err(),
                file.write(&byte).unwrap_err(),
                file.read_at(&mut byte, 0).unwrap_err(),
                file.write_at(&byte, 0).unwrap_err(),
                file.set_len(SIZE * 2).unwrap_err(),
                file.set_len(0).unwrap_err(),
            ];
            println!("{}, flags {flags:#x}: {:?}", M::NAME, errnos.each_ref().map(std::io::Error::raw_os_error));
            assert_eq!(file.metadata().unwrap().size(), SIZE);
        }
    }
}

/// Which files can be mapped, and how.
fn mmap_rules<M: Machine>() {
    let Some(()) = kernel_files::<M>("mmap") else { return };
    let read_write = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    for vm in vms::<M>() {
        for flags in 0..=legal_flags(&vm) {
            let gmem = vm.create_guest_memfd(SIZE, flags).unwrap();
            let (file, flags) = (as_file(&gmem), gmem.flags());
            let shared = Mapped::shared(&file, SIZE);
            if !flags.contains(GmemFlags::MMAP) {
                assert_eq!(shared.map(drop), Err(Errno::ENODEV), "{flags:?}");
                let refused = SharedMemory::from_file(Arc::new(file), 0, SIZE).unwrap_err();
                assert!(matches!(refused, SharedError::Map { size: SIZE, .. }), "{refused:?}");
                continue;
            }
            assert!(shared.is_ok(), "{flags:?}");
            let copy = Mapped::new(&file, SIZE, read_write, MapFlags::MAP_PRIVATE);
            assert_eq!(copy.map(drop), Err(Errno::EINVAL), "a copy on write, {flags:?}");

            // Every page is the host's from the start, or none is.
            let whole = Mapped::shared(&file, 4 * SIZE).unwrap();
            let starts_shared = flags.contains(GmemFlags::INIT_SHARED);
            for page in 0..4 * PAGES {
                let want = if starts_shared && page < PAGES { Ok(0) } else { Err(Errno::EFAULT) };
                assert_eq!(whole.touch(page * PAGE), want, "page {page}, {flags:?}");
            }
            if starts_shared {
                whole.fill(0, SIZE, 0xaa);
                assert_eq!(whole.touch(SIZE - 1), Ok(0xaa));
                assert_eq!(whole.touch(SIZE), Err(Errno::EFAULT));
            }
        }
    }
}

/// Pages are single ones, and stay so.
fn no_collapse<M: Machine>() {
    let Some(()) = kernel_files::<M>("MADV_COLLAPSE") else { return };
    let Some(vm) = mappable::<M>() else { return };
    let large = 2 * MIB;
    let file = vm.create_guest_memfd(2 * large, GmemFlags::all().bits()).unwrap();
    let mapped = Mapped::shared(&as_file(&file), 2 * large).unwrap();
    mapped.fill(0, 2 * large, 0xaa);
    let result = mapped.collapse(large);
    println!("{}: MADV_COLLAPSE gives {result:?}", M::NAME);
    // Without large pages in the kernel there is no such advice, which is the same errno.
    assert_eq!(result, Err(Errno::EINVAL));
    assert_eq!(mapped.touch(large), Ok(0xaa));
}

/// Memory of the file that the host maps, in a VM of the default type: one memory for both.
fn in_common<M: Machine>(vm: &M, gpa: u64) -> (CvmMemory, Arc<SharedMemory>, Arc<GuestMemfd>) {
    let file = Arc::new(vm.create_guest_memfd(SIZE, GmemFlags::all().bits()).unwrap());
    let host = Arc::new(SharedMemory::from_file(Arc::new(as_file(&file)), 0, SIZE).unwrap());
    let slot = SlotSpec {
        id: None,
        gpa,
        size: SIZE,
        shared: SharedSlice { backing: Arc::clone(&host) as Arc<dyn SharedBacking>, offset: 0 },
        private: Some((Arc::clone(&file), FilePage::ZERO)),
        flags: SlotFlags::empty(),
    };
    let built = CvmMemory::builder().initial(State::Shared).slot(slot).build(Arc::new(vm.clone()));
    (built.unwrap_or_else(|error: BuildError| panic!("{error}")), host, file)
}

/// The host's 0xaa at 4 GiB is the guest's, and the guest's 0xff the host's.
fn guest_and_host_see_one_memory<M: Machine>() {
    let Some(vm) = mappable::<M>() else { return };
    let gpa = 4 << 30;
    let (memory, host, file) = in_common(&vm, gpa);
    let mut guest = vm.guest(0);
    fill(&host, 0, SIZE, 0xaa);
    assert_eq!(guest.perform(GuestOp::Check { gpa, len: SIZE, byte: 0xaa }), Outcome::Same);
    assert_eq!(guest.perform(GuestOp::Fill { gpa, len: SIZE, byte: 0xff }), Outcome::Done);
    assert!(is_all(&host, 0, SIZE, 0xff));
    let mut byte = [0];
    memory.read(cvm_memory::addr::Gpa(gpa + SIZE - 1), &mut byte).unwrap();
    assert_eq!(byte, [0xff]);

    // What is punched is zeroes for both.
    file.punch_hole(file_range(PAGE, PAGE)).unwrap();
    assert_eq!(guest.perform(GuestOp::Check { gpa: gpa + PAGE, len: PAGE, byte: 0 }), Outcome::Same);
    assert!(is_all(&host, PAGE, PAGE, 0) && is_all(&host, 0, PAGE, 0xff) && is_all(&host, 2 * PAGE, PAGE, 0xff));
}

/// A hole in the first page is zeroes, and in no other.
fn a_hole_is_zeroes<M: Machine>() {
    let Some(vm) = mappable::<M>() else { return };
    let (_memory, host, file) = in_common(&vm, 4 << 30);
    fill(&host, 0, SIZE, 0xaa);
    file.punch_hole(file_range(0, PAGE)).unwrap();
    assert_resident(&file, SIZE - PAGE);
    assert!(is_all(&host, 0, PAGE, 0) && is_all(&host, PAGE, SIZE - PAGE, 0xaa));
    // Allocation does not touch what is there.
    file.punch_hole(file_range(2 * PAGE, PAGE)).unwrap();
    file.allocate(file.pages()).unwrap();
    assert_resident(&file, SIZE);
    for (page, byte) in [0, 0xaa, 0, 0xaa].into_iter().enumerate() {
        assert!(is_all(&host, page as u64 * PAGE, PAGE, byte), "page {page}");
    }
}

/// A real file's descriptor does not reach a program that is started.
fn closed_on_exec<M: Machine>() {
    for vm in vms::<M>() {
        let file = vm.create_guest_memfd(PAGE, 0).unwrap();
        let flags = nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, nix::libc::FD_CLOEXEC);
    }
}

on_both_machines!(
    sizes,
    flags,
    identity,
    fallocate_takes_whole_pages,
    unaligned_holes,
    the_furthest_offset,
    no_reads_and_no_writes,
    mmap_rules,
    no_collapse,
    guest_and_host_see_one_memory,
    a_hole_is_zeroes,
    closed_on_exec,
);
