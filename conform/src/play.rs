//! Playing one scenario on several machines side by side, and stopping where they part.

use std::fmt;

use crate::differences::Differences;
use crate::guard;
use crate::machine::{Machine, Shape};
use crate::observation::Observation;
use crate::scenario::{AREA_BYTES, Area, Hva, Operation, Scenario};

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
    /// Operations that were carried out.
    pub operations: u64,
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
        played.operations += 1;
        let mut seen: Vec<(&'static str, Observation)> = Vec::new();
        for machine in machines.iter_mut() {
            if trace {
                eprintln!("{:>9} {step}: {operation}", machine.name());
            }
            seen.push((machine.name(), machine.play(&operation)));
        }
        let agreed = known.agree(&operation, &mut seen, &mut played.explained);
        let as_expected = expected.is_none_or(|expected| {
            let mut known = seen.iter().filter(|(_, seen)| *seen != Observation::Unknown && known.is_comparable(seen));
            known.all(|(_, observation)| observation.to_string() == expected)
        });
        if !agreed || !as_expected {
            let mut seen: Vec<_> = seen.into_iter().map(|(name, seen)| (name, seen.to_string())).collect();
            seen.extend(expected.map(|expected| ("expected", expected.to_string())));
            return Err(Box::new(Difference { step, operation, seen }));
        }
        if let Some((_, observation)) = seen.first() {
            each(&operation, observation);
        }
    }
    Ok(played)
}

/// Reads all memory that the scenario may have changed: by guests, of both kinds where accesses say so, and by this process.
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
            Operation::Fetch { gpa, .. } => Some((gpa, 1)),
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
    let kinds: &[bool] = if shape.kind == crate::scenario::Kind::Tagged { &[true, false] } else { &[false] };
    let mut operations = Vec::new();
    let pages: Vec<u64> = pages.into_iter().collect();
    for run in pages.chunk_by(|a, b| a + 1 == *b) {
        for private in kinds {
            operations.push(Operation::Dump {
                vcpu: 0,
                gpa: run[0].saturating_mul(PAGE),
                pages: run.len() as u64,
                private: *private,
            });
        }
    }
    operations.extend(areas.into_iter().map(|(area, len)| Operation::HostRead { at: Hva::In(area, 0), len }));
    operations
}

/// Pages of one operation that are read at the end, at most.
const MANY: u64 = 64;
