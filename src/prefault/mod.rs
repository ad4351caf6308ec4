//! Memory ahead of use: allocated, and mapped, before the guest touches it.
//!
//! A private page costs an exit's worth of work at its first touch: the page is allocated and zeroed, on some platforms
//! converted, and mapped. Done ahead, and in large pieces over several vCPUs, it costs the guest nothing. Only what the
//! record says is private is touched: mapping a page of the other kind is at best a waste, and on some platforms fatal.
//!
//! The work goes piece by piece, each under its range's lock: the attribute is set if it has not been yet, the file pages
//! are allocated (one call for at least 2 MiB), and a vCPU maps them. It can be stopped between pieces, and says what is
//! left, so that it can be resumed. It converts nothing.
//!
//! Mirrors `fallocate(2)` on a guest_memfd and `KVM_PRE_FAULT_MEMORY` (`kvm_vcpu_pre_fault_memory()` in
//! `virt/kvm/kvm_main.c`).

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::mpsc::{self, Sender};
use std::thread;

use nix::errno::Errno;

use crate::addr::{GfnRange, PAGES_PER_2M, merge_adjacent};
use crate::convert::{Converter, LockError, Outcome, StepError};
use crate::gmem::GmemError;
use crate::hypervisor::{PreFaultMemory, Vcpu};

/// What to do ahead of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefaultOptions {
    /// Allocate the file's pages. Private memory follows the NUMA policy of the thread that allocates it.
    pub allocate: bool,
    /// Map the pages, on as many vCPUs as are given. Without vCPUs nothing is mapped.
    pub map: bool,
    /// Pages per piece, at least 512: how long a conversion of the same range may have to wait.
    pub piece_pages: u64,
    /// How often in a row a call may be interrupted or put off without any progress.
    pub patience: u32,
}

impl Default for PrefaultOptions {
    fn default() -> Self {
        Self { allocate: true, map: true, piece_pages: 8 * PAGES_PER_2M, patience: 1 << 16 }
    }
}

/// How far it has come, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes to do in all, as the record had it at the start.
    pub total: u64,
}

/// What has been done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prefaulted {
    /// Bytes of private memory that are there now.
    pub bytes: u64,
    /// What was not looked at because the callback stopped the work: give it to the next call.
    pub left: Vec<GfnRange>,
}

/// Why a piece of memory could not be had ahead of use.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PieceError {
    /// The range could not be locked.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// KVM's attribute could not be set.
    #[error("materialise gfns {gfns}")]
    Materialise {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        cause: StepError,
    },
    /// The file's pages could not be allocated.
    #[error("allocate gfns {gfns}")]
    Allocate {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        error: GmemError,
    },
    /// The pages could not be mapped.
    #[error("map gfns {gfns}, at {gpa:#x}")]
    Map {
        /// The frames.
        gfns: GfnRange,
        /// The first byte that is not mapped.
        gpa: u64,
        /// Why; `EAGAIN` or `EINTR` if there was no progress for too long.
        #[source]
        errno: Errno,
    },
}

/// Prefaulting stopped at an error.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{} bytes are in place, gfns {at} are not", .done.bytes)]
pub struct PrefaultError {
    /// What was done before and beside it, and what is left, the piece that failed included.
    pub done: Prefaulted,
    /// The piece that failed.
    pub at: GfnRange,
    /// Why.
    #[source]
    pub cause: PieceError,
}

