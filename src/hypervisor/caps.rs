//! Capabilities by name and number, and what a VM offers.
//!
//! Probed on the VM fd: `/dev/kvm` answers for the host, not for the type of this VM, and the two differ (memory
//! attributes, guest_memfd flags, read-only slots, address spaces).

use std::fmt;

use super::Hypervisor;

/// An argument of `KVM_CREATE_VM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VmType(pub u64);

impl VmType {
    /// `KVM_X86_DEFAULT_VM`.
    pub const DEFAULT: Self = Self(0);
    /// `KVM_X86_SW_PROTECTED_VM`.
    pub const SOFTWARE_PROTECTED: Self = Self(1);
}

macro_rules! caps {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        impl Cap {
            $($(#[$doc])* pub const $name: Self = Self($number);)*

            /// The name in `kvm.h`, where this library knows it.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

/// A capability number of `KVM_CHECK_EXTENSION`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cap(pub u32);

caps! {
    /// Slots per address space.
    NR_MEMSLOTS = 10, "KVM_CAP_NR_MEMSLOTS";
    /// Read-only slots; zero where the guest's state is protected.
    READONLY_MEM = 81, "KVM_CAP_READONLY_MEM";
    /// Address spaces; one where the VM has private memory.
    MULTI_ADDRESS_SPACE = 118, "KVM_CAP_MULTI_ADDRESS_SPACE";
    /// `immediate_exit` of `kvm_run` is looked at.
    IMMEDIATE_EXIT = 136, "KVM_CAP_IMMEDIATE_EXIT";
    /// The dirty log is cleared by a call of its own, as a bit mask of what can be asked for.
    MANUAL_DIRTY_LOG_PROTECT2 = 168, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
    /// The most bytes that a dirty ring can have.
    DIRTY_LOG_RING = 192, "KVM_CAP_DIRTY_LOG_RING";
    /// Hypercalls that may exit, as a bit mask; bit 12 is MAP_GPA_RANGE.
    EXIT_HYPERCALL = 201, "KVM_CAP_EXIT_HYPERCALL";
    /// Emulation failures exit instead of raising #UD.
    EXIT_ON_EMULATION_FAILURE = 204, "KVM_CAP_EXIT_ON_EMULATION_FAILURE";
    /// The most bytes that a dirty ring can have, where it is read with acquire and release.
    DIRTY_LOG_RING_ACQ_REL = 223, "KVM_CAP_DIRTY_LOG_RING_ACQ_REL";
    /// Dirty rings for writes of vCPUs and a dirty log for all others.
    DIRTY_LOG_RING_WITH_BITMAP = 225, "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP";
    /// `KVM_SET_USER_MEMORY_REGION2`.
    USER_MEMORY2 = 231, "KVM_CAP_USER_MEMORY2";
    /// Memory faults are described in `kvm_run`.
    MEMORY_FAULT_INFO = 232, "KVM_CAP_MEMORY_FAULT_INFO";
    /// Attributes that can be set, as a bit mask.
    MEMORY_ATTRIBUTES = 233, "KVM_CAP_MEMORY_ATTRIBUTES";
    /// `KVM_CREATE_GUEST_MEMFD`.
    GUEST_MEMFD = 234, "KVM_CAP_GUEST_MEMFD";
    /// VM types that can be created, as a bit mask.
    VM_TYPES = 235, "KVM_CAP_VM_TYPES";
    /// `KVM_PRE_FAULT_MEMORY`.
    PRE_FAULT_MEMORY = 236, "KVM_CAP_PRE_FAULT_MEMORY";
    /// Flags that a guest_memfd may have.
    GUEST_MEMFD_FLAGS = 244, "KVM_CAP_GUEST_MEMFD_FLAGS";
}

impl fmt::Display for Cap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "KVM capability {}", self.0),
        }
    }
}

/// The VM does not offer a capability that is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{cap} is missing on a VM of the {platform} type (needed: {needed:#x}, offered: {offered:#x})")]
pub struct MissingCapability {
    /// Which one.
    pub cap: Cap,
    /// The kind of VM that was asked.
    pub platform: &'static str,
    /// The least value, or the bits, that were needed.
    pub needed: u64,
    /// What the VM answered.
    pub offered: u64,
}

/// What one VM offers, asked once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Slots per address space.
    pub memslots: u64,
    /// Address spaces.
    pub address_spaces: u64,
    /// Attributes that can be set.
    pub memory_attributes: u64,
    /// Whether guest_memfd files can be created.
    pub guest_memfd: bool,
    /// Flags they may have.
    pub guest_memfd_flags: u64,
    /// Whether slots can be bound to them.
    pub user_memory2: bool,
    /// Whether a memory fault says where and of which kind it was.
    pub memory_fault_info: bool,
    /// Whether memory can be mapped ahead of use.
    pub pre_fault: bool,
    /// Hypercalls that may exit.
    pub exit_hypercall: u64,
    /// Whether slots may be read-only.
    pub readonly: bool,
}

impl Capabilities {
    /// Asks `hypervisor` for all of them.
    pub fn probe(hypervisor: &dyn Hypervisor) -> Self {
        let ask = |cap| hypervisor.check_extension(cap);
        Self {
            memslots: ask(Cap::NR_MEMSLOTS),
            address_spaces: ask(Cap::MULTI_ADDRESS_SPACE).max(1),
            memory_attributes: ask(Cap::MEMORY_ATTRIBUTES),
            guest_memfd: ask(Cap::GUEST_MEMFD) != 0,
            guest_memfd_flags: ask(Cap::GUEST_MEMFD_FLAGS),
            user_memory2: ask(Cap::USER_MEMORY2) != 0,
            memory_fault_info: ask(Cap::MEMORY_FAULT_INFO) != 0,
            pre_fault: ask(Cap::PRE_FAULT_MEMORY) != 0,
            exit_hypercall: ask(Cap::EXIT_HYPERCALL),
            readonly: ask(Cap::READONLY_MEM) != 0,
        }
    }

    /// Checks that `cap` offers at least the bits of `needed`.
    ///
    /// # Errors
    /// [`MissingCapability`], which names it.
    pub fn require(hypervisor: &dyn Hypervisor, cap: Cap, needed: u64) -> Result<u64, MissingCapability> {
        let offered = hypervisor.check_extension(cap);
        if offered & needed == needed {
            return Ok(offered);
        }
        Err(MissingCapability { cap, platform: hypervisor.platform().name, needed, offered })
    }
}
