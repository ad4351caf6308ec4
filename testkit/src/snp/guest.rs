//! A guest with SEV-SNP: it accepts private pages before it uses them, and asks for page state changes by its GHCB page.
//!
//! It accepts a page when it first gets an exception there. Unlike Linux it does not take acceptance back before it shares a
//! page, because another vCPU may be converting the same page just then.

use std::collections::VecDeque;

use cvm_memory::addr::PAGE_SIZE;
use cvm_memory::hypervisor::{Exit, PreFaultMemory, Vcpu};
use cvm_memory::soft::{GuestOp as SoftOp, OpResult, SoftVcpu};
use cvm_memory_sev::ghcb::page::{
    EXIT_CODE, EXIT_INFO_1, EXIT_INFO_2, EXIT_PSC, SCRATCH, SHARED_BUFFER, VALID_BITMAP, VERSION, valid_bit,
};
use cvm_memory_sev::ghcb::psc::{Entry, Header, MAX_ENTRIES};
use cvm_memory_sev::ghcb::{Operation, msr};
use cvm_memory_sev::rmp::{PAGES_PER_2M, Size};
use cvm_memory_sev::soft::{pvalidate, vmgexit};
use nix::errno::Errno;

use super::SnpVcpu;
use crate::guest::{Guest, GuestOp, Outcome};

/// How often an operation is tried whose pages other vCPUs keep taking away.
const ATTEMPTS: u32 = 1000;
const EINVAL: u64 = 22;

/// What the guest is at.
#[derive(Debug)]
enum Doing {
    /// The operation itself, tried so often.
    Access(u32),
    /// Accepting its pages, after an exception.
    Accept(u32),
    /// A page state change: the answer so far.
    Change(u64),
}

/// What executes single steps: a vCPU of the software KVM, or one of the real KVM that is told what to do.
pub trait Processor: Vcpu {
    /// Tells it what to do next.
    fn begin(&mut self, step: SoftOp);
    /// What came of it, once; `None` while it is unfinished.
    fn finished(&mut self) -> Option<OpResult>;
}

impl Processor for SoftVcpu {
    fn begin(&mut self, step: SoftOp) {
        self.start(step);
    }

    fn finished(&mut self) -> Option<OpResult> {
        self.take_result()
    }
}

impl Processor for SnpVcpu {
    fn begin(&mut self, step: SoftOp) {
        self.start(step);
    }

    fn finished(&mut self) -> Option<OpResult> {
        self.take_result()
    }
}

/// A vCPU with a guest on it that converts and accepts as it has to.
#[derive(Debug)]
pub struct SnpGuest<P> {
    vcpu: P,
    private: bool,
    ghcb: u64,
    registered: bool,
    op: SoftOp,
    doing: Doing,
    /// What comes after the present step.
    steps: VecDeque<SoftOp>,
}

impl<P: Processor> SnpGuest<P> {
    /// A guest whose GHCB page is at `ghcb`, in shared memory.
    pub const fn new(vcpu: P, ghcb: u64) -> Self {
        let op = SoftOp::Fetch { gpa: 0, private: true };
        Self { vcpu, private: true, ghcb, registered: false, op, doing: Doing::Access(0), steps: VecDeque::new() }
    }

    /// What executes its steps, for single ones between two operations.
    pub const fn processor(&mut self) -> &mut P {
        &mut self.vcpu
    }

    fn next(&mut self) -> bool {
        let step = self.steps.pop_front();
        let more = step.is_some();
        step.into_iter().for_each(|step| self.vcpu.begin(step));
        more
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.steps.push_back(SoftOp::Write { gpa: self.ghcb + offset, data: data.to_vec(), private: false });
    }

    /// The steps of a page state change.
    fn change(&mut self, gpa: u64, pages: u64, operation: Operation) {
        if !self.registered {
            self.steps.push_back(vmgexit(msr::register_request(self.ghcb / PAGE_SIZE)));
            self.registered = true;
        }
        let mut entries = Vec::new();
        let (mut gfn, end) = (gpa / PAGE_SIZE, gpa / PAGE_SIZE + pages);
        while gfn < end {
            let large = gfn.is_multiple_of(PAGES_PER_2M) && end - gfn >= PAGES_PER_2M;
            entries.push(Entry::new(gfn, operation, large));
            gfn += if large { PAGES_PER_2M } else { 1 };
        }
        for batch in entries.chunks(MAX_ENTRIES.into()) {
            let header = Header { cur_entry: 0, end_entry: u16::try_from(batch.len() - 1).unwrap_or(u16::MAX) };
            let words = std::iter::once(header.raw()).chain(batch.iter().map(|entry| entry.raw()));
            let buffer: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            self.write(SHARED_BUFFER, &buffer);
            let mut bitmap = [0_u8; 16];
            let scratch = self.ghcb + SHARED_BUFFER;
            for (offset, value) in [(EXIT_CODE, EXIT_PSC), (EXIT_INFO_1, 0), (EXIT_INFO_2, 0), (SCRATCH, scratch)] {
                let (byte, mask) = valid_bit(offset);
                bitmap[usize::try_from(byte).unwrap_or(0)] |= mask;
                self.write(offset, &value.to_le_bytes());
            }
            self.write(VALID_BITMAP, &bitmap);
            self.write(VERSION, &2_u16.to_le_bytes());
            self.steps.push_back(vmgexit(self.ghcb));
            self.steps.push_back(SoftOp::Read { gpa: self.ghcb + EXIT_INFO_2, len: 8, private: false });
        }
    }
}

