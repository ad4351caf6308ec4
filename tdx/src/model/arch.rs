//! KVM's side of a TD's memory, as hooks of the software KVM: which commands it issues when, and what becomes of the VM when
//! the guest touches what it must not.
//!
//! Mirrors `tdx_sept_set_private_spte()`, `tdx_sept_remove_private_spte()`, `tdx_gmem_post_populate()`,
//! `tdx_handle_ept_violation()` and `handle_tdvmcall()` (`arch/x86/kvm/vmx/tdx.c`).

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cvm_memory::addr::{FileRange, Gfn, GfnRange, Gpa, PAGE_SHIFT};
use cvm_memory::hypervisor::{HypercallExit, Platform};
use cvm_memory::soft::{Access, AccessKind, Arch, Denied, GmemPage, GuestView, Instruction, Step};
use nix::errno::Errno;

use super::sept::{Found, Refusal, Sept, SeptState};
use crate::import::PAGE_BYTES;
use crate::mapgpa::{Answer, MapGpa, Next, Status};
use crate::mechanism::PLATFORM;
use crate::mrtd::{Measurement, Mrtd, Page};
use crate::width::Width;

/// Bytes that the guest accepts at a time, by the level in bits 2:0 of its argument.
const LEVELS: [u64; 3] = [1 << 12, 1 << 21, 1 << 30];

/// The guest's operations that are TDX's own: numbers of [`GuestOp::Instruction`](cvm_memory::soft::GuestOp::Instruction).
pub mod op {
    /// `TDG.MEM.PAGE.ACCEPT`: the address with the level in bits 2:0. Its result is one of [`accept`](super::accept).
    pub const ACCEPT: u64 = 6;
    /// `TDG.VP.VMCALL<MapGPA>`: the address, with or without the shared bit, and the size in bytes. Its result is r10, a
    /// [`Status::code`](crate::mapgpa::Status::code); r11 is told by [`TdArch::r11`](super::TdArch::r11).
    pub const MAP_GPA: u64 = crate::uapi::MAP_GPA;
}

/// What accepting a page comes to.
pub mod accept {
    /// It is accepted, and zeroes.
    pub const SUCCESS: u64 = 0;
    /// It had been accepted, or was there from the start; nothing has changed.
    pub const ALREADY_ACCEPTED: u64 = 0x0000_0b0a_0000_0000;
    /// It is mapped at another level than the guest says: try a lower one.
    pub const SIZE_MISMATCH: u64 = 0xc000_0b0b_0000_0000;
    /// No such level, or the address is not one of it.
    pub const OPERAND_INVALID: u64 = 0xc000_0100_0000_0000;
}

/// Why KVM has given the VM up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// The guest touched a page that it has not accepted, or has not accepted again.
    PendingTouch {
        /// The frame.
        gfn: Gfn,
    },
    /// The guest fetched an instruction from shared memory.
    SharedFetch {
        /// The frame.
        gfn: Gfn,
    },
}

/// How far the TD's life has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Created,
    Initialised { width: Width, ve_disable: bool },
}

/// What a vCPU has beyond its generic part.
#[derive(Debug, Default)]
struct Cpu {
    request: Option<MapGpa>,
    interrupted: bool,
    r11: u64,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    sept: Sept,
    mrtd: Mrtd,
    cpus: BTreeMap<u32, Cpu>,
    death: Option<Death>,
    /// Commands that the module refused although KVM had reason to believe it would not: bugs of this model.
    bugs: Vec<Refusal>,
}

/// The hooks of one TD.
#[derive(Debug)]
pub struct TdArch {
    state: Mutex<State>,
}

impl Default for TdArch {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                phase: Phase::Created,
                sept: Sept::default(),
                mrtd: Mrtd::new(),
                cpus: BTreeMap::new(),
                death: None,
                bugs: Vec::new(),
            }),
        }
    }
}

impl TdArch {
    /// Why the VM is dead, if it is for one of the reasons that are TDX's own.
    pub fn death(&self) -> Option<Death> {
        self.lock().death
    }

    /// The address width; `None` before `KVM_TDX_INIT_VM`.
    pub fn width(&self) -> Option<Width> {
        self.lock().width()
    }