/// Allocates and maps the private pages of `ranges` (ascending, disjoint), on the calling thread if there is at most one
/// vCPU, else with a thread for each, as far as these are to be had. `progress` is called on the calling thread after each piece and may stop the work.
///
/// # Errors
/// [`PrefaultError`] with what is left.
pub fn prefault(
    converter: &Converter,
    ranges: &[GfnRange],
    vcpus: &mut [&mut dyn Vcpu],
    options: &PrefaultOptions,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Prefaulted, PrefaultError> {
    let private: Vec<_> = ranges.iter().flat_map(|&gfns| private_runs(converter, gfns)).collect();
    let total = private.iter().map(GfnRange::bytes).fold(0, u64::saturating_add);
    let unit = options.piece_pages.max(PAGES_PER_2M);
    let mut tally = Tally { total, ..Tally::default() };
    let queue = Queue::new(private.iter().flat_map(|gfns| gfns.chunks(unit)).collect());

    if vcpus.len() > 1 {
        thread::scope(|scope| {
            let (sender, reports) = mpsc::channel();
            for vcpu in vcpus.iter_mut() {
                let (sender, queue) = (sender.clone(), &queue);
                let work = move || work(converter, queue, *vcpu, options, &sender);
                // A thread that cannot be had is one less.
                let _joined_by_the_scope = thread::Builder::new().spawn_scoped(scope, work);
            }
            drop(sender);
            for (gfns, result) in reports {
                tally.take(&queue, gfns, result, progress);
            }
        });
    }
    // All of it, unless there were threads.
    let mut vcpu = vcpus.first_mut().map(|vcpu| &mut **vcpu);
    while let Some(gfns) = queue.next() {
        // An inner `as_deref_mut` would need a sized vCPU.
        let result = piece(converter, gfns, vcpu.as_mut().map(|vcpu| &mut **vcpu as &mut dyn Vcpu), options);
        tally.take(&queue, gfns, result, progress);
    }
    tally.finish(&queue)
}

/// What of `gfns` is memory and declared private.
fn private_runs(converter: &Converter, gfns: GfnRange) -> Vec<GfnRange> {
    let memory: Vec<_> = converter.space().private_pieces(gfns).into_iter().map(|piece| piece.gfns).collect();
    memory.into_iter().flat_map(|gfns| converter.declared().member_runs(gfns)).collect()
}

type Report = (GfnRange, Result<u64, PieceError>);

fn work(
    converter: &Converter,
    queue: &Queue,
    vcpu: &mut dyn Vcpu,
    options: &PrefaultOptions,
    reports: &Sender<Report>,
) {
    while let Some(gfns) = queue.next() {
        let result = piece(converter, gfns, Some(&mut *vcpu), options);
        if reports.send((gfns, result)).is_err() {
            return;
        }
    }
}

/// One piece, under its lock. What has been converted to shared since the start is left alone. Returns the bytes done.
fn piece(
    converter: &Converter,
    gfns: GfnRange,
    mut vcpu: Option<&mut dyn Vcpu>,
    options: &PrefaultOptions,
) -> Result<u64, PieceError> {
    let _guard = converter.hold(gfns)?;
    let space = converter.space();
    match converter.materialise_locked(gfns, &space) {
        Outcome::Unchanged | Outcome::Converted { .. } => {}
        Outcome::RolledBack { cause } | Outcome::Poisoned { cause, .. } => {
            return Err(PieceError::Materialise { gfns, cause });
        }
    }
    let mut done = 0u64;
    for run in private_runs(converter, gfns) {
        if options.allocate {
            for piece in space.private_pieces(run) {
                let Some(file) = space.file(piece.file) else { continue };
                retry(options.patience, || {
                    converter.counters().issued.allocate.add(1);
                    match file.allocate(piece.pages) {
                        Err(GmemError::Call { errno: Errno::EINTR, .. }) => Ok(ControlFlow::Continue(false)),
                        Err(error) => Err(error),
                        Ok(()) => Ok(ControlFlow::Break(())),
                    }
                })
                .map_err(|error| PieceError::Allocate {
                    gfns: piece.gfns,
                    error: error.unwrap_or(GmemError::Call {
                        call: "allocation",
                        range: piece.pages,
                        errno: Errno::EINTR,
                    }),
                })?;
            }
        }
        if let Some(vcpu) = vcpu.as_mut().filter(|_| options.map) {
            map(converter, run, &mut **vcpu, options.patience)?;
        }
        done = done.saturating_add(run.bytes());
    }
    Ok(done)
}

/// Maps `gfns`, all private, on one vCPU.
fn map(converter: &Converter, gfns: GfnRange, vcpu: &mut dyn Vcpu, patience: u32) -> Result<(), PieceError> {
    converter.counters().naive.pre_fault.add(gfns.pages());
    let mut rest = PreFaultMemory { gpa: gfns.start_byte(), size: gfns.bytes(), flags: 0 };
    let mut last = Errno::EAGAIN;
    retry(patience, || {
        let before = rest;
        converter.counters().issued.pre_fault.add(1);
        let failed = match vcpu.pre_fault_memory(&mut rest) {
            // Address and size move together, or this is not progress but nonsense.
            Ok(()) if rest.gpa.checked_add(rest.size) == Some(gfns.end_byte()) && rest.size <= before.size => {
                let done = rest.size == 0;
                return Ok(if done { ControlFlow::Break(()) } else { ControlFlow::Continue(rest.size < before.size) });
            }
            Ok(()) => Err(Errno::EIO),
            Err(errno @ (Errno::EINTR | Errno::EAGAIN)) => {
                last = errno;
                Ok(ControlFlow::Continue(false))
            }
            Err(errno) => Err(errno),
        };
        // Nothing was mapped, whatever the call has left in there.
        rest = before;
        failed
    })
    .map_err(|errno| PieceError::Map { gfns, gpa: rest.gpa, errno: errno.unwrap_or(last) })
}

/// Repeats `call` until it breaks, fails, or has made no progress `patience` times in a row (then the error is `None`).
fn retry<E>(patience: u32, mut call: impl FnMut() -> Result<ControlFlow<(), bool>, E>) -> Result<(), Option<E>> {
    let mut idle = 0u32;
    while idle <= patience {
        match call().map_err(Some)? {
            ControlFlow::Break(()) => return Ok(()),
            ControlFlow::Continue(true) => idle = 0,
            ControlFlow::Continue(false) => {
                idle = idle.saturating_add(1);
                thread::yield_now();
            }
        }
    }
    Err(None)
}

/// Pieces still to be done.
#[derive(Debug)]
struct Queue(Mutex<std::vec::IntoIter<GfnRange>>);

impl Queue {
    fn new(pieces: Vec<GfnRange>) -> Self {
        Self(Mutex::new(pieces.into_iter()))
    }

    fn next(&self) -> Option<GfnRange> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).next()
    }

    fn drain(&self) -> Vec<GfnRange> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).by_ref().collect()
    }
}

