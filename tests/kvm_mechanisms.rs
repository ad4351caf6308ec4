//! The mechanisms of the real KVM, through the seam: what `Hypervisor` and `Vcpu` promise, held against a kernel.
//!
//! The first half needs any KVM; the second one with private memory (`tests/lab` boots one). What is missing is skipped on
//! one line that names it.
#![allow(unsafe_code, reason = "slots let guests at memory of this process")]

use std::os::fd::{AsRawFd, RawFd};

use cvm_memory::gmem::{GmemFlags, GuestMemfd};
use cvm_memory::hypervisor::kvm::{KvmError, KvmVcpu, KvmVm};
use cvm_memory::hypervisor::{
    Cap, Exit, HypercallExit, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes, MemoryFault, MemoryRegion, Mmio,
    Platform, PreFaultMemory, Vcpu, VmType,
};
use cvm_memory_testkit::skip::require;
use cvm_memory_testkit::{Guest, GuestOp, KvmGuest, Outcome, RealModeGuest, kvm, private_kvm};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, FdFlag, fcntl};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const GUEST_MEMFD: u32 = 4;
const READONLY: u32 = 2;
const LOG_DIRTY: u32 = 1;

/// Memory for guests, at the same place for as long as the test runs.
struct Ram(&'static MmapRegion);

impl Ram {
    fn new(size: u64) -> Self {
        // Leaked, so that no slot can outlive it.
        Self(Box::leak(Box::new(MmapRegion::new(size.try_into().unwrap()).unwrap())))
    }

    /// The file's own pages.
    fn of_file(file: &GuestMemfd, offset: u64, size: u64) -> Self {
        let file = std::fs::File::from(file.ops().as_fd().try_clone_to_owned().unwrap());
        let region = MmapRegion::from_file(FileOffset::new(file, offset), size.try_into().unwrap());
        Self(Box::leak(Box::new(region.unwrap())))
    }

    fn address(&self) -> u64 {
        self.0.as_ptr().expose_provenance() as u64
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.as_volatile_slice().read_slice(&mut bytes, at.try_into().unwrap()).unwrap();
        bytes
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.0.as_volatile_slice().write_slice(bytes, at.try_into().unwrap()).unwrap();
    }

    fn is_all(&self, at: u64, len: u64, byte: u8) -> bool {
        self.read(at, len.try_into().unwrap()).iter().all(|&found| found == byte)
    }
}

fn set(vm: &KvmVm, region: &MemoryRegion) -> Result<(), Errno> {
    // SAFETY: no region below names memory of this process but a `Ram`'s, which is never unmapped and accessed through
    // volatile slices only; the others name address zero, where nothing is.
    unsafe { vm.set_user_memory_region2(region) }
}

fn ram_slot(slot: u32, gpa: u64, ram: &Ram) -> MemoryRegion {
    MemoryRegion {
        slot,
        guest_phys_addr: gpa,
        memory_size: ram.0.size() as u64,
        userspace_addr: ram.address(),
        ..MemoryRegion::default()
    }
}

fn gmem_slot(slot: u32, gpa: u64, size: u64, file: RawFd, offset: u64) -> MemoryRegion {
    MemoryRegion {
        slot,
        flags: GUEST_MEMFD,
        guest_phys_addr: gpa,
        memory_size: size,
        guest_memfd: file,
        guest_memfd_offset: offset,
        ..MemoryRegion::default()
    }
}

fn fd(file: &GuestMemfd) -> RawFd {
    file.ops().as_fd().as_raw_fd()
}

fn set_private(vm: &KvmVm, address: u64, size: u64, private: bool) {
    let attributes = if private { MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
    vm.set_memory_attributes(&MemoryAttributes { address, size, attributes, flags: 0 }).unwrap();
}

// --- any KVM ---------------------------------------------------------------------------------------------------------

#[test]
fn a_vm_type_that_is_not_offered_names_the_capability() {
    let Some(kvm) = cvm_memory_testkit::skip::dev_kvm() else { return };
    let unknown = Platform { name: "unheard-of", vm_type: VmType(31), ..Platform::DEFAULT };
    let error = KvmVm::create(&kvm, unknown).unwrap_err();
    let KvmError::VmType { vm_type: 31, missing } = error else { panic!("{error:?}") };
    assert_eq!((missing.cap, missing.needed, missing.offered & 1), (Cap::VM_TYPES, 1 << 31, 1));
    assert!(missing.to_string().contains("KVM_CAP_VM_TYPES"), "{missing}");

    // Beyond what a bit mask can say.
    let unsayable = Platform { vm_type: VmType(1 << 40), ..unknown };
    assert!(matches!(KvmVm::create(&kvm, unsayable), Err(KvmError::VmType { .. })));
}

#[test]
fn files_have_the_flags_and_sizes_that_kvm_offers() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let Some(_) = require(&vm, Cap::GUEST_MEMFD, 1) else { return };
    let legal = vm.check_extension(Cap::GUEST_MEMFD_FLAGS);
    for flags in 0..8 {
        let expected = if flags & !legal == 0 { Ok(GmemFlags::from_bits_retain(flags)) } else { Err(Errno::EINVAL) };
        assert_eq!(vm.create_guest_memfd(2 * PAGE, flags).map(|file| file.flags()), expected, "flags {flags:#x}");
    }
    for size in [0, 1, PAGE + 1, 1 << 63, u64::MAX, u64::MAX - 4095] {
        assert_eq!(vm.create_guest_memfd(size, 0).map(drop), Err(Errno::EINVAL), "size {size:#x}");
    }
    let file = vm.create_guest_memfd(3 * PAGE, 0).unwrap();
    assert_eq!(file.size(), 3 * PAGE);
    assert_eq!(nix::sys::stat::fstat(file.ops().as_fd()).unwrap().st_size, 3 * 4096);
}

#[test]
fn files_are_closed_on_exec() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let Some(_) = require(&vm, Cap::GUEST_MEMFD, 1) else { return };
    let file = vm.create_guest_memfd(PAGE, 0).unwrap();
    let flags = FdFlag::from_bits_retain(fcntl(file.ops().as_fd(), FcntlArg::F_GETFD).unwrap());
    assert!(flags.contains(FdFlag::FD_CLOEXEC));
}

