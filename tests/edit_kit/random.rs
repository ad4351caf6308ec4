//! Random edits around and under memory that is in use.

use cvm_memory::edit::{Operation, Region};
use cvm_memory::memory::{Edit, EditError};
use cvm_memory_testkit::Numbers;

use super::PAGE;

/// Pages that the guests use at all times, and pages above them that come and go, all in one mapping.
pub const USED: u64 = 96;
/// All of them.
pub const ALL: u64 = 160;
/// Where memory is moved to and back from.
pub const AWAY: u64 = 0x1000;

/// How many edits to make: `CVM_EDIT_TRANSACTIONS`, or so many.
pub fn transactions(usual: u64) -> u64 {
    std::env::var("CVM_EDIT_TRANSACTIONS").ok().map_or(usual, |text| text.parse().unwrap())
}

/// One to three edits. What makes no sense as things stand is refused, and the edit goes on without.
pub fn edit_something(edit: &mut Edit<'_>, numbers: &mut Numbers) {
    for _ in 0..=numbers.below(3) {
        let mut nested = edit.begin();
        if edit_once(&mut nested, numbers).is_ok() {
            nested.commit();
        }
    }
}

/// One edit, of whatever kind is possible now. Memory below `USED` is always what it was.
fn edit_once(edit: &mut Edit<'_>, numbers: &mut Numbers) -> Result<(), EditError> {
    let upper = edit.draft().regions().map(|region| region.gfns.end().get()).filter(|end| *end <= ALL).max().unwrap();
    let is_away = |region: &Region| (AWAY..AWAY + ALL).contains(&region.gfns.start().get());
    let away = edit.draft().regions().any(|region| is_away(&region));
    match numbers.below(6) {
        0 => drop(edit.split((1 + numbers.below(USED - 1)) * PAGE)?),
        1 => drop(edit.merge(0, USED * PAGE)?),
        2 if upper > USED => {
            let top = edit.draft().regions().filter(|region| region.gfns.end().get() == upper).last().unwrap().gfns;
            let left = USED.max(top.start().get() + 1) + numbers.below(upper - USED.max(top.start().get() + 1) + 1);
            edit.truncate(top.start().get() * PAGE, (left - top.start().get()) * PAGE)?;
        }
        3 if upper < ALL && !away => {
            let top = edit.draft().regions().filter(|region| region.gfns.end().get() == upper).last().unwrap().gfns;
            let end = upper + 1 + numbers.below(ALL - upper);
            edit.grow(top.start().get() * PAGE, (end - top.start().get()) * PAGE)?;
        }
        4 if !away && upper > USED + 8 => drop(edit.move_to((upper - 8) * PAGE, 8 * PAGE, AWAY * PAGE)?),
        4 if away => {
            let moved = edit.draft().regions().filter(is_away);
            let moved: Vec<_> = moved.map(|region| region.gfns).collect();
            edit.move_to(AWAY * PAGE, moved.iter().map(|gfns| gfns.bytes()).sum(), upper * PAGE)?;
        }
        // All of it away and back: one edit, nothing to do for what has not changed.
        5 => {
            let regions: Vec<_> = edit.draft().regions().collect();
            edit.apply_all(vec![Operation::ReplaceAll(regions)])?;
        }
        _ => {}
    }
    Ok(())
}
