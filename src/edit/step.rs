//! The steps of a plan: calls that each change one slot, and can be taken back. Mirrors `kvm_set_memory_region()`.

use crate::addr::GfnRange;
use crate::layout::{Memslot, SlotFlags};

/// One call of `KVM_SET_USER_MEMORY_REGION2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Size zero.
    Delete(Memslot),
    /// Another place, perhaps another value of `LOG_DIRTY`.
    Move {
        /// As it will be.
        slot: Memslot,
        /// Where it was.
        from: GfnRange,
        /// Its flags then.
        flags: SlotFlags,
    },
    /// Another value of `LOG_DIRTY`.
    SetFlags {
        /// As it will be.
        slot: Memslot,
        /// Its flags before.
        flags: SlotFlags,
    },
    /// A new slot.
    Create(Memslot),
}

impl Step {
    /// What it is called in messages.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Delete(_) => "delete",
            Self::Move { .. } => "move",
            Self::SetFlags { .. } => "set flags",
            Self::Create(_) => "create",
        }
    }

    /// The slot, as the call names it.
    pub const fn slot(&self) -> &Memslot {
        match self {
            Self::Delete(slot) | Self::Create(slot) | Self::Move { slot, .. } | Self::SetFlags { slot, .. } => slot,
        }
    }

    /// The slot before it; `None` if there was none.
    pub const fn before(&self) -> Option<Memslot> {
        match *self {
            Self::Create(_) => None,
            Self::Delete(slot) => Some(slot),
            Self::Move { slot, from, flags } => Some(Memslot { gfns: from, flags, ..slot }),
            Self::SetFlags { slot, flags } => Some(Memslot { flags, ..slot }),
        }
    }

    /// The slot after it; `None` if there is none.
    pub const fn after(&self) -> Option<Memslot> {
        match *self {
            Self::Delete(_) => None,
            Self::Create(slot) | Self::Move { slot, .. } | Self::SetFlags { slot, .. } => Some(slot),
        }
    }

    /// The step that takes this one back.
    pub const fn inverse(&self) -> Self {
        match *self {
            Self::Delete(slot) => Self::Create(slot),
            Self::Create(slot) => Self::Delete(slot),
            Self::Move { slot, from, flags } => {
                Self::Move { slot: Memslot { gfns: from, flags, ..slot }, from: slot.gfns, flags: slot.flags }
            }
            Self::SetFlags { slot, flags } => Self::SetFlags { slot: Memslot { flags, ..slot }, flags: slot.flags },
        }
    }
}
