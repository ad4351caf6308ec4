//! Drafts and plans against a model of single pages, and against every other way to do the same.

mod commits;
mod drafts;
mod model;
mod moves;
mod operations;
mod past;
mod plans;
mod scenarios;
mod tiles;

use super::*;
use crate::addr::{FilePage, Gfn, GfnRange};
use crate::layout::{FileBinding, FileId, Layout, Limits, Memslot, SlotFlags, SlotId};
use model::{Host, Page, Slot};

fn gfn(index: u64) -> Gfn {
    Gfn::new(index).unwrap()
}

fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::new(gfn(start), gfn(end)).unwrap()
}

/// Shared memory of which page `n` lies at page `n` of the one mapping there is, without a private side.
fn region(start: u64, end: u64, host: u64, flags: SlotFlags) -> Region {
    Region { gfns: gfns(start, end), hva: host << 12, mapping: 0, flags, binding: None }
}

fn layout_of(limits: Limits, slots: &[Slot]) -> Layout {
    let slots = slots.iter().zip(0..).map(|(slot, id)| Memslot {
        id: SlotId::new(id),
        gfns: gfns(slot.start, slot.start + slot.pages),
        hva: slot.host << 12,
        flags: slot.flags,
        binding: None,
    });
    Layout::from_slots(limits, [], slots).unwrap()
}

fn draft_of(layout: &Layout) -> Draft {
    Draft::new(layout, 0, |_| 0)
}

/// The kinds of a plan's steps.
fn kinds(plan: &Plan) -> Vec<&'static str> {
    plan.steps.iter().map(Step::kind).collect()
}

/// A small generator of numbers that are always the same.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}
