//! The atomics and the lock of this module: `std`'s, or loom's doubles when its models run (`--cfg loom`).

#[cfg(loom)]
pub(super) use loom::sync::{Mutex, MutexGuard, atomic::AtomicU64};
#[cfg(not(loom))]
pub(super) use std::sync::{Mutex, MutexGuard, atomic::AtomicU64};

pub(super) use std::sync::atomic::Ordering;
