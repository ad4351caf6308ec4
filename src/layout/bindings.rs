//! Which pages of one guest_memfd are bound to which slot, and what an invalidation of file pages means in guest frames.
//!
//! The whole of clipping is [`Bindings::clip`]. It states what a hole punched at file pages `[s, e)` takes away from the
//! guest; it zaps nothing itself and knows neither the file's descriptor nor its contents. Mirrors the `bindings` xarray of
//! `virt/kvm/guest_memfd.c`: `kvm_gmem_bind()`, `kvm_gmem_unbind()`, `kvm_gmem_invalidate_start()`, `kvm_gmem_release()`.

use std::iter::FusedIterator;
use std::slice;

use super::SlotId;
use crate::addr::{FilePage, FileRange, Gfn, GfnRange, PAGE_SHIFT};

/// The most pages a file can have: its size in bytes is a signed 64-bit number.
pub const MAX_FILE_PAGES: u64 = i64::MAX.unsigned_abs() >> PAGE_SHIFT;

/// Why file pages cannot be bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BindError {
    /// No file can have this size.
    #[error("no guest_memfd has {pages:#x} pages (1 to {MAX_FILE_PAGES:#x})")]
    FileSize {
        /// Size asked for, in pages.
        pages: u64,
    },
    /// Nothing to bind.
    #[error("binding of slot {slot} has no pages")]
    Empty {
        /// The slot to bind.
        slot: SlotId,
    },
    /// The pages reach beyond the end of the file.
    #[error("file pages {pages} of slot {slot} end beyond the file's {size:#x} pages")]
    BeyondFile {
        /// The slot to bind.
        slot: SlotId,
        /// The file pages asked for.
        pages: FileRange,
        /// Size of the file in pages.
        size: u64,
    },
    /// The frames that the pages would appear at end beyond the highest address.
    #[error("slot {slot} at gfn {base} with {pages:#x} pages ends beyond the highest address")]
    BeyondTop {
        /// The slot to bind.
        slot: SlotId,
        /// Its first frame.
        base: Gfn,
        /// Its length in pages.
        pages: u64,
    },
    /// A page of the file is bound already. A file page belongs to at most one slot, in whatever address space.
    #[error("file pages {common} of slot {slot} are bound to slot {with} already")]
    Overlap {
        /// The slot to bind.
        slot: SlotId,
        /// The slot that holds the pages.
        with: SlotId,
        /// The pages both want.
        common: FileRange,
    },
    /// The slot has pages of this file already. A slot has one binding.
    #[error("slot {slot} is bound to file pages {pages} already")]
    SlotBound {
        /// The slot to bind.
        slot: SlotId,
        /// The pages it has.
        pages: FileRange,
    },
}

/// A run of file pages and the frames they appear at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Binding {
    /// The slot that has them.
    pub slot: SlotId,
    /// The file pages.
    pub pages: FileRange,
    /// The frame that the first page appears at.
    pub base: Gfn,
}

impl Binding {
    /// The frames the pages appear at.
    pub fn gfns(&self) -> GfnRange {
        // A binding that would end beyond the top is refused before it is stored.
        GfnRange::with_len(self.base, self.pages.pages()).unwrap_or(GfnRange::empty_at(self.base))
    }

    /// `[base + max(pgoff, s) - pgoff, base + min(pgoff + npages, e) - pgoff)`, or `None` if no page of `[s, e)` is bound here.
    fn clip(&self, range: &FileRange) -> Option<Clip> {
        let file = self.pages.intersection(range)?;
        let gfns = file.rebase(self.pages.start(), self.base)?;
        Some(Clip { slot: self.slot, gfns, file })
    }
}

/// What an invalidation of file pages takes away from one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Clip {
    /// The slot.
    pub slot: SlotId,
    /// The frames that lose their page. Never empty.
    pub gfns: GfnRange,
    /// The file pages behind them.
    pub file: FileRange,
}

/// The bindings of one guest_memfd: disjoint runs of file pages, ascending.
///
/// ```
/// use cvm_memory::addr::{FilePage, FileRange, Gfn, GfnRange};
/// use cvm_memory::layout::{Bindings, SlotId};
///
/// let pages = |s, n| FileRange::with_len(FilePage::new(s).unwrap(), n).unwrap();
/// let mut bindings = Bindings::new(0x100)?;
/// bindings.bind(SlotId::new(0), pages(0x20, 0x10), Gfn::new(0x1000).unwrap())?;
///
/// // Punching file pages [0, 0x28) takes the first eight frames of the slot.
/// let clips: Vec<_> = bindings.clip(pages(0, 0x28)).collect();
/// assert_eq!(clips.len(), 1);
/// assert_eq!(clips[0].gfns, GfnRange::with_len(Gfn::new(0x1000).unwrap(), 8).unwrap());
/// assert_eq!(clips[0].file, pages(0x20, 8));
/// # Ok::<(), cvm_memory::layout::BindError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bindings {
    size: u64,
    /// Ascending by file page, disjoint, none empty.
    runs: Vec<Binding>,
}

impl Bindings {
    /// A file of `pages` pages with nothing bound.
    ///
    /// # Errors
    /// [`BindError::FileSize`] for zero pages or more than [`MAX_FILE_PAGES`].
    pub fn new(pages: u64) -> Result<Self, BindError> {
        if pages == 0 || pages > MAX_FILE_PAGES {
            return Err(BindError::FileSize { pages });
        }
        Ok(Self { size: pages, runs: Vec::new() })
    }

