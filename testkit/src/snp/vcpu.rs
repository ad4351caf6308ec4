//! A vCPU of the real KVM that executes what one of the software KVM does.

use std::time::Duration;

use cvm_memory::hypervisor::kvm::{KvmVcpu, KvmVm};
use cvm_memory::hypervisor::{Cap, Exit, Hypervisor, PreFaultMemory, Vcpu};
use cvm_memory::soft::{GuestOp, OpResult};
use cvm_memory_sev::rmp::Size;
use cvm_memory_sev::soft::{pvalidate, rmpadjust, vmgexit};
use cvm_memory_sev::vmsa::Vmsa;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use nix::errno::Errno;

use super::program::{Do, LIMIT, Program, SHARED, WAITS, mailbox};
use crate::kvm_guest::support::{EXCHANGE, EXCHANGE_SIZE, Support, TABLES};
use crate::kvm_guest::{Cause, Kick, long_mode};

/// For how long a vCPU may run without coming back.
const PATIENCE: Duration = Duration::from_secs(60);
/// CF=1, in the result of PVALIDATE.
const NO_UPDATE: u64 = 1 << 32;
const EAX: u64 = 0xffff_ffff;

/// An operation, and how far it is.
#[derive(Debug)]
struct Task {
    op: GuestOp,
    /// Bytes done.
    done: u64,
    read: Vec<u8>,
    /// Bytes that the program is at; zero for an operation that has none. `None` before and after.
    piece: Option<u64>,
    result: Option<OpResult>,
}

/// A vCPU with a [`Program`] on it. Its mailbox is in a slot of its own, of the highest ids, below 4 GiB: like
/// [`KvmGuest`](crate::KvmGuest)'s memory.
#[derive(Debug)]
pub struct SnpVcpu {
    // First, because a slot may only go when nobody runs in it any more.
    vcpu: KvmVcpu,
    mailbox: Support,
    vmsa: Vmsa,
    kick: Kick,
    request: u64,
    task: Option<Task>,
}

impl SnpVcpu {
    /// Creates vCPU `id` of `vm`, which has been initialised for SNP, to run `program`. It can run once it is launched from
    /// [`vmsa`](Self::vmsa).
    ///
    /// # Panics
    /// If KVM refuses any of it.
    pub fn new(vm: &KvmVm, program: &Program, id: u64) -> Self {
        let mut vcpu = vm.create_vcpu(id).expect("a vCPU");
        vcpu.fd().set_cpuid2(&supported_cpuid()).expect("to set the CPUID that KVM supports");
        let place = long_mode::place(vm.check_extension(Cap::NR_MEMSLOTS), id);
        let mailbox = Support::new(vm, place, TABLES);
        let vmsa = program.vmsa(id, place.gpa);
        let kick = Kick::new(vcpu.fd_mut());
        kick.watch();
        Self { vcpu, mailbox, vmsa, kick, request: 0, task: None }
    }

    /// The vCPU.
    pub const fn vcpu(&self) -> &KvmVcpu {
        &self.vcpu
    }

    /// What it starts with, also if the guest itself starts it.
    pub const fn vmsa(&self) -> &Vmsa {
        &self.vmsa
    }

    /// What makes a run return, from any thread.
    pub fn kick(&self) -> Kick {
        self.kick.clone()
    }

    /// Tells the guest what to do next.
    ///
    /// # Panics
    /// If it is at something: nobody can change its registers. If it cannot do that: a hypercall, or an address beyond what
    /// it reaches.
    pub fn start(&mut self, op: GuestOp) {
        assert!(self.task.as_ref().is_none_or(|task| task.piece.is_none()), "the guest is at {:x?}", self.task);
        if let Some((gpa, len, _)) = memory(&op) {
            assert!(gpa.checked_add(len).is_some_and(|end| end <= LIMIT), "this guest reaches {LIMIT:#x}, not {op:x?}");
        }
        self.task = Some(Task { op, done: 0, read: Vec::new(), piece: None, result: None });
    }

    /// What came of the last operation, once; `None` while it is unfinished.
    pub fn take_result(&mut self) -> Option<OpResult> {
        self.task.take_if(|task| task.result.is_some())?.result
    }

    /// Writes the next piece into the mailbox, or says that there is none.
    fn load(&mut self) -> bool {
        let Some(task) = self.task.as_mut().filter(|task| task.result.is_none()) else { return false };
        if task.piece.is_some() {
            return true;
        }
        let (what, operands, piece) = task.next(&self.mailbox);
        let write = |at, value| self.mailbox.write_u64(at, value);
        for (at, value) in (mailbox::OPERANDS..).step_by(8).zip(operands) {
            write(at, value);
        }
        self.request += 1;
        write(mailbox::WHAT, what as u64);
        write(mailbox::REQUEST, self.request);
        task.piece = Some(piece);
        true
    }

    /// The program waits: perhaps because it is done.
    fn finish(&mut self) {
        if self.mailbox.read_u64(mailbox::DONE) != self.request {
            return; // it has just been started
        }
        let Some(task) = &mut self.task else { return };
        let Some(piece) = task.piece.take() else { return };
        let [rax, carry, exception] =
            [mailbox::RAX, mailbox::CARRY, mailbox::EXCEPTION].map(|at| self.mailbox.read_u64(at));
        task.result = match &task.op {
            _ if exception != 0 => Some(OpResult::Exception),
            GuestOp::Instruction { nr, .. } => Some(OpResult::Instruction(match instruction(*nr) {
                Do::Pvalidate if rax & EAX == 0 => carry * NO_UPDATE,
                Do::Pvalidate | Do::Rmpadjust => rax & EAX,
                _ => rax,
            })),
            _ => task.piece_done(&self.mailbox, piece),
        };
    }

