//! The memory a guest needs for itself: one ordinary slot with its code, its stack, an exchange buffer and page tables.
//!
//! | offset | what |
//! |---|---|
//! | 0x0 | stubs |
//! | 0x1000 | stack, growing down from 0x2000 |
//! | 0x2000 | exchange buffer, through which data goes in and out |
//! | 0x12000 | page tables (long mode only) |
#![allow(unsafe_code, reason = "the guest is let at this region and no other, which lives as long as its slot")]

use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Hypervisor, MemoryRegion};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// Where a guest lives: a slot that is nobody else's, and a range of guest physical memory without any other slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Slot id.
    pub slot: u32,
    /// First byte; page aligned.
    pub gpa: u64,
}

pub(crate) const STUBS: u64 = 0;
pub(crate) const STACK_TOP: u64 = 0x2000;
pub(crate) const EXCHANGE: u64 = 0x2000;
pub(crate) const EXCHANGE_SIZE: u64 = 0x1_0000;
pub(crate) const TABLES: u64 = EXCHANGE + EXCHANGE_SIZE;

/// That memory, and its slot.
#[derive(Debug)]
pub struct Support {
    vm: KvmVm,
    place: Placement,
    memory: MmapRegion,
}

impl Support {
    /// Puts `size` bytes of fresh memory at `place`.
    pub(crate) fn new(vm: &KvmVm, place: Placement, size: u64) -> Self {
        let memory =
            MmapRegion::new(usize::try_from(size).expect("a small size")).expect("memory for the guest's code");
        let support = Self { vm: vm.clone(), place, memory };
        support.set_slot(size).unwrap_or_else(|errno| panic!("slot for the guest itself at {place:x?}: {errno}"));
        support
    }

    fn set_slot(&self, memory_size: u64) -> Result<(), nix::errno::Errno> {
        let region = MemoryRegion {
            slot: self.place.slot,
            guest_phys_addr: self.place.gpa,
            memory_size,
            userspace_addr: self.memory.as_ptr().expose_provenance() as u64,
            guest_memfd: -1,
            ..MemoryRegion::default()
        };
        // SAFETY: `memory` was mapped for the guest, is only accessed through volatile slices here, and is unmapped after
        // `drop` has deleted the slot.
        unsafe { self.vm.set_user_memory_region2(&region) }
    }

    /// Guest physical address of the byte at `offset`.
    pub(crate) const fn gpa(&self, offset: u64) -> u64 {
        self.place.gpa + offset
    }

    pub(crate) fn size(&self) -> u64 {
        self.memory.size() as u64
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        self.memory.as_volatile_slice().write_slice(bytes, at(offset)).expect("within the guest's own memory");
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.as_volatile_slice().read_slice(&mut bytes, at(offset)).expect("within the guest's own memory");
        bytes
    }

    pub(crate) fn write_u64(&self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn read_u64(&self, offset: u64) -> u64 {
        self.memory.as_volatile_slice().read_obj(at(offset)).expect("within the guest's own memory")
    }
}

impl Drop for Support {
    fn drop(&mut self) {
        // Before the memory is unmapped.
        if let Err(errno) = self.set_slot(0) {
            eprintln!("slot {:x?} of a guest could not be deleted: {errno}", self.place);
        }
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("a small offset")
}
