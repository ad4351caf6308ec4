//! The commands on the real KVM, and the registers from which KVM makes a given save area.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use cvm_memory::hypervisor::kvm::{KvmVcpu, KvmVm};
use kvm_bindings::{
    Msrs, kvm_msr_entry, kvm_sev_cmd, kvm_sev_init, kvm_sev_snp_launch_finish, kvm_sev_snp_launch_start,
    kvm_sev_snp_launch_update, kvm_xcr, kvm_xcrs,
};
use nix::errno::Errno;

use crate::commands::{
    CommandError, FirmwareStatus, Init, LaunchFinish, LaunchStart, LaunchUpdate, SnpCommands, Source,
};
use crate::page::PAGE_BYTES;
use crate::vmsa::{Registers, Vmsa};

/// `MSR_IA32_CR_PAT`.
const MSR_PAT: u32 = 0x277;

/// An SNP VM of the real KVM. KVM remembers the number of the firmware's device at `KVM_SEV_SNP_LAUNCH_START` and opens it
/// again later: it stays open as long as this does.
///
/// ```no_run
/// use cvm_memory::hypervisor::kvm::KvmVm;
/// use cvm_memory_sev::kvm::KvmSnp;
///
/// let vm = KvmVm::create(&kvm_ioctls::Kvm::new()?, cvm_memory_sev::SNP)?;
/// let commands = KvmSnp::open(vm)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct KvmSnp {
    vm: KvmVm,
    firmware: File,
}

impl KvmSnp {
    /// With the firmware's device, `/dev/sev`.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(vm: KvmVm) -> io::Result<Self> {
        Ok(Self::new(vm, OpenOptions::new().read(true).write(true).open("/dev/sev")?))
    }

    /// With the firmware's device opened by the caller.
    pub const fn new(vm: KvmVm, firmware: File) -> Self {
        Self { vm, firmware }
    }

    /// The VM.
    pub const fn vm(&self) -> &KvmVm {
        &self.vm
    }

    fn command(&self, name: &'static str, id: u32, data: u64) -> Result<(), CommandError> {
        // Where KVM has nothing to report it leaves `error` as it was: zero.
        let sev_fd = self.firmware.as_raw_fd().cast_unsigned();
        let mut command = kvm_sev_cmd { id, data, error: 0, sev_fd, ..Default::default() };
        self.vm.vm().encrypt_op_sev(&mut command).map_err(|error| CommandError {
            command: name,
            errno: Errno::from_raw(error.errno()),
            firmware: FirmwareStatus(command.error),
        })
    }
}

fn address<T>(of: *const T) -> u64 {
    // An address of this process: 64 bits.
    of.addr() as u64
}

impl SnpCommands for KvmSnp {
    fn init(&self, init: &Init) -> Result<(), CommandError> {
        let Init { vmsa_features, flags, ghcb_version } = *init;
        let argument = kvm_sev_init { vmsa_features, flags, ghcb_version, ..Default::default() };
        self.command("KVM_SEV_INIT2", kvm_bindings::sev_cmd_id_KVM_SEV_INIT2, address(&raw const argument))
    }

    fn launch_start(&self, start: &LaunchStart) -> Result<(), CommandError> {
        let LaunchStart { policy, gosvw, flags } = *start;
        let argument = kvm_sev_snp_launch_start { policy, gosvw, flags, ..Default::default() };
        let id = kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_START;
        self.command("KVM_SEV_SNP_LAUNCH_START", id, address(&raw const argument))
    }

    fn launch_update(&self, update: &mut LaunchUpdate, source: Source<'_>) -> Result<(), CommandError> {
        const NAME: &str = "KVM_SEV_SNP_LAUNCH_UPDATE";
        let (uaddr, pages) = match source {
            Source::None => (0, usize::MAX),
            Source::Pages(pages) => (address(pages.as_ptr()), pages.len()),
            Source::Correctable(page) => (address(&raw mut *page), 1),
        };
        // KVM reads that much from there, and writes it if it is a CPUID table.
        let given = u64::try_from(pages.saturating_mul(PAGE_BYTES)).unwrap_or(u64::MAX);
        if update.len > given {
            return Err(CommandError { command: NAME, errno: Errno::EFAULT, firmware: FirmwareStatus::SUCCESS });
        }
        let LaunchUpdate { gfn_start, len, page_type, flags } = *update;
        let mut argument =
            kvm_sev_snp_launch_update { gfn_start, uaddr, len, type_: page_type, flags, ..Default::default() };
        let id = kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE;
        let result = self.command(NAME, id, address(&raw mut argument));
        (update.gfn_start, update.len) = (argument.gfn_start, argument.len);
        result
    }

    fn launch_finish(&self, finish: &LaunchFinish) -> Result<(), CommandError> {
        let mut argument = kvm_sev_snp_launch_finish {
            vcek_disabled: u8::from(finish.vcek_disabled),
            host_data: finish.host_data,
            flags: finish.flags,
            ..Default::default()
        };
        if let Some(id) = &finish.id_block {
            argument.id_block_uaddr = address(id.block.as_ptr());
            argument.id_auth_uaddr = address(id.auth.as_ptr());
            argument.id_block_en = 1;
            argument.auth_key_en = u8::from(id.author_key);
        }
        let id = kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH;
        self.command("KVM_SEV_SNP_LAUNCH_FINISH", id, address(&raw const argument))
    }
}

/// Gives a vCPU the registers from which KVM will make `vmsa` when the launch is finished. `KVM_SET_CPUID2` comes first.
///
/// # Errors
/// What KVM answered, `EINVAL` for registers that it does not accept.
pub fn set_registers(vcpu: &KvmVcpu, vmsa: &Vmsa) -> Result<(), Errno> {
    let Registers { regs, sregs, fpu, pat, xcr0 } = vmsa.registers();
    let errno = |error: kvm_ioctls::Error| Errno::from_raw(error.errno());
    let fd = vcpu.fd();
    let mut current = fd.get_sregs().map_err(errno)?;
    // The local APIC is not in a save area.
    let (apic_base, interrupts) = (current.apic_base, current.interrupt_bitmap);
    current = sregs;
    (current.apic_base, current.interrupt_bitmap) = (apic_base, interrupts);
    fd.set_sregs(&current).map_err(errno)?;
    fd.set_regs(&regs).map_err(errno)?;
    fd.set_fpu(&fpu).map_err(errno)?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    if let Some(first) = xcrs.xcrs.first_mut() {
        *first = kvm_xcr { xcr: 0, value: xcr0, ..Default::default() };
    }
    fd.set_xcrs(&xcrs).map_err(errno)?;
    let msrs = Msrs::from_entries(&[kvm_msr_entry { index: MSR_PAT, data: pat, ..Default::default() }]);
    let set = fd.set_msrs(&msrs.map_err(|_| Errno::ENOMEM)?).map_err(errno)?;
    if set == 1 { Ok(()) } else { Err(Errno::EINVAL) }
}
