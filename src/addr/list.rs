//! Algebra on ascending lists of ranges.
//!
//! Every list here is ascending and disjoint; that is what a page set yields, what a slot table yields, and what each of
//! these functions yields again.

use super::{Frame, PageRange};

/// Joins neighbours that touch or overlap, and drops empty ranges. The input is ascending by start.
///
/// ```
/// use cvm_memory::addr::{merge_adjacent, Gfn, GfnRange};
/// let r = |s, e| GfnRange::new(Gfn::new(s).unwrap(), Gfn::new(e).unwrap()).unwrap();
/// assert_eq!(merge_adjacent([r(0, 1), r(1, 2), r(2, 2), r(3, 4)]), [r(0, 2), r(3, 4)]);
/// ```
pub fn merge_adjacent<F: Frame>(ranges: impl IntoIterator<Item = PageRange<F>>) -> Vec<PageRange<F>> {
    let mut merged: Vec<PageRange<F>> = Vec::new();
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match merged.last_mut() {
            Some(last) if range.start() <= last.end() => *last = last.hull(&range),
            _ => merged.push(range),
        }
    }
    merged
}

/// The pages of `from` that are in no range of `cut`. Both lists are ascending and disjoint.
///
/// ```
/// use cvm_memory::addr::{subtract_lists, Gfn, GfnRange};
/// let r = |s, e| GfnRange::new(Gfn::new(s).unwrap(), Gfn::new(e).unwrap()).unwrap();
/// assert_eq!(subtract_lists(&[r(0, 10)], &[r(2, 3), r(5, 20)]), [r(0, 2), r(3, 5)]);
/// ```
pub fn subtract_lists<F: Frame>(from: &[PageRange<F>], cut: &[PageRange<F>]) -> Vec<PageRange<F>> {
    let mut left = Vec::new();
    let mut cuts = cut.iter().peekable();
    for range in from {
        let mut rest = *range;
        while let Some(hole) = cuts.peek() {
            if hole.end() <= rest.start() {
                cuts.next();
                continue;
            }
            if hole.start() >= rest.end() {
                break;
            }
            if let Some((below, _)) = rest.split_at(hole.start().max(rest.start()))
                && !below.is_empty()
            {
                left.push(below);
            }
            // Not consumed: the next range may meet the same hole.
            match rest.split_at(hole.end().min(rest.end())) {
                Some((_, above)) => rest = above,
                None => break,
            }
            if rest.is_empty() {
                break;
            }
        }
        if !rest.is_empty() {
            left.push(rest);
        }
    }
    left
}

/// The pages in both lists. Both are ascending and disjoint.
///
/// ```
/// use cvm_memory::addr::{intersect_lists, Gfn, GfnRange};
/// let r = |s, e| GfnRange::new(Gfn::new(s).unwrap(), Gfn::new(e).unwrap()).unwrap();
/// assert_eq!(intersect_lists(&[r(0, 4), r(6, 9)], &[r(2, 7)]), [r(2, 4), r(6, 7)]);
/// ```
pub fn intersect_lists<F: Frame>(a: &[PageRange<F>], b: &[PageRange<F>]) -> Vec<PageRange<F>> {
    let mut both = Vec::new();
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        if let Some(common) = x.intersection(y) {
            both.push(common);
        }
        if x.end() < y.end() {
            a.next();
        } else {
            b.next();
        }
    }
    both
}
