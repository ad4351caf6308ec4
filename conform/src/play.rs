//! Playing one scenario on several machines side by side, and stopping where they part.

use std::fmt;

use crate::differences::Differences;
use crate::guard;
use crate::machine::{Machine, Shape};
use crate::observation::Observation;
use crate::scenario::{AREA_BYTES, Area, Hva, Kind, Operation, Scenario};

/// The first operation that the machines disagree about, or that does not come to what the scenario expects.
#[derive(Debug)]
pub struct Difference {
    /// Which operation, counted from zero; the reading of all memory comes after those of the scenario.
    pub step: usize,
    /// The operation.
    pub operation: Operation,
    /// Who saw what.
    pub seen: Vec<(&'static str, String)>,
}

impl fmt::Display for Difference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "step {}: {}", self.step, self.operation)?;
        for (name, seen) in &self.seen {
            writeln!(out, "  {name:>9}: {seen}")?;
        }
        Ok(())
    }
}

/// What playing came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Played {
    /// Operations of scenarios that were carried out.
    pub operations: u64,
    /// Operations that read all memory at the end.
    pub readings: u64,
    /// Operations that were not, because of [`guard`].
    pub skipped: u64,
    /// Observations that were equal only after a named difference between kernels was allowed for.
    pub explained: u64,
}

