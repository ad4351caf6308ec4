//! What the tests of conversions share: a VM's memory on a software KVM whose every mechanism writes down what it is asked
//! for and fails on demand, and a check that record, KVM and listeners agree.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use cvm_memory::addr::{FilePage, GfnRange, PAGE_SIZE};
use cvm_memory::backing::SharedSlice;
use cvm_memory::convert::{
    ConvertError, ConvertOptions, DiscardPolicy, Listener, ListenerError, Outcome, PinPolicy, Request, SharedRun, State,
};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Exit, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, Vcpu};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{CvmMemory, Materialise, SlotSpec};
use cvm_memory::soft::{GuestOp, OpResult, SoftVm};
use cvm_memory_testkit::{Call, Mapped, Recorder, WatchedMemory};
#[allow(unused_imports, reason = "each test file uses its own part")]
pub use cvm_memory_testkit::{gfn, gfns};
use nix::errno::Errno;

pub fn frames(range: &GfnRange) -> Range<u64> {
    range.start().get()..range.end().get()
}

/// One thing that a mechanism was asked to do. Ranges are half-open, in pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Did {
    Attributes(Range<u64>, State),
    /// Pages of the file.
    Punch(Range<u64>),
    Map(usize, Range<u64>),
    Unmap(usize, Range<u64>),
    /// Which backing, and its pages.
    DiscardShared(usize, Range<u64>),
    /// Slot number and size; zero deletes.
    Slot(u32, u64),
    Other,
}

fn pages(start: u64, len: u64) -> Range<u64> {
    start / PAGE_SIZE..(start + len) / PAGE_SIZE
}

impl From<&Call> for Did {
    fn from(call: &Call) -> Self {
        match call {
            Call::SetMemoryAttributes(a) => Self::Attributes(
                pages(a.address, a.size),
                State::from_private(a.attributes & MEMORY_ATTRIBUTE_PRIVATE != 0),
            ),
            Call::Fallocate { offset, len, .. } if call.is_punch_hole() => {
                Self::Punch(pages(u64::try_from(*offset).unwrap(), u64::try_from(*len).unwrap()))
            }
            Call::SetUserMemoryRegion2(region) => Self::Slot(region.slot, region.memory_size),
            _ => Self::Other,
        }
    }
}

/// Everything passes here, in the order in which it happens.
#[derive(Debug, Default)]
struct Log {
    done: Vec<Did>,
    /// Calls that may fail, so far.
    calls: u64,
    /// Which of them fail, counted from zero.
    failing: BTreeSet<u64>,
    failed: u64,
    due: bool,
}

#[derive(Debug, Default, Clone)]
pub struct Wire(Arc<Mutex<Log>>);

impl Wire {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap()
    }

    fn note(&self, did: Did) {
        self.log().done.push(did);
    }

    /// Notes a call that may fail; true if it is to fail.
    fn call(&self, did: Did) -> bool {
        let mut log = self.log();
        log.done.push(did);
        let at = log.calls;
        log.calls += 1;
        let fails = log.failing.contains(&at);
        log.failed += u64::from(fails);
        fails
    }
}

/// A device that maps what is shared.
#[derive(Debug)]
pub struct Ears {
    index: usize,
    wire: Wire,
    mapped: Mapped,
}

impl Listener for Ears {
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        if self.wire.call(Did::Map(self.index, frames(&run.gfns))) {
            return Err(Errno::ENOMEM.into());
        }
        self.mapped.map(run);
        Ok(())
    }

    fn unmap(&self, run: &SharedRun) {
        self.wire.note(Did::Unmap(self.index, frames(&run.gfns)));
        self.mapped.unmap(run);
    }
}

/// What a [`World`] is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// Accesses say by themselves whether they are private, so the attribute may be set lazily.
    pub tagged: bool,
    pub lazy: bool,
    pub initial: State,
    pub discard: DiscardPolicy,
    pub chunk_pages: u64,
    pub materialise_pages: u64,
    /// First frame and pages of each slot; their file pages follow one another.
    pub slots: Vec<(u64, u64)>,
    /// Each slot has shared memory of its own, else all share one mapping.
    pub own_backings: bool,
    pub granule: u64,
    pub listeners: usize,
    /// Slots without private memory.
    pub plain: Vec<(u64, u64)>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tagged: false,
            lazy: false,
            initial: State::Private,
            discard: DiscardPolicy::Immediate,
            chunk_pages: ConvertOptions::default().chunk_pages,
            materialise_pages: ConvertOptions::default().materialise_pages,
            slots: vec![(0, 1024)],
            own_backings: false,
            granule: PAGE_SIZE,
            listeners: 1,
            plain: Vec::new(),
        }
    }
}

