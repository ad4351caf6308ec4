//! Which memory was written, over KVM's mechanisms: the dirty log of a slot and the dirty ring of a vCPU.
//!
//! | file | what it is |
//! |---|---|
//! | `bitmap` | [`DirtyBitmap`]: the written pages of one backing, whatever happens to the slots over it |
//! | `devices` | [`DeviceDirty`]: writes that vm-memory makes go into the same bitmap |
//! | `negotiate` | which mechanism to use, or why it cannot be |
//! | `reaper` | [`Reaper`]: empties rings before they are full |
//! | `ring` | [`DirtyRings`]: from entries of the rings to runs of pages that may be copied |
//! | `tracker` | [`Tracker`]: start, sync, take, over any mechanism and through layout edits |
//!
//! KVM logs only slots without a guest_memfd: neither the private nor the shared pages of a slot with one are tracked by any
//! mechanism there is. Nothing here knows of page states.

mod bitmap;
mod devices;
mod negotiate;
mod reaper;
mod ring;
mod tracker;

pub use bitmap::{DirtyBitmap, Runs, Take};
pub use devices::{DeviceDirty, DeviceDirtySlice};
pub use negotiate::{
    Choice, Clearing, ENTRY_BYTES, EnableError, MIN_RING_BYTES, MIN_RING_BYTES_HARDWARE_LOG, Mechanism, Offer,
    OwnWrites, Refusal, Situation, Wish, negotiate,
};
pub use reaper::{Pace, Reaper, ReaperStats};
pub use ring::{DirtyRings, Harvest, Harvested, OwnerRun, Owners, ResetError, RingStats, Stray};
pub use tracker::{ClearError, Reaped, Stage, StartError, SyncError, SyncReport, Tracker, Unloggable};