/// What has come of the pieces so far.
#[derive(Debug, Default)]
struct Tally {
    total: u64,
    bytes: u64,
    left: Vec<GfnRange>,
    stopped: bool,
    failed: Option<(GfnRange, PieceError)>,
}

impl Tally {
    fn take(
        &mut self,
        queue: &Queue,
        gfns: GfnRange,
        result: Result<u64, PieceError>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) {
        match result {
            Ok(bytes) => {
                self.bytes = self.bytes.saturating_add(bytes);
                // Pieces that others had begun when it was stopped still come in.
                if !self.stopped && progress(Progress { done: self.bytes, total: self.total }).is_break() {
                    self.stopped = true;
                    self.left.extend(queue.drain());
                }
            }
            Err(error) => {
                self.left.push(gfns);
                self.left.extend(queue.drain());
                self.failed.get_or_insert((gfns, error));
            }
        }
    }

    fn finish(mut self, queue: &Queue) -> Result<Prefaulted, PrefaultError> {
        self.left.extend(queue.drain());
        self.left.sort_unstable();
        let done = Prefaulted { bytes: self.bytes, left: merge_adjacent(self.left) };
        match self.failed {
            None => Ok(done),
            Some((at, cause)) => Err(PrefaultError { done, at, cause }),
        }
    }
}
