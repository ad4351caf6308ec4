//! A real guest_memfd's file: `KVM_CREATE_GUEST_MEMFD` and `fallocate(2)`.
#![allow(unsafe_code, reason = "KVM hands out a bare file descriptor, of which ownership is taken here")]

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use kvm_bindings::kvm_create_guest_memfd;
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, FdFlag, fallocate, fcntl};

use crate::gmem::GmemOps;

/// The file, closed on drop and on exec.
#[derive(Debug)]
pub(super) struct KvmGmem(OwnedFd);

impl KvmGmem {
    pub(super) fn create(vm: &VmFd, size: u64, flags: u64) -> Result<Self, Errno> {
        let argument = kvm_create_guest_memfd { size, flags, ..Default::default() };
        let raw = vm.create_guest_memfd(argument).map_err(super::errno)?;
        // SAFETY: KVM has just opened this descriptor for us, so nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // KVM opens it without O_CLOEXEC and takes no flag for it. A program that another thread starts between the two
        // calls inherits the file all the same; nothing can be done about that from here.
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        Ok(Self(fd))
    }
}

impl GmemOps for KvmGmem {
    fn fallocate(&self, mode: FallocateFlags, offset: i64, len: i64) -> Result<(), Errno> {
        fallocate(&self.0, mode, offset, len)
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
