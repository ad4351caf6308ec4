//! Operations, and what each does to the memory that there is to be.

use crate::addr::{Gfn, GfnRange};
use crate::layout::SlotFlags;

use super::error::Reason;
use super::pieces::{Piece, Pieces, Was, check_region};
use super::region::Region;

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

impl Pieces {
    /// Applies one operation, or leaves everything as it was.
    pub(super) fn apply(&mut self, op: &Operation) -> Result<(), Reason> {
        match op {
            Operation::Create(region) => {
                check_region(region)?;
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
                    let added = piece.region.following(more).filter(Region::ends).ok_or(wraps)?;
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
            piece.was = Was::Unknown;
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
            piece.was = Was::Unknown;
        }
        Ok(())
    }

    /// Regions in any order. Slots that are there may stay as they are.
    fn described(regions: &[Region]) -> Result<Self, Reason> {
        let mut sorted: Vec<Piece> = regions.iter().copied().map(Piece::new).collect();
        sorted.sort_by_key(|piece| piece.gfns().start());
        let mut end = Gfn::ZERO;
        for piece in &sorted {
            check_region(&piece.region)?;
            if piece.gfns().start() < end {
                let (start, end) = (piece.gfns().start(), end.min(piece.gfns().end()));
                return Err(Reason::Occupied { gfns: GfnRange::new(start, end).unwrap_or(piece.gfns()) });
            }
            end = piece.gfns().end();
        }
        Ok(Self(sorted))
    }
}
