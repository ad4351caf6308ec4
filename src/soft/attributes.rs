//! Memory attributes as pure functions: who is private, what a change takes away, and where a huge page is forbidden.
//!
//! Nothing here locks or maps. [`Attributes`] is the state, [`Mixed`] the per-slot flags that forbid huge pages over unequal
//! attributes, [`Invalidation`] what one change does to one slot. Mirrors `kvm_vm_set_mem_attributes()`
//! (`virt/kvm/kvm_main.c`), `kvm_arch_pre_set_memory_attributes()` and `kvm_arch_post_set_memory_attributes()`
//! (`arch/x86/kvm/mmu/mmu.c`).

use std::collections::{BTreeMap, BTreeSet};

use crate::addr::{Gfn, GfnRange, PAGES_PER_1G, PAGES_PER_2M};

/// Which mappings a zap is meant for (`enum kvm_gfn_range_filter`). Only page tables that are separate can be told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flavour {
    /// Shared mappings only.
    Shared,
    /// Private mappings only.
    Private,
    /// Both.
    Both,
}

impl Flavour {
    /// The mappings that a change to `private` makes wrong.
    pub const fn replaced_by(private: bool) -> Self {
        if private { Self::Shared } else { Self::Private }
    }
}

/// A huge page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Level {
    /// 2 MiB.
    M2,
    /// 1 GiB.
    G1,
}

impl Level {
    /// Both, ascending.
    pub const ALL: [Self; 2] = [Self::M2, Self::G1];

    /// Base pages in a page of this size.
    pub const fn pages(self) -> u64 {
        match self {
            Self::M2 => PAGES_PER_2M,
            Self::G1 => PAGES_PER_1G,
        }
    }

    /// The block of this size that holds `gfn`; `None` where it would be cut by the top of the address space.
    pub fn block(self, gfn: Gfn) -> Option<GfnRange> {
        let block = GfnRange::page(gfn).align_out(self.pages());
        (block.pages() == self.pages()).then_some(block)
    }
}

/// Which frames are private: disjoint runs, start to end. What is in no run is shared.
#[derive(Debug, Clone, Default)]
pub struct Attributes {
    private: BTreeMap<Gfn, Gfn>,
}

impl Attributes {
    /// Whether `gfn` is private.
    pub fn is_private(&self, gfn: Gfn) -> bool {
        self.private.range(..=gfn).next_back().is_some_and(|(_, end)| gfn < *end)
    }

    /// Whether every frame of `range` is `private`.
    pub fn all(&self, range: GfnRange, private: bool) -> bool {
        if private {
            let run = self.private.range(..=range.start()).next_back();
            return range.is_empty() || run.is_some_and(|(_, end)| range.end() <= *end);
        }
        let run = self.private.range(..range.end()).next_back();
        range.is_empty() || run.is_none_or(|(_, end)| *end <= range.start())
    }

    /// Whether all frames of `range` are equal.
    pub fn uniform(&self, range: GfnRange) -> bool {
        self.all(range, self.is_private(range.start()))
    }

    /// Makes every frame of `range` `private`.
    pub fn set(&mut self, range: GfnRange, private: bool) {
        let (mut start, mut end) = (range.start(), range.end());
        if range.is_empty() {
            return;
        }
        let touching: Vec<(Gfn, Gfn)> = self
            .private
            .range(..=end)
            .rev()
            .take_while(|(_, run_end)| **run_end >= start)
            .map(|(run_start, run_end)| (*run_start, *run_end))
            .collect();
        for (run_start, run_end) in touching {
            self.private.remove(&run_start);
            if private {
                start = start.min(run_start);
                end = end.max(run_end);
                continue;
            }
            if run_start < start {
                self.private.insert(run_start, start);
            }
            if end < run_end {
                self.private.insert(end, run_end);
            }
        }
        if private {
            self.private.insert(start, end);
        }
    }

    /// The private runs, ascending, none touching another.
    pub fn runs(&self) -> impl Iterator<Item = GfnRange> {
        self.private.iter().filter_map(|(start, end)| GfnRange::new(*start, *end).ok())
    }
}

/// Blocks of a slot whose frames have unequal attributes, by first frame. Only blocks that lie fully within the slot count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mixed {
    m2: BTreeSet<Gfn>,
    g1: BTreeSet<Gfn>,
}

impl Mixed {
    /// All flags of a new slot (`kvm_mmu_init_memslot_memory_attributes()`).
    pub fn of_slot(slot: GfnRange, attributes: &Attributes) -> Self {
        let mut mixed = Self::default();
        // A block is mixed only if a run starts or ends in it.
        for run in attributes.runs() {
            mixed.update(slot, run, attributes);
        }
        mixed
    }

    /// Brings the flags up to date after the attributes of `changed` have become equal.
    pub fn update(&mut self, slot: GfnRange, changed: GfnRange, attributes: &Attributes) {
        let Some(changed) = changed.intersection(&slot) else { return };
        for level in Level::ALL {
            let covered = changed.align_out(level.pages());
            let flags = self.at_mut(level);
            let stale: Vec<Gfn> = flags.range(covered.start()..covered.end()).copied().collect();
            for block in stale {
                flags.remove(&block);
            }
            // Blocks in the middle became equal with the range itself; only those at its ends can be mixed.
            let last = changed.end().checked_sub(1).unwrap_or(changed.start());
            for block in [changed.start(), last].into_iter().filter_map(|gfn| level.block(gfn)) {
                if slot.contains_range(&block) && !attributes.uniform(block) {
                    flags.insert(block.start());
                }
            }
        }
    }

    /// Whether the block that starts at `block` is mixed.
    pub fn contains(&self, level: Level, block: Gfn) -> bool {
        self.at(level).contains(&block)
    }

    /// First frames of the mixed blocks, ascending.
    pub fn blocks(&self, level: Level) -> Vec<Gfn> {
        self.at(level).iter().copied().collect()
    }

    fn at(&self, level: Level) -> &BTreeSet<Gfn> {
        match level {
            Level::M2 => &self.m2,
            Level::G1 => &self.g1,
        }
    }

    fn at_mut(&mut self, level: Level) -> &mut BTreeSet<Gfn> {
        match level {
            Level::M2 => &mut self.m2,
            Level::G1 => &mut self.g1,
        }
    }
}

/// What a change of attributes does to one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalidation {
    /// Frames whose mappings go.
    pub unmap: GfnRange,
    /// Which mappings go.
    pub flavour: Flavour,
    /// Frames that cannot be mapped while the change is in progress. Covers `unmap`, and the huge pages at its two ends that
    /// could still be mapped as one until the new attributes are stored.
    pub hull: GfnRange,
}

impl Invalidation {
    /// The change of `range` to `private`, as seen by `slot` with the flags it has before the change; `None` if they do not
    /// meet.
    pub fn of_change(slot: GfnRange, mixed: &Mixed, range: GfnRange, private: bool) -> Option<Self> {
        let unmap = range.intersection(&slot)?;
        let mut hull = unmap;
        let last = unmap.end().checked_sub(1)?;
        for level in Level::ALL {
            for block in [unmap.start(), last].into_iter().filter_map(|gfn| level.block(gfn)) {
                let straddled = !unmap.contains_range(&block);
                if straddled && slot.contains_range(&block) && !mixed.contains(level, block.start()) {
                    hull = hull.hull(&block);
                }
            }
        }
        Some(Self { unmap, flavour: Flavour::replaced_by(private), hull })
    }
}
