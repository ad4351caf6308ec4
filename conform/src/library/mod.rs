//! Scenarios of the library: what it makes of requests, exits, listeners and failures, call by call.
//!
//! [`Played`] is a [`Live`] machine with a [`CvmMemory`] on it and the testkit's recorder in between. What is observed of an
//! operation is its outcome and, on lines of their own, everything that was done about it, in order: calls to KVM and to
//! files, what listeners were told, what shared memory was freed, which exits were handled how.
//!
//! ```
//! use cvm_memory_conform::library::LibraryScenario;
//!
//! let text = "\
//! vm kind=protected vcpus=1
//! ram gpa=0x10000000 size=0x200000
//! build
//! convert gpa=0x10000000 size=0x200000 to=shared
//! = converted 512
//! | attributes gpa=0x10000000 size=0x200000 shared
//! | punch f? offset=0x0 size=0x200000
//! ";
//! let scenario: LibraryScenario = text.parse()?;
//! assert_eq!(scenario.to_string(), text);
//! # Ok::<(), cvm_memory_conform::scenario::ParseError>(())
//! ```
//!
//! There is no second library to compare with, so these are played against their expectations only.

mod guests;
mod operation;
mod say;
mod wire;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use cvm_memory::addr::{FilePage, GfnRange, Gpa};
use cvm_memory::backing::{SharedBacking, SharedSlice};
use cvm_memory::convert::{ConvertOptions, Listener, ListenerId, Request, State};
use cvm_memory::exits::{ExitOptions, VcpuExits};
use cvm_memory::gmem::{FileId, GuestMemfd};
use cvm_memory::hypervisor::{Exit, HypercallExit, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MemoryFault};
use cvm_memory::layout::{SlotFlags, SlotId};
use cvm_memory::memory::{Builder, CvmMemory, SlotSpec};
use cvm_memory::prefault::PrefaultOptions;
use cvm_memory_testkit::{Call, GuestOp, Recorder, WatchedMemory};

use crate::guard;
use crate::live::Live;
use crate::machine::Machine;
use crate::scenario::{Descriptor, File, Operation, Scenario};
use guests::Watched;
pub use operation::{Act, Id, Kind, Memory, Name, Task};
use wire::{AnyVm, Device, Recorded, Wire, noted};

const PAGE: u64 = 4096;

/// A scenario of the library.
pub type LibraryScenario = Scenario<Act>;

/// Plays `scenario` on `machine`, which is of its kind; returns how many operations it has.
///
/// # Errors
/// The first step that comes to something else than it is expected to.
pub fn play(scenario: &LibraryScenario, machine: Live) -> Result<usize, String> {
    let mut played = Played::new(machine);
    for (step, what) in scenario.steps.iter().enumerate() {
        let seen = played.play(&what.operation);
        if let Some(expected) = &what.expected
            && !agree(expected, &seen)
        {
            let lines = |text: &str| text.replace('\n', "\n    | ");
            let (seen, expected) = (lines(&seen), lines(expected));
            return Err(format!("step {step}: {}\n    = {seen}\n  expected:\n    = {expected}", what.operation));
        }
    }
    Ok(scenario.steps.len())
}

/// What this kernel cannot tell is `unknown`, and as good as anything.
fn agree(expected: &str, seen: &str) -> bool {
    expected == seen
        || seen.contains(UNKNOWN) && {
            let (mut expected, mut seen) = (expected.split(' '), seen.split(' '));
            expected.by_ref().zip(seen.by_ref()).all(|(expected, seen)| expected == seen || seen.ends_with(UNKNOWN))
                && expected.eq(seen)
        }
}

const UNKNOWN: &str = "=unknown";

/// The library on a machine.
#[derive(Debug)]
pub struct Played {
    // In the order in which they have to go: who uses the memory, the memory, then what it is on.
    exits: Vec<VcpuExits>,
    memory: Option<Arc<CvmMemory>>,
    builder: Option<Builder>,
    convert: ConvertOptions,
    exit_options: ExitOptions,
    listeners: BTreeMap<Name, (Arc<Device>, Option<ListenerId>)>,
    backings: BTreeMap<Memory, Arc<WatchedMemory>>,
    files: BTreeMap<File, Arc<GuestMemfd>>,
    wire: Wire,
    vm: Recorded,
    live: Live,
}

