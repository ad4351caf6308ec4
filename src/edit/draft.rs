//! The edit as it is asked for: operations one by one, and the layout that they describe together.
//!
//! Operations take effect in order, each on the layout as those before it have left it, and only what comes out in the end
//! counts: memory that is created and deleted again was never there, what is moved twice is where it was moved last, and
//! what is deleted and created alike has not changed. An operation that makes no sense where it stands is refused, and
//! the draft is as it was before. Nothing here knows KVM.

use std::sync::Arc;

use crate::addr::{Gfn, GfnRange};
use crate::layout::{Layout, Memslot, SlotFlags, SlotId};

use super::error::{Label, Reason, Refused};
use super::pieces::{Piece, Pieces, check_some};
use super::region::Region;
use super::sweep;

/// One operation on a layout. Frames are what memory is called by; slots and their ids follow from the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Memory where there is none.
    Create(Region),
    /// Takes whole slots away.
    Delete(GfnRange),
    /// Takes memory away, whichever slots it is part of.
    PunchHole(GfnRange),
    /// Memory appears elsewhere: the first frame of `from` at `to`.
    Move {
        /// The frames, of any number of slots.
        from: GfnRange,
        /// The first frame afterwards.
        to: Gfn,
    },
    /// Flags of memory that stays: `LOG_DIRTY` and `READONLY`. Whether it has private memory is not a matter of choice.
    SetFlags(GfnRange, SlotFlags),
    /// A slot must begin here.
    Split(Gfn),
    /// All of this must be one slot.
    Merge(GfnRange),
    /// The slot that covers `of` keeps its first pages.
    Truncate {
        /// Any of its frames.
        of: Gfn,
        /// So many are left.
        pages: u64,
    },
    /// The memory that covers `of` goes on: shared and private memory follow right behind what it has.
    Grow {
        /// Any of its frames.
        of: Gfn,
        /// So many it has then.
        pages: u64,
    },
    /// Everything is as it is described here.
    ReplaceAll(Vec<Region>),
}

impl Operation {
    /// What it is called in messages.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Delete(_) => "delete",
            Self::PunchHole(_) => "punch hole",
            Self::Move { .. } => "move",
            Self::SetFlags(..) => "set flags",
            Self::Split(_) => "split",
            Self::Merge(_) => "merge",
            Self::Truncate { .. } => "truncate",
            Self::Grow { .. } => "grow",
            Self::ReplaceAll(_) => "replace all",
        }
    }
}

/// A layout in the making, for one address space.
///
/// ```
/// use cvm_memory::addr::{Gfn, GfnRange};
/// use cvm_memory::edit::{Draft, Operation, Prefer, plan};
/// use cvm_memory::layout::{Layout, Limits, Memslot, SlotFlags, SlotId};
///
/// let gib = |start, end| GfnRange::from_bytes(start << 30, (end - start) << 30).unwrap();
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
    pub(super) pieces: Pieces,
    /// The slots as they are, and the mappings of their memory.
    pub(super) old: Arc<Vec<Old>>,
    asked: Vec<Asked>,
    name: Option<Arc<str>>,
}

/// Operations that were asked for together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    name: Option<Arc<str>>,
    ops: Vec<Operation>,
}

/// A slot as it is, and its mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Old {
    pub(super) id: SlotId,
    pub(super) region: Region,
}

impl Draft {
    /// The layout as it is, in address space `as_id`. `mapping` tells in which mapping of this process a slot's shared
    /// memory lies, by that mapping's address.
    pub fn new(layout: &Layout, as_id: u16, mapping: impl Fn(&Memslot) -> u64) -> Self {
        let slots = layout.table().space(as_id).slots();
        let old: Vec<Old> =
            slots.iter().map(|slot| Old { id: slot.id, region: Region::of(slot, mapping(slot)) }).collect();
        let mut pieces: Vec<Piece> = old.iter().map(|old| Piece::new(old.region)).collect();
        let mut end = None;
        for piece in &mut pieces {
            // Slots that touch are two because somebody wanted two.
            piece.cut = end == Some(piece.gfns().start());
            end = Some(piece.gfns().end());
        }
        Self { as_id, pieces: Pieces(pieces), old: Arc::new(old), asked: Vec::new(), name: None }
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
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.pieces.0.iter().map(|piece| &piece.region)
    }

    /// The frames of slot `id` as it was before the edit.
    ///
    /// # Errors
    /// [`Reason::UnknownSlot`].
    pub fn slot(&self, id: SlotId) -> Result<GfnRange, Refused> {
        let found = self.old.iter().find(|old| old.id == id).map(|old| old.region.gfns);
        found.ok_or_else(|| self.refused("slot", Reason::UnknownSlot { id }))
    }

