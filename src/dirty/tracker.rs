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

mod backings;
mod by_hand;
mod error;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;

use super::bitmap::DirtyBitmap;
use super::negotiate::{Clearing, Mechanism};
use super::ring::{DirtyRings, Owners, RingStats, Stray};
use crate::addr::{FileRange, GfnRange};
use crate::backing::SharedBacking;
use crate::hypervisor::{ClearDirtyLog, DirtyLog, DirtyRingMemory, Hypervisor};
use crate::layout::{Layout, Memslot, SlotFlags, SlotId};
use crate::sync::blocking::{Mutex, MutexGuard};

use backings::{Backings, Place};
pub use error::{ClearError, StartError, SyncError};

/// Times in a row that a vCPU may find its ring full and nothing in any, beyond one for each ring.
const PATIENCE: usize = 64;

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

/// What was in the rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reaped {
    /// The pages.
    pub report: SyncReport,
    /// Entries in the ring that had the most.
    pub fullest: u32,
    /// Of how many.
    pub size: u32,
    /// Times so far that a vCPU stood still because its ring was full.
    pub fulls: u64,
}

/// A slot that is tracked.
#[derive(Debug)]
struct Tracked {
    slot: Memslot,
    owner: u64,
    place: Place,
    /// Whether KVM logs it. If not, all of it counts as written.
    logged: bool,
    /// Where its log is read to, if it has one. By hand: the pages that were found and not cleared since.
    log: Option<DirtyLog>,
    /// Whether its log was looked at.
    looked: bool,
}

impl Tracked {
    /// Whether it is that slot, as far as pages of its log go.
    fn is(&self, slot: &Memslot, logged: bool) -> bool {
        let pages = |slot: &Memslot| (slot.id, slot.gfns.pages(), slot.hva);
        (pages(&self.slot), self.logged) == (pages(slot), logged)
    }
}

#[derive(Debug, Default)]
struct State {
    backings: Backings,
    /// Whether tracking was started.
    active: bool,
    /// Whether slots are being replaced.
    editing: bool,
    unloggable: Unloggable,
    slots: BTreeMap<SlotId, Tracked>,
    /// Owners that were replaced while pages of theirs were in the rings.
    retired: BTreeMap<u64, Place>,
    next_owner: u64,
    rings: DirtyRings,
    /// What kept [`Tracker::edited`] from following the layout.
    lost_track: Option<StartError>,
    /// Times in a row that a vCPU came because its ring was full, and nothing was in any.
    in_vain: usize,
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

