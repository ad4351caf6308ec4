//! The platform's hooks in the software KVM.
//!
//! Mirrors `sev_gmem_make_private()`, `sev_gmem_invalidate()`, `sev_snp_init_protected_guest_state()` and the RMP side of
//! `sev_handle_rmp_fault()` (`arch/x86/kvm/svm/sev.c`), and what the processor checks at VMRUN and at each access.

use cvm_memory::addr::{FileRange, Gfn, GfnRange};
use cvm_memory::hypervisor::Platform;
use cvm_memory::soft::{Access, AccessKind, Arch, Denied, GmemPage, GuestView, Instruction, Step};
use nix::errno::Errno;

use crate::SNP;
use crate::rmp::{Fault, MakePrivateError};

use super::instructions;
use super::state::{SaveArea, SnpArch};

/// `SVM_EXIT_ERR`, as KVM reports a VMRUN that the processor refuses.
const VMRUN_FAILED: u64 = u64::MAX;
/// What encrypted memory is to who reads it without its key: here, one byte that is no memory's.
const ENCRYPTED: u8 = 0xc1;

impl Arch for SnpArch {
    fn platform(&self) -> Platform {
        SNP
    }

    fn has_protected_state(&self) -> bool {
        true
    }

    fn make_private(&self, page: GmemPage, gfn: Gfn) -> Result<(), Errno> {
        let asid = self.guest().asid.ok_or(Errno::EINVAL)?;
        let mut machine = self.machine().lock();
        let pfn = machine.pfn(page);
        machine.host.make_private(pfn, gfn, asid, 1).map_err(|error| match error {
            MakePrivateError::NotOnePage => Errno::EIO,
            MakePrivateError::Rmpupdate(_) => Errno::EINVAL,
        })
    }

    fn reclaim(&self, file: u64, pages: FileRange) {
        let mut machine = self.machine().lock();
        let start = machine.pfn(GmemPage { file, page: pages.start() });
        machine.host.reclaim(start, pages.pages());
    }

    /// A page of a file that is freed or unbound may be a vCPU's save area: it is looked up again.
    fn invalidate_range(&self, gfns: GfnRange) {
        for vcpu in self.guest().vcpus.values_mut() {
            if let SaveArea::Guest(gfn, _) = vcpu.save_area
                && gfns.contains(gfn)
            {
                vcpu.save_area = SaveArea::Pending(gfn);
            }
        }
    }

    fn state_page(&self, vcpu: u32) -> Option<Gfn> {
        match self.guest().vcpus.get(&vcpu)?.save_area {
            SaveArea::Pending(gfn) => Some(gfn),
            _ => None,
        }
    }

    fn state_page_found(&self, vcpu: u32, found: Result<GmemPage, Errno>) {
        let mut guest = self.guest();
        if let Some(state) = guest.vcpus.get_mut(&vcpu)
            && let SaveArea::Pending(gfn) = state.save_area
        {
            // Its address is forgotten with it: it does not come back when the slot does.
            state.save_area = found.map_or(SaveArea::Lost, |page| SaveArea::Guest(gfn, self.pfn(page)));
        }
    }

    fn entry_failure(&self, vcpu: u32) -> Option<u64> {
        let guest = self.guest();
        let save_area = guest.vcpus.get(&vcpu).map_or(SaveArea::None, |vcpu| vcpu.save_area);
        let asid = guest.asid.unwrap_or_default();
        let good = match save_area {
            _ if !guest.is_running() => false,
            SaveArea::Kvm => true,
            SaveArea::Guest(gfn, pfn) => self
                .machine()
                .rmp(|rmp| rmp.lookup(pfn).0.is_some_and(|entry| entry.vmsa && entry.asid == asid && entry.gfn == gfn)),
            SaveArea::None | SaveArea::Pending(_) | SaveArea::Lost => false,
        };
        (!good).then_some(VMRUN_FAILED)
    }

    fn check_access(&self, access: &Access) -> Result<(), Denied> {
        // Memory of the process belongs to no guest.
        let Some(page) = access.page else {
            return if access.private { Err(Denied::Spin) } else { Ok(()) };
        };
        let asid = self.guest().asid.unwrap_or_default();
        let mut machine = self.machine().lock();
        let pfn = machine.pfn(page);
        let write = access.kind == AccessKind::Write;
        // The RMP keeps others from writing; what they read is encrypted, and nobody hears of it.
        if !access.private && !write && machine.host.rmp().lookup(pfn).0.is_some() {
            return Err(Denied::Noise(ENCRYPTED));
        }
        let checked = machine.host.rmp().check(pfn, asid, access.gfn, access.private, write);
        checked.map_err(|fault| match fault {
            Fault::NotValidated => Denied::Exception,
            // KVM finds the page mapped and assigned, and enters the guest again.
            Fault::NotYours | Fault::Assigned | Fault::Size => {
                self.machine().denied();
                Denied::Spin
            }
        })
    }

    /// The processor makes #VC of an access by a mapping that says "MMIO", so that KVM never sees that it is out of date.
    fn sticky_mmio(&self) -> bool {
        true
    }

    /// Both kinds of access use one page table, which does not know them apart. The RMP does.
    fn mappings_have_privacy(&self) -> bool {
        false
    }

    fn pre_fault_allowed(&self) -> bool {
        self.guest().is_running()
    }

    fn may_run(&self) -> Result<(), Errno> {
        self.guest().asid.map(drop).ok_or(Errno::EINVAL)
    }

    fn instruction(&self, view: &dyn GuestView, instruction: &Instruction) -> Step {
        instructions::execute(self, view, instruction)
    }
}
