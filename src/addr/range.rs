//! One half-open range of pages, and its algebra.

use std::fmt;
use std::iter::FusedIterator;

use super::{AddrError, FilePage, Frame, Gfn, MAX_PAGES, PAGE_SHIFT, PAGE_SIZE};

/// A half-open range of guest frames.
pub type GfnRange = PageRange<Gfn>;
/// A half-open range of pages of a guest_memfd.
pub type FileRange = PageRange<FilePage>;

/// A half-open range `[start, end)` of pages of one kind. May be empty; never wraps; its byte addresses fit a `u64`.
///
/// ```
/// use cvm_memory::addr::{AddrError, Gfn, GfnRange};
///
/// let range = GfnRange::from_bytes(0x10_0000, 0x20_0000)?;
/// assert_eq!(range.pages(), 512);
/// assert_eq!(range.to_string(), "[0x100, 0x300)");
///
/// // What KVM refuses is refused here: empty, unaligned, wrapping.
/// assert!(matches!(GfnRange::from_bytes(0x1000, 0), Err(AddrError::Empty { .. })));
/// assert!(matches!(GfnRange::from_bytes(0x1001, 0x1000), Err(AddrError::Unaligned { .. })));
/// assert!(matches!(GfnRange::from_bytes(u64::MAX - 0xfff, 0x1000), Err(AddrError::BeyondTop { .. })));
/// # Ok::<(), AddrError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange<F> {
    start: F,
    end: F,
}

impl<F: Frame> PageRange<F> {
    /// `[start, end)`.
    ///
    /// # Errors
    /// [`AddrError::Inverted`] if `end < start`.
    pub fn new(start: F, end: F) -> Result<Self, AddrError> {
        if end < start {
            return Err(AddrError::Inverted { start: start.index(), end: end.index() });
        }
        Ok(Self { start, end })
    }

    /// `pages` pages from `start`; zero pages give an empty range.
    ///
    /// # Errors
    /// [`AddrError::BeyondTop`] if the end exceeds [`MAX_PAGES`].
    pub fn with_len(start: F, pages: u64) -> Result<Self, AddrError> {
        match start.index().checked_add(pages).and_then(F::from_index) {
            Some(end) => Ok(Self { start, end }),
            None => Err(AddrError::BeyondTop { start: start.index(), size: pages }),
        }
    }

    /// The pages of the byte range `[address, address + size)`, as an ioctl would be given it.
    ///
    /// # Errors
    /// [`AddrError::Empty`] for size zero, [`AddrError::Unaligned`] unless both are page multiples,
    /// [`AddrError::BeyondTop`] if the sum wraps.
    pub fn from_bytes(address: u64, size: u64) -> Result<Self, AddrError> {
        if size == 0 {
            return Err(AddrError::Empty { start: address });
        }
        if (address | size) & (PAGE_SIZE - 1) != 0 {
            return Err(AddrError::Unaligned { start: address, size });
        }
        let end = address.checked_add(size).ok_or(AddrError::BeyondTop { start: address, size })?;
        match (F::from_index(address >> PAGE_SHIFT), F::from_index(end >> PAGE_SHIFT)) {
            (Some(start), Some(end)) => Ok(Self { start, end }),
            _ => Err(AddrError::BeyondTop { start: address, size }),
        }
    }

    /// The single page `frame`, or an empty range at the very top.
    pub fn page(frame: F) -> Self {
        Self { start: frame, end: F::from_index(frame.index().saturating_add(1)).unwrap_or(frame) }
    }

    /// An empty range at `frame`.
    pub const fn empty_at(frame: F) -> Self {
        Self { start: frame, end: frame }
    }

    /// First page.
    pub const fn start(&self) -> F {
        self.start
    }

    /// One past the last page.
    pub const fn end(&self) -> F {
        self.end
    }

    /// Length in pages.
    pub fn pages(&self) -> u64 {
        // `start <= end` is the type's invariant.
        self.end.index().saturating_sub(self.start.index())
    }

    /// Length in bytes. Never overflows: a range has at most [`MAX_PAGES`] pages.
    pub fn bytes(&self) -> u64 {
        self.pages() << PAGE_SHIFT
    }

    /// Byte address of the first page.
    pub fn start_byte(&self) -> u64 {
        self.start.index() << PAGE_SHIFT
    }

    /// Byte address one past the last page.
    pub fn end_byte(&self) -> u64 {
        self.end.index() << PAGE_SHIFT
    }

