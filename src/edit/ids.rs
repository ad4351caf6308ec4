//! Which id a new slot gets.
//!
//! That of the slot it replaces, so that what changes in place keeps its name; else the lowest that no slot has had when
//! the edit began; ids that the edit frees only when there are no others. An id is never in use twice: deletions come first.

use crate::layout::Layout;

use super::draft::Draft;
use super::error::PlanError;
use super::step::Step;

/// Gives ids to those of `steps` that create slots: the last of them, as deletions are the first. Both ascend by frame. If
/// they are `apart`, none of the new ones has a frame that a slot had.
pub(super) fn assign(layout: &Layout, draft: &Draft, steps: &mut [Step], apart: bool) -> Result<(), PlanError> {
    let deletions = steps.partition_point(|step| matches!(step, Step::Delete(_)));
    let others = steps.partition_point(|step| !matches!(step, Step::Create(_)));
    let creations = steps.len().saturating_sub(others);
    let (before, created) = steps.split_at_mut_checked(others).unwrap_or_default();
    let gone = before.get(..deletions).unwrap_or_default();

    let limit = u16::try_from(layout.limits().slots_per_address_space).unwrap_or(u16::MAX);
    let mut used = vec![false; usize::from(limit)];
    for slot in draft.old.all() {
        if let Some(used) = used.get_mut(usize::from(slot.id.id)) {
            *used = true;
        }
    }
    let free = used.iter().filter(|used| !**used).count().saturating_add(deletions);
    if creations > free {
        return Err(PlanError::NoFreeId { needed: creations, free });
    }
    let mut fresh = (0..limit).zip(used).filter(|(_, used)| !used).map(|(id, _)| id);
    // Each ascends and overlaps nothing of itself, so one pass finds out who replaces whom.
    let (mut replaced, later) = if apart { (&[][..], gone) } else { (gone, &[][..]) };
    let (mut unused, mut without) = (Vec::new(), Vec::new());
    for step in created {
        let Step::Create(new) = step else { continue };
        while let [Step::Delete(slot), above @ ..] = replaced
            && slot.gfns.end() <= new.gfns.start()
        {
            unused.push(slot.id);
            replaced = above;
        }
        if let [Step::Delete(slot), above @ ..] = replaced
            && slot.gfns.start() < new.gfns.end()
        {
            new.id = slot.id;
            replaced = above;
        } else if let Some(id) = fresh.next() {
            new.id.id = id;
        } else {
            without.push(&mut new.id);
        }
    }
    let never = replaced.iter().chain(later).map(|step| step.slot().id);
    without.into_iter().zip(unused.into_iter().chain(never)).for_each(|(of, id)| *of = id);
    Ok(())
}
