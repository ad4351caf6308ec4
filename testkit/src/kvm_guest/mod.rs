//! Guests on the real KVM: a vCPU whose registers are set for every operation and which runs to `hlt`.
//!
//! [`KvmGuest`] is in 64-bit mode and reaches every guest physical address; [`RealModeGuest`] reaches the first MiB, on a
//! KVM that can run real mode only. Either lives in one small slot of its own ([`Placement`]), which is ordinary shared
//! memory, and touches nothing else but what it is told to. There are no interrupts and no exception handlers: an
//! exception is a triple fault, [`Exit::Shutdown`].
//!
//! A string instruction that faults on its way is restarted where it was when the vCPU runs again, so memory faults can be
//! dealt with between two runs. Long operations are done in pieces, which is not visible from outside.

mod kick;
pub(crate) mod long_mode;
mod mode;
mod real_mode;
pub(crate) mod support;
mod tables;

use std::arch::x86_64::__cpuid;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cvm_memory::hypervisor::kvm::{KvmVcpu, KvmVm};
use cvm_memory::hypervisor::{Cap, DirtyRingMemory, Exit, Hypervisor, PreFaultMemory, Vcpu};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use nix::errno::Errno;

use crate::guest::{Guest, GuestOp, Outcome};
use mode::{Cpu, Mode, Step};
use support::{EXCHANGE, EXCHANGE_SIZE, Support};

pub(crate) use kick::Cause;
pub use kick::Kick;
pub use long_mode::LongMode;
pub use real_mode::RealMode;
pub use support::Placement;

/// A vCPU in 64-bit mode.
pub type KvmGuest = Driver<LongMode>;
/// A vCPU in real mode.
pub type RealModeGuest = Driver<RealMode>;

/// For how long a vCPU may run without coming back, before it counts as hung. Emulated hosts are slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// An operation, and how far it is.
#[derive(Debug)]
struct Progress {
    op: GuestOp,
    /// Bytes done.
    done: u64,
    data: Vec<u8>,
    /// What the registers were last set for.
    step: Option<Step>,
    outcome: Option<Outcome>,
    /// How often a step was done again.
    spurious: u32,
}

/// What a guest keeps for itself: one slot, and the memory in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnMemory {
    /// Slot id.
    pub slot: u32,
    /// First byte.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
}

impl KvmGuest {
    /// What the guest of vCPU `vcpu` keeps for itself on a KVM with the usual number of slots, if nobody says where.
    pub fn own_memory(vcpu: u64) -> OwnMemory {
        let Placement { slot, gpa } = long_mode::place(USUAL_SLOTS, vcpu);
        OwnMemory { slot, gpa, size: LongMode::SIZE }
    }
}

/// `KVM_CAP_NR_MEMSLOTS` of x86.
const USUAL_SLOTS: u64 = 32764;

/// A vCPU of the real KVM that does as it is told. See the [module](self).
#[derive(Debug)]
pub struct Driver<M> {
    // First, because a slot may only go when nobody runs in it any more.
    vcpu: KvmVcpu,
    support: Support,
    mode: M,
    cpu: Cpu,
    kick: Kick,
    patience: Duration,
    progress: Option<Progress>,
}

/// Slot ids from the top of what KVM offers, one per vCPU.
fn high_slot(slots: u64, vcpu: u64) -> u32 {
    u32::try_from(slots - 1 - vcpu).expect("slot ids have 16 bits")
}

impl<M: Mode> Driver<M> {
    /// Creates vCPU `id` of `vm`, with its memory where nobody should mind: at the highest slot ids, below 4 GiB (or 1 MiB).
    ///
    /// # Panics
    /// If KVM refuses any of it.
    pub fn new(vm: &KvmVm, id: u64) -> Self {
        Self::with_placement(vm, id, M::place(vm.check_extension(Cap::NR_MEMSLOTS), id))
    }