    /// Size of the file in pages.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of slots bound.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether nothing is bound.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The bindings, ascending by file page.
    pub fn iter(&self) -> slice::Iter<'_, Binding> {
        self.runs.iter()
    }

    /// Binds `pages` to `slot`, the first of them at frame `base`.
    ///
    /// # Errors
    /// See [`BindError`]. Nothing has changed then.
    pub fn bind(&mut self, slot: SlotId, pages: FileRange, base: Gfn) -> Result<(), BindError> {
        let run = Binding { slot, pages, base };
        self.check(&run)?;
        if let Some(held) = self.runs.iter().find(|held| held.slot == slot) {
            return Err(BindError::SlotBound { slot, pages: held.pages });
        }
        if let Some(held) = self.clip(pages).next() {
            return Err(BindError::Overlap { slot, with: held.slot, common: held.file });
        }
        self.runs.insert(self.first_ending_after(pages.start()), run);
        Ok(())
    }

    /// Binds all of `added`, or none of them; one sort however many they are.
    ///
    /// # Errors
    /// See [`BindError`]. Nothing has changed then.
    pub fn bind_all(&mut self, added: impl IntoIterator<Item = Binding>) -> Result<(), BindError> {
        let mut runs = self.runs.clone();
        runs.extend(added);
        for run in runs.iter().skip(self.runs.len()) {
            self.check(run)?;
        }
        runs.sort_by_key(|run| run.slot);
        for (held, run) in pairs(&runs) {
            if held.slot == run.slot {
                return Err(BindError::SlotBound { slot: run.slot, pages: held.pages });
            }
        }
        runs.sort_by_key(|run| run.pages.start());
        for (held, run) in pairs(&runs) {
            if let Some(common) = held.pages.intersection(&run.pages) {
                // Whichever comes first in the file: a binding that is there already is not the one at fault.
                let known = self.runs.iter().any(|known| known.slot == run.slot);
                let (slot, with) = if known { (held.slot, run.slot) } else { (run.slot, held.slot) };
                return Err(BindError::Overlap { slot, with, common });
            }
        }
        self.runs = runs;
        Ok(())
    }

    /// Takes `slot`'s binding away. Returns the frames that this invalidates, or `None` if it had none.
    pub fn unbind(&mut self, slot: SlotId) -> Option<GfnRange> {
        let at = self.runs.iter().position(|run| run.slot == slot)?;
        Some(self.runs.remove(at).gfns())
    }

    /// Takes away the bindings of all slots but those that `stay`.
    pub(super) fn retain(&mut self, stay: impl Fn(&SlotId) -> bool) {
        self.runs.retain(|run| stay(&run.slot));
    }

    /// Takes every binding away, as closing the file does. Returns what that invalidates, ascending by file page.
    pub fn close(&mut self) -> Vec<(SlotId, GfnRange)> {
        self.runs.drain(..).map(|run| (run.slot, run.gfns())).collect()
    }

    /// What an invalidation of file pages `range` takes away, one item per slot that has a page of it, ascending by file page.
    ///
    /// Every slot is clipped against `range` as it was given. Pages beyond the end of the file are bound to nobody, so a
    /// range that reaches there is legal, as it is for a punched hole. Takes O(log bindings + items).
    pub fn clip(&self, range: FileRange) -> Clips<'_> {
        let first = self.first_ending_after(range.start());
        Clips { rest: self.runs.get(first..).unwrap_or_default().iter(), range }
    }

    /// The binding that has `page`.
    pub fn find(&self, page: FilePage) -> Option<&Binding> {
        self.runs.get(self.first_ending_after(page)).filter(|run| run.pages.contains(page))
    }

    /// Index of the lowest run with a page at or above `page`.
    fn first_ending_after(&self, page: FilePage) -> usize {
        self.runs.partition_point(|run| run.pages.end() <= page)
    }

    /// What can be said of a binding without looking at the others.
    fn check(&self, run: &Binding) -> Result<(), BindError> {
        let Binding { slot, pages, base } = *run;
        if pages.is_empty() {
            return Err(BindError::Empty { slot });
        }
        if pages.end().get() > self.size {
            return Err(BindError::BeyondFile { slot, pages, size: self.size });
        }
        if base.checked_add(pages.pages()).is_none() {
            return Err(BindError::BeyondTop { slot, base, pages: pages.pages() });
        }
        Ok(())
    }
}

impl<'a> IntoIterator for &'a Bindings {
    type Item = &'a Binding;
    type IntoIter = slice::Iter<'a, Binding>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Each element with its successor.
pub(super) fn pairs<T>(list: &[T]) -> impl Iterator<Item = (&T, &T)> {
    list.iter().zip(list.iter().skip(1))
}

/// Iterator of [`Bindings::clip`].
#[derive(Debug, Clone)]
pub struct Clips<'a> {
    rest: slice::Iter<'a, Binding>,
    range: FileRange,
}

impl Clips<'_> {
    /// No clips at all.
    pub(super) fn none(range: FileRange) -> Self {
        Self { rest: [].iter(), range }
    }
}

impl Iterator for Clips<'_> {
    type Item = Clip;
    fn next(&mut self) -> Option<Clip> {
        // Runs ascend, so the first that `range` misses ends it; dropping the rest keeps the iterator fused.
        let clip = self.rest.next().and_then(|run| run.clip(&self.range));
        if clip.is_none() {
            self.rest = [].iter();
        }
        clip
    }
}

impl FusedIterator for Clips<'_> {}
