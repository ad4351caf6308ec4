//! Userspace's end of the dirty rings: from entries to runs of pages that may be copied.
//!
//! The order is what matters, and the types keep it. [`DirtyRings::harvest`] reads every ring from where it stopped up to the
//! first entry that is not dirty; there is no way to start elsewhere. What it read can be had only through [`Harvest::reset`],
//! which has KVM take the entries back first: until then a vCPU may go on writing to those pages unnoticed, so a copy made
//! earlier would miss it. A harvest that is dropped, or whose reset fails, is in the next one; nothing is lost.
//!
//! An entry names its slot by id, and ids are used again. So each entry is given to the slot's *owner* at the moment when it is
//! harvested, a number that is never used twice: see [`Owners`]. It does not know what an owner is.
//!
//! Mirrors the userspace part of "KVM_CAP_DIRTY_LOG_RING" (`Documentation/virt/kvm/api.rst`).

mod gather;

use std::fmt;

use nix::errno::Errno;

use crate::hypervisor::{DirtyGfn, DirtyRingMemory, Hypervisor};
use crate::layout::SlotId;

pub use gather::{Harvested, OwnerRun};
use gather::{Strays, gather};

/// Resets in a row that may come back with nothing before they are given up: a signal can cut one short.
const PATIENCE: u32 = 64;

/// Who a slot id stands for now.
pub trait Owners {
    /// The number of the slot's present owner, and how many pages it has; `None` for an id that stands for nothing.
    fn owner(&self, slot: SlotId) -> Option<(u64, u64)>;
}

/// An entry of a ring that names no page there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a dirty ring has an entry for page {page:#x} of slot {slot}, which has none such")]
pub struct Stray {
    /// The slot it names.
    pub slot: SlotId,
    /// The page of the slot.
    pub page: u64,
}

/// Why harvested pages may not be copied yet. They are kept, for the next harvest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResetError {
    /// The system call failed.
    #[error("reset the dirty rings")]
    Call(#[source] Errno),
    /// KVM has taken back fewer entries than were harvested, and takes back no more.
    #[error("kvm has taken back {reset} dirty ring entries of {harvested}")]
    Short {
        /// Entries that were harvested.
        harvested: u64,
        /// Entries that were taken back.
        reset: u64,
    },
    /// KVM has taken back more entries than were harvested: somebody else harvests too, and has pages that we have not.
    #[error("kvm has taken back {reset} dirty ring entries, but only {harvested} were harvested here")]
    Foreign {
        /// Entries that were harvested.
        harvested: u64,
        /// Entries that were taken back.
        reset: u64,
    },
}

/// What goes on in the rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingStats {
    /// Entries harvested so far.
    pub entries: u64,
    /// Resets so far, calls that were cut short included.
    pub resets: u64,
    /// Harvests that found a ring full to the last entry.
    pub overruns: u64,
    /// Entries that named no page there is.
    pub strays: u64,
    /// Times that a vCPU stood still because its ring was full.
    pub fulls: u64,
    /// The most entries that a ring was found to hold at once.
    pub fullest: u32,
    /// Of how many.
    pub size: u32,
}

/// The entries of a ring, as this end of it sees them.
pub(super) trait Entry {
    fn flags(&self) -> u32;
    fn page(&self) -> (u32, u64);
    fn set_harvested(&self);
}

impl Entry for DirtyGfn {
    #[inline]
    fn flags(&self) -> u32 {
        Self::flags(self)
    }

    #[inline]
    fn page(&self) -> (u32, u64) {
        Self::page(self)
    }

    #[inline]
    fn set_harvested(&self) {
        Self::set_harvested(self);
    }
}

struct Ring {
    memory: Box<dyn DirtyRingMemory>,
    fetch: u32,
}

/// The rings of all vCPUs of a VM. What is read from them can be had after a reset only.
#[derive(Default)]
pub struct DirtyRings {
    rings: Vec<Ring>,
    /// Entries that were harvested and not taken back yet.
    outstanding: u64,
    /// Their pages.
    pending: Harvested,
    strays: Strays,
    stats: RingStats,
    /// Entries in the ring that had the most, the last time.
    latest: u32,
}

