//! SNP machines: a VM of the model of SNP, and one of KVM's own SNP code over the lab's emulated RMP.
//!
//! To what any VM can be told comes what an SNP guest does: it reads and writes private or shared, accepts pages (PVALIDATE) and
//! asks for page state changes, by register and by page. After every operation the guest's entries of the RMP are compared
//! too ([`Machine::state`]): of the real KVM's side, as the lab says what they are.
//!
//! What both begin with is the same: two calls of the launch, guests that wait for orders in memory of their own (`code`),
//! hypercalls that exit. Neither is SNP on hardware.
//!
//! What the emulation does otherwise than the processor is not played (`guard`): PVALIDATE of 2 MiB at an address that is not
//! a multiple of that. A guest meets MMIO by #VC, and is not played further: what it asks for then is its own affair.

mod code;
mod emulation;
mod kvm;
mod own;
mod rules;
mod soft;
mod vcpu;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Cap, Hypervisor, PreFaultMemory};
use cvm_memory::soft::SoftVm;
use cvm_memory_sev::commands::{Init, LaunchFinish, LaunchStart, SnpCommands};
use cvm_memory_sev::digest::VMSA_GPA;
use cvm_memory_sev::ghcb::msr;
use cvm_memory_sev::ghcb::page::{
    EXIT_CODE, EXIT_INFO_1, EXIT_INFO_2, EXIT_PSC, SCRATCH, SHARED_BUFFER, VALID_BITMAP, VERSION, valid_bit,
};
use cvm_memory_sev::ghcb::psc::Header;
use cvm_memory_sev::kvm::KvmSnp;
use cvm_memory_sev::launch::Policy;
use cvm_memory_sev::soft::SoftSnp;
use cvm_memory_testkit::skip;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

use crate::guard;
use crate::live::Live;
use crate::machine::{Machine, Shape};
use crate::observation::{End, Observation};
use crate::scenario::{Kind, Operation};
use own::Own;
pub use rules::Ruled;
use vcpu::{Do, Vcpu, perform};

const PAGE: u64 = 4096;
/// `KVM_HC_MAP_GPA_RANGE` as a bit of `KVM_CAP_EXIT_HYPERCALL`.
const MAP_GPA_RANGE: u64 = 1 << 12;
/// What most hosts need.
const POLICY: u64 = Policy::SMT | Policy::MUST_BE_ONE;
/// Guests that can be told from each other while they are there.
const MARKERS: u64 = 16;

const _: () = assert!(guard::SNP_GUEST_BITS == code::C_BIT);

/// An entry of the RMP that is the guest's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    gpa: u64,
    state: String,
    vmsa: bool,
}

/// What only one of the two has.
trait Side: std::fmt::Debug {
    /// Entries of this guest.
    fn rmp(&self) -> Vec<Entry>;
}

/// An SNP VM, launched, with guests.
#[derive(Debug)]
pub struct Snp {
    // In the order in which they have to go.
    vcpus: Vec<Box<dyn Vcpu>>,
    live: Live,
    side: Box<dyn Side>,
    _commands: Arc<dyn SnpCommands>,
}

/// The launch, but for the vCPUs: what comes between creating them and `LAUNCH_FINISH`.
fn start(vm: &dyn Hypervisor, commands: &dyn SnpCommands, vcpus: u8, marker: u64) -> Vec<Own> {
    let start = LaunchStart { policy: POLICY, ..LaunchStart::default() };
    commands.launch_start(&start).expect("to start the launch");
    // Of vCPUs other than the first the marker says nothing.
    (0..vcpus).map(|vcpu| Own::new(vm, commands, vcpu, marker)).collect()
}

impl Snp {
    /// On the model.
    ///
    /// # Panics
    /// If it cannot be launched.
    pub fn soft(shape: Shape) -> Self {
        let snp = SoftSnp::new();
        let vm = snp.vm().clone();
        vm.limit_physical_bits(shape.physical_bits);
        snp.init(&Init::default()).expect("an SNP VM");
        let vcpus: Vec<_> = (0..shape.vcpus).map(|_| vm.create_vcpu()).collect();
        let own = start(&vm, &snp, shape.vcpus, 0);
        snp.launch_finish(&LaunchFinish::default()).expect("to finish the launch");
        let watch = soft::Watch::new(snp.machine());
        let guest = |(vcpu, own)| Box::new(soft::SoftVcpuOf::new(vcpu, Arc::clone(&watch), own)) as Box<dyn Vcpu>;
        let vcpus = vcpus.into_iter().zip(own).map(guest).collect();
        let live = Live::around("soft", shape, Arc::new(vm), Vec::new(), &SoftVm::tagged(), false);
        let snp = Arc::new(snp);
        Self { vcpus, live, side: Box::new(soft::SoftSide { snp: Arc::clone(&snp) }), _commands: snp }.ready()
    }

