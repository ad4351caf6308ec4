//! Carrying out a plan's steps, or taking back what was done.
//!
//! What a step does hides behind [`Effects`], so that every failure at every step can be tried without a VM. Nothing here
//! decides anything: the plan is carried out as it is, and undone in reverse.

use std::sync::Arc;

use nix::errno::Errno;

use crate::backing::{SharedBacking, SharedSlice};
use crate::layout::{Layout, LayoutError, Memslot};

use super::step::Step;

/// What the steps of a plan do.
pub trait Effects {
    /// Carries out one step, all of it or nothing.
    ///
    /// # Errors
    /// What KVM gave.
    fn step(&self, step: &Step) -> Result<(), Errno>;
}

/// Somebody who keeps dirty bits, by the memory that they are about: where it lies does not matter to them, so an edit loses
/// none.
pub trait Harvest: std::fmt::Debug + Send + Sync {
    /// Slots are, or are about to be, over this memory. Told at any time before, and more than once.
    ///
    /// # Errors
    /// Why its dirty bits could not be kept: no slot comes to be over it then.
    fn memory(&self, backing: &Arc<dyn SharedBacking>) -> Result<(), Errno> {
        let _ = backing;
        Ok(())
    }

    /// Slots of `layout` are about to come beside those that there are, and vCPUs run meanwhile: KVM logs what they write from
    /// then on. [`edited`](Self::edited) follows, whether the slots came or not.
    fn expect(&self, layout: &Layout) {
        let _ = layout;
    }

    /// The dirty log of `slot` is about to go, or to go elsewhere with a slot that moves. No vCPU is in the guest, and none of them enters before this returns.
    /// Bit `n` is about byte `n * 4096` of `memory`.
    ///
    /// # Errors
    /// Why it could not be had: the edit is not carried out then.
    fn harvest(&self, slot: &Memslot, memory: &SharedSlice) -> Result<(), Errno>;

    /// The slots are those of `layout` now. Called once per edit, before any vCPU enters the guest again; also if the edit has
    /// failed after something was harvested.
    fn edited(&self, layout: &Layout) {
        let _ = layout;
    }

    /// This library has written the first `bytes` bytes of `memory`, for a device or where KVM could not finish a guest's
    /// write: KVM knows nothing of it. Called after the write, by whichever thread made it.
    fn wrote(&self, memory: &SharedSlice, bytes: u64);
}

/// A plan that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// Which step failed.
    pub at: usize,
    /// What KVM gave.
    pub errno: Errno,
    /// Steps before it that could not be taken back, in the order in which they were done, and why. Empty if everything is
    /// as it was.
    pub left: Vec<(Step, Errno)>,
}

impl Failed {
    /// The layout as it is after that, given the one before.
    ///
    /// # Errors
    /// [`LayoutError`] if KVM did what the layout thinks it cannot.
    pub fn layout(&self, before: &Layout) -> Result<Layout, LayoutError> {
        let mut layout = before.clone();
        for (step, _) in &self.left {
            let removed = step.before().map(|slot| slot.id);
            layout.replace(removed.as_slice(), step.after())?;
        }
        Ok(layout)
    }
}

/// Carries out `steps`; if one fails, takes back those before it, last first.
///
/// # Errors
/// [`Failed`].
pub fn commit(steps: &[Step], effects: &dyn Effects) -> Result<(), Failed> {
    for (at, step) in steps.iter().enumerate() {
        if let Err(errno) = effects.step(step) {
            // Everything is tried, whatever failed before: what can be restored is. But not under an id that is still in
            // use, because what creates a slot would change that one instead.
            let mut left: Vec<(Step, Errno)> = Vec::new();
            for step in steps.iter().take(at).rev() {
                let in_use = left.iter().any(|(other, _)| other.slot().id == step.slot().id);
                let undone = if in_use { Err(Errno::EEXIST) } else { effects.step(&step.inverse()) };
                left.extend(undone.err().map(|errno| (*step, errno)));
            }
            left.reverse();
            return Err(Failed { at, errno, left });
        }
    }
    Ok(())
}
