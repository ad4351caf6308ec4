//! Which id a new slot gets.
//!
//! That of the slot it replaces, so that what changes in place keeps its name; else the lowest that no slot has had when
//! the edit began; ids that the edit frees only when there are no others. An id is never in use twice: deletions come first.

use crate::layout::{Layout, Memslot, SlotId};

use super::draft::Draft;
use super::error::PlanError;
use super::plan::{Fate, Final};

/// The slots of `finals` that are new, ascending by frame, with ids.
pub(super) fn assign(
    layout: &Layout,
    draft: &Draft,
    finals: &[Final],
    fates: &[Fate],
) -> Result<Vec<Memslot>, PlanError> {
    let mut created: Vec<_> = finals.iter().filter(|of| of.old.is_none()).map(|of| of.region).collect();
    created.sort_unstable_by_key(|region| region.gfns.start());
    let limit = u16::try_from(layout.limits().slots_per_address_space).unwrap_or(u16::MAX);
    let mut used: Vec<u16> = draft.old.iter().map(|old| old.id.id).collect();
    used.sort_unstable();
    let mut used = used.into_iter().peekable();
    let fresh = (0..limit).filter(move |id| used.next_if_eq(id).is_none());
    // Both ascend and neither overlaps itself.
    let going = draft.old.iter().zip(fates).filter(|(_, fate)| **fate == Fate::Goes).map(|(old, _)| old);
    let mut going = going.peekable();
    let mut slots: Vec<(Option<u16>, _)> = Vec::with_capacity(created.len());
    let mut unused = Vec::new();
    for region in created {
        while let Some(gone) = going.next_if(|old| old.region.gfns.end() <= region.gfns.start()) {
            unused.push(gone.id.id);
        }
        let replaces = going.next_if(|old| old.region.gfns.start() < region.gfns.end());
        slots.push((replaces.map(|old| old.id.id), region));
    }
    unused.extend(going.map(|old| old.id.id));
    let needed = slots.len();
    let kept = slots.iter().filter(|(id, _)| id.is_some()).count();
    let free = usize::from(limit).saturating_sub(draft.old.len()).saturating_add(kept).saturating_add(unused.len());
    let mut ids = fresh.chain(unused);
    let mut named = Vec::with_capacity(needed);
    for (id, region) in slots {
        let id = id.or_else(|| ids.next()).ok_or(PlanError::NoFreeId { needed, free })?;
        named.push(region.slot(SlotId { as_id: draft.as_id, id }));
    }
    Ok(named)
}
