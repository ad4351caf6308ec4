//! From the entries of one ring to runs of pages, as fast as a full ring is read.
//!
//! Entries come in rows of one slot, so its owner is asked for once per row. Every entry is a page, so the start of a run says
//! where the one before ended: one word per run, and nothing to decide for an entry but whether it names a page there is.

use super::{Entry, Owners, Stray};
use crate::hypervisor::DirtyGfn;
use crate::layout::SlotId;

/// Pages of an owner that were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnerRun {
    /// Whose.
    pub owner: u64,
    /// First page, from the owner's first.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

/// What came out of the rings, and may be copied.
#[derive(Debug, Clone, Default)]
pub struct Harvested {
    /// Where runs start: the page, and from bit 32 on how many pages all runs before it have. Only the first `used` count; those
    /// behind are room for more.
    starts: Vec<u64>,
    used: usize,
    /// Pages of all runs, modulo 2^32.
    pages: u32,
    /// An owner, and which run is the first of its own: all up to the next owner's are.
    owners: Vec<(u64, usize)>,
    pub(super) overrun: bool,
}

impl Harvested {
    /// The pages, in the order of the entries.
    pub fn runs(&self) -> impl Iterator<Item = OwnerRun> {
        let lasts = self.owners.iter().skip(1).map(|(_, first)| *first).chain([self.used]);
        self.owners.iter().zip(lasts).flat_map(|(&(owner, from), to)| {
            let starts = self.starts.get(from..to).unwrap_or_default();
            let ends = self.starts.get(from.saturating_add(1)..self.used).unwrap_or_default();
            let ends = ends.iter().map(|start| high(*start)).chain([self.pages]);
            starts.iter().zip(ends).map(move |(start, end)| {
                let pages = end.wrapping_sub(high(*start));
                OwnerRun { owner, first: start & u64::from(u32::MAX), pages: pages.into() }
            })
        })
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// A ring was full to the last entry. KVM keeps some free when it lets a vCPU into the guest, but what it does for the guest
    /// in one go can take more than those, and then it writes over entries that nobody has read: pages may be missing.
    pub const fn overrun(&self) -> bool {
        self.overrun
    }

    /// Forgets everything but the memory for it.
    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.pages = 0;
        self.owners.clear();
        self.overrun = false;
    }

    pub(super) const fn capacity(&self) -> usize {
        self.starts.len()
    }
}

/// Entries that named no page there is.
#[derive(Debug, Default)]
pub(super) struct Strays {
    pub(super) count: u64,
    pub(super) first: Option<Stray>,
}

impl Strays {
    #[cold]
    fn note(&mut self, slot: u32, page: u64) {
        self.count = self.count.saturating_add(1);
        self.first.get_or_insert(Stray { slot: SlotId::from_raw(slot), page });
    }
}

/// The end of no run.
const NOWHERE: u64 = u64::MAX;
/// One page, where pages are counted in [`Harvested::starts`].
const ONE: u64 = 1 << 32;

const fn high(start: u64) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "32 bits are left")]
    let high = (start >> 32) as u32;
    high
}

/// Where a row of entries goes.
struct Row<'a> {
    slot: u32,
    /// Pages that the slot's owner has; zero if it has none, or nobody has asked.
    limit: u64,
    /// The end of the last run, if it may go on.
    end: u64,
    starts: &'a mut [u64],
    used: usize,
    /// Pages so far, from bit 32 on.
    pages: u64,
}

impl Row<'_> {
    /// A page below the limit.
    #[inline]
    fn push(&mut self, page: u64) {
        // Counted only if it starts a run. The next page comes to the same place if it does not.
        if let Some(start) = self.starts.get_mut(self.used) {
            *start = self.pages | page;
        }
        self.used = self.used.wrapping_add(usize::from(page != self.end));
        self.end = page.wrapping_add(1);
        self.pages = self.pages.wrapping_add(ONE);
    }

    /// Reads entries up to the first that is not dirty, or that names another slot or no page there is. Returns how many.
    // A function of its own, so that all of the row is in registers.
    #[inline(never)]
    fn read<E: Entry>(&mut self, entries: &[E]) -> usize {
        let Self { slot, limit, mut end, mut used, mut pages, .. } = *self;
        let starts = &mut *self.starts;
        for entry in entries {
            if entry.flags() != DirtyGfn::DIRTY {
                break;
            }
            let (other, page) = entry.page();
            if other != slot || page >= limit {
                break;
            }
            let Some(start) = starts.get_mut(used) else { break };
            entry.set_harvested();
            *start = pages | page;
            used = used.wrapping_add(usize::from(page != end));
            end = page.wrapping_add(1);
            pages = pages.wrapping_add(ONE);
        }
        let count = high(pages.wrapping_sub(self.pages));
        (self.end, self.used, self.pages) = (end, used, pages);
        usize::try_from(count).unwrap_or_default()
    }
}

/// Reads what is in a ring from `fetch` on, which runs on freely, up to the first entry that is not dirty, but none twice; and
/// puts it behind what is in `to`. Returns the number of entries.
pub(super) fn gather<E: Entry>(
    entries: &[E],
    fetch: &mut u32,
    owners: &impl Owners,
    to: &mut Harvested,
    strays: &mut Strays,
) -> u32 {
    let room = to.used.saturating_add(entries.len());
    if to.starts.len() < room {
        to.starts.resize(room, 0);
    }
    let pages = u64::from(to.pages) << 32;
    let mut row = Row { slot: 0, limit: 0, end: NOWHERE, starts: &mut to.starts, used: to.used, pages };
    // A power of two, so that the index may wrap around in the middle of a round.
    let mask = entries.len().wrapping_sub(1);
    let at = usize::try_from(*fetch).unwrap_or_default() & mask;
    let (before, after) = entries.split_at_checked(at).unwrap_or_default();
    let mut count = 0_usize;
    // KVM does not fill an entry again before it was reset; a ring that it does not keep to must not hold us for ever.
    'ring: for mut part in [after, before] {
        loop {
            let read = row.read(part);
            count = count.wrapping_add(read);
            part = part.get(read..).unwrap_or_default();
            let Some((entry, rest)) = part.split_first() else { break };
            if entry.flags() != DirtyGfn::DIRTY {
                break 'ring;
            }
            let (slot, page) = entry.page();
            entry.set_harvested();
            (part, count) = (rest, count.wrapping_add(1));
            if slot != row.slot || row.limit == 0 {
                let (owner, pages) = owners.owner(SlotId::from_raw(slot)).unwrap_or((0, 0));
                // No slot has more pages than that: they are counted in 31 bits.
                (row.slot, row.limit, row.end) = (slot, pages.min(u64::from(u32::MAX)), NOWHERE);
                if pages != 0 && to.owners.last().is_none_or(|(last, _)| *last != owner) {
                    to.owners.push((owner, row.used));
                }
            }
            if page < row.limit {
                row.push(page);
            } else {
                strays.note(slot, page);
            }
        }
    }
    (to.used, to.pages) = (row.used, high(row.pages));
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    *fetch = fetch.wrapping_add(count);
    count
}
