//! What the tests of edits share: guests that pass the gate, and somebody who keeps dirty bits.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod random;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cvm_memory::addr::{FilePage, GfnRange};
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::convert::{Listener, ListenerError, Request, SharedRun, State as PageState};
use cvm_memory::edit::{Harvest, Prefer, Step};
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::gate::{Gate, Kick, VcpuPass};
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Exit, Hazards, Hypervisor, Platform};
use cvm_memory::layout::{Memslot, SlotFlags};
use cvm_memory::memory::{CommitOptions, Committed, CvmMemory, EditError, SlotSpec};
use cvm_memory::soft::{Arch, SlotInfo, SoftVm, Tagged};
use cvm_memory_testkit::{Call, Guest, GuestOp, Mapped, Outcome, Recorder};
#[allow(unused_imports, reason = "each test file uses its own part")]
pub use cvm_memory_testkit::{gfn, gfns};
use nix::errno::Errno;

/// Ends what others do until then when it goes, by a panic too.
pub struct Done<'a>(pub &'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

pub fn slice(size: u64) -> SharedSlice {
    SharedSlice { backing: Arc::new(SharedMemory::new(size).unwrap()), offset: 0 }
}

/// Memory that is never private, of pages `offset` on of `backing`.
pub fn plain(gpa: u64, size: u64, backing: &Arc<dyn SharedBacking>, offset: u64, flags: SlotFlags) -> SlotSpec {
    let shared = SharedSlice { backing: Arc::clone(backing), offset };
    SlotSpec { id: None, gpa, size, shared, private: None, flags }
}

/// Kinds and frames of what was done.
pub fn steps(done: &Committed) -> Vec<(&'static str, GfnRange)> {
    done.steps.iter().map(|step: &Step| (step.kind(), step.slot().gfns)).collect()
}

/// The slots, without their ids.
pub fn slots(memory: &CvmMemory) -> Vec<GfnRange> {
    memory.space().layout().table().slots().map(|slot| slot.gfns).collect()
}

pub type Vm = Recorder<SoftVm>;

pub const FEW: CommitOptions = CommitOptions {
    prefer: Prefer::FewSlots,
    patience: std::time::Duration::from_secs(60),
    lose_private: false,
    free_rebound: false,
    lose_dirty: false,
};
pub const BESIDE: CommitOptions = CommitOptions { prefer: Prefer::NoInterruption, ..FEW };

/// Memory that is never private, on a VM of the default type: `pages` of it, in a mapping of twice that.
pub fn plain_vm(pages: u64, flags: SlotFlags) -> (Vm, Arc<CvmMemory>, Arc<dyn SharedBacking>) {
    let vm = Recorder::new(SoftVm::default_type());
    let backing = slice(2 * pages * PAGE).backing;
    let slot = plain(0, pages * PAGE, &backing, 0, flags);
    let memory = CvmMemory::builder().slot(slot).build(Arc::new(vm.clone())).unwrap();
    vm.take();
    (vm, Arc::new(memory), backing)
}

pub fn private_vm(vm: SoftVm, pages: u64) -> (Vm, Arc<CvmMemory>) {
    let vm = Recorder::new(vm);
    let memory = CvmMemory::builder().ram(0, pages * PAGE).address_limit(1 << 30).build(Arc::new(vm.clone())).unwrap();
    vm.take();
    (vm, Arc::new(memory))
}

/// One edit: the 64 pages of memory from frame 0 on go, and so many that can be private come there.
pub fn replace_by_private(vm: &Vm, memory: &CvmMemory, pages: u64) -> Result<Committed, EditError> {
    let size = pages * PAGE;
    let private = Some((Arc::new(vm.create_guest_memfd(size, 0).unwrap()), FilePage::ZERO));
    let mut edit = memory.edit();
    edit.delete(0, 64 * PAGE).unwrap();
    edit.create(SlotSpec { id: None, gpa: 0, size, shared: slice(size), private, flags: SlotFlags::empty() }).unwrap();
    edit.commit(&BESIDE)
}

pub fn share(memory: &CvmMemory, start: u64, end: u64) {
    memory.convert(&Request { range: gfns(start, end), to: PageState::Shared }).unwrap().converted().unwrap();
}

/// Who maps shared memory: what it has, and how often it was told.
#[derive(Debug, Default)]
pub struct Device {
    pub mapped: Mapped,
    pub told: Mutex<Vec<(bool, u64, u64)>>,
    /// Fails to map this frame.
    pub broken: Mutex<Option<u64>>,
}

impl Listener for Device {
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        if self.broken.lock().unwrap().is_some_and(|bad| run.gfns.contains(gfn(bad))) {
            return Err(Errno::ENOSPC.into());
        }
        self.told.lock().unwrap().push((true, run.gfns.start().get(), run.gfns.end().get()));
        self.mapped.map(run);
        Ok(())
    }

    fn unmap(&self, run: &SharedRun) {
        self.told.lock().unwrap().push((false, run.gfns.start().get(), run.gfns.end().get()));
        self.mapped.unmap(run);
    }
}

impl Device {
    pub fn on(memory: &CvmMemory) -> Arc<Self> {
        let device = Arc::new(Self::default());
        let listener: Arc<dyn Listener> = Arc::clone(&device) as Arc<dyn Listener>;
        memory.add_listener(&listener).unwrap();
        device.told.lock().unwrap().clear();
        device
    }

    pub fn told(&self) -> Vec<(bool, u64, u64)> {
        std::mem::take(&mut self.told.lock().unwrap())
    }
}

pub fn kvm_slots(vm: &Vm) -> Vec<SlotInfo> {
    vm.inner().slots()
}

