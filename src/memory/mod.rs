//! The memory of one VM, whole: slots, files, page state, and what may be done with them.
//!
//! [`CvmMemory`] is what a launcher holds. It ties the parts together and adds what none of them decides alone: which slots
//! there are, in what state new memory starts, and in what order everything goes away again. [`Builder`] makes one with
//! sensible defaults in one call; an expert brings slots of their own ([`SlotSpec`]) and reaches the parts through
//! [`CvmMemory::converter`].
//!
//! It runs no vCPU and handles no exit (that is [`exits`](crate::exits)). Slots can be [added](CvmMemory::add_slots) and
//! [removed](CvmMemory::remove_slot) under running vCPUs, and memory [edited](CvmMemory::edit) as a whole. Memory that goes
//! shows to the guest; memory that stays does not, if vCPUs pass the [gate](CvmMemory::gate).

mod access;
mod builder;
mod commit;
mod edit;
mod frames;
mod inspect;
mod slots;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption, Cache, Guard};
use nix::errno::Errno;

use crate::addr::{Gfn, GfnRange, PAGE_SIZE};
use crate::backing::Space;
use crate::convert::{
    AddListenerError, ConvertError, Converter, Listener, ListenerId, LockError, Outcome, Pin, PinError, Request, State,
    StepError,
};
use crate::edit::Harvest;
use crate::gate::Gate;
use crate::gmem::FileId;
use crate::hypervisor::{Cap, Capabilities, Hypervisor, MissingCapability, Platform, Vcpu};
use crate::layout::{Memslot, SlotFlags, SlotId, SlotTable};
use crate::page_set::{PageSet, PageSetError, Pages};
use crate::prefault::{PrefaultError, PrefaultOptions, Prefaulted, Progress, prefault};
use crate::stats::{Requests, Syscalls};
use crate::sync::blocking::{Mutex, MutexGuard};

pub use access::AccessError;
pub(crate) use access::Part;
pub use builder::{BuildError, Builder};
pub use commit::{CommitOptions, Committed};
pub use edit::{Edit, EditError, NestedEdit};
pub use inspect::{MemoryMap, Run};

use frames::Frames;
pub use slots::{SlotError, SlotSpec};

/// When KVM is told that a page is private.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Materialise {
    /// At its first private access, together with its surroundings. Setting the attribute of a whole TiB ahead takes KVM
    /// some 18 s and 2 GiB. Needs a platform whose accesses say by themselves if they are private.
    ///
    /// Until then a *shared* access to the page makes no exit: KVM serves it from the shared memory, while the record says
    /// private and devices are refused. A guest that asks before it shares, as confidential guests do, never sees this.
    /// One that does not may hold memory twice, what it wrote as shared before it took the page as private: up to as much again
    /// as its memory, until the page has been shared and private once more.
    Lazy,
    /// When its slot is created.
    Eager,
}

/// The memory of one VM. See the [module](self).
///
/// ```
/// use cvm_memory::addr::{GfnRange, Gpa};
/// use cvm_memory::convert::{Outcome, Request, State};
/// use cvm_memory::memory::CvmMemory;
/// use cvm_memory::soft::SoftVm;
/// use std::sync::Arc;
///
/// let memory = CvmMemory::builder().ram(0, 64 << 20).build(Arc::new(SoftVm::software_protected()))?;
///
/// // The guest asks for a buffer that the host may see.
/// let buffer = GfnRange::from_bytes(0x20_0000, 0x10_0000)?;
/// let outcome = memory.convert(&Request { range: buffer, to: State::Shared })?;
/// assert!(matches!(outcome, Outcome::Converted { pages: 256 }));
///
/// // Now the host can fill it; the rest of the memory it cannot reach.
/// memory.write(Gpa(0x20_0000), b"hello, guest")?;
/// assert!(memory.write(Gpa(0x1f_fffc), b"hello, guest").is_err());
///
/// println!("{}", memory.map());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CvmMemory {
    converter: Converter,
    /// Frames that have been memory at some time: their state is remembered, however slots come and go.
    known: PageSet,
    initial: State,
    materialise: Materialise,
    capabilities: Capabilities,
    /// Held while slots are added or removed.
    editing: Mutex<Frames>,
    /// Keeps vCPUs out while slots are replaced.
    gate: Arc<Gate>,
    /// Who keeps dirty bits.
    harvest: Mutex<Option<Arc<dyn Harvest>>>,
    /// The slots as they are about to be, while they are being replaced.
    intended: ArcSwapOption<SlotTable>,
    /// Counts the beginning and the end of each replacement.
    changes: AtomicU64,
}

/// What there is at a guest frame, and in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageInfo {
    /// The state that the guest has been told.
    pub state: State,
    /// The slot.
    pub slot: SlotId,
    /// Address of its shared memory in this process.
    pub hva: u64,
    /// Its private page: the file and the byte offset in it.
    pub file: Option<(FileId, u64)>,
}

