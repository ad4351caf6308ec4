//! Which id a new slot gets.
//!
//! That of the slot it replaces, so that what changes in place keeps its name; else the lowest that no slot has had when
//! the edit began; ids that the edit frees only when there are no others. An id is never in use twice: deletions come first.

use crate::layout::{Layout, Memslot, SlotId};

use super::assign::{Fate, Final};
use super::draft::Draft;
use super::error::PlanError;

/// Gives the slots of `finals` that are new, ascending by frame, with ids, to `emit`.
pub(super) fn assign(
    layout: &Layout,
    draft: &Draft,
    finals: Vec<Final>,
    fates: &[Fate],
    mut emit: impl FnMut(Memslot),
) -> Result<(), PlanError> {
    let mut created = finals;
    created.retain(|of| of.old.is_none());
    let limit = u16::try_from(layout.limits().slots_per_address_space).unwrap_or(u16::MAX);
    let mut used: Vec<u16> = draft.old.all().iter().map(|slot| slot.id.id).collect();
    used.sort_unstable();
    let mut used = used.into_iter().peekable();
    let fresh = (0..limit).filter(move |id| used.next_if_eq(id).is_none());
    // Each ascends and overlaps nothing of itself, so one pass finds out who replaces whom.
    let gone = draft.old.all().iter().zip(fates).filter(|(_, fate)| **fate == Fate::Goes);
    let mut gone = gone.map(|(slot, _)| slot).peekable();
    let mut unused = Vec::new();
    let mut inherited = Vec::with_capacity(created.len());
    for of in &created {
        let gfns = of.region.gfns;
        while let Some(gone) = gone.next_if(|slot| slot.gfns.end() <= gfns.start()) {
            unused.push(gone.id.id);
        }
        inherited.push(gone.next_if(|slot| slot.gfns.start() < gfns.end()).map(|slot| slot.id.id));
    }
    unused.extend(gone.map(|old| old.id.id));
    let kept = inherited.iter().flatten().count();
    let free = usize::from(limit).saturating_sub(draft.old.all().len()).saturating_add(kept).saturating_add(unused.len());
    let needed = created.len();
    if needed > free {
        return Err(PlanError::NoFreeId { needed, free });
    }
    let mut ids = fresh.chain(unused);
    for (of, id) in created.iter().zip(inherited) {
        let id = id.or_else(|| ids.next()).ok_or(PlanError::NoFreeId { needed, free })?;
        emit(of.region.slot(SlotId { as_id: draft.as_id, id }));
    }
    Ok(())
}
