//! What the lab's emulated RMP says of itself, in debugfs.

use std::fs;

use super::Entry;

const FOLDER: &str = "/sys/kernel/debug/snp_emulation";

/// Whether there is one.
pub(super) fn is_there() -> bool {
    fs::exists(FOLDER).unwrap_or(false)
}

fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let mut words = line.split(' ').filter_map(|word| word.split_once('='));
    words.find_map(|(found, value)| (found == name).then_some(value)).unwrap_or_else(|| panic!("{name}: {line}"))
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .expect("a number")
}

/// All entries of guests, by their number (ASID) and address.
pub(super) fn entries() -> Vec<(u64, Entry)> {
    let text = fs::read_to_string(format!("{FOLDER}/rmp_by_gpa")).expect("the emulation's table");
    let mut entries = Vec::new();
    for line in text.lines() {
        let asid = number(field(line, "asid"));
        for page in 0..number(field(line, "pages")) {
            let entry = Entry {
                gpa: number(field(line, "gpa")) + page * 4096,
                state: field(line, "state").into(),
                vmsa: field(line, "vmsa") == "1",
            };
            entries.push((asid, entry));
        }
    }
    entries
}

/// How often a guest's access failed the RMP's check, on the whole machine.
pub(super) fn denied() -> u64 {
    let text = fs::read_to_string(format!("{FOLDER}/counters")).expect("the emulation's counters");
    let line = text.lines().find_map(|line| line.strip_prefix("npf_rmp "));
    line.expect("a counter").parse().expect("a number")
}
