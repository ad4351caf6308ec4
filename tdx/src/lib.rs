//! The TDX platform of [`cvm_memory`]: what a launcher of trust domains (TDs) needs beyond guest memory in general.
//!
//! | module | what it is |
//! |---|---|
//! | [`width`] | the shared bit, and where guest physical addresses end |
//! | [`import`] | the list of pages that a TD starts with, checked as a whole |
//! | [`mrtd`] | the measurement of that list |
//! | [`tdvf`] | what a firmware image says about how to build a TD from it |
//! | [`hob`] | the list of memory that firmware finds |
//! | [`uapi`] | structures and numbers of KVM's interface |
//! | [`mechanism`] | the seam: one method, one command |
//! | [`kvm`] | the real KVM behind it |
//! | [`launch`] | building a TD, step by step |
//! | [`mapgpa`] | the guest's request to share memory or take it back, piece by piece |
//! | [`model`] | a TD on the software KVM: secure EPT, accepted pages, commands |
//! | [`exit`] | what only a TD's vCPUs come back with |
//!
//! A launcher builds a TD with [`launch::Start`], gives each vCPU thread a [`VcpuExits`](cvm_memory::exits::VcpuExits) as for
//! any other VM, and hands the rest of the exits to [`exit`]. What is particular to a TD's memory:
//!
//! - A page that stops being private, by conversion, hole, slot or file, is lost, and comes back unaccepted. A guest that
//!   touches such a page is dead ([`exit::RunError::Dead`]). So a launcher removes no slot and frees no private memory under a
//!   running TD, but by the conversions that its guest asks for.
//! - Slots are created after `KVM_TDX_INIT_VM`, which is when KVM learns where addresses end.
//! - Pages that were added while it was built are the guest's; all others it has to accept. Prefaulting gives them ahead, so
//!   that accepting needs no exit.
//!
//! Not here: quotes (their requests are told apart, and answered by nobody), migration, debugging.
//!
//! Nothing here has run on TDX hardware: [`model`] is made from the kernel's sources, [`kvm`] was compiled. On a TDX machine:
//!
//! ```text
//! CVM_REQUIRE_KVM=1 cargo test -p cvm-memory-tdx --test hardware
//! cargo run --release --example launch -- --platform tdx --backend kvm --firmware OVMF.fd
//! ```
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

pub mod exit;
pub mod hob;
pub mod import;
pub mod kvm;
pub mod launch;
pub mod mapgpa;
pub mod mechanism;
pub mod model;
pub mod mrtd;
pub mod tdvf;
pub mod uapi;
pub mod width;
