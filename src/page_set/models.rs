//! Loom's models of the page set: every interleaving of a few threads, with the orderings the code asks for.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --release --lib page_set`. A chunk has two leaf words here, and there are
//! two stripes; the code is otherwise the one that ships.

use loom::sync::Arc;
use loom::thread::{self, JoinHandle};

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

/// Every interleaving with at most `preemptions` forced switches of threads.
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// A set of two chunks of which `ranges` are members.
fn set_of(ranges: &[GfnRange]) -> Arc<PageSet> {
    let set = PageSet::new(2 * CHUNK).unwrap();
    for range in ranges {
        set.insert(*range).unwrap();
    }
    Arc::new(set)
}

fn writer(set: &Arc<PageSet>, changes: impl IntoIterator<Item = (GfnRange, bool)> + 'static) -> JoinHandle<()> {
    let set = Arc::clone(set);
    thread::spawn(move || changes.into_iter().for_each(|(range, value)| set.set(range, value).unwrap()))
}

fn reader(set: &Arc<PageSet>, n: u64) -> JoinHandle<[bool; 2]> {
    let set = Arc::clone(set);
    thread::spawn(move || [set.contains(gfn(n)), set.contains(gfn(n))])
}

/// Expansion leaves the pages that are not its own alone, however far it got: both states of the chunk.
#[test]
fn an_expansion_is_not_seen_on_other_pages() {
    explore(3, || {
        for value in [false, true] {
            let set = set_of(&[range(0, if value { CHUNK } else { 0 })]);
            let writing = writer(&set, [(page(3), !value)]);
            assert_eq!(set.contains(gfn(CHUNK - 1)), value);
            assert_eq!(set.contains(gfn(2)), value);
            writing.join().unwrap();
            assert_eq!([set.contains(gfn(3)), set.contains(gfn(2))], [!value, value]);
        }
    });
}

/// The chunk collapses as the one page in it goes, and is expanded for another: a page changes once for every reader.
#[test]
fn a_refilled_leaf_shows_current_states() {
    explore(3, || {
        let set = set_of(&[page(3)]);
        let leaves = reader(&set, 3);
        let writing = writer(&set, [(page(3), false), (page(70), true)]);
        // Comes, and is not gone again.
        let comes = [set.contains(gfn(70)), set.contains(gfn(70))];
        assert!(comes != [true, false]);
        assert!(leaves.join().unwrap() != [false, true]);
        writing.join().unwrap();
        assert_eq!(set.count(range(0, 2 * CHUNK)), 1);
    });
}

/// Mixed, uniform, and mixed again on the other side: the stale reader of the first sees the second's pages right.
#[test]
fn a_page_does_not_go_back_when_the_chunk_changes_sides() {
    explore(3, || {
        let set = set_of(&[page(3)]);
        let stays = reader(&set, 3);
        let writing = writer(&set, [(chunk(0), true), (page(70), false)]);
        let comes = [set.contains(gfn(4)), set.contains(gfn(4))];
        assert!(comes != [true, false]);
        assert_eq!(stays.join().unwrap(), [true, true]);
        writing.join().unwrap();
        assert_eq!(set.count(chunk(0)), CHUNK - 1);
    });
}

/// A page's own change shows only once the chunk is mixed: not early through a stale tag and gone again.
#[test]
fn a_change_is_not_seen_before_it_is_published() {
    explore(3, || {
        let set = set_of(&[page(3)]);
        let writing = writer(&set, [(chunk(0), false), (page(4), true)]);
        let comes = [set.contains(gfn(4)), set.contains(gfn(4))];
        assert!(comes != [true, false]);
        writing.join().unwrap();
        assert!(set.contains(gfn(4)));
    });
}

#[test]
fn two_writers_in_one_chunk_lose_nothing() {
    explore(3, || {
        let set = set_of(&[page(1)]);
        let other = writer(&set, [(page(2), true), (page(1), false)]);
        set.insert(page(3)).unwrap();
        other.join().unwrap();
        assert_eq!(set.member_runs(chunk(0)).collect::<Vec<_>>(), [range(2, 4)]);
    });
}

/// The last page out collapses the chunk while another comes in.
#[test]
fn a_collapse_loses_no_page_that_comes_in() {
    explore(3, || {
        let set = set_of(&[page(1)]);
        let other = writer(&set, [(page(1), false)]);
        set.insert(page(70)).unwrap();
        other.join().unwrap();
        assert_eq!(set.member_runs(chunk(0)).collect::<Vec<_>>(), [page(70)]);
    });
}

/// Neighbouring chunks have different stripes and one tag word.
#[test]
fn neighbours_in_a_tag_word_lose_nothing() {
    explore(3, || {
        let set = set_of(&[]);
        let other = writer(&set, [(page(1), true), (page(1), false)]);
        set.insert(page(CHUNK)).unwrap();
        set.insert(chunk(1)).unwrap();
        other.join().unwrap();
        assert_eq!(set.member_runs(range(0, 2 * CHUNK)).collect::<Vec<_>>(), [chunk(1)]);
    });
}

/// A writer of whole chunks against one of a page, from every state the chunk can be in: the page ends as either says,
/// the other pages as the range says, and a reader never sees a page of the range go back.
#[test]
fn a_range_and_a_page_end_as_if_one_came_first() {
    for (before, value) in [(range(0, 0), true), (page(4), true), (chunk(0), false), (page(3), false)] {
        explore(3, move || {
            let set = set_of(&[before]);
            let whole = writer(&set, [(chunk(0), value)]);
            let single = writer(&set, [(page(3), !value)]);
            let seen = [set.contains(gfn(70)), set.contains(gfn(70))];
            assert!(seen != [value, !value]);
            whole.join().unwrap();
            single.join().unwrap();
            assert_eq!(set.contains(gfn(70)), value);
            assert_eq!(set.differing_runs(chunk(0), value).all(|run| run == page(3)), true);
        });
    }
}

/// The same with the range turned twice, so that an expansion can be overtaken and must start again.
#[test]
fn an_overtaken_expansion_starts_again() {
    explore(3, || {
        let set = set_of(&[page(4)]);
        let whole = writer(&set, [(chunk(0), false), (chunk(0), true)]);
        let single = writer(&set, [(page(3), true)]);
        // Page 3 comes by the one or the other; between the two it may go, but at the end it is there.
        let others = [set.contains(gfn(70)), set.contains(gfn(70))];
        assert!(others != [true, false]);
        whole.join().unwrap();
        single.join().unwrap();
        assert_eq!(set.uniform(chunk(0)), Some(true));
    });
}

/// What a writer did before is visible to who sees the page changed, by tag or by leaf.
#[test]
fn who_sees_the_change_sees_what_came_before_it() {
    use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
    for change in [page(3), chunk(0)] {
        explore(3, move || {
            let set = set_of(&[page(70)]);
            let before = Arc::new(AtomicBool::new(false));
            let writing = thread::spawn({
                let (set, before) = (Arc::clone(&set), Arc::clone(&before));
                move || {
                    before.store(true, Relaxed);
                    set.insert(change).unwrap();
                }
            });
            if set.contains(gfn(3)) {
                assert!(before.load(Relaxed));
            }
            writing.join().unwrap();
        });
    }
}
