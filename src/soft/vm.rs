//! The state of one VM, and the invalidations that every kind of change to it shares.
//!
//! Mirrors `struct kvm`, `kvm_gmem_invalidate_start()`, `kvm_gmem_invalidate_end()` and
//! `kvm_vm_set_mem_attributes()`.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use nix::errno::Errno;

use super::arch::Arch;
use super::attributes::{Attributes, Flavour, Invalidation};
use super::counters::{Call, Counters, LiveCounters};
use super::dirty_ring::Rings;
use super::file::GmemFile;
use super::memslots::Memslots;
use super::mmu::Mmu;
use super::sync::{Srcu, lock, read, write};
use crate::addr::{FileRange, Gfn, GfnRange};
use crate::hypervisor::{MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes};
use crate::layout::{Clip, SlotId};
use crate::sync::blocking::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Something that happened inside the software KVM, told to an observer while it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A slot was replaced by its INVALID copy, and every vCPU has noticed. Nothing is zapped yet.
    SlotInvalid(SlotId),
    /// An invalidation has taken mappings away; what it is for has not been changed yet.
    Unmapped {
        /// Frames whose mappings are gone.
        gfns: GfnRange,
        /// Which of them.
        flavour: Flavour,
        /// Frames that cannot be mapped until the invalidation ends.
        hull: GfnRange,
    },
    /// An invalidation has ended, with this sequence number.
    Invalidated(u64),
}

/// Called with each [`Event`], by the thread that makes the change.
pub(super) type Observer = Arc<dyn Fn(&Event) + Send + Sync>;

pub(super) struct Vm {
    arch: Arc<dyn Arch>,
    dead: AtomicBool,
    slots_lock: Mutex<()>,
    pub(super) srcu: Srcu,
    slots: RwLock<Memslots>,
    attributes: RwLock<Attributes>,
    mmu: RwLock<Mmu>,
    /// Every file of this VM, by device and inode.
    files: Mutex<HashMap<(u64, u64), Weak<GmemFile>>>,
    observer: RwLock<Option<Observer>>,
    counters: LiveCounters,
    vcpus: AtomicU32,
    /// Address bits of the host's processor.
    pub(super) physical_bits: AtomicU32,
    /// `KVM_CAP_EXIT_HYPERCALL`.
    pub(super) exit_hypercall: AtomicU64,
    /// `KVM_CAP_EXIT_ON_EMULATION_FAILURE`.
    pub(super) exit_on_emulation_failure: AtomicBool,
    /// Dirty rings, if they are enabled.
    pub(super) rings: Rings,
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    pub(super) manual_protect: AtomicU64,
    /// `KVM_X86_QUIRK_SLOT_ZAP_ALL`; on unless disabled.
    pub(super) slot_zap_all_disabled: AtomicBool,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("arch", &self.arch).field("dead", &self.dead).finish_non_exhaustive()
    }
}

impl Vm {
    pub(super) fn new(arch: Arc<dyn Arch>) -> Self {
        let separate = arch.separate_private_root();
        Self {
            arch,
            dead: AtomicBool::new(false),
            slots_lock: Mutex::new(()),
            srcu: Srcu::default(),
            slots: RwLock::default(),
            attributes: RwLock::default(),
            mmu: RwLock::new(Mmu::new(separate)),
            files: Mutex::default(),
            observer: RwLock::new(None),
            counters: LiveCounters::default(),
            vcpus: AtomicU32::new(0),
            physical_bits: AtomicU32::new(52),
            exit_hypercall: AtomicU64::new(0),
            exit_on_emulation_failure: AtomicBool::new(false),
            rings: Rings::default(),
            manual_protect: AtomicU64::new(0),
            slot_zap_all_disabled: AtomicBool::new(false),
        }
    }

    pub(super) fn arch(&self) -> &dyn Arch {
        self.arch.as_ref()
    }

    /// `kvm_vm_dead()`.
    pub(super) fn kill(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// What every ioctl checks first.
    pub(super) fn check_alive(&self) -> Result<(), Errno> {
        if self.dead.load(Ordering::Acquire) { Err(Errno::EIO) } else { Ok(()) }
    }

    pub(super) fn count(&self, call: Call) {
        self.counters.count(call);
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters.snapshot()
    }

    pub(super) fn next_vcpu(&self) -> u32 {
        self.vcpus.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn vcpu_count(&self) -> u32 {
        self.vcpus.load(Ordering::Relaxed)
    }

    pub(super) fn observe(&self, observer: Option<Observer>) {
        *write(&self.observer) = observer;
    }

    /// Tells the observer, if there is one. No lock but `slots_lock` and a file's may be held.
    pub(super) fn tell(&self, event: Event) {
        let observer = read(&self.observer).clone();
        if let Some(observer) = observer {
            observer(&event);
        }
    }

    pub(super) fn private_memory(&self) -> bool {
        self.arch.platform().private_memory
    }

    pub(super) fn address_spaces(&self) -> u16 {
        if self.private_memory() { 1 } else { 2 }
    }

    pub(super) fn lock_slots(&self) -> MutexGuard<'_, ()> {
        lock(&self.slots_lock)
    }

    pub(super) fn slots(&self) -> RwLockReadGuard<'_, Memslots> {
        read(&self.slots)
    }