    /// Whether the range holds no page.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether `frame` lies in the range.
    pub fn contains(&self, frame: F) -> bool {
        self.start <= frame && frame < self.end
    }

    /// Whether every page of `other` lies in the range. An empty `other` always does.
    pub fn contains_range(&self, other: &Self) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// Whether the two share a page. Ranges that only touch do not overlap.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.intersection(other).is_some()
    }

    /// The pages in both, or `None` if there are none.
    ///
    /// ```
    /// # use cvm_memory::addr::{Gfn, GfnRange};
    /// # let r = |s, e| GfnRange::new(Gfn::new(s).unwrap(), Gfn::new(e).unwrap()).unwrap();
    /// assert_eq!(r(0, 8).intersection(&r(6, 12)), Some(r(6, 8)));
    /// assert_eq!(r(0, 8).intersection(&r(8, 12)), None);
    /// ```
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Self { start, end })
    }

    /// The smallest range that covers both. An empty one counts as nothing.
    pub fn hull(&self, other: &Self) -> Self {
        match (self.is_empty(), other.is_empty()) {
            (true, _) => *other,
            (_, true) => *self,
            _ => Self { start: self.start.min(other.start), end: self.end.max(other.end) },
        }
    }

    /// What is left of this range without `other`: the part below and the part above, where not empty.
    ///
    /// ```
    /// # use cvm_memory::addr::{Gfn, GfnRange};
    /// # let r = |s, e| GfnRange::new(Gfn::new(s).unwrap(), Gfn::new(e).unwrap()).unwrap();
    /// assert_eq!(r(0, 8).subtract(&r(2, 4)).collect::<Vec<_>>(), [r(0, 2), r(4, 8)]);
    /// assert_eq!(r(0, 8).subtract(&r(0, 9)).count(), 0);
    /// ```
    pub fn subtract(&self, other: &Self) -> impl Iterator<Item = Self> + use<F> {
        let (below, above) = match self.intersection(other) {
            None => (*self, Self::empty_at(self.end)),
            Some(cut) => (Self { start: self.start, end: cut.start }, Self { start: cut.end, end: self.end }),
        };
        [below, above].into_iter().filter(|part| !part.is_empty())
    }

    /// The parts below and from `at`, either of which may be empty; `None` if `at` lies outside `[start, end]`.
    pub fn split_at(&self, at: F) -> Option<(Self, Self)> {
        (self.start <= at && at <= self.end)
            .then_some((Self { start: self.start, end: at }, Self { start: at, end: self.end }))
    }

    /// The smallest range of `unit`-page blocks that covers this one. `unit` is a power of two.
    ///
    /// The end saturates at [`MAX_PAGES`], the one place where a block can be cut short.
    ///
    /// ```
    /// # use cvm_memory::addr::{Gfn, GfnRange};
    /// # let r = |s, e| GfnRange::new(Gfn::new(s).unwrap(), Gfn::new(e).unwrap()).unwrap();
    /// assert_eq!(r(3, 513).align_out(512), r(0, 1024));
    /// assert_eq!(r(3, 1030).align_in(512), Some(r(512, 1024)));
    /// assert_eq!(r(3, 513).align_in(512), None);
    /// ```
    pub fn align_out(&self, unit: u64) -> Self {
        let mask = power_of_two(unit).saturating_sub(1);
        let start = F::from_index(self.start.index() & !mask).unwrap_or(self.start);
        let end = self.end.index().saturating_add(mask) & !mask;
        Self { start, end: F::from_index(end.min(MAX_PAGES)).unwrap_or(self.end) }
    }

    /// The whole `unit`-page blocks inside this range, or `None` if there is none. `unit` is a power of two.
    pub fn align_in(&self, unit: u64) -> Option<Self> {
        let mask = power_of_two(unit).saturating_sub(1);
        let start = F::from_index(self.start.index().checked_add(mask)? & !mask)?;
        let end = F::from_index(self.end.index() & !mask)?;
        (start < end).then_some(Self { start, end })
    }

    /// Pieces that end at multiples of `pages` (a power of two is rounded up to), so that the same address always falls
    /// into the same piece.
    ///
    /// ```
    /// # use cvm_memory::addr::{Gfn, GfnRange};
    /// # let r = |s, e| GfnRange::new(Gfn::new(s).unwrap(), Gfn::new(e).unwrap()).unwrap();
    /// assert_eq!(r(500, 1030).chunks(512).collect::<Vec<_>>(), [r(500, 512), r(512, 1024), r(1024, 1030)]);
    /// ```
    pub fn chunks(&self, pages: u64) -> Chunks<F> {
        Chunks { rest: *self, unit: power_of_two(pages) }
    }

    /// Pieces of `pages` pages counted from the start, the last one shorter: the fewest that cover the range.
    ///
    /// ```
    /// # use cvm_memory::addr::{Gfn, GfnRange};
    /// # let r = |s, e| GfnRange::new(Gfn::new(s).unwrap(), Gfn::new(e).unwrap()).unwrap();
    /// assert_eq!(r(500, 1100).split_every(512).collect::<Vec<_>>(), [r(500, 1012), r(1012, 1100)]);
    /// ```
    pub fn split_every(&self, pages: u64) -> impl Iterator<Item = Self> + use<F> {
        let pages = pages.max(1);
        let mut rest = *self;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let cut = F::from_index(rest.start.index().saturating_add(pages)).map_or(rest.end, |at| at.min(rest.end));
            let piece = Self { start: rest.start, end: cut };
            rest.start = cut;
            Some(piece)
        })
    }

    /// Every page, ascending.
    pub fn iter(&self) -> Frames<F> {
        Frames { rest: *self }
    }

    /// The same pages counted from `origin` in this space, laid from `onto` in another: the one translation between guest
    /// frames and file pages.
    ///
    /// `None` if the range starts below `origin` or would end above the top of the other space.
    ///
    /// ```
    /// # use cvm_memory::addr::{FilePage, FileRange, Gfn, GfnRange};
    /// let gfns = GfnRange::with_len(Gfn::new(0x1004).unwrap(), 1)?;
    /// let file = gfns.rebase(Gfn::new(0x1000).unwrap(), FilePage::new(0x20).unwrap());
    /// assert_eq!(file, Some(FileRange::with_len(FilePage::new(0x24).unwrap(), 1)?));
    /// # Ok::<(), cvm_memory::addr::AddrError>(())
    /// ```
    pub fn rebase<G: Frame>(&self, origin: F, onto: G) -> Option<PageRange<G>> {
        let skip = self.start.index().checked_sub(origin.index())?;
        let start = onto.index().checked_add(skip).and_then(G::from_index)?;
        PageRange::with_len(start, self.pages()).ok()
    }
}

