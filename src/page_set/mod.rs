//! A concurrent set of guest frames: readers never wait, whatever writers do.
//!
//! A VM asks for the state of a page at every private fault and changes it at every conversion, from all vCPUs at once.
//! [`PageSet`] answers with one or two loads, no lock and no allocation, and costs memory only where neighbouring pages
//! differ. It plays the part of KVM's `mem_attr_array` (`virt/kvm/kvm_main.c`), which is an xarray with an entry per
//! page, and keeps per tebibyte 128 KiB that stay in the L2 cache, plus at most 32 MiB, where that one takes 2 GiB.
//!
//! It is *not* a range lock, and knows nothing of what membership means or of kernels. A change of many pages is no
//! transaction: each page changes once, at some moment of the call. Who needs more (an ioctl and the record of it in
//! step) brings a lock of their own.
//!
//! # Structure
//! Pages are grouped in chunks of 2 MiB. Every chunk has a two-bit tag (`tags`): none in, all in, or mixed. Only mixed
//! chunks use their 512 bits in the leaf (`leaf`), which lie where the page's number says, so nothing is ever
//! allocated, moved or freed. Both are lazily mapped zeroes (`words`): capacity is address space, not memory.
//!
//! # Why readers need no lock
//! 1. A reader loads the tag; if that is mixed, it loads the page's leaf word. Nothing else.
//! 2. Only the holder of the chunk's stripe writes its leaf words or makes its tag mixed (*expand*).
//! 3. To expand, the writer reads a uniform tag, fills the leaf with that same state, and then publishes the mixed tag.
//!    It changes its own pages only after that: an expansion changes no page's state, however far it got.
//! 4. A chunk becomes uniform by one change of its tag: by the stripe's holder when the last page came round
//!    (*collapse*), or by a writer of whole chunks, who takes no stripe at all and touches no leaf.
//!
//! Thus a reader that loaded "mixed" may find a leaf already filled anew for a later expansion. The state it finds is
//! that of a uniform tag which came *after* the mixed one it saw, and which was read by the filler *before* it filled:
//! the page had this state at a moment between the reader's two loads. And if a writer of whole chunks comes between a
//! page writer's look at the tag and its store to the leaf, then that store is seen only by readers who had found the
//! chunk mixed before the change to uniform too; for them and for the writer, the store came first. An expansion so
//! overtaken is dropped, for the same reason.
//! Either way each call answers with a state current during it. Loom holds this (`models`).

mod leaf;
#[cfg(all(test, loom))]
mod models;
mod runs;
mod stripes;
mod tags;
#[cfg(all(test, not(loom)))]
mod tests;

use std::fmt;
use std::ops::Deref;

use crate::addr::{Gfn, GfnRange};

use leaf::Leaf;
use stripes::Stripes;
use tags::{Tag, Tags};

/// log2 of the pages per chunk: 2 MiB, so that a chunk's leaf is one cache line. Loom's models get by with two words.
const CHUNK_SHIFT: u32 = if cfg!(loom) { 7 } else { crate::addr::PAGES_PER_2M.trailing_zeros() };
const PAGES_PER_CHUNK: u64 = 1 << CHUNK_SHIFT;

/// Why a page set could not be made or changed. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageSetError {
    /// Address space for the set could not be had.
    #[error("cannot map a page set of {capacity:#x} pages")]
    Map {
        /// Pages asked for.
        capacity: u64,
        /// What `mmap(2)` said.
        #[source]
        source: nix::Error,
    },
    /// The range reaches beyond the capacity.
    #[error("range {range} is beyond the page set's capacity of {capacity:#x} pages")]
    BeyondCapacity {
        /// The range in pages, half-open.
        range: GfnRange,
        /// Capacity in pages.
        capacity: u64,
    },
}

/// What a [`PageSet`] costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Bytes of tags and locks: 160 KiB for a capacity of 1 TiB, of which tags never touched occupy no memory.
    pub fixed_bytes: u64,
    /// Bytes of address space of the leaf, and so the most it can ever occupy: 32 MiB for a capacity of 1 TiB.
    pub leaf_bytes: u64,
    /// Chunks of 2 MiB that hold pages of both states now. Each occupies 64 bytes of leaf, in whole pages of 4 KiB.
    pub mixed_chunks: u64,
}

/// A concurrent set of guest frames below a fixed capacity, empty when made.
///
/// Every method takes `&self`; share it by reference or `Arc`. Who gets it as [`Pages`] can only look. What a reader sees happened before its call returned
/// (writes release, reads acquire).
///
/// ```
/// use cvm_memory::addr::{Gfn, GfnRange, PAGES_PER_1G};
/// use cvm_memory::page_set::PageSet;
///
/// let private = PageSet::new(1024 * PAGES_PER_1G)?; // 1 TiB
/// private.insert(GfnRange::from_bytes(0, 2 << 30)?)?;
/// private.remove(GfnRange::from_bytes(0x10_0000, 0x1000)?)?;
///
/// assert!(private.contains(Gfn::containing(0x10_1000)));
/// assert!(!private.contains(Gfn::containing(0x10_0fff)));
///
/// // What is left to do to make a range all private:
/// let todo: Vec<GfnRange> = private.differing_runs(GfnRange::from_bytes(0, 1 << 30)?, true).collect();
/// assert_eq!(todo, [GfnRange::from_bytes(0x10_0000, 0x1000)?]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PageSet(Pages);

