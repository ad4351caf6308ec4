//! A run of guest frames and what lies behind it: a memslot without its id, which is KVM's business.

use crate::addr::{Gfn, GfnRange, PAGE_SHIFT};
use crate::layout::{FileBinding, Memslot, SlotFlags, SlotId};

/// Frames with contiguous memory behind them, and how KVM is to treat them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Region {
    /// The frames.
    pub gfns: GfnRange,
    /// Host virtual address of the shared memory behind the first frame, in bytes.
    pub hva: u64,
    /// Address of the mapping in which `hva` lies: two mappings are never one slot, even where one ends and the other
    /// begins.
    pub mapping: u64,
    /// Flags of the slot.
    pub flags: SlotFlags,
    /// Where its private memory begins.
    pub binding: Option<FileBinding>,
}

impl Region {
    /// What `slot` covers, with its memory in the mapping at `mapping`.
    pub const fn of(slot: &Memslot, mapping: u64) -> Self {
        Self { gfns: slot.gfns, hva: slot.hva, mapping, flags: slot.flags, binding: slot.binding }
    }

    /// As a slot.
    pub const fn slot(&self, id: SlotId) -> Memslot {
        Memslot { id, gfns: self.gfns, hva: self.hva, flags: self.flags, binding: self.binding }
    }

    /// The part of it at `gfns`; `None` unless those all belong to it.
    pub fn part(&self, gfns: GfnRange) -> Option<Self> {
        if self.gfns == gfns {
            return Some(*self);
        }
        if !self.gfns.contains_range(&gfns) {
            return None;
        }
        let skip = gfns.start().pages_from(self.gfns.start())?;
        Some(Self { gfns, ..self.shifted(skip)? })
    }

    /// The same memory at `gfn`; `None` if it would end beyond the highest address.
    pub fn moved(&self, gfn: Gfn) -> Option<Self> {
        Some(Self { gfns: GfnRange::with_len(gfn, self.gfns.pages()).ok()?, ..*self })
    }

    /// Address and file page, so many pages further on.
    fn shifted(&self, pages: u64) -> Option<Self> {
        let (hva, binding) = self.memory_at(pages)?;
        Some(Self { hva, binding, ..*self })
    }

    /// Address and file page of the page `skip` pages further on than its first one.
    fn memory_at(&self, skip: u64) -> Option<(u64, Option<FileBinding>)> {
        let binding = match self.binding {
            Some(FileBinding { file, start }) => Some(FileBinding { file, start: start.checked_add(skip)? }),
            None => None,
        };
        Some((self.hva.checked_add(skip.checked_mul(1 << PAGE_SHIFT)?)?, binding))
    }

    /// Whether its memory ends at an address and a file page that there are.
    pub(super) fn ends(&self) -> bool {
        self.memory_at(self.gfns.pages()).is_some()
    }

    /// What a region that goes on where this one ends would be, `pages` long.
    pub fn following(&self, pages: u64) -> Option<Self> {
        let gfns = GfnRange::with_len(self.gfns.end(), pages).ok()?;
        Some(Self { gfns, ..self.shifted(self.gfns.pages())? })
    }

    /// The merge rule: whether `next` goes on where this one ends, in frames, address and file page alike, with equal flags.
    pub fn continues(&self, next: &Self) -> bool {
        self.gfns.end() == next.gfns.start()
            && self.flags == next.flags
            && self.mapping == next.mapping
            && self.memory_at(self.gfns.pages()) == Some((next.hva, next.binding))
    }

    /// Whether both have the same memory, shared and private, at a frame that both have.
    pub fn same_memory(&self, other: &Self) -> bool {
        let (low, high) = if self.gfns.start() <= other.gfns.start() { (self, other) } else { (other, self) };
        let skip = high.gfns.start().pages_from(low.gfns.start());
        low.mapping == high.mapping && skip.and_then(|skip| low.memory_at(skip)) == Some((high.hva, high.binding))
    }

    /// Whether a slot can stay while the flags change: they may differ only in the dirty log.
    pub(super) fn agrees(&self, other: &Self) -> bool {
        let fixed = |flags: SlotFlags| flags.difference(SlotFlags::LOG_DIRTY);
        fixed(self.flags) == fixed(other.flags) && self.same_memory(other)
    }
}
