//! The pages that a TD starts with: where, with what contents, measured or not, in what order.
//!
//! A list is checked as a whole before the first page of it is added, because the measurement binds the order and nothing
//! that was added can be taken back: a mistake in the last entry would cost the whole TD. It knows neither firmware formats
//! (that is [`tdvf`](crate::tdvf)) nor KVM (that is [`launch`](crate::launch)).

use cvm_memory::addr::{Gfn, GfnRange, PAGE_SIZE};

use crate::mrtd::{Measurement, Mrtd, Order, Page};
use crate::width::Width;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 1 << cvm_memory::addr::PAGE_SHIFT;

/// A run of pages that are added together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// The frames.
    pub gfns: GfnRange,
    /// Whether the contents are measured. The addresses always are.
    pub measured: bool,
    /// What the pages hold, from the first byte on; what is missing at the end is zeroes.
    pub contents: Vec<u8>,
}

impl Import {
    /// The contents of the page at `gfn`, which has to be one of its own; zeroes otherwise.
    pub fn page(&self, gfn: Gfn) -> Box<Page> {
        let mut page = Box::new([0; PAGE_BYTES]);
        let index = gfn.pages_from(self.gfns.start()).and_then(|pages| usize::try_from(pages).ok());
        let contents = index.and_then(|index| self.contents.chunks(PAGE_BYTES).nth(index)).unwrap_or_default();
        for (to, from) in page.iter_mut().zip(contents) {
            *to = *from;
        }
        page
    }
}

/// Why a list of imports cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// An entry has no pages.
    #[error("import {index} is empty")]
    Empty {
        /// Which.
        index: usize,
    },
    /// An entry has more contents than pages.
    #[error("import {index}: {bytes:#x} bytes of contents for gfns {gfns}")]
    TooLong {
        /// Which.
        index: usize,
        /// Its frames.
        gfns: GfnRange,
        /// Its contents in bytes.
        bytes: usize,
    },
    /// An entry reaches to or beyond the shared bit.
    #[error("import {index}: gfns {gfns} reach the shared bit of {bits}-bit addresses")]
    Beyond {
        /// Which.
        index: usize,
        /// Its frames.
        gfns: GfnRange,
        /// The address width.
        bits: u32,
    },
    /// Two entries want the same page, which can be added once only.
    #[error("imports {first} and {second} both have gfns {gfns}")]
    Overlap {
        /// One of them.
        first: usize,
        /// The other.
        second: usize,
        /// What they share.
        gfns: GfnRange,
    },
}

/// Imports in the order in which they are added, known to be possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportList {
    imports: Vec<Import>,
}

impl ImportList {
    /// Checks a list, for a TD of that address width.
    ///
    /// # Errors
    /// [`ImportError`], for the first entry that is wrong.
    ///
    /// ```
    /// use cvm_memory::addr::GfnRange;
    /// use cvm_memory_tdx::import::{Import, ImportError, ImportList};
    /// use cvm_memory_tdx::mrtd::Order;
    /// use cvm_memory_tdx::width::Width;
    ///
    /// let page = Import { gfns: GfnRange::from_bytes(0x80_0000, 0x1000)?, measured: true, contents: vec![0; 0x1000] };
    /// let list = ImportList::new(vec![page.clone()], Width::Bits48)?;
    /// println!("{}", list.mrtd(Order::SinglePass));
    ///
    /// let twice = ImportList::new(vec![page.clone(), page], Width::Bits48);
    /// assert!(matches!(twice, Err(ImportError::Overlap { first: 0, second: 1, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(imports: Vec<Import>, width: Width) -> Result<Self, ImportError> {
        for (index, import) in imports.iter().enumerate() {
            let gfns = import.gfns;
            if gfns.is_empty() {
                return Err(ImportError::Empty { index });
            }
            let bytes = import.contents.len();
            if u64::try_from(bytes).is_ok_and(|bytes| bytes > gfns.bytes()) {
                return Err(ImportError::TooLong { index, gfns, bytes });
            }
            if gfns.end() > width.end() {
                return Err(ImportError::Beyond { index, gfns, bits: width.bits() });
            }
        }
        if let Some((first, second, gfns)) = overlap(imports.iter().map(|import| import.gfns)) {
            return Err(ImportError::Overlap { first, second, gfns });
        }
        Ok(Self { imports })
    }

    /// The imports, in order.
    pub fn imports(&self) -> &[Import] {
        &self.imports
    }

    /// Size of all pages in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages().saturating_mul(PAGE_SIZE)
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.imports.iter().map(|import| import.gfns.pages()).fold(0, u64::saturating_add)
    }

    /// The measurement of a TD that is built from this list and nothing else.
    pub fn mrtd(&self, order: Order) -> Measurement {
        let mut mrtd = Mrtd::new();
        for import in &self.imports {
            match order {
                Order::SinglePass => {
                    for gfn in import.gfns {
                        mrtd.add_page(gfn);
                        if import.measured {
                            mrtd.extend_page(gfn, &import.page(gfn));
                        }
                    }
                }
                Order::TwoPass => {
                    import.gfns.iter().for_each(|gfn| mrtd.add_page(gfn));
                    if import.measured {
                        import.gfns.iter().for_each(|gfn| mrtd.extend_page(gfn, &import.page(gfn)));
                    }
                }
            }
        }
        mrtd.finish()
    }
}

/// Two of `ranges` that overlap, by their positions in the list, and where.
pub(crate) fn overlap(ranges: impl Iterator<Item = GfnRange>) -> Option<(usize, usize, GfnRange)> {
    let mut sorted: Vec<(GfnRange, usize)> = ranges.zip(0..).collect();
    sorted.sort_by_key(|(gfns, _)| gfns.start());
    let mut neighbours = sorted.iter().zip(sorted.iter().skip(1));
    neighbours.find_map(|((one, first), (other, second))| {
        let gfns = one.intersection(other)?;
        Some((*first.min(second), *first.max(second), gfns))
    })
}
