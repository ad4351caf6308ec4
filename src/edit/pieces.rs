//! The layout as an edit would have it: regions, ascending, and where slots must or must not end.

use crate::addr::{Gfn, GfnRange};

use super::error::Reason;
use super::region::Region;

/// A region, how it may be cut into slots, and what it was.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) region: Region,
    /// A slot must begin here even if the memory below continues.
    pub(super) cut: bool,
    /// No slot may begin or end within: it was asked to be one.
    pub(super) whole: bool,
    /// Says nothing about the layout to be: it saves looking it up in the one that is.
    pub(super) was: Was,
}

/// What a piece was before the edit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Was {
    /// The slot at this position, exactly as it is.
    Slot(u16),
    /// Frames without memory, all of them.
    Nothing,
    /// Nobody has kept track.
    Unknown,
}

impl PartialEq for Piece {
    fn eq(&self, other: &Self) -> bool {
        (self.region, self.cut, self.whole) == (other.region, other.cut, other.whole)
    }
}

impl Eq for Piece {}

impl Piece {
    pub(super) const fn new(region: Region) -> Self {
        Self { region, cut: false, whole: false, was: Was::Unknown }
    }

    pub(super) const fn gfns(&self) -> GfnRange {
        self.region.gfns
    }

    /// Whether it and the piece above it could be one slot.
    pub(super) fn joins(&self, above: &Self) -> bool {
        !above.cut && self.region.continues(&above.region)
    }

    fn part(&self, gfns: GfnRange) -> Option<Self> {
        if self.gfns() == gfns {
            return Some(*self);
        }
        let cut = self.cut && gfns.start() == self.gfns().start();
        Some(Self { region: self.region.part(gfns)?, cut, whole: self.whole, was: Was::Unknown })
    }
}

/// Disjoint pieces, ascending.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pieces(pub(super) Vec<Piece>);

impl Pieces {
    /// The pieces that have a frame of `gfns`, as positions.
    fn span(&self, gfns: GfnRange) -> std::ops::Range<usize> {
        let low = self.0.partition_point(|piece| piece.gfns().end() <= gfns.start());
        let high = self.0.partition_point(|piece| piece.gfns().start() < gfns.end());
        low..high.max(low)
    }

    fn within(&self, gfns: GfnRange) -> &[Piece] {
        self.0.get(self.span(gfns)).unwrap_or_default()
    }

    /// The piece that has `gfn`.
    pub(super) fn at(&self, gfn: Gfn) -> Result<Piece, Reason> {
        let found = self.within(GfnRange::page(gfn)).first();
        found.copied().ok_or(Reason::NotMemory { gfns: GfnRange::page(gfn) })
    }

    /// That all of `gfns` is memory.
    pub(super) fn check_memory(&self, gfns: GfnRange) -> Result<(), Reason> {
        check_some(gfns)?;
        let mut next = gfns.start();
        for piece in self.within(gfns) {
            if piece.gfns().start() > next {
                break;
            }
            next = piece.gfns().end();
        }
        if next >= gfns.end() {
            return Ok(());
        }
        let hole = self.0.get(self.0.partition_point(|piece| piece.gfns().start() <= next));
        let end = hole.map_or(gfns.end(), |piece| piece.gfns().start().min(gfns.end()));
        Err(Reason::NotMemory { gfns: GfnRange::new(next, end).unwrap_or(gfns) })
    }

    /// That none of `gfns` is memory.
    pub(super) fn check_free(&self, gfns: GfnRange) -> Result<(), Reason> {
        check_some(gfns)?;
        match self.within(gfns).first() {
            Some(piece) => Err(Reason::Occupied { gfns: piece.gfns().intersection(&gfns).unwrap_or(gfns) }),
            None => Ok(()),
        }
    }

    /// That `gfns` begins and ends where pieces do.
    pub(super) fn check_whole(&self, gfns: GfnRange) -> Result<(), Reason> {
        for piece in self.within(gfns) {
            if !gfns.contains_range(&piece.gfns()) {
                let part = piece.gfns().intersection(&gfns).unwrap_or(gfns);
                return Err(Reason::Partial { slot: piece.gfns(), part });
            }
        }
        Ok(())
    }

