//! Guest memory of confidential VMs.
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

pub mod addr;
pub mod backing;
pub mod convert;
pub mod exits;
pub mod gmem;
pub mod hypervisor;
pub mod layout;
pub mod memory;
pub mod page_set;
pub mod prefault;
pub mod soft;
pub mod stats;
