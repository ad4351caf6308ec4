//! Tests that need something of the host: they skip on one line that names it, or fail where it was promised.
//!
//! ```no_run
//! # fn a_test() {
//! let Some(vm) = cvm_memory_testkit::private_kvm() else { return };
//! # }
//! ```

use std::fmt::Display;
use std::io::{self, Write};
use std::thread;

use cvm_memory::hypervisor::kvm::{KvmError, KvmVm};
use cvm_memory::hypervisor::{Cap, Capabilities, Hypervisor, MEMORY_ATTRIBUTE_PRIVATE, Platform};
use kvm_ioctls::Kvm;

/// Set to `1` where a KVM was promised: what would be skipped then fails.
pub const REQUIRE: &str = "CVM_REQUIRE_KVM";

/// Prints why a test does not run. `None`, so that it can be returned.
///
/// # Panics
/// With the reason, if [`REQUIRE`] is set to `1`.
pub fn skip<T>(reason: impl Display) -> Option<T> {
    assert!(std::env::var(REQUIRE).as_deref() != Ok("1"), "{REQUIRE}=1, but {reason}");
    // Past the harness's capture, which would keep a passed test's words to itself.
    let _unheard = writeln!(io::stderr(), "skipped {}: {reason}", thread::current().name().unwrap_or("test"));
    None
}

/// `/dev/kvm`, or a skip.
///
/// # Panics
/// As [`skip`].
pub fn dev_kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => skip(format_args!("/dev/kvm cannot be opened: {error}")),
    }
}

/// A VM of that platform's type, or a skip.
///
/// # Panics
/// As [`skip`]; also if KVM offers the type and then fails to make a VM of it.
pub fn kvm(platform: Platform) -> Option<KvmVm> {
    match KvmVm::create(&dev_kvm()?, platform) {
        Ok(vm) => Some(vm),
        Err(KvmError::VmType { missing, .. }) => skip(missing),
        Err(error @ KvmError::Call { errno, .. }) => panic!("{error}: {errno}"),
    }
}

/// A software-protected VM: a real KVM with private memory. Or a skip.
///
/// # Panics
/// As [`kvm`].
pub fn private_kvm() -> Option<KvmVm> {
    let vm = kvm(Platform::SOFTWARE_PROTECTED)?;
    require(&vm, Cap::MEMORY_ATTRIBUTES, MEMORY_ATTRIBUTE_PRIVATE)?;
    require(&vm, Cap::GUEST_MEMFD, 1)?;
    Some(vm)
}

/// What `hypervisor` answers for `cap` if that has all bits of `needed`, or a skip.
///
/// # Panics
/// As [`skip`].
pub fn require(hypervisor: &dyn Hypervisor, cap: Cap, needed: u64) -> Option<u64> {
    match Capabilities::require(hypervisor, cap, needed) {
        Ok(offered) => Some(offered),
        Err(missing) => skip(missing),
    }
}
