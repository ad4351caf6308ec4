//! What the selftests share: two machines to run the same scenario on, and the raw slots of some of them.
//!
//! The scenarios and their numbers are those of the kernel's own KVM selftests; each is one generic function, run on the
//! software KVM and on `/dev/kvm`. What a machine lacks is skipped on one line that names it.
#![allow(dead_code, unused_imports, unused_macros, reason = "each of the tests uses a part of it")]
#![allow(unsafe_code, reason = "slots let guests at memory of this process")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use cvm_memory::addr::{FilePage, FileRange};
use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::gmem::{GmemFlags, GuestMemfd};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{
    Cap, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes, MemoryRegion, Platform, Vcpu,
};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::skip::require;
use cvm_memory_testkit::{Guest, KvmGuest, SoftGuest, kvm, private_kvm};
use nix::errno::Errno;
use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::Signal;

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

pub const LOG_DIRTY: u32 = 1;
pub const READONLY: u32 = 2;
pub const GUEST_MEMFD: u32 = 4;

/// A KVM that scenarios run on.
pub trait Machine: Hypervisor + Clone + 'static {
    /// For what is printed.
    const NAME: &'static str;
    /// Whether its files are the kernel's, with all that a descriptor can be used for.
    const KERNEL_FILES: bool;
    /// Its vCPUs, with a guest in them.
    type Guest: Guest;

    /// A VM of that kind, which has guest_memfd and, if the platform has, private memory; or a skip.
    fn create(platform: Platform) -> Option<Self>;

    /// The VM's descriptor, if it has one.
    fn vm_fd(&self) -> Option<RawFd>;

    /// vCPU `id`; ids are given in order.
    fn guest(&self, id: u64) -> Self::Guest;

    /// Bits of the highest address at which a guest may have memory.
    fn physical_bits(guest: &Self::Guest) -> u32;

    /// What interrupts a call that the calling thread makes on the vCPU, if it is called meanwhile. For as long as that
    /// thread lives.
    fn interrupter(guest: &Self::Guest) -> impl Fn() + Send + Sync + 'static;
}

impl Machine for SoftVm {
    const NAME: &'static str = "soft";
    const KERNEL_FILES: bool = false;
    type Guest = SoftGuest;

    fn create(platform: Platform) -> Option<Self> {
        Some(if platform == Platform::DEFAULT { Self::default_type() } else { Self::software_protected() })
    }

    fn vm_fd(&self) -> Option<RawFd> {
        None
    }

    fn guest(&self, _id: u64) -> SoftGuest {
        SoftGuest::new(self)
    }

    fn physical_bits(_: &SoftGuest) -> u32 {
        52
    }

    fn interrupter(guest: &SoftGuest) -> impl Fn() + Send + Sync + 'static {
        let exit = guest.vcpu().immediate_exit();
        move || {
            exit.set(true);
            std::thread::yield_now();
            exit.set(false);
        }
    }
}

impl Machine for KvmVm {
    const NAME: &'static str = "kvm";
    const KERNEL_FILES: bool = true;
    type Guest = KvmGuest;

    fn create(platform: Platform) -> Option<Self> {
        if platform == Platform::SOFTWARE_PROTECTED {
            return private_kvm();
        }
        let vm = kvm(platform)?;
        require(&vm, Cap::USER_MEMORY2, 1)?;
        require(&vm, Cap::GUEST_MEMFD, 1)?;
        Some(vm)
    }

    fn vm_fd(&self) -> Option<RawFd> {
        Some(self.vm().as_raw_fd())
    }

    fn guest(&self, id: u64) -> KvmGuest {
        KvmGuest::new(self, id)
    }

    fn physical_bits(guest: &KvmGuest) -> u32 {
        guest.physical_bits()
    }

    fn interrupter(_: &KvmGuest) -> impl Fn() + Send + Sync + 'static {
        // The guest has installed a handler that does nothing.
        let thread = pthread_self();
        move || pthread_kill(thread, Signal::SIGUSR1).unwrap()
    }
}

