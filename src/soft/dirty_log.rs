//! The dirty log: which pages of a slot were written, and what makes the next write to them be noticed.
//!
//! A page counts as written when a vCPU gets a writable mapping of it, not at each write; so whatever takes a page out of the
//! log takes its mapping's permission to write, under the same `mmu_lock`. Mirrors `kvm_get_dirty_log_protect()`,
//! `kvm_clear_dirty_log_protect()` (`virt/kvm/kvm_main.c`) and `kvm_mmu_slot_apply_flags()` (`arch/x86/kvm/x86.c`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;

use super::dirty::{BITS, DirtyBits};
use super::dirty_ring::Ring;
use super::host;
use super::memslots::Slot;
use super::mmu::Mmu;
use super::region::USER_MEM_SLOTS;
use super::vm::Vm;
use crate::addr::{Gfn, GfnRange, Gpa, PAGE_SIZE};
use crate::hypervisor::{ClearDirtyLog, DirtyLog};
use crate::layout::{SlotFlags, SlotId};

/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE` and `KVM_DIRTY_LOG_INITIALLY_SET`.
pub(super) const MANUAL_PROTECT: u64 = 1;
pub(super) const INITIALLY_SET: u64 = 2;

impl Vm {
    /// The value of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: the first option, and with it the second.
    pub(super) fn set_manual_protect(&self, options: u64) -> Result<(), Errno> {
        let allowed = if options & MANUAL_PROTECT == 0 { 0 } else { MANUAL_PROTECT | INITIALLY_SET };
        if options & !allowed != 0 {
            return Err(Errno::EINVAL);
        }
        self.manual_protect.store(options, Ordering::Release);
        Ok(())
    }

    fn initially_set(&self) -> bool {
        self.manual_protect.load(Ordering::Acquire) & INITIALLY_SET != 0
    }

    /// `mark_page_dirty_in_slot()`, by the vCPU of that ring or by nobody.
    pub(super) fn mark_dirty(&self, slot: &Slot, gfn: Gfn, ring: Option<&Ring>) {
        let page = gfn.pages_from(slot.gfns.start()).filter(|_| slot.flags.contains(SlotFlags::LOG_DIRTY));
        let Some(page) = page else { return };
        let noted = match (ring, &slot.dirty) {
            (Some(ring), _) => ring.push(slot.id.raw(), page),
            (None, Some(bits)) => {
                bits.set(page);
                true
            }
            (None, None) => false,
        };
        if !noted {
            self.rings.lose();
        }
    }

    /// `kvm_vm_ioctl_reset_dirty_pages()`.
    pub(super) fn reset_dirty_rings(&self) -> Result<u64, Errno> {
        if !self.rings.enabled() {
            return Err(Errno::EINVAL);
        }
        let _slots_lock = self.lock_slots();
        let mut taken = 0_u64;
        for ring in self.rings.all() {
            while let Some((slot, page)) = ring.reset_one() {
                taken = taken.saturating_add(1);
                // Whose slot has gone meanwhile, or has become shorter, is nobody's.
                let Ok(id) = self.possible_slot(slot) else { continue };
                let Some(slot) = self.slots().get(id).cloned() else { continue };
                if page < slot.gfns.pages() {
                    self.protect_masked(&mut self.mmu_mut(), &slot, page, 1);
                }
            }
        }
        Ok(taken)
    }

    /// The log of a slot that comes into being: none, the one it has had, or a new one.
    pub(super) fn log_for(&self, gfns: GfnRange, flags: SlotFlags, old: Option<&Slot>) -> Option<Arc<DirtyBits>> {
        if !flags.contains(SlotFlags::LOG_DIRTY) || !self.rings.use_bitmap() {
            return None;
        }
        let kept = old.and_then(|old| old.dirty.clone());
        kept.or_else(|| Some(Arc::new(DirtyBits::new(gfns.pages(), self.initially_set()))))
    }

    /// `kvm_mmu_slot_apply_flags()`, once a slot's new flags are seen by everyone: from here on its writes are logged.
    pub(super) fn start_logging(&self, slot: &Slot) {
        if slot.flags.contains(SlotFlags::LOG_DIRTY) && !self.initially_set() {
            self.protect(&mut self.mmu_mut(), slot, slot.gfns);
        }
    }

    /// vCPUs run in address space 0 only, so no other has mappings.
    fn protect(&self, mmu: &mut Mmu, slot: &Slot, gfns: GfnRange) {
        if slot.id.as_id == 0 {
            mmu.protect(gfns);
        }
    }

    /// `kvm_arch_mmu_enable_log_dirty_pt_masked()`: the pages of a slot that have a bit in `mask`, from page `first`.
    fn protect_masked(&self, mmu: &mut Mmu, slot: &Slot, first: u64, mask: u64) {
        for bit in (0..BITS).filter(|bit| mask & (1 << bit) != 0) {
            let gfn =
                slot.gfns.start().get().checked_add(first).and_then(|gfn| gfn.checked_add(bit)).and_then(Gfn::new);
            if let Some(gfn) = gfn {
                self.protect(mmu, slot, GfnRange::page(gfn));
            }
        }
    }

    /// A slot that has a log; under `slots_lock`.
    fn logged_slot(&self, id: SlotId) -> Result<(Arc<Slot>, Arc<DirtyBits>), Errno> {
        let slot = self.slots().get(id).cloned().ok_or(Errno::ENOENT)?;
        let bits = slot.dirty.clone().ok_or(Errno::ENOENT)?;
        Ok((slot, bits))
    }

    /// Rings may have taken the place of the logs.
    fn has_logs(&self) -> Result<(), Errno> {
        if self.rings.use_bitmap() { Ok(()) } else { Err(Errno::ENXIO) }
    }

    /// An id that some slot could have.
    fn possible_slot(&self, slot: u32) -> Result<SlotId, Errno> {
        let id = SlotId::from_raw(slot);
        if id.as_id >= self.address_spaces() || id.id >= USER_MEM_SLOTS { Err(Errno::EINVAL) } else { Ok(id) }
    }

    /// `kvm_get_dirty_log_protect()`.
    pub(super) fn get_dirty_log(&self, slot: u32, log: &mut DirtyLog) -> Result<(), Errno> {
        self.has_logs()?;
        let _slots_lock = self.lock_slots();
        let id = self.possible_slot(slot)?;
        let (slot, bits) = self.logged_slot(id)?;
        let words: Vec<u64> = if self.manual_protect.load(Ordering::Acquire) != 0 {
            bits.words().iter().map(|word| word.load(Ordering::Acquire)).collect()
        } else {
            let mut mmu = self.mmu_mut();
            let firsts = (0_u64..).step_by(64);
            let take = |(word, first): (&AtomicU64, u64)| {
                let mask = word.swap(0, Ordering::AcqRel);
                self.protect_masked(&mut mmu, &slot, first, mask);
                mask
            };
            bits.words().iter().zip(firsts).map(take).collect()
        };
        // What does not fit is lost, as `copy_to_user()` would have it.
        for (to, from) in log.words_mut().iter_mut().zip(&words) {
            *to = *from;
        }
        if log.words().len() < words.len() { Err(Errno::EFAULT) } else { Ok(()) }
    }

    /// `kvm_clear_dirty_log_protect()`.
    pub(super) fn clear_dirty_log(&self, clear: &ClearDirtyLog<'_>) -> Result<(), Errno> {
        if !clear.is_whole() {
            return Err(Errno::EFAULT);
        }
        self.has_logs()?;
        let _slots_lock = self.lock_slots();
        let id = self.possible_slot(clear.slot)?;
        if !clear.first_page.is_multiple_of(BITS) {
            return Err(Errno::EINVAL);
        }
        let (slot, bits) = self.logged_slot(id)?;
        let pages = u64::from(clear.num_pages);
        let left = slot.gfns.pages().checked_sub(clear.first_page).ok_or(Errno::EINVAL)?;
        if pages > left || (pages < left && !pages.is_multiple_of(BITS)) {
            return Err(Errno::EINVAL);
        }
        let mut mmu = self.mmu_mut();
        let firsts = (clear.first_page..clear.first_page.saturating_add(pages)).step_by(64);
        for (first, mask) in firsts.zip(clear.bitmap) {
            let Some(word) = bits.word_of(first) else { continue };
            let cleared = word.fetch_and(!mask, Ordering::AcqRel) & mask;
            self.protect_masked(&mut mmu, &slot, first, cleared);
        }
        Ok(())
    }

    /// `kvm_write_guest()`: a write by KVM itself, page by page.
    pub(super) fn write_guest(&self, gpa: u64, mut data: &[u8]) -> Result<(), Errno> {
        let _srcu = self.srcu.enter();
        let mut at = Gpa(gpa);
        while !data.is_empty() {
            let in_page = PAGE_SIZE.saturating_sub(at.page_offset());
            let (now, rest) = data.split_at(usize::try_from(in_page).unwrap_or(usize::MAX).min(data.len()));
            let slot = self.slots().find(0, at.gfn()).cloned().ok_or(Errno::EFAULT)?;
            if slot.invalid || slot.flags.contains(SlotFlags::READONLY) {
                return Err(Errno::EFAULT);
            }
            let hva = slot.hva(at.gfn()).and_then(|hva| hva.checked_add(at.page_offset())).ok_or(Errno::EFAULT)?;
            host::write(hva, now)?;
            self.mark_dirty(&slot, at.gfn(), None);
            data = rest;
            if !data.is_empty() {
                at = at.get().checked_add(in_page).map(Gpa).ok_or(Errno::EFAULT)?;
            }
        }
        Ok(())
    }
}
