//! The model's side: a VM of the software KVM with the RMP's hooks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cvm_memory::hypervisor::{Exit, PreFaultMemory, Vcpu as _};
use cvm_memory::soft::{GuestOp, OpResult, SoftVcpu};
use cvm_memory_sev::rmp::Size;
use cvm_memory_sev::soft::{Machine, SoftSnp, pvalidate, vmgexit};
use nix::errno::Errno;

use super::own::Own;
use super::vcpu::{Do, Value, Vcpu};
use super::{Entry, Side};

/// So often one access fails the RMP's check before the guest counts as lost in it. Nothing else happens at the same time.
const FOR_EVER: u64 = 20;

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
    machine: Arc<Machine>,
    own: Own,
}

impl SoftVcpuOf {
    pub(super) fn new(snp: &SoftSnp, vcpu: SoftVcpu, own: Own) -> Self {
        Self { vcpu, machine: Arc::clone(snp.machine()), own }
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
        // Lost guests are interrupted by another thread, which looks whether they get on.
        let (leave, machine) = (self.vcpu.immediate_exit(), &self.machine);
        let (before, returned, lost) = (machine.counters().denied, AtomicBool::new(false), AtomicBool::new(false));
        let vcpu = &mut self.vcpu;
        let result = std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                while !returned.load(Ordering::Acquire) {
                    if machine.counters().denied.wrapping_sub(before) > FOR_EVER {
                        lost.store(true, Ordering::Release);
                        leave.set(true);
                        break;
                    }
                    std::thread::park_timeout(Duration::from_millis(1));
                }
            });
            let result = vcpu.run();
            returned.store(true, Ordering::Release);
            watch.thread().unpark();
            result
        });
        leave.set(false);
        match result {
            Err(Errno::EINTR) if lost.load(Ordering::Acquire) => Err(Errno::ELOOP),
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
