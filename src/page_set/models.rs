//! Loom's models of the page set: every interleaving of a few threads, with the orderings the code asks for.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --lib page_set`. A chunk has two leaf words here, and there are two
//! stripes; the code is otherwise the one that ships.

use loom::sync::Arc;
use loom::thread;

use super::*;

const CHUNK: u64 = PAGES_PER_CHUNK;

fn gfn(n: u64) -> Gfn {
    Gfn::new(n).unwrap()
}

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(gfn(start), gfn(end)).unwrap()
}

fn page(n: u64) -> GfnRange {
    GfnRange::page(gfn(n))
}

fn chunk(n: u64) -> GfnRange {
    range(n * CHUNK, (n + 1) * CHUNK)
}

/// A set of two chunks with these members.
fn set_holding(ranges: &[GfnRange]) -> Arc<PageSet> {
    let set = PageSet::new(2 * CHUNK).unwrap();
    ranges.iter().for_each(|range| set.insert(*range).unwrap());
    Arc::new(set)
}

/// What one thread does to the set.
type Role = std::sync::Arc<dyn Fn(&PageSet) + Send + Sync>;

fn role(acts: impl Fn(&PageSet) + Send + Sync + 'static) -> Role {
    std::sync::Arc::new(acts)
}

fn writer(changes: &[(GfnRange, bool)]) -> Role {
    let changes = changes.to_vec();
    role(move |set| changes.iter().for_each(|&(range, value)| set.set(range, value).unwrap()))
}

/// Asks for page `n` twice, and may not be told `first` and then the contrary.
fn reader_never_told(n: u64, first: bool) -> Role {
    role(move |set| assert_ne!([set.contains(gfn(n)), set.contains(gfn(n))], [first, !first]))
}

/// Explores every interleaving of `roles` on a set of two chunks that held `before`, and judges the set left behind.
///
/// Each role in turn is given to the first thread: loom derives where to switch from the last access to a word alone,
/// so a load that the same thread follows up by a swap hides what went before. Three roles are explored up to three
/// forced switches, two without bound.
fn explore(before: &[GfnRange], roles: &[Role], after: impl Fn(&PageSet) + Send + Sync + 'static) {
    let after = role(after);
    for turn in 0..roles.len() {
        for backwards in [false, true] {
            let (before, after, mut roles) = (before.to_vec(), after.clone(), roles.to_vec());
            roles.rotate_left(turn);
            roles[1..].reverse();
            if backwards && roles.len() < 3 {
                continue;
            }
            let mut builder = loom::model::Builder::new();
            builder.preemption_bound = (roles.len() > 2).then_some(3);
            builder.check(move || {
                let set = set_holding(&before);
                let others: Vec<_> = roles[1..]
                    .iter()
                    .cloned()
                    .map(|role| {
                        let set = Arc::clone(&set);
                        thread::spawn(move || role(&set))
                    })
                    .collect();
                roles[0](&set);
                others.into_iter().for_each(|thread| thread.join().unwrap());
                after(&set);
            });
        }
    }
}

/// Expansion leaves the pages that are not its own alone, however far it got: both states of the chunk.
#[test]
fn an_expansion_is_not_seen_on_other_pages() {
    for value in [false, true] {
        let reads = role(move |set| {
            assert_eq!(set.contains(gfn(CHUNK - 1)), value);
            assert_eq!(set.contains(gfn(2)), value);
        });
        let before = range(0, if value { CHUNK } else { 0 });
        explore(&[before], &[writer(&[(page(3), !value)]), reads], move |set| {
            assert_eq!([set.contains(gfn(3)), set.contains(gfn(2))], [!value, value]);
        });
    }
}

/// The chunk collapses as the one page in it goes, and is expanded for another: a page changes once for every reader.
#[test]
fn a_refilled_leaf_shows_current_states() {
    let changes = writer(&[(page(3), false), (page(70), true)]);
    for reader in [reader_never_told(70, true), reader_never_told(3, false)] {
        explore(&[page(3)], &[changes.clone(), reader], |set| assert_eq!(set.count(range(0, 2 * CHUNK)), 1));
    }
}