#[test]
fn fallocate_answers_as_the_kernel_does() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let Some(_) = require(&vm, Cap::GUEST_MEMFD, 1) else { return };
    let file = vm.create_guest_memfd(4 * PAGE, 0).unwrap();
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let punch = keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE;
    let zero = keep | FallocateFlags::FALLOC_FL_ZERO_RANGE;
    for (mode, offset, len, expected) in [
        (keep, 0, 4 * 4096, Ok(())),
        (keep, 0, 5 * 4096, Err(Errno::EINVAL)),
        (keep, 1, 4096, Err(Errno::EINVAL)),
        (keep, 0, 0, Err(Errno::EINVAL)),
        (keep, -4096, 4096, Err(Errno::EINVAL)),
        (keep, i64::MAX - 4095, 4096, Err(Errno::EFBIG)),
        (zero, 0, 4096, Err(Errno::EOPNOTSUPP)),
        (FallocateFlags::empty(), 0, 4096, Err(Errno::EOPNOTSUPP)),
        (punch, 0, 4096, Ok(())),
        (punch, 0, 100, Err(Errno::EINVAL)),
        (punch, 8 * 4096, 4096, Ok(())),
    ] {
        assert_eq!(file.ops().fallocate(mode, offset, len), expected, "{mode:?} of {offset:#x}, {len:#x}");
    }
    if let Some(resident) = file.resident_bytes() {
        assert_eq!(resident, 3 * PAGE, "four pages allocated, one punched");
    }
}

