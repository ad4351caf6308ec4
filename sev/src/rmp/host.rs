//! What Linux does with the table for pages of guest_memfd.

use cvm_memory::addr::Gfn;

use super::{Failure, PAGES_PER_2M, Pfn, Rmp, RmpUpdate, Size};

/// Why a page could not be made private.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MakePrivateError {
    /// A large folio was to be assigned where the kernel has none (`EIO`).
    #[error("more than one page")]
    NotOnePage,
    /// The instruction failed (`EINVAL`).
    #[error("rmpupdate failed")]
    Rmpupdate(#[source] Failure),
}

/// What was done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostCounters {
    /// RMPUPDATE.
    pub rmpupdate: u64,
    /// PSMASH.
    pub psmash: u64,
    /// Bytes whose cache lines were flushed, after pages were taken back.
    pub flushed_bytes: u64,
    /// Instructions that failed. Linux's policy provokes none.
    pub failed: u64,
}

/// A host: the table, and how Linux uses it.
#[derive(Debug, Clone, Default)]
pub struct Host {
    rmp: Rmp,
    large: bool,
    counters: HostCounters,
}

impl Host {
    /// Linux 7.3: entries of 4 KiB only.
    pub const fn new() -> Self {
        Self {
            rmp: Rmp::new(),
            large: false,
            counters: HostCounters { rmpupdate: 0, psmash: 0, flushed_bytes: 0, failed: 0 },
        }
    }

    /// A kernel whose guest_memfd has large folios: whole 2 MiB are assigned at once.
    pub fn with_large_entries() -> Self {
        Self { large: true, ..Self::new() }
    }

    /// The table.
    pub const fn rmp(&self) -> &Rmp {
        &self.rmp
    }

    /// The table, for the guest's and the firmware's instructions.
    pub const fn rmp_mut(&mut self) -> &mut Rmp {
        &mut self.rmp
    }

    /// What was done so far.
    pub const fn counters(&self) -> HostCounters {
        self.counters
    }

    fn update(&mut self, pfn: Pfn, update: &RmpUpdate) -> Result<(), Failure> {
        self.counters.rmpupdate = self.counters.rmpupdate.saturating_add(1);
        let result = self.rmp.update(pfn, update);
        if result.is_err() {
            self.counters.failed = self.counters.failed.saturating_add(1);
        }
        result
    }

    /// `rmp_make_private()`: for the launch, immutable.
    ///
    /// # Errors
    /// What RMPUPDATE gives.
    pub fn assign(&mut self, pfn: Pfn, gfn: Gfn, asid: u32, immutable: bool) -> Result<(), Failure> {
        self.update(pfn, &RmpUpdate { assigned: true, gfn, asid, size: Size::Small, immutable })
    }

    /// `sev_gmem_make_private()`: the page is used as private at `gfn`. An entry that is there stays as it is, whosever it is
    /// and wherever it was assigned to. `pages` is the folio's size.
    ///
    /// # Errors
    /// [`MakePrivateError`].
    pub fn make_private(&mut self, pfn: Pfn, gfn: Gfn, asid: u32, pages: u64) -> Result<(), MakePrivateError> {
        if pages != 1 && !self.large {
            return Err(MakePrivateError::NotOnePage);
        }
        if self.rmp.lookup(pfn).0.is_some() {
            return Ok(());
        }
        let head = pfn.head();
        let all_free = (0..PAGES_PER_2M).all(|nr| self.rmp.lookup(head.add(nr)).0.is_none());
        let (pfn, gfn, size) = if pages >= PAGES_PER_2M && all_free {
            (head, Gfn::new(gfn.get() & !(PAGES_PER_2M - 1)).unwrap_or(gfn), Size::Large)
        } else {
            (pfn, gfn, Size::Small)
        };
        let update = RmpUpdate { assigned: true, gfn, asid, size, immutable: false };
        self.update(pfn, &update).map_err(MakePrivateError::Rmpupdate)
    }

    /// `snp_rmptable_psmash()`: the entry of 2 MiB that covers the page is split.
    pub fn smash(&mut self, pfn: Pfn) {
        self.counters.psmash = self.counters.psmash.saturating_add(1);
        if self.rmp.smash(pfn.head()).is_err() {
            self.counters.failed = self.counters.failed.saturating_add(1);
        }
    }

    /// `sev_gmem_invalidate()`: `pages` pages leave the file and become the host's. An entry of 2 MiB of which some stays is
    /// smashed first.
    pub fn reclaim(&mut self, start: Pfn, pages: u64) {
        let end = start.add(pages);
        let mut pfn = start;
        while pfn < end {
            let (entry, size) = self.rmp.lookup(pfn);
            let whole = size == Size::Large && pfn.is_head() && end >= pfn.add(PAGES_PER_2M);
            let step = if entry.is_none() {
                Size::Small
            } else {
                let unit = if whole { Size::Large } else { Size::Small };
                if size == Size::Large && !whole {
                    self.smash(pfn);
                }
                // A failure is only reported by Linux: the page is leaked.
                if self.update(pfn, &RmpUpdate::unassign(unit)).is_ok() {
                    let bytes = unit.pages().saturating_mul(cvm_memory::addr::PAGE_SIZE);
                    self.counters.flushed_bytes = self.counters.flushed_bytes.saturating_add(bytes);
                }
                unit
            };
            pfn = pfn.add(step.pages());
        }
    }
}
