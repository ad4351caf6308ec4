//! The atomics and locks of what is explored by loom: `std`'s, or loom's doubles when its models run (`--cfg loom`).
//!
//! Only the page set and the range locks use it; everything else is built on those and on plain mutexes.

#[cfg(loom)]
pub(crate) use loom::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicU64},
    thread::{ThreadId, current as current_thread},
};
#[cfg(not(loom))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicU64},
    thread::{ThreadId, current as current_thread},
};

pub(crate) use std::sync::atomic::Ordering;
