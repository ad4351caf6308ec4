//! At which frames private pages have been: some platforms remember it, and so must whoever binds a page elsewhere.

use std::collections::BTreeMap;

use crate::addr::{FileRange, Gfn};
use crate::gmem::FileId;
use crate::layout::Memslot;

/// For each file, runs of its pages and the frame of the first of each. Pages that were never bound are in none.
#[derive(Debug, Default)]
pub(super) struct Frames(BTreeMap<FileId, Vec<(FileRange, Gfn)>>);

impl Frames {
    /// The file pages of `slot` are where it has them.
    pub(super) fn bound(&mut self, slot: &Memslot) {
        let Some((file, pages)) = slot.file_range() else { return };
        self.freed(file, pages);
        self.0.entry(file).or_default().push((pages, slot.gfns.start()));
    }

    /// The pages have been freed: they remember nothing.
    pub(super) fn freed(&mut self, file: FileId, pages: FileRange) {
        let Some(runs) = self.0.get_mut(&file) else { return };
        let parts = |(run, base): (FileRange, Gfn)| {
            run.subtract(&pages).filter_map(move |part| Some((part, part.rebase(run.start(), base)?.start())))
        };
        *runs = runs.drain(..).flat_map(parts).collect();
    }

    /// Pages that `slot` would have at other frames than they were: the pages, where the first was and where it would be.
    pub(super) fn rebound(&self, slot: &Memslot) -> Vec<(FileId, FileRange, Gfn, Gfn)> {
        let Some((file, pages)) = slot.file_range() else { return Vec::new() };
        let runs = self.0.get(&file).into_iter().flatten();
        let moved = runs.filter_map(|(run, base)| {
            let common = run.intersection(&pages)?;
            let was = common.rebase(run.start(), *base)?.start();
            let wanted = common.rebase(pages.start(), slot.gfns.start())?.start();
            (was != wanted).then_some((file, common, was, wanted))
        });
        moved.collect()
    }
}
