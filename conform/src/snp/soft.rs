//! The model's side: a VM of the software KVM with the RMP's hooks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cvm_memory::hypervisor::{Exit, PreFaultMemory, Vcpu as _};
use cvm_memory::soft::{GuestOp, ImmediateExit, OpResult, SoftVcpu};
use cvm_memory_sev::rmp::Size;
use cvm_memory_sev::soft::{Machine, SoftSnp, pvalidate, vmgexit};
use nix::errno::Errno;

use super::own::Own;
use super::vcpu::{Do, Value, Vcpu};
use super::{Entry, Side};

/// So often one access fails the RMP's check before the guest counts as lost in it: nothing else happens at the same time.
const FOR_EVER: u64 = 20;

/// Gets guests out that are lost.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Accesses that were denied since the vCPU was entered that is running.
    denied: AtomicU64,
    running: Mutex<Option<ImmediateExit>>,
}

impl Watch {
    /// For the guests of a machine that has no others.
    pub(super) fn new(machine: &Machine) -> Arc<Self> {
        let watch = Arc::new(Self::default());
        let watching = Arc::clone(&watch);
        machine.when_denied(move || {
            let times = watching.denied.fetch_add(1, Ordering::Relaxed) + 1;
            if times > FOR_EVER
                && let Some(leave) = &*watching.running()
            {
                leave.set(true);
            }
        });
        watch
    }

    fn running(&self) -> MutexGuard<'_, Option<ImmediateExit>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(super) struct SoftSide {
    pub(super) snp: Arc<SoftSnp>,
}

impl Side for SoftSide {
    fn rmp(&self) -> Vec<Entry> {
        let Some(asid) = self.snp.asid() else { return Vec::new() };
        self.snp.machine().rmp(|rmp| {
            let own = rmp.iter().filter(|(_, entry)| entry.asid == asid);
            let entry = |entry: &cvm_memory_sev::rmp::Entry| Entry {
                gpa: entry.gfn.start_byte(),
                state: entry.state().to_string(),
                vmsa: entry.vmsa,
            };
            own.map(|(_, found)| entry(found)).collect()
        })
    }
}

/// One of its vCPUs.
#[derive(Debug)]
pub(super) struct SoftVcpuOf {
    vcpu: SoftVcpu,
    watch: Arc<Watch>,
    own: Own,
}

impl SoftVcpuOf {
    pub(super) const fn new(vcpu: SoftVcpu, watch: Arc<Watch>, own: Own) -> Self {
        Self { vcpu, watch, own }
    }
}

impl Vcpu for SoftVcpuOf {
    fn own(&self) -> &Own {
        &self.own
    }

    fn start(&mut self, what: &Do) {
        self.vcpu.start(match *what {
            Do::Read { gpa, len, private } => GuestOp::Read { gpa, len, private },
            Do::Write { gpa, ref data, private } => GuestOp::Write { gpa, data: data.clone(), private },
            Do::Fetch { gpa } => GuestOp::Fetch { gpa, private: true },
            Do::Pvalidate { gpa, large, validate } => {
                pvalidate(gpa, if large { Size::Large } else { Size::Small }, validate)
            }
            Do::Vmgexit { value } => vmgexit(value),
        });
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        let leave = self.vcpu.immediate_exit();
        self.watch.denied.store(0, Ordering::Relaxed);
        *self.watch.running() = Some(leave.clone());
        let result = self.vcpu.run();
        *self.watch.running() = None;
        let lost = leave.is_set();
        leave.set(false);
        match result {
            Err(Errno::EINTR) if lost => Err(Errno::ELOOP),
            result => result,
        }
    }

    fn result(&mut self) -> Value {
        match self.vcpu.take_result() {
            Some(OpResult::Read(data)) => Value::Data(data),
            Some(OpResult::Done) => Value::Done,
            Some(OpResult::Instruction(word)) => Value::Word(word),
            Some(OpResult::Exception) => Value::Exception,
            other => panic!("{other:?}"),
        }
    }

    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.vcpu.pre_fault_memory(range)
    }
}
