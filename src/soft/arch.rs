//! What differs between kinds of VM: the hooks that `kvm_x86_ops` has for private memory.
//!
//! The software KVM knows no vendor. A platform that wants its rules modelled (who owns a physical page, what happens to the
//! contents when a mapping goes) implements [`Arch`] in its own crate and gives it to
//! [`SoftVm::with_arch`](super::SoftVm::with_arch). The defaults are KVM's own: no hook, nothing happens.
//!
//! Hooks are called with locks of the software KVM held (named at each). They must not call back into the VM.

use std::fmt;

use nix::errno::Errno;

use crate::addr::{FilePage, FileRange, Gfn, GfnRange, Gpa};
use crate::hypervisor::{Platform, VmType};

/// The errnos of `kvm_run.hypercall.ret`, which are positive.
const EINVAL: u64 = 22;
const EAGAIN: u64 = 11;

/// A page of guest_memfd memory: what a page frame number is to KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GmemPage {
    /// The file, by inode number.
    pub file: u64,
    /// The page within it.
    pub page: FilePage,
}

/// What a vCPU does to a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// An access of a vCPU through an existing mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The guest frame.
    pub gfn: Gfn,
    /// What is done.
    pub kind: AccessKind,
    /// Whether the guest accesses it as private.
    pub private: bool,
    /// The guest_memfd page behind the mapping; `None` for memory of the process.
    pub page: Option<GmemPage>,
}

/// Why the hardware of a platform would not carry out an access, although KVM has mapped the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// The vCPU faults. KVM looks whether the page is to be accessed otherwise, which is an exit; if not it finds nothing to
    /// do, and the guest faults again: it spins, interruptible.
    Spin,
    /// The guest gets an exception and deals with it alone.
    Exception,
    /// KVM gives the VM up: every later ioctl fails with `EIO`.
    KillVm,
    /// It is carried out, but every byte that is read is this and not what is in memory. Of reads only.
    Noise(u8),
}

/// What a platform's own guest operation does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It is finished, with this value for the guest.
    Done(u64),
    /// It exits with a hypercall; it is called again with the answer.
    Hypercall {
        /// Its number.
        nr: u64,
        /// Its arguments.
        args: [u64; 6],
    },
    /// It faulted on this frame, which is to be mapped first.
    Fault {
        /// The frame.
        gfn: Gfn,
        /// What the operation would do to it.
        kind: AccessKind,
        /// How it would access it.
        private: bool,
    },
    /// The guest gets an exception.
    Exception,
    /// It is finished, and the vCPU exits for a reason that is not about memory: `KVM_EXIT_...` by its number.
    Exit(u32),
    /// KVM gives the VM up.
    KillVm,
}

/// A platform's own guest operation (validate a page, accept one, ask for a page state change), opaque to the generic code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Index of the vCPU that executes it.
    pub vcpu: u32,
    /// Which, in the platform's own numbering.
    pub nr: u64,
    /// Operands.
    pub args: [u64; 4],
    /// How many steps of this operation were executed before, those that faulted included.
    pub round: u64,
    /// What userspace answered to the last [`Step::Hypercall`].
    pub answer: Option<u64>,
    /// Whether hypercalls for page state changes exit (`KVM_CAP_EXIT_HYPERCALL`).
    pub map_gpa_exits: bool,
}

/// Guest memory as the hardware finds it at one moment: mapped, or not.
pub trait GuestView: fmt::Debug {
    /// The guest_memfd page that `gfn` is mapped to for accesses of that privacy, if it is.
    fn gmem_page(&self, gfn: Gfn, private: bool) -> Option<GmemPage>;

    /// Whether `gfn` is mapped to anything for accesses of that privacy.
    fn is_mapped(&self, gfn: Gfn, private: bool) -> bool;

    /// Reads within one page; `None` if it is not mapped or cannot be read.
    fn read(&self, gpa: Gpa, private: bool, bytes: &mut [u8]) -> Option<()>;

    /// Writes within one page; `None` if it is not mapped or cannot be written.
    fn write(&self, gpa: Gpa, private: bool, bytes: &[u8]) -> Option<()>;
}

/// The hooks of a kind of VM.
pub trait Arch: fmt::Debug + Send + Sync {
    /// What kind of VM this is. [`Platform::private_memory`] is KVM's `has_private_mem`.
    fn platform(&self) -> Platform;

    /// KVM's `has_protected_state`: read-only slots are refused.
    fn has_protected_state(&self) -> bool {
        false
    }

    /// Whether private memory has page tables of its own, so that each side is zapped without the other.
    fn separate_private_root(&self) -> bool {
        false
    }

    /// `KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`, which KVM has on some machines only.
    fn offers_ring_with_bitmap(&self) -> bool {
        false
    }

    /// The highest frame that a slot may contain. Default: 52 address bits.
    fn max_gfn(&self) -> Gfn {
        Gfn::containing((1 << 52) - 1)
    }

    /// A slot with these frames is about to be created or moved (`kvm_arch_prepare_memory_region()`).
    /// Called under `slots_lock`.
    ///
    /// # Errors
    /// What the ioctl is to fail with.
    fn prepare_slot(&self, _gfns: GfnRange) -> Result<(), Errno> {
        Ok(())
    }

    /// Whether a fault counts as private, from what the access asked for and what the attribute says
    /// (`PFERR_PRIVATE_ACCESS`). Default: the access alone says it.
    fn access_is_private(&self, requested: bool, _attribute_private: bool) -> bool {
        requested
    }

