//! 4 KiB of contents, aligned as KVM wants the sources of a launch to be.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// The contents of one page. Several in a row are contiguous memory.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Page([u8; PAGE_BYTES]);

impl Page {
    /// Nothing but zeroes.
    pub const ZERO: Self = Self([0; PAGE_BYTES]);

    /// A page with these contents.
    pub const fn new(bytes: [u8; PAGE_BYTES]) -> Self {
        Self(bytes)
    }

    /// `data` as pages, the last one filled up with zeroes.
    ///
    /// ```
    /// use cvm_memory_sev::page::Page;
    ///
    /// assert_eq!(Page::split(&[7; 4097]).len(), 2);
    /// assert!(Page::split(&[]).is_empty());
    /// ```
    pub fn split(data: &[u8]) -> Vec<Self> {
        let page = |bytes: &[u8]| {
            let mut page = Self::ZERO;
            page.put(0, bytes);
            page
        };
        data.chunks(PAGE_BYTES).map(page).collect()
    }

    /// Puts `bytes` at `offset`; what does not fit any more is left out.
    pub(crate) fn put(&mut self, offset: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    }

    /// `N` bytes at `offset`; zeroes where there is nothing any more.
    pub(crate) fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        for (to, from) in bytes.iter_mut().zip(self.0.iter().skip(offset)) {
            *to = *from;
        }
        bytes
    }
}

impl Default for Page {
    fn default() -> Self {
        Self::ZERO
    }
}

impl Deref for Page {
    type Target = [u8; PAGE_BYTES];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Page {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl From<[u8; PAGE_BYTES]> for Page {
    fn from(bytes: [u8; PAGE_BYTES]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = self.0.iter().rposition(|byte| *byte != 0).map_or(0, |last| last.saturating_add(1));
        write!(f, "Page({used:#x} bytes, then zeroes)")
    }
}
