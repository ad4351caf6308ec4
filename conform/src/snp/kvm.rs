//! The real KVM's side: VM type 4, over the lab's emulated RMP.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use cvm_memory::hypervisor::kvm::KvmVcpu;
use cvm_memory::hypervisor::{Exit, PreFaultMemory, Vcpu as _};
use kvm_bindings::{CpuId, kvm_dtable, kvm_regs, kvm_segment};
use nix::errno::Errno;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::Signal;

use super::code::{self, order, status, what};
use super::own::Own;
use super::vcpu::{Do, Value, Vcpu};
use super::{Entry, Side, emulation};

/// After so long it is looked whether a guest gets on.
const LOOK: Duration = Duration::from_millis(50);
/// So often one access fails the RMP's check between two looks before the guest counts as lost in it.
const FOR_EVER: u64 = 20;
/// For how long one operation may take that gets on.
const PATIENCE: Duration = Duration::from_secs(20);
/// #VC of an access that KVM takes for MMIO.
const MMIO: u64 = 0x400;

#[derive(Debug)]
pub(super) struct KvmSide {
    pub(super) asid: u64,
}

impl Side for KvmSide {
    fn rmp(&self) -> Vec<Entry> {
        emulation::entries().into_iter().filter(|(asid, _)| *asid == self.asid).map(|(_, entry)| entry).collect()
    }
}

/// Who runs a vCPU, and since when.
type Running = Mutex<Option<(Pthread, Instant)>>;

fn lock(running: &Running) -> MutexGuard<'_, Option<(Pthread, Instant)>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Interrupts runs that take long, again and again: a signal that comes too early is followed by another one.
fn interrupt(running: &Weak<Running>) {
    while let Some(running) = running.upgrade() {
        if let Some((thread, since)) = &*lock(&running)
            && since.elapsed() >= LOOK
        {
            // The thread is alive: it takes itself off under the lock that is held here.
            pthread_kill(*thread, SIGNAL).expect("a valid signal");
        }
        drop(running);
        std::thread::sleep(LOOK / 2);
    }
}

const SIGNAL: Signal = Signal::SIGUSR2;

fn catch_signal() {
    extern "C" fn nothing(_: nix::libc::c_int) {}
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    #[allow(unsafe_code, reason = "a signal handler is installed")]
    // SAFETY: a handler that does nothing may run anywhere.
    unsafe { sigaction(SIGNAL, &action) }.expect("a valid signal");
}

/// One vCPU.
#[derive(Debug)]
pub(super) struct KvmVcpuOf {
    vcpu: KvmVcpu,
    own: Own,
    running: Arc<Running>,
    /// What it is at, until it has halted.
    at: Option<Do>,
    last: Option<Do>,
}