#[test]
fn slots_are_bound_at_offsets_and_refused_with_the_kernels_errno() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let Some(_) = require(&vm, Cap::USER_MEMORY2, 1) else { return };
    let Some(_) = require(&vm, Cap::GUEST_MEMFD, 1) else { return };
    let other_vm = kvm(Platform::DEFAULT).unwrap();
    let (file, foreign) = (vm.create_guest_memfd(MIB, 0).unwrap(), other_vm.create_guest_memfd(MIB, 0).unwrap());
    let no_gmem = std::fs::File::open("/dev/null").unwrap();
    let first = gmem_slot(0, 0x10_0000, 16 * PAGE, fd(&file), 32 * PAGE);
    assert_eq!(set(&vm, &first), Ok(()));

    let second = MemoryRegion { slot: 1, ..first };
    let elsewhere = MemoryRegion { guest_phys_addr: 0x80_0000, guest_memfd_offset: 0, ..second };
    for (what, region, expected) in [
        ("overlapping guest frames", MemoryRegion { guest_memfd_offset: 0, ..second }, Errno::EEXIST),
        ("an unaligned offset", MemoryRegion { guest_memfd_offset: 100, ..elsewhere }, Errno::EINVAL),
        ("an offset that wraps", MemoryRegion { guest_memfd_offset: u64::MAX - 4095, ..elsewhere }, Errno::EINVAL),
        ("beyond the file", MemoryRegion { guest_memfd_offset: MIB - PAGE, ..elsewhere }, Errno::EINVAL),
        ("another VM's file", MemoryRegion { guest_memfd: fd(&foreign), ..elsewhere }, Errno::EINVAL),
        ("no guest_memfd", MemoryRegion { guest_memfd: no_gmem.as_raw_fd(), ..elsewhere }, Errno::EINVAL),
        ("no file", MemoryRegion { guest_memfd: -1, ..elsewhere }, Errno::EBADF),
        ("a logged one", MemoryRegion { flags: GUEST_MEMFD | LOG_DIRTY, ..elsewhere }, Errno::EINVAL),
        ("a read-only one", MemoryRegion { flags: GUEST_MEMFD | READONLY, ..elsewhere }, Errno::EINVAL),
        ("the same again", first, Errno::EINVAL),
        ("the same moved", MemoryRegion { guest_phys_addr: 0x80_0000, ..first }, Errno::EINVAL),
        ("deleting what is not there", MemoryRegion { memory_size: 0, ..elsewhere }, Errno::EINVAL),
    ] {
        assert_eq!(set(&vm, &region), Err(expected), "{what}");
    }
    // Kernels disagree on this one's errno.
    let overlap = set(&vm, &MemoryRegion { guest_memfd_offset: 47 * PAGE, ..elsewhere });
    assert!(matches!(overlap, Err(Errno::EEXIST | Errno::EINVAL)), "overlapping file pages: {overlap:?}");

    assert_eq!(set(&vm, &MemoryRegion { guest_memfd_offset: 48 * PAGE, ..elsewhere }), Ok(()), "touching file pages");
    assert_eq!(set(&vm, &MemoryRegion { memory_size: 0, ..first }), Ok(()));
    assert_eq!(set(&vm, &MemoryRegion { slot: 2, ..first }), Ok(()), "free again");
}

#[test]
fn a_vm_without_private_memory_has_no_attributes() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    assert_eq!(vm.check_extension(Cap::MEMORY_ATTRIBUTES), 0);
    let private = MemoryAttributes { address: 0, size: PAGE, attributes: MEMORY_ATTRIBUTE_PRIVATE, flags: 0 };
    let answer = vm.set_memory_attributes(&private);
    // ENOTTY where the kernel has no attributes for any VM type.
    assert!(matches!(answer, Err(Errno::ENOTTY | Errno::EINVAL)), "{answer:?}");
}

#[test]
fn an_unknown_capability_is_refused() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    assert_eq!(vm.check_extension(Cap(u32::MAX)), 0);
    assert_eq!(vm.enable_cap(Cap(u32::MAX), [0; 4]), Err(Errno::EINVAL));
    assert_eq!(vm.clone().check_extension(Cap::NR_MEMSLOTS), vm.check_extension(Cap::NR_MEMSLOTS));
}

