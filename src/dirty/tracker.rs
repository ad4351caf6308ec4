//! One tracker over whichever mechanism was chosen: from KVM's logs and rings into the bitmaps of the backings.
//!
//! Bits are kept by backing, so a layout edit moves none. What an edit must do is to tell: [`Tracker::before_delete`] while no
//! vCPU is in the guest and the slot still has its log, and [`Tracker::edited`] with the layout that came of it. A slot's pages
//! are found in the bitmaps by where its memory lies in this process.
//!
//! A page gets into a bitmap only after KVM protects it again, whichever the mechanism; so whoever takes it from there may copy
//! it at once. What fails in the middle leaves pages where the next [`sync`](Tracker::sync) finds them. Where KVM lost something
//! (a ring that was written over, a log that did not fit), the pages that it may have been are all dirty.
//!
//! It sets no flags of slots: who logs, the layout says.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;

use super::bitmap::DirtyBitmap;
use super::negotiate::{Clearing, Mechanism};
use super::ring::{DirtyRings, Owners, ResetError, RingStats, Stray};
use crate::addr::{FilePage, FileRange, GfnRange, PAGE_SIZE};
use crate::backing::SharedBacking;
use crate::hypervisor::{ClearDirtyLog, DirtyLog, DirtyRingMemory, Hypervisor};
use crate::layout::{Layout, Memslot, SlotFlags, SlotId};
use crate::sync::blocking::{Mutex, MutexGuard};

/// Pages that one `KVM_CLEAR_DIRTY_LOG` is about at most: 64 MiB, so that no vCPU waits behind it for long. A multiple of 64.
const CLEAR_PAGES: u64 = 16384;
/// Times in a row that a vCPU may find its ring full and nothing in it.
const PATIENCE: u32 = 64;

/// What becomes of slots that KVM cannot log because they have a guest_memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unloggable {
    /// Tracking does not start.
    #[default]
    Refuse,
    /// Every page of their shared memory counts as written, each time.
    AlwaysDirty,
}

/// Which sync it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// vCPUs run. Writes of devices that KVM logs beside its rings are left for the last one.
    Running,
    /// The last one: no vCPU is in the guest, nor enters it, since before this was called. Whatever was written is found.
    Last,
}

/// What a sync has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SyncReport {
    /// Pages, those included that were found before and not taken since.
    pub pages: u64,
    /// An entry of a ring that named no page there is: KVM gives none such.
    pub stray: Option<Stray>,
    /// KVM may have lost pages: those of all slots, or of slots whose log did not fit, count as written.
    pub overrun: bool,
}

/// Why tracking cannot start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// A slot with a guest_memfd.
    #[error("slot {slot} at gfns {gfns} has a guest_memfd, and kvm logs no such slot")]
    Unloggable {
        /// The slot.
        slot: SlotId,
        /// Its frames.
        gfns: GfnRange,
    },
    /// A slot's memory is in no backing that was added.
    #[error("the memory of slot {slot}, {bytes:#x} bytes at {hva:#x}, is in no backing that is tracked")]
    NoBacking {
        /// The slot.
        slot: SlotId,
        /// Its address in this process.
        hva: u64,
        /// Its size.
        bytes: u64,
    },
    /// No room for a log.
    #[error("memory for the log of slot {slot}")]
    Memory {
        /// The slot.
        slot: SlotId,
        /// Why.
        #[source]
        errno: Errno,
    },
}

