//! The edit as it is asked for: operations one by one, and the layout that they describe together.
//!
//! Operations take effect in order, each on the layout as those before it have left it, and only what comes out in the end
//! counts: memory that is created and deleted again was never there, what is moved twice is where it was moved last, and
//! what is deleted and created alike has not changed. An operation that makes no sense where it stands is refused, and
//! the draft is as it was before. Nothing here knows KVM.

use std::sync::Arc;

use crate::addr::GfnRange;
use crate::layout::{Layout, Memslot, SlotId, SlotTable};

use super::error::{Label, Reason, Refused};
use super::operation::Operation;
use super::pieces::{Piece, Pieces, Was};
use super::region::Region;
use super::sweep;

/// A layout in the making, for one address space.
///
/// ```
/// use cvm_memory::addr::{Gfn, GfnRange};
/// use cvm_memory::edit::{Draft, Operation, Prefer, plan};
/// use cvm_memory::layout::{Layout, Limits, Memslot, SlotFlags, SlotId};
///
/// let gib = |start: u64, end: u64| GfnRange::from_bytes(start << 30, (end - start) << 30).unwrap();
/// let slot = Memslot { id: SlotId::new(0), gfns: gib(0, 1), hva: 1 << 40, flags: SlotFlags::empty(), binding: None };
/// let layout = Layout::from_slots(Limits::default(), [], [slot])?;
///
/// // The VGA hole: the slot goes, and two come instead.
/// let mut draft = Draft::new(&layout, 0, |slot| slot.hva);
/// draft.apply(Operation::PunchHole(GfnRange::from_bytes(0xa0000, 0x20000)?))?;
/// let plan = plan(&layout, &draft, Prefer::NoInterruption)?;
/// let kinds: Vec<_> = plan.steps.iter().map(|step| step.kind()).collect();
/// assert_eq!(kinds, ["delete", "create", "create"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    pub(super) as_id: u16,
    /// `None` while nothing has been asked for: as the slots are.
    pub(super) pieces: Option<Pieces>,
    pub(super) old: Slots,
    asked: Vec<Asked>,
    name: Option<Arc<str>>,
}

/// Operations that were asked for together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    name: Option<Arc<str>>,
    ops: Vec<Operation>,
}

/// The slots as they are, and in which mappings their memory lies. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slots {
    table: Arc<SlotTable>,
    as_id: u16,
    mappings: Arc<[u64]>,
}

impl Slots {
    /// All of them, ascending by frame.
    pub(super) fn all(&self) -> &[Memslot] {
        self.table.space(self.as_id).slots()
    }

    pub(super) fn get(&self, at: usize) -> Option<&Memslot> {
        self.all().get(at)
    }

    /// The memory of one.
    pub(super) fn region(&self, at: usize) -> Option<Region> {
        Some(Region::of(self.get(at)?, *self.mappings.get(at)?))
    }

    fn regions(&self) -> impl ExactSizeIterator<Item = Region> {
        self.all().iter().zip(self.mappings.iter()).map(|(slot, mapping)| Region::of(slot, *mapping))
    }

    /// As pieces.
    fn pieces(&self) -> impl ExactSizeIterator<Item = Piece> {
        let mut end = None;
        self.regions().enumerate().map(move |(at, region)| {
            // Slots that touch are two because somebody wanted two.
            let cut = end == Some(region.gfns.start());
            end = Some(region.gfns.end());
            Piece { cut, was: u16::try_from(at).map_or(Was::Unknown, Was::Slot), ..Piece::new(region) }
        })
    }
}

impl Draft {
    /// The layout as it is, in address space `as_id`. `mapping` tells in which mapping of this process a slot's shared
    /// memory lies, by that mapping's address.
    pub fn new(layout: &Layout, as_id: u16, mapping: impl Fn(&Memslot) -> u64) -> Self {
        let mappings = layout.table().space(as_id).slots().iter().map(mapping).collect();
        let old = Slots { table: layout.snapshot(), as_id, mappings };
        Self { as_id, pieces: None, old, asked: Vec::new(), name: None }
    }

    /// The address space.
    pub const fn as_id(&self) -> u16 {
        self.as_id
    }

    /// What the operations that follow are called in messages.
    pub fn name(&mut self, name: &str) -> &mut Self {
        self.name = Some(name.into());
        self
    }

    /// The operations so far.
    pub fn operations(&self) -> impl Iterator<Item = &Operation> {
        self.asked.iter().flat_map(|asked| &asked.ops)
    }