/// Makes tests of generic functions: one on the software KVM, and one on `/dev/kvm`.
macro_rules! on_both_machines {
    ($($scenario:ident),+ $(,)?) => {
        mod soft {
            $(#[test]
            fn $scenario() {
                super::$scenario::<cvm_memory::soft::SoftVm>();
            })+
        }

        mod kvm {
            $(#[test]
            fn $scenario() {
                super::$scenario::<cvm_memory::hypervisor::kvm::KvmVm>();
            })+
        }
    };
}
pub(crate) use on_both_machines;

/// `KVM_SET_USER_MEMORY_REGION2` with nothing checked before it.
pub fn set(vm: &dyn Hypervisor, region: &MemoryRegion) -> Result<(), Errno> {
    // SAFETY: the regions of these tests name memory that is never unmapped (`leaked`), memory that the test keeps until
    // the slot is gone, or address zero, where nothing is; no Rust reference points into any of it.
    unsafe { vm.set_user_memory_region2(region) }
}

/// Memory for a raw slot: it stays, so that no slot can outlive it.
pub fn leaked(size: u64) -> &'static SharedMemory {
    Box::leak(Box::new(SharedMemory::new(size).unwrap()))
}

/// A slot without a file.
pub fn plain_slot(slot: u32, gpa: u64, size: u64, userspace_addr: u64) -> MemoryRegion {
    MemoryRegion {
        slot,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr,
        guest_memfd: -1,
        ..Default::default()
    }
}

/// A slot with a file, and nothing at its address in this process.
pub fn gmem_slot(slot: u32, gpa: u64, size: u64, guest_memfd: RawFd, guest_memfd_offset: u64) -> MemoryRegion {
    MemoryRegion { flags: GUEST_MEMFD, guest_memfd, guest_memfd_offset, ..plain_slot(slot, gpa, size, 0) }
}

/// What deletes a slot.
pub fn deletion(region: &MemoryRegion) -> MemoryRegion {
    MemoryRegion { memory_size: 0, ..*region }
}

/// The descriptor of a file.
pub fn fd(file: &GuestMemfd) -> RawFd {
    file.as_fd().as_raw_fd()
}

/// The file, to be used as any file is.
pub fn as_file(file: &GuestMemfd) -> File {
    file.as_fd().try_clone_to_owned().unwrap().into()
}

/// Sets the attribute of `[gpa, gpa + size)`, past every record of it.
pub fn set_private(vm: &dyn Hypervisor, gpa: u64, size: u64, private: bool) {
    let attributes = if private { MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
    vm.set_memory_attributes(&MemoryAttributes { address: gpa, size, attributes, flags: 0 }).unwrap();
}

/// Pages of a file, from bytes.
pub fn file_range(offset: u64, len: u64) -> FileRange {
    FileRange::from_bytes(offset, len).unwrap()
}

/// Whether `[offset, offset + len)` of the memory holds nothing but `byte`.
pub fn is_all(memory: &SharedMemory, offset: u64, len: u64, byte: u8) -> bool {
    let mut bytes = vec![!byte; usize::try_from(len).unwrap()];
    memory.read(offset, &mut bytes).unwrap();
    bytes.iter().all(|found| *found == byte)
}

/// Fills `[offset, offset + len)` of the memory.
pub fn fill(memory: &SharedMemory, offset: u64, len: u64, byte: u8) {
    memory.write(offset, &vec![byte; usize::try_from(len).unwrap()]).unwrap();
}

/// Checks what the file holds, where the machine's kernel can tell (`cachestat(2)`).
pub fn assert_resident(file: &GuestMemfd, bytes: u64) {
    if let Some(resident) = file.resident_bytes() {
        assert_eq!(resident, bytes);
    }
}

/// What this kernel answers for file pages that are bound already: `EEXIST` since 7.2, `EINVAL` before.
pub fn pages_are_bound(vm: &dyn Hypervisor) -> Errno {
    let file = vm.create_guest_memfd(PAGE, 0).unwrap();
    let held = gmem_slot(100, 1 << 30, PAGE, fd(&file), 0);
    set(vm, &held).unwrap();
    let errno = set(vm, &gmem_slot(101, 2 << 30, PAGE, fd(&file), 0)).unwrap_err();
    set(vm, &deletion(&held)).unwrap();
    assert!(errno == Errno::EEXIST || errno == Errno::EINVAL, "{errno}");
    errno
}