    /// Adds memory that slots are, or will be, over, for as long as the tracker is used. Its bitmap is for devices, and for
    /// whoever copies: bit `n` is byte `n * 4096` of the backing. If it is known already, the bitmap is the one it has.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn add_backing(&self, backing: &dyn SharedBacking) -> Result<Arc<DirtyBitmap>, Errno> {
        self.state().backings.add(backing, None)
    }

    /// As [`add_backing`](Self::add_backing), for memory that is forgotten, bitmap and all, once all who were given for it are
    /// dropped.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn adopt(&self, backing: &Arc<dyn SharedBacking>) -> Result<Arc<DirtyBitmap>, Errno> {
        self.state().backings.add(backing.as_ref(), Some(Arc::downgrade(backing)))
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
        state.forget();
        state.unloggable = unloggable;
        self.follow(&mut state, layout)?;
        state.active = true;
        Ok(())
    }

    /// Forgets all slots, and follows no edits. What is in the bitmaps stays there.
    pub fn stop(&self) {
        self.state().forget();
    }

    /// `slot` is about to be deleted or moved, and its log with it. No vCPU is in the guest, and none enters before
    /// [`edited`](Self::edited), which has to be told whatever comes of it: until then there is no [`sync`](Self::sync).
    ///
    /// # Errors
    /// [`SyncError`]: the slot must stay.
    pub fn before_delete(&self, slot: &Memslot) -> Result<(), SyncError> {
        let mut state = self.state();
        let state = &mut *state;
        if matches!(self.mechanism, Mechanism::Ring { .. }) {
            self.drain(state)?;
        }
        if let Some(tracked) = state.slots.get_mut(&slot.id) {
            self.read_log(tracked)?;
            // Should there be a slot like it afterwards, its log will be another.
            tracked.looked = false;
        }
        state.editing = state.active;
        Ok(())
    }

    /// Slots of `layout` that are not there yet are about to come while vCPUs run: what is written there belongs to them from the
    /// first write on. [`edited`](Self::edited) has to be told whatever comes of it.
    pub fn expect(&self, layout: &Layout) {
        let mut state = self.state();
        if !state.active || state.lost_track.is_some() {
            return;
        }
        let known = &state.slots;
        let coming: Vec<Memslot> =
            layout.table().slots().filter(|slot| is_logged(slot) && !known.contains_key(&slot.id)).copied().collect();
        for slot in coming {
            // What cannot be followed is told of once it is there.
            if let Ok(place) = state.backings.place(&slot)
                && let Ok(log) = self.log_of(&slot)
            {
                let tracked = self.begin(&mut state, slot, place, log);
                state.slots.insert(slot.id, tracked);
            }
        }
    }

    /// The slots are those of `layout` now. If one of them cannot be followed, the next sync says why.
    pub fn edited(&self, layout: &Layout) {
        let mut state = self.state();
        if !state.active {
            return;
        }
        state.editing = false;
        // What is in the rings is the old slots', whatever their ids stand for from here on.
        let State { rings, slots, .. } = &mut *state;
        drop(rings.harvest(slots));
        state.lost_track = self.follow(&mut state, layout).err();
    }

    /// Bytes at address `hva` were written, and KVM knows nothing of it. Memory that was not added is nobody's business.
    pub fn wrote(&self, hva: u64, bytes: u64) {
        self.state().backings.wrote(hva, bytes);
    }

    /// Finds out what was written since the last time, and notes it in the bitmaps.
    ///
    /// # Errors
    /// [`SyncError`]; nothing is lost.
    pub fn sync(&self, stage: Stage) -> Result<SyncReport, SyncError> {
        let mut state = self.state();
        let state = &mut *state;
        state.may_look()?;
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
        state.rings.note_full();
        state.in_vain = state.in_vain.saturating_add(1);
        let report = self.drain(&mut state)?;
        // Of many that are full at once, the first is asked to make room for all. The others come in vain, each once.
        let patience = PATIENCE.saturating_add(state.rings.len());
        if state.in_vain > patience { Err(SyncError::Stuck) } else { Ok(report) }
    }

    /// Takes what is in the rings, so that they do not fill up. For whoever does that now and then, while vCPUs run: a
    /// [`Reaper`](super::Reaper).
    ///
    /// # Errors
    /// [`SyncError`]; nothing is lost.
    pub fn reap(&self) -> Result<Reaped, SyncError> {
        let mut state = self.state();
        let report = self.drain(&mut state)?;
        let RingStats { fulls, size, .. } = state.rings.stats();
        Ok(Reaped { report, fullest: state.rings.latest(), size, fulls })
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

    /// Brings the slots up to date. Those that are the same as before keep their owner, and what was found in their logs.
    fn follow(&self, state: &mut State, layout: &Layout) -> Result<(), StartError> {
        let mut places = Vec::new();
        for slot in layout.table().slots() {
            let logged = is_logged(slot);
            let unloggable = slot.flags.contains(SlotFlags::GUEST_MEMFD);
            if unloggable && state.unloggable == Unloggable::Refuse {
                return Err(StartError::Unloggable { slot: slot.id, gfns: slot.gfns });
            }
            if !logged && !unloggable {
                continue;
            }
            let place = state.backings.place(slot)?;
            let known = state.slots.get(&slot.id);
            let log = if known.is_some_and(|known| known.is(slot, logged)) { None } else { self.log_of(slot)? };
            places.push((*slot, logged, place, log));
        }
        let mut before = std::mem::take(&mut state.slots);
        let mut next = BTreeMap::new();
        for (slot, logged, place, log) in places {
            let tracked = if before.get(&slot.id).is_some_and(|known| known.is(&slot, logged)) {
                before.remove(&slot.id).map(|known| Tracked { slot, place, ..known })
            } else {
                if before.get(&slot.id).is_some_and(|known| !known.logged) {
                    // It had an id that was known as another's when it came, so what was written first may be in no name.
                    place.set_all();
                }
                Some(self.begin(state, slot, place, log))
            };
            next.extend(tracked.map(|tracked| (slot.id, tracked)));
        }
        // Nobody harvests what has no log: it may have been written until it went.
        before.values().filter(|tracked| !tracked.logged).for_each(|tracked| tracked.place.set_all());
        if state.lost_track.take().is_some() {
            // Nobody has looked after all of them in the meantime, nor after those that came and went.
            state.backings.set_all();
        }
        state.slots = next;
        if matches!(self.mechanism, Mechanism::Ring { .. }) {
            state.retired.extend(before.into_values().map(|tracked| (tracked.owner, tracked.place)));
        }
        Ok(())
    }

    /// Where the log of a slot is read to, if it has one.
    fn log_of(&self, slot: &Memslot) -> Result<Option<DirtyLog>, StartError> {
        if !is_logged(slot) || !self.has_logs() {
            return Ok(None);
        }
        let log = DirtyLog::for_pages(slot.gfns.pages());
        log.map(Some).map_err(|errno| StartError::Memory { slot: slot.id, errno })
    }

    /// A slot that was not tracked before.
    fn begin(&self, state: &mut State, slot: Memslot, place: Place, log: Option<DirtyLog>) -> Tracked {
        if self.mechanism == Mechanism::Bitmap(Clearing::ByHandFromAll) {
            // As its log says, which an edit may have had cleared.
            place.set_all();
        }
        state.next_owner = state.next_owner.saturating_add(1);
        Tracked { slot, owner: state.next_owner, place, logged: is_logged(&slot), log, looked: false }
    }

    /// Rings into bitmaps.
    fn drain(&self, state: &mut State) -> Result<SyncReport, SyncError> {
        let State { rings, slots, retired, in_vain, .. } = state;
        let harvest = rings.harvest(slots);
        if harvest.entries() != 0 {
            *in_vain = 0;
        }
        let harvested = harvest.reset(self.vm.as_ref())?;
        let places: BTreeMap<u64, &Place> = slots.values().map(|tracked| (tracked.owner, &tracked.place)).collect();
        let mut pages = 0_u64;
        for run in harvested.runs() {
            if let Some(place) = places.get(&run.owner).copied().or_else(|| retired.get(&run.owner)) {
                place.set(run.first, run.pages);
                pages = pages.saturating_add(run.pages);
            }
        }
        if harvested.overrun() {
            places.values().for_each(|place| place.set_all());
            retired.values().for_each(Place::set_all);
        }
        // Nothing of theirs is on its way any more.
        retired.clear();
        let overrun = harvested.overrun();
        rings.recycle(harvested);
        Ok(SyncReport { pages, stray: rings.take_stray(), overrun })
    }

    /// A log into a bitmap: how many pages, and whether that is all.
    fn read_log(&self, tracked: &mut Tracked) -> Result<(u64, bool), SyncError> {
        if !self.get_log(tracked)? {
            tracked.place.set_all();
            return Ok((tracked.place.pages, false));
        }
        let mut pages = 0_u64;
        for (first, count) in by_hand::pieces(0, tracked.place.pages, tracked.place.pages) {
            pages = pages.saturating_add(self.take_piece(tracked, first, count, |_, word| word)?);
        }
        Ok((pages, true))
    }

    /// Has KVM write down the log of a slot. `false` if it is lost.
    fn get_log(&self, tracked: &mut Tracked) -> Result<bool, SyncError> {
        let slot = tracked.slot.id;
        let Some(log) = &mut tracked.log else { return Ok(true) };
        match self.vm.get_dirty_log(slot.raw(), log) {
            Ok(()) => {}
            // The slot has gone, and what it had was harvested before.
            Err(Errno::ENOENT) => log.words_mut().fill(0),
            Err(Errno::EFAULT) => return Ok(false),
            Err(errno) => return Err(SyncError::Get { slot, errno }),
        }
        tracked.looked = true;
        Ok(true)
    }

    /// Puts into the bitmap what was found in `count` pages from `first` on, as far as `wanted` lets words pass, each with its
    /// number in the log. By hand, KVM protects them before.
    fn take_piece(
        &self,
        tracked: &mut Tracked,
        first: u64,
        count: u64,
        wanted: impl Fn(u64, u64) -> u64,
    ) -> Result<u64, SyncError> {
        let (slot, place) = (tracked.slot.id, &tracked.place);
        let Some(log) = &mut tracked.log else { return Ok(0) };
        let from = usize::try_from(first / 64).unwrap_or(usize::MAX);
        let to = usize::try_from(first.saturating_add(count).div_ceil(64)).unwrap_or(usize::MAX);
        let Some(found) = log.words_mut().get_mut(from..to) else { return Ok(0) };
        if found.iter().all(|word| *word == 0) {
            return Ok(0);
        }
        let bits: Vec<u64> = found.iter().zip(first / 64..).map(|(word, at)| wanted(at, *word)).collect();
        let dirty = bits.iter().map(|word| u64::from(word.count_ones())).fold(0, u64::saturating_add);
        if dirty == 0 {
            return Ok(0);
        }
        if self.is_by_hand() {
            self.clear_log(slot, first, count, &bits)?;
            found.iter_mut().zip(&bits).for_each(|(word, taken)| *word &= !taken);
        }
        if let Some(range) = place.range(first, count) {
            place.bitmap.merge(range.start(), &bits);
        }
        Ok(dirty)
    }

    const fn is_by_hand(&self) -> bool {
        matches!(self.mechanism, Mechanism::Bitmap(Clearing::ByHand | Clearing::ByHandFromAll))
    }

    fn clear_log(&self, slot: SlotId, first: u64, pages: u64, bitmap: &[u64]) -> Result<(), SyncError> {
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
    /// Forgets the slots.
    fn forget(&mut self) {
        self.slots.clear();
        (self.active, self.editing, self.lost_track) = (false, false, None);
    }

    /// Whether what a log tells is the slot's.
    const fn may_look(&self) -> Result<(), SyncError> {
        match self.lost_track {
            _ if self.editing => Err(SyncError::Editing),
            Some(error) => Err(SyncError::Layout(error)),
            None => Ok(()),
        }
    }
}

/// Whether KVM keeps track of what is written to it.
const fn is_logged(slot: &Memslot) -> bool {
    slot.flags.contains(SlotFlags::LOG_DIRTY)
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker").field("vm", &self.vm).field("mechanism", &self.mechanism).finish_non_exhaustive()
    }
}
