//! Many creations and deletions at once: one sort and one sweep instead of an insertion each.
//!
//! Works where no frame is touched by more than a deletion and a creation after it, and everything is as it should be; it
//! gives up otherwise, and the operations are applied one by one, which also finds out what is wrong.

use crate::addr::Gfn;

use super::draft::Operation;
use super::pieces::{Piece, Pieces};

/// Where an operation begins, and which one it is.
type Key = (Gfn, usize);

/// The pieces after `ops`, or `None` if these are not for it.
pub(super) fn sweep(pieces: &Pieces, ops: &[Operation]) -> Option<Pieces> {
    let (mut deletions, mut creations): (Vec<Key>, Vec<Key>) = (Vec::new(), Vec::new());
    for (at, op) in ops.iter().enumerate() {
        match op {
            Operation::Delete(gfns) if !gfns.is_empty() => deletions.push((gfns.start(), at)),
            Operation::Create(region) if !region.gfns.is_empty() => creations.push((region.gfns.start(), at)),
            _ => return None,
        }
    }
    deletions.sort_unstable();
    creations.sort_unstable();
    // Only keys are sorted: operations are large.
    let hole = |(_, at): &Key| match ops.get(*at) {
        Some(Operation::Delete(gfns)) => Some((*at, *gfns)),
        _ => None,
    };
    let piece = |(_, at): &Key| match ops.get(*at) {
        Some(Operation::Create(region)) => Some((*at, Piece::new(*region))),
        _ => None,
    };

    let mut swept = Vec::with_capacity(pieces.0.len().saturating_add(creations.len()));
    let (mut old, mut created) = (pieces.0.iter().copied().peekable(), creations.iter().filter_map(piece).peekable());
    let (mut deleted, mut deleted_again) =
        (deletions.iter().filter_map(hole).peekable(), deletions.iter().filter_map(hole).peekable());
    // The frame after the last one deleted, at which the memory above has lost its neighbour.
    let mut bare = None;
    // Up to here a deletion wants to find memory.
    let mut found = Gfn::ZERO;
    let mut end = Gfn::ZERO;
    loop {
        let next_old = old.peek().map(Piece::gfns);
        // Deletions end where pieces do, so that a piece goes as a whole or not at all.
        if let Some(gfns) = next_old
            && let Some((_, hole)) = deleted.peek()
            && hole.start() <= gfns.start()
        {
            let start = found.max(hole.start());
            if start != gfns.start() || gfns.end() > hole.end() {
                return None;
            }
            found = gfns.end();
            old.next();
            if found == hole.end() {
                bare = Some(found);
                found = Gfn::ZERO;
                deleted.next();
            }
            continue;
        }
        let next_new = created.peek().map(|(_, piece)| piece.gfns());
        let mut piece = match (next_old, next_new) {
            (None, None) => break,
            (Some(low), Some(new)) if low.start() < new.start() => old.next()?,
            (Some(_), None) => old.next()?,
            (_, Some(_)) => {
                let (at, piece) = created.next()?;
                // What is deleted here must have been deleted before.
                while deleted_again.next_if(|(_, hole)| hole.end() <= piece.gfns().start()).is_some() {}
                for (by, hole) in deleted_again.clone() {
                    if hole.start() >= piece.gfns().end() {
                        break;
                    }
                    if by > at {
                        return None;
                    }
                }
                piece
            }
        };
        if piece.gfns().start() < end {
            return None;
        }
        if bare == Some(piece.gfns().start()) {
            piece.cut = false;
        }
        end = piece.gfns().end();
        swept.push(piece);
    }
    deleted.peek().is_none().then_some(Pieces(swept))
}
