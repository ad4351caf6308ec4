//! Is the software KVM a KVM? A [`Scenario`] is played on several [`Machine`]s, and whatever can be observed is compared
//! after every operation.
//!
//! - [`Live`] is a VM behind the library's own seam: of the software KVM, or of `/dev/kvm`.
//! - [`Snp`] is one of the SNP platform: of its model, or of KVM's SNP code in the lab.
//! - [`Reference`] interprets the kernel contract, slowly and page by page, and shares no code with either.
//!
//! What the library itself does, on top of either, has scenarios of its own: see [`library`].
//!
//! Scenarios are plain data with a readable text form, see [`scenario`]. They come from the generator ([`random`]), from the
//! book (`book/`), which has what was found once too (`book/found/`). Where kernels are known to differ, [`differences`] says in
//! what, by name.
//!
//! Not part of the library: everything here may panic where a test would.

pub mod book;
pub mod differences;
pub mod guard;
pub mod library;
pub mod live;
pub mod machine;
pub mod observation;
mod patience;
pub mod play;
pub mod race;
pub mod random;
pub mod reference;
pub mod run;
pub mod scenario;
pub mod snp;
pub mod suite;

pub use live::Live;
pub use machine::Machine;
pub use observation::{End, Observation, Seen};
pub use play::{Difference, Played, play};
pub use reference::Reference;
pub use scenario::{Operation, Scenario, Step};
pub use snp::Snp;