/// What every guest can do, at `gpa`, where `ram` is; `hole` has no slot.
fn exercise(guest: &mut dyn Guest, gpa: u64, ram: &Ram, hole: u64) {
    // Writes, across a page boundary and unaligned, in several pieces.
    let data: Vec<u8> = (0..200_001_u32).map(|i| (i * 7 % 251) as u8).collect();
    assert_eq!(guest.perform(GuestOp::Write { gpa: gpa + 4093, data: data.clone() }), Outcome::Done);
    assert_eq!(ram.read(4093, data.len()), data);
    assert_eq!((ram.read(4092, 1)[0], ram.read(4093 + 200_001, 1)[0]), (0, 0), "nothing besides");

    // Reads.
    ram.write(5, b"by the host");
    assert_eq!(guest.perform(GuestOp::Read { gpa: gpa + 5, len: 11 }), Outcome::Data(b"by the host".to_vec()));
    assert_eq!(guest.perform(GuestOp::Read { gpa: gpa + 4093, len: data.len() }), Outcome::Data(data));
    assert_eq!(guest.perform(GuestOp::Read { gpa, len: 0 }), Outcome::Data(Vec::new()));

    // Fills and checks: the first byte that differs, be it the first, the last or one in a later piece.
    let len = 3 * 65536 + 1;
    assert_eq!(guest.perform(GuestOp::Fill { gpa: gpa + 1, len, byte: 0xa5 }), Outcome::Done);
    assert!(ram.is_all(1, len, 0xa5));
    let check = GuestOp::Check { gpa: gpa + 1, len, byte: 0xa5 };
    assert_eq!(guest.perform(check.clone()), Outcome::Same);
    for offset in [len - 1, 2 * 65536 + 77, 65535, 1, 0] {
        ram.write(1 + offset, &[0x5a]);
        assert_eq!(guest.perform(check.clone()), Outcome::Differs { offset });
    }

    // Fetches.
    ram.write(8 * PAGE, guest.return_code());
    assert_eq!(guest.perform(GuestOp::Fetch { gpa: gpa + 8 * PAGE }), Outcome::Done);

    // Where there is no slot, a read is completed by us, and a write has happened as far as the guest is concerned.
    let mut exits = Vec::new();
    let read = guest.complete(GuestOp::Read { gpa: hole, len: 3 }, &mut |exit| match exit {
        Exit::Mmio(Mmio::Read { gpa, data }) => {
            exits.push((gpa, data.len()));
            data.fill(0x42);
        }
        exit => panic!("{exit:?}"),
    });
    assert_eq!(read, Outcome::Data(vec![0x42; 3]));
    assert_eq!(exits, [(hole, 1), (hole + 1, 1), (hole + 2, 1)], "byte by byte, as the guest asked");
    let mut written = Vec::new();
    let write = GuestOp::Write { gpa: hole, data: vec![1, 2, 3] };
    assert_eq!(
        guest.complete(write, &mut |exit| match exit {
            Exit::Mmio(Mmio::Write { gpa, data }) => written.push((gpa, data.to_vec())),
            exit => panic!("{exit:?}"),
        }),
        Outcome::Done
    );
    assert_eq!(written, [(hole, vec![1]), (hole + 1, vec![2]), (hole + 2, vec![3])]);
}

/// A hypercall that exits is answered by us, and one that KVM refuses is not seen.
///
/// Needs a processor that runs the guest by itself. A KVM that emulates the instruction replaces it by the processor's own,
/// and then has to emulate that. It has nested paging if, and only if, memory can be mapped ahead of use.
fn hypercalls(vm: &KvmVm, guest: &mut dyn Guest) {
    const ENABLED: u64 = 1 << HypercallExit::MAP_GPA_RANGE;
    let map = |gpa, pages| GuestOp::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args: [gpa, pages, 0x10, 0] };
    let Some(_) = require(vm, Cap::PRE_FAULT_MEMORY, 1) else { return };
    let Some(_) = require(vm, Cap::EXIT_HYPERCALL, ENABLED) else { return };
    vm.enable_cap(Cap::EXIT_HYPERCALL, [ENABLED, 0, 0, 0]).unwrap();
    for answer in [0_u64, 22, 11] {
        let mut seen = Vec::new();
        let outcome = guest.complete(map(0x3000, 5), &mut |exit| match exit {
            Exit::Hypercall(HypercallExit { nr, args, ret }) => {
                seen.push((nr, args[0], args[1], args[2]));
                *ret = answer;
            }
            exit => panic!("{exit:?}"),
        });
        assert_eq!(outcome, Outcome::Answer(answer));
        assert_eq!(seen, [(HypercallExit::MAP_GPA_RANGE, 0x3000, 5, 0x10)]);
    }
    for refused in [map(0x3001, 1), map(0x3000, 0)] {
        let Outcome::Answer(answer) = guest.perform(refused) else { panic!("no answer") };
        // -EINVAL, in the 32 or 64 bits that the guest has.
        assert_eq!(answer & 0xffff_ffff, 0xffff_ffea);
    }
}

