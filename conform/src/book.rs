//! The book of scenarios (`book/`), as it was when this was compiled: where tests run, there may be no tree.
//!
//! A chapter is a list of names and texts. What each is about, and what of the numbered scenarios is not in the book, says
//! `book/README.md`.

use crate::scenario::Scenario;

macro_rules! chapter {
    ($folder:literal: $($name:literal)+) => {
        &[$(Entry { name: $name, text: include_str!(concat!("../book/", $folder, "/", $name, ".scn")) }),+]
    };
}

/// One scenario of the book.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its file's name, without the extension.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

impl Entry {
    /// Its scenarios, each with a name: a file may have several, and each begins with its `vm` line.
    ///
    /// # Panics
    /// If one is none.
    pub fn scenarios(&self) -> Vec<(String, Scenario)> {
        let starts =
            self.text.split('\n').enumerate().filter(|(_, line)| line.starts_with("vm ")).map(|(line, _)| line);
        let starts: Vec<usize> = starts.collect();
        let lines: Vec<&str> = self.text.split('\n').collect();
        let ends = starts.iter().skip(1).copied().chain([lines.len()]);
        let scenario = |(start, end): (&usize, usize)| {
            let name = format!("{}:{}", self.name, start + 1);
            let scenario = lines[*start..end].join("\n").parse();
            let scenario = scenario.unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, scenario)
        };
        starts.iter().zip(ends).map(scenario).collect()
    }
}

/// Many small scenarios of what the kernel contract says.
pub const CONTRACT: &[Entry] = chapter!(".": "contract" "kernel");

/// What the software KVM once did differently from Linux 7.3, each as small as it could be made.
pub const FOUND: &[Entry] = chapter!("found":
    "emulated-access-goes-by-the-address"
    "mmio-outlives-conversion"
    "mmio-until-a-slot-changes"
);

/// The same of the model of SNP and KVM's own SNP code.
pub const SNP: &[Entry] = chapter!("snp": "found");

/// Scenarios of what KVM and its files do: every operation is one call or one access.
pub const KVM: &[Entry] = chapter!("kvm":
    "c01-c02-c04-conversion"
    "c02-nothing-freed"
    "c03-malformed"
    "c08-c09-no-memory"
    "c11-no-file"
    "c13-recreated"
    "c13-without-a-slot"
    "c18-prefault"
    "c20-hypercall"
    "discard-closed"
    "discard-holes"
    "discard-unbound"
    "guest-memfd-test-default"
    "guest-memfd-test-protected"
    "memslot-modification-stress-test-default"
    "memslot-modification-stress-test-protected"
    "pre-fault-memory-test-default"
    "pre-fault-memory-test-private"
    "pre-fault-memory-test-shared"
    "private-mem-conversions-test"
    "private-mem-kvm-exits-test"
    "s06-double-bind"
    "s07-forbidden-flags"
    "s08-readonly-default"
    "s08-readonly-protected"
    "s09-clip"
    "s09-clip-two-slots"
    "set-memory-region-test-default"
    "set-memory-region-test-protected"
    "sticky-mmio"
);

/// Scenarios of what the library does, call by call.
pub const LIBRARY: &[Entry] = chapter!("library":
    "c01-c04-to-shared"
    "c02-to-private"
    "c03-malformed"
    "c05-two-backings"
    "c06-rolled-back"
    "c06-undone"
    "c06-undone-to-shared"
    "c08-c09-no-memory"
    "c11-no-private-side"
    "c12-large-pages"
    "c13-recreated"
    "c17-by-attribute"
    "c17-memory-faults"
    "c18-prefault"
    "c18-put-off"
    "c19-chunks"
    "c20-ask-again"
    "c20-bad-requests"
    "d-deferred"
    "d-never"
    "d-trim"
    "d02-replay"
    "default-vm"
    "implicit-refused"
    "lazy"
    "private-mem-conversions-test-1"
    "private-mem-conversions-test-2"
    "private-mem-kvm-exits-test"
    "s01-s02-whole-pages"
    "s03-low-and-high"
    "s04-slots-of-at-most-1-gib"
    "s06-s07-refused-up-front"
    "slots-undone"
    "teardown"
);
