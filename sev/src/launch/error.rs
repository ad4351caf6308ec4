//! Why a launch does not go on.

use cvm_memory::addr::GfnRange;
use cvm_memory::convert::{ConvertError, Outcome, State};
use cvm_memory::memory::AccessError;

use crate::commands::CommandError;
use crate::digest::{LaunchDigest, PageType};
use crate::import::InvalidList;

/// Why an import did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The list is wrong. Nothing has happened.
    #[error(transparent)]
    List(#[from] InvalidList),
    /// Frames have been launched before. Nothing has happened.
    #[error("gfns {gfns} have been launched already")]
    Again {
        /// The first of them.
        gfns: GfnRange,
    },
    /// Frames could not be brought into the state that they must have. They are as they were.
    #[error("gfns {gfns} to {to}")]
    Convert {
        /// The frames.
        gfns: GfnRange,
        /// The state.
        to: State,
        /// Why.
        #[source]
        error: ConvertError,
    },
    /// Frames could not be brought into the state that they must have.
    #[error("gfns {gfns} to {to}: {outcome:?}")]
    NotConverted {
        /// The frames.
        gfns: GfnRange,
        /// The state.
        to: State,
        /// How far it came.
        outcome: Box<Outcome>,
    },
    /// Shared contents could not be written.
    #[error("write shared contents at {gpa:#x}")]
    Write {
        /// Where.
        gpa: u64,
        /// Why.
        #[source]
        error: AccessError,
    },
    /// A page could not be launched. Those before it are.
    #[error("launch {page_type} page at {gpa:#x}")]
    Command {
        /// Where.
        gpa: u64,
        /// Its type.
        page_type: PageType,
        /// What KVM answered.
        #[source]
        error: CommandError,
    },
    /// KVM reported success and did nothing.
    #[error("no progress at {gpa:#x}")]
    Stalled {
        /// Where.
        gpa: u64,
    },
}

/// Why a launch could not be finished.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FinishError {
    /// There is not one save area for each vCPU. Nothing has happened.
    #[error("{vcpus} vcpus, but {vmsas} save areas")]
    Vcpus {
        /// vCPUs.
        vcpus: usize,
        /// Save areas.
        vmsas: usize,
    },
    /// A save area has other features than the VM was initialised with, and so every vCPU has. Nothing has happened.
    #[error("the save area of vcpu {vcpu} has features {features:#x}, but the vm has {vm:#x}")]
    Features {
        /// The vCPU, by its place in the list.
        vcpu: usize,
        /// `SEV_FEATURES` of its save area.
        features: u64,
        /// What `KVM_SEV_INIT2` was given, and SNP itself.
        vm: u64,
    },
    /// The digest is not the expected one. KVM was not asked.
    #[error("the digest is {digest}, not {expected}")]
    Digest {
        /// What it would be.
        digest: LaunchDigest,
        /// What it should be.
        expected: LaunchDigest,
    },
    /// What KVM answered. It may have measured save areas, which it does only once: the VM is lost.
    #[error(transparent)]
    Command(#[from] CommandError),
}
