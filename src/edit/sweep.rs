//! Many creations and deletions at once: one sort and one sweep instead of an insertion each.
//!
//! Works where no frame is touched by more than a deletion and a creation after it, and everything is as it should be; it
//! gives up otherwise, and the operations are applied one by one, which also finds out what is wrong.

use crate::addr::{Gfn, GfnRange};

use super::operation::Operation;
use super::pieces::{Piece, Pieces, Was};

/// Bits of a key that say which operation it is.
const AT_BITS: u32 = 23;
/// Above them, bits that say where it begins. No processor has more frames.
const START_BITS: u32 = 40;
/// Above those, whether it creates: all deletions come before all creations.
const CREATES: u64 = 1 << (AT_BITS + START_BITS);

/// What an operation is, where it begins, and which one it is, in one word: nothing else is sorted, for operations are large.
pub(super) fn key(op: &Operation, at: usize) -> Option<u64> {
    let (gfns, kind) = match op {
        Operation::Delete(gfns) => (gfns, 0),
        Operation::Create(region) if region.ends() => (&region.gfns, CREATES),
        _ => return None,
    };
    let (start, at) = (gfns.start().get(), u64::try_from(at).ok()?);
    let fits = start >> START_BITS == 0 && at >> AT_BITS == 0 && !gfns.is_empty();
    fits.then_some(kind | start << AT_BITS | at)
}

/// Where the operation of a key begins.
const fn start(key: u64) -> u64 {
    (key & !CREATES) >> AT_BITS
}

/// Which operation a key is of.
fn at(key: u64) -> Option<usize> {
    usize::try_from(key & ((1 << AT_BITS) - 1)).ok()
}

/// Frames to be deleted, and by which operation.
type Hole = (GfnRange, usize);

/// The pieces after `ops`, or `None` if these are not for it. Frames that are in none of `pieces` were `bare`.
pub(super) fn sweep(pieces: impl ExactSizeIterator<Item = Piece>, bare: Was, ops: &[Operation]) -> Option<Pieces> {
    let mut keys: Vec<u64> = Vec::with_capacity(ops.len());
    for (at, op) in ops.iter().enumerate() {
        keys.push(key(op, at)?);
    }
    // Those that begin alike stay in their order. Nothing foretells what a comparison gives, so there is none.
    radsort::sort_by_key(&mut keys, |key| key >> AT_BITS);
    let (deletions, creations) = keys.split_at_checked(keys.partition_point(|key| *key < CREATES))?;
    let hole = |key: &u64| match ops.get(at(*key)?)? {
        Operation::Delete(gfns) => Some((*gfns, at(*key)?)),
        _ => None,
    };
    let mut holes: Vec<(GfnRange, usize)> = Vec::with_capacity(deletions.len());
    holes.extend(deletions.iter().filter_map(hole));

    let mut swept = Swept {
        ops,
        bare,
        pieces: Vec::with_capacity(pieces.len().saturating_add(creations.len())),
        end: Gfn::ZERO,
        passed: &holes,
    };
    let (mut going, mut coming) = (holes.iter().peekable(), creations.iter().copied().peekable());
    // Up to here the hole in hand has found memory.
    let mut found = Gfn::ZERO;
    // The frame after the last one deleted, at which the memory above has lost its neighbour.
    let mut parted = None;
    for old in pieces {
        let gfns = old.gfns();
        if let Some((hole, _)) = going.peek().filter(|(hole, _)| hole.start() <= gfns.start()) {
            // A piece goes as a whole or not at all, and nothing goes that is not there.
            if found.max(hole.start()) != gfns.start() || gfns.end() > hole.end() {
                return None;
            }
            found = gfns.end();
            if found == hole.end() {
                parted = Some(found);
                found = Gfn::ZERO;
                going.next();
            }
            continue;
        }
        while let Some(new) = coming.next_if(|new| start(*new) < gfns.start().get()) {
            swept.create(new)?;
        }
        swept.put(gfns, Piece { cut: old.cut && parted != Some(gfns.start()), ..old })?;
    }
    coming.try_for_each(|new| swept.create(new))?;
    going.peek().is_none().then_some(Pieces(swept.pieces))
}

/// The pieces so far, ascending.
struct Swept<'a> {
    ops: &'a [Operation],
    bare: Was,
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
        let mut was = self.bare;
        for (_, by) in self.passed.iter().take_while(|(hole, _)| hole.start() < gfns.end()) {
            if *by > at {
                return None;
            }
            was = Was::Unknown;
        }
        self.put(gfns, Piece { was, ..Piece::new(*region) })
    }
}
