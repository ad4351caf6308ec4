//! A VM fd as a [`Hypervisor`].
#![allow(unsafe_code, reason = "a memslot lets the guest at memory that only the caller can vouch for; raw ioctls")]

use std::ffi::c_ulong;
use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    kvm_clear_dirty_log, kvm_dirty_log, kvm_enable_cap, kvm_memory_attributes, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VmFd};
use nix::errno::Errno;

use super::gmem::KvmGmem;
use super::{KvmError, KvmVcpu, errno, raw};
use crate::gmem::{GmemFlags, GuestMemfd};
use crate::hypervisor::{
    Cap, ClearDirtyLog, DirtyLog, Hypervisor, MemoryAttributes, MemoryRegion, MissingCapability, Platform, VmType,
};

/// A VM of the real KVM. Cheap to clone: the clones are one VM.
///
/// ```no_run
/// use cvm_memory::hypervisor::kvm::KvmVm;
/// use cvm_memory::hypervisor::{Hypervisor, Platform};
///
/// let vm = KvmVm::create(&kvm_ioctls::Kvm::new()?, Platform::SOFTWARE_PROTECTED)?;
/// let file = vm.create_guest_memfd(2 << 20, 0)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct KvmVm {
    vm: Arc<VmFd>,
    platform: Platform,
}

impl KvmVm {
    /// `KVM_CREATE_VM` with the platform's VM type.
    ///
    /// # Errors
    /// [`KvmError::VmType`] if `KVM_CAP_VM_TYPES` lacks the type; [`KvmError::Call`] with what the kernel answered.
    pub fn create(kvm: &Kvm, platform: Platform) -> Result<Self, KvmError> {
        let VmType(vm_type) = platform.vm_type;
        let types = positive(kvm.check_extension_raw(cap_number(Cap::VM_TYPES)));
        let needed = u32::try_from(vm_type).ok().and_then(|bit| 1_u64.checked_shl(bit)).unwrap_or(0);
        // A KVM that does not know the capability has the default type, and only that.
        if platform.vm_type != VmType::DEFAULT && types & needed == 0 {
            let missing = MissingCapability { cap: Cap::VM_TYPES, platform: platform.name, needed, offered: types };
            return Err(KvmError::VmType { vm_type, missing });
        }
        loop {
            match kvm.create_vm_with_type(vm_type).map_err(errno) {
                Ok(vm) => return Ok(Self::from_vm(Arc::new(vm), platform)),
                // A signal may come while KVM allocates.
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(KvmError::Call { call: "KVM_CREATE_VM", argument: vm_type, errno }),
            }
        }
    }

    /// A VM that the VMM has created itself, with the type that `platform` names.
    pub const fn from_vm(vm: Arc<VmFd>, platform: Platform) -> Self {
        Self { vm, platform }
    }

    /// The VM fd, for everything that is not memory.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// `KVM_CREATE_VCPU`.
    ///
    /// # Errors
    /// [`KvmError::Call`] with what the kernel answered.
    pub fn create_vcpu(&self, id: u64) -> Result<KvmVcpu, KvmError> {
        match self.vm.create_vcpu(id) {
            Ok(fd) => Ok(KvmVcpu::new(fd)),
            Err(error) => Err(KvmError::Call { call: "KVM_CREATE_VCPU", argument: id, errno: errno(error) }),
        }
    }
}

impl Hypervisor for KvmVm {
    fn platform(&self) -> Platform {
        self.platform
    }

    fn check_extension(&self, cap: Cap) -> u64 {
        positive(self.vm.check_extension_raw(cap_number(cap)))
    }

    fn enable_cap(&self, cap: Cap, args: [u64; 4]) -> Result<(), Errno> {
        self.vm.enable_cap(&kvm_enable_cap { cap: cap.0, args, ..Default::default() }).map_err(errno)
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<GuestMemfd, Errno> {
        let file = KvmGmem::create(&self.vm, size, flags)?;
        // The kernel has just accepted that size, and accepts none that GuestMemfd does not.
        GuestMemfd::new(size, GmemFlags::from_bits_retain(flags), Box::new(file)).map_err(|_| Errno::EINVAL)
    }

    unsafe fn set_user_memory_region2(&self, region: &MemoryRegion) -> Result<(), Errno> {
        let argument = kvm_userspace_memory_region2 {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.memory_size,
            userspace_addr: region.userspace_addr,
            guest_memfd_offset: region.guest_memfd_offset,
            // Bit for bit: the kernel's field is unsigned, its descriptors are not.
            guest_memfd: region.guest_memfd.cast_unsigned(),
            ..Default::default()
        };
        // SAFETY: the caller vouches for the address range, under this very contract.
        unsafe { self.vm.set_user_memory_region2(argument) }.map_err(errno)
    }

    fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno> {
        let MemoryAttributes { address, size, attributes, flags } = *attributes;
        self.vm.set_memory_attributes(kvm_memory_attributes { address, size, attributes, flags }).map_err(errno)
    }

    fn get_dirty_log(&self, slot: u32, log: &mut DirtyLog) -> Result<(), Errno> {
        let mut argument = kvm_dirty_log { slot, ..Default::default() };
        argument.__bindgen_anon_1.dirty_bitmap = log.as_mut_ptr();
        // SAFETY: the descriptor is a VM's. KVM writes the log of the slot to where the argument points: to words that are
        // borrowed mutably, and if the slot has more of them, not to any other memory (see `DirtyLog`).
        unsafe { raw::get_dirty_log(self.vm.as_raw_fd(), &raw const argument) }.map(drop)
    }

    fn clear_dirty_log(&self, clear: &ClearDirtyLog<'_>) -> Result<(), Errno> {
        let ClearDirtyLog { slot, first_page, num_pages, bitmap } = *clear;
        if !clear.is_whole() {
            return Err(Errno::EFAULT);
        }
        let mut argument = kvm_clear_dirty_log { slot, num_pages, first_page, ..Default::default() };
        argument.__bindgen_anon_1.dirty_bitmap = bitmap.as_ptr().cast_mut().cast();
        // SAFETY: the descriptor is a VM's. KVM only reads where the argument points, and not more than `num_pages` bits,
        // rounded up to a word, which have just been found to be there.
        unsafe { raw::clear_dirty_log(self.vm.as_raw_fd(), &raw mut argument) }.map(drop)
    }

    fn reset_dirty_rings(&self) -> Result<u64, Errno> {
        // SAFETY: the descriptor is a VM's, and there is no argument.
        let taken = unsafe { raw::reset_dirty_rings(self.vm.as_raw_fd()) }?;
        Ok(u64::try_from(taken).unwrap_or(0))
    }
}

impl fmt::Debug for KvmVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVm").field("platform", &self.platform.name).finish_non_exhaustive()
    }
}

fn cap_number(cap: Cap) -> c_ulong {
    c_ulong::from(cap.0)
}

/// An answer of `KVM_CHECK_EXTENSION`: negative means no.
fn positive(answer: i32) -> u64 {
    u64::try_from(answer).unwrap_or(0)
}
