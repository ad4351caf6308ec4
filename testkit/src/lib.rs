//! What the tests and the examples of cvm-memory share: guests that do as they are told, a hypervisor that records and
//! fails on demand, devices and memory that watch over what they are asked for, and skips that say what is missing.
//!
//! Not part of the library: everything here panics where a test would.

pub mod devices;
pub mod error;
pub mod frames;
pub mod guest;
pub mod kvm_guest;
pub mod numbers;
pub mod recorder;
pub mod skip;
pub mod snp;
pub mod soft_guest;

pub use devices::{Mapped, WatchedMemory, Window};
pub use error::chain;
pub use frames::{file_pages, gfn, gfns};
pub use guest::{Guest, GuestOp, Outcome};
pub use kvm_guest::{KvmGuest, Placement, RealModeGuest};
pub use numbers::Numbers;
pub use recorder::{Call, Recorder};
pub use skip::{kvm, private_kvm};
pub use soft_guest::{SoftGuest, SoftKick};
