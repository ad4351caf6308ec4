//! Describing a VM's memory, and making it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwapOption;

use nix::errno::Errno;

use crate::addr::{AddrError, FilePage, Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_1G};
use crate::backing::{SharedBacking, SharedError, SharedMemory, SharedSlice, Space};
use crate::convert::{ConvertOptions, Converter, DiscardPolicy, PinPolicy, State};
use crate::edit::Harvest;
use crate::gmem::GuestMemfd;
use crate::hypervisor::{Cap, Capabilities, HypercallExit, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, MissingCapability};
use crate::layout::{Layout, Limits, SlotFlags};
use crate::page_set::{PageSet, PageSetError};
use crate::sync::blocking::Mutex;

use super::slots::{SlotError, SlotSpec};
use super::{CvmMemory, Materialise};

/// Why a VM's memory could not be made. Nothing of it is left, but that `KVM_CAP_EXIT_HYPERCALL` may be enabled.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The VM lacks a capability.
    #[error(transparent)]
    Missing(#[from] MissingCapability),
    /// Lazy materialisation was asked for where the attribute alone decides.
    #[error(
        "lazy materialisation on a vm of the {platform} type, where the attribute alone decides: \
         a page not yet materialised would silently be shared"
    )]
    LazyNeedsTaggedAccesses {
        /// The kind of VM.
        platform: &'static str,
    },
    /// A range of memory is empty, unaligned or beyond the top.
    #[error("memory at {gpa:#x}, {size:#x} bytes")]
    Range {
        /// First byte.
        gpa: u64,
        /// In bytes.
        size: u64,
        /// Why.
        #[source]
        error: AddrError,
    },
    /// The sizes of all memory add up to more than a file can have.
    #[error("{bytes:#x} bytes of private memory and more exceed what a file can have")]
    TooMuch {
        /// Bytes added up before.
        bytes: u64,
    },
    /// The guest_memfd could not be created.
    #[error("create a guest_memfd of {size:#x} bytes")]
    Gmem {
        /// In bytes.
        size: u64,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// A capability could not be enabled.
    #[error("enable {cap}")]
    Enable {
        /// Which.
        cap: Cap,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// Shared memory could not be made.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// The record of page state could not be made.
    #[error(transparent)]
    Record(#[from] PageSetError),
    /// A slot could not be added.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

#[derive(Debug, Clone, Copy)]
struct Ram {
    gpa: u64,
    size: u64,
    convertible: bool,
}

/// Describes a VM's memory. See [`CvmMemory`] for an example.
///
/// Unless told otherwise: memory starts private; the attribute is set lazily where the platform allows it, else eagerly;
/// the side of a page that lost is freed at once; all private memory comes from one guest_memfd, packed in the order of
/// the calls, and each range of memory is one slot with a shared mapping of its own.
#[derive(Debug, Default)]
#[must_use]
pub struct Builder {
    ram: Vec<Ram>,
    slots: Vec<SlotSpec>,
    slot_size: Option<u64>,
    initial: Option<State>,
    materialise: Option<Materialise>,
    convert: ConvertOptions,
    address_limit: u64,
    address_bits: Option<u32>,
    harvest: Option<Arc<dyn Harvest>>,
}

impl Builder {
    /// Memory that can be private, `size` bytes at `gpa`.
    pub fn ram(mut self, gpa: u64, size: u64) -> Self {
        self.ram.push(Ram { gpa, size, convertible: true });
        self
    }

    /// Memory that is never private, `size` bytes at `gpa`: it has no guest_memfd.
    pub fn plain_ram(mut self, gpa: u64, size: u64) -> Self {
        self.ram.push(Ram { gpa, size, convertible: false });
        self
    }

    /// A slot with memory of the caller's.
    pub fn slot(mut self, slot: SlotSpec) -> Self {
        self.slots.push(slot);
        self
    }

    /// Cuts ranges of memory into slots of at most so many bytes (a page multiple); by default, only where KVM must have
    /// it.
    pub const fn slot_size(mut self, bytes: u64) -> Self {
        self.slot_size = Some(bytes);
        self
    }

    /// The state in which memory starts. Shared memory can be filled by the host before the guest runs.
    pub const fn initial(mut self, state: State) -> Self {
        self.initial = Some(state);
        self
    }

    /// When KVM is told that a page is private.
    pub const fn materialise(mut self, when: Materialise) -> Self {
        self.materialise = Some(when);
        self
    }

    /// What becomes of the side of a page that lost.
    pub const fn discard(mut self, policy: DiscardPolicy) -> Self {
        self.convert.discard = policy;
        self
    }

    /// What a conversion does about device accesses in progress.
    pub const fn pins(mut self, policy: PinPolicy) -> Self {
        self.convert.pins = policy;
        self
    }

    /// Everything about conversions.
    pub const fn convert_options(mut self, options: ConvertOptions) -> Self {
        self.convert = options;
        self
    }

    /// Memory that can be private may be added later up to this address, in bytes; so may any memory where a hole is
    /// remembered as a device ([`Hazards::holes_stick`](crate::hypervisor::Hazards::holes_stick)). Costs address space of
    /// this process, a bit per page and record, but no memory. By default the end of the memory described, rounded up to a
    /// GiB.
    pub const fn address_limit(mut self, bytes: u64) -> Self {
        self.address_limit = bytes;
        self
    }

    /// Bits of a guest physical address, without any shared bit; by default 52. Slots beyond are refused.
    pub const fn address_bits(mut self, bits: u32) -> Self {
        self.address_bits = Some(bits);
        self
    }

    /// Has `harvest` keep dirty bits, whatever becomes of the slots: a [`Tracker`](crate::dirty::Tracker) follows every edit
    /// by itself then. Which slots are logged, their flags say, here or in an edit.
    ///
    /// ```
    /// use cvm_memory::dirty::{Clearing, Mechanism, Stage, Tracker, Unloggable};
    /// use cvm_memory::layout::SlotFlags;
    /// use cvm_memory::memory::{CommitOptions, CvmMemory};
    /// use cvm_memory::soft::SoftVm;
    /// use std::sync::Arc;
    ///
    /// let vm = Arc::new(SoftVm::default_type());
    /// let tracker = Arc::new(Tracker::new(vm.clone(), Mechanism::Bitmap(Clearing::ByLooking)));
    /// let memory = CvmMemory::builder().plain_ram(0, 64 << 20).harvest(tracker.clone()).build(vm)?;
    ///
    /// let mut edit = memory.edit();
    /// edit.set_flags(0, 64 << 20, SlotFlags::LOG_DIRTY)?;
    /// edit.commit(&CommitOptions::default())?;
    /// tracker.start(memory.space().layout(), Unloggable::Refuse)?;
    ///
    /// // From here on, slots may come and go.
    /// let mut edit = memory.edit();
    /// edit.split(32 << 20)?;
    /// edit.commit(&CommitOptions::default())?;
    /// tracker.sync(Stage::Running)?;
    /// for gfns in tracker.take_gfns() {
    ///     // Copy them.
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn harvest(mut self, harvest: Arc<dyn Harvest>) -> Self {
        self.harvest = Some(harvest);
        self
    }

    /// Makes the memory: probes the VM, creates the files and mappings, adds the slots.
    ///
    /// No page of `vm` may have the private attribute yet. It cannot be asked for, and one left over makes the guest use
    /// private memory where the record says shared. A VM whose [`CvmMemory`] was dropped still has the attributes that it
    /// had: it is to go too.
    ///
    /// # Errors
    /// [`BuildError`].
    #[expect(clippy::needless_pass_by_value, reason = "the memory shares ownership of the VM")]
    pub fn build(self, vm: Arc<dyn Hypervisor>) -> Result<CvmMemory, BuildError> {
        let platform = vm.platform();
        let capabilities = Capabilities::probe(vm.as_ref());
        // Where pages can be private, such memory may also be added later, by then with a guest that asks for conversions.
        let convertible = platform.private_memory
            || self.ram.iter().any(|ram| ram.convertible)
            || self.slots.iter().any(SlotSpec::is_convertible);
        self.check(vm.as_ref(), convertible)?;

        let mut specs = self.slots;
        let size = check_sizes(&self.ram)?;
        let file = (size != 0).then(|| {
            let file = vm.create_guest_memfd(size, 0).map_err(|errno| BuildError::Gmem { size, errno });
            file.map(Arc::new)
        });
        let file = file.transpose()?;
        // A page multiple short of KVM's limit, and of 2 MiB, so that large mappings stay possible.
        let limit = self.slot_size.unwrap_or(u64::MAX).clamp(PAGE_SIZE, (1 << 43) - (2 << 20)) >> PAGE_SHIFT;
        let mut next_page = FilePage::ZERO;
        for ram in &self.ram {
            next_page = carve(ram, limit, file.as_ref().filter(|_| ram.convertible), next_page, &mut specs)?;
        }

        let limits = Limits {
            slots_per_address_space: u32::try_from(capabilities.memslots).unwrap_or(u32::MAX),
            address_spaces: u16::try_from(capabilities.address_spaces).unwrap_or(u16::MAX),
            readonly: capabilities.readonly,
            top: self
                .address_bits
                .map_or(Limits::default().top, |bits| 1u64.checked_shl(bits).map_or(Gfn::MAX, Gfn::containing)),
            ..Limits::default()
        };
        let end = specs.iter().map(|spec| spec.gpa.saturating_add(spec.size)).fold(self.address_limit, u64::max);
        // Slots beyond are refused below, with a better reason than a record that cannot be mapped.
        let end = end.min(limits.top.start_byte());
        let capacity = (end >> PAGE_SHIFT).checked_next_multiple_of(PAGES_PER_1G).unwrap_or(end >> PAGE_SHIFT);
        let space = Space::new(Layout::new(limits));
        let lazy = platform.accesses_carry_privacy;
        let memory = CvmMemory {
            converter: Converter::new(Arc::clone(&vm), space, capacity, self.convert)?,
            known: PageSet::new(capacity)?,
            initial: self.initial.unwrap_or(State::Private),
            materialise: self.materialise.unwrap_or(if lazy { Materialise::Lazy } else { Materialise::Eager }),
            capabilities,
            editing: Mutex::default(),
            gate: Arc::default(),
            harvest: Mutex::new(self.harvest),
            intended: ArcSwapOption::empty(),
            changes: AtomicU64::new(0),
        };
        memory.add_slots(specs)?;
        Ok(memory)
    }

    /// Everything that can be refused before anything is made.
    fn check(&self, vm: &dyn Hypervisor, convertible: bool) -> Result<(), BuildError> {
        let platform = vm.platform();
        if self.materialise == Some(Materialise::Lazy) && !platform.accesses_carry_privacy {
            return Err(BuildError::LazyNeedsTaggedAccesses { platform: platform.name });
        }
        Capabilities::require(vm, Cap::USER_MEMORY2, 1)?;
        if !convertible {
            return Ok(());
        }
        Capabilities::require(vm, Cap::GUEST_MEMFD, 1)?;
        Capabilities::require(vm, Cap::MEMORY_FAULT_INFO, 1)?;
        Capabilities::require(vm, Cap::MEMORY_ATTRIBUTES, MEMORY_ATTRIBUTE_PRIVATE)?;
        // Without it, a guest's request for a conversion fails without anybody here hearing of it.
        let map_gpa_range = 1u64 << HypercallExit::MAP_GPA_RANGE;
        Capabilities::require(vm, Cap::EXIT_HYPERCALL, map_gpa_range)?;
        vm.enable_cap(Cap::EXIT_HYPERCALL, [map_gpa_range, 0, 0, 0])
            .map_err(|errno| BuildError::Enable { cap: Cap::EXIT_HYPERCALL, errno })
    }
}

/// Checks every range, and adds up what needs a private side. In bytes.
fn check_sizes(ram: &[Ram]) -> Result<u64, BuildError> {
    let mut total = 0u64;
    for &Ram { gpa, size, convertible } in ram {
        GfnRange::from_bytes(gpa, size).map_err(|error| BuildError::Range { gpa, size, error })?;
        if convertible {
            let sum = total.checked_add(size).filter(|sum| i64::try_from(*sum).is_ok());
            total = sum.ok_or(BuildError::TooMuch { bytes: total })?;
        }
    }
    Ok(total)
}

/// The slots of one range of memory, with one shared mapping, and pages from `next` of the file if it can be private. Returns
/// the next free page of the file.
fn carve(
    ram: &Ram,
    limit: u64,
    private: Option<&Arc<GuestMemfd>>,
    mut next: FilePage,
    specs: &mut Vec<SlotSpec>,
) -> Result<FilePage, BuildError> {
    let &Ram { gpa, size, .. } = ram;
    let range = |error| BuildError::Range { gpa, size, error };
    let gfns = GfnRange::from_bytes(gpa, size).map_err(range)?;
    let backing: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(size)?);
    for part in gfns.split_every(limit) {
        let offset = part.start_byte().saturating_sub(gfns.start_byte());
        specs.push(SlotSpec {
            id: None,
            gpa: part.start_byte(),
            size: part.bytes(),
            shared: SharedSlice { backing: Arc::clone(&backing), offset },
            private: private.map(|file| (Arc::clone(file), next)),
            flags: SlotFlags::empty(),
        });
        if private.is_some() {
            let beyond = AddrError::BeyondTop { start: next.get(), size: part.pages() };
            next = next.checked_add(part.pages()).ok_or(range(beyond))?;
        }
    }
    Ok(next)
}
