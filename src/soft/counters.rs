//! How often each system call of the software KVM was made, so that a test can demand an exact number.

use std::sync::atomic::{AtomicU64, Ordering};

/// One kind of call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Call {
    CreateGuestMemfd,
    SetMemoryRegion,
    SetMemoryAttributes,
    PreFaultMemory,
    GetDirtyLog,
    ClearDirtyLog,
    ResetDirtyRings,
    Run,
    Allocate,
    PunchHole,
}

/// Calls made so far, refused ones included. Subtract two to count what lies between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// `KVM_CREATE_GUEST_MEMFD`.
    pub create_guest_memfd: u64,
    /// `KVM_SET_USER_MEMORY_REGION2`.
    pub set_memory_region: u64,
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    pub set_memory_attributes: u64,
    /// `KVM_PRE_FAULT_MEMORY`.
    pub pre_fault_memory: u64,
    /// `KVM_GET_DIRTY_LOG`.
    pub get_dirty_log: u64,
    /// `KVM_CLEAR_DIRTY_LOG`.
    pub clear_dirty_log: u64,
    /// `KVM_RESET_DIRTY_RINGS`.
    pub reset_dirty_rings: u64,
    /// `KVM_RUN`.
    pub run: u64,
    /// `fallocate(2)` on a guest_memfd, any mode but those that punch.
    pub allocate: u64,
    /// `fallocate(2)` on a guest_memfd with `PUNCH_HOLE`.
    pub punch_hole: u64,
}

impl Counters {
    /// Calls since `earlier`.
    #[must_use]
    pub const fn since(&self, earlier: &Self) -> Self {
        Self {
            create_guest_memfd: self.create_guest_memfd.saturating_sub(earlier.create_guest_memfd),
            set_memory_region: self.set_memory_region.saturating_sub(earlier.set_memory_region),
            set_memory_attributes: self.set_memory_attributes.saturating_sub(earlier.set_memory_attributes),
            pre_fault_memory: self.pre_fault_memory.saturating_sub(earlier.pre_fault_memory),
            get_dirty_log: self.get_dirty_log.saturating_sub(earlier.get_dirty_log),
            clear_dirty_log: self.clear_dirty_log.saturating_sub(earlier.clear_dirty_log),
            reset_dirty_rings: self.reset_dirty_rings.saturating_sub(earlier.reset_dirty_rings),
            run: self.run.saturating_sub(earlier.run),
            allocate: self.allocate.saturating_sub(earlier.allocate),
            punch_hole: self.punch_hole.saturating_sub(earlier.punch_hole),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct LiveCounters {
    create_guest_memfd: AtomicU64,
    set_memory_region: AtomicU64,
    set_memory_attributes: AtomicU64,
    pre_fault_memory: AtomicU64,
    get_dirty_log: AtomicU64,
    clear_dirty_log: AtomicU64,
    reset_dirty_rings: AtomicU64,
    run: AtomicU64,
    allocate: AtomicU64,
    punch_hole: AtomicU64,
}

impl LiveCounters {
    pub(super) fn count(&self, call: Call) {
        let counter = match call {
            Call::CreateGuestMemfd => &self.create_guest_memfd,
            Call::SetMemoryRegion => &self.set_memory_region,
            Call::SetMemoryAttributes => &self.set_memory_attributes,
            Call::PreFaultMemory => &self.pre_fault_memory,
            Call::GetDirtyLog => &self.get_dirty_log,
            Call::ClearDirtyLog => &self.clear_dirty_log,
            Call::ResetDirtyRings => &self.reset_dirty_rings,
            Call::Run => &self.run,
            Call::Allocate => &self.allocate,
            Call::PunchHole => &self.punch_hole,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            create_guest_memfd: get(&self.create_guest_memfd),
            set_memory_region: get(&self.set_memory_region),
            set_memory_attributes: get(&self.set_memory_attributes),
            pre_fault_memory: get(&self.pre_fault_memory),
            get_dirty_log: get(&self.get_dirty_log),
            clear_dirty_log: get(&self.clear_dirty_log),
            reset_dirty_rings: get(&self.reset_dirty_rings),
            run: get(&self.run),
            allocate: get(&self.allocate),
            punch_hole: get(&self.punch_hole),
        }
    }
}