impl<F: Frame> fmt::Display for PageRange<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start.index(), self.end.index())
    }
}

impl<F: Frame> fmt::Debug for PageRange<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<F: Frame> IntoIterator for PageRange<F> {
    type Item = F;
    type IntoIter = Frames<F>;
    fn into_iter(self) -> Frames<F> {
        self.iter()
    }
}

impl<F: Frame> IntoIterator for &PageRange<F> {
    type Item = F;
    type IntoIter = Frames<F>;
    fn into_iter(self) -> Frames<F> {
        self.iter()
    }
}

/// Iterator of [`PageRange::chunks`].
#[derive(Debug, Clone)]
pub struct Chunks<F: Frame> {
    rest: PageRange<F>,
    unit: u64,
}

impl<F: Frame> Iterator for Chunks<F> {
    type Item = PageRange<F>;
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let boundary = (self.rest.start.index() | self.unit.saturating_sub(1)).saturating_add(1);
        let end = F::from_index(boundary).map_or(self.rest.end, |frame| frame.min(self.rest.end));
        let piece = PageRange { start: self.rest.start, end };
        self.rest.start = end;
        Some(piece)
    }
}

impl<F: Frame> FusedIterator for Chunks<F> {}

/// Iterator of [`PageRange::iter`].
#[derive(Debug, Clone)]
pub struct Frames<F: Frame> {
    rest: PageRange<F>,
}

impl<F: Frame> Iterator for Frames<F> {
    type Item = F;
    fn next(&mut self) -> Option<F> {
        if self.rest.is_empty() {
            return None;
        }
        let frame = self.rest.start;
        self.rest.start = F::from_index(frame.index().saturating_add(1)).unwrap_or(self.rest.end);
        Some(frame)
    }
    fn size_hint(&self) -> (usize, Option<usize>) {
        match usize::try_from(self.rest.pages()) {
            Ok(left) => (left, Some(left)),
            Err(_) => (usize::MAX, None),
        }
    }
}

impl<F: Frame> FusedIterator for Frames<F> {}

/// The least power of two that is not below `n`, or the greatest there is.
fn power_of_two(n: u64) -> u64 {
    n.max(1).checked_next_power_of_two().unwrap_or(1 << 63)
}
