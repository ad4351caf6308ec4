//! Fields of the GHCB page, as far as page state changes need them.

/// Offset of `SW_EXITCODE`.
pub const EXIT_CODE: u64 = 0x390;
/// Offset of `SW_EXITINFO1`.
pub const EXIT_INFO_1: u64 = 0x398;
/// Offset of `SW_EXITINFO2`.
pub const EXIT_INFO_2: u64 = 0x3a0;
/// Offset of `SW_SCRATCH`.
pub const SCRATCH: u64 = 0x3a8;
/// Offset of the bitmap of valid fields: a bit for each 8 bytes.
pub const VALID_BITMAP: u64 = 0x3f0;
/// Offset of the buffer that is shared with the host.
pub const SHARED_BUFFER: u64 = 0x800;
/// Bytes of that buffer.
pub const SHARED_BUFFER_BYTES: u64 = 2032;
/// Offset of the version of the protocol, 16 bits.
pub const VERSION: u64 = 0xffa;
/// Offset of what the page is used for, 32 bits: zero for this protocol.
pub const USAGE: u64 = 0xffc;

/// Exit code of a page state change.
pub const EXIT_PSC: u64 = 0x8000_0010;
/// Exit code by which a vCPU is created or destroyed.
pub const EXIT_AP_CREATION: u64 = 0x8000_0013;

/// `SW_EXITINFO1` of a request that KVM could not even look at.
pub const ERROR: u64 = 2;

/// `SW_EXITINFO2` then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum InputError {
    /// The page is not the one that was registered.
    NotRegistered = 1,
    /// Its usage is not zero.
    InvalidUsage = 2,
    /// The scratch area is not in the shared buffer.
    InvalidScratch = 3,
    /// A field that is needed is not valid.
    MissingInput = 4,
    /// A field has a value that it cannot have.
    InvalidInput = 5,
    /// There is no such exit code.
    InvalidEvent = 6,
}

impl InputError {
    /// Its number.
    pub const fn raw(self) -> u64 {
        self as u64
    }
}

/// The bit of the field at `offset` in the bitmap of valid fields, as byte and mask.
pub const fn valid_bit(offset: u64) -> (u64, u8) {
    let bit = offset / 8;
    (bit / 8, 1 << (bit % 8))
}

/// How many bytes there are from `scratch` to the end of the shared buffer of the GHCB at `ghcb`, if it lies there.
pub fn scratch_bytes(ghcb: u64, scratch: u64) -> Option<u64> {
    let start = ghcb.checked_add(SHARED_BUFFER)?;
    let end = start.checked_add(SHARED_BUFFER_BYTES)?;
    if scratch < start { None } else { end.checked_sub(scratch).filter(|bytes| *bytes > 0) }
}
