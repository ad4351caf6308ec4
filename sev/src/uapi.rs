//! Proof that the structures this crate hands to KVM have the layout and the numbers of `<linux/kvm.h>`.
//!
//! A wrong layout in a bindings crate would end as a strange errno at run time; here it ends the build.

use std::mem::{offset_of, size_of};

use kvm_bindings::{
    KVMIO, kvm_sev_cmd, kvm_sev_init, kvm_sev_snp_launch_finish, kvm_sev_snp_launch_start, kvm_sev_snp_launch_update,
};
use nix::request_code_readwrite;

use crate::digest::PageType;
use crate::page::{PAGE_BYTES, Page};

/// Checks the fields of `structure` against offsets and sizes of the kernel's header.
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

layout!(kvm_sev_cmd, 24: 0:4 id, 4:4 pad0, 8:8 data, 16:4 error, 20:4 sev_fd);
layout!(kvm_sev_init, 48: 0:8 vmsa_features, 8:4 flags, 12:2 ghcb_version, 14:2 pad1, 16:32 pad2);
layout!(kvm_sev_snp_launch_start, 64: 0:8 policy, 8:16 gosvw, 24:2 flags, 26:6 pad0, 32:32 pad1);
layout!(kvm_sev_snp_launch_update, 64:
    0:8 gfn_start, 8:8 uaddr, 16:8 len, 24:1 type_, 25:1 pad0, 26:2 flags, 28:4 pad1, 32:32 pad2);
layout!(kvm_sev_snp_launch_finish, 88:
    0:8 id_block_uaddr, 8:8 id_auth_uaddr, 16:1 id_block_en, 17:1 auth_key_en, 18:1 vcek_disabled, 19:32 host_data,
    51:3 pad0, 54:2 flags, 56:32 pad1);

#[allow(clippy::cast_possible_truncation, reason = "0xAE: an ioctl type is one byte by definition")]
const KVM: u8 = KVMIO as u8;

const _: () = {
    // KVM_MEMORY_ENCRYPT_OP: its number carries the size of a long, whatever it is given.
    assert!(request_code_readwrite!(KVM, 0xba, size_of::<u64>()) == 0xc008_aeba);
    assert!(kvm_bindings::sev_cmd_id_KVM_SEV_INIT2 == 22);
    assert!(kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_START == 100);
    assert!(kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE == 101);
    assert!(kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH == 102);
    assert!(kvm_bindings::KVM_X86_SNP_VM == 4);
    assert!(kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_NORMAL == PageType::Normal as u32);
    assert!(kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_ZERO == PageType::Zero as u32);
    assert!(kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_UNMEASURED == PageType::Unmeasured as u32);
    assert!(kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_SECRETS == PageType::Secrets as u32);
    assert!(kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_CPUID == PageType::Cpuid as u32);
    assert!(kvm_bindings::KVM_SEV_SNP_ID_BLOCK_SIZE == 96);
    assert!(kvm_bindings::KVM_SEV_SNP_ID_AUTH_SIZE == 4096);
    // Pages in a row are contiguous, and each is aligned.
    assert!(size_of::<Page>() == PAGE_BYTES && align_of::<Page>() == PAGE_BYTES);
};