/// Why a sync is not complete. What was found until then is in the bitmaps, the rest is found by the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SyncError {
    /// The slots are not all known since the last edit.
    #[error("the layout has changed, and a slot could not be followed")]
    Layout(#[source] StartError),
    /// The log of a slot could not be had.
    #[error("get the dirty log of slot {slot}")]
    Get {
        /// The slot.
        slot: SlotId,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// The log of a slot could not be cleared.
    #[error("clear the dirty log of slot {slot}, {pages} pages from page {first:#x} on")]
    Clear {
        /// The slot.
        slot: SlotId,
        /// First page of the slot.
        first: u64,
        /// How many.
        pages: u64,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// The rings could not be reset.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// A vCPU finds its ring full, over and over, and there is nothing in any ring: KVM has written over entries, and waits for
    /// them for ever.
    #[error("a dirty ring is full, but nothing is in it: kvm has overrun it")]
    Stuck,
}

impl SyncError {
    /// What KVM gave, or `EIO` if it was not KVM's doing.
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Get { errno, .. }
            | Self::Clear { errno, .. }
            | Self::Layout(StartError::Memory { errno, .. })
            | Self::Reset(ResetError::Call(errno)) => *errno,
            Self::Layout(_) | Self::Reset(_) | Self::Stuck => Errno::EIO,
        }
    }
}

/// Memory that slots are over, and its bitmap.
#[derive(Debug)]
struct Backing {
    hva: u64,
    bytes: u64,
    bitmap: Arc<DirtyBitmap>,
}

/// Where an owner's pages are.
#[derive(Debug, Clone)]
struct Place {
    bitmap: Arc<DirtyBitmap>,
    first: FilePage,
    pages: u64,
}

impl Place {
    fn range(&self, first: u64, pages: u64) -> Option<FileRange> {
        let start = self.first.get().checked_add(first)?;
        FileRange::with_len(FilePage::new(start)?, pages).ok()
    }

    fn set(&self, first: u64, pages: u64) {
        if let Some(range) = self.range(first, pages) {
            self.bitmap.set(range);
        }
    }

    fn set_all(&self) {
        self.set(0, self.pages);
    }
}

/// A slot that is tracked.
#[derive(Debug)]
struct Tracked {
    slot: Memslot,
    owner: u64,
    place: Place,
    /// Whether KVM logs it. If not, all of it counts as written.
    logged: bool,
    /// Where its log is read to, if it has one.
    log: Option<DirtyLog>,
}

#[derive(Debug, Default)]
struct State {
    backings: Vec<Backing>,
    unloggable: Unloggable,
    slots: BTreeMap<SlotId, Tracked>,
    /// Owners that were replaced while pages of theirs were in the rings.
    retired: BTreeMap<u64, Place>,
    next_owner: u64,
    rings: DirtyRings,
    /// What kept [`Tracker::edited`] from following the layout.
    lost_track: Option<StartError>,
    /// Times in a row that nothing was in any ring.
    empty: u32,
}

impl Owners for BTreeMap<SlotId, Tracked> {
    fn owner(&self, slot: SlotId) -> Option<(u64, u64)> {
        self.get(&slot).filter(|tracked| tracked.logged).map(|tracked| (tracked.owner, tracked.place.pages))
    }
}

/// Finds out which pages were written. A page is in a bitmap only after KVM protects it again.
///
/// Every method may be called by any thread; they wait for each other.
pub struct Tracker {
    vm: Arc<dyn Hypervisor>,
    mechanism: Mechanism,
    state: Mutex<State>,
}

impl Tracker {
    /// With a mechanism that has been [enabled](Mechanism::enable) on `vm`.
    pub fn new(vm: Arc<dyn Hypervisor>, mechanism: Mechanism) -> Self {
        Self { vm, mechanism, state: Mutex::default() }
    }

