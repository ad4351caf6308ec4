//! A software KVM: what Linux's KVM does with guest memory, in this process and without hardware.
//!
//! [`SoftVm`] implements [`Hypervisor`](crate::hypervisor::Hypervisor) and [`SoftVcpu`] implements
//! [`Vcpu`](crate::hypervisor::Vcpu), call by call and errno by errno, so that everything above that seam can be tested, races
//! included. Private memory lies in real memfds; shared memory is the process's own, reached through the kernel so that a bad
//! address is an errno and not a signal. vCPUs execute a few [guest operations](GuestOp). What a platform adds comes in through
//! [`Arch`].
//!
//! It is not an emulator: there are no instructions, no guest page tables, no interrupts, no timing, and no huge mappings (only
//! the flags that would forbid them). MMU notifiers are not needed, since shared memory is looked up at each access. The
//! descriptor of a guest_memfd is that of an ordinary memfd, and can be read, written and mapped as such. A fault makes
//! a mapping as writable as its slot is, so in a slot with a dirty log a page that is read for the first time counts as dirty:
//! KVM does the same where the process's own page is writable by then.
//!
//! # Locks
//! In the order in which they may be taken:
//! 1. `slots_lock`: one change of memslots or attributes, or one closing of a file, at a time.
//! 2. a file's `invalidate_lock`: its bindings and its pages do not go while a range is invalidated.
//! 3. `slots` (for one lookup or swap), then a file's `bindings`.
//! 4. `mmu_lock`: shared while a vCPU accesses memory, exclusive to map and to zap.
//! 5. leaves: `attributes`, a slot's `mixed` flags, a file's `pages`, then whatever a platform locks.
//!
//! A vCPU that resolves a fault is in an SRCU section, in which it takes locks from 3 on. Whoever changes slots waits, under
//! `slots_lock` alone, for the sections that were open; a vCPU that finds a slot INVALID therefore leaves its section before it
//! tries again. [Observers](SoftVm::observe) are called under 1 and 2.

mod arch;
pub mod attributes;
mod counters;
mod dirty;
mod dirty_log;
mod dirty_ring;
mod emulate;
mod fault;
mod file;
mod gmem;
mod host;
mod hypervisor;
mod memslots;
mod mmu;
mod ops;
mod populate;
mod region;
mod sync;
mod vcpu;
mod vm;

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use crate::addr::{FilePage, Gfn, GfnRange};
use crate::gmem::GuestMemfd;
use crate::layout::{SlotFlags, SlotId};
use attributes::Mixed;
use sync::lock;
use vm::Vm;

pub use arch::{
    Access, AccessKind, Arch, AttributeDecides, Denied, GmemPage, GuestView, Instruction, Plain, Step, Tagged,
};
pub use counters::Counters;
pub use ops::{GuestOp, OpResult};
pub use populate::FillPage;
pub use vcpu::{ImmediateExit, SoftVcpu};
pub use vm::Event;

/// A VM of the software KVM. A handle: clones are the same VM, which lives as long as any of them, its vCPUs and its files.
///
/// ```
/// use cvm_memory::hypervisor::{Exit, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes, Vcpu};
/// use cvm_memory::soft::{GuestOp, SoftVm};
///
/// let vm = SoftVm::tagged();
/// vm.set_memory_attributes(&MemoryAttributes {
///     address: 0x10_0000,
///     size: 0x1000,
///     attributes: MEMORY_ATTRIBUTE_PRIVATE,
///     flags: 0,
/// })?;
/// // A shared access to a private page exits.
/// let mut vcpu = vm.create_vcpu();
/// vcpu.start(GuestOp::Read { gpa: 0x10_0008, len: 8, private: false });
/// let Exit::MemoryFault(fault) = vcpu.run()? else { panic!() };
/// assert_eq!((fault.gpa, fault.size, fault.flags), (0x10_0000, 0x1000, 0));
/// # Ok::<(), nix::errno::Errno>(())
/// ```
#[derive(Debug, Clone)]
pub struct SoftVm {
    vm: Arc<Vm>,
}

/// A run of frames that a vCPU can access without a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The frames.
    pub gfns: GfnRange,
    /// Whether they are mapped for private accesses.
    pub private: bool,
}

/// A memslot as it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotInfo {
    /// Its id.
    pub id: SlotId,
    /// Its frames.
    pub gfns: GfnRange,
    /// Its flags.
    pub flags: SlotFlags,
    /// Where its shared memory is.
    pub userspace_addr: u64,
    /// Whether its file is open. Always false without one.
    pub file_open: bool,
    /// Whether it is being deleted or moved.
    pub invalid: bool,
}

impl SoftVm {
    /// `KVM_CREATE_VM` of KVM's default type.
    pub fn default_type() -> Self {
        Self::with_arch(Arc::new(Plain))
    }

    /// `KVM_CREATE_VM` of the software-protected type: the attribute alone decides what is private.
    pub fn software_protected() -> Self {
        Self::with_arch(Arc::new(AttributeDecides))
    }

    /// A confidential VM of no vendor: each access says whether it is private.
    pub fn tagged() -> Self {
        Self::with_arch(Arc::new(Tagged))
    }

    /// A VM with a platform's own rules.
    pub fn with_arch(arch: Arc<dyn Arch>) -> Self {
        Self { vm: Arc::new(Vm::new(arch)) }
    }

    /// Makes the host's processor one with so many address bits (MAXPHYADDR); 52 if nobody says. No slot may reach beyond.
    pub fn limit_physical_bits(&self, bits: u32) {
        self.vm.physical_bits.store(bits, Ordering::Relaxed);
    }

