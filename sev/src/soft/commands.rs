//! The launch's commands, as KVM's SNP code carries them out.
//!
//! Mirrors `__sev_guest_init()`, `snp_launch_start()`, `snp_launch_update()` with `sev_gmem_post_populate()`, and
//! `snp_launch_finish()` (`arch/x86/kvm/svm/sev.c`).

use cvm_memory::addr::{Gfn, PAGE_SIZE};
use cvm_memory::layout::SlotFlags;
use cvm_memory::soft::GmemPage;
use nix::errno::Errno;

use crate::commands::{
    CommandError, FirmwareStatus, Init, LaunchFinish, LaunchStart, LaunchUpdate, SnpCommands, Source,
};
use crate::digest::PageType;
use crate::page::{PAGE_BYTES, Page};
use crate::vmsa::{DEBUG_SWAP, SNP_ACTIVE, Vmsa};

use super::SoftSnp;
use super::firmware::Context;
use super::state::SaveArea;

/// Bits that KVM lets a policy have: 25:0 but for the migration agent's.
const POLICY_BITS: u64 = ((1 << 26) - 1) & !(1 << 18);
/// The bit that must be one.
const POLICY_ONE: u64 = 1 << 17;
/// The highest version of the GHCB protocol.
const GHCB_VERSION: u16 = 2;

/// Fails a command before the firmware is reached.
fn kvm(command: &'static str, errno: Errno) -> CommandError {
    CommandError { command, errno, firmware: FirmwareStatus::SUCCESS }
}

/// Fails a command by the firmware.
fn firmware(command: &'static str, firmware: FirmwareStatus) -> CommandError {
    CommandError { command, errno: Errno::EIO, firmware }
}

impl SoftSnp {
    /// The slot at a frame, if it has a file: the end of its frames.
    fn has_private_slot(&self, gfn: Gfn) -> bool {
        let private = |flags: SlotFlags| flags.contains(SlotFlags::GUEST_MEMFD);
        self.vm.slots().iter().any(|slot| slot.gfns.contains(gfn) && private(slot.flags))
    }

    /// One page of an update, after KVM has copied its contents (`sev_gmem_post_populate()`).
    fn populate_page(
        &self,
        page: GmemPage,
        gfn: Gfn,
        page_type: PageType,
        contents: &mut Page,
    ) -> Result<(), (Errno, FirmwareStatus)> {
        let mut guest = self.arch.guest();
        let asid = guest.asid.ok_or((Errno::EINVAL, FirmwareStatus::SUCCESS))?;
        let context = guest.context.as_mut().ok_or((Errno::EINVAL, FirmwareStatus::SUCCESS))?;
        let mut machine = self.machine().lock();
        let pfn = machine.pfn(page);
        if machine.host.rmp().lookup(pfn).0.is_some() {
            return Err((Errno::EEXIST, FirmwareStatus::SUCCESS));
        }
        machine.host.assign(pfn, gfn, asid, true).map_err(|_| (Errno::EFAULT, FirmwareStatus::SUCCESS))?;
        let status = context.update(machine.host.rmp().lookup(pfn).0, asid, page_type, contents);
        match status {
            Ok(()) => {
                machine.host.rmp_mut().launch(pfn, false);
                Ok(())
            }
            Err(status) => {
                machine.host.rmp_mut().reclaim(pfn);
                machine.host.reclaim(pfn, 1);
                Err((Errno::EIO, status))
            }
        }
    }
}

impl SnpCommands for SoftSnp {
    fn init(&self, init: &Init) -> Result<(), CommandError> {
        const NAME: &str = "KVM_SEV_INIT2";
        let mut guest = self.arch.guest();
        if guest.asid.is_some() {
            return Err(kvm(NAME, Errno::EPERM));
        }
        let Init { vmsa_features, flags, ghcb_version } = *init;
        let valid = self.vm.vcpus() == 0
            && flags == 0
            && vmsa_features & !DEBUG_SWAP == 0
            && ghcb_version <= GHCB_VERSION
            && ghcb_version != 1;
        if !valid {
            return Err(kvm(NAME, Errno::EINVAL));
        }
        guest.asid = Some(self.machine().lock().take_asid().ok_or_else(|| kvm(NAME, Errno::EBUSY))?);
        guest.features = vmsa_features | SNP_ACTIVE;
        Ok(())
    }

