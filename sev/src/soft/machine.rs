//! The machine: physical pages, who owns them, and which ASIDs are taken.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cvm_memory::addr::Gfn;
use cvm_memory::soft::GmemPage;

use crate::digest::VMSA_GPA;
use crate::rmp::{Host, HostCounters, Pfn, Rmp};

/// Pages of one file lie in a row: room for 4 PiB each.
const FILE_SHIFT: u32 = 40;
/// ASIDs for SNP guests, as many as the emulated host of the lab has.
const ASIDS: u32 = 99;

/// An SNP host: its RMP and its ASIDs. Several VMs can be on one.
#[derive(Debug)]
pub struct Machine {
    state: Mutex<State>,
    watcher: OnceLock<Watcher>,
}

/// Who wants to hear of denied accesses.
struct Watcher(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) host: Host,
    /// Files by inode, numbered in the order in which they were first seen. Number zero is the kernel's own memory.
    files: BTreeMap<u64, u64>,
    kernel_pages: u64,
    free_asids: BTreeSet<u32>,
}

impl State {
    pub(super) fn pfn(&mut self, page: GmemPage) -> Pfn {
        let next = u64::try_from(self.files.len()).unwrap_or(0).saturating_add(1);
        let file = *self.files.entry(page.file).or_insert(next);
        Pfn(file.wrapping_shl(FILE_SHIFT) | page.page.get())
    }

    /// A page of KVM's own for a save area, which the firmware has taken.
    pub(super) fn save_area(&mut self, asid: u32) -> Option<Pfn> {
        let pfn = Pfn(self.kernel_pages);
        self.kernel_pages = self.kernel_pages.saturating_add(1);
        let gfn = Gfn::containing(VMSA_GPA.get());
        self.host.assign(pfn, gfn, asid, true).ok()?;
        self.host.rmp_mut().launch(pfn, true);
        Some(pfn)
    }

    pub(super) fn take_asid(&mut self) -> Option<u32> {
        self.free_asids.pop_first()
    }

    pub(super) fn free_asid(&mut self, asid: u32) {
        self.free_asids.insert(asid);
    }
}

impl Machine {
    /// A machine without guests.
    pub fn new() -> Arc<Self> {
        Self::with_asids(ASIDS)
    }

    /// A machine that can have so many SNP guests at a time.
    pub fn with_asids(asids: u32) -> Arc<Self> {
        let state =
            State { host: Host::new(), files: BTreeMap::new(), kernel_pages: 0, free_asids: (1..=asids).collect() };
        Arc::new(Self { state: Mutex::new(state), watcher: OnceLock::new() })
    }

    /// Has `watch` called at every access of a guest that the RMP denies and Linux finds nothing to do about: the guest will try
    /// again, for ever if nobody changes anything. Only the first to ask is heard. `watch` must not look at the machine.
    pub fn when_denied(&self, watch: impl Fn() + Send + Sync + 'static) {
        let _somebody_else = self.watcher.set(Watcher(Box::new(watch)));
    }

    pub(super) fn denied(&self) {
        if let Some(Watcher(watch)) = self.watcher.get() {
            watch();
        }
    }

    /// Looks at the RMP.
    pub fn rmp<R>(&self, look: impl FnOnce(&Rmp) -> R) -> R {
        look(self.lock().host.rmp())
    }

    /// What Linux has done with the RMP so far.
    pub fn counters(&self) -> HostCounters {
        self.lock().host.counters()
    }

    /// Pages that are assigned to any guest.
    pub fn assigned(&self) -> usize {
        self.rmp(|rmp| rmp.iter().count())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
