//! VMGEXIT: the guest's requests by register and by page, as KVM answers them.
//!
//! Mirrors `sev_handle_vmgexit()`, `sev_handle_vmgexit_msr_protocol()`, `setup_vmgexit_scratch()`, `snp_begin_psc()` and
//! `sev_snp_ap_creation()`. Of the page's requests only page state changes and the creation of vCPUs are here.

use cvm_memory::addr::{Gfn, Gpa};
use cvm_memory::hypervisor::HypercallExit;
use cvm_memory::soft::{AccessKind, GuestView, Instruction, Step};

use crate::ghcb::page::{
    ERROR, EXIT_AP_CREATION, EXIT_CODE, EXIT_INFO_1, EXIT_INFO_2, EXIT_PSC, InputError, SCRATCH, USAGE, VALID_BITMAP,
    scratch_bytes, valid_bit,
};
use crate::ghcb::psc::{Buffer, Completion, Cursor, Next, max_entries};
use crate::ghcb::{MapGpaRange, msr};

use super::state::{PscState, SaveArea, SnpArch};

/// `KVM_EXIT_SYSTEM_EVENT`.
const SYSTEM_EVENT: u32 = 24;
/// Where the C-bit is.
const C_BIT: u8 = 51;
/// Offset of RAX in the GHCB page.
const RAX: u64 = 0x1f8;
/// Requests of the creation of a vCPU.
const AP_CREATE_ON_INIT: u64 = 0;
const AP_CREATE: u64 = 1;
const AP_DESTROY: u64 = 2;
/// Address bits that a guest may have.
const GPA_BITS: u32 = 52;

/// Shared memory of the guest.
struct Shared<'a>(&'a dyn GuestView);

/// Memory that is not mapped: it has to be, first.
struct NotMapped(Gfn, AccessKind);

impl From<NotMapped> for Step {
    fn from(NotMapped(gfn, kind): NotMapped) -> Self {
        Self::Fault { gfn, kind, private: false }
    }
}

impl Shared<'_> {
    fn read(&self, gpa: u64) -> Result<u64, NotMapped> {
        let mut bytes = [0; 8];
        match self.0.read(Gpa(gpa), false, &mut bytes) {
            Some(()) => Ok(u64::from_le_bytes(bytes)),
            None => Err(NotMapped(Gpa(gpa).gfn(), AccessKind::Read)),
        }
    }

    fn write(&self, gpa: u64, value: u64) -> Result<(), NotMapped> {
        let written = self.0.write(Gpa(gpa), false, &value.to_le_bytes());
        written.ok_or_else(|| NotMapped(Gpa(gpa).gfn(), AccessKind::Write))
    }
}

/// A buffer of page state changes at an address within a GHCB page.
struct InPage<'a> {
    memory: Shared<'a>,
    scratch: u64,
}

impl Buffer for InPage<'_> {
    type Error = NotMapped;

    fn read(&mut self, offset: u64) -> Result<u64, NotMapped> {
        self.memory.read(self.scratch.saturating_add(offset))
    }

    fn write(&mut self, offset: u64, value: u64) -> Result<(), NotMapped> {
        self.memory.write(self.scratch.saturating_add(offset), value)
    }
}

pub(super) fn execute(arch: &SnpArch, view: &dyn GuestView, instruction: &Instruction) -> Step {
    let [value, ..] = instruction.args;
    let gfn = value >> 12;
    match msr::parse(value) {
        msr::Request::SevInfo => Step::Done(msr::sev_info(C_BIT)),
        msr::Request::PreferredGpa => Step::Done(msr::preferred_gpa()),
        msr::Request::Features => Step::Done(msr::features()),
        msr::Request::Register(gfn) => {
            arch.guest().vcpus.entry(instruction.vcpu).or_default().ghcb = Some(gfn);
            Step::Done(msr::registered(gfn))
        }
        msr::Request::PageState(change) => match instruction.answer {
            Some(answer) => Step::Done(msr::page_state(answer == 0)),
            None if instruction.map_gpa_exits => exit(&change),
            None => Step::Done(msr::page_state(false)),
        },
        msr::Request::UnknownOperation => Step::Done(msr::page_state(false)),
        msr::Request::Terminate => Step::Exit(SYSTEM_EVENT),
        msr::Request::Unknown => Step::Done(value),
        msr::Request::Page(_) => {
            let step = by_page(arch, view, instruction, gfn.wrapping_shl(12));
            step.unwrap_or_else(Step::from)
        }
    }
}

const fn exit(change: &MapGpaRange) -> Step {
    Step::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args: change.args() }
}

