//! What Linux 7.3 answers, straight from the contract: every rule page by page, in the contract's order and nothing else.
//!
//! It is slow, and there is no mechanism in it: no translations that could be stale, no locks, no interval arithmetic. What a
//! guest sees is looked up anew for every page of every access. It shares no code with the software KVM or with the
//! library, so that a mistake would have to be made twice.
//!
//! It is NOT a KVM: it has no file descriptors and no memory of this process, only what scenarios name; and nothing happens
//! at the same time as anything else, so there are no retries (`EINTR`, `EAGAIN`).
//!
//! The parts, with the sections of the contract they mirror:
//! - `slots`: memslots (2.1 order of errors, 2.2 classification, 3.3 binding);
//! - `files`: `guest_memfd` (3.1 creation, 3.2 fallocate, 3.3 close, 3.7 mmap) and memory of this process;
//! - `access`: what an access of a guest meets (5.2 memory faults, 5.5 missing slots, 5.6 fetches, 5.4 hypercalls) and
//!   prefaults (6).

mod access;
mod files;
mod slots;

use std::collections::{BTreeMap, BTreeSet};

use cvm_memory_testkit::KvmGuest;
use nix::errno::Errno;

use crate::guard;
use crate::machine::{Machine, Shape};
use crate::observation::Observation;
use crate::scenario::{Area, File, Kind, LOG_PAGES, Operation};
use files::{Inode, Place};
use slots::{Slot, SlotKey};

const PAGE: u64 = 4096;

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64 bits")
}

/// An interpreter of the contract. See the [module](self).
#[derive(Debug)]
pub struct Reference {
    shape: Shape,
    /// The memslots.
    slots: BTreeMap<SlotKey, Slot>,
    /// The gfns whose attribute is PRIVATE (section 4: at first, none is).
    private: BTreeSet<u64>,
    /// All files that there ever were, by number.
    inodes: Vec<Inode>,
    /// Those that are open, by name.
    open: BTreeMap<File, usize>,
    /// Those that are mapped to their area.
    mapped: BTreeSet<File>,
    /// What is in memory; what is not here is zero.
    contents: BTreeMap<Place, Box<[u8; 4096]>>,
    /// `KVM_CAP_EXIT_HYPERCALL`: the hypercalls that are exits, a bit for each.
    exit_hypercall: u64,
    /// Whether there is a dirty ring.
    ring: bool,
    /// 2.4: how often the slots that guests see have changed.
    generation: u64,
    /// Pages that were found to be MMIO, and in which generation.
    mmio: BTreeMap<u64, u64>,
    /// Whether this KVM emulates every access.
    emulates: bool,
}

impl Reference {
    /// A new VM with guests that have done nothing yet.
    pub fn new(shape: Shape) -> Self {
        let own = (0..shape.vcpus).map(|vcpu| {
            let own = KvmGuest::own_memory(vcpu.into());
            let slot = Slot {
                first_gfn: own.gpa / PAGE,
                pages: own.size / PAGE,
                flags: 0,
                hva: (Area::Void, 0),
                file: None,
                gmem_only: false,
            };
            (SlotKey::of(own.slot), slot)
        });
        Self {
            shape,
            slots: own.collect(),
            private: BTreeSet::new(),
            inodes: Vec::new(),
            open: BTreeMap::new(),
            mapped: BTreeSet::new(),
            contents: BTreeMap::new(),
            exit_hypercall: 0,
            ring: false,
            generation: 0,
            mmio: BTreeMap::new(),
            emulates: false,
        }
    }

    /// Makes it a KVM whose guests' accesses are all emulated: none is made by the processor.
    #[must_use]
    pub const fn emulating(mut self) -> Self {
        self.emulates = true;
        self
    }

    /// Section 1: `has_private_mem`.
    fn has_private_memory(&self) -> bool {
        matches!(self.shape.kind, Kind::Protected | Kind::Tagged)
    }

    /// Section 1: `has_protected_state`.
    fn has_protected_state(&self) -> bool {
        self.shape.kind == Kind::Tagged
    }