    /// Looks into the secure EPT, or records its commands.
    pub fn with_sept<R>(&self, look: impl FnOnce(&mut Sept) -> R) -> R {
        look(&mut self.lock().sept)
    }

    /// Commands that the module refused and KVM had not expected to be: none, unless this model is wrong.
    pub fn bugs(&self) -> Vec<Refusal> {
        self.lock().bugs.clone()
    }

    /// The measurement as the module has it; not final before `KVM_TDX_FINALIZE_VM`.
    pub fn mrtd(&self) -> Measurement {
        self.lock().mrtd.finish()
    }

    /// What the last TDVMCALL of a vCPU left in r11.
    pub fn r11(&self, vcpu: u32) -> u64 {
        self.lock().cpu(vcpu).r11
    }

    /// Whether a vCPU has an interrupt to take, which ends a MapGPA early.
    pub fn set_interrupted(&self, vcpu: u32, interrupted: bool) {
        self.lock().cpu(vcpu).interrupted = interrupted;
    }

    pub(super) fn init(&self, width: Width, ve_disable: bool) -> Result<(), Errno> {
        let mut state = self.lock();
        if state.phase != Phase::Created {
            return Err(Errno::EINVAL);
        }
        state.phase = Phase::Initialised { width, ve_disable };
        Ok(())
    }

    pub(super) fn finalize(&self) -> Result<(), Errno> {
        let mut state = self.lock();
        if state.phase == Phase::Created {
            return Err(Errno::EINVAL);
        }
        state.sept.finalize().map_err(|_| Errno::EINVAL)
    }

    /// `TDH.MEM.PAGE.ADD`, and `TDH.MR.EXTEND` where measured.
    pub(super) fn add(&self, gfn: Gfn, page: GmemPage, contents: &[u8], measure: bool) -> Result<(), Errno> {
        let contents: &Page = contents.first_chunk().ok_or(Errno::EINVAL)?;
        let mut state = self.lock();
        state.sept.add(gfn, page).map_err(|_| Errno::EIO)?;
        state.mrtd.add_page(gfn);
        if measure {
            state.mrtd.extend_page(gfn, contents);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `TDG.MEM.PAGE.ACCEPT`.
    fn accept(&self, view: &dyn GuestView, argument: u64) -> Step {
        let level = usize::try_from(argument & 7).ok().and_then(|level| LEVELS.get(level));
        let gpa = Gpa(argument & !7);
        let mut state = self.lock();
        let Some(width) = state.width() else { return Step::Exception };
        let Some(size) = level.filter(|size| gpa.get().is_multiple_of(**size) && gpa.gfn() < width.end()) else {
            return Step::Done(accept::OPERAND_INVALID);
        };
        let gfn = gpa.gfn();
        if view.gmem_page(gfn, true).is_none() {
            return Step::Fault { gfn, kind: AccessKind::Write, private: true };
        }
        // Everything is mapped by 4 KiB pages.
        if *size != 1 << PAGE_SHIFT {
            return Step::Done(accept::SIZE_MISMATCH);
        }
        match state.sept.accept(gfn) {
            Ok(()) => match view.write(gpa, true, &[0; PAGE_BYTES]) {
                Some(()) => Step::Done(accept::SUCCESS),
                None => Step::KillVm,
            },
            Err(Refusal::State { state: Some(SeptState::Present), .. }) => Step::Done(accept::ALREADY_ACCEPTED),
            Err(refusal) => {
                state.bugs.push(refusal);
                Step::KillVm
            }
        }
    }

    /// `TDG.VP.VMCALL<MapGPA>`: the first step starts it, every other brings an answer of userspace.
    fn map_gpa(&self, instruction: &Instruction) -> Step {
        let mut state = self.lock();
        let Some(width) = state.width() else { return Step::Exception };
        let cpu = state.cpu(instruction.vcpu);
        let [address, size, ..] = instruction.args;
        let next = match (instruction.answer, &mut cpu.request) {
            (Some(ret), Some(request)) => request.answered(ret, cpu.interrupted),
            _ => match MapGpa::start(width, address, size, instruction.map_gpa_exits) {
                Ok((request, next)) => {
                    cpu.request = Some(request);
                    next
                }
                Err(answer) => Next::Answer(answer),
            },
        };
        match next {
            Next::Ask(args) => Step::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args },
            Next::Answer(Answer { status, gpa }) => {
                cpu.request = None;
                if status != Status::Success {
                    cpu.r11 = gpa;
                }
                Step::Done(status.code())
            }
        }
    }
}

impl State {
    const fn width(&self) -> Option<Width> {
        match self.phase {
            Phase::Created => None,
            Phase::Initialised { width, .. } => Some(width),
        }
    }

