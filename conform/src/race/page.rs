//! One page on its own: what is done to it, and what the contract makes of that. Sections 2.3, 3.2, 4, 5.2 and 5.5.

use crate::scenario::Kind;

/// What the thread beside the guests does. Pages are counted from the first; ranges are half open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Attribute { start: u64, end: u64, private: bool },
    Punch { start: u64, end: u64 },
    Delete { slot: u32, start: u64, end: u64 },
    Create { slot: u32, start: u64, end: u64, flags: u32 },
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

/// Where an access is, short of its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// It is over.
    Saw(Saw),
    /// KVM emulates it, as there was no slot; whether there is one it looks again, later.
    Emulate,
}

/// The state of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Page {
    /// Whether accesses go by the attribute.
    by_attribute: bool,
    number: u64,
    slot: bool,
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
        Self { by_attribute, number, slot: true, private: false, file: 0, memory: 0, generation: 0, mmio: None }
    }

    pub(super) fn change(&mut self, change: Change) {
        let within = |start, end| (start..end).contains(&self.number);
        match change {
            Change::Attribute { start, end, private } if within(start, end) => self.private = private,
            Change::Punch { start, end } if within(start, end) => self.file = 0,
            Change::Attribute { .. } | Change::Punch { .. } => {}
            Change::Delete { start, end, .. } => {
                self.slot &= !within(start, end);
                self.generation += 1;
            }
            Change::Create { start, end, .. } => {
                self.slot |= within(start, end);
                self.generation += 1;
            }
        }
    }

    pub(super) fn begin(&mut self, access: Access) -> Next {
        if self.mmio == Some(self.generation) {
            return Next::Emulate;
        }
        let attribute = self.by_attribute && self.private;
        // What was MMIO in an older generation is a shared access, whatever the attribute says.
        let private = attribute && self.mmio.is_none();
        if private != attribute {
            return Next::Saw(Saw::Fault(0));
        }
        if !self.slot {
            if private {
                return Next::Saw(Saw::Fault(8));
            }
            self.mmio = Some(self.generation);
            return Next::Emulate;
        }
        self.mmio = None;
        let at = if private { &mut self.file } else { &mut self.memory };
        Next::Saw(reach(at, access))
    }

    /// The page as an access leaves it that has mapped it and is to be made again: what it was mapped to has gone meanwhile.
    pub(super) const fn mapped(mut self) -> Option<Self> {
        let shared = !(self.by_attribute && self.private);
        if self.slot && shared && self.mmio.is_some() {
            self.mmio = None;
            return Some(self);
        }
        None
    }

    /// The emulator reaches memory by its address in this process, if there is a slot.
    pub(super) fn emulate(&mut self, access: Access) -> Saw {
        if self.slot { reach(&mut self.memory, access) } else { Saw::Mmio }
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
