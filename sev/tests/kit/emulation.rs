//! What the lab's emulated firmware and RMP say of themselves, in debugfs.
#![allow(dead_code, reason = "each test program uses its part")]

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory_sev::SNP;

const FOLDER: &str = "/sys/kernel/debug/snp_emulation";

/// The emulation counts for the whole machine and fails the next command whoever gives it: one test at a time.
pub struct Emulation(#[allow(dead_code, reason = "held")] MutexGuard<'static, ()>);

/// `name=value` words of a line.
pub type Line = BTreeMap<String, String>;

impl Emulation {
    /// `None`, with a line that says so, where there is no emulation.
    pub fn here() -> Option<Self> {
        static ONE: Mutex<()> = Mutex::new(());
        if !fs::exists(FOLDER).unwrap_or(false) {
            return cvm_memory_testkit::skip::skip(format_args!(
                "no {FOLDER}: this needs the emulated SNP host of the lab"
            ));
        }
        Some(Self(ONE.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn lines(&self, file: &str) -> Vec<Line> {
        let text = fs::read_to_string(format!("{FOLDER}/{file}")).unwrap();
        let words = |line: &str| {
            line.split_whitespace()
                .filter_map(|word| word.split_once('='))
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .collect()
        };
        text.lines().map(words).collect()
    }

    /// The guest that was started with this `gosvw`, and its updates.
    pub fn guest(&self, gosvw: [u8; 16]) -> (Line, Vec<Line>) {
        let gosvw: String = gosvw.iter().map(|byte| format!("{byte:02x}")).collect();
        let lines = self.lines("digest");
        let guest = lines.iter().find(|line| line.get("gosvw") == Some(&gosvw)).expect("the guest is listed").clone();
        let own = |line: &&Line| line.get("guest") == guest.get("guest") && line.contains_key("update");
        let updates = lines.iter().filter(own).cloned().collect();
        (guest, updates)
    }

    /// State of the RMP entry for a guest's page; `None` if there is none.
    pub fn rmp_state(&self, asid: &str, gpa: u64) -> Option<String> {
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        let line = self.lines("rmp_by_gpa").into_iter().find(|line| {
            let (start, pages) = (number(&line["gpa"]), line["pages"].parse::<u64>().unwrap());
            line["asid"] == asid && (start..start + pages * 4096).contains(&gpa)
        });
        line.map(|line| line["state"].clone())
    }

    pub fn counter(&self, name: &str) -> u64 {
        let text = fs::read_to_string(format!("{FOLDER}/counters")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.expect(name).parse().unwrap()
    }

    /// Fails later operations; see the emulation's description.
    pub fn inject(&self, what: &str) {
        fs::write(format!("{FOLDER}/inject"), what).unwrap();
    }

    /// Waits until as many entries are assigned as `before`: a VM goes some time after its last descriptor.
    pub fn assigned_falls_to(&self, before: u64) {
        for _ in 0..200 {
            if self.counter("rmp_assigned") == before {
                return;
            }
            sleep(Duration::from_millis(10));
        }
        panic!("{} pages are assigned, {before} were", self.counter("rmp_assigned"));
    }
}

/// A VM of type 4, or a skip.
pub fn snp_vm() -> Option<KvmVm> {
    cvm_memory_testkit::kvm(SNP)
}