#[test]
fn a_real_mode_guest_does_as_it_is_told() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let Some(_) = require(&vm, Cap::USER_MEMORY2, 1) else { return };
    let ram = Ram::new(0x8_0000);
    set(&vm, &ram_slot(0, 0x1_0000, &ram)).unwrap();
    exercise(&mut RealModeGuest::new(&vm, 0), 0x1_0000, &ram, 0xb_0000);
}

#[test]
fn a_long_mode_guest_does_as_it_is_told() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let Some(_) = require(&vm, Cap::USER_MEMORY2, 1) else { return };
    let ram = Ram::new(4 * MIB);
    set(&vm, &ram_slot(0, 4 << 30, &ram)).unwrap();
    exercise(&mut KvmGuest::new(&vm, 0), 4 << 30, &ram, 0xe000_0000);
}

#[test]
fn hypercalls_are_answered_in_real_mode() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    hypercalls(&vm, &mut RealModeGuest::new(&vm, 0));
}

#[test]
fn hypercalls_are_answered_in_long_mode() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    hypercalls(&vm, &mut KvmGuest::new(&vm, 0));
}

#[test]
fn a_file_that_can_be_mapped_is_what_the_guest_uses() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let flags = GmemFlags::MMAP | GmemFlags::INIT_SHARED;
    let Some(_) = require(&vm, Cap::GUEST_MEMFD_FLAGS, flags.bits()) else { return };
    let file = vm.create_guest_memfd(16 * PAGE, flags.bits()).unwrap();
    // Its second half, at 0x2000. KVM's own accesses go through the address beside the file (all of them, where it emulates
    // real mode), so the two have to be the same memory.
    let ram = Ram::of_file(&file, 8 * PAGE, 8 * PAGE);
    let slot = gmem_slot(0, 0x2000, 8 * PAGE, fd(&file), 8 * PAGE);
    set(&vm, &MemoryRegion { userspace_addr: ram.address(), ..slot }).unwrap();
    let mut guest = RealModeGuest::new(&vm, 0);
    assert_eq!(guest.perform(GuestOp::Fill { gpa: 0x2000, len: 8 * PAGE, byte: 7 }), Outcome::Done);
    assert!(ram.is_all(0, 8 * PAGE, 7));
    let punch = FallocateFlags::FALLOC_FL_KEEP_SIZE | FallocateFlags::FALLOC_FL_PUNCH_HOLE;
    file.ops().fallocate(punch, 10 * 4096, 4096).unwrap();
    let found = guest.perform(GuestOp::Check { gpa: 0x2000, len: 8 * PAGE, byte: 7 });
    assert_eq!(found, Outcome::Differs { offset: 2 * PAGE }, "file page 10 is the slot's third");
    assert!(ram.is_all(2 * PAGE, PAGE, 0) && ram.is_all(3 * PAGE, 5 * PAGE, 7));
    assert_eq!(guest.perform(GuestOp::Check { gpa: 0x4000, len: PAGE, byte: 0 }), Outcome::Same);
    assert_eq!(guest.perform(GuestOp::Check { gpa: 0x5000, len: 5 * PAGE, byte: 7 }), Outcome::Same);
}

/// Code that never ends: `jmp .`
const FOREVER: [u8; 2] = [0xeb, 0xfe];

#[test]
fn a_kicked_vcpu_comes_back_whenever_the_kick_came() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let ram = Ram::new(PAGE);
    ram.write(0, &FOREVER);
    set(&vm, &ram_slot(0, 0x1000, &ram)).unwrap();
    let mut guest = RealModeGuest::new(&vm, 0);
    guest.start(GuestOp::Fetch { gpa: 0x1000 });

    guest.kick().kick();
    assert_eq!(guest.run().map(drop), Err(Errno::EINTR), "kicked before it ran");
    for _ in 0..100 {
        let kick = guest.kick();
        let kicker = std::thread::spawn(move || kick.kick());
        assert_eq!(guest.run().map(drop), Err(Errno::EINTR));
        kicker.join().unwrap();
    }
    // No kick is left over: the guest, let go, finishes.
    ram.write(0, guest.return_code());
    assert!(matches!(guest.run(), Ok(Exit::Halt)));
    assert_eq!(guest.result(), Some(Outcome::Done));
}

