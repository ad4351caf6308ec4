//! What a change of page state takes, as a list of steps. Pure.
//!
//! The order, and why:
//!
//! 1. *Settle*: what an earlier conversion left to be freed on the side that is about to be used again is freed first, so
//!    that no stale byte comes back. Nobody uses that side yet, so this needs no undo.
//! 2. To private: listeners *unmap* before the attribute changes, so that no device reaches a page the guest believes
//!    private.
//! 3. KVM's *attributes*, then the *record*, both under the lock that every device access shares. A reader of the record
//!    alone may see a page change a moment after KVM did, and never one that did not change.
//! 4. To shared: listeners *map*, once KVM and the record say shared.
//! 5. *Discard* of the side that lost, strictly last: everything before it can be undone exactly, freeing cannot.
//!
//! Only what differs is touched: a conversion that changes nothing has no steps. Neighbours are merged, and cut only where
//! one call would keep everybody else waiting for long.

use crate::addr::{FileRange, Gfn, GfnRange, PAGE_SHIFT, intersect_lists, merge_adjacent};
use crate::backing::{SharedPiece, Space};
use crate::gmem::FileId;
use crate::layout::SlotId;

use super::discard::DiscardPolicy;
use super::request::{Request, State};

/// One effect. Ranges are frames, half-open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Frees what an earlier conversion left on the private side.
    SettlePrivate(PrivateDiscard),
    /// Frees what an earlier conversion left on the shared side.
    SettleShared(SharedDiscard),
    /// Listeners unmap.
    Unmap(GfnRange),
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    SetAttributes(GfnRange, State),
    /// The record.
    Publish(GfnRange, State),
    /// Listeners map.
    Map(GfnRange),
    /// Frees the private side.
    DiscardPrivate(PrivateDiscard),
    /// Frees the shared side.
    DiscardShared(SharedDiscard),
    /// Leaves the side that lost for later.
    Defer(GfnRange, State),
}

/// Frames, and their pages in a file to punch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrivateDiscard {
    /// The frames.
    pub gfns: GfnRange,
    /// The file.
    pub file: FileId,
    /// Its pages.
    pub pages: FileRange,
}

/// Frames, and the slot whose shared memory they start in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedDiscard {
    /// The frames.
    pub gfns: GfnRange,
    /// The slot of the first of them.
    pub slot: SlotId,
    /// Where its first byte lies in the slot's backing.
    pub offset: u64,
}

impl Step {
    /// The frames it is about.
    pub const fn gfns(&self) -> GfnRange {
        match self {
            Self::Unmap(gfns)
            | Self::Map(gfns)
            | Self::SetAttributes(gfns, _)
            | Self::Publish(gfns, _)
            | Self::Defer(gfns, _) => *gfns,
            Self::SettlePrivate(discard) | Self::DiscardPrivate(discard) => discard.gfns,
            Self::SettleShared(discard) | Self::DiscardShared(discard) => discard.gfns,
        }
    }

    /// Whether it frees memory that was in use until now, so that nothing before it can be undone any more.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::DiscardPrivate(_) | Self::DiscardShared(_))
    }
}

/// A request that may not be carried out, with the reason. Nothing has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Part of the range is not memory, and only memory can be private.
    #[error("gfns {range} cannot become private: gfns {hole} are not memory")]
    Hole {
        /// The range asked for.
        range: GfnRange,
        /// The first part of it that is not memory.
        hole: GfnRange,
    },
    /// Part of the range is memory that has no private side.
    #[error("gfns {range} cannot change state: gfns {part}, slot {slot:#x}, have no private side")]
    NotConvertible {
        /// The range asked for.
        range: GfnRange,
        /// The first such part.
        part: GfnRange,
        /// Its slot, as KVM numbers it.
        slot: u32,
    },
}

/// The record's view of a range, from which a plan is made. Lists are ascending, disjoint, and lie within the range.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Frames whose declared state differs from the wanted one.
    pub differing: Vec<GfnRange>,
    /// Frames whose attribute in KVM differs from the wanted one.
    pub attributes: Vec<GfnRange>,
    /// Frames whose wanted side still holds what an earlier conversion left to be freed.
    pub unsettled: Vec<GfnRange>,
}

/// What the planner needs to know of its surroundings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// What becomes of the side that lost.
    pub discard: DiscardPolicy,
    /// The most pages that one call may cover.
    pub chunk: u64,
    /// Whether anybody listens.
    pub listeners: bool,
}

/// A change of page state, ready to be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The state wanted.
    pub to: State,
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// The frames that change, ascending, merged.
    pub changed: Vec<GfnRange>,
    /// Pages of the request that are memory.
    pub pages: u64,
}

impl Plan {
    /// Pages that change.
    pub fn pages_changed(&self) -> u64 {
        self.changed.iter().map(GfnRange::pages).fold(0, u64::saturating_add)
    }
}

