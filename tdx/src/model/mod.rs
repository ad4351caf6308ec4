//! A TD on the software KVM: [`SoftTd`] is its VM fd, [`SoftTdVcpu`] one of its vCPU fds.
//!
//! Together with [`cvm_memory::soft`] this is what Linux 7.3 does with a TD's memory, in this process and without hardware:
//! the commands that build it with their checks in KVM's order, the secure EPT, pages that a guest must accept, and MapGPA. It
//! is a model made from the kernel's sources; no TDX machine has confirmed it. Not modelled: large pages, the encryption
//! keys and their failures, attestation, anything about a TD that is not its memory.

pub mod arch;
pub mod sept;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cvm_memory::addr::{Gfn, GfnRange, Gpa, PAGE_SIZE};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Cap, Exit, Hypervisor, MemoryAttributes, MemoryRegion, Platform, PreFaultMemory, Vcpu};
use cvm_memory::soft::{GuestOp, ImmediateExit, OpResult, SoftVcpu, SoftVm};
use kvm_bindings::kvm_cpuid_entry2;
use nix::errno::Errno;

use crate::mechanism::{Capabilities, Failure, InitVm, TdVcpu, TdVm};
use crate::uapi::{ATTRIBUTE_SEPT_VE_DISABLE, InitMemRegion, MAX_CPUID_ENTRIES};
use crate::width::Width;

pub use arch::{Death, TdArch, accept, op};

/// What the machine of the model can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Extended features that a TD may have.
    pub xfam: u64,
    /// Whether the host has five-level EPT, which 52-bit addresses need.
    pub five_level_ept: bool,
}

impl Default for Machine {
    fn default() -> Self {
        // x87, SSE, AVX.
        Self { xfam: 0b111, five_level_ept: true }
    }
}

/// The VM fd of a TD. A handle: clones are the same TD.
///
/// ```
/// use cvm_memory::hypervisor::Vcpu;
/// use cvm_memory_tdx::mechanism::{InitVm, TdVm};
/// use cvm_memory_tdx::model::SoftTd;
/// use cvm_memory_tdx::width::Width;
/// use nix::errno::Errno;
///
/// let td = SoftTd::new();
/// td.init_vm(&InitVm::new(Width::Bits48))?;
/// let mut vcpu = td.create_vcpu()?;
/// // It has to be finalised first.
/// assert_eq!(vcpu.run().unwrap_err(), Errno::EINVAL);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct SoftTd {
    vm: SoftVm,
    arch: Arc<TdArch>,
    machine: Machine,
    has_vcpus: Arc<AtomicBool>,
}

impl Default for SoftTd {
    fn default() -> Self {
        Self::new()
    }
}

impl SoftTd {
    /// `KVM_CREATE_VM` of the TDX type, on an ordinary machine.
    pub fn new() -> Self {
        Self::on(Machine::default())
    }

    /// `KVM_CREATE_VM` of the TDX type.
    pub fn on(machine: Machine) -> Self {
        let arch = Arc::new(TdArch::default());
        let vm = SoftVm::with_arch(Arc::<TdArch>::clone(&arch));
        Self { vm, arch, machine, has_vcpus: Arc::new(AtomicBool::new(false)) }
    }

    /// A TD that could run, with nothing in it: for tests and examples that are not about building one.
    ///
    /// # Errors
    /// Never; what the commands give.
    pub fn finalized(width: Width) -> Result<Self, Failure> {
        let td = Self::new();
        td.init_vm(&InitVm::new(width))?;
        td.finalize()?;
        Ok(td)
    }

    /// The software KVM below, to look into it.
    pub const fn vm(&self) -> &SoftVm {
        &self.vm
    }

    /// The secure EPT and what else is TDX's own.
    pub const fn arch(&self) -> &Arc<TdArch> {
        &self.arch
    }

    /// `KVM_CREATE_VCPU`.
    ///
    /// # Errors
    /// `EIO` before `KVM_TDX_INIT_VM`.
    pub fn create_vcpu(&self) -> Result<SoftTdVcpu, Errno> {
        if self.arch.width().is_none() {
            return Err(Errno::EIO);
        }
        self.has_vcpus.store(true, Ordering::Release);
        let vcpu = self.vm.create_vcpu();
        let interrupt = vcpu.immediate_exit();
        Ok(SoftTdVcpu { vcpu, interrupt, vm: self.vm.clone(), arch: Arc::clone(&self.arch), initialised: None })
    }
}

impl Hypervisor for SoftTd {
    fn platform(&self) -> Platform {
        self.vm.platform()
    }

    fn check_extension(&self, cap: Cap) -> u64 {
        self.vm.check_extension(cap)
    }

    fn enable_cap(&self, cap: Cap, args: [u64; 4]) -> Result<(), Errno> {
        self.vm.enable_cap(cap, args)
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<GuestMemfd, Errno> {
        self.vm.create_guest_memfd(size, flags)
    }

    #[allow(unsafe_code, reason = "the trait's one unsafe method is passed on")]
    unsafe fn set_user_memory_region2(&self, region: &MemoryRegion) -> Result<(), Errno> {
        // SAFETY: the caller vouches for the address range, under this very contract.
        unsafe { self.vm.set_user_memory_region2(region) }
    }

    fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno> {
        self.vm.set_memory_attributes(attributes)
    }
}

impl TdVm for SoftTd {
    fn capabilities(&self) -> Result<Capabilities, Failure> {
        let Machine { xfam, .. } = self.machine;
        Ok(Capabilities { attributes: ATTRIBUTE_SEPT_VE_DISABLE, xfam, cpuid: Vec::new() })
    }

