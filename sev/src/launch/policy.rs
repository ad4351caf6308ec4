//! The guest policy: what the owner allows the host to do, enforced by the firmware.

use std::fmt;

/// A policy that the firmware would not accept, or that this library does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPolicy {
    /// Bits that are reserved.
    #[error("policy {policy:#x} has reserved bits {reserved:#x}")]
    Reserved {
        /// The policy.
        policy: u64,
        /// Those of its bits that are reserved.
        reserved: u64,
    },
    /// Bit 17 must be one.
    #[error("policy {policy:#x} lacks bit 17, which must be one")]
    MustBeOne {
        /// The policy.
        policy: u64,
    },
    /// KVM refuses guests with a migration agent.
    #[error("policy {policy:#x} asks for a migration agent, which kvm does not have")]
    MigrationAgent {
        /// The policy.
        policy: u64,
    },
}

/// A guest policy, valid as far as can be told here. The default allows simultaneous multithreading, which most hosts need,
/// and nothing else: no debugging.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Policy(u64);

impl Policy {
    /// Simultaneous multithreading is allowed.
    pub const SMT: u64 = 1 << 16;
    /// Must be one.
    pub const MUST_BE_ONE: u64 = 1 << 17;
    /// A migration agent may be associated.
    pub const MIGRATION_AGENT: u64 = 1 << 18;
    /// The host may read and write the guest's memory. Never for a guest with secrets.
    pub const DEBUG: u64 = 1 << 19;
    /// Bits that have a meaning: the ABI version in 15:0, and what is above in 25:16.
    const KNOWN: u64 = (1 << 26) - 1;

    /// A policy of these bits.
    ///
    /// # Errors
    /// [`InvalidPolicy`].
    ///
    /// ```
    /// use cvm_memory_sev::launch::Policy;
    ///
    /// assert!(!Policy::new(0x3_0000)?.allows_debugging());
    /// assert!(Policy::new(0x1_0000).is_err());
    /// # Ok::<(), cvm_memory_sev::launch::InvalidPolicy>(())
    /// ```
    pub const fn new(policy: u64) -> Result<Self, InvalidPolicy> {
        let reserved = policy & !Self::KNOWN;
        if reserved != 0 {
            return Err(InvalidPolicy::Reserved { policy, reserved });
        }
        if policy & Self::MUST_BE_ONE == 0 {
            return Err(InvalidPolicy::MustBeOne { policy });
        }
        if policy & Self::MIGRATION_AGENT != 0 {
            return Err(InvalidPolicy::MigrationAgent { policy });
        }
        Ok(Self(policy))
    }

    /// Its bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether the host may read and write the guest's memory.
    pub const fn allows_debugging(self) -> bool {
        self.0 & Self::DEBUG != 0
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self(Self::SMT | Self::MUST_BE_ONE)
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Policy({:#x})", self.0)
    }
}
