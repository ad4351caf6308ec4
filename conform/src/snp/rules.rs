//! What holds of an RMP whatever is done, page by page, without a second machine to compare with.
//!
//! Mirrors the kernel contract, sections 7.6 and 7.9: a page is assigned when it is first used as private, accepted by
//! its guest alone, and the host's again only when it leaves its file.

use super::{Entry, PAGE, Snp};
use crate::machine::Machine;
use crate::observation::{End, Observation};
use crate::scenario::Operation;

/// A machine of the model whose RMP is looked at before and after every operation.
#[derive(Debug)]
pub struct Ruled(pub Snp);

const VALID: &str = "guest-valid";
const INVALID: &str = "guest-invalid";
/// CF=1 of PVALIDATE.
const NO_UPDATE: u64 = 1 << 32;

fn is_within(few: &[Entry], many: &[Entry]) -> bool {
    few.iter().all(|entry| many.contains(entry))
}

/// The pages of what one instruction accesses.
fn pages(gpa: u64, len: u64) -> impl Iterator<Item = u64> {
    (gpa / PAGE..=(gpa + len - 1) / PAGE).map(|gfn| gfn * PAGE)
}

fn accepted(entries: &[Entry], gpa: u64, len: u64) -> bool {
    pages(gpa, len).all(|page| entries.iter().any(|entry| entry.gpa == page && entry.state == VALID))
}

/// The rule that is broken, if one is.
fn broken(operation: &Operation, seen: &Observation, before: &[Entry], after: &[Entry]) -> Option<&'static str> {
    if after.iter().any(|entry| entry.vmsa || ![VALID, INVALID].contains(&&*entry.state)) {
        return Some("nobody has made a page that is neither accepted nor to be accepted");
    }
    let fresh: Vec<&Entry> = after.iter().filter(|entry| !before.contains(entry)).collect();
    match *operation {
        Operation::Fallocate { .. } | Operation::Close { .. } | Operation::Create { .. } => {
            (!is_within(after, before)).then_some("a file changes its pages' entries only by losing pages")
        }
        Operation::Load { .. }
        | Operation::Store { .. }
        | Operation::Fetch { .. }
        | Operation::Dump { .. }
        | Operation::Prefault { .. } => {
            let used = match (operation, seen) {
                (Operation::Load { gpa, len, private: true, .. }, Observation::Guest { end: End::Data(_), .. })
                | (Operation::Store { gpa, len, private: true, .. }, Observation::Guest { end: End::Done, .. }) => {
                    accepted(after, *gpa, u64::from(*len))
                }
                _ => true,
            };
            if !used {
                Some("private memory was used that was not accepted")
            } else if !is_within(before, after) {
                Some("a use takes nothing away")
            } else {
                fresh.iter().any(|entry| entry.state != INVALID).then_some("a page that comes into use is not accepted")
            }
        }
        Operation::Pvalidate { gpa, validate, large, .. } => {
            let page = gpa & !(PAGE - 1);
            let others = |entries: &[Entry]| -> Vec<Entry> {
                entries.iter().filter(|entry| entry.gpa != page).cloned().collect()
            };
            let state = if validate { VALID } else { INVALID };
            let has = |entries: &[Entry]| entries.iter().any(|entry| entry.gpa == page && entry.state == state);
            if others(before) != others(after) {
                return Some("other pages were accepted, or not any more");
            }
            match seen {
                Observation::Guest { end: End::Answer(0), .. } => {
                    // What is not assigned is not accepted either: there was nothing to take back.
                    let was = has(before) || (!validate && !before.iter().any(|entry| entry.gpa == page));
                    (large || was || !has(after)).then_some("it was said to be done")
                }
                Observation::Guest { end: End::Answer(NO_UPDATE), .. } => {
                    // It may have been assigned by the way.
                    let was = has(before) || (!validate && !before.iter().any(|entry| entry.gpa == page));
                    (!was || !has(after)).then_some("it was said to have been so")
                }
                _ => fresh.iter().any(|entry| entry.state != INVALID).then_some("it was said to have failed"),
            }
        }
        // Attributes, slots, requests, this process's own accesses.
        _ => (before != after).then_some("an entry changes when a page is used, accepted or lost, and never else"),
    }
}

impl Machine for Ruled {
    fn name(&self) -> &'static str {
        "ruled"
    }

    fn play(&mut self, operation: &Operation) -> Observation {
        let before = self.0.entries();
        let seen = self.0.play(operation);
        let after = self.0.entries();
        if let Some(rule) = broken(operation, &seen, &before, &after) {
            // Not what the other machine sees.
            eprintln!("{operation}: {seen}: {rule}\n  before {before:?}\n   after {after:?}");
            return Observation::Skipped(rule);
        }
        seen
    }

    fn state(&mut self) -> Option<String> {
        self.0.state()
    }
}
