//! The memory that slots are over, a bitmap for each mapping, and where in them a slot's pages are: by address in this process.

use std::sync::{Arc, Weak};

use nix::errno::Errno;

use super::StartError;
use crate::addr::{FilePage, FileRange, PAGE_SIZE};
use crate::backing::SharedBacking;
use crate::dirty::bitmap::DirtyBitmap;
use crate::layout::Memslot;

/// Memory that slots are over, and its bitmap.
#[derive(Debug)]
struct Backing {
    hva: u64,
    bytes: u64,
    bitmap: Arc<DirtyBitmap>,
    /// Everybody who keeps the mapping, if it is known when it goes: something else may come to lie there then.
    owners: Option<Vec<Weak<dyn SharedBacking>>>,
}

impl Backing {
    fn is_there(&self) -> bool {
        self.owners.as_ref().is_none_or(|owners| owners.iter().any(|owner| owner.strong_count() != 0))
    }

    /// It is there for as long as `owner` is, too.
    fn keep(&mut self, owner: Option<Weak<dyn SharedBacking>>) {
        if let (Some(owners), Some(owner)) = (&mut self.owners, owner) {
            owners.retain(|known| known.strong_count() != 0 && !known.ptr_eq(&owner));
            owners.push(owner);
        }
    }
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Backings(Vec<Backing>);

impl Backings {
    /// The bitmap of `backing`, which is there for as long as `owner` is, or for ever.
    pub(super) fn add(
        &mut self,
        backing: &dyn SharedBacking,
        owner: Option<Weak<dyn SharedBacking>>,
    ) -> Result<Arc<DirtyBitmap>, Errno> {
        let (hva, bytes) = (backing.hva(), backing.size());
        self.0.retain(Backing::is_there);
        if let Some(known) = self.0.iter_mut().find(|known| (known.hva, known.bytes) == (hva, bytes)) {
            known.keep(owner);
            return Ok(Arc::clone(&known.bitmap));
        }
        let bitmap = Arc::new(DirtyBitmap::new(bytes / PAGE_SIZE)?);
        let owners = owner.map(|owner| vec![owner]);
        self.0.push(Backing { hva, bytes, bitmap: Arc::clone(&bitmap), owners });
        Ok(bitmap)
    }

    /// Bytes at address `hva` were written.
    pub(super) fn wrote(&self, hva: u64, bytes: u64) {
        let end = hva.saturating_add(bytes);
        // Of mappings that overlap, a slot may be over either.
        for Backing { hva: start, bytes, bitmap, .. } in &self.0 {
            let (from, to) = (hva.max(*start), end.min(start.saturating_add(*bytes)));
            let last = to.saturating_sub(*start).checked_next_multiple_of(PAGE_SIZE).map(FilePage::containing);
            let first = FilePage::containing(from.saturating_sub(*start));
            if from < to
                && let Some(pages) = last.and_then(|last| FileRange::new(first, last).ok())
            {
                bitmap.set(pages);
            }
        }
    }

    /// All of it may have been written.
    pub(super) fn set_all(&self) {
        for Backing { bitmap, .. } in &self.0 {
            if let Ok(all) = FileRange::with_len(FilePage::ZERO, bitmap.pages()) {
                bitmap.set(all);
            }
        }
    }

    /// Where the memory of a slot is.
    pub(super) fn place(&self, slot: &Memslot) -> Result<Place, StartError> {
        let (hva, bytes) = (slot.hva, slot.gfns.bytes());
        let inside = |backing: &&Backing| {
            if !backing.is_there() {
                return false;
            }
            let offset = hva.checked_sub(backing.hva);
            let end = offset.and_then(|offset| offset.checked_add(bytes));
            end.is_some_and(|end| end <= backing.bytes)
        };
        let backing = self.0.iter().find(inside);
        let backing = backing.ok_or(StartError::NoBacking { slot: slot.id, hva, bytes })?;
        let first = FilePage::containing(hva.saturating_sub(backing.hva));
        Ok(Place { bitmap: Arc::clone(&backing.bitmap), first, pages: slot.gfns.pages() })
    }
}

/// Where an owner's pages are.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) bitmap: Arc<DirtyBitmap>,
    pub(super) first: FilePage,
    pub(super) pages: u64,
}

impl Place {
    pub(super) fn range(&self, first: u64, pages: u64) -> Option<FileRange> {
        let start = self.first.get().checked_add(first)?;
        FileRange::with_len(FilePage::new(start)?, pages).ok()
    }

    pub(super) fn set(&self, first: u64, pages: u64) {
        if let Some(range) = self.range(first, pages) {
            self.bitmap.set(range);
        }
    }

    pub(super) fn set_all(&self) {
        self.set(0, self.pages);
    }
}
