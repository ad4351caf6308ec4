//! Instructions of the guest that only SNP has.

use cvm_memory::addr::{Gfn, Gpa};
use cvm_memory::soft::{AccessKind, GmemPage, GuestOp, GuestView, Instruction, Step};

use crate::rmp::{Failure, Fault, PAGES_PER_2M, Pvalidate, Size};

use super::state::SnpArch;
use super::vmgexit as exits;

/// Numbers of [`GuestOp::Instruction`] here.
mod nr {
    pub const PVALIDATE: u64 = 1;
    pub const RMPADJUST: u64 = 2;
    pub const VMGEXIT: u64 = 3;
}

/// CF=1 in the result of PVALIDATE: nothing was changed.
const NO_UPDATE: u64 = 1 << 32;

/// PVALIDATE of the page at `gpa`: accepts it, or not any more. What it came to is read by [`validated`].
pub const fn pvalidate(gpa: u64, size: Size, validate: bool) -> GuestOp {
    GuestOp::Instruction { nr: nr::PVALIDATE, args: [gpa, size.pages(), validate as u64, 0] }
}

/// What PVALIDATE gave: `Ok(true)` if something was changed, `Ok(false)` if it was so already, else the code in EAX.
///
/// # Errors
/// The code.
pub fn validated(result: u64) -> Result<bool, u32> {
    match u32::try_from(result & u64::from(u32::MAX)).unwrap_or(u32::MAX) {
        0 => Ok(result & NO_UPDATE == 0),
        code => Err(code),
    }
}

/// RMPADJUST of the page at `gpa`: what `vmpl` may do, and whether the page is a save area. Gives the code in EAX.
pub const fn rmpadjust(gpa: u64, vmpl: u8, permissions: u8, vmsa: bool) -> GuestOp {
    let attributes = vmpl as u64 | (permissions as u64) << 8 | (vmsa as u64) << 16;
    GuestOp::Instruction { nr: nr::RMPADJUST, args: [gpa, 1, attributes, 0] }
}

/// VMGEXIT with this value in the register of the GHCB. Gives the value that the host has left there.
pub const fn vmgexit(value: u64) -> GuestOp {
    GuestOp::Instruction { nr: nr::VMGEXIT, args: [value, 0, 0, 0] }
}

pub(super) fn execute(arch: &SnpArch, view: &dyn GuestView, instruction: &Instruction) -> Step {
    let [gpa, pages, argument, _] = instruction.args;
    let size = if pages == PAGES_PER_2M { Size::Large } else { Size::Small };
    match instruction.nr {
        nr::PVALIDATE => with_page(arch, view, gpa, |page, asid, gfn| {
            let mut machine = arch.machine().lock();
            let pfn = machine.pfn(page);
            let result = machine.host.rmp_mut().validate(pfn, asid, gfn, size, argument & 1 != 0);
            if result == Err(Fault::Size) {
                // The host smashes the entry, and the guest executes the instruction again.
                machine.host.smash(pfn);
            }
            Ok(match result? {
                Pvalidate::Changed => 0,
                Pvalidate::NoUpdate => NO_UPDATE,
                Pvalidate::Failed(failure) => failure.code().into(),
            })
        }),
        nr::RMPADJUST => with_page(arch, view, gpa, |page, asid, gfn| {
            let mut machine = arch.machine().lock();
            let pfn = machine.pfn(page);
            let [vmpl, permissions, flags, ..] = argument.to_le_bytes();
            let attributes = (vmpl, permissions, flags & 1 != 0);
            let result = machine.host.rmp_mut().adjust(pfn, asid, gfn, size, attributes)?;
            Ok(result.map_or_else(Failure::code, |()| 0).into())
        }),
        nr::VMGEXIT => exits::execute(arch, view, instruction),
        _ => Step::Exception,
    }
}

/// Executes an instruction on the private page at `gpa`, which is mapped first.
fn with_page(
    arch: &SnpArch,
    view: &dyn GuestView,
    gpa: u64,
    execute: impl FnOnce(GmemPage, u32, Gfn) -> Result<u64, Fault>,
) -> Step {
    let gfn = Gpa(gpa).gfn();
    let again = Step::Fault { gfn, kind: AccessKind::Write, private: true };
    let Some(page) = view.gmem_page(gfn, true) else { return again };
    let asid = arch.guest().asid.unwrap_or_default();
    match execute(page, asid, gfn) {
        Ok(value) => Step::Done(value),
        Err(Fault::NotValidated) => Step::Exception,
        // A nested page fault, of which KVM makes nothing: for ever, unless somebody changes something.
        Err(_) => {
            arch.machine().denied();
            again
        }
    }
}
