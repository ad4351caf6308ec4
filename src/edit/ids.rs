//! Which id a new slot gets.
//!
//! That of the slot it replaces, so that what changes in place keeps its name; else the lowest that no slot has had when
//! the edit began; ids that the edit frees only when there are no others. An id is never in use twice: deletions come first.

use crate::layout::{Layout, Memslot, SlotId};

use super::draft::Draft;
use super::error::PlanError;
use super::region::Region;

/// Ids for the slots `created`, given those that have `gone`. Both ascend by frame.
pub(super) fn assign<'s>(
    layout: &Layout,
    draft: &Draft,
    created: &[Region],
    gone: impl ExactSizeIterator<Item = &'s Memslot>,
) -> Result<Vec<SlotId>, PlanError> {
    let limit = u16::try_from(layout.limits().slots_per_address_space).unwrap_or(u16::MAX);
    let mut used = vec![false; usize::from(limit)];
    for slot in draft.old.all() {
        if let Some(used) = used.get_mut(usize::from(slot.id.id)) {
            *used = true;
        }
    }
    let needed = created.len();
    let free = used.iter().filter(|used| !**used).count().saturating_add(gone.len());
    if needed > free {
        return Err(PlanError::NoFreeId { needed, free });
    }
    let mut fresh = (0..limit).zip(used).filter(|(_, used)| !used).map(|(id, _)| SlotId { as_id: draft.as_id, id });
    // Each ascends and overlaps nothing of itself, so one pass finds out who replaces whom.
    let mut gone = gone.peekable();
    let (mut unused, mut without) = (Vec::new(), Vec::new());
    let mut ids = Vec::with_capacity(needed);
    for region in created {
        while let Some(slot) = gone.next_if(|slot| slot.gfns.end() <= region.gfns.start()) {
            unused.push(slot.id);
        }
        let replaced = gone.next_if(|slot| slot.gfns.start() < region.gfns.end()).map(|slot| slot.id);
        let id = replaced.or_else(|| fresh.next()).unwrap_or_else(|| {
            without.push(ids.len());
            SlotId { as_id: draft.as_id, id: limit }
        });
        ids.push(id);
    }
    unused.extend(gone.map(|slot| slot.id));
    for (at, id) in without.into_iter().zip(unused) {
        ids.get_mut(at).into_iter().for_each(|of| *of = id);
    }
    Ok(ids)
}
