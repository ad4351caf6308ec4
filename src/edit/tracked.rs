//! A [`Tracker`] is somebody who keeps dirty bits: plugged in, it follows every edit by itself.

use std::sync::Arc;

use nix::errno::Errno;

use super::Harvest;
use crate::backing::{SharedBacking, SharedSlice};
use crate::dirty::Tracker;
use crate::layout::{Layout, Memslot};

impl Harvest for Tracker {
    fn memory(&self, backing: &Arc<dyn SharedBacking>) -> Result<(), Errno> {
        self.adopt(backing).map(drop)
    }

    fn harvest(&self, slot: &Memslot, _: &SharedSlice) -> Result<(), Errno> {
        self.before_delete(slot).map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, slot = slot.id.raw(), "a dirty log stays");
            error.errno()
        })
    }

    fn expect(&self, layout: &Layout) {
        Self::expect(self, layout);
    }

    fn edited(&self, layout: &Layout) {
        Self::edited(self, layout);
    }

    fn wrote(&self, memory: &SharedSlice, bytes: u64) {
        Self::wrote(self, memory.hva(), bytes);
    }
}