    /// On the real KVM; see [`Offer`].
    ///
    /// # Panics
    /// If KVM has no such VMs, or something fails that does not in the lab.
    pub fn kvm(offer: &Offer, vcpus: u8) -> Self {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        static MARKER: AtomicU64 = AtomicU64::new(0);
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let marker = MARKER.fetch_add(1, Ordering::Relaxed) % MARKERS;
        let create = || KvmVm::create(&offer.kvm, cvm_memory_sev::SNP).expect("an SNP VM");
        let vm = create();
        let commands = Arc::new(KvmSnp::open(vm.clone()).expect("the firmware's device"));
        commands.init(&Init::default()).expect("an SNP VM");
        let fds: Vec<_> = (0..vcpus).map(|vcpu| vm.create_vcpu(vcpu.into()).expect("a vCPU")).collect();
        let own = start(&vm, &*commands, vcpus, marker);
        let mark = own.first().expect("a guest").marker(marker);
        let with_registers = |(vcpu, own)| kvm::KvmVcpuOf::new(vcpu, own, &offer.cpuid);
        let mut vcpus: Vec<_> = fds.into_iter().zip(own).map(with_registers).collect();
        commands.launch_finish(&LaunchFinish::default()).expect("to finish the launch");
        vcpus.iter_mut().for_each(kvm::KvmVcpuOf::begin);
        let found: Vec<u64> =
            emulation::entries().into_iter().filter(|(_, entry)| entry.gpa == mark).map(|(asid, _)| asid).collect();
        assert_eq!(found.len(), 1, "the guest is known by its mark");
        let shape = Shape { vcpus: u8::try_from(vcpus.len()).expect("few"), ..offer.shape };
        let vcpus = vcpus.into_iter().map(|vcpu| Box::new(vcpu) as Box<dyn Vcpu>).collect();
        let live = Live::around("kvm", shape, Arc::new(vm), Vec::new(), &create(), true);
        Self { vcpus, live, side: Box::new(kvm::KvmSide { asid: found[0] }), _commands: commands }.ready()
    }

    /// Hypercalls exit, and every guest has registered its GHCB page.
    fn ready(mut self) -> Self {
        self.live.vm().enable_cap(Cap::EXIT_HYPERCALL, [MAP_GPA_RANGE, 0, 0, 0]).expect("hypercalls that exit");
        for vcpu in &mut self.vcpus {
            let gfn = (vcpu.own().place.gpa + code::GHCB) / PAGE;
            let register = Do::Vmgexit { value: msr::register_request(gfn) };
            let end = perform(&mut **vcpu, &register, 0, &mut Vec::new());
            assert_eq!(end, End::Answer(msr::registered(gfn)), "a GHCB page");
        }
        self
    }

    fn guest(&mut self, vcpu: u8, what: &Do, answer: u64) -> Observation {
        let mut seen = Vec::new();
        let end = perform(&mut *self.vcpus[usize::from(vcpu)], what, answer, &mut seen);
        Observation::Guest { seen, end }
    }

    /// All of a page, if it is memory.
    fn dump(&mut self, vcpu: u8, gpa: u64, private: bool) -> End {
        let vcpu = &mut *self.vcpus[usize::from(vcpu)];
        match perform(vcpu, &Do::Read { gpa, len: 8, private }, 0, &mut Vec::new()) {
            End::Data(_) => perform(vcpu, &Do::Read { gpa, len: PAGE, private }, 0, &mut Vec::new()),
            end => end,
        }
    }

    /// Puts a return instruction there, if there is none, and calls it.
    fn fetch(&mut self, vcpu: u8, gpa: u64) -> Observation {
        const RETURN: u8 = 0xc3;
        let vcpu = &mut *self.vcpus[usize::from(vcpu)];
        let mut seen = Vec::new();
        let mut end = perform(vcpu, &Do::Write { gpa, data: vec![RETURN], private: true }, 0, &mut seen);
        if end == End::Done {
            end = perform(vcpu, &Do::Fetch { gpa }, 0, &mut seen);
        }
        Observation::Guest { seen, end }
    }

    /// Page state changes by the GHCB page; what it then has in it.
    fn psc_page(&mut self, vcpu: u8, header: Header, entries: &[u64], answer: u64) -> Observation {
        let vcpu = &mut *self.vcpus[usize::from(vcpu)];
        let own = vcpu.own();
        let ghcb = own.place.gpa + code::GHCB;
        let put = |offset, value: u64| own.put(code::GHCB + offset, value);
        own.write(code::GHCB, &[0; 4096]);
        own.write(code::GHCB + VERSION, &2_u16.to_le_bytes());
        for (offset, value) in
            [(EXIT_CODE, EXIT_PSC), (EXIT_INFO_1, 0), (EXIT_INFO_2, 0), (SCRATCH, ghcb + SHARED_BUFFER)]
        {
            let (byte, mask) = valid_bit(offset);
            let at = code::GHCB + VALID_BITMAP + byte;
            own.write(at, &[own.read(at, 1)[0] | mask]);
            put(offset, value);
        }
        put(SHARED_BUFFER, header.raw());
        let at = |nr: usize| SHARED_BUFFER + 8 + nr as u64 * 8;
        entries.iter().enumerate().for_each(|(nr, entry)| put(at(nr), *entry));
        let mut seen = Vec::new();
        let end = perform(vcpu, &Do::Vmgexit { value: ghcb }, answer, &mut seen);
        let End::Answer(register) = end else { return Observation::Guest { seen, end } };
        let get = |offset| vcpu.own().get(code::GHCB + offset);
        let mut words = vec![register, get(EXIT_INFO_1), get(EXIT_INFO_2), get(SHARED_BUFFER)];
        words.extend((0..entries.len()).map(|nr| get(at(nr))));
        Observation::Guest { seen, end: End::Words(words) }
    }