    fn init_vm(&self, init: &InitVm) -> Result<(), Failure> {
        let invalid = Failure::errno(Errno::EINVAL);
        if self.has_vcpus.load(Ordering::Acquire) {
            return Err(Failure::errno(Errno::EBUSY));
        }
        if self.arch.width().is_some() {
            return Err(invalid);
        }
        if init.cpuid.len() > MAX_CPUID_ENTRIES {
            return Err(Failure::errno(Errno::E2BIG));
        }
        if init.attributes & !ATTRIBUTE_SEPT_VE_DISABLE != 0 || init.xfam & !self.machine.xfam != 0 {
            return Err(invalid);
        }
        let width = init.width().ok_or(invalid)?;
        if width == Width::Bits52 && !self.machine.five_level_ept {
            return Err(invalid);
        }
        let ve_disable = init.attributes & ATTRIBUTE_SEPT_VE_DISABLE != 0;
        self.arch.init(width, ve_disable).map_err(Failure::errno)
    }

    fn finalize(&self) -> Result<(), Failure> {
        self.arch.finalize().map_err(Failure::errno)
    }
}

/// A vCPU fd of a TD.
#[derive(Debug)]
pub struct SoftTdVcpu {
    vcpu: SoftVcpu,
    interrupt: ImmediateExit,
    vm: SoftVm,
    arch: Arc<TdArch>,
    /// Its first RCX.
    initialised: Option<u64>,
}

impl SoftTdVcpu {
    /// Gives the guest something to do. See [`SoftVcpu::start`].
    pub fn start(&mut self, op: GuestOp) {
        self.vcpu.start(op);
    }

    /// The result of the finished operation, once.
    pub const fn take_result(&mut self) -> Option<OpResult> {
        self.vcpu.take_result()
    }

    /// The handle that makes it leave the guest, for another thread.
    pub fn immediate_exit(&self) -> ImmediateExit {
        self.interrupt.clone()
    }

    /// Its index within the VM, from zero.
    pub const fn index(&self) -> u32 {
        self.vcpu.index()
    }

    /// The RCX that it starts with; `None` before `KVM_TDX_INIT_VCPU`.
    pub const fn first_rcx(&self) -> Option<u64> {
        self.initialised
    }

    /// The frames of an address and a size that KVM is given, if no shared bit is in them.
    fn private_frames(&self, gpa: u64, bytes: u64) -> Result<GfnRange, Errno> {
        let width = self.arch.width().ok_or(Errno::EINVAL)?;
        let gfns = GfnRange::from_bytes(gpa, bytes).map_err(|_| Errno::EINVAL)?;
        if gfns.end() > width.end() { Err(Errno::EINVAL) } else { Ok(gfns) }
    }

    fn add_page(&self, region: &InitMemRegion, measure: bool) -> Result<(), Errno> {
        if self.interrupt.is_set() {
            return Err(Errno::EINTR);
        }
        let mut each = |page, gfn: Gfn, contents: &mut [u8]| self.arch.add(gfn, page, contents, measure);
        self.vm.populate(Gpa(region.gpa).gfn(), 1, Some(region.source_addr), &mut each).map(drop)
    }
}

impl Vcpu for SoftTdVcpu {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        // Alignment comes first with KVM too, and gives the same errno.
        self.private_frames(range.gpa, range.size)?;
        self.vcpu.pre_fault_memory(range)
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        if self.initialised.is_none() {
            return Err(Errno::EINVAL);
        }
        self.vcpu.run()
    }
}

impl TdVcpu for SoftTdVcpu {
    fn init_vcpu(&mut self, rcx: u64) -> Result<(), Failure> {
        if self.initialised.is_some() || self.arch.with_sept(|sept| sept.is_finalized()) {
            return Err(Failure::errno(Errno::EINVAL));
        }
        self.initialised = Some(rcx);
        Ok(())
    }

    fn init_mem_region(&mut self, region: &mut InitMemRegion, measure: bool) -> Result<(), Failure> {
        let invalid = Failure::errno(Errno::EINVAL);
        let aligned = region.source_addr & (PAGE_SIZE - 1) == 0;
        if self.initialised.is_none()
            || self.arch.with_sept(|sept| sept.is_finalized())
            || region.source_addr == 0
            || !aligned
        {
            return Err(invalid);
        }
        let bytes = region.nr_pages.checked_mul(PAGE_SIZE).ok_or(invalid)?;
        self.private_frames(region.gpa, bytes).map_err(Failure::errno)?;
        while region.nr_pages != 0 {
            self.add_page(region, measure).map_err(Failure::errno)?;
            region.source_addr = region.source_addr.saturating_add(PAGE_SIZE);
            region.gpa = region.gpa.saturating_add(PAGE_SIZE);
            region.nr_pages = region.nr_pages.saturating_sub(1);
        }
        Ok(())
    }

    fn td_cpuid(&mut self) -> Result<Vec<kvm_cpuid_entry2>, Failure> {
        match self.arch.width() {
            Some(width) if self.initialised.is_some() && !self.arch.with_sept(|sept| sept.is_finalized()) => {
                Ok(InitVm::new(width).cpuid)
            }
            _ => Err(Failure::errno(Errno::EINVAL)),
        }
    }
}
