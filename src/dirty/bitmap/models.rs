//! Loom's models of the bitmap: every interleaving of those who set and those who take, with the orderings the code asks for.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --lib dirty`. A line has two words here.

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use super::*;

fn page(n: u64) -> FileRange {
    FileRange::page(FilePage::new(n).unwrap())
}

/// Pages taken, and what is left at the end, make up what was set; and a set that has returned is found.
fn set_while_taken(before: &'static [u64], sets: [&'static [u64]; 2]) {
    loom::model(move || {
        let bitmap = Arc::new(DirtyBitmap::new(2 * PAGES_PER_LINE).unwrap());
        before.iter().for_each(|n| bitmap.set(page(*n)));
        let setters = sets.map(|pages| {
            let bitmap = Arc::clone(&bitmap);
            thread::spawn(move || pages.iter().for_each(|n| bitmap.set(page(*n))))
        });
        let mut seen: Vec<u64> = bitmap.take().flat_map(|run| run.iter().map(FilePage::get)).collect();
        setters.into_iter().for_each(|setter| setter.join().unwrap());
        seen.extend(bitmap.take().flat_map(|run| run.iter().map(FilePage::get)));
        seen.sort_unstable();
        seen.dedup();
        let mut expected: Vec<u64> = before.iter().chain(sets.concat().iter()).copied().collect();
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(seen, expected);
        assert!(bitmap.is_empty());
    });
}

#[test]
fn of_one_word() {
    set_while_taken(&[], [&[3], &[4]]);
}

#[test]
fn of_a_line_that_has_pages_already() {
    set_while_taken(&[0], [&[3], &[70]]);
}

#[test]
fn of_one_page() {
    set_while_taken(&[3], [&[3], &[3]]);
}

/// Two who take do not both get a page, and none gets lost between them.
#[test]
fn taken_by_two() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(PAGES_PER_LINE).unwrap());
        bitmap.set(page(1));
        let other = Arc::clone(&bitmap);
        let setter = Arc::clone(&bitmap);
        let taker = thread::spawn(move || other.take().map(|run| run.pages()).sum::<u64>());
        let setter = thread::spawn(move || setter.set(page(65)));
        let mine: u64 = bitmap.take().map(|run| run.pages()).sum();
        let theirs = taker.join().unwrap();
        setter.join().unwrap();
        assert_eq!(mine + theirs + bitmap.count(), 2);
    });
}

/// Whoever takes a page sees what was written before it was set; whatever is written after is in the bitmap again.
#[test]
fn a_page_is_copied_as_it_was_written() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(1).unwrap());
        let memory = Arc::new(AtomicU64::new(0));
        let (there, theirs) = (Arc::clone(&bitmap), Arc::clone(&memory));
        let writer = thread::spawn(move || {
            for value in 1..=2 {
                theirs.store(value, Ordering::Relaxed);
                there.set(page(0));
            }
        });
        let mut copy = 0;
        if bitmap.take().next().is_some() {
            copy = memory.load(Ordering::Relaxed);
        }
        writer.join().unwrap();
        if bitmap.take().next().is_some() {
            copy = memory.load(Ordering::Relaxed);
        }
        assert_eq!(copy, 2);
    });
}
