//! Why an edit is refused. Nothing has happened then.

use std::fmt;
use std::sync::Arc;

use crate::addr::{FileRange, Gfn, GfnRange};
use crate::gmem::FileId;
use crate::layout::{LayoutError, SlotFlags, SlotId};

/// Which operation of an edit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// Counted from zero.
    pub index: usize,
    /// What kind it is.
    pub kind: &'static str,
    /// What the caller called it.
    pub name: Option<Arc<str>>,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "operation {}, {}", self.index, self.kind)?;
        match &self.name {
            Some(name) => write!(f, " ({name})"),
            None => Ok(()),
        }
    }
}

/// An operation that cannot be applied to the layout as it would be by then. The edit is as it was before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{label}")]
pub struct Refused {
    /// Which.
    pub label: Label,
    /// Why.
    #[source]
    pub reason: Reason,
}

/// Why an operation cannot be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// No pages.
    #[error("no pages at gfn {at}")]
    Empty {
        /// Where.
        at: Gfn,
    },
    /// Frames, addresses or file pages end beyond the highest there is.
    #[error("{pages:#x} pages from gfn {at} end beyond the highest address")]
    Wraps {
        /// The first frame.
        at: Gfn,
        /// Length.
        pages: u64,
    },
    /// There is no memory.
    #[error("gfns {gfns} are not memory")]
    NotMemory {
        /// The first such frames.
        gfns: GfnRange,
    },
    /// There is memory.
    #[error("gfns {gfns} are memory already")]
    Occupied {
        /// The first such frames.
        gfns: GfnRange,
    },
    /// Only a part of a slot would be deleted: that is to punch a hole.
    #[error("only gfns {part} of a slot at gfns {slot}")]
    Partial {
        /// The slot's frames.
        slot: GfnRange,
        /// Those to be deleted.
        part: GfnRange,
    },
    /// Two neighbours cannot be one slot: address, file page or flags do not continue.
    #[error("the memory on both sides of gfn {at} does not continue")]
    NotMergeable {
        /// The first frame of the upper one.
        at: Gfn,
    },
    /// Flags that cannot be set on memory that exists.
    #[error("flags {flags:?} cannot be set on a slot")]
    Flags {
        /// The flags.
        flags: SlotFlags,
    },
    /// To truncate is to make shorter, to grow is to make longer.
    #[error("a slot of {now:#x} pages cannot become one of {wanted:#x} so")]
    Length {
        /// Its length.
        now: u64,
        /// The length asked for.
        wanted: u64,
    },
    /// There is no such slot.
    #[error("no slot {id}")]
    UnknownSlot {
        /// The id.
        id: SlotId,
    },
}

/// Why there is no plan for a layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// KVM would refuse a slot of it.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// More slots than there are ids.
    #[error("{needed} new slots, and {free} free ids")]
    NoFreeId {
        /// Slots to be created.
        needed: usize,
        /// Ids for them.
        free: usize,
    },
}

/// An edit that would do harm on this platform. Nothing has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Hazard {
    /// The platform destroys private memory with its slot.
    #[error("on a vm of the {platform} type the private memory of gfns {gfns} would be lost with its slot")]
    LosesPrivate {
        /// The kind of VM.
        platform: &'static str,
        /// The first such frames.
        gfns: GfnRange,
    },
    /// A vCPU whose state lies in private memory that goes can never run again, and nobody knows where it lies.
    #[error("on a vm of the {platform} type gfns {gfns}, which would go, may hold the state of a vcpu")]
    LosesVcpu {
        /// The kind of VM.
        platform: &'static str,
        /// The first such frames.
        gfns: GfnRange,
    },
    /// The platform remembers at which frame a private page was; at another one its guest would fault for ever.
    #[error("file {file} pages {pages} were at gfn {was} and would be at gfn {wanted}: free them first")]
    Rebound {
        /// The file.
        file: FileId,
        /// The pages.
        pages: FileRange,
        /// The frame of the first of them.
        was: Gfn,
        /// Where it would be.
        wanted: Gfn,
    },
}