    /// Takes `gfns` out, and returns what was there. What lay on both sides has no neighbour any more.
    pub(super) fn take(&mut self, gfns: GfnRange) -> Vec<Piece> {
        let span = self.span(gfns);
        let old = self.0.get(span.clone()).unwrap_or_default().to_vec();
        let mut left = Vec::new();
        for piece in &old {
            left.extend(piece.gfns().subtract(&gfns).filter_map(|rest| piece.part(rest)));
        }
        let end = span.start.saturating_add(left.len());
        self.0.splice(span, left);
        if let Some(next) = self.0.get_mut(end).filter(|next| next.gfns().start() == gfns.end()) {
            next.cut = false;
        }
        // The upper part of a piece begins at the end of the hole; it has never been cut there.
        old.iter().filter_map(|piece| piece.part(piece.gfns().intersection(&gfns)?)).collect()
    }

    /// Puts pieces, ascending, where nothing is.
    pub(super) fn put(&mut self, pieces: impl IntoIterator<Item = Piece>) {
        let pieces: Vec<Piece> = pieces.into_iter().collect();
        let Some(first) = pieces.first() else { return };
        let at = self.0.partition_point(|piece| piece.gfns().end() <= first.gfns().start());
        self.0.splice(at..at, pieces);
    }

    /// Cuts the piece across `at`, if there is one, in two that may be one slot again.
    pub(super) fn part_at(&mut self, at: Gfn) {
        let position = self.0.partition_point(|piece| piece.gfns().end() <= at);
        let Some(piece) = self.0.get(position).filter(|piece| piece.gfns().start() < at).copied() else { return };
        let parts = piece.gfns().split_at(at);
        let parts = parts.and_then(|(low, high)| Some([piece.part(low)?, piece.part(high)?]));
        if let Some(mut parts) = parts {
            parts.iter_mut().for_each(|part| part.whole = false);
            self.0.splice(position..=position, parts);
        }
    }

    /// A slot must begin at `at`.
    pub(super) fn cut(&mut self, at: Gfn) {
        self.part_at(at);
        let position = self.0.partition_point(|piece| piece.gfns().start() < at);
        if let Some(piece) = self.0.get_mut(position) {
            piece.cut = true;
        }
    }

    /// Makes one piece of all in `gfns`.
    pub(super) fn join(&mut self, gfns: GfnRange) -> Result<(), Reason> {
        let span = self.span(gfns);
        let pieces = self.0.get(span.clone()).unwrap_or_default();
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return Ok(()) };
        for (low, high) in pieces.iter().zip(pieces.iter().skip(1)) {
            if !low.region.continues(&high.region) {
                return Err(Reason::NotMergeable { at: high.gfns().start() });
            }
        }
        let gfns = first.gfns().hull(&last.gfns());
        let joined = Piece { region: Region { gfns, ..first.region }, cut: first.cut, whole: true, was: Was::Unknown };
        self.0.splice(span, [joined]);
        Ok(())
    }

    /// The pieces that have a frame of `gfns`, to be changed in place.
    pub(super) fn within_mut(&mut self, gfns: GfnRange) -> &mut [Piece] {
        let span = self.span(gfns);
        self.0.get_mut(span).unwrap_or_default()
    }
}

/// That it has pages, and an address and a file page behind each.
pub(super) fn check_region(region: &Region) -> Result<(), Reason> {
    let gfns = region.gfns;
    check_some(gfns)?;
    if region.ends() { Ok(()) } else { Err(Reason::Wraps { at: gfns.start(), pages: gfns.pages() }) }
}

pub(super) fn check_some(gfns: GfnRange) -> Result<(), Reason> {
    if gfns.is_empty() { Err(Reason::Empty { at: gfns.start() }) } else { Ok(()) }
}
