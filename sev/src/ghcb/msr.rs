//! The protocol of the GHCB register (`MSR_AMD64_SEV_ES_GHCB`): one value there, one back. For guests that have no GHCB page
//! yet.

use super::{MapGpaRange, Operation};

/// The bits that say what a value is about.
const INFO: u64 = 0xfff;
/// KVM's answer to a page state change that failed.
const PSC_FAILED: u64 = 1 << 63;
/// Frame numbers in a value.
const GFN_BITS: u64 = (1 << 40) - 1;
const GFN_SHIFT: u32 = 12;
const OPERATION_SHIFT: u32 = 52;

/// Kinds of values.
mod info {
    pub const SEV_INFO: u64 = 0x001;
    pub const SEV_INFO_REQUEST: u64 = 0x002;
    pub const PREFERRED_GPA_REQUEST: u64 = 0x010;
    pub const PREFERRED_GPA: u64 = 0x011;
    pub const REGISTER_REQUEST: u64 = 0x012;
    pub const REGISTERED: u64 = 0x013;
    pub const PSC_REQUEST: u64 = 0x014;
    pub const PSC: u64 = 0x015;
    pub const FEATURES_REQUEST: u64 = 0x080;
    pub const FEATURES: u64 = 0x081;
    pub const TERMINATE: u64 = 0x100;
}

/// What the hypervisor offers: SNP, and creation of other vCPUs.
const FEATURES: u64 = 0x3;
/// "I have no preference."
const NO_PREFERENCE: u64 = 0xf_ffff_ffff_ffff;

/// What the guest asks for by a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Which versions of the protocol, and which bit is the C-bit.
    SevInfo,
    /// Which frame the host would like the GHCB at.
    PreferredGpa,
    /// This is the frame of the GHCB from now on.
    Register(u64),
    /// A page is to change its state.
    PageState(MapGpaRange),
    /// A page state change with an operation that there is not: an error without an exit.
    UnknownOperation,
    /// What the host offers.
    Features,
    /// The guest gives up.
    Terminate,
    /// Low bits zero: the address of the GHCB page, whose contents are the request.
    Page(u64),
    /// Anything else: KVM leaves it as it is, and the guest goes on.
    Unknown,
}

/// What `value` asks for.
///
/// ```
/// use cvm_memory_sev::ghcb::msr::{Request, parse};
/// use cvm_memory_sev::ghcb::{MapGpaRange, Operation};
///
/// let request = parse(2 << 52 | 0x1234 << 12 | 0x014);
/// let change = MapGpaRange { gfn: 0x1234, pages: 1, operation: Operation::Shared, large: false };
/// assert_eq!(request, Request::PageState(change));
/// ```
pub fn parse(value: u64) -> Request {
    let gfn = value >> GFN_SHIFT;
    match value & INFO {
        0 => Request::Page(value),
        info::SEV_INFO_REQUEST => Request::SevInfo,
        info::PREFERRED_GPA_REQUEST => Request::PreferredGpa,
        info::REGISTER_REQUEST => Request::Register(gfn),
        info::PSC_REQUEST => {
            // Four bits.
            let operation = u8::try_from(value >> OPERATION_SHIFT & 0xf).ok().and_then(Operation::from_raw);
            operation.map_or(Request::UnknownOperation, |operation| {
                Request::PageState(MapGpaRange { gfn: gfn & GFN_BITS, pages: 1, operation, large: false })
            })
        }
        info::FEATURES_REQUEST => Request::Features,
        info::TERMINATE => Request::Terminate,
        _ => Request::Unknown,
    }
}

/// The value by which a guest asks for a page state change.
pub const fn page_state_request(gfn: u64, operation: Operation) -> u64 {
    (operation.raw() as u64) << OPERATION_SHIFT | (gfn & GFN_BITS) << GFN_SHIFT | info::PSC_REQUEST
}

/// The value by which a guest says where its GHCB page is.
pub const fn register_request(gfn: u64) -> u64 {
    gfn << GFN_SHIFT | info::REGISTER_REQUEST
}

/// KVM's answer to [`Request::SevInfo`].
pub const fn sev_info(c_bit: u8) -> u64 {
    2 << 48 | 1 << 32 | (c_bit as u64) << 24 | info::SEV_INFO
}

/// KVM's answer to [`Request::PreferredGpa`].
pub const fn preferred_gpa() -> u64 {
    NO_PREFERENCE << GFN_SHIFT | info::PREFERRED_GPA
}

/// KVM's answer to [`Request::Register`]: always accepted.
pub const fn registered(gfn: u64) -> u64 {
    gfn << GFN_SHIFT | info::REGISTERED
}

/// KVM's answer to [`Request::Features`].
pub const fn features() -> u64 {
    FEATURES << GFN_SHIFT | info::FEATURES
}

/// KVM's answer to [`Request::PageState`], by what userspace has answered; and, as a failure, to
/// [`Request::UnknownOperation`] and where hypercalls do not exit.
pub const fn page_state(succeeded: bool) -> u64 {
    if succeeded { info::PSC } else { PSC_FAILED | info::PSC }
}
