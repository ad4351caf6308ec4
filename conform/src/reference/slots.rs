//! Memslots: section 2 of the contract, and 3.3 for what is bound.

use nix::errno::Errno;

use super::{PAGE, Reference};
use crate::scenario::{Area, Descriptor, Hva};

const LOG_DIRTY: u32 = 1;
pub(super) const READONLY: u32 = 2;
pub(super) const GUEST_MEMFD: u32 = 4;

/// A slot's name: its address space, and its id in there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SlotKey {
    pub(super) space: u16,
    pub(super) id: u16,
}

impl SlotKey {
    /// From how the ioctl has it.
    pub(super) const fn of(slot: u32) -> Self {
        let [a, b, c, d] = slot.to_le_bytes();
        Self { space: u16::from_le_bytes([c, d]), id: u16::from_le_bytes([a, b]) }
    }
}

/// A memslot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub(super) first_gfn: u64,
    pub(super) pages: u64,
    pub(super) flags: u32,
    /// `userspace_addr`.
    pub(super) hva: (Area, u64),
    /// Its file and the first page there; `None` without one, and once it is closed.
    pub(super) file: Option<(usize, u64)>,
    /// 2.5: all faults of guests are served by the file.
    pub(super) gmem_only: bool,
}

impl Slot {
    pub(super) const fn contains(&self, gfn: u64) -> bool {
        self.first_gfn <= gfn && gfn < self.first_gfn + self.pages
    }
}

/// Whether `[a, a + a_len)` and `[b, b + b_len)` have something in common. Those that touch do not.
const fn overlap(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    a < b + b_len && b < a + a_len
}

impl Reference {
    /// The slot of a gfn. Guests that are in no system management mode live in address space 0.
    pub(super) fn slot_of(&self, gfn: u64) -> Option<Slot> {
        self.slots.iter().find(|(key, slot)| key.space == 0 && slot.contains(gfn)).map(|(_, slot)| *slot)
    }

    /// `KVM_SET_USER_MEMORY_REGION2`; the numbers are those of 2.1.
    #[allow(clippy::too_many_arguments, reason = "the fields of the ioctl's struct")]
    pub(super) fn region(
        &mut self,
        slot: u32,
        flags: u32,
        gpa: u64,
        size: u64,
        hva: Hva,
        file: Descriptor,
        offset: u64,
    ) -> Result<(), Errno> {
        let key = SlotKey::of(slot);
        // 3. Slots above are the kernel's own.
        if key.id >= 32764 {
            return Err(Errno::EINVAL);
        }
        // 5. Flags.
        let mut legal = GUEST_MEMFD;
        if flags & GUEST_MEMFD == 0 {
            legal |= LOG_DIRTY;
            if !self.has_protected_state() {
                legal |= READONLY;
            }
        }
        if flags & !legal != 0 {
            return Err(Errno::EINVAL);
        }
        // 6. Alignment, and an address that a process can have.
        if !size.is_multiple_of(PAGE) || !gpa.is_multiple_of(PAGE) {
            return Err(Errno::EINVAL);
        }
        let hva = match hva {
            Hva::In(area, into) if into.is_multiple_of(PAGE) => (area, into),
            Hva::In(..) => return Err(Errno::EINVAL),
            Hva::Raw(_) => return Err(Errno::EINVAL), // scenarios have only those that no process can have
        };
        // 7. Where it is in its file.
        if flags & GUEST_MEMFD != 0 && (!offset.is_multiple_of(PAGE) || offset.checked_add(size).is_none()) {
            return Err(Errno::EINVAL);
        }
        // 8. Address spaces: VMs with private memory have one, others have one more for system management mode.
        let spaces = if self.has_private_memory() { 1 } else { 2 };
        if key.space >= spaces {
            return Err(Errno::EINVAL);
        }
        if gpa.checked_add(size).is_none() {
            return Err(Errno::EINVAL);
        }
        // 9. Its size.
        let (first_gfn, pages) = (gpa / PAGE, size / PAGE);
        if pages > (1 << 31) - 1 {
            return Err(Errno::EINVAL);
        }
        // 10. What is to be done: the table of 2.2, row by row.
        let old = self.slots.get(&key).copied();
        let Some(old) = old else {
            if size == 0 {
                return Err(Errno::EINVAL);
            }
            let new = Slot { first_gfn, pages, flags, hva, file: None, gmem_only: false };
            return self.create_slot(key, new, file, offset);
        };
        if size == 0 {
            // DELETE. What was bound is no longer, as the slot is what says so.
            self.slots.remove(&key);
            self.changed(key);
            return Ok(());
        }
        if flags & GUEST_MEMFD != 0 {
            return Err(Errno::EINVAL);
        }
        if hva != old.hva || pages != old.pages || (flags ^ old.flags) & (READONLY | GUEST_MEMFD) != 0 {
            return Err(Errno::EINVAL);
        }
        let new = Slot { first_gfn, flags, ..old };
        if first_gfn != old.first_gfn {
            // MOVE: 11, 14.
            self.refuse_overlap(key, &new)?;
            // "The old slot has already been zapped by then, and is restored."
            self.changed(key);
            self.refuse_beyond_reach(&new)?;
        } else if new.flags != old.flags {
            self.changed(key);
        }
        // MOVE, FLAGS_ONLY, or nothing at all.
        self.slots.insert(key, new);
        Ok(())
    }

