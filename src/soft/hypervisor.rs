//! The VM ioctls of the software KVM.
#![allow(unsafe_code, reason = "the trait's one unsafe method is implemented here; there is no unsafe block")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::SoftVm;
use super::counters::Call;
use super::dirty_log::{INITIALLY_SET, MANUAL_PROTECT};
use super::dirty_ring;
use super::file::GmemFile;
use super::gmem::SoftGmem;
use super::region::USER_MEM_SLOTS;
use super::vcpu::MAP_GPA_RANGE_BIT;
use crate::addr::PAGE_SIZE;
use crate::gmem::{GmemFlags, GuestMemfd};
use crate::hypervisor::{
    Cap, ClearDirtyLog, DirtyLog, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes, MemoryRegion, Platform,
};

/// `KVM_CAP_DISABLE_QUIRKS2` and the only quirk modelled, `KVM_X86_QUIRK_SLOT_ZAP_ALL`.
const DISABLE_QUIRKS2: Cap = Cap(213);
const QUIRK_SLOT_ZAP_ALL: u64 = 1 << 7;

impl SoftVm {
    fn gmem_flags(&self) -> GmemFlags {
        if self.vm.private_memory() { GmemFlags::MMAP } else { GmemFlags::all() }
    }
}

impl Hypervisor for SoftVm {
    fn platform(&self) -> Platform {
        self.vm.arch().platform()
    }

    fn check_extension(&self, cap: Cap) -> u64 {
        if self.vm.check_alive().is_err() {
            return 0;
        }
        let arch = self.vm.arch();
        match cap {
            Cap::NR_MEMSLOTS => u64::from(USER_MEM_SLOTS),
            Cap::READONLY_MEM => u64::from(!arch.has_protected_state()),
            Cap::MULTI_ADDRESS_SPACE => u64::from(self.vm.address_spaces()),
            Cap::DIRTY_LOG_RING | Cap::DIRTY_LOG_RING_ACQ_REL => dirty_ring::MAX_BYTES,
            Cap::DIRTY_LOG_RING_WITH_BITMAP => u64::from(arch.offers_ring_with_bitmap()),
            Cap::MANUAL_DIRTY_LOG_PROTECT2 => MANUAL_PROTECT | INITIALLY_SET,
            Cap::EXIT_HYPERCALL => MAP_GPA_RANGE_BIT,
            Cap::EXIT_ON_EMULATION_FAILURE
            | Cap::USER_MEMORY2
            | Cap::MEMORY_FAULT_INFO
            | Cap::GUEST_MEMFD
            | Cap::PRE_FAULT_MEMORY => 1,
            Cap::MEMORY_ATTRIBUTES if self.vm.private_memory() => MEMORY_ATTRIBUTE_PRIVATE,
            Cap::VM_TYPES => {
                let own = u32::try_from(arch.platform().vm_type.0).ok().and_then(|bit| 1_u64.checked_shl(bit));
                0b11 | own.unwrap_or(0)
            }
            Cap::GUEST_MEMFD_FLAGS => self.gmem_flags().bits(),
            DISABLE_QUIRKS2 => QUIRK_SLOT_ZAP_ALL,
            // USER_MEMORY, SYNC_MMU, ENABLE_CAP_VM, CHECK_EXTENSION_VM, IMMEDIATE_EXIT.
            Cap(3 | 16 | 98 | 105 | 136) => 1,
            _ => 0,
        }
    }

    fn enable_cap(&self, cap: Cap, args: [u64; 4]) -> Result<(), Errno> {
        self.vm.check_alive()?;
        let [value, ..] = args;
        match cap {
            Cap::EXIT_HYPERCALL if value & !MAP_GPA_RANGE_BIT == 0 => {
                self.vm.exit_hypercall.store(value, Ordering::Release);
            }
            Cap::EXIT_ON_EMULATION_FAILURE if value <= 1 => {
                self.vm.exit_on_emulation_failure.store(value == 1, Ordering::Release);
            }
            Cap::DIRTY_LOG_RING | Cap::DIRTY_LOG_RING_ACQ_REL => self.vm.rings.enable(value)?,
            Cap::DIRTY_LOG_RING_WITH_BITMAP if self.vm.arch().offers_ring_with_bitmap() => {
                let _slots_lock = self.vm.lock_slots();
                self.vm.rings.back(self.vm.slots().iter().next().is_none())?;
            }
            Cap::MANUAL_DIRTY_LOG_PROTECT2 => self.vm.set_manual_protect(value)?,
            DISABLE_QUIRKS2 if value & !QUIRK_SLOT_ZAP_ALL == 0 => {
                self.vm.slot_zap_all_disabled.fetch_or(value != 0, Ordering::AcqRel);
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<GuestMemfd, Errno> {
        self.vm.count(Call::CreateGuestMemfd);
        self.vm.check_alive()?;
        let flags = GmemFlags::from_bits(flags).filter(|flags| self.gmem_flags().contains(*flags));
        let flags = flags.ok_or(Errno::EINVAL)?;
        if size == 0 || i64::try_from(size).is_err() || size & (PAGE_SIZE - 1) != 0 {
            return Err(Errno::EINVAL);
        }
        let file = Arc::new(GmemFile::create(size, flags)?);
        self.vm.remember_file(&file);
        let ops = Box::new(SoftGmem::new(Arc::clone(&self.vm), file));
        GuestMemfd::new(size, flags, ops).map_err(|_| Errno::EINVAL)
    }

    unsafe fn set_user_memory_region2(&self, region: &MemoryRegion) -> Result<(), Errno> {
        self.vm.count(Call::SetMemoryRegion);
        self.vm.check_alive()?;
        self.vm.set_region(region)
    }

    fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno> {
        self.vm.count(Call::SetMemoryAttributes);
        self.vm.check_alive()?;
        self.vm.set_attributes(attributes)
    }

    fn get_dirty_log(&self, slot: u32, log: &mut DirtyLog) -> Result<(), Errno> {
        self.vm.count(Call::GetDirtyLog);
        self.vm.check_alive()?;
        self.vm.get_dirty_log(slot, log)
    }

    fn clear_dirty_log(&self, clear: &ClearDirtyLog<'_>) -> Result<(), Errno> {
        self.vm.count(Call::ClearDirtyLog);
        self.vm.check_alive()?;
        self.vm.clear_dirty_log(clear)
    }

    fn reset_dirty_rings(&self) -> Result<u64, Errno> {
        self.vm.count(Call::ResetDirtyRings);
        self.vm.check_alive()?;
        self.vm.reset_dirty_rings()
    }
}
