//! What can go wrong while a TD is built.

use cvm_memory::addr::{Gfn, GfnRange, Gpa};
use cvm_memory::backing::SharedError;

use crate::mechanism::Failure;
use crate::uapi::MAX_CPUID_ENTRIES;

/// Why a TD could not be built. What has been built of it is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The TD is to have attributes or features that this machine does not offer.
    #[error("{what} {wanted:#x}: this machine offers {offered:#x}")]
    Unsupported {
        /// Of what kind.
        what: &'static str,
        /// All that is wanted.
        wanted: u64,
        /// All that there is.
        offered: u64,
    },
    /// More CPUID entries than KVM takes.
    #[error("{entries} cpuid entries, at most {MAX_CPUID_ENTRIES}")]
    TooManyCpuid {
        /// How many.
        entries: usize,
    },
    /// CPUID function 0x8000_0008 is missing, or says neither 48 nor 52 in EAX bits 23:16.
    #[error("cpuid does not say how wide guest addresses are")]
    NoWidth,
    /// A TD without vCPUs: memory is added by one of them.
    #[error("no vcpu")]
    NoVcpu,
    /// A page of the image has no place in private memory.
    #[error("gfn {gfn:#x} of the image is not private memory")]
    NotPrivate {
        /// The first such frame.
        gfn: Gfn,
    },
    /// KVM could not be told that the image's memory is private.
    #[error("gfns {gfns} could not be made private")]
    Private {
        /// The frames.
        gfns: GfnRange,
        /// Why.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No memory to hand the image over in.
    #[error("no memory to hand the image over")]
    Staging(
        #[from]
        #[source]
        SharedError,
    ),
    /// A command failed.
    #[error("{command}")]
    Command {
        /// Its name.
        command: &'static str,
        /// How.
        #[source]
        failure: Failure,
    },
    /// A page could not be added.
    #[error("KVM_TDX_INIT_MEM_REGION of gfn {gfn:#x}")]
    Page {
        /// The first frame that was not added.
        gfn: Gfn,
        /// How the command failed.
        #[source]
        failure: Failure,
    },
    /// KVM says to have done what cannot be.
    #[error("KVM_TDX_INIT_MEM_REGION of gfns {gfns} came back with {left:#x} pages left at {gpa:#x}")]
    Progress {
        /// What was asked for.
        gfns: GfnRange,
        /// Where it says to be.
        gpa: Gpa,
        /// What it says is left.
        left: u64,
    },
}
