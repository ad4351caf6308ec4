//! What stands around the library and writes down what it does: below it the recorder, beside it listeners and shared memory.
#![allow(unsafe_code, reason = "passes on an unsafe method")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cvm_memory::addr::GfnRange;
use cvm_memory::convert::{Listener, ListenerError, SharedRun};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Cap, Hypervisor, MemoryAttributes, MemoryRegion, Platform};
use cvm_memory_testkit::{Call, Mapped, Recorder, WatchedMemory};
use nix::errno::Errno;

use super::operation::{Kind, Memory, Name};

/// A VM whose calls are written down.
pub(super) type Recorded = Recorder<AnyVm>;

/// Whatever VM it is.
#[derive(Debug, Clone)]
pub(super) struct AnyVm(pub Arc<dyn Hypervisor>);

impl Hypervisor for AnyVm {
    fn platform(&self) -> Platform {
        self.0.platform()
    }

    fn check_extension(&self, cap: Cap) -> u64 {
        self.0.check_extension(cap)
    }

    fn enable_cap(&self, cap: Cap, args: [u64; 4]) -> Result<(), Errno> {
        self.0.enable_cap(cap, args)
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<GuestMemfd, Errno> {
        self.0.create_guest_memfd(size, flags)
    }

    unsafe fn set_user_memory_region2(&self, region: &MemoryRegion) -> Result<(), Errno> {
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { self.0.set_user_memory_region2(region) }
    }

    fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno> {
        self.0.set_memory_attributes(attributes)
    }
}

/// What the recorder does not hear, each with the number of calls that came before it.
#[derive(Debug, Default)]
struct Notes {
    lines: Vec<(usize, String)>,
    /// Of each kind, how many are to come before the one that fails.
    faults: Vec<(Kind, u64, Errno)>,
}

/// Where listeners and memory write down what they are asked for, in order with the recorder's calls.
#[derive(Debug, Clone)]
pub(super) struct Wire {
    recorder: Recorded,
    notes: Arc<Mutex<Notes>>,
}

impl Wire {
    pub(super) fn new(recorder: Recorded) -> Self {
        Self { recorder, notes: Arc::default() }
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a line after all calls so far.
    pub(super) fn note(&self, line: impl Into<String>) {
        let at = self.recorder.count();
        self.notes().lines.push((at, line.into()));
    }

    /// Writes down a call that may fail, and says whether it does.
    pub(super) fn call(&self, kind: Kind, line: String) -> Result<(), Errno> {
        let mut due = None;
        self.notes().faults.retain_mut(|(of, left, errno)| {
            if *of != kind {
                return true;
            }
            *left -= 1;
            if *left == 0 {
                due = Some(*errno);
            }
            *left != 0
        });
        match due {
            None => self.note(line),
            Some(errno) => self.note(format!("{line}: {errno:?}")),
        }
        due.map_or(Ok(()), Err)
    }

    /// Has the `nth` call of that kind fail.
    pub(super) fn fail(&self, kind: Kind, nth: u64, errno: Errno) {
        assert!(nth > 0, "calls are counted from 1");
        let wanted: fn(&Call) -> bool = match kind {
            Kind::Attributes => |call| matches!(call, Call::SetMemoryAttributes(_)),
            Kind::Region => |call| matches!(call, Call::SetUserMemoryRegion2(_)),
            Kind::Punch => Call::is_punch_hole,
            Kind::Allocate => |call| matches!(call, Call::Fallocate { .. }) && !call.is_punch_hole(),
            Kind::Map | Kind::Discard | Kind::Prefault => {
                self.notes().faults.push((kind, nth, errno));
                return;
            }
        };
        let left = Mutex::new(nth);
        let matches = move |call: &Call| {
            let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
            if wanted(call) {
                *left = left.saturating_sub(1);
            }
            wanted(call) && *left == 0
        };
        self.recorder.fail_matching(matches, errno);
    }

    /// Everything since it was last asked, in order; calls as `print` has them.
    pub(super) fn take(&self, print: impl Fn(&Call) -> String) -> Vec<String> {
        let entries = self.recorder.entries();
        self.recorder.take();
        let notes = std::mem::take(&mut self.notes().lines);
        let mut notes = notes.into_iter().peekable();
        let mut lines = Vec::new();
        for (at, entry) in entries.iter().enumerate() {
            while let Some((_, line)) = notes.next_if(|(before, _)| *before <= at) {
                lines.push(line);
            }
            let call = print(&entry.call);
            lines.push(match entry.result {
                Some(Err(errno)) => format!("{call}: {errno:?}"),
                _ => call,
            });
        }
        lines.extend(notes.map(|(_, line)| line));
        lines
    }
}

/// The bytes of a range.
pub(super) fn bytes(gfns: &GfnRange) -> String {
    format!("gpa={:#x} size={:#x}", gfns.start_byte(), gfns.bytes())
}

/// A device that maps what is shared.
#[derive(Debug)]
pub(super) struct Device {
    name: Name,
    wire: Wire,
    mapped: Mapped,
}

impl Device {
    pub(super) fn new(name: Name, wire: Wire) -> Self {
        Self { name, wire, mapped: Mapped::default() }
    }

    /// Runs of frames that it has mapped, in bytes.
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        let frames: Vec<u64> = self.mapped.frames().into_keys().collect();
        let runs = frames.chunk_by(|a, b| a + 1 == *b);
        runs.map(|run| (run[0] * 4096, run.len() as u64 * 4096)).collect()
    }
}

impl Listener for Device {
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        self.wire.call(Kind::Map, format!("map l{} {}", self.name.0, bytes(&run.gfns)))?;
        self.mapped.map(run);
        Ok(())
    }

    fn unmap(&self, run: &SharedRun) {
        self.wire.note(format!("unmap l{} {}", self.name.0, bytes(&run.gfns)));
        self.mapped.unmap(run);
    }
}

/// Shared memory whose discards are written down.
pub(super) fn noted(Memory(name): Memory, size: u64, granule: u64, wire: Wire) -> WatchedMemory {
    WatchedMemory::new(size, granule, move |offset, len| {
        wire.call(Kind::Discard, format!("discard b{name} offset={offset:#x} size={len:#x}"))
    })
}
