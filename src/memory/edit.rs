//! Editing the memory of a running VM: what may be asked for.
//!
//! An [`Edit`] is a [`Draft`] with the memory behind it. Operations name guest addresses, in bytes; which slots there are
//! and what their ids are follows from the plan. Carrying it out is in `commit`.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use nix::errno::Errno;

use crate::addr::{AddrError, Gfn, GfnRange, PAGE_SHIFT};
use crate::backing::{SharedBacking, SharedSlice, Space};
use crate::convert::{LockError, StepError};
use crate::edit::{Draft, Hazard, Operation, PlanError, Refused, Region, Step};
use crate::gate::GateError;
use crate::gmem::{FileId, GuestMemfd};
use crate::layout::{Bindings, Layout, LayoutError, Memslot, SlotFlags, SlotId};
use crate::page_set::PageSetError;

use super::{CvmMemory, SlotSpec};

/// Why an edit was not carried out. Unless it says otherwise, everything is as it was.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// Address or size is empty, unaligned or beyond the top.
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
    /// An operation makes no sense.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// KVM would refuse a slot.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// It would do harm.
    #[error(transparent)]
    Hazard(#[from] Hazard),
    /// The mapping is shorter than what is to be made of it, or nobody has brought it. What lies behind it in this process is
    /// never shown to the guest.
    #[error("{size:#x} bytes at gfns {gfns} exceed the shared memory's {available:#x} from offset {offset:#x}")]
    SharedTooShort {
        /// The frames.
        gfns: GfnRange,
        /// In bytes.
        size: u64,
        /// In bytes.
        offset: u64,
        /// In bytes.
        available: u64,
    },
    /// Slots would have shared memory in common, and one of them can change state: what a conversion there frees would be missing
    /// in the other.
    #[error("slots {one} and {other} would have shared memory in common")]
    SharedTwice {
        /// A slot.
        one: SlotId,
        /// Another one.
        other: SlotId,
    },
    /// Frames of memory that never is private are private. Convert them first.
    #[error("memory without a private side at gfns {gfns}, which are private")]
    StillPrivate {
        /// The first such frames.
        gfns: GfnRange,
    },
    /// A dirty log would go or move, and [nobody](CvmMemory::set_harvest) keeps its bits.
    #[error("nobody harvests the dirty log of slot {slot:#x}, which would go or move")]
    NobodyHarvests {
        /// The slot, as KVM numbers it.
        slot: u32,
    },
    /// The bits of a dirty log that would go could not be had.
    #[error("harvest the dirty log of slot {slot:#x}")]
    Harvest {
        /// The slot, as KVM numbers it.
        slot: u32,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// The record of page state does not reach so far: see [`Builder::address_limit`](super::Builder::address_limit).
    #[error("memory at gfns {gfns}")]
    Record {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        error: PageSetError,
    },
    /// A conversion is in the way, a device access that does not end, or this is called from a listener.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// vCPUs did not leave the guest, or somebody keeps the gate closed, or this thread is in the guest or does that.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// A step around the slots failed: an attribute, a listener, memory to be freed first.
    #[error("memory at gfns {gfns}")]
    Step {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        error: StepError,
    },
    /// KVM refused a slot that should have been fine. The old layout is back.
    #[error("{kind} slot {slot:#x}, gfns {gfns}")]
    Kvm {
        /// What was being done.
        kind: &'static str,
        /// The slot, as KVM numbers it.
        slot: u32,
        /// Its frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// KVM refused a slot, and then did not take back everything that had been done before: `left` is what it did not, in
    /// the order in which it was done. The layout is the old one but for that, and so are record and listeners.
    #[error("{kind} slot {slot:#x}, gfns {gfns}; {} steps could not be taken back", left.len())]
    Broken {
        /// What was being done.
        kind: &'static str,
        /// The slot, as KVM numbers it.
        slot: u32,
        /// Its frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        errno: Errno,
        /// What is left.
        left: Vec<(Step, Errno)>,
    },
}

impl From<LayoutError> for EditError {
    fn from(error: LayoutError) -> Self {
        Self::Plan(PlanError::Layout(error))
    }
}

/// An edit of a VM's memory, until it is [committed](Self::commit); dropped, it never was.
///
/// ```
/// use cvm_memory::memory::{CommitOptions, CvmMemory};
/// use cvm_memory::soft::SoftVm;
/// use std::sync::Arc;
///
/// let memory = CvmMemory::builder().ram(0, 4 << 20).build(Arc::new(SoftVm::software_protected()))?;
/// let mut edit = memory.edit();
/// edit.name("vga")?.punch_hole(0xa0000, 0x20000)?;
/// let done = edit.commit(&CommitOptions::default())?;
/// assert_eq!(done.steps.len(), 3);
/// assert!(memory.state(cvm_memory::addr::Gfn::containing(0xa0000)).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct Edit<'a> {
    pub(super) memory: &'a CvmMemory,
    /// What the draft was made from.
    pub(super) base: Arc<Space>,
    pub(super) draft: Draft,
    /// Memory that the operations bring.
    pub(super) backings: Vec<Arc<dyn SharedBacking>>,
    pub(super) files: Vec<Arc<GuestMemfd>>,
}

impl CvmMemory {
    /// Begins an edit. Any number may be under way; each is committed on the layout as it is by then.
    ///
    /// With vCPUs running, each of their threads has to pass the [gate](Self::gate) around `KVM_RUN`: one that does not is not
    /// kept out while slots are replaced.
    pub fn edit(&self) -> Edit<'_> {
        let base = Arc::clone(&self.space());
        let draft = Draft::new(base.layout(), 0, mapping_in(&base));
        Edit { memory: self, base, draft, backings: Vec::new(), files: Vec::new() }
    }
}

