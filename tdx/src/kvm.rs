//! The real KVM as [`TdVm`] and [`TdVcpu`].
//!
//! Implemented on the generic crate's own types, so that a launcher keeps the VM and the vCPUs that it has. Needs a TDX
//! machine: where there is none, creating a VM of this type is refused, and no line of this file has run on one.
#![allow(unsafe_code, reason = "KVM_MEMORY_ENCRYPT_OP takes addresses")]

use std::os::fd::AsRawFd;

use cvm_memory::hypervisor::kvm::{KvmVcpu, KvmVm};
use kvm_bindings::{KVMIO, kvm_cpuid_entry2};
use nix::errno::Errno;
use nix::libc::c_ulong;

use crate::mechanism::{Capabilities, Failure, InitVm, TdVcpu, TdVm};
use crate::uapi::{
    self, Command, CommandId, Cpuid, InitMemRegion, MAX_CPUID_ENTRIES, MEASURE_MEMORY_REGION, ROOM_FOR_CPUID,
};

nix::ioctl_readwrite! {
    /// `KVM_MEMORY_ENCRYPT_OP`: the number says "unsigned long", the argument is a [`Command`].
    memory_encrypt_op, KVMIO, 0xba, c_ulong
}

/// Carries out one command on a VM or vCPU fd.
///
/// # Safety
/// `data` has to be what the command takes: where it is an address, that of a live structure of the command's type, alone in
/// the caller's hands if the command writes it.
unsafe fn command(fd: &impl AsRawFd, id: CommandId, flags: u32, data: u64) -> Result<(), Failure> {
    let mut command = Command { id: id as u32, flags, data, hw_error: 0 };
    // SAFETY: the command lives across the call and is of the kernel's layout; its data is what the caller vouches for.
    let answer = unsafe { memory_encrypt_op(fd.as_raw_fd(), (&raw mut command).cast()) };
    answer.map(drop).map_err(|errno| Failure { errno, hw_error: command.hw_error })
}

/// Where `value` is, as KVM takes addresses.
fn address<T>(value: &mut T) -> u64 {
    (&raw mut *value).expose_provenance() as u64
}

/// A table with these entries; `E2BIG`, as KVM says it, if they are too many.
fn cpuid_table<const N: usize>(entries: &[kvm_cpuid_entry2]) -> Result<Cpuid<N>, Failure> {
    let too_many = Failure::errno(Errno::E2BIG);
    let nent = u32::try_from(entries.len()).map_err(|_| too_many)?;
    let mut table = Cpuid { nent, padding: 0, entries: [kvm_cpuid_entry2::default(); N] };
    table.entries.get_mut(..entries.len()).ok_or(too_many)?.copy_from_slice(entries);
    Ok(table)
}

/// A table for the kernel to fill.
fn empty_table<const N: usize>() -> Cpuid<N> {
    Cpuid { nent: u32::try_from(N).unwrap_or(u32::MAX), padding: 0, entries: [kvm_cpuid_entry2::default(); N] }
}

/// A register as the kernel has it: six words in memory order.
fn words(bytes: &[u8; 48]) -> [u64; 6] {
    let mut words = [0; 6];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    words
}

impl TdVm for KvmVm {
    fn capabilities(&self) -> Result<Capabilities, Failure> {
        let mut argument = Box::new(uapi::Capabilities::<ROOM_FOR_CPUID> {
            supported_attrs: 0,
            supported_xfam: 0,
            kernel_tdvmcallinfo_1_r11: 0,
            user_tdvmcallinfo_1_r11: 0,
            kernel_tdvmcallinfo_1_r12: 0,
            user_tdvmcallinfo_1_r12: 0,
            reserved: [0; 250],
            cpuid: empty_table(),
        });
        // SAFETY: KVM_TDX_CAPABILITIES fills a kvm_tdx_capabilities with as many entries as it says it has room for.
        unsafe { command(self.vm(), CommandId::Capabilities, 0, address(argument.as_mut())) }?;
        Ok(Capabilities {
            attributes: argument.supported_attrs,
            xfam: argument.supported_xfam,
            cpuid: argument.cpuid.used().to_vec(),
        })
    }

    fn init_vm(&self, init: &InitVm) -> Result<(), Failure> {
        let mut argument = Box::new(uapi::InitVm::<MAX_CPUID_ENTRIES> {
            attributes: init.attributes,
            xfam: init.xfam,
            mrconfigid: words(&init.mrconfigid),
            mrowner: words(&init.mrowner),
            mrownerconfig: words(&init.mrownerconfig),
            reserved: [0; 12],
            cpuid: cpuid_table(&init.cpuid)?,
        });
        // SAFETY: KVM_TDX_INIT_VM takes a kvm_tdx_init_vm with as many entries as it says.
        unsafe { command(self.vm(), CommandId::InitVm, 0, address(argument.as_mut())) }
    }

    fn finalize(&self) -> Result<(), Failure> {
        // SAFETY: KVM_TDX_FINALIZE_VM takes no data.
        unsafe { command(self.vm(), CommandId::FinalizeVm, 0, 0) }
    }
}

impl TdVcpu for KvmVcpu {
    fn init_vcpu(&mut self, rcx: u64) -> Result<(), Failure> {
        // SAFETY: the data of KVM_TDX_INIT_VCPU is a number.
        unsafe { command(self.fd(), CommandId::InitVcpu, 0, rcx) }
    }

    fn init_mem_region(&mut self, region: &mut InitMemRegion, measure: bool) -> Result<(), Failure> {
        let flags = if measure { MEASURE_MEMORY_REGION } else { 0 };
        // SAFETY: KVM_TDX_INIT_MEM_REGION takes a kvm_tdx_init_mem_region and writes it back. What that points to is only
        // read, by way of this process's page tables, so that a bad address is EFAULT.
        unsafe { command(self.fd(), CommandId::InitMemRegion, flags, address(region)) }
    }

    fn td_cpuid(&mut self) -> Result<Vec<kvm_cpuid_entry2>, Failure> {
        let mut argument = Box::new(empty_table::<ROOM_FOR_CPUID>());
        // SAFETY: KVM_TDX_GET_CPUID fills a kvm_cpuid2 with as many entries as it says it has room for.
        unsafe { command(self.fd(), CommandId::GetCpuid, 0, address(argument.as_mut())) }?;
        Ok(argument.used().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As KVM itself says it.
    #[test]
    fn a_table_has_room_for_so_many() {
        let entry = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let table = cpuid_table::<2>(&[entry(7), entry(9)]).unwrap();
        assert_eq!(table.used(), [entry(7), entry(9)]);
        assert_eq!(cpuid_table::<2>(&[entry(7)]).unwrap().used(), [entry(7)]);
        assert_eq!(cpuid_table::<2>(&[entry(7); 3]).unwrap_err(), Failure::errno(Errno::E2BIG));
        // A kernel that says to have filled in more than there is room for.
        let lie = Cpuid { nent: 9, ..empty_table::<2>() };
        assert_eq!(lie.used().len(), 2);
    }

    #[test]
    fn registers_keep_their_bytes() {
        let bytes: [u8; 48] = std::array::from_fn(|at| u8::try_from(at).unwrap_or_default());
        assert_eq!(words(&bytes).map(u64::to_ne_bytes).as_flattened(), bytes);
    }
}