    fn cpu(&mut self, vcpu: u32) -> &mut Cpu {
        self.cpus.entry(vcpu).or_default()
    }

    /// Takes note of a refusal that KVM would have crashed the VM for.
    fn expect(&mut self, result: Result<(), Refusal>) {
        if let Err(refusal) = result {
            self.bugs.push(refusal);
        }
    }

    fn give_up(&mut self, death: Death) -> Denied {
        self.death.get_or_insert(death);
        Denied::KillVm
    }
}

impl Arch for TdArch {
    fn platform(&self) -> Platform {
        PLATFORM
    }

    fn has_protected_state(&self) -> bool {
        true
    }

    fn separate_private_root(&self) -> bool {
        true
    }

    fn sticky_mmio(&self) -> bool {
        true
    }

    fn maps_populated(&self) -> bool {
        true
    }

    /// No slot reaches the shared bit; before `KVM_TDX_INIT_VM` there is none yet.
    fn prepare_slot(&self, gfns: GfnRange) -> Result<(), Errno> {
        let Some(width) = self.width() else { return Ok(()) };
        let last = gfns.end().get().saturating_sub(1);
        if last & (width.shared_bit() >> PAGE_SHIFT) == 0 { Ok(()) } else { Err(Errno::EINVAL) }
    }

    fn pre_fault_allowed(&self) -> bool {
        self.lock().sept.is_finalized()
    }

    fn may_run(&self) -> Result<(), Errno> {
        if self.lock().sept.is_finalized() { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// A fault of somebody else may have been faster; then there is nothing to do.
    fn mapped_private(&self, gfn: Gfn, page: GmemPage) {
        let mut state = self.lock();
        if state.sept.owner(page) != Some(gfn) {
            let result = state.sept.aug(gfn, page);
            state.expect(result);
        }
    }

    /// The lock under which this is called keeps every vCPU out of the guest, as the kick does that follows a track. What is
    /// left in the page is of no use to anybody: the guest gets to it only by accepting it, which zeroes it.
    fn zapped_private(&self, gfn: Gfn, _page: GmemPage) -> bool {
        let mut state = self.lock();
        let result = state.sept.block(gfn);
        state.expect(result);
        state.sept.track();
        let result = state.sept.remove(gfn);
        state.expect(result);
        true
    }

    /// A page that leaves its file while the TD still has it would be a hole in the TD's isolation.
    fn reclaim(&self, file: u64, pages: FileRange) {
        let mut state = self.lock();
        for page in pages {
            if let Some(owner) = state.sept.owner(GmemPage { file, page }) {
                state.bugs.push(Refusal::Owned { gfn: owner, owner });
            }
        }
    }

    fn check_access(&self, access: &Access) -> Result<(), Denied> {
        let gfn = access.gfn;
        let mut state = self.lock();
        if !access.private {
            return match access.kind {
                AccessKind::Fetch => Err(state.give_up(Death::SharedFetch { gfn })),
                AccessKind::Read | AccessKind::Write => Ok(()),
            };
        }
        match (state.sept.find(gfn), state.phase) {
            (Found::Page(page), _) if access.page == Some(page) => Ok(()),
            (Found::Pending, Phase::Initialised { ve_disable: false, .. }) => Err(Denied::Exception),
            (Found::Pending, _) => Err(state.give_up(Death::PendingTouch { gfn })),
            // What KVM has mapped, the module has too.
            (Found::Page(_) | Found::Nothing, _) => {
                let found = state.sept.state(gfn);
                state.bugs.push(Refusal::State { gfn, state: found });
                Err(Denied::KillVm)
            }
        }
    }

    fn instruction(&self, view: &dyn GuestView, instruction: &Instruction) -> Step {
        let [argument, ..] = instruction.args;
        match instruction.nr {
            op::ACCEPT => self.accept(view, argument),
            op::MAP_GPA => self.map_gpa(instruction),
            _ => Step::Exception,
        }
    }
}