    /// `KVM_CREATE_VCPU`, with the next free index.
    pub fn create_vcpu(&self) -> SoftVcpu {
        SoftVcpu::new(Arc::clone(&self.vm))
    }

    /// How many vCPUs have been created.
    pub fn vcpus(&self) -> u32 {
        self.vm.vcpu_count()
    }

    /// Marks the VM as dead, as a bug in KVM would: every later ioctl gives `EIO`. Files still work.
    pub fn kill(&self) {
        self.vm.kill();
    }

    /// The machine reports a page of `file` as broken (`memory_failure()`): it is unmapped, stays in the file until a hole is
    /// punched, and a guest that touches it exits with `EHWPOISON`.
    ///
    /// # Errors
    /// `EINVAL` for a file that is not of this VM, and for a page beyond its end.
    pub fn poison(&self, file: &GuestMemfd, page: FilePage) -> Result<(), Errno> {
        if !file.pages().contains(page) {
            return Err(Errno::EINVAL);
        }
        let file = self.vm.file_by_fd(file.as_fd().as_raw_fd())?;
        self.vm.poison_page(&file, page);
        Ok(())
    }

    /// `kvm_gmem_populate()`, which the launch commands of confidential VMs are built on: puts the initial contents into up to
    /// `pages` private pages from `start`, not beyond the end of the slot. Contents come from address `source` of this process,
    /// or are zeroes. `each` is the platform's part for one page, given the page, its frame and the contents; a page for which
    /// it fails keeps none. Returns the number of pages done, which is less than asked if a later one failed.
    ///
    /// # Errors
    /// Those of the first page: `EINVAL` without a slot, without a file, or for a page that is not private; `EFAULT` for a
    /// closed file or a bad source; `EHWPOISON`; whatever `each` gives.
    pub fn populate(&self, start: Gfn, pages: u64, source: Option<u64>, each: &mut FillPage<'_>) -> Result<u64, Errno> {
        self.vm.check_alive()?;
        self.vm.populate(start, pages, source, each)
    }

    /// `kvm_write_guest()`: KVM itself writes to shared memory, in no vCPU's name. The dirty log hears of it.
    ///
    /// # Errors
    /// `EFAULT` where there is no slot, a read-only one, or no memory behind it; what comes before in `data` was written.
    pub fn write_guest(&self, gpa: u64, data: &[u8]) -> Result<(), Errno> {
        self.vm.write_guest(gpa, data)
    }

    /// Pages that were written and noted nowhere: KVM warns of them. A full ring without a soft limit kept, or a write in no
    /// vCPU's name where rings are not backed by a log.
    pub fn lost_dirty_pages(&self) -> u64 {
        self.vm.rings.lost()
    }

    /// System calls made so far.
    pub fn counters(&self) -> Counters {
        self.vm.counters()
    }

    /// Has `observer` told of each [`Event`] while it happens, by the thread that makes it happen. That thread holds what the
    /// change needs: `slots_lock` for memslots, attributes and the closing of a file; the file's own lock for holes and closing.
    /// An observer must not make a change that needs the same, nor wait for a thread that does.
    pub fn observe(&self, observer: impl Fn(&Event) + Send + Sync + 'static) {
        self.vm.observe(Some(Arc::new(observer)));
    }

    /// Ends what [`observe`](Self::observe) began.
    pub fn stop_observing(&self) {
        self.vm.observe(None);
    }

    /// Everything mapped, in runs; shared before private where they have separate page tables.
    pub fn mappings(&self) -> Vec<Mapping> {
        let mut runs: Vec<Mapping> = Vec::new();
        for (gfn, spte) in self.vm.mmu().iter() {
            let page = GfnRange::page(gfn);
            match runs.last_mut() {
                Some(run) if run.gfns.end() == gfn && run.private == spte.private => run.gfns = run.gfns.hull(&page),
                _ => runs.push(Mapping { gfns: page, private: spte.private }),
            }
        }
        runs
    }

    /// All slots, ascending by id.
    pub fn slots(&self) -> Vec<SlotInfo> {
        let slots = self.vm.slots();
        let info = |slot: &Arc<memslots::Slot>| SlotInfo {
            id: slot.id,
            gfns: slot.gfns,
            flags: slot.flags,
            userspace_addr: slot.userspace_addr,
            file_open: slot.file.as_ref().is_some_and(|file| file.get().is_some()),
            invalid: slot.invalid,
        };
        slots.iter().map(info).collect()
    }

    /// The blocks of a slot that must not be mapped by huge pages because their attributes differ.
    pub fn mixed(&self, slot: SlotId) -> Option<Mixed> {
        let slot = self.vm.slots().get(slot).cloned()?;
        let mixed = lock(&slot.mixed).clone();
        Some(mixed)
    }

    /// Whether the attribute of `gfn` is private.
    pub fn is_private(&self, gfn: Gfn) -> bool {
        self.vm.is_private(gfn)
    }

    /// All frames with the private attribute.
    pub fn private_gfns(&self) -> Vec<GfnRange> {
        self.vm.attributes().runs().collect()
    }

    /// `kvm->mmu_invalidate_seq`: invalidations ended so far.
    pub fn invalidate_seq(&self) -> u64 {
        self.vm.mmu().seq()
    }

    /// `kvm->mmu_invalidate_in_progress`, with the hull of all that are.
    pub fn invalidate_in_progress(&self) -> (u64, GfnRange) {
        let mmu = self.vm.mmu();
        (mmu.in_progress(), mmu.hull())
    }

    /// The generation of an address space's memslots, without the bit that is set during an update.
    pub fn generation(&self, as_id: u16) -> u64 {
        self.vm.slots().generation(as_id)
    }
}
