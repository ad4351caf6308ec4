//! What is done to the library, on top of what is done to the VM below it.

use cvm_memory::convert::{DiscardPolicy, State};
use nix::errno::Errno;

use crate::scenario::words::Word;
use crate::scenario::{Descriptor, File, Operation, operations};

operations! {
    /// One operation on the library. Addresses, sizes and offsets in bytes.
    Task:

    /// Before `build`: memory that can be private, as the builder makes it.
    Ram "ram" {
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
    }
    /// Before `build`: memory that is never private.
    PlainRam "plain-ram" {
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
    }
    /// Before `build`: the largest slot that memory is cut into.
    SlotSize "slot-size" {
        /// That.
        bytes: u64,
    }
    /// Before `build`: the state in which memory starts.
    Initial "initial" {
        /// That.
        state: State,
    }
    /// Before `build`: what becomes of the side that lost.
    Discard "discard" {
        /// `immediate`, `never`, or `deferred:` and a budget.
        policy: DiscardPolicy,
    }
    /// Before `build`: the most that one call may cover, and what a private fault materialises around it.
    Chunk "chunk" {
        /// Of a call.
        call: u64,
        /// Around a fault.
        fault: u64,
    }
    /// Before `build`: how far memory that can be private may be added later.
    Limit "limit" {
        /// That.
        bytes: u64,
    }
    /// Before `build`: whether a touch of a page in the other state converts it.
    Implicit "implicit" {
        /// That.
        allowed: bool,
    }
    /// Makes the memory. Everything below needs it.
    Build "build" {}
    /// Lets go of the memory: the teardown.
    Drop "drop" {}
    /// Shared memory of this process, whose discards are noted.
    Memory "memory" {
        /// Its name.
        name: Memory,
        /// Its size.
        size: u64,
        /// What can only be freed together.
        granule: u64,
    }
    /// Adds a slot.
    Slot "slot" {
        /// Its id, or `any`.
        id: Id,
        /// Flags but that of the file.
        flags: u32,
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
        /// Its shared memory.
        memory: Memory,
        /// Where in it.
        from: u64,
        /// Its file, or `none`.
        file: Descriptor,
        /// Where in it.
        offset: u64,
    }
    /// Removes a slot.
    Remove "remove" {
        /// Which.
        id: u32,
    }
    /// Registers a listener.
    Listen "listen" {
        /// Its name.
        by: Name,
    }
    /// Takes it out.
    Unlisten "unlisten" {
        /// Which.
        by: Name,
    }
    /// Has a call fail, the `nth` of that kind from now.
    Fail "fail" {
        /// What kind.
        call: Kind,
        /// Counted from 1.
        nth: u64,
        /// With what.
        errno: Errno,
    }
    /// Converts pages, as the VMM may.
    Convert "convert" {
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
        /// To what.
        to: State,
    }
    /// Frees what was put off.
    Trim "trim" {
        /// So much of it.
        budget: u64,
    }
    /// Maps private memory ahead, by the library.
    Ahead "ahead" {
        /// On which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
        /// Whether the file's pages are allocated first.
        allocate: bool,
        /// Calls in a row that may get nowhere.
        patience: u32,
    }
    /// The record: runs of memory, and in what state they are.
    Record "record" {
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
    }
    /// What a listener has mapped.
    Mapped "mapped" {
        /// Who.
        by: Name,
    }
    /// Memory held on either side, and what is still to be freed.
    Held "held" {}
    /// A device reads.
    DeviceRead "device-read" {
        /// Where.
        gpa: u64,
        /// How much.
        len: u64,
    }
    /// A device writes.
    DeviceWrite "device-write" {
        /// Where.
        gpa: u64,
        /// How much.
        len: u64,
        /// What.
        byte: u8,
    }
    /// A guest fills memory, and its exits are the library's.
    Fill "fill" {
        /// By which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// How much.
        len: u64,
        /// With what.
        byte: u8,
        /// How, where accesses say so.
        private: bool,
    }
    /// A guest looks whether memory holds nothing but a byte, and its exits are the library's.
    Check "check" {
        /// By which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// How much.
        len: u64,
        /// What.
        byte: u8,
        /// How, where accesses say so.
        private: bool,
    }
    /// The guest's hypercall MAP_GPA_RANGE, which the library answers.
    Ask "ask" {
        /// By which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// Pages of 4 KiB.
        pages: u64,
        /// Bits 3:0 page size, bit 4 private.
        attributes: u64,
    }
    /// An exit as KVM could make it, without a guest.
    Fault "fault" {
        /// Whose.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
        /// 8 private.
        flags: u64,
        /// What `KVM_RUN` fails with.
        errno: Errno,
    }
}

