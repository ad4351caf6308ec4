//! A hypervisor that writes down what it is asked for, and fails, or lacks a capability, on demand.
//!
//! [`Recorder`] stands between the library and any [`Hypervisor`]. Every call that changes something is recorded,
//! `fallocate` on the files it creates included; questions ([`Hypervisor::check_extension`]) are not. A call that was
//! told to fail never reaches the hypervisor inside.
#![allow(unsafe_code, reason = "set_user_memory_region2 is passed on under the same contract")]

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cvm_memory::gmem::{FileId, GmemOps, GuestMemfd};
use cvm_memory::hypervisor::{Cap, ClearDirtyLog, DirtyLog, Hypervisor, MemoryAttributes, MemoryRegion, Platform};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;

/// One call that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// [`Hypervisor::enable_cap`].
    EnableCap {
        /// Which.
        cap: Cap,
        /// Its arguments.
        args: [u64; 4],
    },
    /// [`Hypervisor::create_guest_memfd`].
    CreateGuestMemfd {
        /// Bytes.
        size: u64,
        /// Flags as given.
        flags: u64,
    },
    /// [`Hypervisor::set_user_memory_region2`].
    SetUserMemoryRegion2(MemoryRegion),
    /// [`Hypervisor::set_memory_attributes`].
    SetMemoryAttributes(MemoryAttributes),
    /// [`Hypervisor::get_dirty_log`], which clears the log unless that is done by hand.
    GetDirtyLog {
        /// Address space and id.
        slot: u32,
    },
    /// [`Hypervisor::clear_dirty_log`].
    ClearDirtyLog {
        /// Address space and id.
        slot: u32,
        /// First page of the slot.
        first_page: u64,
        /// Pages.
        num_pages: u32,
        /// Pages that were to be cleared.
        bits: u64,
    },
    /// [`Hypervisor::reset_dirty_rings`].
    ResetDirtyRings,
    /// `fallocate` on a file that the recorder created.
    Fallocate {
        /// The file, by the id of the `GuestMemfd` that the recorder gave out.
        file: FileId,
        /// Its mode.
        mode: FallocateFlags,
        /// First byte.
        offset: i64,
        /// Bytes.
        len: i64,
    },
}

impl Call {
    /// Whether this frees pages of a file.
    pub const fn is_punch_hole(&self) -> bool {
        matches!(self, Self::Fallocate { mode, .. } if mode.contains(FallocateFlags::FALLOC_FL_PUNCH_HOLE))
    }
}

/// A call, and what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The call.
    pub call: Call,
    /// What it returned; `None` until it has.
    pub result: Option<Result<(), Errno>>,
    /// Whether it was made to fail, and so never reached the hypervisor inside.
    pub injected: bool,
}

/// When a call is to fail.
enum Trigger {
    /// When that many calls are still to come before it.
    After(u64),
    /// When it matches.
    Matching(Box<dyn Fn(&Call) -> bool + Send>),
}

#[derive(Default)]
struct Log {
    entries: Vec<Entry>,
    faults: Vec<(Trigger, Errno)>,
    /// Capabilities that are not answered as they are.
    answers: Vec<(Cap, u64)>,
}

#[derive(Default)]
struct Shared(Mutex<Log>);

impl Shared {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records `call`, and makes it with `inner` unless it is to fail. The lock is not held meanwhile.
    fn record<T>(&self, call: Call, inner: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let (at, fault) = self.log().begin(call);
        let result = fault.map_or_else(inner, Err);
        if let Some(entry) = self.log().entries.get_mut(at).filter(|entry| entry.call == call) {
            entry.result = Some(result.as_ref().map(|_| ()).map_err(|errno| *errno));
        }
        result
    }
}

impl Log {
    fn begin(&mut self, call: Call) -> (usize, Option<Errno>) {
        let mut due = None;
        for (at, (trigger, _)) in self.faults.iter_mut().enumerate() {
            let now = match trigger {
                Trigger::After(0) => true,
                Trigger::After(left) => {
                    *left -= 1;
                    false
                }
                Trigger::Matching(matches) => matches(&call),
            };
            if now && due.is_none() {
                due = Some(at);
            }
        }
        let fault = due.map(|at| self.faults.remove(at).1);
        self.entries.push(Entry { call, result: None, injected: fault.is_some() });
        (self.entries.len() - 1, fault)
    }
}

/// Wraps a hypervisor. Clones share the record.
///
/// ```no_run
/// # use cvm_memory::hypervisor::{Hypervisor, Platform, kvm::KvmVm};
/// # use cvm_memory_testkit::{Call, Recorder};
/// # use nix::errno::Errno;
/// # fn f(vm: KvmVm) {
/// let vm = Recorder::new(vm);
/// vm.fail_nth(2, Errno::ENOMEM);
/// assert!(vm.create_guest_memfd(4096, 0).is_ok());
/// assert_eq!(vm.create_guest_memfd(4096, 0).unwrap_err(), Errno::ENOMEM);
/// assert_eq!(vm.calls(), [Call::CreateGuestMemfd { size: 4096, flags: 0 }; 2]);
/// # }
/// ```
#[derive(Clone)]
pub struct Recorder<H> {
    inner: H,
    shared: Arc<Shared>,
}

impl<H: Hypervisor> Recorder<H> {
    /// Records the calls that go to `inner` through here.
    pub fn new(inner: H) -> Self {
        Self { inner, shared: Arc::default() }
    }