#[test]
fn a_vcpu_that_hangs_is_given_up() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let ram = Ram::new(PAGE);
    ram.write(0, &FOREVER);
    set(&vm, &ram_slot(0, 0x1000, &ram)).unwrap();
    let mut guest = RealModeGuest::new(&vm, 0);
    guest.set_patience(std::time::Duration::from_millis(20));
    guest.start(GuestOp::Fetch { gpa: 0x1000 });
    assert_eq!(guest.run().map(drop), Err(Errno::ETIMEDOUT));
}

// --- a KVM with private memory ---------------------------------------------------------------------------------------

/// An emulated processor raises page faults for pages that are mapped; without a handler, the first would end the guest.
#[test]
fn a_page_fault_is_tried_again_and_does_not_end_the_guest() {
    let Some(vm) = kvm(Platform::DEFAULT) else { return };
    let ram = Ram::new(0x1000);
    set(&vm, &ram_slot(0, 0x10_0000, &ram)).unwrap();
    let mut guest = KvmGuest::new(&vm, 0);
    // movabs $1<<40,%rax; mov (%rax),%al; ret: nothing is mapped there.
    let code = [&[0x48, 0xb8][..], &(1u64 << 40).to_le_bytes(), &[0x8a, 0x00, 0xc3]].concat();
    guest.perform(GuestOp::Write { gpa: 0x10_0000, data: code });
    guest.set_patience(std::time::Duration::from_millis(20));
    guest.start(GuestOp::Fetch { gpa: 0x10_0000 });
    assert_eq!(guest.run().map(drop), Err(Errno::ETIMEDOUT), "it tries for ever");
    // And goes on when it is told to do something else.
    guest.set_patience(std::time::Duration::from_secs(60));
    assert_eq!(guest.perform(GuestOp::Check { gpa: 0x10_0000, len: 1, byte: 0x48 }), Outcome::Same);
}

/// RAM in both kinds, at `gpa`.
fn both_kinds(vm: &KvmVm, slot: u32, gpa: u64, size: u64) -> (Ram, GuestMemfd) {
    let (ram, file) = (Ram::new(size), vm.create_guest_memfd(size, 0).unwrap());
    let region = gmem_slot(slot, gpa, size, fd(&file), 0);
    set(vm, &MemoryRegion { userspace_addr: ram.address(), ..region }).unwrap();
    (ram, file)
}

#[test]
fn a_long_mode_guest_reaches_the_top_and_more_than_its_tables_hold() {
    let Some(vm) = private_kvm() else { return };
    let mut guest = KvmGuest::new(&vm, 0);
    let bits = guest.physical_bits();
    assert!((36..=52).contains(&bits), "{bits} bits");
    let top = (1 << bits) - 2 * MIB;
    let (ram, _file) = both_kinds(&vm, 0, top, 2 * MIB);
    assert_eq!(guest.perform(GuestOp::Fill { gpa: top, len: 2 * MIB, byte: 9 }), Outcome::Done);
    assert!(ram.is_all(0, 2 * MIB, 9));
    // A hundred pages in a hundred GiB, twice.
    let ram = Ram::new(PAGE);
    for at in (0..200_u64).map(|i| (8 + i % 100) << 30) {
        set(&vm, &ram_slot(1, at, &ram)).unwrap();
        let data = at.to_le_bytes().to_vec();
        assert_eq!(guest.perform(GuestOp::Write { gpa: at + 8, data: data.clone() }), Outcome::Done);
        assert_eq!(ram.read(8, 8), data);
        set(&vm, &MemoryRegion { memory_size: 0, ..ram_slot(1, at, &ram) }).unwrap();
    }
    assert_eq!(guest.perform(GuestOp::Check { gpa: top, len: 2 * MIB, byte: 9 }), Outcome::Same);
}

