//! What the lab's emulated firmware and RMP say of themselves, in debugfs.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use cvm_memory::addr::{Gfn, GfnRange};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory_sev::SNP;
use cvm_memory_sev::digest::VMSA_GPA;

use crate::skip::skip;

const FOLDER: &str = "/sys/kernel/debug/snp_emulation";

/// The emulation counts for the whole machine and fails the next command whoever gives it: one test at a time.
#[derive(Debug)]
pub struct Emulation(#[allow(dead_code, reason = "held")] MutexGuard<'static, ()>);

/// `name=value` words of a line.
pub type Line = BTreeMap<String, String>;

/// RMP entries of one guest and one state, contiguous in its frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The frames.
    pub gfns: GfnRange,
    /// The first one's page of the host.
    pub pfn: u64,
    /// `4k` or `2m`.
    pub size: String,
    /// `guest-valid`, for example.
    pub state: String,
}

impl Emulation {
    /// Whether there is an emulation.
    pub fn is_here() -> bool {
        fs::exists(FOLDER).unwrap_or(false)
    }

    /// `None`, with a line that says so, where there is no emulation.
    pub fn here() -> Option<Self> {
        static ONE: Mutex<()> = Mutex::new(());
        if !Self::is_here() {
            return skip(format_args!("no {FOLDER}: this needs the emulated SNP host of the lab"));
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
        let gfn = Gfn::containing(gpa);
        self.rmp(asid).into_iter().find(|entry| entry.gfns.contains(gfn)).map(|entry| entry.state)
    }

    /// The RMP entries of a guest, ascending, in runs of one state.
    pub fn rmp(&self, asid: &str) -> Vec<Entry> {
        let own = |line: Line| {
            let gfn = Gfn::containing(number(&line["gpa"]));
            let gfns = GfnRange::with_len(gfn, line["pages"].parse().unwrap()).unwrap();
            let entry =
                Entry { gfns, pfn: number(&line["pfn"]), size: line["size"].clone(), state: line["state"].clone() };
            (line["asid"] == asid).then_some(entry)
        };
        let mut entries: Vec<Entry> = self.lines("rmp_by_gpa").into_iter().filter_map(own).collect();
        entries.sort_by_key(|entry| entry.gfns.start());
        entries
    }

    /// The RMP entries of a guest's memory, by frame: page of the host, state, whether it is a save area. KVM's own save areas
    /// are none of its memory.
    pub fn pages(&self, asid: &str) -> BTreeMap<Gfn, (u64, String, bool)> {
        let mut pages = BTreeMap::new();
        // Here, unlike in the other file, what is contiguous is so in the host's memory too.
        for line in self.lines("rmp").into_iter().filter(|line| line["asid"] == asid) {
            let gpa = number(&line["gpa"]);
            if gpa == VMSA_GPA.get() {
                continue;
            }
            let first = Gfn::containing(gpa);
            for at in 0..line["pages"].parse().unwrap() {
                let entry = (number(&line["pfn"]) + at, line["state"].clone(), line["vmsa"] == "1");
                let before = pages.insert(first.checked_add(at).unwrap(), entry);
                assert_eq!(before, None, "two pages at {first:?} + {at}");
            }
        }
        pages
    }

    /// One of the emulation's counters.
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
        // A minute, as vCPUs have: whatever is emulated may be slow.
        for _ in 0..6000 {
            if self.counter("rmp_assigned") == before {
                return;
            }
            sleep(Duration::from_millis(10));
        }
        panic!("{} pages are assigned, {before} were", self.counter("rmp_assigned"));
    }
}

fn number(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

/// A VM of type 4, or a skip.
pub fn snp_vm() -> Option<KvmVm> {
    crate::kvm(SNP)
}
