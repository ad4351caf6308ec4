//! The bitmap against a set of page numbers, and by hand where words and lines end.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn run(start: u64, end: u64) -> FileRange {
    FileRange::new(FilePage::new(start).unwrap(), FilePage::new(end).unwrap()).unwrap()
}

fn page(n: u64) -> FilePage {
    FilePage::new(n).unwrap()
}

fn runs_of(pages: &BTreeSet<u64>) -> Vec<FileRange> {
    let mut runs: Vec<FileRange> = Vec::new();
    for n in pages {
        match runs.last_mut() {
            Some(last) if last.end().get() == *n => *last = run(last.start().get(), n + 1),
            _ => runs.push(run(*n, n + 1)),
        }
    }
    runs
}

#[test]
fn runs_go_on_over_words_lines_and_summary_words() {
    let edges = [64, PAGES_PER_LINE, PAGES_PER_LINE * 64];
    for edge in edges {
        let bitmap = DirtyBitmap::new(1 << 20).unwrap();
        bitmap.set(run(edge - 1, edge + 1));
        assert_eq!(bitmap.runs().collect::<Vec<_>>(), [run(edge - 1, edge + 1)]);
        assert_eq!(bitmap.count(), 2);
        bitmap.clear();
        assert!(bitmap.is_empty());
    }
    let bitmap = DirtyBitmap::new(1 << 20).unwrap();
    bitmap.set(run(0, 1 << 20));
    assert_eq!(bitmap.take().collect::<Vec<_>>(), [run(0, 1 << 20)]);
    assert!(bitmap.is_empty());
}

#[test]
fn nothing_beyond_the_end() {
    for pages in [0, 1, 63, 64, 65, 511, 512, 513] {
        let bitmap = DirtyBitmap::new(pages).unwrap();
        bitmap.set(run(0, 2000));
        bitmap.set(run(pages, pages + 1));
        bitmap.merge(page(0), &[u64::MAX; 20]);
        bitmap.merge(page(pages), &[u64::MAX; 20]);
        bitmap.merge(page(1 << 40), &[u64::MAX]);
        assert_eq!(bitmap.count(), pages);
        assert!(!bitmap.contains(page(pages)));
    }
}

/// A terabyte, and its last page.
#[test]
fn large() {
    let bitmap = DirtyBitmap::new(1 << 28).unwrap();
    let last = run((1 << 28) - 1, 1 << 28);
    bitmap.set(last);
    assert_eq!(bitmap.take().collect::<Vec<_>>(), [last]);
}

/// What an iterator had taken and not given out goes back.
#[test]
fn taken_in_part() {
    let all = [run(3, 4), run(60, 70), run(500, 520), run(1000, 1001), run(9000, 9001)];
    for given in 0..=all.len() {
        let bitmap = DirtyBitmap::new(10_000).unwrap();
        all.iter().for_each(|run| bitmap.set(*run));
        let taken: Vec<_> = bitmap.take().take(given).collect();
        assert_eq!(taken, all[..given]);
        assert_eq!(bitmap.runs().collect::<Vec<_>>(), all[given..]);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Set(u64, u64),
    Merge(u64, Vec<u64>),
    Take(usize),
    TakeWithin(u64, u64),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), (0..64_u32).prop_map(|bit| 1 << bit)];
    prop_oneof![
        (0..1500_u64, 0..200_u64).prop_map(|(start, len)| Op::Set(start, start + len)),
        (0..1500_u64, prop::collection::vec(word, 0..20)).prop_map(|(first, words)| Op::Merge(first, words)),
        (0..20_usize).prop_map(Op::Take),
        (0..1500_u64, 0..700_u64).prop_map(|(start, len)| Op::TakeWithin(start, start + len)),
        Just(Op::Clear),
    ]
}

proptest! {
    /// As a set of numbers would have it.
    #[test]
    fn as_a_set(pages in 1..1400_u64, ops in prop::collection::vec(op(), 1..30)) {
        let bitmap = DirtyBitmap::new(pages).unwrap();
        let mut model = BTreeSet::new();
        for op in ops {
            match op {
                Op::Set(start, end) => {
                    bitmap.set(run(start, end));
                    model.extend(start..end.min(pages));
                }
                Op::Merge(first, words) => {
                    bitmap.merge(page(first), &words);
                    let bits = (0..words.len() as u64 * 64).filter(|n| words[(n / 64) as usize] >> (n % 64) & 1 == 1);
                    model.extend(bits.map(|n| first + n).filter(|n| *n < pages));
                }
                Op::Take(runs) => {
                    let taken: Vec<_> = bitmap.take().take(runs).collect();
                    let expected: Vec<_> = runs_of(&model).into_iter().take(runs).collect();
                    prop_assert_eq!(&taken, &expected);
                    taken.iter().flat_map(FileRange::iter).for_each(|page| {
                        model.remove(&page.get());
                    });
                }
                Op::TakeWithin(start, end) => {
                    let inside: BTreeSet<u64> = model.range(start..end).copied().collect();
                    prop_assert_eq!(bitmap.take_within(run(start, end)), runs_of(&inside));
                    model.retain(|page| !inside.contains(page));
                }
                Op::Clear => {
                    bitmap.clear();
                    model.clear();
                }
            }
            prop_assert_eq!(bitmap.runs().collect::<Vec<_>>(), runs_of(&model));
            prop_assert_eq!(bitmap.count(), model.len() as u64);
            prop_assert!((0..pages).all(|n| bitmap.contains(page(n)) == model.contains(&n)));
        }
    }
}
