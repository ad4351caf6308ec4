//! The atomics and locks of what is explored: `std`'s, or the doubles of whoever explores.
//!
//! Loom (`--cfg loom`) tries every interleaving of a few threads in the page set, the range locks, the gate and the dirty
//! bitmaps. Shuttle (`--cfg shuttle`) runs whole VMs on the software KVM under random schedules, and so doubles every lock
//! that a thread can wait for, those in [`blocking`] included; it leaves atomics as they are, since a thread that uses one
//! is between two locks.

pub(crate) use std::sync::atomic::Ordering;

#[cfg(loom)]
pub(crate) use loom::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicU64},
    thread::{ThreadId, current as current_thread},
};
#[cfg(all(not(loom), not(shuttle)))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicU64},
    thread::{ThreadId, current as current_thread},
};
#[cfg(shuttle)]
pub(crate) use {
    shuttle::sync::{Condvar, Mutex, MutexGuard},
    shuttle::thread::{ThreadId, current as current_thread},
    std::sync::atomic::AtomicU64,
};

/// Locks of what loom's models do not reach.
pub(crate) mod blocking {
    #[cfg(shuttle)]
    pub(crate) use shuttle::{
        sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard},
        thread::yield_now,
    };
    #[cfg(not(shuttle))]
    pub(crate) use std::{
        sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard},
        thread::yield_now,
    };
}
