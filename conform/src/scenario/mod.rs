//! The scenario language: what is done to one VM, in order, as plain data and as text.
//!
//! One line, one operation; `#` begins a comment. The first line says what VM it is. A line that begins with `=` says what
//! the operation before it comes to, as [`Observation`](crate::Observation) prints it; without one, anything may come. Where
//! that takes several lines, those after the first begin with `|`.
//!
//! [`Operation`]s are KVM's. Those of the [`library`](crate::library) are another table of the same kind.
//!
//! ```
//! let text = "\
//! vm kind=protected vcpus=1
//! create file=f0 size=0x2000 flags=0
//! region slot=1 flags=4 gpa=0x1000000 size=0x2000 hva=m0+0x0 file=f0 offset=0
//! = ok
//! load vcpu=0 gpa=0x1000ffe len=4 private=no
//! ";
//! let scenario: cvm_memory_conform::Scenario = text.parse()?;
//! assert_eq!(scenario.steps.len(), 3);
//! assert_eq!(scenario.to_string(), text);
//! # Ok::<(), cvm_memory_conform::scenario::ParseError>(())
//! ```

mod operation;
mod table;
pub(crate) mod words;

use std::fmt;
use std::str::FromStr;

pub use operation::Operation;
pub(crate) use table::operations;
pub use words::{AREA_BYTES, AREA_ROOM, Area, Descriptor, Entries, File, Hva, Kind, Word};
use words::{Fields, Printed};

/// What a guest reads where there is no memory.
pub const MMIO_BYTE: u8 = 0xb7;

/// Pages of the longest slot whose dirty log is asked for in full.
pub const LOG_PAGES: u64 = 1024;

/// An operation, and what it has to come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step<O = Operation> {
    /// What is done.
    pub operation: O,
    /// What is observed, if somebody said; as text, which is how it is compared.
    pub expected: Option<String>,
}

impl<O> From<O> for Step<O> {
    fn from(operation: O) -> Self {
        Self { operation, expected: None }
    }
}

/// A VM, and what is done to it. See the [module](self) for its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenario<O = Operation> {
    /// What VM.
    pub kind: Kind,
    /// With how many vCPUs.
    pub vcpus: u8,
    /// What is done.
    pub steps: Vec<Step<O>>,
}

impl<O: fmt::Display> fmt::Display for Scenario<O> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "vm kind={} vcpus={}", Printed(&self.kind), Printed(&self.vcpus))?;
        for step in &self.steps {
            writeln!(out, "{}", step.operation)?;
            if let Some(expected) = &step.expected {
                writeln!(out, "= {}", expected.replace('\n', "\n| "))?;
            }
        }
        Ok(())
    }
}

/// Text that is no scenario.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct ParseError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

impl<O: FromStr<Err = String>> FromStr for Scenario<O> {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut scenario: Option<Self> = None;
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let wrong = |reason: String| ParseError { line: index + 1, reason };
            match &mut scenario {
                None => scenario = Some(head(line).map_err(wrong)?),
                Some(scenario) => scenario.add(line).map_err(wrong)?,
            }
        }
        scenario.ok_or(ParseError { line: 0, reason: "no `vm` line".into() })
    }
}

fn head<O>(line: &str) -> Result<Scenario<O>, String> {
    let mut words = line.split_whitespace();
    if words.next() != Some("vm") {
        return Err("the first line has to say what `vm`".into());
    }
    let mut fields = Fields::of(words)?;
    let scenario = Scenario { kind: fields.take("kind")?, vcpus: fields.take("vcpus")?, steps: Vec::new() };
    fields.end()?;
    Ok(scenario)
}

impl<O: FromStr<Err = String>> Scenario<O> {
    fn add(&mut self, line: &str) -> Result<(), String> {
        if let Some(expected) = line.strip_prefix('=') {
            let step = self.steps.last_mut().ok_or("nothing was done yet")?;
            if step.expected.replace(expected.trim().into()).is_some() {
                return Err("a second expectation".into());
            }
        } else if let Some(more) = line.strip_prefix('|') {
            let expected = self.steps.last_mut().and_then(|step| step.expected.as_mut());
            let expected = expected.ok_or("nothing was expected yet")?;
            expected.push('\n');
            expected.push_str(more.trim());
        } else {
            self.steps.push(line.parse::<O>()?.into());
        }
        Ok(())
    }
}
