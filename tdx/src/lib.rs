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
//!
//! Nothing here has run on TDX hardware.
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
