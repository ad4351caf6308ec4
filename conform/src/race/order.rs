//! Is there an order? Changes come one after the other, and so do the accesses of a page, which has one owner; so an order is
//! a way to interleave two sequences, and all of them are tried, together, state by state.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::page::{Access, Change, Next, Page, Saw, Stage, Step};

/// Something that happened, and when: it took effect after `begin` and before `end`.
#[derive(Debug, Clone)]
pub(super) struct Timed<T> {
    pub(super) begin: u64,
    pub(super) what: T,
    pub(super) end: u64,
}

/// How far an order has come: so many steps of changes, so many accesses, the next access, and the page.
type Place = (usize, usize, Stage, Page);

/// Finds an order in which `page` comes to what was seen.
pub(super) fn explain(page: Page, changes: &[Timed<Change>], accesses: &[Timed<(Access, Saw)>]) -> Result<(), String> {
    let changes: Vec<_> = changes
        .iter()
        .flat_map(|&Timed { begin, what, end }| what.steps().map(move |what| Timed { begin, what, end }))
        .collect();
    let mut tried: HashSet<Place> = HashSet::new();
    let mut open = vec![(0, 0, Stage::Fresh, page)];
    let mut furthest: Place = (0, 0, Stage::Fresh, page);
    while let Some(place) = open.pop() {
        if !tried.insert(place) {
            continue;
        }
        let (changed, accessed, stage, page) = place;
        if accessed == accesses.len() {
            return Ok(());
        }
        if (accessed, changed) > (furthest.1, furthest.0) {
            furthest = place;
        }
        let next_access = &accesses[accessed];
        if let Some(change) = changes.get(changed)
            && change.begin < next_access.end
        {
            let mut page = page;
            page.step(change.what);
            open.push((changed + 1, accessed, stage, page));
        }
        // Not if a change was over before this began.
        if changes.get(changed).is_none_or(|change| next_access.begin < change.end) {
            if let (Stage::Fresh, Some(page)) = (stage, page.mapped()) {
                open.push((changed, accessed, stage, page));
            }
            let (access, saw) = &next_access.what;
            let mut page = page;
            match page.access(*access, stage) {
                Next::Stage(stage) => open.push((changed, accessed, stage, page)),
                Next::Saw(would) if would == *saw => open.push((changed, accessed + 1, Stage::Fresh, page)),
                Next::Saw(_) | Next::Wait => {}
            }
        }
    }
    Err(report(furthest, &changes, accesses))
}

/// What is around the access that has no place.
fn report((changed, accessed, _, page): Place, changes: &[Timed<Step>], accesses: &[Timed<(Access, Saw)>]) -> String {
    let mut text = format!("in one order that comes this far it is then {page:?}\n");
    let from = accesses[accessed.saturating_sub(6)].begin;
    let until = accesses[accessed].end;
    let mut lines: Vec<(u64, String)> = Vec::new();
    for Timed { begin, what, end } in changes {
        if *end >= from && *begin <= until {
            lines.push((*begin, format!("[{begin}, {end}] {what:x?}")));
        }
    }
    for (index, Timed { begin, what, end }) in accesses.iter().enumerate().take(accessed + 1) {
        if *begin >= from {
            let mark = if index == accessed { "  <-- cannot be explained" } else { "" };
            lines.push((*begin, format!("[{begin}, {end}] {:x?} saw {:x?}{mark}", what.0, what.1)));
        }
    }
    lines.sort();
    let _cannot_fail = writeln!(text, "{changed} steps of {} before it", changes.len());
    for (_, line) in lines {
        let _cannot_fail = writeln!(text, "  {line}");
    }
    text
}
