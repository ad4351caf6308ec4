//! Guest page tables of the second stage, and the protocol that keeps stale pages out of them.
//!
//! A vCPU accesses memory through a mapping while it holds the MMU lock shared; whoever removes a mapping holds it
//! exclusively. So when a zap returns, no access through the old mapping is under way: the zap includes the TLB flush.
//! Nothing here decides what may be mapped. Mirrors `kvm_mmu_invalidate_begin()`, `kvm_mmu_invalidate_range_add()`,
//! `kvm_mmu_invalidate_end()`, `mmu_invalidate_retry_gfn()` and `kvm_unmap_gfn_range()`.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::arch::{AccessKind, Arch, GmemPage};
use super::attributes::Flavour;
use super::file::{Frame, GmemFile};
use crate::addr::{Gfn, GfnRange};

/// What a frame is mapped to.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// A page of a guest_memfd.
    Gmem(Arc<GmemFile>, Frame),
    /// A page of this process, by address.
    Host(u64),
    /// Nothing, as of that generation of the memslots. Left by zaps of ranges.
    Mmio(u64),
}

impl Target {
    pub(super) fn gmem_page(&self) -> Option<GmemPage> {
        match self {
            Self::Gmem(file, frame) => Some(GmemPage { file: file.inode(), page: frame.page() }),
            Self::Host(_) | Self::Mmio(_) => None,
        }
    }
}

/// One mapping.
#[derive(Debug, Clone)]
pub(super) struct Spte {
    pub(super) target: Target,
    pub(super) private: bool,
    pub(super) writable: bool,
}

impl Spte {
    /// Whether an access of that kind needs no fault.
    pub(super) fn allows(&self, private: bool, kind: AccessKind) -> bool {
        private == self.private
            && (kind != AccessKind::Write || self.writable)
            && !matches!(self.target, Target::Mmio(_))
    }
}

/// Page tables and invalidation state; all of it under `mmu_lock`.
#[derive(Debug)]
pub(super) struct Mmu {
    /// By root (true: the private one, where there are two) and frame.
    sptes: BTreeMap<(bool, Gfn), Spte>,
    separate: bool,
    seq: u64,
    in_progress: u64,
    hull: GfnRange,
}

impl Mmu {
    pub(super) fn new(separate_private_root: bool) -> Self {
        Self {
            sptes: BTreeMap::new(),
            separate: separate_private_root,
            seq: 0,
            in_progress: 0,
            hull: GfnRange::empty_at(Gfn::ZERO),
        }
    }

    pub(super) fn lookup(&self, private: bool, gfn: Gfn) -> Option<&Spte> {
        self.sptes.get(&(self.separate && private, gfn))
    }

    pub(super) fn map(&mut self, gfn: Gfn, spte: Spte) -> Option<Spte> {
        self.sptes.insert((self.separate && spte.private, gfn), spte)
    }

    pub(super) const fn seq(&self) -> u64 {
        self.seq
    }

    pub(super) const fn in_progress(&self) -> u64 {
        self.in_progress
    }

    pub(super) const fn hull(&self) -> GfnRange {
        self.hull
    }

    /// An invalidation starts. The first of several that overlap in time finds an empty hull.
    pub(super) fn begin(&mut self) {
        if self.in_progress == 0 {
            self.hull = GfnRange::empty_at(Gfn::ZERO);
        }
        self.in_progress = self.in_progress.saturating_add(1);
    }

    /// Frames that the invalidation is about. The hull covers those of all that are in progress, and all between.
    pub(super) fn add(&mut self, gfns: GfnRange) {
        self.hull = self.hull.hull(&gfns);
    }

    /// The invalidation is over: faults that began before or during it look up their page again.
    pub(super) fn end(&mut self) {
        self.seq = self.seq.wrapping_add(1);
        self.in_progress = self.in_progress.saturating_sub(1);
    }

    /// Whether a fault at `gfn` that sampled `seq` must start again.
    pub(super) fn must_retry(&self, seq: u64, gfn: Gfn) -> bool {
        (self.in_progress > 0 && self.hull.contains(gfn)) || self.seq != seq
    }

    /// Removes the mappings of `gfns`. Where both kinds share their page tables, the flavour makes no difference.
    pub(super) fn zap(&mut self, arch: &dyn Arch, gfns: GfnRange, flavour: Flavour) -> usize {
        let roots: &[bool] = match (self.separate, flavour) {
            (false, _) | (true, Flavour::Shared) => &[false],
            (true, Flavour::Private) => &[true],
            (true, Flavour::Both) => &[false, true],
        };
        let mut zapped = 0_usize;
        for root in roots {
            let range = (*root, gfns.start())..(*root, gfns.end());
            for ((_, gfn), spte) in self.sptes.extract_if(range, |_, spte| !matches!(spte.target, Target::Mmio(_))) {
                zapped = zapped.saturating_add(1);
                removed(arch, gfn, &spte);
            }
        }
        zapped
    }

    /// Takes the permission to write from the shared mappings of `gfns`; private memory is never logged.
    pub(super) fn protect(&mut self, gfns: GfnRange) {
        for (_, spte) in self.sptes.range_mut((false, gfns.start())..(false, gfns.end())) {
            spte.writable &= spte.private;
        }
    }

    /// Removes every mapping, the MMIO ones too.
    pub(super) fn zap_all(&mut self, arch: &dyn Arch) -> usize {
        let sptes = std::mem::take(&mut self.sptes);
        for ((_, gfn), spte) in &sptes {
            removed(arch, *gfn, spte);
        }
        sptes.len()
    }

    /// All mappings of memory, by root and ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Gfn, &Spte)> {
        self.sptes
            .iter()
            .filter(|(_, spte)| !matches!(spte.target, Target::Mmio(_)))
            .map(|((_, gfn), spte)| (*gfn, spte))
    }
}

fn removed(arch: &dyn Arch, gfn: Gfn, spte: &Spte) {
    if let (true, Target::Gmem(file, frame)) = (spte.private, &spte.target)
        && !arch.zapped_private(gfn, GmemPage { file: file.inode(), page: frame.page() })
    {
        file.lose_contents(frame.page());
    }
}
