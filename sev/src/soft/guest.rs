//! A guest on the software KVM that does what Linux does: asks before it shares, accepts before it uses.

use std::sync::Arc;

use cvm_memory::addr::PAGE_SIZE;
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::hypervisor::{Exit, Vcpu as _};
use cvm_memory::memory::CvmMemory;
use cvm_memory::soft::{GuestOp, OpResult, SoftVcpu};
use nix::errno::Errno;

use crate::ghcb::page::{
    EXIT_CODE, EXIT_INFO_1, EXIT_INFO_2, EXIT_PSC, SCRATCH, SHARED_BUFFER, VALID_BITMAP, valid_bit,
};
use crate::ghcb::psc::{Completion, Entry, Header, MAX_ENTRIES};
use crate::ghcb::{Operation, msr};
use crate::rmp::{Failure, PAGES_PER_2M, Size};

use super::SoftSnp;
use super::instructions::{pvalidate, validated, vmgexit};

/// Why a guest did not get on.
#[derive(Debug, thiserror::Error)]
pub enum GuestFailed {
    /// `KVM_RUN` failed.
    #[error("run the vcpu")]
    Run(#[source] Errno),
    /// `KVM_EXIT_FAIL_ENTRY`.
    #[error("the vcpu cannot be entered, reason {reason:#x}")]
    NoEntry {
        /// `hardware_entry_failure_reason`.
        reason: u64,
    },
    /// An exit that nobody could handle.
    #[error("exit not handled: {0}")]
    Exit(String),
    /// The guest got an exception.
    #[error("exception at {gpa:#x}")]
    Exception {
        /// The address that it was at.
        gpa: u64,
    },
    /// The host refused a page state change.
    #[error("page state change at {gpa:#x}: {answer:#x}")]
    Refused {
        /// First byte.
        gpa: u64,
        /// What the host answered.
        answer: u64,
    },
    /// PVALIDATE failed, or changed nothing: Linux stops then.
    #[error("pvalidate at {gpa:#x}: {code}")]
    Pvalidate {
        /// First byte.
        gpa: u64,
        /// What is in EAX; 255 if nothing was changed.
        code: u32,
    },
}

/// What userspace had to do for a guest. In exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExitCounts {
    /// Pages that the guest asked for, or touched in the other state, were converted.
    pub converted: u64,
    /// Pages declared private were made so in KVM.
    pub materialised: u64,
    /// There was nothing to do.
    pub unchanged: u64,
    /// The guest was refused something.
    pub refused: u64,
}

impl ExitCounts {
    /// All of them.
    pub const fn total(&self) -> u64 {
        self.converted.saturating_add(self.materialised).saturating_add(self.unchanged).saturating_add(self.refused)
    }
}

/// A vCPU with a guest on it. See [`SoftSnp`] for an example.
#[derive(Debug)]
pub struct SnpGuest {
    vcpu: SoftVcpu,
    exits: VcpuExits,
    ghcb: Option<u64>,
    counts: ExitCounts,
}

impl SnpGuest {
    /// Creates the next vCPU of `snp`, whose memory is `memory`.
    pub fn new(snp: &SoftSnp, memory: &Arc<CvmMemory>) -> Self {
        let exits = VcpuExits::new(Arc::clone(memory));
        Self { vcpu: snp.vm().create_vcpu(), exits, ghcb: None, counts: ExitCounts::default() }
    }

    /// The vCPU.
    pub const fn vcpu(&mut self) -> &mut SoftVcpu {
        &mut self.vcpu
    }

    /// What userspace had to do so far.
    pub const fn counts(&self) -> ExitCounts {
        self.counts
    }