    /// Creates vCPU `id` of `vm`, with its memory at `place`.
    ///
    /// # Panics
    /// If KVM refuses any of it.
    pub fn with_placement(vm: &KvmVm, id: u64, place: Placement) -> Self {
        let mut vcpu = vm.create_vcpu(id).expect("a vCPU");
        let cpuid = Kvm::new()
            .and_then(|kvm| kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))
            .expect("the CPUID that KVM supports");
        vcpu.fd().set_cpuid2(&cpuid).expect("to set that CPUID");
        let leaf = |function| cpuid.as_slice().iter().find(|entry| entry.function == function);
        let cpu = Cpu {
            physical_bits: leaf(0x8000_0008).map_or(36, |entry| entry.eax & 0xff),
            // The other vendors' names have another word there.
            vmmcall: leaf(0).is_some_and(|leaf| matches!(&leaf.ecx.to_le_bytes(), b"cAMD" | b"uine")),
        };
        let support = Support::new(vm, place, M::SIZE);
        let kick = Kick::new(vcpu.fd_mut());
        kick.watch();
        let mode = M::new(&support, cpu);
        Self { vcpu, support, mode, cpu, kick, patience: PATIENCE, progress: None }
    }

    /// The vCPU.
    pub const fn vcpu(&self) -> &KvmVcpu {
        &self.vcpu
    }

    /// Bits of a guest physical address.
    pub const fn physical_bits(&self) -> u32 {
        self.cpu.physical_bits
    }

    /// What makes a run return, from any thread.
    pub fn kick(&self) -> Kick {
        self.kick.clone()
    }

    /// For how long a run may take before it fails with `ETIMEDOUT`, and the registers are printed.
    pub const fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Sets the registers for the next step, or says that there is none.
    fn load(&mut self) -> Result<bool, Errno> {
        let Some(progress) = &mut self.progress else { return Ok(false) };
        if progress.step.is_some() {
            return Ok(true); // in the middle of one
        }
        let Some(step) = progress.next(M::CHUNK) else { return Ok(false) };
        if let (Step::Out { len, .. }, GuestOp::Write { data, .. }) = (step, &progress.op) {
            let from = index(progress.done);
            self.support.write(EXCHANGE, &data[from..from + index(len)]);
        }
        let fd = self.vcpu.fd();
        let mut sregs = fd.get_sregs().map_err(errno)?;
        self.mode.sregs(&self.support, &mut sregs, &step);
        fd.set_sregs(&sregs).map_err(errno)?;
        fd.set_regs(&self.mode.regs(&self.support, &step)).map_err(errno)?;
        progress.step = Some(step);
        Ok(true)
    }

    /// The stub ran to its end.
    fn finish_step(&mut self) -> Result<(), Errno> {
        let regs = self.vcpu.fd().get_regs().map_err(errno)?;
        let Some(progress) = &mut self.progress else { return Ok(()) };
        let Some(step) = progress.step.take() else { return Ok(()) };
        progress.outcome = match step {
            Step::In { len, .. } => {
                progress.data.extend(self.support.read(EXCHANGE, index(len)));
                None
            }
            Step::Check { len, .. } if regs.rflags & ZERO_FLAG == 0 => {
                Some(Outcome::Differs { offset: progress.done + len - regs.rcx - 1 })
            }
            Step::Out { .. } | Step::Fill { .. } | Step::Check { .. } => None,
            Step::Fetch { .. } => Some(Outcome::Done),
            Step::Hypercall { .. } => Some(Outcome::Answer(regs.rax)),
        };
        progress.done += step.target().map_or(0, |(_, len)| len);
        Ok(())
    }

    /// Whether what the run ended with is the doing of an [emulated processor](is_emulated), and not of the step, nor of KVM: a triple
    /// fault, which nothing that a guest is told has a reason for; or a guest with registers of the host that it runs on.
    fn is_spurious(&mut self, result: Result<(), Errno>) -> Result<bool, Errno> {
        if !is_emulated() || result == Err(Errno::EINTR) {
            return Ok(false);
        }
        Ok(result.is_ok() && matches!(self.vcpu.last_exit(), Exit::Shutdown) || self.is_astray()?)
    }

    /// Whether the guest executes something that it was not told to.
    fn is_astray(&self) -> Result<bool, Errno> {
        let fd = self.vcpu.fd();
        let ip = fd.get_sregs().map_err(errno)?.cs.base.wrapping_add(fd.get_regs().map_err(errno)?.rip);
        let called = match self.progress.as_ref().and_then(|progress| progress.step) {
            // Behind the call, too, as far as a wild instruction reaches.
            Some(Step::Fetch { gpa }) => (gpa..gpa.saturating_add(INSTRUCTION)).contains(&ip),
            _ => false,
        };
        Ok(!called && !(self.support.gpa(0)..self.support.gpa(M::SIZE)).contains(&ip))
    }

    /// Begins the step anew, which does no harm when it is done twice (a hypercall may be seen twice); or says that it is believed now.
    fn starts_again(&mut self) -> bool {
        let Some(progress) = &mut self.progress else { return false };
        if progress.spurious == SPURIOUS_LIMIT {
            return false;
        }
        progress.spurious += 1;
        self.settle();
        SPURIOUS.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Lets KVM complete what the last exit left, with the registers that are about to be replaced.
    fn settle(&mut self) {
        if self.progress.as_mut().is_some_and(|progress| progress.step.take().is_some()) {
            self.kick.set_immediate(true);
            let _ = self.vcpu.enter();
            self.kick.set_immediate(false);
        }
    }

    /// Runs the vCPU once, under the watchdog.
    fn enter(&mut self) -> Result<(), Errno> {
        let mut left = self.patience;
        loop {
            // A guest that is astray may never come back by itself.
            let wait = if is_emulated() { left.min(GLANCE) } else { left };
            self.kick.enter(wait);
            let result = self.vcpu.enter();
            if self.kick.leave(result == Err(Errno::EINTR)) != Some(Cause::Expired) {
                return result;
            }
            left = left.saturating_sub(wait);
            if is_emulated() && self.is_astray()? {
                return Err(Errno::ETIMEDOUT);
            }
            if left.is_zero() {
                eprintln!("vCPU hung for {:?} at {:x?}", self.patience, self.progress);
                eprintln!("{:x?}\n{:x?}", self.vcpu.fd().get_regs(), self.vcpu.fd().get_sregs());
                return Err(Errno::ETIMEDOUT);
            }
        }
    }
}

