//! The ioctls that kvm-ioctls lacks, and the proof that every structure this library hands to KVM has the layout and the
//! ioctl number of `<linux/kvm.h>`.
//!
//! A number carries the size of its structure, so a wrong layout in a bindings crate would end as `ENOTTY` at run time;
//! here it ends the build.
#![allow(unsafe_code, reason = "ioctl(2) is unsafe; the functions of this table are the only ones made here")]

use std::mem::{offset_of, size_of};

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_create_guest_memfd, kvm_dirty_gfn, kvm_dirty_log, kvm_enable_cap,
    kvm_memory_attributes, kvm_pre_fault_memory, kvm_run, kvm_userspace_memory_region2,
};
use nix::{request_code_none, request_code_readwrite, request_code_write};

#[allow(clippy::cast_possible_truncation, reason = "0xAE: an ioctl type is one byte by definition")]
const KVM: u8 = KVMIO as u8;

nix::ioctl_readwrite! {
    /// `KVM_PRE_FAULT_MEMORY`, on a vCPU fd.
    pre_fault_memory, KVM, 0xd5, kvm_pre_fault_memory
}

nix::ioctl_write_ptr! {
    /// `KVM_GET_DIRTY_LOG`, on a VM fd.
    get_dirty_log, KVM, 0x42, kvm_dirty_log
}

nix::ioctl_readwrite! {
    /// `KVM_CLEAR_DIRTY_LOG`, on a VM fd.
    clear_dirty_log, KVM, 0xc0, kvm_clear_dirty_log
}

nix::ioctl_none! {
    /// `KVM_RESET_DIRTY_RINGS`, on a VM fd.
    reset_dirty_rings, KVM, 0xc7
}

const _: () = {
    assert!(request_code_none!(KVM, 0x01) == 0xae01); // KVM_CREATE_VM
    assert!(request_code_none!(KVM, 0x03) == 0xae03); // KVM_CHECK_EXTENSION
    assert!(request_code_none!(KVM, 0x41) == 0xae41); // KVM_CREATE_VCPU
    assert!(request_code_write!(KVM, 0x49, size_of::<kvm_userspace_memory_region2>()) == 0x40a0_ae49);
    assert!(request_code_write!(KVM, 0x42, size_of::<kvm_dirty_log>()) == 0x4010_ae42);
    assert!(request_code_none!(KVM, 0x80) == 0xae80); // KVM_RUN
    assert!(request_code_write!(KVM, 0xa3, size_of::<kvm_enable_cap>()) == 0x4068_aea3);
    assert!(request_code_readwrite!(KVM, 0xc0, size_of::<kvm_clear_dirty_log>()) == 0xc018_aec0);
    assert!(request_code_none!(KVM, 0xc7) == 0xaec7); // KVM_RESET_DIRTY_RINGS
    assert!(request_code_write!(KVM, 0xd2, size_of::<kvm_memory_attributes>()) == 0x4020_aed2);
    assert!(request_code_readwrite!(KVM, 0xd4, size_of::<kvm_create_guest_memfd>()) == 0xc040_aed4);
    assert!(request_code_readwrite!(KVM, 0xd5, size_of::<kvm_pre_fault_memory>()) == 0xc040_aed5);
};

/// Checks `field` of `structure` against the offset and size of the kernel's header.
macro_rules! layout {
    ($structure:ty, $size:literal: $($offset:literal : $bytes:literal $field:ident),+ $(,)?) => {
        const _: () = {
            const fn bytes<S, T>(_: fn(&S) -> &T) -> usize {
                size_of::<T>()
            }
            assert!(size_of::<$structure>() == $size);
            $(
                assert!(offset_of!($structure, $field) == $offset);
                assert!(bytes(|structure: &$structure| &structure.$field) == $bytes);
            )+
        };
    };
}

layout!(kvm_userspace_memory_region2, 160:
    0:4 slot, 4:4 flags, 8:8 guest_phys_addr, 16:8 memory_size, 24:8 userspace_addr, 32:8 guest_memfd_offset,
    40:4 guest_memfd, 44:4 pad1, 48:112 pad2);