impl Played {
    /// Nothing is built yet.
    pub fn new(live: Live) -> Self {
        let vm = Recorder::new(AnyVm(live.shared_vm()));
        Self {
            exits: Vec::new(),
            memory: None,
            builder: Some(CvmMemory::builder()),
            convert: ConvertOptions::default(),
            exit_options: ExitOptions::default(),
            listeners: BTreeMap::new(),
            backings: BTreeMap::new(),
            files: BTreeMap::new(),
            wire: Wire::new(vm.clone()),
            vm,
            live,
        }
    }

    /// Carries out one step, and says what was observed: a line, and another for each thing that was done.
    pub fn play(&mut self, act: &Act) -> String {
        let mut lines = vec![match act {
            Act::Task(task) => self.task(task),
            Act::Past(operation) => self.past(operation),
        }];
        lines.extend(self.wire.take(|call| self.call(call)));
        lines.join("\n")
    }

    /// Past the library, but for files: those are recorded.
    fn past(&mut self, operation: &Operation) -> String {
        if let Some(reason) = guard::refuse(self.live.shape(), operation) {
            return format!("skipped: {reason}");
        }
        let answer = match *operation {
            Operation::Create { file, size, flags } => self.vm.create_guest_memfd(size, flags).map(|new| {
                self.files.insert(file, Arc::new(new));
            }),
            Operation::Fallocate { file, mode, offset, len } => {
                let mode = nix::fcntl::FallocateFlags::from_bits_retain(mode.cast_signed());
                self.files[&file].ops().fallocate(mode, offset.cast_signed(), len.cast_signed())
            }
            _ => return self.live.play(operation).to_string(),
        };
        answer.map_or_else(|errno| format!("{errno:?}"), |()| "ok".into())
    }

    fn set(&mut self, change: impl FnOnce(Builder) -> Builder) -> String {
        self.builder = Some(change(self.builder.take().expect("to be said before `build`")));
        "ok".into()
    }