    /// The guest's entries of the RMP, but for those of its own memory.
    fn entries(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = self.side.rmp().into_iter().filter(|entry| !self.is_own(entry.gpa)).collect();
        entries.sort();
        entries
    }

    fn is_own(&self, gpa: u64) -> bool {
        let mut places = self.vcpus.iter().map(|vcpu| vcpu.own().place);
        gpa == VMSA_GPA.get() || places.any(|place| (place.gpa..place.gpa + place.size).contains(&gpa))
    }
}

impl Machine for Snp {
    fn name(&self) -> &'static str {
        self.live.name()
    }

    fn play(&mut self, operation: &Operation) -> Observation {
        if let Some(reason) = guard::refuse(self.live.shape(), operation) {
            return Observation::Skipped(reason);
        }
        match *operation {
            Operation::Prefault { vcpu, gpa, size, flags } => {
                let mut range = PreFaultMemory { gpa, size, flags };
                let answer = self.vcpus[usize::from(vcpu)].pre_fault_memory(&mut range);
                Observation::Prefault { answer, gpa: range.gpa, size: range.size }
            }
            Operation::Load { vcpu, gpa, len, private } => {
                self.guest(vcpu, &Do::Read { gpa, len: len.into(), private }, 0)
            }
            Operation::Store { vcpu, gpa, len, value, private } => {
                let data = value.to_le_bytes()[..usize::from(len)].to_vec();
                self.guest(vcpu, &Do::Write { gpa, data, private }, 0)
            }
            Operation::Fetch { vcpu, gpa, .. } => self.fetch(vcpu, gpa),
            Operation::Dump { vcpu, gpa, pages, private } => {
                Observation::Pages((0..pages).map(|page| self.dump(vcpu, gpa + page * PAGE, private)).collect())
            }
            Operation::Pvalidate { vcpu, gpa, large, validate } => {
                self.guest(vcpu, &Do::Pvalidate { gpa, large, validate }, 0)
            }
            Operation::Psc { vcpu, gpa, to, answer } => {
                let value = u64::from(to & 0xf) << 52 | gpa & ((1 << 52) - PAGE) | 0x014;
                self.guest(vcpu, &Do::Vmgexit { value }, answer)
            }
            Operation::Vmgexit { vcpu, value } => self.guest(vcpu, &Do::Vmgexit { value }, 0),
            Operation::PscPage { vcpu, first, last, ref entries, answer } => {
                self.psc_page(vcpu, Header { cur_entry: first, end_entry: last }, &entries.0, answer)
            }
            _ => self.live.play(operation),
        }
    }

    fn state(&mut self) -> Option<String> {
        let entries = self.entries();
        let follows = |a: &Entry, b: &Entry| a.gpa + PAGE == b.gpa && a.state == b.state && a.vmsa == b.vmsa;
        let run = |run: &[Entry]| {
            let Entry { gpa, state, vmsa } = &run[0];
            format!("{gpa:#x}+{} {state}{}", run.len(), if *vmsa { " vmsa" } else { "" })
        };
        let runs: Vec<String> = entries.chunk_by(follows).map(run).collect();
        Some(if runs.is_empty() { "no entries".into() } else { runs.join(", ") })
    }
}

/// A real KVM with SNP, over the lab's emulated RMP.
#[derive(Debug)]
pub struct Offer {
    kvm: Kvm,
    cpuid: CpuId,
    /// What VM, with one vCPU.
    pub shape: Shape,
}

impl Offer {
    /// If there is none, that is said on a line of its own, and is a failure where a KVM was promised.
    ///
    /// # Panics
    /// As [`skip::skip`].
    pub fn here() -> Option<Self> {
        skip::kvm(cvm_memory_sev::SNP)?;
        if !emulation::is_there() {
            return skip::skip("this needs the emulated SNP host of the lab, which says what is in its RMP");
        }
        let kvm = skip::dev_kvm()?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("the CPUID that KVM supports");
        let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
        let physical_bits = leaf.map_or(36, |entry| entry.eax & 0xff);
        Some(Self { kvm, cpuid, shape: Shape { kind: Kind::Snp, vcpus: 1, physical_bits } })
    }
}
