//! Creating, deleting, moving and re-flagging memslots: every check in KVM's order, and the two swaps of a slot that goes.
//!
//! Mirrors `kvm_set_memory_region()`, `kvm_set_memslot()`, `kvm_invalidate_memslot()` (`virt/kvm/kvm_main.c`),
//! `kvm_arch_prepare_memory_region()`, `kvm_arch_flush_shadow_memslot()` (`arch/x86/kvm/x86.c`) and `kvm_gmem_bind()`.
//!
//! The dirty log belongs to the slot: a move carries it along, and it goes with the slot or the flag.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::attributes::{Flavour, Mixed};
use super::file::GmemFile;
use super::memslots::{Slot, SlotFile};
use super::sync::write;
use super::vm::{Event, Vm};
use crate::addr::{FilePage, FileRange, Gfn, GfnRange, PAGE_SIZE};
use crate::gmem::GmemFlags;
use crate::hypervisor::{MemoryRegion, VmType};
use crate::layout::{BindError, SlotFlags, SlotId};
use crate::sync::blocking::Mutex;

/// `KVM_USER_MEM_SLOTS`: the slots of an address space that userspace may name.
pub(super) const USER_MEM_SLOTS: u16 = 32764;
/// `KVM_MEM_MAX_NR_PAGES`.
const MAX_NR_PAGES: u64 = (1 << 31) - 1;
/// `TASK_SIZE_MAX` of x86-64 with four-level page tables: the end of a process's addresses.
const TASK_SIZE_MAX: u64 = (1 << 47) - PAGE_SIZE;

/// What a region asks for, in KVM's classes.
enum Change {
    Create,
    Delete(Arc<Slot>),
    Move(Arc<Slot>),
    FlagsOnly(Arc<Slot>),
    Nothing,
}

impl Vm {
    /// `kvm_set_memory_region()`.
    pub(super) fn set_region(&self, region: &MemoryRegion) -> Result<(), Errno> {
        let id = SlotId::from_raw(region.slot);
        if id.id >= USER_MEM_SLOTS {
            return Err(Errno::EINVAL);
        }
        let _slots_lock = self.lock_slots();
        let flags = self.check_flags(region.flags)?;
        let gfns = check_addresses(region, flags)?;
        if id.as_id >= self.address_spaces() {
            return Err(Errno::EINVAL);
        }
        match self.classify(id, gfns, flags, region)? {
            Change::Nothing => Ok(()),
            Change::Delete(old) => {
                self.delete(&old);
                Ok(())
            }
            Change::Move(old) => {
                self.check_overlap(id, gfns)?;
                self.move_slot(&old, gfns, flags)
            }
            Change::FlagsOnly(old) => {
                let new = Arc::new(self.successor(&old, gfns, flags, None));
                self.publish(Some(&old), Some(&new));
                self.start_logging(&new);
                Ok(())
            }
            Change::Create => {
                self.check_overlap(id, gfns)?;
                self.create(id, gfns, flags, region)
            }
        }
    }

    /// `check_memory_region_flags()`.
    fn check_flags(&self, flags: u32) -> Result<SlotFlags, Errno> {
        let flags = SlotFlags::from_bits(flags).ok_or(Errno::EINVAL)?;
        let mut legal = SlotFlags::GUEST_MEMFD;
        if !flags.contains(SlotFlags::GUEST_MEMFD) {
            legal |= SlotFlags::LOG_DIRTY;
            if !self.arch().has_protected_state() {
                legal |= SlotFlags::READONLY;
            }
        }
        if legal.contains(flags) { Ok(flags) } else { Err(Errno::EINVAL) }
    }

    fn classify(&self, id: SlotId, gfns: GfnRange, flags: SlotFlags, region: &MemoryRegion) -> Result<Change, Errno> {
        let old = self.slots().get(id).cloned();
        let Some(old) = old else {
            return if gfns.is_empty() { Err(Errno::EINVAL) } else { Ok(Change::Create) };
        };
        if gfns.is_empty() {
            return Ok(Change::Delete(old));
        }
        let fixed = SlotFlags::READONLY | SlotFlags::GUEST_MEMFD;
        if flags.contains(SlotFlags::GUEST_MEMFD)
            || region.userspace_addr != old.userspace_addr
            || gfns.pages() != old.gfns.pages()
            || (flags ^ old.flags).intersects(fixed)
        {
            return Err(Errno::EINVAL);
        }
        if gfns.start() != old.gfns.start() {
            return Ok(Change::Move(old));
        }
        Ok(if flags == old.flags { Change::Nothing } else { Change::FlagsOnly(old) })
    }

    /// Slots of the same address space, other than `id` itself. Those that are INVALID count.
    fn check_overlap(&self, id: SlotId, gfns: GfnRange) -> Result<(), Errno> {
        let taken = self.slots().within(id.as_id, gfns).any(|slot| slot.id != id);
        if taken { Err(Errno::EEXIST) } else { Ok(()) }
    }

