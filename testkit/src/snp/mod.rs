//! SNP guests on the real KVM, and what the lab's emulated host says of them.
//!
//! Once a guest is launched nobody can set its registers, so it is given a [program] that does one thing after
//! another as a mailbox in shared memory says: [`SnpVcpu`]. It executes what a vCPU of the software KVM executes, with the
//! same results, so whatever drives the one drives the other: [`SnpGuest`] does on either what a guest has to do around an
//! operation.

mod emulation;
mod guest;
pub mod program;
mod vcpu;

pub use emulation::{Emulation, Entry, Line, snp_vm};
pub use guest::{Processor, SnpGuest};
pub use program::Program;
pub use vcpu::{SnpVcpu, c_bit};
