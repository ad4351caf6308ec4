//! One page on its own: what is done to it, and what the contract makes of that. Sections 2.3, 3.2, 4, 5.2 and 5.5.
//!
//! A change is what userspace asks for. What other threads see of it comes in [steps](Step): a slot that goes is marked invalid
//! first, which is a change of slots already.

use crate::scenario::Kind;

/// `KVM_MEMORY_EXIT_FLAG_PRIVATE`.
const PRIVATE: u64 = 8;

/// What the thread beside the guests does. Pages are counted from the first; ranges are half open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Attribute { start: u64, end: u64, private: bool },
    Punch { start: u64, end: u64 },
    Delete { slot: u32, start: u64, end: u64 },
    Create { slot: u32, start: u64, end: u64, flags: u32 },
}

/// What others see of a change, at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Done(Change),
    /// The slot is not to be used any more: faults wait, and the emulator has no memory there.
    Invalid {
        start: u64,
        end: u64,
    },
}

impl Change {
    /// What others see of it, in order.
    pub(super) fn steps(self) -> impl Iterator<Item = Step> {
        let first = match self {
            Self::Delete { start, end, .. } => Some(Step::Invalid { start, end }),
            _ => None,
        };
        first.into_iter().chain([Step::Done(self)])
    }
}

/// What a guest does to a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Load,
    Store(u64),
}

/// What comes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Saw {
    Loaded(u64),
    Stored,
    Mmio,
    Fault(u64),
    /// What no order can explain.
    Other(String),
}

/// How far an access has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    /// Not begun, or to be made again.
    Fresh,
    /// A fault, which took itself for a private one or a shared one; the attribute it compares later.
    Faulted { private: bool },
    /// KVM emulates it, as there was no slot; whether there is one it looks again, later.
    Emulated,
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// It is over.
    Saw(Saw),
    /// It has come so far.
    Stage(Stage),
    /// It is made again and again until the slot has gone.
    Wait,
}

/// What a page is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Slot {
    Usable,
    Invalid,
    None,
}

/// The state of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Page {
    /// Whether accesses go by the attribute.
    by_attribute: bool,
    number: u64,
    slot: Slot,
    private: bool,
    /// What is in its file page, and in this process's memory.
    file: u64,
    memory: u64,
    /// Changes of slots so far, and at which of them it was found to be MMIO, if nothing was mapped since.
    generation: u32,
    mmio: Option<u32>,
}

impl Page {
    pub(super) const fn new(kind: Kind, number: u64) -> Self {
        let by_attribute = matches!(kind, Kind::Protected);
        Self { by_attribute, number, slot: Slot::Usable, private: false, file: 0, memory: 0, generation: 0, mmio: None }
    }

    pub(super) fn step(&mut self, step: Step) {
        let number = self.number;
        let within = |start, end| (start..end).contains(&number);
        let slot = match step {
            Step::Done(Change::Attribute { start, end, private }) => {
                if within(start, end) {
                    self.private = private;
                }
                return;
            }
            Step::Done(Change::Punch { start, end }) => {
                if within(start, end) {
                    self.file = 0;
                }
                return;
            }
            Step::Invalid { start, end } => within(start, end).then_some(Slot::Invalid),
            Step::Done(Change::Delete { start, end, .. }) => within(start, end).then_some(Slot::None),
            Step::Done(Change::Create { start, end, .. }) => within(start, end).then_some(Slot::Usable),
        };
        self.slot = slot.unwrap_or(self.slot);
        self.generation += 1;
    }

    /// Takes an access a stage further.
    pub(super) fn access(&mut self, access: Access, stage: Stage) -> Next {
        match stage {
            Stage::Fresh if self.mmio == Some(self.generation) => Next::Stage(Stage::Emulated),
            // What was MMIO in an older generation is a shared access, whatever the attribute says.
            Stage::Fresh => Next::Stage(Stage::Faulted { private: self.is_private() && self.mmio.is_none() }),
            Stage::Faulted { private } => self.fault(access, private),
            // The emulator reaches memory by its address in this process.
            Stage::Emulated if self.slot == Slot::Usable => Next::Saw(reach(&mut self.memory, access)),
            Stage::Emulated => Next::Saw(Saw::Mmio),
        }
    }

    const fn is_private(&self) -> bool {
        self.by_attribute && self.private
    }

    fn fault(&mut self, access: Access, private: bool) -> Next {
        if private != self.is_private() {
            return Next::Saw(Saw::Fault(if private { PRIVATE } else { 0 }));
        }
        match self.slot {
            Slot::Usable => {}
            Slot::Invalid => return Next::Wait,
            Slot::None if private => return Next::Saw(Saw::Fault(PRIVATE)),
            Slot::None => {
                self.mmio = Some(self.generation);
                return Next::Stage(Stage::Emulated);
            }
        }
        self.mmio = None;
        let at = if private { &mut self.file } else { &mut self.memory };
        Next::Saw(reach(at, access))
    }

    /// The page as an access leaves it that has mapped it and is to be made again: what it was mapped to has gone meanwhile.
    pub(super) const fn mapped(mut self) -> Option<Self> {
        if matches!(self.slot, Slot::Usable) && !self.is_private() && self.mmio.is_some() {
            self.mmio = None;
            return Some(self);
        }
        None
    }
}

const fn reach(at: &mut u64, access: Access) -> Saw {
    match access {
        Access::Load => Saw::Loaded(*at),
        Access::Store(value) => {
            *at = value;
            Saw::Stored
        }
    }
}