    /// Section 4: `KVM_SET_MEMORY_ATTRIBUTES`.
    fn attributes(&mut self, gpa: u64, size: u64, attributes: u64, flags: u64) -> Result<(), Errno> {
        const PRIVATE: u64 = 8;
        if flags != 0 {
            return Err(Errno::EINVAL);
        }
        let supported = if self.has_private_memory() { PRIVATE } else { 0 };
        if attributes & !supported != 0 {
            return Err(Errno::EINVAL);
        }
        if size == 0 || gpa.checked_add(size).is_none() {
            return Err(Errno::EINVAL);
        }
        if !gpa.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) {
            return Err(Errno::EINVAL);
        }
        for gfn in gpa / PAGE..(gpa + size) / PAGE {
            if attributes == PRIVATE {
                self.private.insert(gfn);
            } else {
                self.private.remove(&gfn);
            }
        }
        Ok(())
    }

    /// Section 1, the notes of the capabilities that can be enabled; section 9.2 for the ring. All others are `EINVAL`.
    fn enable_cap(&mut self, cap: u32, arg: u64) -> Result<(), Errno> {
        const MANUAL_DIRTY_LOG_PROTECT2: u32 = 168;
        const DIRTY_LOG_RING: u32 = 192;
        const EXIT_HYPERCALL: u32 = 201;
        const EXIT_ON_EMULATION_FAILURE: u32 = 204;
        const DISABLE_QUIRKS2: u32 = 213;
        const SLOT_ZAP_ALL: u64 = 1 << 7;
        const DIRTY_LOG_RING_ACQ_REL: u32 = 223;
        match cap {
            MANUAL_DIRTY_LOG_PROTECT2 if matches!(arg, 0 | 1 | 3) => Ok(()),
            EXIT_HYPERCALL if arg & !0x1000 == 0 => {
                self.exit_hypercall = arg;
                Ok(())
            }
            DISABLE_QUIRKS2 if arg & !SLOT_ZAP_ALL == 0 => Ok(()),
            EXIT_ON_EMULATION_FAILURE if matches!(arg, 0 | 1) => Ok(()),
            DIRTY_LOG_RING | DIRTY_LOG_RING_ACQ_REL => {
                let bytes = arg & u64::from(u32::MAX);
                if !bytes.is_power_of_two() || bytes < 4096 {
                    Err(Errno::EINVAL)
                } else if bytes > 1 << 20 {
                    Err(Errno::E2BIG)
                } else if self.ring || self.shape.vcpus > 0 {
                    Err(Errno::EINVAL)
                } else {
                    self.ring = true;
                    Ok(())
                }
            }
            _ => Err(Errno::EINVAL),
        }
    }
}

impl Machine for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn play(&mut self, operation: &Operation) -> Observation {
        if let Some(reason) = guard::refuse(self.shape, operation) {
            return Observation::Skipped(reason);
        }
        let answer = match *operation {
            Operation::Create { file, size, flags } => self.create(file, size, flags),
            Operation::Close { file } => self.close(file),
            Operation::Map { file } => self.map(file),
            Operation::Region { slot, flags, gpa, size, hva, file, offset } => {
                self.region(slot, flags, gpa, size, hva, file, offset)
            }
            Operation::Attributes { gpa, size, attributes, flags } => self.attributes(gpa, size, attributes, flags),
            Operation::Fallocate { file, mode, offset, len } => self.fallocate(file, mode, offset, len),
            Operation::EnableCap { cap, arg } => self.enable_cap(cap, arg),
            Operation::GetDirty { slot } => {
                return match self.dirty_log(slot) {
                    // Copied as far as there is room.
                    Ok(slot) if slot.pages > LOG_PAGES => Observation::Dirty(Err(Errno::EFAULT)),
                    Ok(_) => Observation::Unknown,
                    Err(errno) => Observation::Dirty(Err(errno)),
                };
            }
            Operation::ClearDirty { slot, first, pages, .. } => self.clear_dirty(slot, first, pages),
            Operation::HostFill { at, len, byte } => self.host_fill(at, len, byte),
            Operation::HostRead { at, len } => return Observation::Bytes(self.host_read(at, len)),
            Operation::Prefault { gpa, size, flags, .. } => return self.prefault(gpa, size, flags),
            Operation::Load { gpa, len, private, .. } => return self.load(gpa, len, private),
            Operation::Store { gpa, len, value, private, .. } => return self.store(gpa, len, value, private),
            Operation::Fetch { gpa, private, .. } => return self.fetch(gpa, private),
            Operation::Dump { gpa, pages, private, .. } => return self.dump(gpa, pages, private),
            Operation::MapGpaRange { gpa, pages, attributes, answer, .. } => {
                return self.map_gpa_range(gpa, pages, attributes, answer);
            }
            Operation::Pvalidate { .. }
            | Operation::Psc { .. }
            | Operation::PscPage { .. }
            | Operation::Vmgexit { .. } => return Observation::Unknown,
        };
        Observation::Call(answer)
    }
}