    /// Applies one operation. Takes O(slots).
    ///
    /// # Errors
    /// [`Refused`]; the draft is as it was.
    pub fn apply(&mut self, op: Operation) -> Result<&mut Self, Refused> {
        self.pieces.apply(&op).map_err(|reason| self.refused(op.kind(), reason))?;
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
            let now = pieces.as_ref().unwrap_or(&self.pieces);
            if let Some(swept) = sweep::sweep(now, batch) {
                pieces = Some(swept);
            } else {
                let mut next = now.clone();
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
        if let Some(pieces) = pieces {
            self.pieces = pieces;
        }
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

impl Pieces {
    /// Applies one operation, or leaves everything as it was.
    fn apply(&mut self, op: &Operation) -> Result<(), Reason> {
        match op {
            Operation::Create(region) => {
                self.check_free(region.gfns)?;
                self.put([Piece::new(*region)]);
            }
            Operation::Delete(gfns) => {
                self.check_memory(*gfns)?;
                self.check_whole(*gfns)?;
                self.take(*gfns);
            }
            Operation::PunchHole(gfns) => {
                self.check_memory(*gfns)?;
                self.take(*gfns);
            }
            Operation::Move { from, to } => self.shift(*from, *to)?,
            Operation::SetFlags(gfns, flags) => self.set_flags(*gfns, *flags)?,
            Operation::Split(at) => {
                self.at(*at)?;
                self.cut(*at);
            }
            Operation::Merge(gfns) => {
                self.check_memory(*gfns)?;
                self.join(*gfns)?;
            }
            Operation::Truncate { of, pages } => {
                let piece = self.at(*of)?;
                let now = piece.gfns().pages();
                if *pages == 0 || *pages > now {
                    return Err(Reason::Length { now, wanted: *pages });
                }
                let end = piece.gfns().start().checked_add(*pages).unwrap_or(piece.gfns().end());
                if let Some((_, gone)) = piece.gfns().split_at(end).filter(|(_, gone)| !gone.is_empty()) {
                    self.take(gone);
                }
            }
            Operation::Grow { of, pages } => {
                let piece = self.at(*of)?;
                let now = piece.gfns().pages();
                let more = pages.checked_sub(now).ok_or(Reason::Length { now, wanted: *pages })?;
                if more != 0 {
                    let wraps = Reason::Wraps { at: piece.gfns().end(), pages: more };
                    let added = piece.region.following(more).ok_or(wraps)?;
                    self.check_free(added.gfns)?;
                    self.put([Piece::new(added)]);
                }
            }
            Operation::ReplaceAll(regions) => *self = Self::described(regions)?,
        }
        Ok(())
    }

    fn shift(&mut self, from: GfnRange, to: Gfn) -> Result<(), Reason> {
        self.check_memory(from)?;
        let wraps = Reason::Wraps { at: to, pages: from.pages() };
        let target = GfnRange::with_len(to, from.pages()).map_err(|_| wraps)?;
        if target == from {
            return Ok(());
        }
        for taken in target.subtract(&from).filter(|gfns| !gfns.is_empty()) {
            self.check_free(taken)?;
        }
        let mut taken = self.take(from);
        // Whatever lies below it now, it has not been cut from that.
        if let Some(first) = taken.first_mut() {
            first.cut = false;
        }
        for piece in &mut taken {
            let gfns = piece.gfns().rebase(from.start(), to).ok_or(wraps)?;
            piece.region.gfns = gfns;
        }
        self.put(taken);
        Ok(())
    }

    fn set_flags(&mut self, gfns: GfnRange, flags: SlotFlags) -> Result<(), Reason> {
        let known = SlotFlags::LOG_DIRTY | SlotFlags::READONLY;
        if !known.contains(flags) {
            return Err(Reason::Flags { flags });
        }
        self.check_memory(gfns)?;
        self.part_at(gfns.start());
        self.part_at(gfns.end());
        for piece in self.within_mut(gfns) {
            piece.region.flags = flags | (piece.region.flags & SlotFlags::GUEST_MEMFD);
        }
        Ok(())
    }

    /// Regions in any order. Slots that are there may stay as they are.
    fn described(regions: &[Region]) -> Result<Self, Reason> {
        let mut sorted: Vec<Piece> = regions.iter().copied().map(Piece::new).collect();
        sorted.sort_by_key(|piece| piece.gfns().start());
        let mut end = Gfn::ZERO;
        for piece in &sorted {
            check_some(piece.gfns())?;
            if piece.gfns().start() < end {
                let (start, end) = (piece.gfns().start(), end.min(piece.gfns().end()));
                return Err(Reason::Occupied { gfns: GfnRange::new(start, end).unwrap_or(piece.gfns()) });
            }
            end = piece.gfns().end();
        }
        Ok(Self(sorted))
    }
}
