//! Changing the layout: what is asked for, the fewest calls that take a VM there, and carrying them out.
//!
//! ```text
//! VMM ─Operations▶ Draft (the layout to be) ─▶ plan (pure → steps) ─▶ commit (steps + undo)
//! ```
//!
//! KVM changes one slot per call and shows every step in between to the guest. A [`Draft`] collects what is asked for and
//! describes the layout as it is to be in the end; [`plan`] compares it with the layout that is, and finds the fewest
//! calls; [`commit`] carries them out, or takes back what it did.
//!
//! It stops no vCPU (that is [`gate`](crate::gate)), and it knows nothing of page state; the
//! [facade](crate::memory::CvmMemory::edit) ties all of that together. Mirrors `KVM_SET_USER_MEMORY_REGION2`
//! (`kvm_set_memory_region()` in `virt/kvm/kvm_main.c`).

mod assign;
mod commit;
mod draft;
mod error;
mod ids;
mod movers;
mod operation;
mod order;
mod pieces;
mod plan;
mod region;
mod step;
mod sweep;
mod tile;
mod tracked;

pub use assign::Prefer;
pub use commit::{Effects, Failed, Harvest, commit};
pub use draft::{Draft, Nested};
pub use error::{Hazard, Label, PlanError, Reason, Refused};
pub use operation::Operation;
pub use plan::{Plan, plan, steps};
pub use region::Region;
pub use step::Step;

#[cfg(test)]
mod tests;