/// In which mapping the memory of a slot of `space` lies.
pub(super) fn mapping_in(space: &Space) -> impl Fn(&Memslot) -> u64 {
    |slot| space.shared(slot.id).map_or(slot.hva, |slice| slice.backing.hva())
}

/// That all memory of `draft` lies in the mapping that it names. What comes behind that in this process is not the guest's.
pub(super) fn check_mapped(draft: &Draft, mappings: &[Arc<dyn SharedBacking>]) -> Result<(), EditError> {
    for Region { gfns, hva, mapping, .. } in draft.regions() {
        let named = mappings.iter().skip(mappings.partition_point(|backing| backing.hva() < mapping));
        let mut named = named.take_while(|backing| backing.hva() == mapping).peekable();
        let first = named.peek().copied();
        if !named.any(|backing| slice_in(backing, hva, gfns).is_some()) {
            return Err(too_short(gfns, hva, first));
        }
    }
    Ok(())
}

/// The memory of `gfns` that lies at `hva`, if all of it is in `backing`.
fn slice_in(backing: &Arc<dyn SharedBacking>, hva: u64, gfns: GfnRange) -> Option<SharedSlice> {
    let slice = SharedSlice { backing: Arc::clone(backing), offset: hva.checked_sub(backing.hva())? };
    slice.holds(gfns.bytes()).then_some(slice)
}

fn too_short(gfns: GfnRange, hva: u64, backing: Option<&Arc<dyn SharedBacking>>) -> EditError {
    let (start, available) = backing.map_or((hva, 0), |backing| (backing.hva(), backing.size()));
    EditError::SharedTooShort { gfns, size: gfns.bytes(), offset: hva.saturating_sub(start), available }
}

fn frames(gpa: u64, size: u64) -> Result<GfnRange, EditError> {
    GfnRange::from_bytes(gpa, size).map_err(|error| EditError::Range { gpa, size, error })
}

fn frame(gpa: u64) -> Result<Gfn, EditError> {
    Ok(frames(gpa, 1 << PAGE_SHIFT)?.start())
}

/// The mapping has to go on for as long as the frames do.
fn whole(slice: &SharedSlice, gfns: GfnRange) -> Result<(), EditError> {
    let (size, offset, available) = (gfns.bytes(), slice.offset, slice.backing.size());
    if slice.holds(size) { Ok(()) } else { Err(EditError::SharedTooShort { gfns, size, offset, available }) }
}

