//! The memory that a guest keeps for itself, and its launch: the same calls on either side.
#![allow(unsafe_code, reason = "a slot lets a guest at memory of this process")]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;

use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes, MemoryRegion};
use cvm_memory_sev::commands::{LaunchUpdate, SnpCommands, Source};
use cvm_memory_sev::digest::PageType;
use cvm_memory_sev::page::Page;
use cvm_memory_testkit::KvmGuest;
use cvm_memory_testkit::kvm_guest::OwnMemory;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::ftruncate;

use super::code;

const PAGE: u64 = 4096;
const GUEST_MEMFD: u32 = 4;

/// The slot of one guest, with private and shared memory.
#[derive(Debug)]
pub(super) struct Own {
    /// Where it is.
    pub(super) place: OwnMemory,
    /// Stays bound for as long as it is open.
    private: GuestMemfd,
    shared: OwnedFd,
    mapping: NonNull<c_void>,
}

// SAFETY: a mapping belongs to no thread, and no reference leads into it.
unsafe impl Send for Own {}

fn bytes(place: &OwnMemory) -> NonZeroUsize {
    NonZeroUsize::new(usize::try_from(place.size).expect("small")).expect("not zero")
}

impl Own {
    /// Makes the slot of vCPU `vcpu`, and launches its private pages. `marker` pages after them are one more: by it a guest is
    /// told from others.
    pub(super) fn new(vm: &dyn Hypervisor, commands: &dyn SnpCommands, vcpu: u8, marker: u64) -> Self {
        let place = KvmGuest::own_memory(vcpu.into());
        assert!((code::PAGES + marker) * PAGE < place.size, "room in a guest's own memory");
        let private = vm.create_guest_memfd(place.size, 0).expect("a guest_memfd");
        let shared = memfd_create("shared", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        ftruncate(&shared, i64::try_from(place.size).expect("small")).expect("to make it larger");
        let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice harms nobody.
        let mapping = unsafe { mmap(None, bytes(&place), protection, flags, &shared, 0) }.expect("a mapping");
        let own = Self { place, private, shared, mapping };
        let region = MemoryRegion {
            slot: place.slot,
            flags: GUEST_MEMFD,
            guest_phys_addr: place.gpa,
            memory_size: place.size,
            userspace_addr: mapping.as_ptr().expose_provenance() as u64,
            guest_memfd_offset: 0,
            guest_memfd: own.private.as_fd().as_raw_fd(),
        };
        // SAFETY: the mapping is as long as the slot, only copied from and to by the kernel here, and unmapped after the VM
        // has gone.
        unsafe { vm.set_user_memory_region2(&region) }.expect("a slot of the guest's own");
        own.launch(vm, commands, place.gpa, &Page::split(&code::image(place.gpa)));
        own.launch(vm, commands, own.marker(marker), &[Page::ZERO]);
        own
    }

    /// Where the page is that marks the guest.
    pub(super) const fn marker(&self, marker: u64) -> u64 {
        self.place.gpa + (code::PAGES + marker) * PAGE
    }

    fn launch(&self, vm: &dyn Hypervisor, commands: &dyn SnpCommands, gpa: u64, pages: &[Page]) {
        let len = pages.len() as u64 * PAGE;
        let attributes = MemoryAttributes { address: gpa, size: len, attributes: MEMORY_ATTRIBUTE_PRIVATE, flags: 0 };
        vm.set_memory_attributes(&attributes).expect("private memory");
        let mut update = LaunchUpdate { gfn_start: gpa / PAGE, len, page_type: PageType::Normal.raw(), flags: 0 };
        commands.launch_update(&mut update, Source::Pages(pages)).expect("to launch a guest's own pages");
        assert_eq!(update.len, 0, "all of them");
    }

    /// Eight bytes at an offset.
    pub(super) fn get(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.read(at, 8));
        u64::from_le_bytes(word)
    }

    /// Sets them.
    pub(super) fn put(&self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(pread(&self.shared, &mut bytes, i64::try_from(at).expect("small")), Ok(len));
        bytes
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        assert_eq!(pwrite(&self.shared, bytes, i64::try_from(at).expect("small")), Ok(bytes.len()));
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; no reference leads there, and the VM is gone.
        unsafe { munmap(self.mapping, bytes(&self.place).get()) }.expect("a mapping of our own");
    }
}
