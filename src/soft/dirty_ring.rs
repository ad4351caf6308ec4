//! Dirty rings: what KVM does at its end of them.
//!
//! Mirrors `virt/kvm/dirty_ring.c`, `kvm_vm_ioctl_enable_dirty_log_ring()` and `kvm_vm_ioctl_reset_dirty_pages()`
//! (`virt/kvm/kvm_main.c`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;

use super::sync::lock;
use crate::hypervisor::{DirtyGfn, DirtyRingMemory};
use crate::sync::blocking::Mutex;

/// `KVM_DIRTY_RING_MAX_ENTRIES` entries, in bytes.
pub(super) const MAX_BYTES: u64 = 65536 * ENTRY;
const MIN_BYTES: u32 = 4096;
const ENTRY: u64 = 16;
/// `KVM_DIRTY_RING_RSVD_ENTRIES`: a vCPU does not enter the guest with less room than that.
const RESERVED: u32 = 64;

/// Its entries; userspace has them for as long as it likes.
#[derive(Debug, Clone)]
pub(super) struct RingMemory(Arc<[DirtyGfn]>);

impl DirtyRingMemory for RingMemory {
    fn entries(&self) -> &[DirtyGfn] {
        &self.0
    }
}

/// The ring of one vCPU: `struct kvm_dirty_ring`. Pushed to by that vCPU, reset under `slots_lock`.
#[derive(Debug)]
pub(super) struct Ring {
    memory: RingMemory,
    dirty_index: AtomicU32,
    reset_index: AtomicU32,
}

impl Ring {
    fn new(bytes: u32) -> Self {
        let entries = (0..u64::from(bytes) / ENTRY).map(|_| DirtyGfn::default()).collect();
        Self { memory: RingMemory(entries), dirty_index: AtomicU32::new(0), reset_index: AtomicU32::new(0) }
    }

    pub(super) fn memory(&self) -> RingMemory {
        self.memory.clone()
    }

    fn entry(&self, index: u32) -> Option<&DirtyGfn> {
        let entries = &self.memory.0;
        entries.get(usize::try_from(index).ok()? & entries.len().wrapping_sub(1))
    }

    fn used(&self) -> u32 {
        self.dirty_index.load(Ordering::Relaxed).wrapping_sub(self.reset_index.load(Ordering::Acquire))
    }

    fn size(&self) -> u32 {
        u32::try_from(self.memory.0.len()).unwrap_or(u32::MAX)
    }

    /// `kvm_dirty_ring_soft_full()`: the vCPU must leave.
    pub(super) fn soft_full(&self) -> bool {
        self.used() >= self.size().saturating_sub(RESERVED)
    }

    /// `kvm_dirty_ring_push()`. Without room for it, an entry is overwritten, and the page in it is lost: false.
    pub(super) fn push(&self, slot: u32, offset: u64) -> bool {
        let room = self.used() < self.size();
        let index = self.dirty_index.load(Ordering::Relaxed);
        if let Some(entry) = self.entry(index) {
            entry.set_dirty(slot, offset);
        }
        self.dirty_index.store(index.wrapping_add(1), Ordering::Release);
        room
    }

    /// One step of `kvm_dirty_ring_reset()`: takes the oldest entry back, if it has been harvested.
    pub(super) fn reset_one(&self) -> Option<(u32, u64)> {
        let index = self.reset_index.load(Ordering::Relaxed);
        let entry = self.entry(index).filter(|entry| entry.flags() & DirtyGfn::RESET != 0)?;
        let page = entry.page();
        entry.set_empty();
        self.reset_index.store(index.wrapping_add(1), Ordering::Release);
        Some(page)
    }
}

/// What a VM has of rings.
#[derive(Debug, Default)]
pub(super) struct Rings {
    /// Bytes of each; zero while they are not enabled.
    bytes: AtomicU32,
    /// `dirty_ring_with_bitmap`.
    backed: AtomicBool,
    lost: AtomicU64,
    vcpus: Mutex<Vcpus>,
}

#[derive(Debug, Default)]
struct Vcpus {
    created: bool,
    rings: Vec<Arc<Ring>>,
}

impl Rings {
    pub(super) fn enabled(&self) -> bool {
        self.bytes.load(Ordering::Acquire) != 0
    }

    pub(super) fn bytes(&self) -> u32 {
        self.bytes.load(Ordering::Acquire)
    }

    /// `kvm_use_dirty_bitmap()`.
    pub(super) fn use_bitmap(&self) -> bool {
        !self.enabled() || self.backed.load(Ordering::Acquire)
    }

    /// `kvm_vm_ioctl_enable_dirty_log_ring()`, which looks at the lower half of its argument only.
    pub(super) fn enable(&self, argument: u64) -> Result<(), Errno> {
        let [a, b, c, d, ..] = argument.to_le_bytes();
        let bytes = u32::from_le_bytes([a, b, c, d]);
        if !bytes.is_power_of_two() || bytes < MIN_BYTES {
            return Err(Errno::EINVAL);
        }
        if u64::from(bytes) > MAX_BYTES {
            return Err(Errno::E2BIG);
        }
        let vcpus = lock(&self.vcpus);
        if self.enabled() || vcpus.created {
            return Err(Errno::EINVAL);
        }
        self.bytes.store(bytes, Ordering::Release);
        Ok(())
    }

    /// `KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`, under `slots_lock`.
    pub(super) fn back(&self, no_slots: bool) -> Result<(), Errno> {
        if !self.enabled() || !no_slots {
            return Err(Errno::EINVAL);
        }
        self.backed.store(true, Ordering::Release);
        Ok(())
    }

    /// The ring of a vCPU that is created, if they have any.
    pub(super) fn create(&self) -> Option<Arc<Ring>> {
        let mut vcpus = lock(&self.vcpus);
        vcpus.created = true;
        let ring = self.enabled().then(|| Arc::new(Ring::new(self.bytes())))?;
        vcpus.rings.push(Arc::clone(&ring));
        Some(ring)
    }

    pub(super) fn all(&self) -> Vec<Arc<Ring>> {
        lock(&self.vcpus).rings.clone()
    }

    /// KVM warns of a page that it cannot note anywhere.
    pub(super) fn lose(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}
