//! The seam of the launch: the commands of `KVM_MEMORY_ENCRYPT_OP` that an SNP VM has, one method each.
//!
//! Arguments are unchecked and errnos unchanged, as at [`Hypervisor`](cvm_memory::hypervisor::Hypervisor), so that the real
//! KVM and the model can be held against each other call by call. No policy lives here: what is asked for, in which
//! order, and what a failure means is [`launch`](crate::launch)'s business.
//!
//! Mirrors `sev_mem_enc_ioctl()` (`arch/x86/kvm/svm/sev.c`).

use std::fmt;

use nix::errno::Errno;

use crate::page::Page;

/// What the firmware answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FirmwareStatus(pub u32);

impl FirmwareStatus {
    /// It succeeded, or was not called.
    pub const SUCCESS: Self = Self(0);
    /// The guest is not in a state for the command.
    pub const INVALID_GUEST_STATE: Self = Self(0x02);
    /// The policy is not acceptable.
    pub const POLICY_FAILURE: Self = Self(0x07);
    /// The ID block is about another digest.
    pub const BAD_MEASUREMENT: Self = Self(0x0b);
    /// A parameter is invalid: of a CPUID page, a value that this machine does not offer.
    pub const INVALID_PARAM: Self = Self(0x16);
    /// A resource of the firmware is exhausted.
    pub const RESOURCE_LIMIT: Self = Self(0x17);
    /// The page is not in a state for the command.
    pub const INVALID_PAGE_STATE: Self = Self(0x1a);
    /// The page is another guest's.
    pub const INVALID_PAGE_OWNER: Self = Self(0x1c);
    /// Linux says so where the firmware was never called.
    pub const NOT_CALLED: Self = Self(u32::MAX);
}

impl fmt::Display for FirmwareStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::SUCCESS => "no error",
            Self::INVALID_GUEST_STATE => "invalid guest state",
            Self::POLICY_FAILURE => "policy failure",
            Self::BAD_MEASUREMENT => "bad measurement",
            Self::INVALID_PARAM => "invalid parameter",
            Self::RESOURCE_LIMIT => "resource limit",
            Self::INVALID_PAGE_STATE => "invalid page state",
            Self::INVALID_PAGE_OWNER => "invalid page owner",
            Self::NOT_CALLED => "not called",
            _ => "",
        };
        if name.is_empty() { write!(f, "{:#x}", self.0) } else { write!(f, "{:#x} ({name})", self.0) }
    }
}

/// A command that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{command}, firmware status {firmware}")]
pub struct CommandError {
    /// The command.
    pub command: &'static str,
    /// What the ioctl failed with.
    #[source]
    pub errno: Errno,
    /// What the firmware answered, as far as KVM says so.
    pub firmware: FirmwareStatus,
}

/// Argument of `KVM_SEV_INIT2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Init {
    /// `SEV_FEATURES` of every vCPU, without SNP itself, which KVM adds.
    pub vmsa_features: u64,
    /// Must be zero.
    pub flags: u32,
    /// Highest version of the GHCB protocol that is offered to the guest; zero lets KVM choose.
    pub ghcb_version: u16,
}

/// Argument of `KVM_SEV_SNP_LAUNCH_START`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaunchStart {
    /// The guest policy.
    pub policy: u64,
    /// What the guest is told about workarounds of the host's.
    pub gosvw: [u8; 16],
    /// Must be zero.
    pub flags: u16,
}

/// Argument of `KVM_SEV_SNP_LAUNCH_UPDATE`, which the call advances past what it has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaunchUpdate {
    /// First frame that is still to be done.
    pub gfn_start: u64,
    /// Bytes that are still to be done.
    pub len: u64,
    /// Type of the pages.
    pub page_type: u8,
    /// Must be zero.
    pub flags: u16,
}

/// Where the contents of launched pages come from.
#[derive(Debug)]
pub enum Source<'a> {
    /// From nowhere: the firmware zeroes the pages.
    None,
    /// From here.
    Pages(&'a [Page]),
    /// From here, and the firmware may write back what it would accept.
    Correctable(&'a mut Page),
}

/// An ID block, by which the guest's owner says which digest is theirs, with its signatures. As the firmware defines both.
#[derive(Clone, PartialEq, Eq)]
pub struct IdBlock {
    /// The block.
    pub block: [u8; 96],
    /// Signatures and keys.
    pub auth: Box<Page>,
    /// Whether there is an author key among them.
    pub author_key: bool,
}

impl fmt::Debug for IdBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdBlock").field("author_key", &self.author_key).finish_non_exhaustive()
    }
}

/// Argument of `KVM_SEV_SNP_LAUNCH_FINISH`.
#[derive(Debug, Clone, Default)]
pub struct LaunchFinish {
    /// The ID block, if there is one.
    pub id_block: Option<IdBlock>,
    /// Whether attestation reports must not be signed with the chip's own key.
    pub vcek_disabled: bool,
    /// What the attestation report says of the host.
    pub host_data: [u8; 32],
    /// Must be zero.
    pub flags: u16,
}

/// The commands. One method, one command.
pub trait SnpCommands: fmt::Debug + Send + Sync {
    /// `KVM_SEV_INIT2`: before any vCPU is created.
    ///
    /// # Errors
    /// `EINVAL` (arguments, a vCPU exists), `EPERM` (done already), `EBUSY` (no ASID is left), `ENOTTY` (no SNP), and those of
    /// the firmware's initialisation.
    fn init(&self, init: &Init) -> Result<(), CommandError>;

    /// `KVM_SEV_SNP_LAUNCH_START`.
    ///
    /// # Errors
    /// `EINVAL` (arguments, started already), `ENOTTY`, and the firmware's.
    fn launch_start(&self, start: &LaunchStart) -> Result<(), CommandError>;

    /// `KVM_SEV_SNP_LAUNCH_UPDATE`. Success may be partial: `update` says what is left.
    ///
    /// # Errors
    /// `EINVAL` (arguments, not started, no slot with a file). `EIO` for everything that fails at the first page: nothing was
    /// done then, and `update` is unchanged. `EFAULT` if the source is shorter than `update` says.
    fn launch_update(&self, update: &mut LaunchUpdate, source: Source<'_>) -> Result<(), CommandError>;

    /// `KVM_SEV_SNP_LAUNCH_FINISH`.
    ///
    /// # Errors
    /// `EINVAL`, `EINTR`, `EIO`, and the firmware's. Not to be repeated: save areas may have been measured.
    fn launch_finish(&self, finish: &LaunchFinish) -> Result<(), CommandError>;
}