impl DirtyRings {
    /// No rings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the ring of a vCPU that has not run yet.
    pub fn add(&mut self, memory: Box<dyn DirtyRingMemory>) {
        self.stats.size = u32::try_from(memory.entries().len()).unwrap_or(u32::MAX);
        self.rings.push(Ring { memory, fetch: 0 });
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.rings.len()
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.rings.is_empty()
    }

    /// What went on so far.
    pub const fn stats(&self) -> RingStats {
        self.stats
    }

    /// A vCPU came back because its ring is full.
    pub(super) const fn note_full(&mut self) {
        self.stats.fulls = self.stats.fulls.saturating_add(1);
    }

    /// Entries in the ring that had the most, the last time.
    pub(super) const fn latest(&self) -> u32 {
        self.latest
    }

    /// An entry that named no page there is, if there was one since this was asked last.
    pub const fn take_stray(&mut self) -> Option<Stray> {
        self.strays.first.take()
    }

    /// Takes the memory of what came out of the rings for what comes next. Without that, every harvest has to ask for its own.
    pub fn recycle(&mut self, harvested: Harvested) {
        let mut harvested = harvested;
        if self.pending.is_empty() && self.pending.capacity() < harvested.capacity() {
            harvested.clear();
            harvested.overrun = self.pending.overrun;
            self.pending = harvested;
        }
    }

    /// Reads what is in all rings. Together with whatever was read before and not reset.
    pub fn harvest(&mut self, owners: &impl Owners) -> Harvest<'_> {
        let Self { rings, outstanding, pending, strays, stats, latest } = self;
        *latest = 0;
        for ring in rings {
            let entries = ring.memory.entries();
            let count = gather(entries, &mut ring.fetch, owners, pending, strays);
            if usize::try_from(count).is_ok_and(|count| count == entries.len()) {
                pending.overrun = true;
                stats.overruns = stats.overruns.saturating_add(1);
            }
            *outstanding = outstanding.saturating_add(u64::from(count));
            stats.entries = stats.entries.saturating_add(u64::from(count));
            *latest = count.max(*latest);
            stats.fullest = stats.fullest.max(count);
        }
        stats.strays = strays.count;
        Harvest { rings: self }
    }

    fn reset(&mut self, vm: &dyn Hypervisor) -> Result<Harvested, ResetError> {
        let harvested = self.outstanding;
        let mut in_vain = 0_u32;
        while self.outstanding > 0 {
            self.stats.resets = self.stats.resets.saturating_add(1);
            let reset = vm.reset_dirty_rings().map_err(ResetError::Call)?;
            let Some(left) = self.outstanding.checked_sub(reset) else {
                let reset = harvested.saturating_sub(self.outstanding).saturating_add(reset);
                self.outstanding = 0;
                return Err(ResetError::Foreign { harvested, reset });
            };
            self.outstanding = left;
            in_vain = if reset == 0 { in_vain.saturating_add(1) } else { 0 };
            if in_vain >= PATIENCE {
                return Err(ResetError::Short { harvested, reset: harvested.saturating_sub(left) });
            }
        }
        Ok(std::mem::take(&mut self.pending))
    }
}

impl fmt::Debug for DirtyRings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rings, outstanding, stats, .. } = self;
        f.debug_struct("DirtyRings")
            .field("rings", &rings.len())
            .field("outstanding", outstanding)
            .field("stats", stats)
            .finish_non_exhaustive()
    }
}

/// Pages that were read from the rings and may not be copied yet.
///
/// ```compile_fail
/// # use cvm_memory::dirty::Harvest;
/// # fn f(harvest: Harvest<'_>) {
/// for run in harvest.pages() {} // There is no such thing: they come out of a reset.
/// # }
/// ```
#[must_use = "the pages are to be had by `reset` only"]
#[derive(Debug)]
pub struct Harvest<'a> {
    rings: &'a mut DirtyRings,
}

impl Harvest<'_> {
    /// How many entries are to be taken back.
    pub const fn entries(&self) -> u64 {
        self.rings.outstanding
    }

    /// Has KVM take the entries back and protect their pages again. Then, whatever is written to them will be in a ring again,
    /// and they may be copied.
    ///
    /// # Errors
    /// [`ResetError`]; the pages are kept for the next harvest.
    pub fn reset(self, vm: &dyn Hypervisor) -> Result<Harvested, ResetError> {
        self.rings.reset(vm)
    }
}

#[cfg(all(test, loom))]
mod models;
#[cfg(all(test, not(loom)))]
mod tests;