    /// The same operations on another layout.
    ///
    /// # Errors
    /// [`Refused`]: the first that cannot be applied to that.
    pub fn replay(&self, layout: &Layout, mapping: impl Fn(&Memslot) -> u64) -> Result<Self, Refused> {
        let mut draft = Self::new(layout, self.as_id, mapping);
        for Asked { name, ops } in &self.asked {
            draft.name.clone_from(name);
            draft.apply_all(ops.clone())?;
        }
        Ok(draft)
    }

    /// What memory there would be, ascending.
    pub fn regions(&self) -> impl Iterator<Item = Region> {
        let as_is = self.pieces.is_none().then(|| self.old.regions());
        as_is.into_iter().flatten().chain(self.pieces.iter().flat_map(|pieces| &pieces.0).map(|piece| piece.region))
    }

    /// The frames of slot `id` as it was before the edit.
    ///
    /// # Errors
    /// [`Reason::UnknownSlot`].
    pub fn slot(&self, id: SlotId) -> Result<GfnRange, Refused> {
        let found = self.old.all().iter().find(|slot| slot.id == id).map(|slot| slot.gfns);
        found.ok_or_else(|| self.refused("slot", Reason::UnknownSlot { id }))
    }

    /// Applies one operation. Takes O(slots).
    ///
    /// # Errors
    /// [`Refused`]; the draft is as it was.
    pub fn apply(&mut self, op: Operation) -> Result<&mut Self, Refused> {
        let untouched = self.pieces.is_none();
        let mut pieces = self.pieces.take().unwrap_or_else(|| Pieces(self.old.pieces().collect()));
        let applied = pieces.apply(&op);
        self.pieces = Some(pieces).filter(|_| applied.is_ok() || !untouched);
        applied.map_err(|reason| self.refused(op.kind(), reason))?;
        self.asked.push(Asked { name: self.name.clone(), ops: vec![op] });
        Ok(self)
    }

    /// Applies operations in order, as [`apply`](Self::apply) would one after the other; all of them or none. Runs of
    /// creations and deletions take one sort, however many they are.
    ///
    /// # Errors
    /// [`Refused`], for one of those at fault; the draft is as it was.
    pub fn apply_all(&mut self, ops: Vec<Operation>) -> Result<&mut Self, Refused> {
        let mut pieces = None;
        let mut rest = ops.as_slice();
        while !rest.is_empty() {
            let run = rest.iter().take_while(|op| matches!(op, Operation::Create(_) | Operation::Delete(_))).count();
            let (batch, later) = rest.split_at_checked(run.max(1)).unwrap_or((rest, &[]));
            let now: Option<&Pieces> = pieces.as_ref().or(self.pieces.as_ref());
            let swept = match now {
                Some(now) => sweep::sweep(now.0.iter().copied(), Was::Unknown, batch),
                None => sweep::sweep(self.old.pieces(), Was::Nothing, batch),
            };
            if swept.is_some() {
                pieces = swept;
            } else {
                let next = pieces.take().or_else(|| self.pieces.clone());
                let mut next = next.unwrap_or_else(|| Pieces(self.old.pieces().collect()));
                for (at, op) in batch.iter().enumerate() {
                    next.apply(op).map_err(|reason| {
                        let before = ops.len().saturating_sub(rest.len()).saturating_add(at);
                        let mut refused = self.refused(op.kind(), reason);
                        refused.label.index = refused.label.index.saturating_add(before);
                        refused
                    })?;
                }
                pieces = Some(next);
            }
            rest = later;
        }
        self.pieces = pieces.or_else(|| self.pieces.take());
        self.asked.push(Asked { name: self.name.clone(), ops });
        Ok(self)
    }

    /// Begins an edit within this one. It counts once it is [kept](Nested::keep); dropped, it never was.
    pub fn begin(&mut self) -> Nested<'_> {
        Nested { draft: self.clone(), outer: self }
    }

    fn refused(&self, kind: &'static str, reason: Reason) -> Refused {
        Refused { label: Label { index: self.operations().count(), kind, name: self.name.clone() }, reason }
    }
}

/// An edit within an edit: a [`Draft`] of its own until it is kept.
#[derive(Debug)]
pub struct Nested<'a> {
    outer: &'a mut Draft,
    draft: Draft,
}

impl Nested<'_> {
    /// Makes it part of the edit in which it began.
    pub fn keep(self) {
        let Self { outer, draft } = self;
        *outer = draft;
    }
}

impl std::ops::Deref for Nested<'_> {
    type Target = Draft;
    fn deref(&self) -> &Draft {
        &self.draft
    }
}

impl std::ops::DerefMut for Nested<'_> {
    fn deref_mut(&mut self) -> &mut Draft {
        &mut self.draft
    }
}
