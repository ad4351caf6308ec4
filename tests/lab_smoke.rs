//! The lab itself: that the kernel `tests/lab` boots offers the private memory the other tests go there for.
//!
//! It says nothing about the library, and nothing about any other machine's KVM: outside the lab it skips.

use cvm_memory_testkit::skip::skip;
use kvm_bindings::{KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_VM_TYPES};
use kvm_ioctls::Kvm;

const DEFAULT_VM: i32 = 1 << 0;
const SW_PROTECTED_VM: i32 = 1 << 1;
const SNP_VM: i32 = 1 << 4;
/// KVM_MEMORY_ATTRIBUTE_PRIVATE, the one attribute there is.
const ATTRIBUTE_PRIVATE: i32 = 1 << 3;

#[test]
fn the_labs_kvm_has_private_memory() {
    if std::env::var("CVM_LAB").as_deref() != Ok("1") {
        skip::<()>("CVM_LAB is not 1: this checks the lab's kernel (tests/lab/test --test lab_smoke)");
        return;
    }
    let kvm = Kvm::new().expect("the lab has /dev/kvm");
    let types = kvm.check_extension_raw(KVM_CAP_VM_TYPES.into());
    let vm = kvm.create_vm_with_type(1).expect("a software-protected VM");
    let guest_memfd = vm.check_extension_raw(KVM_CAP_GUEST_MEMFD.into());
    let attributes = vm.check_extension_raw(KVM_CAP_MEMORY_ATTRIBUTES.into());
    println!(
        "KVM_CAP_VM_TYPES {types:#x}, on a VM of type 1: KVM_CAP_GUEST_MEMFD {guest_memfd}, KVM_CAP_MEMORY_ATTRIBUTES {attributes:#x}"
    );

    assert_eq!(types, DEFAULT_VM | SW_PROTECTED_VM | SNP_VM, "VM types {types:#x}");
    assert_eq!(guest_memfd, 1);
    assert_eq!(attributes, ATTRIBUTE_PRIVATE);
}
