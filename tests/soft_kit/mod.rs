//! What the tests of the software KVM share: memory to give to a guest, short words for ioctls, and a vCPU that finishes.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(unsafe_code, reason = "slots are given to a guest here, over memory that is never freed")]

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use cvm_memory::addr::GfnRange;
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{
    Exit, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes, MemoryFault, MemoryRegion, Platform, Vcpu,
};
use cvm_memory::soft::{Arch, GuestOp, OpResult, SoftVcpu, SoftVm};
#[allow(unused_imports, reason = "each test file uses its own part")]
pub use cvm_memory_testkit::{file_pages, gfn, gfns};
use nix::errno::Errno;

pub const PAGE: u64 = 4096;
pub const LOG_DIRTY: u32 = 1;
pub const READONLY: u32 = 2;
pub const GUEST_MEMFD: u32 = 4;
pub const MMAP: u64 = 1;
pub const INIT_SHARED: u64 = 2;

#[repr(C, align(4096))]
struct HostPage([AtomicU8; 4096]);

/// Shared memory of this process, page aligned, never freed.
#[derive(Clone, Copy)]
pub struct Ram(&'static [HostPage]);

impl Ram {
    pub fn new(pages: u64) -> Self {
        let pages = (0..pages).map(|_| HostPage([const { AtomicU8::new(0) }; 4096])).collect::<Vec<_>>();
        Self(pages.leak())
    }

    pub fn hva(self) -> u64 {
        self.0.as_ptr().expose_provenance() as u64
    }

    pub fn byte(self, offset: u64) -> u8 {
        self.cell(offset).load(Ordering::SeqCst)
    }

    pub fn fill(self, byte: u8) {
        self.fill_range(0..self.0.len() as u64 * PAGE, byte);
    }

    pub fn fill_range(self, range: std::ops::Range<u64>, byte: u8) {
        for offset in range {
            self.cell(offset).store(byte, Ordering::SeqCst);
        }
    }

    pub fn is_all(self, range: std::ops::Range<u64>, byte: u8) -> bool {
        range.into_iter().all(|offset| self.byte(offset) == byte)
    }

    fn cell(self, offset: u64) -> &'static AtomicU8 {
        &self.0[usize::try_from(offset / PAGE).unwrap()].0[usize::try_from(offset % PAGE).unwrap()]
    }
}

/// A VM whose rings a log may back.
pub fn backed_vm() -> SoftVm {
    #[derive(Debug)]
    struct Backed;
    impl Arch for Backed {
        fn platform(&self) -> Platform {
            Platform::DEFAULT
        }
        fn offers_ring_with_bitmap(&self) -> bool {
            true
        }
    }
    SoftVm::with_arch(Arc::new(Backed))
}

pub fn fd(file: &GuestMemfd) -> RawFd {
    file.as_fd().as_raw_fd()
}

/// The ioctl as it is.
pub fn set_region(vm: &SoftVm, region: &MemoryRegion) -> Result<(), Errno> {
    // SAFETY: where a test lets its guest access a slot, the slot's address is zero, where nothing is mapped, or that of a
    // `Ram`, which lives for ever and is all atomics. Slots at other addresses are created and never accessed.
    unsafe { vm.set_user_memory_region2(region) }
}

/// A slot of shared memory.
pub fn shared_slot(slot: u32, gpa: u64, size: u64, hva: u64) -> MemoryRegion {
    MemoryRegion { slot, guest_phys_addr: gpa, memory_size: size, userspace_addr: hva, ..MemoryRegion::default() }
}

/// A slot with private memory.
pub fn gmem_slot(slot: u32, gpa: u64, size: u64, hva: u64, file: &GuestMemfd, offset: u64) -> MemoryRegion {
    MemoryRegion {
        flags: GUEST_MEMFD,
        guest_memfd: fd(file),
        guest_memfd_offset: offset,
        ..shared_slot(slot, gpa, size, hva)
    }
}

pub fn delete(slot: u32) -> MemoryRegion {
    MemoryRegion { slot, ..MemoryRegion::default() }
}

pub fn set_private(vm: &SoftVm, address: u64, size: u64, private: bool) {
    let attributes = if private { MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
    vm.set_memory_attributes(&MemoryAttributes { address, size, attributes, flags: 0 }).unwrap();
}

/// Runs `op` to its end; any exit is a failure of the test.
pub fn finish(vcpu: &mut SoftVcpu, op: GuestOp) -> OpResult {
    vcpu.start(op);
    let exit = vcpu.run();
    assert!(matches!(exit, Ok(Exit::Halt)), "{exit:?}");
    vcpu.take_result().unwrap()
}

/// Runs `op` up to the memory fault it must exit with.
pub fn fault(vcpu: &mut SoftVcpu, op: GuestOp) -> MemoryFault {
    vcpu.start(op);
    match vcpu.run() {
        Ok(Exit::MemoryFault(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

pub fn fill(gpa: u64, len: u64, byte: u8, private: bool) -> GuestOp {
    GuestOp::Fill { gpa, len, byte, private }
}

pub fn check(gpa: u64, len: u64, byte: u8, private: bool) -> GuestOp {
    GuestOp::Check { gpa, len, byte, private }
}

pub fn read(gpa: u64, len: u64, private: bool) -> GuestOp {
    GuestOp::Read { gpa, len, private }
}

/// Mapped frames, of either kind.
pub fn mapped(vm: &SoftVm) -> Vec<GfnRange> {
    vm.mappings().into_iter().map(|mapping| mapping.gfns).collect()
}
