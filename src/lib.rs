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
pub mod gmem;
pub mod hypervisor;
pub mod layout;
pub mod soft;