    /// For a swap only; under `slots_lock`.
    pub(super) fn slots_mut(&self) -> RwLockWriteGuard<'_, Memslots> {
        write(&self.slots)
    }

    pub(super) fn mmu(&self) -> RwLockReadGuard<'_, Mmu> {
        read(&self.mmu)
    }

    pub(super) fn mmu_mut(&self) -> RwLockWriteGuard<'_, Mmu> {
        write(&self.mmu)
    }

    pub(super) fn attributes(&self) -> RwLockReadGuard<'_, Attributes> {
        read(&self.attributes)
    }

    pub(super) fn is_private(&self, gfn: Gfn) -> bool {
        self.attributes().is_private(gfn)
    }

    pub(super) fn remember_file(&self, file: &Arc<GmemFile>) {
        lock(&self.files).insert(file.device_inode(), Arc::downgrade(file));
    }

    pub(super) fn forget_file(&self, file: &GmemFile) {
        lock(&self.files).remove(&file.device_inode());
    }

    /// The file of this VM that a descriptor number means: `EBADF` for none that is open, `EINVAL` for any other kind of
    /// file and for another VM's.
    pub(super) fn file_by_fd(&self, fd: RawFd) -> Result<Arc<GmemFile>, Errno> {
        let metadata = std::fs::metadata(format!("/proc/self/fd/{fd}")).map_err(|_| Errno::EBADF)?;
        let file = lock(&self.files).get(&(metadata.dev(), metadata.ino())).and_then(Weak::upgrade);
        match file {
            Some(file) if file.is_closing() => Err(Errno::EBADF),
            Some(file) => Ok(file),
            None => Err(Errno::EINVAL),
        }
    }

    /// `kvm_gmem_invalidate_start()`: what is bound of `range` is unmapped. Under the file's `invalidate_lock`. Returns
    /// whether an invalidation has begun, for [`invalidate_end`](Self::invalidate_end).
    pub(super) fn invalidate_start(&self, file: &GmemFile, range: FileRange) -> bool {
        let clips: Vec<Clip> = read(&file.bindings).clip(range).collect();
        if clips.is_empty() {
            return false;
        }
        let flavour = if file.starts_shared() { Flavour::Shared } else { Flavour::Private };
        let hull = {
            let mut mmu = self.mmu_mut();
            mmu.begin();
            for clip in &clips {
                mmu.add(clip.gfns);
                self.zap_slot(&mut mmu, clip.slot, clip.gfns, flavour);
            }
            mmu.hull()
        };
        for clip in clips {
            self.arch.invalidate_range(clip.gfns);
            self.tell(Event::Unmapped { gfns: clip.gfns, flavour, hull });
        }
        true
    }

    /// `kvm_gmem_invalidate_end()`.
    pub(super) fn invalidate_end(&self, started: bool) {
        if started {
            let seq = {
                let mut mmu = self.mmu_mut();
                mmu.end();
                mmu.seq()
            };
            self.tell(Event::Invalidated(seq));
        }
    }

    /// Unmaps frames of a slot. vCPUs run in address space 0 only, so no other has mappings.
    pub(super) fn zap_slot(&self, mmu: &mut Mmu, slot: SlotId, gfns: GfnRange, flavour: Flavour) {
        if slot.as_id == 0 {
            mmu.zap(self.arch(), gfns, flavour);
        }
    }

    /// `kvm_vm_ioctl_set_mem_attributes()`.
    pub(super) fn set_attributes(&self, wanted: &MemoryAttributes) -> Result<(), Errno> {
        let supported = if self.private_memory() { MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        if wanted.flags != 0 || wanted.attributes & !supported != 0 {
            return Err(Errno::EINVAL);
        }
        let range = GfnRange::from_bytes(wanted.address, wanted.size).map_err(|_| Errno::EINVAL)?;
        let private = wanted.attributes & MEMORY_ATTRIBUTE_PRIVATE != 0;

        let _slots_lock = self.lock_slots();
        if self.attributes().all(range, private) {
            return Ok(());
        }
        let started = self.attributes_pre(range, private);
        write(&self.attributes).set(range, private);
        self.attributes_post(range);
        self.invalidate_end(started);
        Ok(())
    }

    /// Unmaps what was mapped by the old attributes, and keeps the huge pages around from being mapped.
    fn attributes_pre(&self, range: GfnRange, private: bool) -> bool {
        let mut told = Vec::new();
        {
            let slots = self.slots();
            let mut mmu = self.mmu_mut();
            for as_id in 0..self.address_spaces() {
                for slot in slots.within(as_id, range) {
                    let change = Invalidation::of_change(slot.gfns, &lock(&slot.mixed), range, private);
                    let Some(Invalidation { unmap, flavour, hull }) = change else { continue };
                    if told.is_empty() {
                        mmu.begin();
                    }
                    mmu.add(hull);
                    self.zap_slot(&mut mmu, slot.id, unmap, flavour);
                    told.push(Event::Unmapped { gfns: unmap, flavour, hull: mmu.hull() });
                }
            }
        }
        let started = !told.is_empty();
        told.into_iter().for_each(|event| self.tell(event));
        started
    }

    /// Brings the mixed flags of the slots up to date.
    fn attributes_post(&self, range: GfnRange) {
        let slots = self.slots();
        let attributes = self.attributes();
        for as_id in 0..self.address_spaces() {
            for slot in slots.within(as_id, range) {
                lock(&slot.mixed).update(slot.gfns, range, &attributes);
            }
        }
    }
}