/// A request whose contents are in the GHCB page.
fn by_page(arch: &SnpArch, view: &dyn GuestView, instruction: &Instruction, ghcb: u64) -> Result<Step, NotMapped> {
    let memory = Shared(view);
    let (registered, psc, stale) = {
        let mut guest = arch.guest();
        let vcpu = guest.vcpus.entry(instruction.vcpu).or_default();
        if instruction.round == 0 {
            // Userspace gave an answer that KVM did not take: the request was never finished.
            vcpu.stale_psc |= vcpu.psc.take().is_some();
        }
        if let (Some(psc), Some(answer)) = (&mut vcpu.psc, instruction.answer) {
            psc.answer = Some(answer);
        }
        (vcpu.ghcb == Some(ghcb >> 12), vcpu.psc, vcpu.stale_psc)
    };
    if let Some(psc) = psc {
        return work_off(arch, view, instruction, psc);
    }
    // Before anything is changed: the page is there, and can be written.
    memory.write(ghcb.saturating_add(EXIT_INFO_1), memory.read(ghcb.saturating_add(EXIT_INFO_1))?)?;
    let refuse = |error: InputError| -> Result<Step, NotMapped> {
        memory.write(ghcb.saturating_add(EXIT_INFO_1), ERROR)?;
        memory.write(ghcb.saturating_add(EXIT_INFO_2), error.raw())?;
        Ok(Step::Done(ghcb))
    };
    if !registered {
        return refuse(InputError::NotRegistered);
    }
    // The usage is the upper half of the last eight bytes.
    if memory.read(ghcb.saturating_add(USAGE & !7))? >> 32 != 0 {
        return refuse(InputError::InvalidUsage);
    }
    let field = |offset: u64| -> Result<Option<u64>, NotMapped> {
        let (byte, mask) = valid_bit(offset);
        let bitmap = memory.read(ghcb.saturating_add(VALID_BITMAP).saturating_add(byte & !7))?;
        let valid = bitmap.to_le_bytes().into_iter().nth(usize::try_from(byte & 7).unwrap_or(0)).unwrap_or(0);
        if valid & mask == 0 { Ok(None) } else { memory.read(ghcb.saturating_add(offset)).map(Some) }
    };
    let (Some(code), Some(info_1), Some(info_2)) = (field(EXIT_CODE)?, field(EXIT_INFO_1)?, field(EXIT_INFO_2)?) else {
        return refuse(InputError::MissingInput);
    };
    match code {
        EXIT_PSC => {
            let Some(scratch) = field(SCRATCH)? else { return refuse(InputError::MissingInput) };
            let Some(bytes) = scratch_bytes(ghcb, scratch) else {
                return refuse(InputError::InvalidScratch);
            };
            if stale {
                // KVM says in its log that this must not be, and the next request is served again.
                memory.write(ghcb.saturating_add(EXIT_INFO_1), 0)?;
                memory.write(ghcb.saturating_add(EXIT_INFO_2), Completion::Failed.raw())?;
                arch.guest().vcpus.entry(instruction.vcpu).or_default().stale_psc = false;
                return Ok(Step::Done(ghcb));
            }
            let psc = PscState { ghcb, scratch, cursor: Cursor::new(max_entries(bytes)), answer: None };
            work_off(arch, view, instruction, psc)
        }
        EXIT_AP_CREATION => {
            let Some(features) = field(RAX)? else { return refuse(InputError::MissingInput) };
            match create_vcpu(arch, info_1, info_2, features) {
                Ok(()) => {
                    memory.write(ghcb.saturating_add(EXIT_INFO_1), 0)?;
                    memory.write(ghcb.saturating_add(EXIT_INFO_2), 0)?;
                    Ok(Step::Done(ghcb))
                }
                Err(error) => refuse(error),
            }
        }
        _ => refuse(InputError::InvalidEvent),
    }
}

/// Goes on with a page state change request.
fn work_off(
    arch: &SnpArch,
    view: &dyn GuestView,
    instruction: &Instruction,
    mut psc: PscState,
) -> Result<Step, NotMapped> {
    let mut buffer = InPage { memory: Shared(view), scratch: psc.scratch };
    let next = match psc.answer.take() {
        _ if !instruction.map_gpa_exits => Next::Finished(Completion::Failed),
        Some(answer) => psc.cursor.complete(&mut buffer, answer)?,
        None => psc.cursor.next(&mut buffer)?,
    };
    let keep = |state| arch.guest().vcpus.entry(instruction.vcpu).or_default().psc = state;
    match next {
        Next::Exit(change) => {
            keep(Some(psc));
            Ok(exit(&change))
        }
        Next::Finished(completion) => {
            buffer.memory.write(psc.ghcb.saturating_add(EXIT_INFO_1), 0)?;
            buffer.memory.write(psc.ghcb.saturating_add(EXIT_INFO_2), completion.raw())?;
            keep(None);
            Ok(Step::Done(psc.ghcb))
        }
    }
}

/// `sev_snp_ap_creation()`.
fn create_vcpu(arch: &SnpArch, info_1: u64, vmsa: u64, features: u64) -> Result<(), InputError> {
    let mut guest = arch.guest();
    let own_features = guest.features;
    let target = u32::try_from(info_1 >> 32).map_err(|_| InputError::InvalidInput)?;
    let state = guest.vcpus.get_mut(&target).ok_or(InputError::InvalidInput)?;
    match info_1 & 0xffff_ffff {
        AP_CREATE_ON_INIT | AP_CREATE => {
            let aligned = Gpa(vmsa).is_aligned() && !vmsa.is_multiple_of(2 << 20);
            if !aligned || vmsa.checked_shr(GPA_BITS) != Some(0) || features != own_features {
                return Err(InputError::InvalidInput);
            }
            state.save_area = SaveArea::Pending(Gpa(vmsa).gfn());
            Ok(())
        }
        AP_DESTROY => {
            state.save_area = SaveArea::Lost;
            Ok(())
        }
        _ => Err(InputError::InvalidInput),
    }
}
