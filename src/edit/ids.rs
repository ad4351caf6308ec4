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
    // Each ascends and overlaps nothing of itself, so one pass finds out who replaces whom.
    let mut gone = gone.peekable();
    let mut unused = Vec::new();
    let mut inherited = Vec::with_capacity(needed);
    for region in created {
        while let Some(slot) = gone.next_if(|slot| slot.gfns.end() <= region.gfns.start()) {
            unused.push(slot.id);
        }
        inherited.push(gone.next_if(|slot| slot.gfns.start() < region.gfns.end()).map(|slot| slot.id));
    }
    unused.extend(gone.map(|slot| slot.id));

    let fresh = (0..limit).zip(used).filter(|(_, used)| !used).map(|(id, _)| SlotId { as_id: draft.as_id, id });
    let mut others = fresh.chain(unused);
    Ok(inherited.into_iter().filter_map(|id| id.or_else(|| others.next())).collect())
}
