//! Many creations and deletions at once: one sort and one sweep instead of an insertion each.
//!
//! Works where no frame is touched by more than a deletion and a creation after it, and everything is as it should be; it
//! gives up otherwise, and the operations are applied one by one, which also finds out what is wrong.

use crate::addr::{Gfn, GfnRange};

use super::draft::Operation;
use super::pieces::{Piece, Pieces};

/// What an operation is about, ordered by where it begins and which one it is.
type Keyed<T> = Vec<((Gfn, usize), T)>;

/// The pieces after `ops`, or `None` if these are not for it.
pub(super) fn sweep(pieces: &Pieces, ops: &[Operation]) -> Option<Pieces> {
    let (mut deletions, mut creations): (Keyed<GfnRange>, Keyed<Piece>) = (Vec::new(), Vec::new());
    for (at, op) in ops.iter().enumerate() {
        match op {
            Operation::Delete(gfns) if !gfns.is_empty() => deletions.push(((gfns.start(), at), *gfns)),
            Operation::Create(region) if !region.gfns.is_empty() => {
                creations.push(((region.gfns.start(), at), Piece::new(*region)));
            }
            _ => return None,
        }
    }
    deletions.sort_unstable_by_key(|(key, _)| *key);
    creations.sort_unstable_by_key(|(key, _)| *key);

    let mut swept = Vec::with_capacity(pieces.0.len().saturating_add(creations.len()));
    let (mut old, mut created) = (pieces.0.iter().copied().peekable(), creations.into_iter().peekable());
    let (mut deleted, mut deleted_again) = (deletions.iter().peekable(), deletions.iter().peekable());
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
                let ((_, at), piece) = created.next()?;
                // What is deleted here must have been deleted before.
                while deleted_again.next_if(|(_, hole)| hole.end() <= piece.gfns().start()).is_some() {}
                for ((_, by), hole) in deleted_again.clone() {
                    if hole.start() >= piece.gfns().end() {
                        break;
                    }
                    if *by > at {
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