#[test]
fn a_private_page_is_the_files_and_a_shared_one_the_hosts() {
    let Some(vm) = private_kvm() else { return };
    let gpa = 0x10_0000;
    let (ram, file) = both_kinds(&vm, 0, gpa, 4 * PAGE);
    let mut guest = KvmGuest::new(&vm, 0);
    assert_eq!(guest.perform(GuestOp::Fill { gpa, len: 4 * PAGE, byte: 1 }), Outcome::Done);
    set_private(&vm, gpa + PAGE, 2 * PAGE, true);
    assert_eq!(guest.perform(GuestOp::Check { gpa: gpa + PAGE, len: 2 * PAGE, byte: 0 }), Outcome::Same, "fresh");
    assert_eq!(guest.perform(GuestOp::Fill { gpa, len: 4 * PAGE, byte: 2 }), Outcome::Done);
    assert!(ram.is_all(0, PAGE, 2) && ram.is_all(3 * PAGE, PAGE, 2));
    assert!(ram.is_all(PAGE, 2 * PAGE, 1), "what is private does not reach the host's memory");
    assert_eq!(file.resident_bytes().unwrap_or(2 * PAGE), 2 * PAGE);

    set_private(&vm, gpa + PAGE, PAGE, false);
    assert_eq!(guest.perform(GuestOp::Check { gpa: gpa + PAGE, len: PAGE, byte: 1 }), Outcome::Same);
    assert_eq!(guest.perform(GuestOp::Check { gpa: gpa + 2 * PAGE, len: PAGE, byte: 2 }), Outcome::Same);
    // Code runs from private memory too.
    let code = guest.return_code().to_vec();
    assert_eq!(guest.perform(GuestOp::Write { gpa: gpa + 2 * PAGE, data: code }), Outcome::Done);
    assert_eq!(guest.perform(GuestOp::Fetch { gpa: gpa + 2 * PAGE }), Outcome::Done);
}

#[test]
fn a_private_access_without_memory_is_a_fault_that_can_be_repaired() {
    let Some(vm) = private_kvm() else { return };
    let gpa = 0x20_0000;
    set_private(&vm, gpa, 2 * PAGE, true);
    let mut guest = KvmGuest::new(&vm, 0);
    guest.start(GuestOp::Write { gpa: gpa + PAGE - 2, data: vec![1, 2, 3, 4] });
    let fault = |gpa| MemoryFault { errno: Errno::EFAULT, flags: MemoryFault::PRIVATE, gpa, size: PAGE };
    for _ in 0..2 {
        match guest.run() {
            Ok(Exit::MemoryFault(found)) => assert_eq!(found, fault(gpa)),
            other => panic!("{other:?}"),
        }
    }
    let (ram, file) = both_kinds(&vm, 0, gpa, 2 * PAGE);
    assert!(matches!(guest.run(), Ok(Exit::Halt)), "the very instruction goes on");
    assert_eq!(guest.result(), Some(Outcome::Done));
    let read = guest.perform(GuestOp::Read { gpa: gpa + PAGE - 2, len: 4 });
    assert_eq!(read, Outcome::Data(vec![1, 2, 3, 4]));
    assert!(ram.is_all(0, 2 * PAGE, 0));

    // A file that is gone is a fault as well; an exit that follows another is not mistaken for it.
    drop(file);
    guest.start(GuestOp::Read { gpa, len: 1 });
    assert!(matches!(guest.run(), Ok(Exit::MemoryFault(found)) if found == fault(gpa)));
    let outcome = guest.perform(GuestOp::Hypercall { nr: 12_345, args: [0; 4] });
    assert!(matches!(outcome, Outcome::Answer(_)));
    guest.kick().kick();
    guest.start(GuestOp::Read { gpa, len: 1 });
    assert_eq!(guest.run().map(drop), Err(Errno::EINTR));
}