    /// The mechanism.
    pub const fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    /// Adds memory that slots are, or will be, over. Its bitmap is for devices, and for whoever copies: bit `n` is byte
    /// `n * 4096` of the backing.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn add_backing(&self, backing: &dyn SharedBacking) -> Result<Arc<DirtyBitmap>, Errno> {
        let bitmap = Arc::new(DirtyBitmap::new(backing.size() / PAGE_SIZE)?);
        let (hva, bytes) = (backing.hva(), backing.size());
        self.state().backings.push(Backing { hva, bytes, bitmap: Arc::clone(&bitmap) });
        Ok(bitmap)
    }

    /// Adds the ring of a vCPU that has not run yet.
    pub fn add_ring(&self, memory: Box<dyn DirtyRingMemory>) {
        self.state().rings.add(memory);
    }

    /// What goes on in the rings.
    pub fn ring_stats(&self) -> RingStats {
        self.state().rings.stats()
    }

    /// Starts with the slots of `layout` that are logged. Others are left alone, but for those with a guest_memfd: where one of
    /// these is to be tracked or not, `unloggable` says.
    ///
    /// # Errors
    /// [`StartError`]; nothing is tracked then.
    pub fn start(&self, layout: &Layout, unloggable: Unloggable) -> Result<(), StartError> {
        let mut state = self.state();
        state.unloggable = unloggable;
        state.slots.clear();
        state.lost_track = None;
        self.follow(&mut state, layout)
    }

    /// Forgets all slots. What is in the bitmaps stays there.
    pub fn stop(&self) {
        let mut state = self.state();
        state.slots.clear();
        state.lost_track = None;
    }

    /// `slot` is about to be deleted or moved, and its log with it. No vCPU is in the guest, and none enters before
    /// [`edited`](Self::edited).
    ///
    /// # Errors
    /// [`SyncError`]: the slot must stay.
    pub fn before_delete(&self, slot: &Memslot) -> Result<(), SyncError> {
        let mut state = self.state();
        let state = &mut *state;
        if matches!(self.mechanism, Mechanism::Ring { .. }) {
            self.drain(state)?;
        }
        match state.slots.get_mut(&slot.id) {
            Some(tracked) => self.read_log(tracked).map(drop),
            None => Ok(()),
        }
    }

    /// The slots are those of `layout` now. If one of them cannot be followed, the next sync says why.
    pub fn edited(&self, layout: &Layout) {
        let mut state = self.state();
        // What is in the rings is the old slots', whatever their ids stand for from here on.
        let State { rings, slots, .. } = &mut *state;
        drop(rings.harvest(slots));
        state.lost_track = self.follow(&mut state, layout).err();
    }

    /// Bytes at address `hva` were written, and KVM knows nothing of it. Memory that was not added is nobody's business.
    pub fn wrote(&self, hva: u64, bytes: u64) {
        let state = self.state();
        let holds = |backing: &&Backing| hva.checked_sub(backing.hva).is_some_and(|offset| offset < backing.bytes);
        let Some(backing) = state.backings.iter().find(holds) else { return };
        let offset = hva.saturating_sub(backing.hva);
        let end = offset.saturating_add(bytes).min(backing.bytes).checked_next_multiple_of(PAGE_SIZE);
        let end = end.map(FilePage::containing);
        if let Some(pages) = end.and_then(|end| FileRange::new(FilePage::containing(offset), end).ok()) {
            backing.bitmap.set(pages);
        }
    }

    /// Finds out what was written since the last time, and notes it in the bitmaps.
    ///
    /// # Errors
    /// [`SyncError`]; nothing is lost.
    pub fn sync(&self, stage: Stage) -> Result<SyncReport, SyncError> {
        let mut state = self.state();
        let state = &mut *state;
        if let Some(error) = state.lost_track {
            return Err(SyncError::Layout(error));
        }
        let mut report = SyncReport::default();
        if matches!(self.mechanism, Mechanism::Ring { .. }) {
            report = self.drain(state)?;
        }
        if matches!(self.mechanism, Mechanism::Bitmap(_)) || (self.has_logs() && stage == Stage::Last) {
            for tracked in state.slots.values_mut() {
                let (pages, whole) = self.read_log(tracked)?;
                report.pages = report.pages.saturating_add(pages);
                report.overrun |= !whole;
            }
        }
        for tracked in state.slots.values().filter(|tracked| !tracked.logged) {
            tracked.place.set_all();
            report.pages = report.pages.saturating_add(tracked.place.pages);
        }
        Ok(report)
    }

    /// A vCPU came back because its ring is full: makes room in all of them. Then it may run again.
    ///
    /// # Errors
    /// [`SyncError`]. [`SyncError::Stuck`] if it cannot be helped.
    pub fn ring_full(&self) -> Result<SyncReport, SyncError> {
        let mut state = self.state();
        let report = self.drain(&mut state)?;
        if state.empty > PATIENCE { Err(SyncError::Stuck) } else { Ok(report) }
    }

    /// Takes the written pages of tracked slots out of the bitmaps, as frames, ascending and merged. Pages that were written
    /// and are in no slot now stay in the bitmaps.
    pub fn take_gfns(&self) -> Vec<GfnRange> {
        let state = self.state();
        let mut runs: Vec<GfnRange> = Vec::new();
        let mut slots: Vec<&Tracked> = state.slots.values().collect();
        slots.sort_unstable_by_key(|tracked| (tracked.slot.id.as_id, tracked.slot.gfns.start()));
        for tracked in slots {
            let Place { bitmap, first, pages } = &tracked.place;
            let Ok(range) = FileRange::with_len(*first, *pages) else { continue };
            for run in bitmap.take_within(range) {
                let Some(gfns) = run.rebase(*first, tracked.slot.gfns.start()) else { continue };
                match runs.last_mut() {
                    Some(last) if last.end() == gfns.start() => *last = last.hull(&gfns),
                    _ => runs.push(gfns),
                }
            }
        }
        runs
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Changed in steps of which each leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether slots have logs.
    const fn has_logs(&self) -> bool {
        matches!(self.mechanism, Mechanism::Bitmap(_) | Mechanism::Ring { backed: true, .. })
    }

    /// Brings the slots up to date. Those that are the same as before keep their owner.
    fn follow(&self, state: &mut State, layout: &Layout) -> Result<(), StartError> {
        let mut next = BTreeMap::new();
        for slot in layout.table().slots() {
            let logged = slot.flags.contains(SlotFlags::LOG_DIRTY);
            let unloggable = slot.flags.contains(SlotFlags::GUEST_MEMFD);
            if unloggable && state.unloggable == Unloggable::Refuse {
                return Err(StartError::Unloggable { slot: slot.id, gfns: slot.gfns });
            }
            if !logged && !unloggable {
                continue;
            }
            let place = state.place(slot)?;
            let known = state.slots.get(&slot.id);
            let owner = known.filter(|known| same(&known.slot, slot)).map(|known| known.owner);
            if owner.is_none() && matches!(self.mechanism, Mechanism::Bitmap(Clearing::ByHandFromAll)) {
                // As its log says, which an edit may have had cleared.
                place.set_all();
            }
            let owner = owner.unwrap_or_else(|| {
                state.next_owner = state.next_owner.saturating_add(1);
                state.next_owner
            });
            let log = (logged && self.has_logs()).then(|| DirtyLog::for_pages(slot.gfns.pages())).transpose();
            let log = log.map_err(|errno| StartError::Memory { slot: slot.id, errno })?;
            next.insert(slot.id, Tracked { slot: *slot, owner, place, logged, log });
        }
        if state.lost_track.take().is_some() {
            // Nobody has looked after all of them in the meantime.
            next.values().for_each(|tracked| tracked.place.set_all());
        }
        let before = std::mem::replace(&mut state.slots, next);
        if matches!(self.mechanism, Mechanism::Ring { .. }) {
            state.retired.extend(before.into_values().map(|tracked| (tracked.owner, tracked.place)));
        }
        Ok(())
    }

    /// Rings into bitmaps.
    fn drain(&self, state: &mut State) -> Result<SyncReport, SyncError> {
        let State { rings, slots, retired, empty, .. } = state;
        let harvest = rings.harvest(slots);
        *empty = if harvest.entries() == 0 { empty.saturating_add(1) } else { 0 };
        let harvested = harvest.reset(self.vm.as_ref())?;
        let places: BTreeMap<u64, &Place> = slots.values().map(|tracked| (tracked.owner, &tracked.place)).collect();
        let mut pages = 0_u64;
        for run in &harvested.runs {
            if let Some(place) = places.get(&run.owner).copied().or_else(|| retired.get(&run.owner)) {
                place.set(run.first, run.pages);
                pages = pages.saturating_add(run.pages);
            }
        }
        if harvested.overrun {
            places.values().for_each(|place| place.set_all());
            retired.values().for_each(Place::set_all);
        }
        // Nothing of theirs is on its way any more.
        retired.clear();
        let overrun = harvested.overrun;
        rings.recycle(harvested);
        Ok(SyncReport { pages, stray: rings.take_stray(), overrun })
    }

    /// A log into a bitmap: how many pages, and whether that is all.
    fn read_log(&self, tracked: &mut Tracked) -> Result<(u64, bool), SyncError> {
        let (slot, place) = (tracked.slot.id, &tracked.place);
        let Some(log) = &mut tracked.log else { return Ok((0, true)) };
        match self.vm.get_dirty_log(slot.raw(), log) {
            Ok(()) => {}
            // The slot has gone, and what it had was harvested before.
            Err(Errno::ENOENT) => return Ok((0, true)),
            Err(Errno::EFAULT) => {
                place.set_all();
                return Ok((place.pages, false));
            }
            Err(errno) => return Err(SyncError::Get { slot, errno }),
        }
        let by_hand = matches!(self.mechanism, Mechanism::Bitmap(Clearing::ByHand | Clearing::ByHandFromAll));
        let mut pages = 0_u64;
        let (mut first, mut words) = (0_u64, log.words());
        while !words.is_empty() {
            let count = place.pages.saturating_sub(first).min(CLEAR_PAGES);
            let (now, rest) =
                words.split_at(words.len().min(usize::try_from(count.div_ceil(64)).unwrap_or(usize::MAX)));
            words = rest;
            let dirty = now.iter().map(|word| u64::from(word.count_ones())).fold(0, u64::saturating_add);
            if dirty != 0 {
                if by_hand {
                    self.clear(slot, first, count, now)?;
                }
                if let Some(range) = place.range(first, count) {
                    place.bitmap.merge(range.start(), now);
                }
                pages = pages.saturating_add(dirty);
            }
            first = first.saturating_add(count);
        }
        Ok((pages, true))
    }

    fn clear(&self, slot: SlotId, first: u64, pages: u64, bitmap: &[u64]) -> Result<(), SyncError> {
        let num_pages = u32::try_from(pages).unwrap_or(u32::MAX);
        let clear = ClearDirtyLog { slot: slot.raw(), first_page: first, num_pages, bitmap };
        match self.vm.clear_dirty_log(&clear) {
            // The slot went after its log was read.
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(SyncError::Clear { slot, first, pages, errno }),
        }
    }
}

impl State {
    /// Where the memory of a slot is.
    fn place(&self, slot: &Memslot) -> Result<Place, StartError> {
        let (hva, bytes) = (slot.hva, slot.gfns.bytes());
        let inside = |backing: &&Backing| {
            let offset = hva.checked_sub(backing.hva);
            let end = offset.and_then(|offset| offset.checked_add(bytes));
            end.is_some_and(|end| end <= backing.bytes)
        };
        let backing = self.backings.iter().find(inside);
        let backing = backing.ok_or(StartError::NoBacking { slot: slot.id, hva, bytes })?;
        let first = FilePage::containing(hva.saturating_sub(backing.hva));
        Ok(Place { bitmap: Arc::clone(&backing.bitmap), first, pages: slot.gfns.pages() })
    }
}

/// Whether it is the slot that it was, as far as pages of its log go.
fn same(a: &Memslot, b: &Memslot) -> bool {
    (a.id, a.gfns.pages(), a.hva) == (b.id, b.gfns.pages(), b.hva)
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker").field("vm", &self.vm).field("mechanism", &self.mechanism).finish_non_exhaustive()
    }
}