/// Bytes of an instruction, at most.
const INSTRUCTION: u64 = 15;

/// How often a vCPU on an emulated processor is looked at while it runs.
const GLANCE: Duration = Duration::from_secs(1);

const ZERO_FLAG: u64 = 1 << 6;

impl Progress {
    /// The next piece, of at most `chunk` bytes; `None` if that was all.
    fn next(&self, chunk: u64) -> Option<Step> {
        let piece = |gpa: u64, len: u64, most: u64| match len.checked_sub(self.done) {
            Some(left) if left > 0 => Some((gpa + self.done, left.min(most))),
            _ => None,
        };
        if self.outcome.is_some() {
            return None;
        }
        match self.op {
            GuestOp::Read { gpa, len } => {
                piece(gpa, len as u64, chunk.min(EXCHANGE_SIZE)).map(|(gpa, len)| Step::In { gpa, len })
            }
            GuestOp::Write { gpa, ref data } => {
                piece(gpa, data.len() as u64, chunk.min(EXCHANGE_SIZE)).map(|(gpa, len)| Step::Out { gpa, len })
            }
            GuestOp::Fill { gpa, len, byte } => piece(gpa, len, chunk).map(|(gpa, len)| Step::Fill { gpa, len, byte }),
            GuestOp::Check { gpa, len, byte } => {
                piece(gpa, len, chunk).map(|(gpa, len)| Step::Check { gpa, len, byte })
            }
            GuestOp::Fetch { gpa } => Some(Step::Fetch { gpa }),
            GuestOp::Hypercall { nr, args } => Some(Step::Hypercall { nr, args }),
        }
    }
}

/// How often an [emulated processor](is_emulated) did something for no reason.
pub static SPURIOUS: AtomicU64 = AtomicU64::new(0);

/// How often in a row that is believed.
const SPURIOUS_LIMIT: u32 = 2;

/// Whether this processor is QEMU's. It raises an exception for no reason, now and then, in a guest's guest with several
/// vCPUs; some of them in the middle of the handling of another, which is a triple fault. More rarely, a guest is left with the
/// instruction pointer, segments and page tables of the host that entered it.
pub fn is_emulated() -> bool {
    static EMULATED: LazyLock<bool> = LazyLock::new(|| {
        let leaf = __cpuid(0x4000_0000);
        [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG"
    });
    *EMULATED
}

impl<M: Mode + std::fmt::Debug + Send> Vcpu for Driver<M> {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.vcpu.pre_fault_memory(range)
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        while self.load()? {
            let result = self.enter();
            if self.is_spurious(result)? && self.starts_again() {
                continue;
            }
            result?;
            if !matches!(self.vcpu.last_exit(), Exit::Halt) {
                return Ok(self.vcpu.last_exit());
            }
            self.finish_step()?;
        }
        Ok(Exit::Halt)
    }

    fn dirty_ring(&self, bytes: u32) -> Result<Box<dyn DirtyRingMemory>, Errno> {
        self.vcpu.dirty_ring(bytes)
    }
}

impl<M: Mode + std::fmt::Debug + Send> Guest for Driver<M> {
    fn start(&mut self, op: GuestOp) {
        let (gpa, len) = match op {
            GuestOp::Read { gpa, len } => (gpa, len as u64),
            GuestOp::Write { gpa, ref data } => (gpa, data.len() as u64),
            GuestOp::Fill { gpa, len, .. } | GuestOp::Check { gpa, len, .. } => (gpa, len),
            GuestOp::Fetch { gpa } => (gpa, 1),
            GuestOp::Hypercall { .. } => (0, 0),
        };
        let limit = self.mode.limit();
        assert!(
            gpa.checked_add(len).is_some_and(|end| end <= limit),
            "this guest reaches no further than {limit:#x}: {op:x?}"
        );
        self.settle();
        self.progress = Some(Progress { op, done: 0, data: Vec::new(), step: None, outcome: None, spurious: 0 });
    }

    fn result(&mut self) -> Option<Outcome> {
        let progress = self.progress.take_if(|progress| progress.step.is_none() && progress.over())?;
        Some(match (progress.outcome, progress.op) {
            (Some(outcome), _) => outcome,
            (None, GuestOp::Read { .. }) => Outcome::Data(progress.data),
            (None, GuestOp::Check { .. }) => Outcome::Same,
            (None, _) => Outcome::Done,
        })
    }

    fn return_code(&self) -> &'static [u8] {
        M::RETURN
    }
}

impl Progress {
    fn over(&self) -> bool {
        self.next(u64::MAX).is_none()
    }
}

impl<M> Drop for Driver<M> {
    fn drop(&mut self) {
        self.kick.forget();
    }
}

fn errno(error: kvm_ioctls::Error) -> Errno {
    Errno::from_raw(error.errno())
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit addresses")
}
