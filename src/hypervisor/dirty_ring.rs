//! The dirty ring of a vCPU, as it lies in memory that KVM and this process share.
//!
//! An entry is empty, dirty, or harvested: KVM fills an empty one and makes it dirty, userspace reads a dirty one and makes it
//! harvested, KVM takes a harvested one back and makes it empty. Whose turn it is, the flags say; they are written last
//! (release) and read first (acquire). Indices run on freely and are not in that memory. Which entry is next, and what becomes
//! of it, is not decided here. Mirrors `struct kvm_dirty_gfn` and `virt/kvm/dirty_ring.c`.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// An entry of a dirty ring: `struct kvm_dirty_gfn`.
#[derive(Debug, Default)]
#[repr(C)]
pub struct DirtyGfn {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = {
    assert!(size_of::<DirtyGfn>() == 16);
    assert!(std::mem::offset_of!(DirtyGfn, flags) == 0);
    assert!(std::mem::offset_of!(DirtyGfn, slot) == 4);
    assert!(std::mem::offset_of!(DirtyGfn, offset) == 8);
};

impl DirtyGfn {
    /// `KVM_DIRTY_GFN_F_DIRTY`: KVM has filled it.
    pub const DIRTY: u32 = 1;
    /// `KVM_DIRTY_GFN_F_RESET`: userspace has harvested it.
    pub const RESET: u32 = 2;

    /// Its flags. What this says of the rest holds from here on (acquire).
    #[inline]
    pub fn flags(&self) -> u32 {
        self.flags.load(Ordering::Acquire)
    }

    /// Address space and id of the slot, and the page of the slot, whatever the flags say.
    #[inline]
    pub fn page(&self) -> (u32, u64) {
        (self.slot.load(Ordering::Relaxed), self.offset.load(Ordering::Relaxed))
    }

    /// Userspace's part: it was dirty and is harvested now; it must not be read any more.
    #[inline]
    pub fn set_harvested(&self) {
        self.flags.store(Self::DIRTY | Self::RESET, Ordering::Release);
    }

    /// KVM's part: it was empty and is dirty now.
    pub fn set_dirty(&self, slot: u32, offset: u64) {
        self.slot.store(slot, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
        self.flags.store(Self::DIRTY, Ordering::Release);
    }

    /// KVM's part: it was harvested and is empty now.
    pub fn set_empty(&self) {
        self.flags.store(0, Ordering::Release);
    }
}

/// The memory of a dirty ring. It stays for as long as this lives, be the vCPU's descriptor open or not.
pub trait DirtyRingMemory: fmt::Debug + Send + Sync {
    /// Its entries: a power of two of them.
    fn entries(&self) -> &[DirtyGfn];
}
