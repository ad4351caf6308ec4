//! Many creations and deletions at once: one sort and one sweep instead of an insertion each.
//!
//! Works where no frame is touched by more than a deletion and a creation after it, and everything is as it should be; it
//! gives up otherwise, and the operations are applied one by one, which also finds out what is wrong.

use crate::addr::{Gfn, GfnRange};

use super::operation::Operation;
use super::pieces::{Piece, Pieces};

/// Bits of a key that say which operation it is; those above say where it begins. No processor has frames that do not fit.
const AT_BITS: u32 = 24;

/// Where an operation begins and which one it is, in one word: nothing else is sorted, for operations are large.
fn key(start: Gfn, at: usize) -> Option<u64> {
    let at = u64::try_from(at).ok().filter(|at| at >> AT_BITS == 0)?;
    (start.get() >> (u64::BITS - AT_BITS) == 0).then_some(start.get() << AT_BITS | at)
}

/// Where the operation of a key begins.
const fn start(key: u64) -> u64 {
    key >> AT_BITS
}

/// Which operation a key is of.
fn at(key: u64) -> Option<usize> {
    usize::try_from(key & ((1 << AT_BITS) - 1)).ok()
}

/// Frames to be deleted, and by which operation.
type Hole = (GfnRange, usize);

/// The pieces after `ops`, or `None` if these are not for it.
pub(super) fn sweep(pieces: impl ExactSizeIterator<Item = Piece>, ops: &[Operation]) -> Option<Pieces> {
    let (mut deletions, mut creations) = (Vec::with_capacity(ops.len()), Vec::with_capacity(ops.len()));
    for (at, op) in ops.iter().enumerate() {
        match op {
            Operation::Delete(gfns) if !gfns.is_empty() => deletions.push(key(gfns.start(), at)?),
            Operation::Create(region) if !region.gfns.is_empty() => creations.push(key(region.gfns.start(), at)?),
            _ => return None,
        }
    }
    deletions.sort_unstable();
    creations.sort_unstable();
    let hole = |key: &u64| match ops.get(at(*key)?)? {
        Operation::Delete(gfns) => Some((*gfns, at(*key)?)),
        _ => None,
    };
    let mut holes: Vec<(GfnRange, usize)> = Vec::with_capacity(deletions.len());
    holes.extend(deletions.iter().filter_map(hole));

    let mut swept = Swept {
        ops,
        pieces: Vec::with_capacity(pieces.len().saturating_add(creations.len())),
        end: Gfn::ZERO,
        passed: &holes,
    };
    let (mut going, mut coming) = (holes.iter().peekable(), creations.iter().copied().peekable());
    // Up to here the hole in hand has found memory.
    let mut found = Gfn::ZERO;
    // The frame after the last one deleted, at which the memory above has lost its neighbour.
    let mut bare = None;
    for old in pieces {
        let gfns = old.gfns();
        if let Some((hole, _)) = going.peek().filter(|(hole, _)| hole.start() <= gfns.start()) {
            // A piece goes as a whole or not at all, and nothing goes that is not there.
            if found.max(hole.start()) != gfns.start() || gfns.end() > hole.end() {
                return None;
            }
            found = gfns.end();
            if found == hole.end() {
                bare = Some(found);
                found = Gfn::ZERO;
                going.next();
            }
            continue;
        }
        while let Some(new) = coming.next_if(|new| start(*new) < gfns.start().get()) {
            swept.create(new)?;
        }
        swept.put(gfns, Piece { cut: old.cut && bare != Some(gfns.start()), ..old })?;
    }
    coming.try_for_each(|new| swept.create(new))?;
    going.peek().is_none().then_some(Pieces(swept.pieces))
}

/// The pieces so far, ascending.
struct Swept<'a> {
    ops: &'a [Operation],
    pieces: Vec<Piece>,
    /// Where the last of them ends.
    end: Gfn,
    /// The holes that end above what has been created last.
    passed: &'a [Hole],
}

impl Swept<'_> {
    fn put(&mut self, gfns: GfnRange, piece: Piece) -> Option<()> {
        if gfns.start() < self.end {
            return None;
        }
        self.end = gfns.end();
        self.pieces.push(piece);
        Some(())
    }

    /// What was deleted here must have been deleted before.
    fn create(&mut self, key: u64) -> Option<()> {
        let at = at(key)?;
        let Operation::Create(region) = self.ops.get(at)? else { return None };
        let gfns = region.gfns;
        while let Some(((hole, _), above)) = self.passed.split_first()
            && hole.end() <= gfns.start()
        {
            self.passed = above;
        }
        let mut here = self.passed.iter().take_while(|(hole, _)| hole.start() < gfns.end());
        if here.any(|(_, by)| *by > at) {
            return None;
        }
        self.put(gfns, Piece::new(*region))
    }
}
