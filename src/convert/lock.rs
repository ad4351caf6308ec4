//! Locks on ranges of guest frames.
//!
//! One exclusive lock spans a conversion from the first look at the record to the last effect, so that KVM's attributes
//! and the record cannot disagree; conversions of other ranges go on meanwhile. A shared lock is a *pin*: a device access
//! in progress, for which a conversion waits, or on which it fails.
//!
//! Whoever wants a range exclusively is served in the order of asking: later ones, and new pins of threads that have none,
//! wait behind. Nothing can
//! be locked by a thread that holds an exclusive lock, of whatever range: it is told so ([`LockError::Reentrant`]) instead
//! of hanging. Readers of page state never come here.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::addr::GfnRange;
use crate::sync::{Condvar, Mutex, MutexGuard, ThreadId, current_thread};

/// What a conversion does about device accesses that are in progress in its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinPolicy {
    /// Waits so long for them to end, then fails.
    Wait(Duration),
    /// Fails at once.
    Refuse,
}

impl Default for PinPolicy {
    fn default() -> Self {
        Self::Wait(Duration::from_secs(1))
    }
}

/// Why a range could not be locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// A device access to part of the range did not end in time.
    #[error("gfns {range} are pinned by a device access at gfns {pinned}")]
    Pinned {
        /// The range to be locked.
        range: GfnRange,
        /// The access.
        pinned: GfnRange,
    },
    /// This thread is at a conversion: a listener asked for another one, or for a pin.
    #[error("gfns {range} cannot be locked by a thread that is converting gfns {held}")]
    Reentrant {
        /// The range to be locked.
        range: GfnRange,
        /// What the thread holds.
        held: GfnRange,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Shared,
    Exclusive,
    /// Somebody waits for an exclusive lock, and for pins to end.
    Wanted,
    /// Somebody waits for an exclusive lock, and minds no pins: those may come and go meanwhile.
    Queued,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    id: u64,
    range: GfnRange,
    kind: Kind,
    owner: ThreadId,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    entries: Vec<Entry>,
}

impl Table {
    fn add(&mut self, range: GfnRange, kind: Kind) -> u64 {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.entries.push(Entry { id, range, kind, owner: current_thread().id() });
        id
    }

    fn remove(&mut self, id: u64) {
        self.entries.retain(|entry| entry.id != id);
    }

    fn find(&self, range: &GfnRange, kind: Kind) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.kind == kind && entry.range.overlaps(range))
    }

    /// Whether somebody else is to be let in before this thread: holds the range exclusively, or asked for that before
    /// `asked` (or at all). But whoever asked may be waiting for this very thread's pins, so one that has any goes first.
    fn is_behind(&self, range: &GfnRange, asked: Option<u64>) -> bool {
        let me = current_thread().id();
        // In the order of asking, however the numbers wrap.
        let mut earlier = self.entries.iter().take_while(|entry| Some(entry.id) != asked);
        let blocks = |kind| kind == Kind::Wanted || (kind == Kind::Queued && asked.is_some());
        let wanted = earlier.any(|entry| blocks(entry.kind) && entry.range.overlaps(range));
        let pins = || self.entries.iter().any(|entry| entry.kind == Kind::Shared && entry.owner == me);
        self.find(range, Kind::Exclusive).is_some() || (wanted && !pins())
    }

    /// Refuses a thread that holds an exclusive lock.
    fn refuse_reentry(&self, range: GfnRange) -> Result<(), LockError> {
        let me = current_thread().id();
        match self.entries.iter().find(|entry| entry.kind == Kind::Exclusive && entry.owner == me) {
            Some(held) => Err(LockError::Reentrant { range, held: held.range }),
            None => Ok(()),
        }
    }
}

/// A lock for each range of guest frames.
#[derive(Debug, Default)]
pub struct RangeLock {
    table: Mutex<Table>,
    changed: Condvar,
}

/// A locked range; unlocked on drop.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
    range: GfnRange,
}

impl RangeGuard<'_> {
    /// The range.
    pub const fn range(&self) -> GfnRange {
        self.range
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.table().remove(self.id);
        self.lock.changed.notify_all();
    }
}

impl RangeLock {
    /// Locks `range`: waits for other exclusive holders, and for pins as `pins` says; `None` if pins do not matter,
    /// because no pinned page is going to change.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn exclusive(&self, range: GfnRange, pins: Option<PinPolicy>) -> Result<RangeGuard<'_>, LockError> {
        self.exclusive_over(range, pins, &[range])
    }

    /// As [`exclusive`](Self::exclusive), where only pins of `changing`, parts of `range`, matter: nothing else of it changes.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn exclusive_over(
        &self,
        range: GfnRange,
        pins: Option<PinPolicy>,
        changing: &[GfnRange],
    ) -> Result<RangeGuard<'_>, LockError> {
        let me = current_thread().id();
        let mut table = self.table();
        table.refuse_reentry(range)?;
        let wanted = table.add(range, if pins.is_some() { Kind::Wanted } else { Kind::Queued });
        let mut started = None;
        let refused = loop {
            // They end by themselves, and pins may come and go meanwhile.
            if table.is_behind(&range, Some(wanted)) {
                table = self.wait(table);
                continue;
            }
            let pin = changing.iter().find_map(|gfns| table.find(gfns, Kind::Shared));
            let (Some(pins), Some(pin)) = (pins, pin) else { break None };
            let refusal = LockError::Pinned { range, pinned: pin.range };
            let PinPolicy::Wait(patience) = pins else { break Some(refusal) };
            let left = patience.saturating_sub(started.get_or_insert_with(Instant::now).elapsed());
            // A thread that waits for its own pin would wait in vain.
            if pin.owner == me || left.is_zero() {
                break Some(refusal);
            }
            table = self.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        table.remove(wanted);
        if let Some(refusal) = refused {
            drop(table);
            self.changed.notify_all();
            return Err(refusal);
        }
        let id = table.add(range, Kind::Exclusive);
        Ok(RangeGuard { lock: self, id, range })
    }

    /// Pins `range`: waits for those who have it exclusively, and, unless this thread has pins already, who want it.
    ///
    /// # Errors
    /// [`LockError::Reentrant`] from within a conversion.
    pub fn shared(&self, range: GfnRange) -> Result<RangeGuard<'_>, LockError> {
        let mut table = self.table();
        table.refuse_reentry(range)?;
        while table.is_behind(&range, None) {
            table = self.wait(table);
        }
        let id = table.add(range, Kind::Shared);
        Ok(RangeGuard { lock: self, id, range })
    }

    /// Refuses a thread that holds an exclusive lock, before it waits for something else than a range.
    ///
    /// # Errors
    /// [`LockError::Reentrant`].
    pub(super) fn refuse_reentry(&self, range: GfnRange) -> Result<(), LockError> {
        self.table().refuse_reentry(range)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, table: MutexGuard<'a, Table>) -> MutexGuard<'a, Table> {
        self.changed.wait(table).unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, loom))]
mod models;