impl<'a> Edit<'a> {
    /// What the operations that follow are called in messages.
    ///
    /// # Errors
    /// Never; so that it can stand in a chain.
    pub fn name(&mut self, name: &str) -> Result<&mut Self, EditError> {
        self.draft.name(name);
        Ok(self)
    }

    /// The layout as it would be.
    pub const fn draft(&self) -> &Draft {
        &self.draft
    }

    fn apply(&mut self, operation: Operation) -> Result<&mut Self, EditError> {
        self.draft.apply(operation)?;
        Ok(self)
    }

    /// Adds memory. Its id is not looked at: the plan chooses it.
    ///
    /// # Errors
    /// [`EditError`]; the edit is as it was. So for all operations.
    pub fn create(&mut self, spec: SlotSpec) -> Result<&mut Self, EditError> {
        let region = self.bring(spec)?;
        self.apply(Operation::Create(region))
    }

    /// Memory that an operation brings, as a region.
    fn bring(&mut self, spec: SlotSpec) -> Result<Region, EditError> {
        let gfns = frames(spec.gpa, spec.size)?;
        whole(&spec.shared, gfns)?;
        let region = spec.region(gfns);
        self.backings.push(spec.shared.backing);
        self.files.extend(spec.private.map(|(file, _)| file));
        Ok(region)
    }

    /// Takes whole slots away.
    ///
    /// # Errors
    /// As all operations.
    pub fn delete(&mut self, gpa: u64, size: u64) -> Result<&mut Self, EditError> {
        self.apply(Operation::Delete(frames(gpa, size)?))
    }

    /// Takes away what is at the frames of a slot that was there before the edit.
    ///
    /// # Errors
    /// As all operations; also if there was no such slot.
    pub fn delete_slot(&mut self, id: SlotId) -> Result<&mut Self, EditError> {
        let gfns = self.draft.slot(id)?;
        self.apply(Operation::Delete(gfns))
    }

    /// Takes memory away, whichever slots it is part of. For a device to be there, see
    /// [`leave_to_devices`](CvmMemory::leave_to_devices).
    ///
    /// # Errors
    /// As all operations.
    pub fn punch_hole(&mut self, gpa: u64, size: u64) -> Result<&mut Self, EditError> {
        self.apply(Operation::PunchHole(frames(gpa, size)?))
    }

    /// Has memory appear at `to` instead.
    ///
    /// # Errors
    /// As all operations.
    pub fn move_to(&mut self, gpa: u64, size: u64, to: u64) -> Result<&mut Self, EditError> {
        self.apply(Operation::Move { from: frames(gpa, size)?, to: frame(to)? })
    }

    /// Sets the flags of memory: `LOG_DIRTY` and `READONLY`.
    ///
    /// # Errors
    /// As all operations.
    pub fn set_flags(&mut self, gpa: u64, size: u64, flags: SlotFlags) -> Result<&mut Self, EditError> {
        self.apply(Operation::SetFlags(frames(gpa, size)?, flags))
    }

    /// Has a slot begin at `gpa`.
    ///
    /// # Errors
    /// As all operations.
    pub fn split(&mut self, gpa: u64) -> Result<&mut Self, EditError> {
        self.apply(Operation::Split(frame(gpa)?))
    }

    /// Makes one slot of memory that continues.
    ///
    /// # Errors
    /// As all operations.
    pub fn merge(&mut self, gpa: u64, size: u64) -> Result<&mut Self, EditError> {
        self.apply(Operation::Merge(frames(gpa, size)?))
    }

    /// Shortens the slot that covers `gpa` to `size` bytes.
    ///
    /// # Errors
    /// As all operations.
    pub fn truncate(&mut self, gpa: u64, size: u64) -> Result<&mut Self, EditError> {
        let (of, pages) = (frame(gpa)?, frames(0, size)?.pages());
        self.apply(Operation::Truncate { of, pages })
    }