/// A VM's memory, and everything around it.
pub struct World {
    pub vm: SoftVm,
    pub recorder: Recorder<SoftVm>,
    pub memory: CvmMemory,
    pub file: Arc<GuestMemfd>,
    pub backings: Vec<Arc<WatchedMemory>>,
    pub ears: Vec<Arc<Ears>>,
    pub specs: Vec<SlotSpec>,
    pub tagged: bool,
    wire: Wire,
}

impl World {
    pub fn new(config: &Config) -> Self {
        let vm = if config.tagged { SoftVm::tagged() } else { SoftVm::software_protected() };
        let recorder = Recorder::new(vm.clone());
        let wire = Wire::default();
        let total: u64 = config.slots.iter().map(|slot| slot.1).sum();
        let file = Arc::new(recorder.create_guest_memfd(total * PAGE_SIZE, 0).unwrap());
        let mut backings = Vec::new();
        let mut backing = |pages: u64| {
            let (index, wire) = (backings.len(), wire.clone());
            let watch = move |offset, len| {
                let fails = wire.call(Did::DiscardShared(index, self::pages(offset, len)));
                if fails { Err(Errno::EIO) } else { Ok(()) }
            };
            backings.push(Arc::new(WatchedMemory::new(pages * PAGE_SIZE, config.granule, watch)));
            Arc::clone(&backings[index])
        };
        let common = (!config.own_backings).then(|| backing(total));
        let mut specs = Vec::new();
        let mut page = 0;
        for &(start, pages) in &config.slots {
            let shared = match &common {
                Some(common) => SharedSlice { backing: common.clone(), offset: page * PAGE_SIZE },
                None => SharedSlice { backing: backing(pages), offset: 0 },
            };
            specs.push(SlotSpec {
                id: None,
                gpa: start * PAGE_SIZE,
                size: pages * PAGE_SIZE,
                shared,
                private: Some((Arc::clone(&file), FilePage::new(page).unwrap())),
                flags: SlotFlags::empty(),
            });
            page += pages;
        }
        for &(start, pages) in &config.plain {
            let shared = SharedSlice { backing: backing(pages), offset: 0 };
            let (gpa, size) = (start * PAGE_SIZE, pages * PAGE_SIZE);
            specs.push(SlotSpec { id: None, gpa, size, shared, private: None, flags: SlotFlags::empty() });
        }
        let options = ConvertOptions {
            discard: config.discard,
            pins: PinPolicy::Refuse,
            chunk_pages: config.chunk_pages,
            materialise_pages: config.materialise_pages,
        };
        let builder = CvmMemory::builder()
            .initial(config.initial)
            .materialise(if config.lazy { Materialise::Lazy } else { Materialise::Eager })
            .convert_options(options);
        let builder = specs.iter().cloned().fold(builder, |builder, slot| builder.slot(slot));
        let memory = builder.build(Arc::new(recorder.clone())).unwrap();
        let ears: Vec<_> = (0..config.listeners)
            .map(|index| Arc::new(Ears { index, wire: wire.clone(), mapped: Mapped::default() }))
            .collect();
        for listener in &ears {
            memory.add_listener(&(Arc::clone(listener) as Arc<dyn Listener>)).unwrap();
        }
        let world = Self { vm, recorder, memory, file, backings, ears, specs, tagged: config.tagged, wire };
        world.arm(&[]);
        world
    }

    /// Forgets what was done, and has the calls with these numbers fail, counted from zero. Calls that never fail are not
    /// counted.
    pub fn arm(&self, failing: &[u64]) {
        *self.wire.log() = Log { failing: failing.iter().copied().collect(), ..Log::default() };
        self.recorder.clear_faults();
        self.recorder.take();
        let wire = self.wire.clone();
        // The first to look notes the call and fails none; one of the others then fails it.
        let look = move |call: &Call| {
            let due = wire.call(call.into());
            wire.log().due = due;
            false
        };
        self.recorder.fail_matching(look, Errno::ENOMEM);
        for _ in failing {
            let wire = self.wire.clone();
            self.recorder.fail_matching(move |_| std::mem::take(&mut wire.log().due), Errno::ENOMEM);
        }
    }

    /// How many calls were made to fail since [`arm`](Self::arm).
    pub fn failed(&self) -> u64 {
        self.wire.log().failed
    }

    /// How many calls that can fail were made.
    pub fn calls(&self) -> u64 {
        self.wire.log().calls
    }

    /// What was done since it was last asked, in order.
    pub fn take(&self) -> Vec<Did> {
        std::mem::take(&mut self.wire.log().done)
    }

    pub fn convert(&self, start: u64, end: u64, to: State) -> Result<Outcome, ConvertError> {
        self.memory.convert(&Request { range: gfns(start, end), to })
    }