    fn create(&self, id: SlotId, gfns: GfnRange, flags: SlotFlags, region: &MemoryRegion) -> Result<(), Errno> {
        let bound = if flags.contains(SlotFlags::GUEST_MEMFD) { Some(self.file_range(region)?) } else { None };
        self.prepare(gfns)?;
        if let Some((file, pages)) = &bound {
            let _exclusive = write(&file.invalidate_lock);
            if file.is_closing() {
                return Err(Errno::EBADF);
            }
            write(&file.bindings).bind(id, *pages, gfns.start()).map_err(|error| match error {
                BindError::Overlap { .. } => Errno::EEXIST,
                _ => Errno::EINVAL,
            })?;
        }
        let slot = Slot {
            id,
            gfns,
            flags,
            userspace_addr: region.userspace_addr,
            file: bound.map(|(file, pages)| SlotFile::new(&file, pages, file.flags().contains(GmemFlags::MMAP))),
            mixed: Mutex::new(Mixed::of_slot(gfns, &self.attributes())),
            dirty: self.log_for(gfns, flags, None),
            invalid: false,
        };
        self.publish(None, Some(&Arc::new(slot)));
        Ok(())
    }

    /// The lookup of `kvm_gmem_prepare_memory_region()`: descriptor, then offset and size against the file.
    fn file_range(&self, region: &MemoryRegion) -> Result<(Arc<GmemFile>, FileRange), Errno> {
        let file = self.file_by_fd(region.guest_memfd)?;
        let pages: FileRange =
            FileRange::from_bytes(region.guest_memfd_offset, region.memory_size).map_err(|_| Errno::EINVAL)?;
        if pages.end() > FilePage::containing(file.size()) {
            return Err(Errno::EINVAL);
        }
        Ok((file, pages))
    }

    /// `kvm_arch_prepare_memory_region()`.
    fn prepare(&self, gfns: GfnRange) -> Result<(), Errno> {
        // `kvm_mmu_max_gfn()`, and what the platform needs bits of the address for.
        let end = 1_u64.checked_shl(self.physical_bits.load(Ordering::Relaxed)).map_or(Gfn::MAX, Gfn::containing);
        let end = end.min(self.arch().max_gfn().checked_add(1).unwrap_or(Gfn::MAX));
        if gfns.end() > end {
            return Err(Errno::EINVAL);
        }
        self.arch().prepare_slot(gfns)
    }

    fn delete(&self, old: &Arc<Slot>) {
        let invalid = self.invalidate_slot(old);
        self.publish(Some(&invalid), None);
        if let Some(held) = &old.file {
            self.arch().invalidate_range(old.gfns);
            if let Some(file) = held.get_closing() {
                let _exclusive = write(&file.invalidate_lock);
                write(&file.bindings).unbind(old.id);
            }
        }
    }

    fn move_slot(&self, old: &Arc<Slot>, gfns: GfnRange, flags: SlotFlags) -> Result<(), Errno> {
        let invalid = self.invalidate_slot(old);
        if let Err(errno) = self.prepare(gfns) {
            self.publish(Some(&invalid), Some(old));
            return Err(errno);
        }
        let mixed = Mixed::of_slot(gfns, &self.attributes());
        self.publish(Some(&invalid), Some(&Arc::new(self.successor(old, gfns, flags, Some(mixed)))));
        Ok(())
    }

    /// The first swap of a slot that goes: it turns INVALID, every vCPU notices, its mappings are zapped.
    fn invalidate_slot(&self, old: &Arc<Slot>) -> Arc<Slot> {
        let invalid = Arc::new(old.invalidated());
        self.publish(Some(old), Some(&invalid));
        self.tell(Event::SlotInvalid(old.id));
        let plain = self.arch().platform().vm_type == VmType::DEFAULT;
        let mut mmu = self.mmu_mut();
        if plain && !self.slot_zap_all_disabled.load(Ordering::Relaxed) {
            mmu.zap_all(self.arch());
        } else {
            self.zap_slot(&mut mmu, old.id, old.gfns, Flavour::Both);
        }
        invalid
    }

    /// One swap, and the grace period after which nobody holds what was swapped out.
    fn publish(&self, old: Option<&Slot>, new: Option<&Arc<Slot>>) {
        let as_id = self.slots_mut().swap(old, new);
        self.srcu.synchronize();
        if let Some(as_id) = as_id {
            self.slots_mut().swapped(as_id, u64::from(self.address_spaces()));
        }
    }

    /// The slot that follows `old` after a move or a change of flags. Slots with a file are never changed.
    fn successor(&self, old: &Slot, gfns: GfnRange, flags: SlotFlags, mixed: Option<Mixed>) -> Slot {
        let mut slot = old.invalidated();
        slot.invalid = false;
        slot.gfns = gfns;
        slot.flags = flags;
        slot.dirty = self.log_for(gfns, flags, Some(old));
        if let Some(mixed) = mixed {
            slot.mixed = Mutex::new(mixed);
        }
        slot
    }
}

/// Alignment, address limits, sums and length.
fn check_addresses(region: &MemoryRegion, flags: SlotFlags) -> Result<GfnRange, Errno> {
    let unaligned = |bytes: u64| bytes & (PAGE_SIZE - 1) != 0;
    let MemoryRegion { guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset, .. } = *region;
    if unaligned(memory_size) || unaligned(guest_phys_addr) || unaligned(userspace_addr) {
        return Err(Errno::EINVAL);
    }
    if userspace_addr.checked_add(memory_size).is_none_or(|end| end > TASK_SIZE_MAX) {
        return Err(Errno::EINVAL);
    }
    if flags.contains(SlotFlags::GUEST_MEMFD)
        && (unaligned(guest_memfd_offset) || guest_memfd_offset.checked_add(memory_size).is_none())
    {
        return Err(Errno::EINVAL);
    }
    let pages = memory_size / PAGE_SIZE;
    if pages > MAX_NR_PAGES {
        return Err(Errno::EINVAL);
    }
    GfnRange::with_len(Gfn::containing(guest_phys_addr), pages).map_err(|_| Errno::EINVAL)
}