    /// Lengthens the memory that covers `gpa` to `size` bytes: with what follows in its mapping, and in its file. Whether these
    /// are long enough is seen when the edit is committed.
    ///
    /// # Errors
    /// As all operations.
    pub fn grow(&mut self, gpa: u64, size: u64) -> Result<&mut Self, EditError> {
        let (of, pages) = (frame(gpa)?, frames(0, size)?.pages());
        self.apply(Operation::Grow { of, pages })
    }

    /// Describes all memory anew. What is as it was does not change, except that [`Prefer::FewSlots`](crate::edit::Prefer) makes one
    /// slot of neighbours that continue.
    ///
    /// # Errors
    /// As all operations.
    pub fn replace_all(&mut self, specs: Vec<SlotSpec>) -> Result<&mut Self, EditError> {
        let regions = specs.into_iter().map(|spec| self.bring(spec)).collect::<Result<_, _>>()?;
        self.apply(Operation::ReplaceAll(regions))
    }

    /// Applies operations in order, all of them or none: for many at once, on memory that the edit knows. Whether it does is
    /// seen when it is committed: a region names the mapping that its shared memory lies in.
    ///
    /// # Errors
    /// As all operations.
    pub fn apply_all(&mut self, operations: Vec<Operation>) -> Result<&mut Self, EditError> {
        self.draft.apply_all(operations)?;
        Ok(self)
    }

    /// Begins an edit within this one, which counts once it is committed to it.
    pub fn begin(&mut self) -> NestedEdit<'_, 'a> {
        NestedEdit { edit: self.clone(), outer: self }
    }

    /// The layout `space` has, with the files of this edit.
    pub(super) fn layout_of(&self, space: &Space) -> Result<Layout, LayoutError> {
        let mut layout = space.layout().clone();
        for file in &self.files {
            if layout.bindings(file.id()).is_none() {
                layout.register_file(file.id(), file.pages().pages())?;
            }
        }
        Ok(layout)
    }

    /// Has `layout` forget the files of this edit that no slot came to need, and that the VM does not have.
    pub(super) fn let_go_unused(&self, layout: &mut Layout, space: &Space) {
        for id in self.files.iter().map(|file| file.id()).filter(|id| space.file(*id).is_none()) {
            if layout.bindings(id).is_some_and(Bindings::is_empty) {
                layout.close_file(id);
            }
        }
    }

    /// The mappings that the VM has and those that this edit brings, ascending.
    pub(super) fn mappings(&self, space: &Space) -> Vec<Arc<dyn SharedBacking>> {
        let mut all: Vec<_> = self.backings.iter().chain(space.shared_backings()).cloned().collect();
        all.sort_by_key(|backing| backing.hva());
        all
    }

    /// The memory of a slot to be: a slice of one of `mappings`.
    pub(super) fn slice(slot: &Memslot, mappings: &[Arc<dyn SharedBacking>]) -> Result<SharedSlice, EditError> {
        let below = mappings.get(..mappings.partition_point(|backing| backing.hva() <= slot.hva)).unwrap_or_default();
        let found = below.iter().rev().find_map(|backing| slice_in(backing, slot.hva, slot.gfns));
        found.ok_or_else(|| too_short(slot.gfns, slot.hva, below.last()))
    }

    /// A file that the VM has, or that this edit brings.
    pub(super) fn file<'s>(&'s self, id: FileId, space: &'s Space) -> Option<&'s Arc<GuestMemfd>> {
        space.file(id).or_else(|| self.files.iter().find(|file| file.id() == id))
    }
}

/// An edit within an edit.
#[derive(Debug)]
#[must_use]
pub struct NestedEdit<'o, 'a> {
    outer: &'o mut Edit<'a>,
    edit: Edit<'a>,
}

impl NestedEdit<'_, '_> {
    /// Makes it part of the edit in which it began. Nothing happens to the VM before that is committed itself.
    pub fn commit(self) {
        *self.outer = self.edit;
    }
}

impl<'a> Deref for NestedEdit<'_, 'a> {
    type Target = Edit<'a>;
    fn deref(&self) -> &Edit<'a> {
        &self.edit
    }
}

impl<'a> DerefMut for NestedEdit<'_, 'a> {
    fn deref_mut(&mut self) -> &mut Edit<'a> {
        &mut self.edit
    }
}
