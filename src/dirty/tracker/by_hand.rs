//! Pages that are found first and cleared later, in pieces of the caller's choice: right before they are copied, so that what is
//! written in between costs no fault and is copied once.
//!
//! KVM clears 64 pages at once, or up to the end of the slot; here any frames may be asked for. Mirrors
//! `kvm_clear_dirty_log_protect()`.

use super::{ClearError, SyncError, SyncReport, Tracker};
use crate::addr::{GfnRange, merge_adjacent, subtract_lists};

/// Pages that one `KVM_CLEAR_DIRTY_LOG` is about at most: 64 MiB, so that no vCPU waits behind it for long. A multiple of 64.
const CLEAR_PAGES: u64 = 16384;

/// What has to be asked of KVM for pages `[first, first + pages)` of a slot of `of` pages: wider by up to 63 at either end.
pub(super) fn pieces(first: u64, pages: u64, of: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = first.saturating_sub(first % 64);
    let end = first.saturating_add(pages).checked_next_multiple_of(64).unwrap_or(u64::MAX).min(of);
    std::iter::from_fn(move || {
        let count = end.saturating_sub(at).min(CLEAR_PAGES);
        let piece = (at, count);
        at = at.saturating_add(count);
        (count != 0).then_some(piece)
    })
}

/// The bits of word `at` that are about pages `[first, end)`.
fn within(at: u64, first: u64, end: u64) -> u64 {
    let base = at.saturating_mul(64);
    let below = |page: u64| match page.saturating_sub(base) {
        0 => 0,
        bits @ 1..64 => !(u64::MAX << bits),
        _ => u64::MAX,
    };
    below(end) & !below(first)
}

impl Tracker {
    /// Looks which pages were written, and takes none: each comes into its bitmap when it is [cleared](Self::clear), not
    /// before. By hand only.
    ///
    /// # Errors
    /// [`SyncError`]; [`SyncError::NotByHand`] with a mechanism that takes what it finds.
    pub fn look(&self) -> Result<SyncReport, SyncError> {
        if !self.is_by_hand() {
            return Err(SyncError::NotByHand { mechanism: self.mechanism });
        }
        let mut state = self.state();
        state.may_look()?;
        let mut report = SyncReport::default();
        for tracked in state.slots.values_mut() {
            let whole = self.get_log(tracked)?;
            if !whole {
                tracked.place.set_all();
            }
            let found = tracked.log.iter().flat_map(|log| log.words());
            let found = found.map(|word| u64::from(word.count_ones())).fold(0, u64::saturating_add);
            let all = !whole || !tracked.logged;
            report.pages = report.pages.saturating_add(if all { tracked.place.pages } else { found });
            report.overrun |= !whole;
        }
        Ok(report)
    }

    /// Has KVM protect those of `gfns` that the last [look](Self::look) has found, and puts them into their bitmaps: they may
    /// be copied now. Other pages stay as they are, those also that KVM has to be asked about because it counts in 64. Returns
    /// how many pages that were.
    ///
    /// # Errors
    /// [`ClearError`].
    pub fn clear(&self, gfns: GfnRange) -> Result<u64, ClearError> {
        if !self.is_by_hand() {
            return Err(SyncError::NotByHand { mechanism: self.mechanism }.into());
        }
        let mut state = self.state();
        state.may_look()?;
        let slots = || state.slots.values().filter(|tracked| tracked.logged && tracked.slot.id.as_id == 0);
        let mut covered: Vec<GfnRange> = slots().map(|tracked| tracked.slot.gfns).collect();
        covered.sort_unstable();
        if let Some(gfns) = subtract_lists(&[gfns], &merge_adjacent(covered)).first() {
            return Err(ClearError::NotTracked { gfns: *gfns });
        }
        if let Some(tracked) = slots().find(|tracked| !tracked.looked && tracked.slot.gfns.overlaps(&gfns)) {
            return Err(ClearError::NotLooked { slot: tracked.slot.id });
        }
        let mut cleared = 0_u64;
        for tracked in state.slots.values_mut().filter(|tracked| tracked.logged && tracked.slot.id.as_id == 0) {
            let slot = tracked.slot.gfns;
            let Some(part) = slot.intersection(&gfns) else { continue };
            let first = part.start().get().saturating_sub(slot.start().get());
            let end = first.saturating_add(part.pages());
            for (at, count) in pieces(first, part.pages(), slot.pages()) {
                let wanted = |word, bits| bits & within(word, first, end);
                cleared = cleared.saturating_add(self.take_piece(tracked, at, count, wanted)?);
            }
        }
        Ok(cleared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every piece is one that KVM takes, they are in order and touch, and no shorter list has the pages asked for.
    #[test]
    fn pieces_are_what_kvm_takes() {
        for of in [1, 63, 64, 65, 130, 2 * CLEAR_PAGES + 3] {
            for first in [0, 1, 63, 64, 65, 129, CLEAR_PAGES - 1, CLEAR_PAGES + 1] {
                for pages in [1, 2, 63, 64, 65, CLEAR_PAGES, CLEAR_PAGES + 1] {
                    if first + pages > of {
                        continue;
                    }
                    let found: Vec<_> = pieces(first, pages, of).collect();
                    for (at, count) in &found {
                        assert_eq!(at % 64, 0);
                        assert!(count % 64 == 0 || at + count == of);
                        assert!((1..=CLEAR_PAGES).contains(count));
                    }
                    assert!(found.windows(2).all(|two| two[0].0 + two[0].1 == two[1].0));
                    let (start, (last, count)) = (found[0].0, found[found.len() - 1]);
                    assert!((first - start) < 64 && last + count >= first + pages && last + count < first + pages + 64);
                }
            }
        }
    }

    #[test]
    fn bits_of_a_word() {
        for first in 0..200_u64 {
            for end in first..200 {
                for word in 0..4 {
                    let expected = (0..64).filter(|bit| (first..end).contains(&(word * 64 + bit)));
                    assert_eq!(within(word, first, end), expected.fold(0, |bits, bit| bits | 1 << bit));
                }
            }
        }
    }
}