#[test]
fn the_recipe_for_vmms_with_a_vcpu_of_their_own_sees_the_same_fault() {
    let Some(vm) = private_kvm() else { return };
    set_private(&vm, 0, MIB, true);
    // Real mode at the reset vector's segment, moved to zero: the first fetch is private and finds nothing.
    let mut vcpu = vm.create_vcpu(0).unwrap().into_fd();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_bindings::kvm_regs { rip: 0x7000, rflags: 2, ..Default::default() }).unwrap();
    vcpu.get_kvm_run().exit_reason = 0;
    let exit = vcpu.run().unwrap();
    let errno = Errno::last();
    let expected = MemoryFault { errno: Errno::EFAULT, flags: MemoryFault::PRIVATE, gpa: 0x7000, size: PAGE };
    assert!(matches!(Exit::from_kvm(exit, errno), Exit::MemoryFault(fault) if fault == expected));

    // A run that fails before it gets to the guest leaves what the last one wrote. Not a fault, for all that.
    let mut vcpu = KvmVcpu::new(vcpu);
    assert!(matches!(vcpu.run(), Ok(Exit::MemoryFault(fault)) if fault == expected));
    vcpu.fd_mut().get_kvm_run().kvm_dirty_regs = u64::MAX;
    assert_eq!(vcpu.run().map(drop), Err(Errno::EINVAL));
    vcpu.fd_mut().get_kvm_run().kvm_dirty_regs = 0;
    assert!(matches!(vcpu.run(), Ok(Exit::MemoryFault(fault)) if fault == expected));
}

#[test]
fn prefault_maps_what_is_there_and_says_what_is_not() {
    let Some(vm) = private_kvm() else { return };
    let Some(_) = require(&vm, Cap::PRE_FAULT_MEMORY, 1) else { return };
    let gpa = 0x100_0000;
    let (_ram, file) = both_kinds(&vm, 0, gpa, 2 * MIB);
    set_private(&vm, gpa, MIB, true);
    let mut guest = KvmGuest::new(&vm, 0);

    let mut range = PreFaultMemory { gpa, size: MIB, flags: 0 };
    while range.size > 0 {
        let before = range.size;
        guest.pre_fault_memory(&mut range).unwrap();
        assert!(range.size < before && range.gpa + range.size == gpa + MIB, "{range:x?}");
    }
    assert_eq!(file.resident_bytes().unwrap_or(MIB), MIB);
    // Private up to the middle, shared from there, nothing at the end.
    let mut rest = PreFaultMemory { gpa: gpa + 2 * MIB - PAGE, size: 2 * PAGE, flags: 0 };
    assert_eq!(guest.pre_fault_memory(&mut rest), Ok(()));
    assert_eq!(rest, PreFaultMemory { gpa: gpa + 2 * MIB, size: PAGE, flags: 0 }, "as far as there is memory");
    assert_eq!(guest.pre_fault_memory(&mut rest), Err(Errno::ENOENT));
    set_private(&vm, gpa + 2 * MIB, PAGE, true);
    assert_eq!(guest.pre_fault_memory(&mut rest), Err(Errno::EFAULT));
    assert_eq!(rest.size, PAGE, "nothing was done");
    for bad in [
        PreFaultMemory { gpa, size: PAGE, flags: 1 },
        PreFaultMemory { gpa: gpa + 1, size: PAGE, flags: 0 },
        PreFaultMemory { gpa, size: 0, flags: 0 },
        PreFaultMemory { gpa: u64::MAX - 4095, size: PAGE, flags: 0 },
    ] {
        assert_eq!(guest.pre_fault_memory(&mut { bad }), Err(Errno::EINVAL), "{bad:x?}");
    }
}

#[test]
fn two_vcpus_work_side_by_side_while_memory_is_converted() {
    let Some(vm) = private_kvm() else { return };
    let (gpa, half) = (0x200_0000, MIB);
    let (ram, _file) = both_kinds(&vm, 0, gpa, 2 * half);
    std::thread::scope(|scope| {
        let workers = [0, 1].map(|id| {
            let vm = &vm;
            scope.spawn(move || {
                let mut guest = KvmGuest::new(vm, id);
                let gpa = gpa + id * half;
                for byte in 1..=20 {
                    set_private(vm, gpa, half, byte % 2 == 0);
                    assert_eq!(guest.perform(GuestOp::Fill { gpa, len: half, byte }), Outcome::Done);
                    assert_eq!(guest.perform(GuestOp::Check { gpa, len: half, byte }), Outcome::Same);
                }
                set_private(vm, gpa, half, false);
            })
        });
        for worker in workers {
            worker.join().unwrap();
        }
    });
    assert!(ram.is_all(0, 2 * half, 19), "the last that was written while shared");
}