    /// Executes one operation, handling its exits.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn perform(&mut self, op: GuestOp) -> Result<OpResult, GuestFailed> {
        self.vcpu.start(op);
        loop {
            let action = match self.vcpu.run().map_err(GuestFailed::Run)? {
                Exit::Halt => break,
                Exit::FailEntry { reason, .. } => return Err(GuestFailed::NoEntry { reason }),
                mut exit => self.exits.handle(&mut exit),
            };
            let count = match action {
                Action::Resume(Handled::Converted { .. }) => &mut self.counts.converted,
                Action::Resume(Handled::Materialised { .. }) => &mut self.counts.materialised,
                Action::Resume(Handled::Unchanged) => &mut self.counts.unchanged,
                Action::Resume(Handled::Refused) => &mut self.counts.refused,
                other => return Err(GuestFailed::Exit(format!("{other:?}"))),
            };
            *count = count.saturating_add(1);
        }
        Ok(self.vcpu.take_result().unwrap_or(OpResult::Done))
    }

    /// Executes an instruction of the platform at `gpa`.
    fn instruction(&mut self, gpa: u64, op: GuestOp) -> Result<u64, GuestFailed> {
        match self.perform(op)? {
            OpResult::Instruction(value) => Ok(value),
            _ => Err(GuestFailed::Exception { gpa }),
        }
    }

    /// Reads or writes; an exception is an error.
    fn memory(&mut self, gpa: u64, op: GuestOp) -> Result<Vec<u8>, GuestFailed> {
        match self.perform(op)? {
            OpResult::Read(bytes) => Ok(bytes),
            OpResult::Exception => Err(GuestFailed::Exception { gpa }),
            _ => Ok(Vec::new()),
        }
    }

    /// Writes private memory.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), GuestFailed> {
        self.memory(gpa, GuestOp::Write { gpa, data: data.to_vec(), private: true }).map(drop)
    }

    /// Reads private memory.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn read(&mut self, gpa: u64, len: u64) -> Result<Vec<u8>, GuestFailed> {
        self.memory(gpa, GuestOp::Read { gpa, len, private: true })
    }

    /// Writes shared memory.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn write_shared(&mut self, gpa: u64, data: &[u8]) -> Result<(), GuestFailed> {
        self.memory(gpa, GuestOp::Write { gpa, data: data.to_vec(), private: false }).map(drop)
    }

    /// Reads shared memory.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn read_shared(&mut self, gpa: u64, len: u64) -> Result<Vec<u8>, GuestFailed> {
        self.memory(gpa, GuestOp::Read { gpa, len, private: false })
    }

    /// Makes the page at `gpa` the GHCB: shares it by the register, and registers it. From then on page state changes go by
    /// page.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn set_up_ghcb(&mut self, gpa: u64) -> Result<(), GuestFailed> {
        self.change_by_register(gpa, 1, Operation::Shared)?;
        self.write_shared(gpa, &[0; 4096])?;
        let request = msr::register_request(gpa >> 12);
        let answer = self.instruction(gpa, vmgexit(request))?;
        if answer != msr::registered(gpa >> 12) {
            return Err(GuestFailed::Refused { gpa, answer });
        }
        self.ghcb = Some(gpa);
        Ok(())
    }

    /// `set_memory_decrypted()`: gives `pages` pages back, then asks for them to be shared.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn share(&mut self, gpa: u64, pages: u64) -> Result<(), GuestFailed> {
        self.pvalidate(gpa, pages, false)?;
        self.change(gpa, pages, Operation::Shared)
    }

    /// `set_memory_encrypted()`, and what is done with unaccepted memory: asks for `pages` pages to be private, then accepts
    /// them.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn accept(&mut self, gpa: u64, pages: u64) -> Result<(), GuestFailed> {
        self.change(gpa, pages, Operation::Private)?;
        self.pvalidate(gpa, pages, true)
    }

    /// Asks for a page state change, in the best way there is.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn change(&mut self, gpa: u64, pages: u64, operation: Operation) -> Result<(), GuestFailed> {
        match self.ghcb {
            Some(ghcb) => self.change_by_page(ghcb, gpa, pages, operation),
            None => self.change_by_register(gpa, pages, operation),
        }
    }

    /// Page by page.
    fn change_by_register(&mut self, gpa: u64, pages: u64, operation: Operation) -> Result<(), GuestFailed> {
        for gfn in (gpa >> 12..).zip(0..pages).map(|(gfn, _)| gfn) {
            let answer = self.instruction(gfn << 12, vmgexit(msr::page_state_request(gfn, operation)))?;
            if answer != msr::page_state(true) {
                return Err(GuestFailed::Refused { gpa: gfn << 12, answer });
            }
        }
        Ok(())
    }

    /// Up to 253 entries at a time, of 2 MiB where that is possible.
    fn change_by_page(&mut self, ghcb: u64, gpa: u64, pages: u64, operation: Operation) -> Result<(), GuestFailed> {
        let entries: Vec<Entry> =
            pieces(gpa >> 12, pages).map(|(gfn, size)| Entry::new(gfn, operation, size == Size::Large)).collect();
        for batch in entries.chunks(usize::from(MAX_ENTRIES)) {
            let end = u16::try_from(batch.len()).unwrap_or(MAX_ENTRIES).saturating_sub(1);
            let header = Header { cur_entry: 0, end_entry: end };
            let buffer = [header.raw()].into_iter().chain(batch.iter().map(|entry| entry.raw()));
            let buffer: Vec<u8> = buffer.flat_map(u64::to_le_bytes).collect();
            self.write_shared(ghcb.saturating_add(SHARED_BUFFER), &buffer)?;
            self.request(ghcb, EXIT_PSC, 0, 0)?;
            let answer = self.field(ghcb, EXIT_INFO_2)?;
            if answer != Completion::Done.raw() || self.field(ghcb, EXIT_INFO_1)? != 0 {
                return Err(GuestFailed::Refused { gpa, answer });
            }
        }
        Ok(())
    }

    /// Fills in the GHCB page at `ghcb` and exits by it.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn request(&mut self, ghcb: u64, code: u64, info_1: u64, info_2: u64) -> Result<(), GuestFailed> {
        let scratch = ghcb.saturating_add(SHARED_BUFFER);
        let mut bitmap = [0_u8; 16];
        for (offset, value) in [(EXIT_CODE, code), (EXIT_INFO_1, info_1), (EXIT_INFO_2, info_2), (SCRATCH, scratch)] {
            let (byte, mask) = valid_bit(offset);
            if let Some(byte) = usize::try_from(byte).ok().and_then(|byte| bitmap.get_mut(byte)) {
                *byte |= mask;
            }
            self.write_shared(ghcb.saturating_add(offset), &value.to_le_bytes())?;
        }
        self.write_shared(ghcb.saturating_add(VALID_BITMAP), &bitmap)?;
        self.instruction(ghcb, vmgexit(ghcb)).map(drop)
    }

    /// A field of the GHCB page.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn field(&mut self, ghcb: u64, offset: u64) -> Result<u64, GuestFailed> {
        let bytes = self.read_shared(ghcb.saturating_add(offset), 8)?;
        Ok(bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    /// `pvalidate_pages()`: 2 MiB at a time where that is possible, each page by itself where the host has none.
    ///
    /// # Errors
    /// [`GuestFailed`].
    pub fn pvalidate(&mut self, gpa: u64, pages: u64, validate: bool) -> Result<(), GuestFailed> {
        for (gfn, size) in pieces(gpa >> 12, pages) {
            match self.pvalidate_one(gfn << 12, size, validate) {
                Err(GuestFailed::Pvalidate { code, .. }) if code == Failure::SizeMismatch.code() => {
                    for nr in 0..size.pages() {
                        self.pvalidate_one(gfn.saturating_add(nr) << 12, Size::Small, validate)?;
                    }
                }
                result => result?,
            }
        }
        Ok(())
    }

    fn pvalidate_one(&mut self, gpa: u64, size: Size, validate: bool) -> Result<(), GuestFailed> {
        /// `PVALIDATE_FAIL_NOUPDATE`.
        const NO_UPDATE: u32 = 255;
        match validated(self.instruction(gpa, pvalidate(gpa, size, validate))?) {
            Ok(true) => Ok(()),
            Ok(false) => Err(GuestFailed::Pvalidate { gpa, code: NO_UPDATE }),
            Err(code) => Err(GuestFailed::Pvalidate { gpa, code }),
        }
    }
}

/// A run of frames in as large pieces as possible.
fn pieces(mut gfn: u64, mut pages: u64) -> impl Iterator<Item = (u64, Size)> {
    std::iter::from_fn(move || {
        let size = match pages {
            0 => return None,
            PAGES_PER_2M.. if gfn.is_multiple_of(PAGES_PER_2M) => Size::Large,
            _ => Size::Small,
        };
        let piece = (gfn, size);
        gfn = gfn.saturating_add(size.pages());
        pages = pages.saturating_sub(size.pages());
        Some(piece)
    })
}

const _: () = assert!(PAGE_SIZE == 1 << 12);
