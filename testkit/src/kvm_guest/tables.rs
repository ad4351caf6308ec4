//! Page tables of a long-mode guest: virtual is physical, in 2 MiB pages, for what the guest was told to touch.
//!
//! Tables come from a small pool in the guest's own memory. When that is used up they are all dropped and built anew for
//! the range at hand; the stubs reload CR3, so that nothing stale is used.

use super::support::{Support, TABLES};

/// Pages in the pool: one top level, and two per distinct GiB at worst.
const POOL: u64 = 64;
pub(super) const SIZE: u64 = POOL * 0x1000;
/// The most that one operation may touch at once, in bytes: three tables at each level below the top.
pub(super) const SPAN: u64 = 1 << 30;

const LARGE: u64 = 1 << 21;
/// Present, writable, accessed.
const TABLE: u64 = 0b10_0011;
/// Present, writable, accessed, dirty, large.
const PAGE_2M: u64 = 0b1110_0011;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

#[derive(Debug)]
pub(super) struct Tables {
    used: u64,
}

impl Tables {
    pub(super) fn new(support: &Support) -> Self {
        let mut tables = Self { used: 0 };
        tables.reset(support);
        tables
    }

    /// Makes `[gpa, gpa + len)` reachable; at most [`SPAN`] bytes.
    pub(super) fn map(&mut self, support: &Support, gpa: u64, len: u64) {
        if self.try_map(support, gpa, len).is_none() {
            self.reset(support);
            self.try_map(support, gpa, len).expect("an empty pool is large enough for one operation");
        }
    }

    fn reset(&mut self, support: &Support) {
        self.used = 1;
        support.write(TABLES, &[0; 0x1000]);
        self.try_map(support, support.gpa(0), support.size()).expect("an empty pool");
    }

    fn try_map(&mut self, support: &Support, gpa: u64, len: u64) -> Option<()> {
        let last = gpa + (len - 1);
        for page in gpa / LARGE..=last / LARGE {
            let address = page * LARGE;
            let pointers = self.below(support, TABLES, address >> 39)?;
            let directory = self.below(support, pointers, address >> 30)?;
            support.write_u64(entry(directory, address >> 21), address | PAGE_2M);
        }
        Some(())
    }

    /// Offset of the table that entry `index` of `table` points to, made if absent; `None` if the pool is used up.
    fn below(&mut self, support: &Support, table: u64, index: u64) -> Option<u64> {
        let slot = entry(table, index);
        let old = support.read_u64(slot);
        if old & 1 == 1 {
            return Some((old & ADDRESS) - support.gpa(0));
        }
        if self.used == POOL {
            return None;
        }
        let fresh = TABLES + self.used * 0x1000;
        self.used += 1;
        support.write(fresh, &[0; 0x1000]);
        support.write_u64(slot, support.gpa(fresh) | TABLE);
        Some(fresh)
    }
}

const fn entry(table: u64, index: u64) -> u64 {
    table + (index % 512) * 8
}
