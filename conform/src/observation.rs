//! What can be seen of an operation, as plain data and as a line of text.

use std::fmt;

use nix::errno::Errno;

/// What came of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation {
    /// A call's answer.
    Call(Result<(), Errno>),
    /// Bytes, or why there are none.
    Bytes(Result<Vec<u8>, Errno>),
    /// Of a dirty log: its words.
    Dirty(Result<Vec<u64>, Errno>),
    /// Of a prefault: its answer, and what it left to be done.
    Prefault {
        /// The answer.
        answer: Result<(), Errno>,
        /// Where it is to go on.
        gpa: u64,
        /// How much is left.
        size: u64,
    },
    /// Of a guest: the exits on the way, and how it ended.
    Guest {
        /// Exits that were answered.
        seen: Vec<Seen>,
        /// How it ended.
        end: End,
    },
    /// Of a dump: how the reading of each page ended.
    Pages(Vec<End>),
    /// It was not played.
    Skipped(&'static str),
    /// This machine cannot tell.
    Unknown,
}

/// An exit that was answered, after which the guest went on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// `KVM_EXIT_MMIO`, a read.
    MmioRead {
        /// Where.
        gpa: u64,
        /// Of how many bytes.
        len: usize,
    },
    /// `KVM_EXIT_MMIO`, a write.
    MmioWrite {
        /// Where.
        gpa: u64,
        /// What.
        data: Vec<u8>,
    },
    /// `KVM_EXIT_HYPERCALL`.
    Hypercall {
        /// Its number.
        nr: u64,
        /// Its arguments; KVM passes three of MAP_GPA_RANGE.
        args: [u64; 3],
    },
}

/// How what a guest did ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It was done.
    Done,
    /// It read this.
    Data(Vec<u8>),
    /// A hypercall returned this.
    Answer(u64),
    /// A GHCB page: the register, both infos, the buffer.
    Words(Vec<u64>),
    /// The guest got an exception, of which the host hears nothing.
    Exception,
    /// The guest has met MMIO, and would have to ask for it.
    Mmio,
    /// `KVM_EXIT_MEMORY_FAULT`.
    Fault {
        /// What `KVM_RUN` failed with.
        errno: Errno,
        /// The exit's flags.
        flags: u64,
        /// The exit's address.
        gpa: u64,
        /// The exit's size.
        size: u64,
    },
    /// `KVM_RUN` failed, without an exit.
    Failed(Errno),
    /// `KVM_EXIT_INTERNAL_ERROR`.
    InternalError,
    /// `KVM_EXIT_SHUTDOWN`.
    Shutdown,
    /// `KVM_EXIT_FAIL_ENTRY`.
    FailEntry(u64),
    /// Another exit.
    Other(Option<u32>),
    /// Exits without end.
    Endless,
    /// There was no code to call: it could not be put there.
    NoCode,
}

/// An errno by its name.
struct Name(Errno);

impl fmt::Display for Name {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, out)
    }
}

/// Bytes, equal ones once: `aa*6 00*2`.
struct Runs<'a>(&'a [u8]);

impl fmt::Display for Runs<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut blank = "";
        for run in self.0.chunk_by(|a, b| a == b) {
            write!(out, "{blank}{:02x}", run[0])?;
            if run.len() > 1 {
                write!(out, "*{}", run.len())?;
            }
            blank = " ";
        }
        Ok(())
    }
}

impl fmt::Display for Observation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(Ok(())) => out.write_str("ok"),
            Self::Call(Err(errno)) | Self::Bytes(Err(errno)) | Self::Dirty(Err(errno)) => {
                write!(out, "{}", Name(*errno))
            }
            Self::Bytes(Ok(bytes)) => write!(out, "bytes {}", Runs(bytes)),
            Self::Dirty(Ok(words)) => {
                out.write_str("dirty")?;
                let bits = |word: u64| (0..64_u64).filter(move |bit| word >> bit & 1 == 1);
                let pages =
                    (0..).step_by(64).zip(words).flat_map(|(first, word)| bits(*word).map(move |bit| first + bit));
                pages.into_iter().try_for_each(|page: u64| write!(out, " {page}"))
            }
            Self::Prefault { answer, gpa, size } => {
                match answer {
                    Ok(()) => out.write_str("ok")?,
                    Err(errno) => write!(out, "{}", Name(*errno))?,
                }
                write!(out, " left gpa={gpa:#x} size={size:#x}")
            }
            Self::Guest { seen, end } => {
                for seen in seen {
                    write!(out, "{seen}; ")?;
                }
                write!(out, "{end}")
            }
            Self::Pages(pages) => {
                let mut blank = "";
                for run in pages.chunk_by(|a, b| a == b) {
                    write!(out, "{blank}{}", run[0])?;
                    if run.len() > 1 {
                        write!(out, " x{}", run.len())?;
                    }
                    blank = "; ";
                }
                Ok(())
            }
            Self::Unknown => out.write_str("unknown"),
            Self::Skipped(reason) => write!(out, "skipped: {reason}"),
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MmioRead { gpa, len } => write!(out, "mmio-read gpa={gpa:#x} len={len}"),
            Self::MmioWrite { gpa, data } => write!(out, "mmio-write gpa={gpa:#x} {}", Runs(data)),
            Self::Hypercall { nr, args: [a, b, c] } => write!(out, "hypercall {nr} {a:#x} {b:#x} {c:#x}"),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => out.write_str("done"),
            Self::Data(bytes) => write!(out, "data {}", Runs(bytes)),
            Self::Answer(answer) => write!(out, "answer {:#x}", answer),
            Self::Words(words) => write!(out, "words {words:x?}"),
            Self::Exception => out.write_str("exception"),
            Self::Mmio => out.write_str("mmio"),
            Self::Fault { errno, flags, gpa, size } => {
                write!(out, "fault {} flags={flags:#x} gpa={gpa:#x} size={size:#x}", Name(*errno))
            }
            Self::Failed(errno) => write!(out, "failed {}", Name(*errno)),
            Self::InternalError => out.write_str("internal-error"),
            Self::Shutdown => out.write_str("shutdown"),
            Self::FailEntry(reason) => write!(out, "fail-entry {reason:#x}"),
            Self::Other(Some(reason)) => write!(out, "exit {reason}"),
            Self::Other(None) => out.write_str("another exit"),
            Self::Endless => out.write_str("exits without end"),
            Self::NoCode => out.write_str("no code"),
        }
    }
}