    /// A conversion that must succeed; returns the pages that changed.
    pub fn converted(&self, start: u64, end: u64, to: State) -> u64 {
        match self.convert(start, end, to) {
            Ok(Outcome::Unchanged) => 0,
            Ok(Outcome::Converted { pages }) => pages,
            other => panic!("{other:?}"),
        }
    }

    /// The frames that are memory with a private side, from the slots of the software KVM's user.
    pub fn convertible(&self) -> Vec<u64> {
        self.frames_where(|spec| spec.private.is_some())
    }

    pub fn frames_where(&self, wanted: impl Fn(&SlotSpec) -> bool) -> Vec<u64> {
        let live: BTreeSet<u64> = self.vm.slots().iter().map(|slot| slot.gfns.start_byte()).collect();
        let specs = self.specs.iter().filter(|spec| live.contains(&spec.gpa) && wanted(spec));
        specs.flat_map(|spec| spec.gpa / PAGE_SIZE..(spec.gpa + spec.size) / PAGE_SIZE).collect()
    }

    pub fn declared(&self) -> BTreeSet<u64> {
        let declared = self.memory.converter().declared();
        self.convertible().into_iter().filter(|n| declared.contains(gfn(*n))).collect()
    }

    pub fn materialised(&self) -> BTreeSet<u64> {
        let set = self.memory.converter().materialised();
        self.convertible().into_iter().filter(|n| set.contains(gfn(*n))).collect()
    }

    /// What KVM itself says.
    pub fn attributes(&self) -> BTreeSet<u64> {
        self.vm.private_gfns().iter().flat_map(frames).collect()
    }

    /// Where the shared memory of a frame is, computed from the slots given.
    fn hva(&self, gfn: u64) -> Option<u64> {
        let gpa = gfn * PAGE_SIZE;
        let spec = self.specs.iter().find(|spec| (spec.gpa..spec.gpa + spec.size).contains(&gpa))?;
        Some(spec.shared.hva() + (gpa - spec.gpa))
    }

    /// Record, KVM and listeners agree. `lazy`: the record may be ahead of KVM.
    #[track_caller]
    pub fn check(&self, lazy: bool) {
        self.check_but(lazy, &BTreeSet::new());
    }

    /// As [`check`](Self::check), but for frames that listeners could not map again.
    #[track_caller]
    pub fn check_but(&self, lazy: bool, unmapped: &BTreeSet<u64>) {
        let (declared, attributes) = (self.declared(), self.attributes());
        let live: BTreeSet<u64> = self.convertible().into_iter().collect();
        assert!(self.materialised().iter().eq(attributes.intersection(&live)), "record of attributes against KVM");
        if lazy {
            assert!(
                attributes.intersection(&live).all(|gfn| declared.contains(gfn)),
                "private in KVM, declared shared"
            );
        } else {
            assert!(declared.iter().eq(attributes.intersection(&live)), "declared against KVM");
        }
        let shared: BTreeMap<u64, u64> = self
            .frames_where(|_| true)
            .into_iter()
            .filter(|gfn| !declared.contains(gfn) && !unmapped.contains(gfn))
            .map(|gfn| (gfn, self.hva(gfn).unwrap()))
            .collect();
        for ears in &self.ears {
            assert_eq!(ears.mapped.frames(), shared, "listener {}", ears.index);
        }
    }

    /// The guest goes through pages, each accessed as it is declared, with what `op` makes of frame, address and privacy.
    #[track_caller]
    fn guest_does(&self, gfns: impl IntoIterator<Item = u64>, op: impl Fn(u64, u64, bool) -> GuestOp) {
        let mut vcpu = self.vm.create_vcpu();
        let declared = self.declared();
        for gfn in gfns {
            vcpu.start(op(gfn, gfn * PAGE_SIZE, declared.contains(&gfn)));
            let exit = vcpu.run();
            assert!(matches!(exit, Ok(Exit::Halt)), "{exit:?}");
            assert_eq!(vcpu.take_result(), Some(OpResult::Done), "gfn {gfn:#x}");
        }
    }

    /// The guest fills pages.
    #[track_caller]
    pub fn guest_fill(&self, gfns: impl IntoIterator<Item = u64>, byte: impl Fn(u64) -> u8) {
        self.guest_does(gfns, |gfn, gpa, private| GuestOp::Fill { gpa, len: PAGE_SIZE, byte: byte(gfn), private });
    }

    /// The guest finds this in its pages.
    #[track_caller]
    pub fn guest_check(&self, gfns: impl IntoIterator<Item = u64>, byte: impl Fn(u64) -> u8) {
        self.guest_does(gfns, |gfn, gpa, private| GuestOp::Check { gpa, len: PAGE_SIZE, byte: byte(gfn), private });
    }
}