/// What a [`PageSet`] holds, for those who may only look.
pub struct Pages {
    capacity: u64,
    tags: Tags,
    leaf: Leaf,
    stripes: Stripes,
}

impl Deref for PageSet {
    type Target = Pages;

    #[inline]
    fn deref(&self) -> &Pages {
        &self.0
    }
}

impl PageSet {
    /// An empty set that can hold the frames `[0, capacity)`, in pages. Costs address space, hardly any memory.
    ///
    /// # Errors
    /// [`PageSetError::Map`] if the process has not that much address space left (a bit per page and a little more).
    pub fn new(capacity: u64) -> Result<Self, PageSetError> {
        let chunks = capacity.div_ceil(PAGES_PER_CHUNK);
        let failed = |source| PageSetError::Map { capacity, source };
        Ok(Self(Pages {
            capacity,
            tags: Tags::new(chunks).map_err(failed)?,
            leaf: Leaf::new(chunks).map_err(failed)?,
            stripes: Stripes::new(),
        }))
    }

    /// Puts every page of `range` into the set.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn insert(&self, range: GfnRange) -> Result<(), PageSetError> {
        self.set(range, true)
    }

    /// Takes every page of `range` out of the set.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn remove(&self, range: GfnRange) -> Result<(), PageSetError> {
        self.set(range, false)
    }

    /// Puts every page of `range` into the set, or takes it out.
    ///
    /// Each page changes at once and for good at some moment of the call; the range as a whole does not. Whole chunks
    /// cost two bits each and no lock.
    ///
    /// # Errors
    /// [`PageSetError::BeyondCapacity`], and nothing has changed, if `range` is not empty and ends beyond the capacity.
    pub fn set(&self, range: GfnRange, value: bool) -> Result<(), PageSetError> {
        self.admits(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let (first, end) = (range.start().get(), range.end().get());
        // `[first_whole, end_whole)` are the whole chunks of the range, if it has any.
        let first_whole = first.div_ceil(PAGES_PER_CHUNK);
        let end_whole = end >> CHUNK_SHIFT;
        let head_end = end.min(first_whole << CHUNK_SHIFT);
        let tail_first = head_end.max(end_whole << CHUNK_SHIFT);
        if first < head_end {
            self.set_in_chunk(first, head_end, value);
        }
        if first_whole < end_whole {
            self.tags.set_uniform(first_whole, end_whole, value);
        }
        if tail_first < end {
            self.set_in_chunk(tail_first, end, value);
        }
        Ok(())
    }

    /// Sets the pages `[first, end)` of one chunk. See the module's head for why this is safe beside readers and beside
    /// writers of whole chunks.
    fn set_in_chunk(&self, first: u64, end: u64, value: bool) {
        let chunk = first >> CHUNK_SHIFT;
        let _stripe = self.stripes.lock(chunk);
        match self.tags.load(chunk) {
            Tag::Mixed => {}
            Tag::Uniform(now) if now == value => return,
            Tag::Uniform(now) => {
                self.leaf.fill(chunk, now);
                if !self.tags.replace(chunk, Tag::Uniform(now), Tag::Mixed) {
                    // A writer of whole chunks came between: it had the last word on these pages too.
                    return;
                }
            }
        }
        if self.leaf.set(first, end, value) && self.leaf.is_uniform(chunk, value) {
            // Not mixed any more? Then a writer of whole chunks had the last word.
            self.tags.replace(chunk, Tag::Mixed, Tag::Uniform(value));
        }
    }
}

impl Pages {
    /// Capacity in pages: the frames `[0, capacity)` can be in the set.
    pub const fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Whether all of `range` can be in the set.
    ///
    /// # Errors
    /// [`PageSetError::BeyondCapacity`] if it is not empty and ends beyond the capacity.
    pub fn admits(&self, range: GfnRange) -> Result<(), PageSetError> {
        let capacity = self.capacity;
        if range.is_empty() || range.end().get() <= capacity {
            return Ok(());
        }
        Err(PageSetError::BeyondCapacity { range, capacity })
    }

    /// Whether `gfn` is in the set. Wait-free: one or two loads. A frame beyond the capacity is not.
    #[inline]
    pub fn contains(&self, gfn: Gfn) -> bool {
        match self.tags.load(gfn.get() >> CHUNK_SHIFT) {
            Tag::Uniform(value) => value,
            Tag::Mixed => self.leaf.contains(gfn.get()),
        }
    }

    /// What the set costs now. Reads every tag.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            fixed_bytes: self.fixed_bytes(),
            leaf_bytes: u64::try_from(self.leaf.bytes()).unwrap_or(u64::MAX),
            mixed_chunks: self.tags.mixed(),
        }
    }

    fn fixed_bytes(&self) -> u64 {
        let bytes = self.tags.bytes().saturating_add(self.stripes.bytes()).saturating_add(size_of::<Self>());
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageSet")
            .field("capacity", &format_args!("{:#x}", self.capacity))
            .field("statistics", &self.statistics())
            .finish()
    }
}