/// Looks frames up without locks or allocation, in two or three loads. Each thread has its own.
///
/// ```
/// # use cvm_memory::{addr::Gfn, convert::State, memory::CvmMemory, soft::SoftVm};
/// # let memory = CvmMemory::builder().ram(0, 4 << 20).build(std::sync::Arc::new(SoftVm::software_protected()))?;
/// let mut reader = memory.reader();
/// let page = reader.lookup(Gfn::ZERO).expect("memory");
/// assert_eq!(page.state, State::Private);
/// assert!(reader.lookup(Gfn::containing(4 << 20)).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Reader<'a> {
    space: Cache<&'a ArcSwap<Space>, Arc<Space>>,
    declared: &'a Pages,
}

impl Reader<'_> {
    /// What there is at `gfn`, or `None` if it is not memory.
    pub fn lookup(&mut self, gfn: Gfn) -> Option<PageInfo> {
        let location = self.space.load().layout().table().locate(gfn)?;
        Some(PageInfo {
            state: State::from_private(self.declared.contains(gfn)),
            slot: location.slot.id,
            hva: location.hva,
            file: location.file.map(|(file, page)| (file, page.start_byte())),
        })
    }
}

/// Memory held, in bytes; `None` where this kernel cannot tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resident {
    /// In guest_memfd files.
    pub private_bytes: Option<u64>,
    /// In shared mappings.
    pub shared_bytes: Option<u64>,
}

/// Counters and sizes of one VM's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// What was asked for.
    pub requests: Requests,
    /// System calls issued.
    pub issued: Syscalls,
    /// System calls that a backend without a record, page by page, would have issued.
    pub naive: Syscalls,
    /// Bytes declared private.
    pub private_bytes: u64,
    /// Bytes left to be freed by a deferred discard.
    pub deferred_bytes: u64,
    /// Memory held.
    pub resident: Resident,
}

impl CvmMemory {
    /// Starts describing a VM's memory.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The kind of VM.
    pub fn platform(&self) -> Platform {
        self.converter.hypervisor().platform()
    }

    /// What the VM offers.
    pub const fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Page state and everything that changes it, for the expert.
    pub const fn converter(&self) -> &Converter {
        &self.converter
    }

    /// The slots and the memory behind them, as they are now.
    pub fn space(&self) -> Guard<Arc<Space>> {
        self.converter.space()
    }

