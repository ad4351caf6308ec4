//! A vCPU: runs one guest operation at a time, leaves for userspace where KVM would, and takes up where it left.
//!
//! Mirrors `kvm_arch_vcpu_ioctl_run()`, `kvm_emulate_hypercall()`, `complete_hypercall_exit()`, `complete_emulated_mmio()`
//! (`arch/x86/kvm/x86.c`), `kvm_vcpu_pre_fault_memory()` (`virt/kvm/kvm_main.c`) and `kvm_tdp_map_page()`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::arch::{AccessKind, Denied, Step};
use super::counters::Call;
use super::dirty_ring::Ring;
use super::emulate::{Emulation, Fragment};
use super::fault::{Data, Fault, Missing, View, Walk};
use super::ops::{GuestOp, OpResult, Running};
use super::vm::Vm;
use crate::addr::{Gfn, GfnRange, Gpa, PAGE_SIZE};
use crate::hypervisor::{DirtyRingMemory, Exit, HypercallExit, MemoryFault, Mmio, PreFaultMemory, Vcpu};
use crate::sync::blocking::yield_now;

/// `KVM_HC_MAP_GPA_RANGE` as a bit of `KVM_CAP_EXIT_HYPERCALL`.
pub(super) const MAP_GPA_RANGE_BIT: u64 = 1 << HypercallExit::MAP_GPA_RANGE;
/// `-KVM_ENOSYS` and `-KVM_EINVAL`, as a guest finds them in its return register.
const GUEST_ENOSYS: u64 = (-1000_i64).cast_unsigned();
const GUEST_EINVAL: u64 = (-22_i64).cast_unsigned();
/// The longest piece of an emulated access.
const MMIO_BYTES: usize = 8;
/// Reads and writes of no more than that are one instruction; longer ones are as many as it takes.
const INSTRUCTION_BYTES: u64 = 8;
/// `KVM_INTERNAL_ERROR_EMULATION`.
const EMULATION: u32 = 1;

/// What the next run completes before the guest goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Nothing,
    MmioRead(usize),
    /// The next piece of an emulated instruction.
    Emulation,
    /// Of this number.
    Hypercall(u64),
    /// #UD is queued.
    InvalidOpcode,
}

/// Why the guest stopped; [`Exit`] without borrows.
enum Stop {
    Halt,
    Fault(MemoryFault),
    Hypercall(u64, [u64; 6]),
    MmioRead(u64, usize),
    MmioWrite(u64, usize),
    EmulationFailure,
    RingFull,
    FailEntry(u64),
    Other(u32),
}

/// How a piece of memory access ended.
enum Piece {
    Done,
    Mmio,
    Exception,
    RingFull,
}

/// Makes a vCPU leave the guest: `kvm_run.immediate_exit` and a signal in one. While it is set, `run` returns `EINTR` as soon
/// as no access is half done.
#[derive(Debug, Clone)]
pub struct ImmediateExit(Arc<AtomicBool>);