    /// The hypervisor inside; calls made on it directly are not recorded.
    pub const fn inner(&self) -> &H {
        &self.inner
    }

    /// All calls so far, in the order in which they were begun.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.log().entries.iter().map(|entry| entry.call).collect()
    }

    /// All calls so far, with what came of them.
    pub fn entries(&self) -> Vec<Entry> {
        self.shared.log().entries.clone()
    }

    /// All calls so far, which are then forgotten.
    pub fn take(&self) -> Vec<Call> {
        self.shared.log().entries.drain(..).map(|entry| entry.call).collect()
    }

    /// How many calls were made so far.
    pub fn count(&self) -> usize {
        self.shared.log().entries.len()
    }

    /// How many of them match.
    pub fn count_matching(&self, matches: impl Fn(&Call) -> bool) -> usize {
        self.shared.log().entries.iter().filter(|entry| matches(&entry.call)).count()
    }

    /// Makes the `n`-th call from now fail with `errno`; 1 is the next. Several can be told to.
    ///
    /// # Panics
    /// If `n` is zero.
    pub fn fail_nth(&self, n: u64, errno: Errno) {
        let left = n.checked_sub(1).expect("calls are counted from one");
        self.shared.log().faults.push((Trigger::After(left), errno));
    }

    /// Makes the next call that matches fail with `errno`, once.
    pub fn fail_matching(&self, matches: impl Fn(&Call) -> bool + Send + 'static, errno: Errno) {
        self.shared.log().faults.push((Trigger::Matching(Box::new(matches)), errno));
    }

    /// Has the hypervisor say `answer` when it is asked for `cap`; zero, and it lacks that.
    pub fn answer(&self, cap: Cap, answer: u64) {
        self.shared.log().answers.push((cap, answer));
    }

    /// Lets every call through again. Returns how many were still told to fail and had not.
    pub fn clear_faults(&self) -> usize {
        let mut log = self.shared.log();
        let left = log.faults.len();
        log.faults.clear();
        left
    }
}

impl<H: Hypervisor> Hypervisor for Recorder<H> {
    fn platform(&self) -> Platform {
        self.inner.platform()
    }

    fn check_extension(&self, cap: Cap) -> u64 {
        let answer = self.shared.log().answers.iter().rev().find(|(of, _)| *of == cap).map(|(_, answer)| *answer);
        answer.unwrap_or_else(|| self.inner.check_extension(cap))
    }

    fn enable_cap(&self, cap: Cap, args: [u64; 4]) -> Result<(), Errno> {
        self.shared.record(Call::EnableCap { cap, args }, || self.inner.enable_cap(cap, args))
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<GuestMemfd, Errno> {
        self.shared.record(Call::CreateGuestMemfd { size, flags }, || {
            let inner = self.inner.create_guest_memfd(size, flags)?;
            let (size, flags, id) = (inner.size(), inner.flags(), Arc::new(OnceLock::new()));
            let ops = RecordedFile { inner, id: Arc::clone(&id), shared: Arc::clone(&self.shared) };
            let file = GuestMemfd::new(size, flags, Box::new(ops)).expect("the size of a file that exists");
            id.get_or_init(|| file.id());
            Ok(file)
        })
    }

    unsafe fn set_user_memory_region2(&self, region: &MemoryRegion) -> Result<(), Errno> {
        self.shared.record(Call::SetUserMemoryRegion2(*region), || {
            // SAFETY: the caller's promise is the one that is asked for.
            unsafe { self.inner.set_user_memory_region2(region) }
        })
    }

    fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno> {
        self.shared.record(Call::SetMemoryAttributes(*attributes), || self.inner.set_memory_attributes(attributes))
    }

    fn get_dirty_log(&self, slot: u32, log: &mut DirtyLog) -> Result<(), Errno> {
        self.shared.record(Call::GetDirtyLog { slot }, || self.inner.get_dirty_log(slot, log))
    }

    fn clear_dirty_log(&self, clear: &ClearDirtyLog<'_>) -> Result<(), Errno> {
        let ClearDirtyLog { slot, first_page, num_pages, bitmap } = *clear;
        let bits = bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
        let call = Call::ClearDirtyLog { slot, first_page, num_pages, bits };
        self.shared.record(call, || self.inner.clear_dirty_log(clear))
    }

    fn reset_dirty_rings(&self) -> Result<u64, Errno> {
        self.shared.record(Call::ResetDirtyRings, || self.inner.reset_dirty_rings())
    }
}

impl<H: fmt::Debug> fmt::Debug for Recorder<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("inner", &self.inner).field("entries", &self.shared.log().entries).finish()
    }
}

/// A file of the hypervisor inside, whose `fallocate` is recorded.
struct RecordedFile {
    inner: GuestMemfd,
    id: Arc<OnceLock<FileId>>,
    shared: Arc<Shared>,
}

impl GmemOps for RecordedFile {
    fn fallocate(&self, mode: FallocateFlags, offset: i64, len: i64) -> Result<(), Errno> {
        let file = self.id.get().copied().unwrap_or_else(|| self.inner.id());
        let call = Call::Fallocate { file, mode, offset, len };
        self.shared.record(call, || self.inner.ops().fallocate(mode, offset, len))
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.ops().as_fd()
    }
}

impl fmt::Debug for RecordedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordedFile").field("inner", &self.inner).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