/// A step of a scenario of the library: an operation on it, or one that goes past it.
///
/// Files are the library's: `create` and `fallocate` go through what records the calls. All other operations of the VM go
/// to it directly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// On the library.
    Task(Task),
    /// Past it.
    Past(Operation),
}

impl std::fmt::Display for Act {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Task(task) => task.fmt(out),
            Self::Past(operation) => operation.fmt(out),
        }
    }
}

impl std::str::FromStr for Act {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let word = line.split_whitespace().next().unwrap_or_default();
        if Task::WORDS.contains(&word) { line.parse().map(Self::Task) } else { line.parse().map(Self::Past) }
    }
}

/// Words that are a name and a number.
macro_rules! numbered {
    ($($(#[$doc:meta])* $name:ident $letter:literal)+) => {
        $($(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u8);

        impl Word for $name {
            fn print(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(out, "{}{}", $letter, self.0)
            }

            fn parse(word: &str) -> Option<Self> {
                word.strip_prefix($letter)?.parse().ok().map(Self)
            }
        })+
    };
}

numbered! {
    /// Shared memory of the scenario: `b0` to `b255`.
    Memory 'b'
    /// A listener: `l0` to `l255`.
    Name 'l'
}

/// A slot's id, or `any`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id(pub Option<u32>);

impl Word for Id {
    fn print(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(id) => id.print(out),
            None => out.write_str("any"),
        }
    }

    fn parse(word: &str) -> Option<Self> {
        if word == "any" { Some(Self(None)) } else { Word::parse(word).map(|id| Self(Some(id))) }
    }
}

/// A kind of call that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    Attributes,
    /// `KVM_SET_USER_MEMORY_REGION2`.
    Region,
    /// `fallocate(2)` that frees.
    Punch,
    /// `fallocate(2)` that allocates.
    Allocate,
    /// A listener maps.
    Map,
    /// Shared memory is freed.
    Discard,
    /// `KVM_PRE_FAULT_MEMORY`.
    Prefault,
}

const KINDS: [(&str, Kind); 7] = [
    ("attributes", Kind::Attributes),
    ("region", Kind::Region),
    ("punch", Kind::Punch),
    ("allocate", Kind::Allocate),
    ("map", Kind::Map),
    ("discard", Kind::Discard),
    ("prefault", Kind::Prefault),
];

impl Word for Kind {
    fn print(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = KINDS.iter().find(|(_, kind)| kind == self);
        out.write_str(named.map_or("", |(name, _)| name))
    }

    fn parse(word: &str) -> Option<Self> {
        KINDS.iter().find(|(name, _)| *name == word).map(|(_, kind)| *kind)
    }
}

impl Word for State {
    fn print(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{self}")
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Shared, Self::Private].into_iter().find(|state| state.to_string() == word)
    }
}

impl Word for DiscardPolicy {
    fn print(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Immediate => out.write_str("immediate"),
            Self::Never => out.write_str("never"),
            Self::Deferred { budget } => write!(out, "deferred:{budget:#x}"),
        }
    }

    fn parse(word: &str) -> Option<Self> {
        match word {
            "immediate" => Some(Self::Immediate),
            "never" => Some(Self::Never),
            _ => Some(Self::Deferred { budget: Word::parse(word.strip_prefix("deferred:")?)? }),
        }
    }
}

impl Word for Errno {
    fn print(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{self:?}")
    }

    fn parse(word: &str) -> Option<Self> {
        (1..=133).map(Self::from_raw).find(|errno| format!("{errno:?}") == word)
    }
}

/// The names of files that scenarios of the library have.
pub(super) fn name_of(file: File) -> String {
    format!("f{}", file.0)
}
