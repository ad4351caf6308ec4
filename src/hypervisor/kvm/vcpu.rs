//! A vCPU fd as a [`Vcpu`].
#![allow(unsafe_code, reason = "KVM_PRE_FAULT_MEMORY is called through the table of raw ioctls; a descriptor is lent")]

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{KVM_EXIT_UNKNOWN, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;

use super::ring::MappedRing;
use super::{errno, exit, raw};
use crate::hypervisor::{DirtyRingMemory, Exit, PreFaultMemory, Vcpu};

/// A vCPU of the real KVM.
pub struct KvmVcpu {
    fd: VcpuFd,
    /// What the last `KVM_RUN` left in errno; a memory fault comes with one.
    errno: Errno,
}

impl KvmVcpu {
    /// Takes over a vCPU. It may have run before.
    pub const fn new(fd: VcpuFd) -> Self {
        Self { fd, errno: Errno::UnknownErrno }
    }

    /// The vCPU fd, for everything that is not memory.
    pub const fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The vCPU fd, for what kvm-ioctls lets only a sole owner do.
    pub const fn fd_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Gives the vCPU fd back.
    pub fn into_fd(self) -> VcpuFd {
        self.fd
    }

    /// `KVM_RUN`, without a look at the exit: [`last_exit`](Self::last_exit) tells it.
    ///
    /// Together they are [`run`](Vcpu::run), for loops that borrow the exit only on the way out.
    ///
    /// # Errors
    /// As `run`.
    pub fn enter(&mut self) -> Result<(), Errno> {
        // KVM only ever writes exit_reason: what completes the previous exit is remembered on its own side. It resets the
        // field on the way into the guest, but not if it fails before that, while it completes that exit or looks at a
        // signal. With the reset done here, a MEMORY_FAULT found below was written by this very call, whatever its errno.
        self.fd.get_kvm_run().exit_reason = KVM_EXIT_UNKNOWN;
        Errno::clear();
        // kvm-ioctls takes a memory fault that comes with EFAULT or EHWPOISON for success and one with any other errno for
        // failure, and tells the errno in the second case only. So its reading of the exit is dropped for our own.
        let failed = self.fd.run().err().map(errno);
        // Nothing has called the kernel since: success leaves errno as it was cleared, a fault shows its own.
        self.errno = failed.unwrap_or_else(Errno::last);
        match failed {
            Some(errno) if exit::memory_fault(self.fd.get_kvm_run(), errno).is_none() => Err(errno),
            _ => Ok(()),
        }
    }

    /// Why the vCPU came back from the last [`enter`](Self::enter) or [`run`](Vcpu::run) that succeeded.
    pub fn last_exit(&mut self) -> Exit<'_> {
        let run = self.fd.get_kvm_run();
        match exit::memory_fault(run, self.errno) {
            Some(fault) => Exit::MemoryFault(fault),
            None => exit::decode(run),
        }
    }
}

impl Vcpu for KvmVcpu {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        let PreFaultMemory { gpa, size, flags } = *range;
        let mut argument = kvm_pre_fault_memory { gpa, size, flags, ..Default::default() };
        // SAFETY: the descriptor is a vCPU's, and the argument is a live structure of the layout that the ioctl's number
        // says, which KVM reads and writes only during the call.
        let answer = unsafe { raw::pre_fault_memory(self.fd.as_raw_fd(), &raw mut argument) };
        // KVM copies the structure back whether it succeeded or not.
        *range = PreFaultMemory { gpa: argument.gpa, size: argument.size, flags };
        answer.map(drop)
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        self.enter()?;
        Ok(self.last_exit())
    }

    fn dirty_ring(&self, bytes: u32) -> Result<Box<dyn DirtyRingMemory>, Errno> {
        // SAFETY: the descriptor is open for as long as `self.fd` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        Ok(Box::new(MappedRing::map(fd, bytes)?))
    }
}

impl fmt::Debug for KvmVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVcpu").field("fd", &self.fd.as_raw_fd()).finish_non_exhaustive()
    }
}