/// The parts of `request` that are memory with a private side, merged across slots.
///
/// # Errors
/// [`Refusal`]: a hole if the request is to private, memory without a private side in any case.
pub fn admit(request: &Request, space: &Space) -> Result<Vec<GfnRange>, Refusal> {
    let range = request.range;
    let mut memory = Vec::new();
    for segment in space.layout().table().segments(range) {
        match segment.slot {
            None if request.to.is_private() => return Err(Refusal::Hole { range, hole: segment.gfns }),
            // Firmware declares whole device windows shared; there is nothing to do for them.
            None => {}
            Some(slot) if !space.is_convertible(slot) => {
                return Err(Refusal::NotConvertible { range, part: segment.gfns, slot: slot.id.raw() });
            }
            Some(_) => memory.push(segment.gfns),
        }
    }
    Ok(merge_adjacent(memory))
}

/// The steps that bring `memory` into the wanted state, given what the record says of it.
pub fn plan(to: State, memory: &[GfnRange], seen: &Snapshot, space: &Space, rules: &Rules) -> Plan {
    let changed = intersect_lists(memory, &seen.differing);
    let attributes = intersect_lists(&changed, &seen.attributes);
    let unsettled = intersect_lists(&changed, &seen.unsettled);
    let mut steps = Vec::new();

    for gfns in unsettled {
        discards(gfns, to, space, rules.chunk, &mut steps, Step::SettlePrivate, Step::SettleShared);
    }
    if to.is_private() && rules.listeners {
        steps.extend(changed.iter().copied().map(Step::Unmap));
    }
    for gfns in attributes {
        steps.extend(gfns.split_every(rules.chunk).map(|chunk| Step::SetAttributes(chunk, to)));
    }
    steps.extend(changed.iter().map(|&gfns| Step::Publish(gfns, to)));
    if !to.is_private() && rules.listeners {
        steps.extend(changed.iter().copied().map(Step::Map));
    }
    for &gfns in &changed {
        match rules.discard {
            DiscardPolicy::Immediate => {
                let lost = to.opposite();
                discards(gfns, lost, space, rules.chunk, &mut steps, Step::DiscardPrivate, Step::DiscardShared);
            }
            DiscardPolicy::Deferred { .. } => steps.push(Step::Defer(gfns, to.opposite())),
            DiscardPolicy::Never => {}
        }
    }
    let pages = memory.iter().map(GfnRange::pages).fold(0, u64::saturating_add);
    Plan { to, steps, changed, pages }
}

/// The steps that set the attributes of `gfns`, whose declared state is private already.
pub fn plan_materialise(gfns: &[GfnRange], rules: &Rules) -> Plan {
    let chunks = gfns.iter().flat_map(|gfns| gfns.split_every(rules.chunk));
    let steps = chunks.map(|chunk| Step::SetAttributes(chunk, State::Private)).collect();
    let pages = gfns.iter().map(GfnRange::pages).fold(0, u64::saturating_add);
    Plan { to: State::Private, steps, changed: gfns.to_vec(), pages }
}

/// The steps that free side `side` of `gfns`, for later.
pub(super) fn plan_trim(gfns: GfnRange, side: State, space: &Space, rules: &Rules) -> Vec<Step> {
    let mut steps = Vec::new();
    discards(gfns, side, space, rules.chunk, &mut steps, Step::DiscardPrivate, Step::DiscardShared);
    steps
}

/// The steps that free side `side` of `gfns`: whole runs of the backing, wherever slots begin and end.
fn discards(
    gfns: GfnRange,
    side: State,
    space: &Space,
    chunk: u64,
    steps: &mut Vec<Step>,
    private: impl Fn(PrivateDiscard) -> Step,
    shared: impl Fn(SharedDiscard) -> Step,
) {
    match side {
        State::Private => {
            for piece in space.private_pieces(gfns) {
                for part in piece.gfns.split_every(chunk) {
                    if let Some(pages) = part.rebase(piece.gfns.start(), piece.pages.start()) {
                        steps.push(private(PrivateDiscard { gfns: part, file: piece.file, pages }));
                    }
                }
            }
        }
        State::Shared => {
            for piece in space.shared_pieces(gfns) {
                for part in cut(&piece, chunk, space) {
                    let skip = part.start_byte().saturating_sub(piece.gfns.start_byte());
                    let offset = piece.offset.saturating_add(skip);
                    steps.push(shared(SharedDiscard { gfns: part, slot: piece.slot, offset }));
                }
            }
        }
    }
}

/// The fewest parts of about `chunk` pages that end where pages of the backing do, which cannot be freed in part.
fn cut(piece: &SharedPiece, chunk: u64, space: &Space) -> impl Iterator<Item = GfnRange> + use<> {
    let granule = space.shared(piece.slot).map_or(1, |slice| slice.backing.granule() >> PAGE_SHIFT).max(1);
    let unit = chunk.checked_next_multiple_of(granule).unwrap_or(granule);
    let ahead = (piece.offset >> PAGE_SHIFT).checked_rem(granule).unwrap_or(0);
    let at = piece.gfns.start().checked_add(unit.saturating_sub(ahead)).unwrap_or(Gfn::MAX).min(piece.gfns.end());
    let (first, rest) = piece.gfns.split_at(at).unwrap_or((piece.gfns, GfnRange::empty_at(piece.gfns.end())));
    std::iter::once(first).chain(rest.split_every(unit))
}
