//! The devices of the VM: what they may reach, as the library tells them. In a VMM this would be VFIO or vhost.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cvm_memory::addr::{Gfn, GfnRange};
use cvm_memory::convert::{Listener, ListenerError, SharedRun};
use rangemap::RangeSet;

use crate::ram::Ram;

#[derive(Debug)]
pub struct Devices {
    ram: Arc<Ram>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Frames that they may reach.
    reach: RangeSet<u64>,
    /// What they were told and should not have been.
    complaints: Vec<String>,
}

impl Devices {
    pub fn new(ram: &Arc<Ram>) -> Self {
        Self { ram: Arc::clone(ram), state: Mutex::default() }
    }

    pub fn reach(&self, gfn: Gfn) -> bool {
        self.state().reach.contains(&gfn.get())
    }

    pub fn take_complaints(&self) -> Vec<String> {
        std::mem::take(&mut self.state().complaints)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the pieces are all of the run, and where this program put it.
    fn is_right(&self, run: &SharedRun) -> bool {
        // What guests have for themselves lies below.
        if run.gfns.end() <= self.ram.start() {
            return true;
        }
        let mut next = run.gfns.start();
        for piece in &run.pieces {
            if piece.gfns.start() != next || self.ram.shared_offset(next) != Some(piece.offset) {
                return false;
            }
            next = piece.gfns.end();
        }
        next == run.gfns.end()
    }
}

impl Listener for Devices {
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        let mut state = self.state();
        if state.reach.overlaps(&numbers(run.gfns)) || !self.is_right(run) {
            state.complaints.push(format!("devices were told to map {run:x?}"));
        }
        state.reach.insert(numbers(run.gfns));
        Ok(())
    }

    fn unmap(&self, run: &SharedRun) {
        let mut state = self.state();
        if state.reach.gaps(&numbers(run.gfns)).next().is_some() {
            state.complaints.push(format!("devices were told to unmap {run:x?}, which was not all mapped"));
        }
        state.reach.remove(numbers(run.gfns));
    }
}

fn numbers(gfns: GfnRange) -> std::ops::Range<u64> {
    gfns.start().get()..gfns.end().get()
}