    fn launch_start(&self, start: &LaunchStart) -> Result<(), CommandError> {
        const NAME: &str = "KVM_SEV_SNP_LAUNCH_START";
        let mut guest = self.arch.guest();
        if guest.asid.is_none() {
            return Err(kvm(NAME, Errno::ENOTTY));
        }
        let valid = guest.context.is_none()
            && start.flags == 0
            && start.policy & !POLICY_BITS == 0
            && start.policy & POLICY_ONE != 0;
        if !valid {
            return Err(kvm(NAME, Errno::EINVAL));
        }
        guest.context = Some(Context::start(start).map_err(|status| firmware(NAME, status))?);
        Ok(())
    }

    fn launch_update(&self, update: &mut LaunchUpdate, source: Source<'_>) -> Result<(), CommandError> {
        const NAME: &str = "KVM_SEV_SNP_LAUNCH_UPDATE";
        let invalid = Err(kvm(NAME, Errno::EINVAL));
        if self.arch.guest().asid.is_none() {
            return Err(kvm(NAME, Errno::ENOTTY));
        }
        let given = match &source {
            Source::None => usize::MAX,
            Source::Pages(pages) => pages.len().saturating_mul(PAGE_BYTES),
            Source::Correctable(_) => PAGE_BYTES,
        };
        if update.len > u64::try_from(given).unwrap_or(u64::MAX) {
            return Err(kvm(NAME, Errno::EFAULT));
        }
        let page_type = PageType::from_raw(update.page_type).filter(|page_type| *page_type != PageType::Vmsa);
        let (Some(page_type), Some(start)) = (page_type, Gfn::new(update.gfn_start)) else { return invalid };
        let valid = self.arch.guest().context.is_some()
            && update.len > 0
            && update.len.is_multiple_of(PAGE_SIZE)
            && update.flags == 0
            && (page_type == PageType::Zero || !matches!(source, Source::None))
            && self.has_private_slot(start);
        if !valid {
            return invalid;
        }
        let mut correctable = None;
        let address = |of: *const Page| Some(of.addr() as u64);
        let source = match source {
            _ if page_type == PageType::Zero => None,
            Source::None => None,
            Source::Pages(pages) => address(pages.as_ptr()),
            Source::Correctable(page) => {
                let source = address(&raw const *page);
                correctable = Some(page);
                source
            }
        };
        let mut status = FirmwareStatus::SUCCESS;
        let mut corrected = None;
        let result = self.vm.populate(start, update.len / PAGE_SIZE, source, &mut |page, gfn, bytes| {
            let mut contents = Page::split(bytes).pop().unwrap_or_default();
            let result = self.populate_page(page, gfn, page_type, &mut contents);
            match &result {
                Ok(()) => bytes.copy_from_slice(&*contents),
                Err((_, FirmwareStatus::INVALID_PARAM)) if page_type == PageType::Cpuid => corrected = Some(contents),
                Err(_) => {}
            }
            result.map_err(|(errno, code)| {
                status = code;
                errno
            })
        });
        if let (Some(page), Some(contents)) = (correctable, corrected) {
            *page = contents;
        }
        match result {
            Ok(pages) => {
                update.gfn_start = update.gfn_start.saturating_add(pages);
                update.len = update.len.saturating_sub(pages.saturating_mul(PAGE_SIZE));
                Ok(())
            }
            // Whatever it was.
            Err(_) => Err(firmware(NAME, status)),
        }
    }

    fn launch_finish(&self, finish: &LaunchFinish) -> Result<(), CommandError> {
        const NAME: &str = "KVM_SEV_SNP_LAUNCH_FINISH";
        let mut guest = self.arch.guest();
        let guest = &mut *guest;
        let asid = guest.asid.ok_or_else(|| kvm(NAME, Errno::ENOTTY))?;
        let context = guest.context.as_mut().ok_or_else(|| kvm(NAME, Errno::EINVAL))?;
        if finish.flags != 0 {
            return Err(kvm(NAME, Errno::EINVAL));
        }
        for index in 0..self.vm.vcpus() {
            let vcpu = guest.vcpus.entry(index).or_default();
            if vcpu.save_area != SaveArea::None {
                return Err(kvm(NAME, Errno::EINVAL));
            }
            let page = guest.registers.get(&index).cloned().unwrap_or_default();
            let vmsa = Vmsa::from_page(page).with_features(guest.features);
            if context.running {
                return Err(firmware(NAME, FirmwareStatus::INVALID_GUEST_STATE));
            }
            let pfn = self.machine().lock().save_area(asid).ok_or_else(|| kvm(NAME, Errno::EINVAL))?;
            context.digest.add_vmsa(vmsa.page());
            (vcpu.save_area, vcpu.kvm_page) = (SaveArea::Kvm, Some(pfn));
        }
        context.finish(finish).map_err(|status| firmware(NAME, status))
    }
}
