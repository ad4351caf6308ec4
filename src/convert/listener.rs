//! Those who map shared memory for devices: VFIO, vhost, anything that must not reach private pages.
//! The contract is that of [`Listener`].

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use nix::errno::Errno;

use crate::addr::GfnRange;
use crate::backing::SharedPiece;

/// A run of frames, and where its memory lies in this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedRun {
    /// The frames.
    pub gfns: GfnRange,
    /// Their memory, ascending; more than one piece where the run crosses mappings.
    pub pieces: Vec<SharedPiece>,
}

/// Somebody who maps shared memory.
///
/// A listener hears each run of frames that becomes shared ([`map`](Self::map)) and each that is about to become private
/// ([`unmap`](Self::unmap)). Mapping may fail, and then those that have mapped already unmap again, last first; unmapping
/// must not fail. The calls of one frame alternate, starting with `map`, after failures too. What is unmapped together need
/// not have been mapped together: a run may be part of an earlier one, or span several.
///
/// Calls come from whichever thread converts, under the range's lock: a listener must not convert, pin or (un)register.
pub trait Listener: fmt::Debug + Send + Sync {
    /// `run` is shared now: map it.
    ///
    /// # Errors
    /// Whatever keeps it from being mapped; nothing of it may be mapped then.
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError>;

    /// `run` is about to become private: no access to it may happen after this returns.
    fn unmap(&self, run: &SharedRun);
}

/// Why a listener could not map.
#[derive(Debug, Clone, thiserror::Error)]
#[error("listener")]
pub struct ListenerError(#[source] Arc<dyn std::error::Error + Send + Sync>);

impl ListenerError {
    /// Wraps the listener's own error.
    pub fn new(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(Arc::new(error))
    }

    /// The listener's own error.
    pub fn inner(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        self.0.as_ref()
    }
}

impl From<Errno> for ListenerError {
    fn from(errno: Errno) -> Self {
        Self::new(errno)
    }
}

/// Handle of a registered listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenerId(u64);

/// Everybody who listens, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    list: ArcSwap<Vec<(ListenerId, Arc<dyn Listener>)>>,
    next: AtomicU64,
}

impl Listeners {
    /// Adds `listener`; the caller has already told it what is shared, and holds off conversions.
    pub(super) fn add(&self, listener: &Arc<dyn Listener>) -> ListenerId {
        let list = self.list.load();
        // Never given twice: a handle that is stale must not take out somebody else.
        let id = ListenerId(self.next.fetch_add(1, Ordering::Relaxed));
        let mut longer = Vec::clone(&list);
        longer.push((id, Arc::clone(listener)));
        self.list.store(Arc::new(longer));
        id
    }

    /// Takes a listener out; the caller tells it what to unmap, and holds off conversions.
    pub(super) fn remove(&self, id: ListenerId) -> Option<Arc<dyn Listener>> {
        let list = self.list.load();
        let found = list.iter().find(|(other, _)| *other == id).map(|(_, listener)| Arc::clone(listener))?;
        self.list.store(Arc::new(list.iter().filter(|(other, _)| *other != id).cloned().collect()));
        Some(found)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.load().is_empty()
    }

    /// Everybody maps `run`, or nobody does.
    pub(super) fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        let list = self.list.load();
        for (done, (_, listener)) in list.iter().enumerate() {
            if let Err(error) = listener.map(run) {
                for (_, earlier) in list.iter().take(done).rev() {
                    earlier.unmap(run);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Everybody unmaps `run`, the last to come first.
    pub(super) fn unmap(&self, run: &SharedRun) {
        for (_, listener) in self.list.load().iter().rev() {
            listener.unmap(run);
        }
    }
}