    fn enter(&mut self) -> Result<(), Errno> {
        self.kick.enter(PATIENCE);
        let result = self.vcpu.enter();
        if self.kick.leave(result == Err(Errno::EINTR)) == Some(Cause::Expired) {
            eprintln!("vCPU hung for {PATIENCE:?} at {:x?}", self.task);
            return Err(Errno::ETIMEDOUT);
        }
        result
    }
}

impl Task {
    /// The next thing to do for this operation, its operands, and the bytes of it.
    fn next(&self, mailbox: &Support) -> (Do, [u64; 5], u64) {
        if let GuestOp::Instruction { nr, args: [first, second, third, _] } = self.op {
            return match instruction(nr) {
                Do::Vmgexit => (Do::Vmgexit, [first, 0, 0, 0, 0], 0),
                // The processor has a number for the size, not pages.
                what => (what, [first, u64::from(second > 1), third, 0, 0], 0),
            };
        }
        let (gpa, len, private) = memory(&self.op).expect("SNP guests make no hypercalls");
        let target = gpa + self.done + if private { 0 } else { SHARED };
        let piece = (len - self.done).min(EXCHANGE_SIZE);
        let exchange = mailbox.gpa(EXCHANGE) + SHARED;
        let copy = |from: u64, to: u64| match piece.is_multiple_of(8) {
            true => (Do::CopyWords, [0, piece / 8, 0, from, to], piece),
            false => (Do::CopyBytes, [0, piece, 0, from, to], piece),
        };
        let at = index(self.done)..index(self.done + piece);
        match &self.op {
            GuestOp::Fetch { .. } => (Do::Call, [0, 0, 0, 0, target], 1),
            GuestOp::Write { data, .. } => {
                mailbox.write(EXCHANGE, &data[at]);
                copy(exchange, target)
            }
            GuestOp::Fill { byte, .. } => {
                mailbox.write(EXCHANGE, &vec![*byte; at.len()]);
                copy(exchange, target)
            }
            _ => copy(target, exchange),
        }
    }

    /// So many bytes more are done. The result, if they were the last that count.
    fn piece_done(&mut self, mailbox: &Support, piece: u64) -> Option<OpResult> {
        let (gpa, len, _) = memory(&self.op)?;
        match self.op {
            GuestOp::Read { .. } => self.read.extend(mailbox.read(EXCHANGE, index(piece))),
            GuestOp::Check { byte, .. } => {
                let bytes = mailbox.read(EXCHANGE, index(piece));
                if let Some((at, found)) = (0..).zip(bytes).find(|(_, found)| *found != byte) {
                    return Some(OpResult::Differs { gpa: gpa + self.done + at, found });
                }
            }
            _ => {}
        }
        self.done += piece;
        (self.done == len).then(|| match self.op {
            GuestOp::Read { .. } => OpResult::Read(std::mem::take(&mut self.read)),
            _ => OpResult::Done,
        })
    }
}

/// What an instruction of the software KVM's SNP guests is here.
fn instruction(nr: u64) -> Do {
    let known = [
        (pvalidate(0, Size::Small, true), Do::Pvalidate),
        (rmpadjust(0, 1, 0, true), Do::Rmpadjust),
        (vmgexit(0), Do::Vmgexit),
    ];
    let is_it = |op: &GuestOp| matches!(op, GuestOp::Instruction { nr: other, .. } if *other == nr);
    known.into_iter().find(|(op, _)| is_it(op)).unwrap_or_else(|| panic!("there is no instruction {nr}")).1
}

/// First byte, length and privacy of an operation on memory.
fn memory(op: &GuestOp) -> Option<(u64, u64, bool)> {
    match op {
        GuestOp::Read { gpa, len, private }
        | GuestOp::Fill { gpa, len, private, .. }
        | GuestOp::Check { gpa, len, private, .. } => Some((*gpa, *len, *private)),
        GuestOp::Write { gpa, data, private } => Some((*gpa, data.len() as u64, *private)),
        GuestOp::Fetch { gpa, private } => Some((*gpa, 1, *private)),
        GuestOp::Hypercall { .. } | GuestOp::Instruction { .. } => None,
    }
}

impl Vcpu for SnpVcpu {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.vcpu.pre_fault_memory(range)
    }

    /// Until the operation has a result, which is [`Exit::Halt`], or something else is to be dealt with.
    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        while self.load() {
            self.enter()?;
            if !matches!(self.vcpu.last_exit(), Exit::Other(Some(WAITS))) {
                return Ok(self.vcpu.last_exit());
            }
            self.finish();
        }
        Ok(Exit::Halt)
    }
}

impl Drop for SnpVcpu {
    fn drop(&mut self) {
        self.kick.forget();
    }
}

/// The bit of a page table entry that makes a page private on this host, if it has one. Only KVM says so to userspace.
pub fn c_bit() -> Option<u32> {
    let leaf = supported_cpuid().as_slice().iter().find(|leaf| leaf.function == 0x8000_001f).copied();
    leaf.map(|leaf| leaf.ebx & 0x3f).filter(|bit| *bit > 0)
}

fn supported_cpuid() -> kvm_bindings::CpuId {
    let kvm = Kvm::new().and_then(|kvm| kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES));
    kvm.expect("the CPUID that KVM supports")
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit addresses")
}