impl KvmVcpuOf {
    /// Before the launch is finished.
    pub(super) fn new(vcpu: KvmVcpu, own: Own, cpuid: &CpuId) -> Self {
        catch_signal();
        let fd = vcpu.fd();
        fd.set_cpuid2(cpuid).expect("to set the CPUID that KVM supports");
        let base = own.place.gpa;
        let mut sregs = fd.get_sregs().expect("registers");
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0031, base | 1 << code::C_BIT, 0x620, 0x500);
        let code_segment = kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: 0xb,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code_segment };
        (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (code_segment, data, data, data);
        let table = |offset, limit: u16| kvm_dtable {
            base: base + code::CODE + offset,
            limit: limit - 1,
            ..Default::default()
        };
        sregs.idt = table(code::INTERRUPTS, code::INTERRUPTS_BYTES + 0x10);
        sregs.gdt = table(code::SEGMENTS, code::SEGMENTS_BYTES);
        fd.set_sregs(&sregs).expect("to set registers");
        let regs = kvm_regs {
            rip: base + code::CODE,
            rsp: base + code::STACK_TOP,
            r14: base + code::STACK_TOP,
            rbx: base + code::SHARED + code::ORDERS,
            rflags: 2,
            ..Default::default()
        };
        fd.set_regs(&regs).expect("to set registers");
        let running = Arc::new(Running::default());
        let weak = Arc::downgrade(&running);
        std::thread::Builder::new().name("lost guests".into()).spawn(move || interrupt(&weak)).expect("a thread");
        Self { vcpu, own, running, at: None, last: None }
    }

    /// After the launch: to where it waits for orders.
    pub(super) fn begin(&mut self) {
        assert!(matches!(self.enter(), Ok(Exit::Halt)), "a guest begins by waiting");
    }

    fn order(&self, field: u64, value: u64) {
        self.own.put(code::ORDERS + field, value);
    }

    fn enter(&mut self) -> Result<Exit<'_>, Errno> {
        let start = Instant::now();
        let mut denied = None;
        loop {
            *lock(&self.running) = Some((pthread_self(), Instant::now()));
            let result = self.vcpu.enter();
            *lock(&self.running) = None;
            match result {
                Ok(()) => return Ok(self.vcpu.last_exit()),
                Err(Errno::EINTR) => {
                    assert!(start.elapsed() < PATIENCE, "a guest hangs at {:x?}", self.at);
                    let now = emulation::denied();
                    if denied.replace(now).is_some_and(|before| now - before > FOR_EVER) {
                        return Err(Errno::ELOOP);
                    }
                }
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Interrupts what it is at.
    fn give_up(&mut self) {
        for _ in 0..8 {
            let mut events = self.vcpu.fd().get_vcpu_events().expect("events");
            events.flags = 0;
            events.interrupt.injected = 1;
            events.interrupt.nr = code::GIVE_UP;
            self.vcpu.fd().set_vcpu_events(&events).expect("to set events");
            // Whatever else it has to say is about what is given up.
            if let Ok(Exit::Halt) = self.enter() {
                self.at = None;
                return;
            }
        }
        panic!("a guest does not give up {:x?}", self.at);
    }
}

impl Vcpu for KvmVcpuOf {
    fn own(&self) -> &Own {
        &self.own
    }

    fn start(&mut self, todo: &Do) {
        if self.at.is_some() {
            self.give_up();
        }
        let alias = |gpa: u64, private: bool| if private { gpa } else { gpa + code::SHARED };
        let (what, address, count, value) = match *todo {
            Do::Read { gpa, len, private } => {
                let what = if matches!(len, 1 | 2 | 4 | 8) { what::LOAD } else { what::COPY };
                (what, alias(gpa, private), len, 0)
            }
            Do::Write { gpa, ref data, private } => {
                let mut word = [0; 8];
                word[..data.len()].copy_from_slice(data);
                (what::STORE, alias(gpa, private), data.len() as u64, u64::from_le_bytes(word))
            }
            Do::Fetch { gpa } => (what::CALL, gpa, 0, 0),
            Do::Pvalidate { gpa, large, validate } => (what::PVALIDATE, gpa, large.into(), validate.into()),
            Do::Vmgexit { value } => (what::VMGEXIT, value, 0, 0),
        };
        self.order(order::WHAT, what);
        self.order(order::ADDRESS, address);
        self.order(order::COUNT, count);
        self.order(order::VALUE, value);
        self.order(order::STATUS, 0);
        self.at = Some(todo.clone());
        self.last = Some(todo.clone());
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        // Said twice because of what the borrow checker makes of returned borrows.
        let halted = matches!(self.enter()?, Exit::Halt);
        if halted {
            self.at = None;
        }
        Ok(self.vcpu.last_exit())
    }

    fn result(&mut self) -> Value {
        let word = |field| self.own.get(code::ORDERS + field);
        let result = word(order::RESULT);
        match (word(order::STATUS), self.last.as_ref()) {
            (status::DONE, Some(Do::Read { len, .. })) if matches!(len, 1 | 2 | 4 | 8) => {
                Value::Data(result.to_le_bytes()[..usize::try_from(*len).expect("small")].to_vec())
            }
            (status::DONE, Some(Do::Read { len, .. })) => {
                Value::Data(self.own.read(code::DATA, usize::try_from(*len).expect("small")))
            }
            (status::DONE, Some(Do::Pvalidate { .. } | Do::Vmgexit { .. })) => Value::Word(result),
            (status::DONE, _) => Value::Done,
            // As a private access that meets the same, which the host hears as little of.
            (status::NOT_AUTOMATIC, Some(Do::Read { private: false, .. } | Do::Write { private: false, .. }))
                if result == MMIO =>
            {
                Value::Mmio
            }
            (status::NOT_AUTOMATIC, _) => Value::Exception,
            (other, _) => Value::Astray(other, result),
        }
    }

    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.vcpu.pre_fault_memory(range)
    }
}
