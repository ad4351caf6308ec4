//! What can go wrong with a tracker.

use nix::errno::Errno;

use crate::addr::GfnRange;
use crate::dirty::negotiate::Mechanism;
use crate::dirty::ring::ResetError;
use crate::layout::SlotId;

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
    /// Slots are being replaced: since [`Tracker::before_delete`](crate::dirty::Tracker::before_delete), what a log tells and what the layout says need not be the
    /// same slot's. Nothing was looked at; ask again once [`Tracker::edited`](crate::dirty::Tracker::edited) was told.
    #[error("slots are being replaced, and whose log is whose is not known before that is over")]
    Editing,
    /// Pages are to be found without being taken, where finding them takes them.
    #[error("{mechanism:?} clears nothing by hand")]
    NotByHand {
        /// What is used instead.
        mechanism: Mechanism,
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
    /// The nearest errno, for who can tell no more.
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Get { errno, .. } | Self::Clear { errno, .. } | Self::Reset(ResetError::Call(errno)) => *errno,
            Self::Layout(StartError::Memory { errno, .. }) => *errno,
            Self::Layout(_) | Self::NotByHand { .. } => Errno::EINVAL,
            Self::Editing => Errno::EBUSY,
            Self::Reset(_) | Self::Stuck => Errno::EIO,
        }
    }
}

/// Why pages could not be cleared. Those that were not are still found by the next look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClearError {
    /// Some of the frames are in no slot that is tracked. Nothing was cleared.
    #[error("gfns {gfns} are in no slot that is logged and tracked")]
    NotTracked {
        /// The first such frames.
        gfns: GfnRange,
    },
    /// Nobody has looked at the slot's log: it is not known which of its pages were written. Nothing was cleared.
    #[error("the log of slot {slot} was not looked at since it began, so there is nothing to clear")]
    NotLooked {
        /// The slot.
        slot: SlotId,
    },
    /// What keeps a sync from working.
    #[error(transparent)]
    Sync(#[from] SyncError),
}
