//! Counts of what was asked and what was done, beside what a backend without a record would have done.
//!
//! Plain relaxed counters: they order nothing and decide nothing. A snapshot taken while vCPUs run is a snapshot of each
//! counter, not of all of them at one moment.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($(#[$doc:meta])* $live:ident, $frozen:ident { $($(#[$field_doc:meta])* $field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub struct $live {
            $($(#[$field_doc])* pub $field: Counter,)*
        }

        /// The values of these counters at one time.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $frozen {
            $($(#[$field_doc])* pub $field: u64,)*
        }

        impl $live {
            /// Reads every counter.
            pub fn snapshot(&self) -> $frozen {
                $frozen { $($field: self.$field.get(),)* }
            }
        }
    };
}

/// A relaxed counter that wraps rather than fails.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

counters! {
    /// System calls that move memory.
    SyscallCounters, Syscalls {
        /// `KVM_SET_MEMORY_ATTRIBUTES`.
        set_memory_attributes,
        /// `fallocate(PUNCH_HOLE)` on a guest_memfd.
        punch_hole,
        /// Calls that free shared memory.
        discard_shared,
        /// `fallocate` that allocates pages of a guest_memfd.
        allocate,
        /// `KVM_PRE_FAULT_MEMORY`.
        pre_fault,
        /// `KVM_SET_USER_MEMORY_REGION2`.
        set_user_memory_region2,
    }
}

counters! {
    /// What guests and the VMM asked for.
    RequestCounters, Requests {
        /// Conversions asked for, by whomever.
        requests,
        /// Pages they named that are memory.
        pages_requested,
        /// Pages that changed.
        pages_converted,
        /// Pages that were in the wanted state already.
        pages_unchanged,
        /// Requests refused before any effect.
        refused,
        /// Conversions undone.
        rolled_back,
        /// Conversions that could not be undone.
        poisoned,
        /// Private faults that converted or materialised a page.
        private_faults,
        /// Shared faults that converted a page.
        shared_faults,
        /// Pages whose attribute was set at their first private fault, ahead of a prefault, or with their slot.
        pages_materialised,
    }
}

/// Every counter of one VM's memory.
#[derive(Debug, Default)]
pub struct Counters {
    /// System calls issued.
    pub issued: SyscallCounters,
    /// System calls that a backend would have issued that keeps no record and works page by page.
    pub naive: SyscallCounters,
    /// Requests.
    pub requests: RequestCounters,
}