/// The frames of an operation.
fn pages(op: &SoftOp) -> std::ops::Range<u64> {
    let (gpa, len) = match op {
        SoftOp::Read { gpa, len, .. } | SoftOp::Fill { gpa, len, .. } | SoftOp::Check { gpa, len, .. } => (*gpa, *len),
        SoftOp::Write { gpa, data, .. } => (*gpa, data.len() as u64),
        SoftOp::Fetch { gpa, .. } => (*gpa, 1),
        SoftOp::Hypercall { .. } | SoftOp::Instruction { .. } => (0, 0),
    };
    gpa / PAGE_SIZE..(gpa + len).div_ceil(PAGE_SIZE)
}

impl<P: Processor> Vcpu for SnpGuest<P> {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.vcpu.pre_fault_memory(range)
    }

    /// Halts after each step; the operation is over when there is a result.
    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        self.vcpu.run()
    }
}

impl<P: Processor> Guest for SnpGuest<P> {
    fn start(&mut self, op: GuestOp) {
        let private = self.private;
        self.steps.clear();
        self.doing = Doing::Access(0);
        self.op = match op {
            GuestOp::Read { gpa, len } => SoftOp::Read { gpa, len: len as u64, private },
            GuestOp::Write { gpa, data } => SoftOp::Write { gpa, data, private },
            GuestOp::Fill { gpa, len, byte } => SoftOp::Fill { gpa, len, byte, private },
            GuestOp::Check { gpa, len, byte } => SoftOp::Check { gpa, len, byte, private },
            GuestOp::Fetch { gpa } => SoftOp::Fetch { gpa, private },
            GuestOp::Hypercall { args: [gpa, pages, attributes, _], .. } => {
                let to = if attributes & 0x10 != 0 { Operation::Private } else { Operation::Shared };
                self.doing = Doing::Change(0);
                self.change(gpa, pages, to);
                self.next();
                return;
            }
        };
        self.vcpu.begin(self.op.clone());
    }

    /// # Panics
    /// If the guest does not get at its memory however often it accepts it.
    fn result(&mut self) -> Option<Outcome> {
        let result = self.vcpu.finished()?;
        match (&mut self.doing, result) {
            (Doing::Access(attempts), OpResult::Exception) => {
                let attempts = *attempts + 1;
                assert!(attempts < ATTEMPTS, "{:x?} gets an exception", self.op);
                self.doing = Doing::Accept(attempts);
                self.steps.extend(pages(&self.op).map(|gfn| pvalidate(gfn * PAGE_SIZE, Size::Small, true)));
            }
            // Whatever it gave: pages that were accepted before are no change, and others may be gone again.
            (Doing::Accept(attempts), _) => {
                if self.steps.is_empty() {
                    self.doing = Doing::Access(*attempts);
                    self.steps.push_back(self.op.clone());
                }
            }
            (Doing::Change(answer), OpResult::Read(bytes)) => {
                if bytes != [0; 8] {
                    *answer = EINVAL;
                }
                if self.steps.is_empty() {
                    return Some(Outcome::Answer(*answer));
                }
            }
            (Doing::Change(_), _) => {}
            (Doing::Access(_), OpResult::Read(data)) => return Some(Outcome::Data(data)),
            (Doing::Access(_), OpResult::Differs { gpa, .. }) => {
                let SoftOp::Check { gpa: start, .. } = self.op else { return Some(Outcome::Done) };
                return Some(Outcome::Differs { offset: gpa.wrapping_sub(start) });
            }
            (Doing::Access(_), _) => {
                return Some(if matches!(self.op, SoftOp::Check { .. }) { Outcome::Same } else { Outcome::Done });
            }
        }
        self.next();
        None
    }

    fn return_code(&self) -> &'static [u8] {
        &[0xc3]
    }

    fn set_private(&mut self, private: bool) {
        self.private = private;
    }
}