layout!(kvm_create_guest_memfd, 64: 0:8 size, 8:8 flags, 16:48 reserved);
layout!(kvm_memory_attributes, 32: 0:8 address, 8:8 size, 16:8 attributes, 24:8 flags);
layout!(kvm_pre_fault_memory, 64: 0:8 gpa, 8:8 size, 16:8 flags, 24:40 padding);
layout!(kvm_enable_cap, 104: 0:4 cap, 4:4 flags, 8:32 args, 40:64 pad);
layout!(kvm_dirty_log, 16: 0:4 slot, 4:4 padding1, 8:8 __bindgen_anon_1);
layout!(kvm_clear_dirty_log, 24: 0:4 slot, 4:4 num_pages, 8:8 first_page, 16:8 __bindgen_anon_1);
layout!(kvm_dirty_gfn, 16: 0:4 flags, 4:4 slot, 8:8 offset);
layout!(kvm_run, 2352: 1:1 immediate_exit, 8:4 exit_reason, 32:256 __bindgen_anon_1);

/// The members of `kvm_run`'s union that this library reads.
const _: () = {
    assert!(offset_of!(kvm_run, __bindgen_anon_1.fail_entry.hardware_entry_failure_reason) == 32);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.fail_entry.cpu) == 40);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.mmio.phys_addr) == 32);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.mmio.data) == 40);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.mmio.len) == 48);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.mmio.is_write) == 52);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.hypercall.nr) == 32);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.hypercall.args) == 40);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.hypercall.ret) == 88);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.internal.suberror) == 32);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.memory_fault.flags) == 32);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.memory_fault.gpa) == 40);
    assert!(offset_of!(kvm_run, __bindgen_anon_1.memory_fault.size) == 48);
};

/// The numbers that the rest of the library spells out by itself.
const _: () = {
    use crate::hypervisor::{Cap, MEMORY_ATTRIBUTE_PRIVATE, MemoryFault, exit_reason};
    assert!(Cap::NR_MEMSLOTS.0 == kvm_bindings::KVM_CAP_NR_MEMSLOTS);
    assert!(Cap::READONLY_MEM.0 == kvm_bindings::KVM_CAP_READONLY_MEM);
    assert!(Cap::MULTI_ADDRESS_SPACE.0 == kvm_bindings::KVM_CAP_MULTI_ADDRESS_SPACE);
    assert!(Cap::IMMEDIATE_EXIT.0 == kvm_bindings::KVM_CAP_IMMEDIATE_EXIT);
    assert!(Cap::MANUAL_DIRTY_LOG_PROTECT2.0 == kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    assert!(Cap::DIRTY_LOG_RING.0 == kvm_bindings::KVM_CAP_DIRTY_LOG_RING);
    assert!(Cap::EXIT_HYPERCALL.0 == kvm_bindings::KVM_CAP_EXIT_HYPERCALL);
    assert!(Cap::EXIT_ON_EMULATION_FAILURE.0 == kvm_bindings::KVM_CAP_EXIT_ON_EMULATION_FAILURE);
    assert!(Cap::DIRTY_LOG_RING_ACQ_REL.0 == kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
    assert!(Cap::USER_MEMORY2.0 == kvm_bindings::KVM_CAP_USER_MEMORY2);
    assert!(Cap::MEMORY_FAULT_INFO.0 == kvm_bindings::KVM_CAP_MEMORY_FAULT_INFO);
    assert!(Cap::MEMORY_ATTRIBUTES.0 == kvm_bindings::KVM_CAP_MEMORY_ATTRIBUTES);
    assert!(Cap::GUEST_MEMFD.0 == kvm_bindings::KVM_CAP_GUEST_MEMFD);
    assert!(Cap::VM_TYPES.0 == kvm_bindings::KVM_CAP_VM_TYPES);
    assert!(Cap::PRE_FAULT_MEMORY.0 == kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY);
    assert!(Cap::GUEST_MEMFD_FLAGS.0 == 244); // too new for the bindings
    assert!(exit_reason::HYPERCALL == kvm_bindings::KVM_EXIT_HYPERCALL);
    assert!(exit_reason::HLT == kvm_bindings::KVM_EXIT_HLT);
    assert!(exit_reason::MMIO == kvm_bindings::KVM_EXIT_MMIO);
    assert!(exit_reason::SHUTDOWN == kvm_bindings::KVM_EXIT_SHUTDOWN);
    assert!(exit_reason::FAIL_ENTRY == kvm_bindings::KVM_EXIT_FAIL_ENTRY);
    assert!(exit_reason::INTERNAL_ERROR == kvm_bindings::KVM_EXIT_INTERNAL_ERROR);
    assert!(exit_reason::DIRTY_RING_FULL == kvm_bindings::KVM_EXIT_DIRTY_RING_FULL);
    assert!(exit_reason::MEMORY_FAULT == kvm_bindings::KVM_EXIT_MEMORY_FAULT);
    assert!(MEMORY_ATTRIBUTE_PRIVATE == kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE as u64);
    assert!(MemoryFault::PRIVATE == kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE as u64);
};