    fn task(&mut self, task: &Task) -> String {
        match *task {
            Task::Ram { gpa, size } => self.set(|builder| builder.ram(gpa, size)),
            Task::PlainRam { gpa, size } => self.set(|builder| builder.plain_ram(gpa, size)),
            Task::SlotSize { bytes } => self.set(|builder| builder.slot_size(bytes)),
            Task::Initial { state } => self.set(|builder| builder.initial(state)),
            Task::Limit { bytes } => self.set(|builder| builder.address_limit(bytes)),
            Task::Discard { policy } => {
                self.convert.discard = policy;
                self.set(|builder| builder)
            }
            Task::Chunk { call, fault } => {
                (self.convert.chunk_pages, self.convert.materialise_pages) = (call / PAGE, fault / PAGE);
                self.set(|builder| builder)
            }
            Task::Implicit { allowed } => {
                self.exit_options.implicit_conversion = allowed;
                self.set(|builder| builder)
            }
            Task::Build {} => self.build(),
            Task::Drop {} => {
                self.exits.clear();
                self.memory = None;
                "ok".into()
            }
            Task::Memory { name, size, granule } => {
                self.backings.insert(name, Arc::new(noted(name, size, granule, self.wire.clone())));
                "ok".into()
            }
            Task::Fail { call, nth, errno } => {
                self.wire.fail(call, nth, errno);
                "ok".into()
            }
            Task::Mapped { by } => runs(self.listeners[&by].0.runs().into_iter()),
            Task::Fill { vcpu, gpa, len, byte, private } => self.guest(vcpu, private, GuestOp::Fill { gpa, len, byte }),
            Task::Check { vcpu, gpa, len, byte, private } => {
                self.guest(vcpu, private, GuestOp::Check { gpa, len, byte })
            }
            Task::Ask { vcpu, gpa, pages, attributes } => {
                let args = [gpa, pages, attributes, 0];
                self.guest(vcpu, false, GuestOp::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args })
            }
            Task::Fault { vcpu, gpa, size, flags, errno } => {
                let mut exit = Exit::MemoryFault(MemoryFault { errno, flags, gpa, size });
                say::action(&self.exits[usize::from(vcpu)].handle(&mut exit))
            }
            ref task => self.on_memory(task),
        }
    }

    fn build(&mut self) -> String {
        let builder = self.builder.take().expect("a second `build`").convert_options(self.convert);
        match builder.build(Arc::new(self.vm.clone())) {
            Ok(memory) => {
                let memory = Arc::new(memory);
                let exits = |_| VcpuExits::with_options(Arc::clone(&memory), self.exit_options);
                self.exits = (0..self.live.shape().vcpus).map(exits).collect();
                self.memory = Some(memory);
                "ok".into()
            }
            Err(error) => format!("refused, {error}"),
        }
    }

    fn guest(&mut self, vcpu: u8, private: bool, op: GuestOp) -> String {
        let guest = self.live.guest(vcpu);
        guest.set_private(private);
        guests::run(guest, op, &mut self.exits[usize::from(vcpu)], &self.wire)
    }

    fn on_memory(&mut self, task: &Task) -> String {
        let memory = Arc::clone(self.memory.as_ref().expect("to be built"));
        match *task {
            Task::Slot { .. } => match self.spec(task) {
                Ok(spec) => match memory.add_slots(vec![spec]) {
                    Ok(ids) => format!("slot {}", ids[0].raw()),
                    Err(error) => say::slot(&error),
                },
                Err(reason) => reason.into(),
            },
            Task::Remove { id } => {
                memory.remove_slot(SlotId::from_raw(id)).map_or_else(|error| say::slot(&error), |()| "ok".into())
            }
            Task::Listen { by } => {
                let (device, wire) = (&mut self.listeners, self.wire.clone());
                let (device, id) = device.entry(by).or_insert_with(|| (Arc::new(Device::new(by, wire)), None));
                match memory.add_listener(&(Arc::clone(device) as Arc<dyn Listener>)) {
                    Ok(given) => {
                        *id = Some(given);
                        "ok".into()
                    }
                    Err(error) => say::listener(&error),
                }
            }
            Task::Unlisten { by } => {
                let id = self.listeners.get_mut(&by).and_then(|(_, id)| id.take()).expect("a listener");
                memory.remove_listener(id).map_or_else(|error| error.to_string(), |()| "ok".into())
            }
            Task::Convert { gpa, size, to } => match GfnRange::from_bytes(gpa, size) {
                Ok(range) => match memory.convert(&Request { range, to }) {
                    Ok(outcome) => say::outcome(&outcome),
                    Err(error) => say::convert(&error),
                },
                Err(_) => "refused, no whole pages".into(),
            },
            Task::Trim { budget } => match memory.trim(budget) {
                Ok(freed) => format!("freed {freed:#x}"),
                Err(error) => format!("failed, {}", say::step(&error)),
            },
            Task::Ahead { vcpu, gpa, size, allocate, patience } => {
                let range = GfnRange::from_bytes(gpa, size).expect("whole pages");
                let options = PrefaultOptions { allocate, patience, ..PrefaultOptions::default() };
                let mut vcpu = Watched { guest: self.live.guest(vcpu), wire: self.wire.clone() };
                match memory.prefault(&[range], &mut [&mut vcpu], &options, &mut |_| ControlFlow::Continue(())) {
                    Ok(done) => format!("done {:#x}", done.bytes),
                    Err(error) => say::ahead(&error),
                }
            }
            Task::Record { gpa, size } => record(&memory, GfnRange::from_bytes(gpa, size).expect("whole pages")),
            Task::Held {} => {
                let (resident, left) = (memory.resident(), memory.converter().deferred_bytes());
                let print = |bytes: Option<u64>| bytes.map_or(UNKNOWN.into(), |bytes| format!("={bytes:#x}"));
                let (private, shared) = (print(resident.private_bytes), print(resident.shared_bytes));
                format!("private{private} shared{shared} deferred={left:#x}")
            }
            Task::DeviceRead { gpa, len } => {
                let mut bytes = vec![0; usize::try_from(len).expect("small")];
                match memory.read(Gpa(gpa), &mut bytes) {
                    Ok(()) => crate::Observation::Bytes(Ok(bytes)).to_string(),
                    Err(error) => say::access(&error),
                }
            }
            Task::DeviceWrite { gpa, len, byte } => {
                let bytes = vec![byte; usize::try_from(len).expect("small")];
                memory.write(Gpa(gpa), &bytes).map_or_else(|error| say::access(&error), |()| "ok".into())
            }
            ref other => panic!("{other} is not about memory that is built"),
        }
    }

    fn spec(&self, task: &Task) -> Result<SlotSpec, &'static str> {
        let Task::Slot { id, flags, gpa, size, memory, from, file, offset } = *task else {
            panic!("{task} is no slot")
        };
        if offset % PAGE != 0 {
            return Err("cannot be said"); // the library has no word for it
        }
        let private = match file {
            Descriptor::File(name) => Some((Arc::clone(&self.files[&name]), FilePage::containing(offset))),
            Descriptor::None => None,
            Descriptor::Memfd | Descriptor::Foreign => return Err("cannot be said"),
        };
        let backing = Arc::clone(&self.backings[&memory]) as Arc<dyn SharedBacking>;
        Ok(SlotSpec {
            id: id.0.map(SlotId::from_raw),
            gpa,
            size,
            shared: SharedSlice { backing, offset: from },
            private,
            flags: SlotFlags::from_bits_retain(flags),
        })
    }

    /// A call in the words of the scenario. A file or memory that it does not know has been made by the library: `f?`, `b?`.
    fn call(&self, call: &Call) -> String {
        match call {
            Call::EnableCap { cap, args: [value, ..] } => format!("enable-cap cap={:#x} arg={value:#x}", cap.0),
            Call::CreateGuestMemfd { size, flags } => format!("create size={size:#x} flags={flags:#x}"),
            Call::SetUserMemoryRegion2(region) if region.memory_size == 0 => format!("delete slot={}", region.slot),
            Call::SetUserMemoryRegion2(region) => {
                let memory = self.backings.iter().find_map(|(name, memory)| {
                    let offset = region.userspace_addr.checked_sub(memory.hva()).filter(|at| *at < memory.size())?;
                    Some(format!("b{}+{offset:#x}", name.0))
                });
                let file = match region.guest_memfd {
                    -1 => "none".into(),
                    fd => self.file_where(|file| file.as_fd().as_raw_fd() == fd),
                };
                format!(
                    "region slot={} flags={:#x} gpa={:#x} size={:#x} memory={} file={file} offset={:#x}",
                    region.slot,
                    region.flags,
                    region.guest_phys_addr,
                    region.memory_size,
                    memory.unwrap_or("b?".into()),
                    region.guest_memfd_offset,
                )
            }
            Call::SetMemoryAttributes(it) => {
                let state = State::from_private(it.attributes & MEMORY_ATTRIBUTE_PRIVATE != 0);
                format!("attributes gpa={:#x} size={:#x} {state}", it.address, it.size)
            }
            Call::Fallocate { file, offset, len, .. } => {
                let verb = if call.is_punch_hole() { "punch" } else { "allocate" };
                format!("{verb} {} offset={offset:#x} size={len:#x}", self.file(*file))
            }
            other => format!("{other:x?}"),
        }
    }

    fn file(&self, id: FileId) -> String {
        self.file_where(|file| file.id() == id)
    }

    fn file_where(&self, wanted: impl Fn(&GuestMemfd) -> bool) -> String {
        let found = self.files.iter().find(|(_, file)| wanted(file));
        found.map_or("f?".into(), |(name, _)| operation::name_of(*name))
    }
}

fn runs(runs: impl Iterator<Item = (u64, u64)>) -> String {
    let all: Vec<String> = runs.map(|(start, size)| format!("{start:#x}..{:#x}", start + size)).collect();
    if all.is_empty() { "nothing".into() } else { all.join(" ") }
}

/// Runs of one state, whatever slots they are in.
fn record(memory: &CvmMemory, gfns: GfnRange) -> String {
    let mut all: Vec<(u64, u64, String)> = Vec::new();
    for run in memory.map().runs(gfns) {
        let told = if run.materialised { "" } else { " (not told yet)" };
        let state = format!("{}{told}", run.state);
        match all.last_mut() {
            Some((_, end, last)) if *end == run.gfns.start_byte() && *last == state => *end = run.gfns.end_byte(),
            _ => all.push((run.gfns.start_byte(), run.gfns.end_byte(), state)),
        }
    }
    let all: Vec<String> = all.into_iter().map(|(start, end, state)| format!("{start:#x}..{end:#x} {state}")).collect();
    if all.is_empty() { "nothing".into() } else { all.join(", ") }
}
