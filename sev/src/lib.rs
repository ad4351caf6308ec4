//! The SEV-SNP platform of [`cvm_memory`]: everything that the generic crate must not name.
//!
//! | module | what it is |
//! |---|---|
//! | [`page`] | 4 KiB of contents, aligned as KVM wants them |
//! | [`digest`] | the launch digest, page by page |
//! | [`vmsa`] | the save area a vCPU starts from |
//! | [`cpuid`] | the CPUID page |
//! | [`import`] | the initial image: which pages, of which type, in which order |
//! | [`firmware`] | OVMF images: metadata, kernel hashes, what to import |
//! | `igvm` | IGVM files (feature `igvm`) |
//! | [`commands`] | the seam: KVM's commands for an SNP VM |
//! | [`kvm`] | the commands on the real KVM |
//! | [`launch`] | the launch: start, import, finish |
//! | [`ghcb`] | page state changes as the guest asks for them: the protocols |
//! | [`rmp`] | the reverse map table: a model of it, and of what Linux does with it |
//! | [`soft`] | SNP on the software KVM |
//!
//! Not here: requests for attestation reports, VMPLs, migration, and of the GHCB protocol all that is not about memory.
//!
//! # What has run where
//! The launch digest is held against digests that other programs compute for the same images. On Linux 7.3's own KVM, over
//! *emulated* firmware, RMP and processor (the repository's `tests/lab`), have run: launches, whose digests are the predicted
//! ones; guests whose page state changes, acceptance and shared accesses came out as here; guests that convert pages with
//! several vCPUs, the RMP held against the library's record; and vCPUs that a guest has started by itself, through edits of the
//! layout. All else ran on the model. **Nothing here has run on hardware with SEV-SNP.** Who has some can check, in the
//! repository:
//!
//! ```text
//! cargo run --release --example launch -- --platform snp --backend kvm --firmware OVMF.fd --cpu EPYC-v4
//! cargo run --release --example convert_pages -- --platform snp --backend kvm --vcpus 2
//! ```
//! The first prints the digest that the guest's attestation report must show; the second ends with status 0 if every byte was
//! where it should be.
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing
    )
)]

pub mod commands;
pub mod cpuid;
pub mod digest;
pub mod firmware;
pub mod ghcb;
#[cfg(feature = "igvm")]
pub mod igvm;
pub mod import;
pub mod kvm;
pub mod launch;
pub mod page;
pub mod rmp;
pub mod soft;
mod uapi;
pub mod vmsa;

use cvm_memory::hypervisor::{Hazards, Platform, VmType};

/// `KVM_X86_SNP_VM`: private memory, of which each access says by itself whether it is private (the C-bit). A guest that is
/// answered `EAGAIN` to a page state change does not ask again.
///
/// ```no_run
/// use cvm_memory::hypervisor::kvm::KvmVm;
///
/// let vm = KvmVm::create(&kvm_ioctls::Kvm::new()?, cvm_memory_sev::SNP)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const SNP: Platform = Platform {
    name: "sev-snp",
    vm_type: VmType(kvm_bindings::KVM_X86_SNP_VM as u64),
    private_memory: true,
    accesses_carry_privacy: true,
    guest_retries: false,
    hazards: Hazards {
        slot_delete_loses_private: false,
        vcpu_state_in_private_memory: true,
        pages_keep_their_frame: true,
        holes_stick: true,
    },
};