pub fn region_calls(vm: &Vm) -> Vec<(u32, u64)> {
    let region =
        |call: Call| if let Call::SetUserMemoryRegion2(r) = call { Some((r.slot, r.memory_size)) } else { None };
    vm.take().into_iter().filter_map(region).collect()
}

/// A vCPU with everything a VMM's thread has: the gate, and what handles exits.
#[derive(Debug)]
pub struct Runner<G> {
    pub guest: G,
    pass: VcpuPass,
    exits: VcpuExits,
    /// Exits that were not conversions.
    pub unexplained: Vec<String>,
    pub completed: u64,
}

impl<G: Guest> Runner<G> {
    pub fn new(memory: &Arc<CvmMemory>, guest: G, kick: Arc<dyn Kick>) -> Self {
        Self::with_gate(memory, memory.gate(), guest, kick)
    }

    pub fn with_gate(memory: &Arc<CvmMemory>, gate: &Arc<Gate>, guest: G, kick: Arc<dyn Kick>) -> Self {
        let pass = Gate::register(gate, kick);
        let exits = VcpuExits::new(Arc::clone(memory));
        Self { guest, pass, exits, unexplained: Vec::new(), completed: 0 }
    }

    /// Does `op` to its end, as a VMM would.
    pub fn perform(&mut self, op: GuestOp) -> Outcome {
        self.guest.start(op);
        loop {
            let inside = self.pass.enter().unwrap();
            let result = self.guest.run();
            drop(inside);
            match result {
                // A guest that takes several steps halts after each.
                Ok(Exit::Halt) => {
                    if let Some(outcome) = self.guest.result() {
                        return outcome;
                    }
                }
                Ok(mut exit) => {
                    let what = format!("{exit:x?}");
                    match self.exits.handle(&mut exit) {
                        Action::Resume(Handled::Completed) => self.completed += 1,
                        Action::Resume(_) => {}
                        other => panic!("{what} came to {other:x?}"),
                    }
                    if !matches!(exit, Exit::MemoryFault(_) | Exit::Hypercall(_)) {
                        self.unexplained.push(what);
                    }
                }
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => panic!("run failed: {errno}"),
            }
        }
    }
}

/// Keeps dirty bits by offset in the one mapping there is, and checks each against the memory: with nobody inside, what has
/// changed since last time must be dirty (the scheme of the kernel's `dirty_log_test`). Page values are their first 8 bytes.
#[derive(Debug)]
pub struct Bits {
    vm: KvmVm,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub struct State {
    /// Pages that were dirty at any time.
    pub dirty: BTreeSet<u64>,
    seen: BTreeMap<u64, u64>,
    /// Pages that the library says it has written.
    told: BTreeSet<u64>,
    /// Pages that changed without a bit.
    pub lost: Vec<u64>,
    pub harvests: u64,
}

impl Bits {
    pub fn new(vm: &KvmVm) -> Arc<Self> {
        Arc::new(Self { vm: vm.clone(), state: Mutex::default() })
    }

    pub fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Collects from all slots that log.
    pub fn collect(&self, memory: &CvmMemory) {
        let space = memory.space();
        let logged = |slot: &&Memslot| slot.flags.contains(SlotFlags::LOG_DIRTY);
        for slot in space.layout().table().slots().filter(logged) {
            self.harvest(slot, space.shared(slot.id).unwrap()).unwrap();
        }
    }
}

impl Harvest for Bits {
    fn harvest(&self, slot: &Memslot, memory: &SharedSlice) -> Result<(), Errno> {
        let size = usize::try_from(slot.gfns.bytes()).unwrap();
        let log = self.vm.vm().get_dirty_log(slot.id.raw(), size).map_err(|error| Errno::from_raw(error.errno()))?;
        let state = &mut *self.state();
        state.harvests += 1;
        let is_dirty = |page: u64| {
            let word = log[usize::try_from(page / 64).unwrap()];
            word >> (page % 64) & 1 == 1
        };
        // All pages of small slots; of large ones those that are dirty, since reading the others would allocate them.
        let pages: Vec<u64> = if slot.gfns.pages() <= 4096 {
            (0..slot.gfns.pages()).collect()
        } else {
            let words = log.iter().enumerate().filter(|(_, word)| **word != 0);
            words.flat_map(|(at, _)| (at as u64 * 64)..(at as u64 * 64 + 64)).filter(|page| is_dirty(*page)).collect()
        };
        for page in pages {
            let offset = memory.offset / PAGE + page;
            let bytes = memory.backing.slice(offset * PAGE, 8).unwrap();
            let mut value = [0; 8];
            bytes.copy_to(&mut value[..]);
            let value = u64::from_le_bytes(value);
            let before = state.seen.insert(offset, value).unwrap_or(0);
            if state.told.remove(&offset) || is_dirty(page) {
                state.dirty.insert(offset);
            } else if before != value {
                state.lost.push(offset);
            }
        }
        Ok(())
    }

    fn wrote(&self, memory: &SharedSlice, bytes: u64) {
        let (first, end) = (memory.offset / PAGE, (memory.offset + bytes).div_ceil(PAGE));
        self.state().told.extend(first..end);
    }
}

/// A platform with hazards.
#[derive(Debug)]
pub struct Hazardous(pub Hazards);

impl Arch for Hazardous {
    fn platform(&self) -> Platform {
        Platform { hazards: self.0, name: "hazardous", ..Tagged::PLATFORM }
    }
    fn has_protected_state(&self) -> bool {
        true
    }
}

pub fn hazardous(hazards: Hazards) -> (Vm, Arc<CvmMemory>) {
    private_vm(SoftVm::with_arch(Arc::new(Hazardous(hazards))), 64)
}