    /// A page of a private file is about to be mapped at `gfn` (`kvm_gmem_make_private`). Called on every fault and every
    /// prefault of such a file; must be idempotent. Called under the file's page lock.
    ///
    /// # Errors
    /// `ENOENT`, `EINVAL` or `EIO`, which the fault then fails with.
    fn make_private(&self, _page: GmemPage, _gfn: Gfn) -> Result<(), Errno> {
        Ok(())
    }

    /// These pages of the file numbered `file` have left it and are free. Called under the file's page lock, for runs of
    /// pages that really existed.
    fn reclaim(&self, _file: u64, _pages: FileRange) {}

    /// The memory behind these frames is going away: a hole is being punched, or a guest_memfd slot deleted. Not called for
    /// attribute changes. Called with no MMU lock held.
    fn invalidate_range(&self, _gfns: GfnRange) {}

    /// A private mapping was installed. Called under the MMU lock.
    fn mapped_private(&self, _gfn: Gfn, _page: GmemPage) {}

    /// A private mapping was removed. Returns whether the page's contents survive that; if not, they are zeroed.
    /// Called under the MMU lock, exclusive.
    fn zapped_private(&self, _gfn: Gfn, _page: GmemPage) -> bool {
        true
    }

    /// Whether a page that is given initial contents is mapped in the same step, so that taking it away counts as removing
    /// a mapping. [`mapped_private`](Self::mapped_private) is not called for it: who gives contents knows.
    fn maps_populated(&self) -> bool {
        false
    }

    /// A vCPU accesses a mapped page. Called under the MMU lock, shared.
    ///
    /// # Errors
    /// Why the access does not happen.
    fn check_access(&self, _access: &Access) -> Result<(), Denied> {
        Ok(())
    }

    /// Whether `KVM_PRE_FAULT_MEMORY` is allowed yet.
    fn pre_fault_allowed(&self) -> bool {
        true
    }

    /// Whether the state of a vCPU allows it to run at all.
    ///
    /// # Errors
    /// What `KVM_RUN` is to fail with, e.g. `EINVAL` before the VM is finalised.
    fn may_run(&self) -> Result<(), Errno> {
        Ok(())
    }

    /// The frame of a page that holds state of this vCPU, if that page is to be looked up before the vCPU enters the guest. It is
    /// looked up as for a private fault, but whatever the attribute says; [`state_page_found`](Self::state_page_found) hears
    /// of it. Called with no lock held.
    fn state_page(&self, _vcpu: u32) -> Option<Gfn> {
        None
    }

    /// What was found at the frame that [`state_page`](Self::state_page) gave. Called with no lock held.
    fn state_page_found(&self, _vcpu: u32, _found: Result<GmemPage, Errno>) {}

    /// Why the hardware would refuse to enter the guest on this vCPU: `hardware_entry_failure_reason` of
    /// `KVM_EXIT_FAIL_ENTRY`. Called with no lock held.
    fn entry_failure(&self, _vcpu: u32) -> Option<u64> {
        None
    }

    /// Whether a shared access without a slot leaves a mapping that says "MMIO" for good: KVM only hears of the first, and
    /// a slot created there later stays out of reach.
    fn sticky_mmio(&self) -> bool {
        false
    }

    /// Whether the hardware compares an access with what the page is mapped as, private or shared, and faults if that differs.
    /// Where it does not, every mapping serves both, and [`check_access`](Self::check_access) is all there is.
    fn mappings_have_privacy(&self) -> bool {
        true
    }

    /// Whether userspace may answer a MAP_GPA_RANGE hypercall with `ret`; if not, `KVM_RUN` fails with `EINVAL`. KVM passes
    /// the raw answer on where the guest used a plain hypercall, and checks it where it came by a confidential VM's
    /// protocol.
    fn accepts_map_gpa_answer(&self, ret: u64) -> bool {
        !self.platform().accesses_carry_privacy || [0, EINVAL, EAGAIN].contains(&ret)
    }

    /// Executes a step of a platform's own guest operation. Called under the MMU lock, shared: what `view` shows stays mapped
    /// until this returns. Where it shows nothing, return [`Step::Fault`]; the step is then executed again.
    fn instruction(&self, _view: &dyn GuestView, _instruction: &Instruction) -> Step {
        Step::Exception
    }
}

/// KVM's default VM type: no private memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plain;

impl Arch for Plain {
    fn platform(&self) -> Platform {
        Platform::DEFAULT
    }

    fn access_is_private(&self, _requested: bool, _attribute_private: bool) -> bool {
        false
    }
}

/// KVM's software-protected VM type: the attribute decides, so no access can ever differ from it.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttributeDecides;

impl Arch for AttributeDecides {
    fn platform(&self) -> Platform {
        Platform::SOFTWARE_PROTECTED
    }

    fn access_is_private(&self, _requested: bool, attribute_private: bool) -> bool {
        attribute_private
    }
}

/// A confidential VM of no vendor: each access says by itself whether it is private.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tagged;

impl Tagged {
    /// Its platform. The VM type is none of the kernel's.
    pub const PLATFORM: Platform = Platform {
        name: "tagged",
        vm_type: VmType(63),
        private_memory: true,
        accesses_carry_privacy: true,
        guest_retries: true,
        hazards: crate::hypervisor::Hazards::NONE,
    };
}

impl Arch for Tagged {
    fn platform(&self) -> Platform {
        Self::PLATFORM
    }

    fn has_protected_state(&self) -> bool {
        true
    }
}
