//! The two locking helpers: locks that outlive a panicking holder, and a sleepable read-copy-update domain.
//!
//! A test that panics while it holds a lock must not turn every later drop into a second panic, so poison is ignored: the
//! data under these locks is changed in single steps. [`Srcu`] mirrors `srcu_read_lock()` and `synchronize_srcu()` on
//! `kvm->srcu`; it guards nothing by itself, it only lets an updater wait for those who may still hold what it replaced.

use std::sync::PoisonError;

use crate::sync::blocking::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Readers by the parity of the grace period they entered in.
#[derive(Debug, Default)]
struct Readers {
    odd: bool,
    even_count: usize,
    odd_count: usize,
}

impl Readers {
    fn count(&mut self, odd: bool) -> &mut usize {
        if odd { &mut self.odd_count } else { &mut self.even_count }
    }
}

/// A sleepable RCU domain. Updaters are serialised by the caller (`slots_lock`).
#[derive(Debug, Default)]
pub(super) struct Srcu {
    readers: Mutex<Readers>,
    left: Condvar,
}

/// A read-side section; ends on drop.
#[derive(Debug)]
pub(super) struct SrcuGuard<'a> {
    srcu: &'a Srcu,
    odd: bool,
}

impl Srcu {
    /// Enters a read-side section. Never blocks for long.
    pub(super) fn enter(&self) -> SrcuGuard<'_> {
        let mut readers = lock(&self.readers);
        let odd = readers.odd;
        let count = readers.count(odd);
        *count = count.saturating_add(1);
        SrcuGuard { srcu: self, odd }
    }

    /// Waits until every section that was open when this was called has ended.
    pub(super) fn synchronize(&self) {
        let mut readers = lock(&self.readers);
        let old = readers.odd;
        readers.odd = !old;
        while *readers.count(old) != 0 {
            readers = self.left.wait(readers).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for SrcuGuard<'_> {
    fn drop(&mut self) {
        let mut readers = lock(&self.srcu.readers);
        let count = readers.count(self.odd);
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.srcu.left.notify_all();
        }
    }
}