/// Mixed, uniform, and mixed again on the other side: the stale reader of the first sees the second's pages right.
#[test]
fn a_page_does_not_go_back_when_the_chunk_changes_sides() {
    let changes = writer(&[(chunk(0), true), (page(70), false)]);
    let stays = role(|set| assert!(set.contains(gfn(3))));
    for reader in [reader_never_told(4, true), stays] {
        explore(&[page(3)], &[changes.clone(), reader], |set| assert_eq!(set.count(chunk(0)), CHUNK - 1));
    }
}

/// A page's own change shows only once the chunk is mixed: not early through a stale tag and gone again.
#[test]
fn a_change_is_not_seen_before_it_is_published() {
    let changes = writer(&[(chunk(0), false), (page(4), true)]);
    explore(&[page(3)], &[changes, reader_never_told(4, true)], |set| assert!(set.contains(gfn(4))));
}

#[test]
fn two_writers_in_one_chunk_lose_nothing() {
    let roles = [writer(&[(page(2), true), (page(1), false)]), writer(&[(page(3), true)])];
    explore(&[page(1)], &roles, |set| {
        assert_eq!(set.member_runs(chunk(0)).collect::<Vec<_>>(), [range(2, 4)]);
    });
}

/// The last page out collapses the chunk while another comes in.
#[test]
fn a_collapse_loses_no_page_that_comes_in() {
    let roles = [writer(&[(page(1), false)]), writer(&[(page(70), true)])];
    explore(&[page(1)], &roles, |set| {
        assert_eq!(set.member_runs(chunk(0)).collect::<Vec<_>>(), [page(70)]);
    });
}

/// Neighbouring chunks have different stripes and one tag word.
#[test]
fn neighbours_in_a_tag_word_lose_nothing() {
    let roles = [writer(&[(page(1), true), (page(1), false)]), writer(&[(page(CHUNK), true), (chunk(1), true)])];
    explore(&[], &roles, |set| {
        assert_eq!(set.member_runs(range(0, 2 * CHUNK)).collect::<Vec<_>>(), [chunk(1)]);
    });
}

/// A writer of whole chunks against one of a page, from every state the chunk can be in: the page ends as either says,
/// the other pages as the range says.
#[test]
fn a_range_and_a_page_end_as_if_one_came_first() {
    for (before, value) in [(range(0, 0), true), (page(4), true), (page(3), true), (chunk(0), false), (page(3), false)]
    {
        let roles = [writer(&[(chunk(0), value)]), writer(&[(page(3), !value)])];
        explore(&[before], &roles, move |set| {
            assert!(set.differing_runs(chunk(0), value).all(|run| run == page(3)));
        });
    }
}

/// The same with the range turned twice, so that an expansion meets the chunk on either side or is overtaken, and with a
/// reader to whom no page of the range may come and go.
#[test]
fn an_overtaken_expansion_gives_way() {
    let roles = [writer(&[(chunk(0), false), (chunk(0), true)]), writer(&[(page(3), true)])];
    explore(&[page(4)], &roles, |set| assert_eq!(set.uniform(chunk(0)), Some(true)));
    let roles = [writer(&[(chunk(0), true)]), writer(&[(page(3), false)]), reader_never_told(70, true)];
    explore(&[page(4)], &roles, |set| assert!(set.contains(gfn(70))));
}

/// What a writer did before is visible to who sees the page changed: by tag, by leaf, and by the fill of an expansion.
#[test]
fn who_sees_the_change_sees_what_came_before_it() {
    use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};

    let changes = [vec![(page(70), true)], vec![(chunk(0), true)], vec![(chunk(0), true), (page(5), false)]];
    for change in changes {
        for reads_first in [false, true] {
            let change = change.clone();
            loom::model(move || {
                let set = set_holding(&[page(4)]);
                let before = Arc::new(AtomicBool::new(false));
                let writes = {
                    let (set, before, change) = (Arc::clone(&set), Arc::clone(&before), change.clone());
                    move || {
                        before.store(true, Relaxed);
                        change.iter().for_each(|&(range, value)| set.set(range, value).unwrap());
                    }
                };
                let reads = move || assert!(!set.contains(gfn(70)) || before.load(Relaxed));
                if reads_first {
                    let other = thread::spawn(writes);
                    reads();
                    other.join().unwrap();
                } else {
                    let other = thread::spawn(reads);
                    writes();
                    other.join().unwrap();
                }
            });
        }
    }
}
