//! What stands behind the `=` of a field: numbers, names of files and of areas of memory.

use std::fmt;
use std::str::FromStr;

/// A value of one word. What [`fmt::Display`] prints, [`FromStr`] reads.
pub trait Word: Sized {
    /// Prints it, without blanks.
    fn print(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result;
    /// Reads it; `None` if it is none.
    fn parse(word: &str) -> Option<Self>;
}

/// Numbers are decimal up to 9 and hexadecimal above, which reads the same.
fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    }
}

macro_rules! numbers {
    ($($type:ty),+) => {
        $(impl Word for $type {
            fn print(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                if *self < 10 { write!(out, "{self}") } else { write!(out, "{self:#x}") }
            }

            fn parse(word: &str) -> Option<Self> {
                number(word)?.try_into().ok()
            }
        })+
    };
}
numbers!(u8, u16, u32, u64);

impl Word for bool {
    fn print(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(if *self { "yes" } else { "no" })
    }

    fn parse(word: &str) -> Option<Self> {
        match word {
            "yes" => Some(true),
            "no" => Some(false),
            _ => None,
        }
    }
}

/// A guest_memfd of the scenario: `f0` to `f7`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct File(pub u8);

impl Word for File {
    fn print(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "f{}", self.0)
    }

    fn parse(word: &str) -> Option<Self> {
        word.strip_prefix('f')?.parse().ok().map(Self)
    }
}

/// What is given for a slot's guest_memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Descriptor {
    /// A file of the scenario; if there is none of that name, `-1`.
    File(File),
    /// `-1`.
    None,
    /// An ordinary memfd.
    Memfd,
    /// A guest_memfd of another VM.
    Foreign,
}

impl Word for Descriptor {
    fn print(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => file.print(out),
            Self::None => out.write_str("none"),
            Self::Memfd => out.write_str("memfd"),
            Self::Foreign => out.write_str("foreign"),
        }
    }

    fn parse(word: &str) -> Option<Self> {
        match word {
            "none" => Some(Self::None),
            "memfd" => Some(Self::Memfd),
            "foreign" => Some(Self::Foreign),
            _ => File::parse(word).map(Self::File),
        }
    }
}

/// A part of this process's address space. Behind the last of them there is room for the largest memslot, so that no slot that
/// starts in one leads a guest to anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Area {
    /// Memory, `m0` to `m3`: [`AREA_BYTES`] of it, then nothing.
    Memory(u8),
    /// Where `map` puts a file; before that, nothing.
    File(File),
    /// Nothing at all.
    Void,
}

/// Bytes of memory at the start of each [`Area::Memory`].
pub const AREA_BYTES: u64 = 64 * 4096;

/// Address space of each [`Area`]. No larger file is mapped: that is `ENOMEM`.
pub const AREA_ROOM: u64 = 1 << 32;

/// An address of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hva {
    /// So many bytes into an area: `m0+0x1000`.
    In(Area, u64),
    /// As it is. Only for what no KVM accepts: unaligned, or no address of a process.
    Raw(u64),
}

impl Word for Hva {
    fn print(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (area, offset) = match self {
            Self::In(area, offset) => (area, offset),
            Self::Raw(address) => return write!(out, "{address:#x}"),
        };
        match area {
            Area::Memory(index) => write!(out, "m{index}")?,
            Area::File(file) => file.print(out)?,
            Area::Void => out.write_str("void")?,
        }
        write!(out, "+{offset:#x}")
    }

    fn parse(word: &str) -> Option<Self> {
        let Some((area, offset)) = word.split_once('+') else { return number(word).map(Self::Raw) };
        let area = match area {
            "void" => Area::Void,
            _ => match area.strip_prefix('m') {
                Some(index) => Area::Memory(index.parse().ok()?),
                None => Area::File(File::parse(area)?),
            },
        };
        Some(Self::In(area, number(offset)?))
    }
}

/// What kind of VM a scenario is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// KVM's default type.
    Default,
    /// The software-protected type: the attribute alone decides what is private.
    Protected,
    /// Accesses say by themselves whether they are private. No KVM without a vendor's hardware has it.
    Tagged,
    /// SEV-SNP: so they do, and a page belongs to a guest at an address ([`snp`](crate::snp)).
    Snp,
}

impl Word for Kind {
    fn print(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Default => "default",
            Self::Protected => "protected",
            Self::Tagged => "tagged",
            Self::Snp => "snp",
        })
    }

    fn parse(word: &str) -> Option<Self> {
        match word {
            "default" => Some(Self::Default),
            "protected" => Some(Self::Protected),
            "tagged" => Some(Self::Tagged),
            "snp" => Some(Self::Snp),
            _ => None,
        }
    }
}

/// Entries of a buffer of page state changes, as they stand there: `0x1010000000000,2`; `none` if there are none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Entries(pub Vec<u64>);

impl Word for Entries {
    fn print(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((first, others)) = self.0.split_first() else { return out.write_str("none") };
        first.print(out)?;
        others.iter().try_for_each(|entry| {
            out.write_str(",")?;
            entry.print(out)
        })
    }

    fn parse(word: &str) -> Option<Self> {
        if word == "none" {
            return Some(Self(Vec::new()));
        }
        word.split(',').map(number).collect::<Option<_>>().map(Self)
    }
}

/// Prints a [`Word`] where a formatter is at hand.
pub(crate) struct Printed<'a, W>(pub &'a W);

impl<W: Word> fmt::Display for Printed<'_, W> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.print(out)
    }
}

/// The fields of a line, each to be taken once.
pub(crate) struct Fields<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Fields<'a> {
    pub(crate) fn of(words: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let field = |word: &'a str| word.split_once('=').ok_or(format!("`{word}` is no field"));
        words.map(field).collect::<Result<_, _>>().map(Self)
    }

    pub(crate) fn take<W: Word>(&mut self, name: &str) -> Result<W, String> {
        let at = self.0.iter().position(|(field, _)| *field == name).ok_or(format!("`{name}` is missing"))?;
        let (_, word) = self.0.remove(at);
        W::parse(word).ok_or(format!("`{word}` is not good for `{name}`"))
    }

    pub(crate) fn end(self) -> Result<(), String> {
        self.0.first().map_or(Ok(()), |(name, _)| Err(format!("`{name}` is not known here")))
    }
}

/// So that words can be read by whoever has the text of one.
impl FromStr for Hva {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Self::parse(word).ok_or(format!("`{word}` is no address"))
    }
}