impl ImmediateExit {
    /// Sets or clears it.
    pub fn set(&self, exit: bool) {
        self.0.store(exit, Ordering::Release);
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A vCPU of a [`SoftVm`](super::SoftVm).
#[derive(Debug)]
pub struct SoftVcpu {
    vm: Arc<Vm>,
    index: u32,
    running: Option<Running>,
    result: Option<OpResult>,
    pending: Pending,
    interrupt: ImmediateExit,
    mmio: [u8; MMIO_BYTES],
    hypercall_ret: u64,
    emulation: Option<Emulation>,
    ring: Option<Arc<Ring>>,
}

impl SoftVcpu {
    pub(super) fn new(vm: Arc<Vm>) -> Self {
        let index = vm.next_vcpu();
        let ring = vm.rings.create();
        Self {
            vm,
            index,
            running: None,
            result: None,
            pending: Pending::Nothing,
            interrupt: ImmediateExit(Arc::new(AtomicBool::new(false))),
            mmio: [0; MMIO_BYTES],
            hypercall_ret: 0,
            emulation: None,
            ring,
        }
    }

    /// Its index within the VM, from zero.
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// Gives the guest something to do; an operation that is not finished is forgotten. The next runs carry it out, and
    /// [`Exit::Halt`] says that it is finished.
    pub fn start(&mut self, op: GuestOp) {
        self.running = Some(Running::new(op));
        self.result = None;
        self.pending = Pending::Nothing;
        self.emulation = None;
    }

    /// The result of the finished operation, once.
    pub const fn take_result(&mut self) -> Option<OpResult> {
        self.result.take()
    }

    /// The handle that makes it leave the guest, for another thread.
    pub fn immediate_exit(&self) -> ImmediateExit {
        self.interrupt.clone()
    }

    fn interrupted(&self) -> Result<(), Errno> {
        if self.interrupt.is_set() { Err(Errno::EINTR) } else { Ok(()) }
    }

    /// `kvm_dirty_ring_check_request()`.
    fn ring_full(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.soft_full())
    }

    fn finish(&mut self, result: OpResult) {
        self.running = None;
        self.result = Some(result);
    }

    /// What userspace was asked for in the last exit (`complete_userspace_io`). An operation of the platform may need userspace
    /// again at once, before the guest is entered.
    fn complete(&mut self) -> Result<Option<Stop>, Errno> {
        let pending = std::mem::replace(&mut self.pending, Pending::Nothing);
        match pending {
            Pending::Nothing => {}
            Pending::InvalidOpcode => self.finish(OpResult::Exception),
            Pending::Emulation => return Ok(self.emulation_step()),
            Pending::MmioRead(len) => {
                let data = self.mmio;
                self.absorb(data.get(..len).unwrap_or_default());
            }
            Pending::Hypercall(nr) => {
                let ret = self.hypercall_ret;
                let refused = nr == HypercallExit::MAP_GPA_RANGE && !self.vm.arch().accepts_map_gpa_answer(ret);
                match &mut self.running {
                    Some(Running { op: GuestOp::Instruction { nr, args }, answer, .. }) if !refused => {
                        let (nr, args) = (*nr, *args);
                        *answer = Some(ret);
                        return self.instruction_step(nr, args);
                    }
                    _ => self.finish(OpResult::Hypercall(ret)),
                }
                if refused {
                    return Err(Errno::EINVAL);
                }
            }
        }
        Ok(None)
    }

    fn absorb(&mut self, bytes: &[u8]) {
        let Some(running) = &mut self.running else { return };
        if let Some(result) = running.absorb(bytes) {
            self.finish(result);
        } else {
            running.advance(bytes.len());
        }
    }

    /// Takes the bytes that end the operation.
    fn absorb_last(&mut self, bytes: &[u8]) {
        self.absorb(bytes);
        if let Some(running) = &mut self.running {
            let result = running.finish();
            self.finish(result);
        }
    }

    fn enter(&mut self) -> Result<Stop, Errno> {
        self.vm.check_alive()?;
        if let Some(stop) = self.complete()? {
            return Ok(stop);
        }
        self.interrupted()?;
        self.vm.arch().may_run()?;
        while self.running.is_some() {
            self.vm.check_alive()?;
            if self.ring_full() {
                return Ok(Stop::RingFull);
            }
            self.load_state()?;
            if let Some(reason) = self.vm.arch().entry_failure(self.index) {
                return Ok(Stop::FailEntry(reason));
            }
            let Some(running) = &self.running else { break };
            let stop = match (&running.op, running.memory()) {
                (GuestOp::Read { .. } | GuestOp::Write { .. }, Some((gpa, len @ 1..=INSTRUCTION_BYTES, private))) => {
                    self.instruction_access(gpa, len, private)?
                }
                (_, Some((gpa, len, private))) => self.memory_step(gpa, len, private)?,
                (GuestOp::Hypercall { nr, args }, _) => {
                    let (nr, args) = (*nr, *args);
                    self.hypercall(nr, args)
                }
                (GuestOp::Instruction { nr, args }, _) => {
                    let (nr, args) = (*nr, *args);
                    self.instruction_step(nr, args)?
                }
                _ => None,
            };
            if let Some(stop) = stop {
                return Ok(stop);
            }
        }
        Ok(Stop::Halt)
    }

    /// Looks up the page that holds the vCPU's state, where the platform asks for that.
    fn load_state(&self) -> Result<(), Errno> {
        while let Some(gfn) = self.vm.arch().state_page(self.index) {
            self.interrupted()?;
            let found = {
                let _srcu = self.vm.srcu.enter();
                self.vm.state_page(gfn)
            };
            match found {
                Err(Errno::EAGAIN) => yield_now(),
                found => self.vm.arch().state_page_found(self.index, found),
            }
        }
        Ok(())
    }

    /// The part of a memory operation that lies in one page.
    fn memory_step(&mut self, gpa: u64, len: u64, private: bool) -> Result<Option<Stop>, Errno> {
        let Some(running) = &mut self.running else { return Ok(None) };
        let left = len.saturating_sub(running.done);
        if left == 0 {
            let result = running.finish();
            self.finish(result);
            return Ok(None);
        }
        let Some(at) = gpa.checked_add(running.done).map(Gpa) else {
            self.finish(OpResult::Exception);
            return Ok(None);
        };
        let in_page = left.min(PAGE_SIZE.saturating_sub(at.page_offset()));
        let size = usize::try_from(in_page).map_err(|_| Errno::EFAULT)?;
        let fetch = matches!(running.op, GuestOp::Fetch { .. });
        let output = running.output(size);
        let mut input = vec![0; if output.is_some() { 0 } else { size }];
        let data = match &output {
            Some(bytes) => Data::Write(bytes),
            None if fetch => Data::Fetch(&mut input),
            None => Data::Read(&mut input),
        };
        match self.touch(&mut [(at.gfn(), at.page_offset(), data)], private)? {
            Err(fault) => return Ok(Some(Stop::Fault(fault))),
            Ok(Piece::Done) if output.is_some() => self.absorb(&output.unwrap_or_default()),
            Ok(Piece::Done) => self.absorb(&input),
            Ok(Piece::RingFull) => return Ok(Some(Stop::RingFull)),
            Ok(Piece::Exception) => self.finish(OpResult::Exception),
            Ok(Piece::Mmio) if fetch => return Ok(Some(self.emulation_failure())),
            Ok(Piece::Mmio) => return Ok(Some(self.emulated(at.get(), size.min(MMIO_BYTES), output.as_deref()))),
        }
        Ok(None)
    }

    /// One instruction's access, as often as it takes. The inner error is an exit.
    fn touch(&self, pieces: &mut [(Gfn, u64, Data<'_>)], private: bool) -> Result<Result<Piece, MemoryFault>, Errno> {
        loop {
            self.interrupted()?;
            let (index, walk) = self.vm.access(pieces, private);
            match walk {
                Walk::Done => return Ok(Ok(Piece::Done)),
                Walk::Mmio => return Ok(Ok(Piece::Mmio)),
                Walk::Failed(errno) => return Err(errno),
                Walk::Denied(Denied::Exception) => return Ok(Ok(Piece::Exception)),
                Walk::Denied(Denied::KillVm) => self.vm.kill(),
                walk @ (Walk::Fault(_) | Walk::Denied(Denied::Spin | Denied::Noise(_))) => {
                    // What the platform denies is a fault to KVM too, which looks at it like at any other.
                    let missing = if let Walk::Fault(missing) = walk { missing } else { Missing::Plain };
                    yield_now();
                    let Some((gfn, _, data)) = pieces.get(index) else { return Err(Errno::EIO) };
                    match self.fault(*gfn, data.kind(), private, missing)? {
                        // It goes into the guest again, to repeat the access, if there is room for another page.
                        Ok(()) if self.ring_full() => return Ok(Ok(Piece::RingFull)),
                        Ok(()) => {}
                        Err(Fault::Exit(fault)) => return Ok(Err(fault)),
                        Err(Fault::BadAddress) => return Err(Errno::EFAULT),
                        Err(_) => return Ok(Ok(Piece::Mmio)),
                    }
                }
            }
            self.vm.check_alive()?;
        }
    }

    /// One fault; `Ok` means to access again.
    fn fault(&self, gfn: Gfn, kind: AccessKind, private: bool, missing: Missing) -> Result<Result<(), Fault>, Errno> {
        let fault = {
            let _srcu = self.vm.srcu.enter();
            self.vm.fault(gfn, kind, private, missing, self.ring.as_deref())
        };
        match fault {
            Fault::Mapped => Ok(Ok(())),
            Fault::Retry | Fault::SlotInvalid => {
                self.interrupted()?;
                yield_now();
                Ok(Ok(()))
            }
            other => Ok(Err(other)),
        }
    }

    /// A read or write by one instruction, which may cross into a second page. If either part is MMIO, KVM emulates all of it.
    fn instruction_access(&mut self, gpa: u64, len: u64, private: bool) -> Result<Option<Stop>, Errno> {
        let Some(running) = &self.running else { return Ok(None) };
        let at = Gpa(gpa);
        let first = len.min(PAGE_SIZE.saturating_sub(at.page_offset()));
        let (size, split) = (usize::try_from(len), usize::try_from(first));
        let (Ok(size), Ok(split), Some(last)) = (size, split, gpa.checked_add(len.saturating_sub(1))) else {
            self.finish(OpResult::Exception);
            return Ok(None);
        };
        let mut output = running.output(size);
        let mut input = vec![0; if output.is_some() { 0 } else { size }];
        let bytes = output.as_mut().unwrap_or(&mut input);
        let (low, high) = bytes.split_at_mut_checked(split).ok_or(Errno::EIO)?;
        let write = matches!(running.op, GuestOp::Write { .. });
        let mut pieces = vec![(at.gfn(), at.page_offset(), Data::of(write, low))];
        if !high.is_empty() {
            pieces.push((Gpa(last).gfn(), 0, Data::of(write, high)));
        }
        match self.touch(&mut pieces, private)? {
            Err(fault) => return Ok(Some(Stop::Fault(fault))),
            Ok(Piece::Exception) => self.finish(OpResult::Exception),
            Ok(Piece::RingFull) => return Ok(Some(Stop::RingFull)),
            Ok(Piece::Done) => self.absorb_last(&output.unwrap_or(input)),
            Ok(Piece::Mmio) => {
                self.emulation = Some(self.vm.emulate(gpa, output.as_deref(), size, self.ring.as_deref()));
                return Ok(self.emulation_step());
            }
        }
        Ok(None)
    }

    /// Goes on with the instruction that is emulated: the next piece that userspace has to do, or its end.
    fn emulation_step(&mut self) -> Option<Stop> {
        let emulation = self.emulation.as_mut()?;
        if let Some(Fragment { gpa, len, write }) = emulation.next(&mut self.mmio) {
            self.pending = Pending::Emulation;
            return Some(if write { Stop::MmioWrite(gpa, len) } else { Stop::MmioRead(gpa, len) });
        }
        let bytes = self.emulation.take()?.into_bytes();
        self.absorb_last(&bytes);
        None
    }

    /// An access that KVM emulates: a write has retired when userspace hears of it, a read waits for its data.
    fn emulated(&mut self, gpa: u64, len: usize, output: Option<&[u8]>) -> Stop {
        self.mmio = [0; MMIO_BYTES];
        let Some(output) = output else {
            self.pending = Pending::MmioRead(len);
            return Stop::MmioRead(gpa, len);
        };
        for (to, from) in self.mmio.iter_mut().zip(output.iter().take(len)) {
            *to = *from;
        }
        if let Some(running) = &mut self.running {
            running.advance(len);
        }
        Stop::MmioWrite(gpa, len)
    }

    /// `handle_emulation_failure()` at privilege level 0.
    fn emulation_failure(&mut self) -> Stop {
        if !self.vm.exit_on_emulation_failure.load(Ordering::Acquire) {
            self.pending = Pending::InvalidOpcode;
        }
        Stop::EmulationFailure
    }

    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> Option<Stop> {
        let [gpa, pages, attributes, _] = args;
        if nr != HypercallExit::MAP_GPA_RANGE || self.vm.exit_hypercall.load(Ordering::Acquire) & MAP_GPA_RANGE_BIT == 0
        {
            self.finish(OpResult::Hypercall(GUEST_ENOSYS));
            return None;
        }
        let gfn = Gpa(gpa).gfn().get();
        if !Gpa(gpa).is_aligned() || gfn.wrapping_add(pages) <= gfn {
            self.finish(OpResult::Hypercall(GUEST_EINVAL));
            return None;
        }
        Some(self.hypercall_exit(nr, [gpa, pages, attributes, 0, 0, 0]))
    }

    const fn hypercall_exit(&mut self, nr: u64, args: [u64; 6]) -> Stop {
        self.pending = Pending::Hypercall(nr);
        self.hypercall_ret = 0;
        Stop::Hypercall(nr, args)
    }

    fn instruction_step(&mut self, nr: u64, args: [u64; 4]) -> Result<Option<Stop>, Errno> {
        let Some(running) = &mut self.running else { return Ok(None) };
        let map_gpa_exits = self.vm.exit_hypercall.load(Ordering::Acquire) & MAP_GPA_RANGE_BIT != 0;
        let instruction = running.instruction(self.index, nr, args, map_gpa_exits);
        running.round = running.round.saturating_add(1);
        running.answer = None;
        let step = {
            let arch = self.vm.arch();
            arch.instruction(&View { mmu: &self.vm.mmu(), privacy: arch.mappings_have_privacy() }, &instruction)
        };
        match step {
            Step::Done(value) => self.finish(OpResult::Instruction(value)),
            Step::Exception => self.finish(OpResult::Exception),
            Step::Exit(reason) => {
                self.finish(OpResult::Done);
                return Ok(Some(Stop::Other(reason)));
            }
            Step::Hypercall { nr, args } => return Ok(Some(self.hypercall_exit(nr, args))),
            Step::KillVm => {
                self.vm.kill();
                return Err(Errno::EIO);
            }
            Step::Fault { gfn, kind, private } => {
                self.interrupted()?;
                match self.fault(gfn, kind, private, Missing::Plain)? {
                    Ok(()) => {}
                    Err(Fault::Exit(fault)) => return Ok(Some(Stop::Fault(fault))),
                    Err(Fault::BadAddress) => return Err(Errno::EFAULT),
                    Err(_) => self.finish(OpResult::Exception),
                }
            }
        }
        Ok(None)
    }

    /// `kvm_arch_vcpu_pre_fault_memory()` for one page: kind as the attribute says, a read as far as permissions go.
    fn pre_fault_page(&self, gfn: Gfn) -> Result<(), Errno> {
        if !self.vm.arch().pre_fault_allowed() {
            return Err(Errno::EOPNOTSUPP);
        }
        loop {
            self.interrupted()?;
            self.vm.check_alive()?;
            let private = self.vm.is_private(gfn);
            match self.vm.fault(gfn, AccessKind::Read, private, Missing::Plain, self.ring.as_deref()) {
                Fault::Mapped => return Ok(()),
                Fault::Retry => yield_now(),
                Fault::SlotInvalid => return Err(Errno::EAGAIN),
                Fault::Exit(fault) => return Err(fault.errno),
                Fault::NoSlot => return Err(Errno::ENOENT),
                Fault::ReadOnly | Fault::BadAddress => return Err(Errno::EFAULT),
            }
        }
    }
}

impl Vcpu for SoftVcpu {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.vm.count(Call::PreFaultMemory);
        self.vm.check_alive()?;
        if range.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let gfns = GfnRange::from_bytes(range.gpa, range.size).map_err(|_| Errno::EINVAL)?;
        // Held throughout, as the ioctl does: this is why an INVALID slot is an error here and not a reason to wait.
        let _srcu = self.vm.srcu.enter();
        let full = range.size;
        for gfn in gfns {
            if let Err(errno) = self.pre_fault_page(gfn) {
                return if range.size == full { Err(errno) } else { Ok(()) };
            }
            range.gpa = range.gpa.saturating_add(PAGE_SIZE);
            range.size = range.size.saturating_sub(PAGE_SIZE);
        }
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        self.vm.count(Call::Run);
        Ok(match self.enter()? {
            Stop::Halt => Exit::Halt,
            Stop::Fault(fault) => Exit::MemoryFault(fault),
            Stop::Hypercall(nr, args) => Exit::Hypercall(HypercallExit { nr, args, ret: &mut self.hypercall_ret }),
            Stop::MmioRead(gpa, len) => {
                Exit::Mmio(Mmio::Read { gpa, data: self.mmio.get_mut(..len).unwrap_or_default() })
            }
            Stop::MmioWrite(gpa, len) => {
                Exit::Mmio(Mmio::Write { gpa, data: self.mmio.get(..len).unwrap_or_default() })
            }
            Stop::RingFull => Exit::DirtyRingFull,
            Stop::EmulationFailure => Exit::InternalError { suberror: Some(EMULATION) },
            Stop::FailEntry(reason) => Exit::FailEntry { reason, cpu: 0 },
            Stop::Other(reason) => Exit::Other(Some(reason)),
        })
    }

    fn dirty_ring(&self, bytes: u32) -> Result<Box<dyn DirtyRingMemory>, Errno> {
        match &self.ring {
            Some(ring) if bytes == self.vm.rings.bytes() => Ok(Box::new(ring.memory())),
            _ => Err(Errno::EINVAL),
        }
    }
}