    /// A reader for one thread's look-ups.
    pub fn reader(&self) -> Reader<'_> {
        Reader { space: Cache::new(self.converter.space_cell()), declared: self.converter.declared() }
    }

    /// The state of a frame, or `None` if it is not memory.
    pub fn state(&self, gfn: Gfn) -> Option<State> {
        self.space().layout().table().lookup(gfn)?;
        Some(State::from_private(self.converter.declared().contains(gfn)))
    }

    /// Converts pages. See [`Converter::convert`]. `Ok` is not success: the [`Outcome`] says.
    ///
    /// # Errors
    /// [`ConvertError`]: refused before any effect.
    pub fn convert(&self, request: &Request) -> Result<Outcome, ConvertError> {
        self.converter.convert(request)
    }

    /// Frees up to `budget` bytes that deferred discards have left; returns the bytes freed.
    ///
    /// # Errors
    /// [`StepError`] of the first piece that could not be freed.
    pub fn trim(&self, budget: u64) -> Result<u64, StepError> {
        self.converter.trim(budget)
    }

    /// Registers a listener for shared memory, and maps for it what is shared.
    ///
    /// # Errors
    /// [`AddListenerError`]: it is not registered, and nothing is mapped.
    pub fn add_listener(&self, listener: &Arc<dyn Listener>) -> Result<ListenerId, AddListenerError> {
        self.converter.add_listener(listener)
    }

    /// Takes a listener out, and unmaps for it what is shared.
    ///
    /// # Errors
    /// [`LockError::Reentrant`] from within a conversion.
    pub fn remove_listener(&self, id: ListenerId) -> Result<(), LockError> {
        self.converter.remove_listener(id)
    }

    /// Pins shared memory for a device access.
    ///
    /// # Errors
    /// [`PinError`].
    pub fn pin(&self, gfns: GfnRange) -> Result<Pin<'_>, PinError> {
        self.converter.pin(gfns)
    }

    /// Allocates and maps private memory ahead of use: what of `gfns` is declared private. See [`prefault`].
    ///
    /// # Errors
    /// [`PrefaultFailed`].
    pub fn prefault(
        &self,
        ranges: &[GfnRange],
        vcpus: &mut [&mut dyn Vcpu],
        options: &PrefaultOptions,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Prefaulted, PrefaultFailed> {
        if options.map && !vcpus.is_empty() && !self.capabilities.pre_fault {
            let hypervisor: &dyn Hypervisor = self.converter.hypervisor().as_ref();
            Capabilities::require(hypervisor, Cap::PRE_FAULT_MEMORY, 1)?;
        }
        Ok(prefault(&self.converter, ranges, vcpus, options, progress)?)
    }

    /// The runs of memory with a private side, as prefaulting everything would take them.
    pub fn private_memory(&self) -> Vec<GfnRange> {
        let all = GfnRange::new(Gfn::ZERO, Gfn::MAX).unwrap_or(GfnRange::empty_at(Gfn::ZERO));
        crate::addr::merge_adjacent(self.space().private_pieces(all).into_iter().map(|piece| piece.gfns))
    }

    /// Counters and sizes now.
    pub fn statistics(&self) -> Statistics {
        let counters = self.converter.counters();
        let memory = self.private_memory();
        let private = memory.iter().map(|gfns| self.converter.declared().count(*gfns)).fold(0, u64::saturating_add);
        Statistics {
            requests: counters.requests.snapshot(),
            issued: counters.issued.snapshot(),
            naive: counters.naive.snapshot(),
            private_bytes: private.saturating_mul(PAGE_SIZE),
            deferred_bytes: self.converter.deferred_bytes(),
            resident: self.resident(),
        }
    }

    /// Memory held by both sides: a page that is held on both counts twice.
    pub fn resident(&self) -> Resident {
        let space = self.space();
        let sum = |sum: Option<u64>, bytes: Option<u64>| sum?.checked_add(bytes?);
        Resident {
            private_bytes: space.files().map(|file| file.resident_bytes()).fold(Some(0), sum),
            shared_bytes: space.shared_backings().iter().map(|shared| shared.resident_bytes()).fold(Some(0), sum),
        }
    }

    /// The gate that vCPUs pass around `KVM_RUN`.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Has `harvest` asked for dirty bits before a dirty log goes; it is told of the memory that there is, and of the slots.
    /// [`Builder::harvest`] does that from the beginning.
    ///
    /// # Errors
    /// What it answers to the memory; `EDEADLK` from a listener. The one before stays then.
    pub fn set_harvest(&self, harvest: Option<Arc<dyn Harvest>>) -> Result<(), Errno> {
        let _editing = self.editing().map_err(|_| Errno::EDEADLK)?;
        // Should it want to edit when it is told, it is refused, and does not wait for this.
        let _guard = self.converter.hold_all().map_err(|_| Errno::EDEADLK)?;
        let space = self.converter.space();
        if let Some(harvest) = &harvest {
            // Each owner of a mapping, for the others may go.
            space.shared_slices().try_for_each(|slice| harvest.memory(&slice.backing))?;
        }
        *self.harvest.lock().unwrap_or_else(PoisonError::into_inner) = harvest;
        self.tell_edited();
        Ok(())
    }

    /// That the record reaches as far as `slot`, which is about to come: memory that can be private has a state, and where a hole
    /// is remembered as a device, all memory leaves one in which it must not be found.
    fn check_record(&self, slot: &Memslot, space: &Space) -> Result<(), PageSetError> {
        if space.is_convertible(slot) || self.platform().hazards.holes_stick {
            self.known.admits(slot.gfns)
        } else {
            Ok(())
        }
    }

    /// Who keeps dirty bits is told of the slots that there are now.
    fn tell_edited(&self) {
        if let Some(harvester) = self.harvester() {
            harvester.edited(self.converter.space().layout());
        }
    }

    fn harvester(&self) -> Option<Arc<dyn Harvest>> {
        self.harvest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether `gfn` is memory, or is about to be: with the flags of its slot.
    pub(crate) fn memory_in_flux(&self, gfn: Gfn) -> Option<SlotFlags> {
        let now = self.space().layout().table().lookup(gfn).map(|slot| slot.flags);
        now.or_else(|| self.intended.load().as_ref()?.lookup(gfn).map(|slot| slot.flags))
    }

    /// A number that changes whenever slots begin or end to be replaced.
    pub(crate) fn layout_changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Keeps other edits out. A listener that asked for one would wait for itself.
    fn editing(&self) -> Result<MutexGuard<'_, Frames>, LockError> {
        self.converter.refuse_reentry()?;
        Ok(self.editing.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for CvmMemory {
    /// Slots first, last one first; files and mappings follow with the fields, and the VM last. A slot whose file has
    /// gone would leave its guest without memory, and one whose mapping has gone would let the guest at whatever comes
    /// to lie there.
    ///
    /// The attributes of pages stay as they are: they go with the VM.
    fn drop(&mut self) {
        self.remove_all_slots();
    }
}

/// Prefaulting did not start, or stopped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PrefaultFailed {
    /// The VM cannot map ahead.
    #[error(transparent)]
    Missing(#[from] MissingCapability),
    /// It stopped.
    #[error(transparent)]
    Stopped(#[from] PrefaultError),
}