    fn create_slot(&mut self, key: SlotKey, mut new: Slot, file: Descriptor, offset: u64) -> Result<(), Errno> {
        // 11.
        self.refuse_overlap(key, &new)?;
        // 13. The file.
        if new.flags & GUEST_MEMFD != 0 {
            let inode = match file {
                Descriptor::File(name) => *self.open.get(&name).ok_or(Errno::EBADF)?,
                Descriptor::None => return Err(Errno::EBADF),
                Descriptor::Memfd | Descriptor::Foreign => return Err(Errno::EINVAL),
            };
            // (That offset and size do not wrap was 7.)
            if offset + new.pages * PAGE > self.inodes[inode].size {
                return Err(Errno::EINVAL);
            }
            new.file = Some((inode, offset / PAGE));
            new.gmem_only = self.inodes[inode].can_be_mapped();
        }
        // 14.
        self.refuse_beyond_reach(&new)?;
        // 15. Pages of a file are bound once.
        for slot in self.slots.values() {
            if let (Some((old_file, old_page)), Some((new_file, new_page))) = (slot.file, new.file)
                && old_file == new_file
                && overlap(old_page, slot.pages, new_page, new.pages)
            {
                return Err(Errno::EEXIST);
            }
        }
        self.slots.insert(key, new);
        self.changed(key);
        Ok(())
    }

    /// 2.4: every change of an address space's slots makes it another generation. Guests live in the first.
    const fn changed(&mut self, key: SlotKey) {
        if key.space == 0 {
            self.generation += 1;
        }
    }

    /// 9.1: which error a dirty log is refused with. What is in it depends on what is mapped, and is not known here.
    pub(super) fn dirty_log(&self, slot: u32) -> Result<Slot, Errno> {
        let key = SlotKey::of(slot);
        let spaces = if self.has_private_memory() { 1 } else { 2 };
        if key.space >= spaces || key.id >= 32764 {
            return Err(Errno::EINVAL);
        }
        self.slots.get(&key).copied().filter(|slot| slot.flags & LOG_DIRTY != 0).ok_or(Errno::ENOENT)
    }

    /// 9.1: `KVM_CLEAR_DIRTY_LOG`.
    pub(super) fn clear_dirty(&self, slot: u32, first: u64, pages: u32) -> Result<(), Errno> {
        let key_is_good = !matches!(self.dirty_log(slot), Err(Errno::EINVAL));
        if !key_is_good || !first.is_multiple_of(64) {
            return Err(Errno::EINVAL);
        }
        let slot = self.dirty_log(slot)?;
        let pages = u64::from(pages);
        if first > slot.pages
            || pages > slot.pages - first
            || (!pages.is_multiple_of(64) && pages != slot.pages - first)
        {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// 11: no gfn may have two slots of one address space.
    fn refuse_overlap(&self, key: SlotKey, new: &Slot) -> Result<(), Errno> {
        for (other, slot) in &self.slots {
            if other.space == key.space
                && other.id != key.id
                && overlap(slot.first_gfn, slot.pages, new.first_gfn, new.pages)
            {
                return Err(Errno::EEXIST);
            }
        }
        Ok(())
    }

    /// 14: nothing beyond what the processor can address.
    fn refuse_beyond_reach(&self, new: &Slot) -> Result<(), Errno> {
        let last_gfn = new.first_gfn + new.pages - 1;
        let reach = 1_u64 << (self.shape.physical_bits - 12);
        if last_gfn >= reach { Err(Errno::EINVAL) } else { Ok(()) }
    }
}
