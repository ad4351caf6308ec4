//! The memory map as a person would want to see it: slots, and runs of one state.

use std::fmt;

use crate::addr::{Gfn, GfnRange};
use crate::backing::Space;
use crate::convert::{Converter, State};
use crate::layout::Size;
use std::sync::Arc;

use super::CvmMemory;

/// At most so many runs are printed of one slot; a fragmented guest has millions.
const RUNS_SHOWN: usize = 32;

/// A picture of the memory in words, for `Display`. Taken run by run while the guest may go on.
#[derive(Debug)]
pub struct MemoryMap<'a> {
    converter: &'a Converter,
    space: Arc<Space>,
}

/// A run of frames in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The frames.
    pub gfns: GfnRange,
    /// What the guest has been told.
    pub state: State,
    /// Whether KVM's attribute says the same.
    pub materialised: bool,
}

impl CvmMemory {
    /// The memory map, to be printed or walked.
    pub fn map(&self) -> MemoryMap<'_> {
        MemoryMap { converter: &self.converter, space: self.space().clone() }
    }
}

impl MemoryMap<'_> {
    /// The runs of memory within `gfns`, ascending, each in one slot.
    pub fn runs(&self, gfns: GfnRange) -> impl Iterator<Item = Run> {
        let slots = self.space.layout().table().segments(gfns).filter(|segment| segment.slot.is_some());
        slots.flat_map(|segment| {
            let declared = self.converter.declared().runs(segment.gfns);
            declared.flat_map(|(gfns, private)| {
                let attribute = self.converter.materialised().runs(gfns);
                attribute.map(move |(gfns, told)| Run {
                    gfns,
                    state: State::from_private(private),
                    materialised: told == private,
                })
            })
        })
    }
}

impl fmt::Display for MemoryMap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.space.layout().table();
        let bytes = table.slots().map(|slot| slot.gfns.bytes()).fold(0, u64::saturating_add);
        write!(f, "{} slots, {}, top at gfn {:#x}", table.len(), Size(bytes), table.span().end())?;
        for slot in table.slots() {
            write!(f, "\nslot {} {}", slot.id, Size(slot.gfns.bytes()))?;
            match slot.file_range() {
                Some((file, pages)) => write!(f, ", guest_memfd {file} pages {pages}")?,
                None => write!(f, ", never private")?,
            }
            for (shown, run) in self.runs(slot.gfns).enumerate() {
                if shown == RUNS_SHOWN {
                    write!(f, "\n  ... and more runs below gfn {:#x}", slot.gfns.end())?;
                    break;
                }
                let told = if run.materialised { "" } else { ", not yet told to kvm" };
                write!(f, "\n  {:<24} {:<8} {}{told}", run.gfns.to_string(), run.state, Size(run.gfns.bytes()))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for CvmMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.map(), f)
    }
}

/// For a picture: the share of private pages in each of `cells` equal parts of `gfns`, `None` where there is no memory.
impl MemoryMap<'_> {
    /// Per cell, private pages and pages of memory.
    pub fn shares(&self, gfns: GfnRange, cells: u64) -> Vec<(u64, u64)> {
        let step = gfns.pages().div_ceil(cells.max(1)).max(1);
        gfns.split_every(step)
            .map(|cell| {
                self.runs(cell).fold((0, 0), |(private, all), run| {
                    let pages = run.gfns.pages();
                    (
                        if run.state.is_private() { pages.saturating_add(private) } else { private },
                        pages.saturating_add(all),
                    )
                })
            })
            .collect()
    }

    /// The first frame of memory and one past the last.
    pub fn span(&self) -> GfnRange {
        let table = self.space.layout().table();
        if table.is_empty() { GfnRange::empty_at(Gfn::ZERO) } else { table.span() }
    }
}