/// Plays `scenario`, and at its end reads all memory in every way there is.
///
/// The first machine is the one that `known` speaks of: what it does differently is expected of it.
///
/// `each` is told what came of each operation that all agree about.
///
/// # Errors
/// The first difference.
pub fn play(
    scenario: &Scenario,
    shape: Shape,
    machines: &mut [&mut dyn Machine],
    known: &Differences,
    mut each: impl FnMut(&Operation, &Observation),
) -> Result<Played, Box<Difference>> {
    let mut played = Played::default();
    // For what ends in a hang or a crash, and leaves nothing else behind.
    let trace = std::env::var_os("CVM_TRACE").is_some();
    let steps = scenario.steps.iter().map(|step| (step.operation.clone(), step.expected.as_deref()));
    let reading = contents(scenario, shape).into_iter().map(|operation| (operation, None));
    for (step, (operation, expected)) in steps.chain(reading).enumerate() {
        let refused = guard::refuse(shape, &operation);
        if let (Some(reason), true) = (refused, expected.is_some()) {
            panic!("{operation}: expected to come to something, but {reason}");
        }
        if refused.or_else(|| known.avoid(&operation)).is_some() {
            played.skipped += 1;
            continue;
        }
        if step < scenario.steps.len() {
            played.operations += 1;
        } else {
            played.readings += 1;
        }
        let mut seen: Vec<(&'static str, Observation)> = Vec::new();
        for machine in machines.iter_mut() {
            if trace {
                eprintln!("{:>9} {step}: {operation}", machine.name());
            }
            seen.push((machine.name(), machine.play(&operation)));
        }
        let states: Vec<Option<String>> = machines.iter_mut().map(|machine| machine.state()).collect();
        let mut told = states.iter().flatten();
        let same_state = told.next().is_none_or(|first| told.all(|other| other == first));
        let agreed = known.agree(&operation, &mut seen, &mut played.explained) && same_state;
        let as_expected = expected.is_none_or(|expected| {
            let mut known = seen.iter().filter(|(_, seen)| *seen != Observation::Unknown && known.is_comparable(seen));
            known.all(|(_, observation)| observation.to_string() == expected)
        });
        if !agreed || !as_expected {
            let both = |((name, seen), state): ((_, Observation), Option<String>)| match state {
                Some(state) => (name, format!("{seen}; then {state}")),
                None => (name, seen.to_string()),
            };
            let mut seen: Vec<_> = seen.into_iter().zip(states).map(both).collect();
            seen.extend(expected.map(|expected| ("expected", expected.to_string())));
            return Err(Box::new(Difference { step, operation, seen }));
        }
        if let Some((_, observation)) = seen.first() {
            each(&operation, observation);
        }
    }
    Ok(played)
}

/// Reads all memory that the scenario may have changed and that somebody can reach: by guests, both sides of every page, and
/// by this process. Of ranges of many pages, the first.
fn contents(scenario: &Scenario, shape: Shape) -> Vec<Operation> {
    const PAGE: u64 = 4096;
    let mut pages = std::collections::BTreeSet::new();
    let mut areas = std::collections::BTreeSet::new();
    for step in &scenario.steps {
        let touched = match step.operation {
            Operation::Region { gpa, size, hva, .. } => {
                if let Hva::In(area @ Area::Memory(_), _) = hva {
                    areas.insert((area, AREA_BYTES));
                }
                Some((gpa, size))
            }
            Operation::Attributes { gpa, size, .. } | Operation::Prefault { gpa, size, .. } => Some((gpa, size)),
            Operation::Load { gpa, len, .. } | Operation::Store { gpa, len, .. } => Some((gpa, len.into())),
            Operation::Fetch { gpa, .. } | Operation::Pvalidate { gpa, .. } => Some((gpa, 1)),
            Operation::Dump { gpa, pages, .. } => Some((gpa, pages.saturating_mul(PAGE))),
            Operation::Create { file, size, .. } if size <= AREA_BYTES && size % PAGE == 0 => {
                areas.insert((Area::File(file), size));
                None
            }
            Operation::HostFill { at: Hva::In(area @ Area::Memory(_), _), .. } => {
                areas.insert((area, AREA_BYTES));
                None
            }
            _ => None,
        };
        if let Some((gpa, size)) = touched {
            let first = gpa / PAGE;
            let last = gpa.saturating_add(size.saturating_sub(1)) / PAGE;
            // A slot may be huge: then its beginning.
            pages.extend(first..=last.min(first.saturating_add(MANY)));
        }
    }
    let readable = |page: &u64| {
        let dump = Operation::Dump { vcpu: 0, gpa: page.saturating_mul(PAGE), pages: 1, private: false };
        guard::refuse(shape, &dump).is_none()
    };
    let pages: Vec<u64> = pages.into_iter().filter(readable).collect();
    let runs: Vec<(u64, u64)> =
        pages.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0].saturating_mul(PAGE), run.len() as u64)).collect();
    let mut operations = Vec::new();
    let dump =
        |private| move |(gpa, pages): &(u64, u64)| Operation::Dump { vcpu: 0, gpa: *gpa, pages: *pages, private };
    match shape.kind {
        Kind::Default => operations.extend(runs.iter().map(dump(false))),
        // Of what accesses say, the other kind is a fault.
        Kind::Tagged => operations.extend(runs.iter().map(dump(true)).chain(runs.iter().map(dump(false)))),
        // And what there is in private pages that the guest has accepted, once the attributes do not hide it.
        Kind::Snp => {
            operations.extend(runs.iter().map(dump(true)).chain(runs.iter().map(dump(false))));
            let convert = |(gpa, pages): &(u64, u64)| Operation::Attributes {
                gpa: *gpa,
                size: pages * PAGE,
                attributes: 8,
                flags: 0,
            };
            operations.extend(runs.iter().map(convert));
            operations.extend(runs.iter().map(dump(true)));
        }
        // Both sides of every page: as the scenario left it, and with the attribute turned over, twice.
        Kind::Protected => {
            operations.extend(runs.iter().map(dump(false)));
            for attributes in [8, 0] {
                let convert = |(gpa, pages): &(u64, u64)| Operation::Attributes {
                    gpa: *gpa,
                    size: pages * PAGE,
                    attributes,
                    flags: 0,
                };
                operations.extend(runs.iter().map(convert));
                operations.extend(runs.iter().map(dump(false)));
            }
        }
    }
    operations.extend(areas.into_iter().map(|(area, len)| Operation::HostRead { at: Hva::In(area, 0), len }));
    operations
}

/// Pages of one operation that are read at the end, at most.
const MANY: u64 = 64;
