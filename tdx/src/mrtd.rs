//! MRTD: the measurement of a TD's initial memory.
//!
//! SHA-384 over one buffer per page added (`TDH.MEM.PAGE.ADD`: its address) and one per 256 bytes measured
//! (`TDH.MR.EXTEND`: address and contents), in the order in which the commands are issued. So the order counts, how pages
//! are grouped into calls does not, and a page that is added unmeasured still leaves its address behind. It knows nothing
//! of what is added; that is [`import`](crate::import).
//!
//! Mirrors "Measurement and attestation" of the TDX module's base architecture specification, and
//! `tdx_gmem_post_populate()` (`arch/x86/kvm/vmx/tdx.c`) for the order.

use std::fmt;

use cvm_memory::addr::Gfn;
use sha2::{Digest, Sha384};

use crate::import::PAGE_BYTES;

/// Contents of a page.
pub type Page = [u8; PAGE_BYTES];

/// Bytes that one `TDH.MR.EXTEND` measures.
const CHUNK: usize = 256;

/// In which order the pages of a run are added and measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// Each page is added, then measured, then the next: Linux's KVM since it can build TDs.
    #[default]
    SinglePass,
    /// All pages of a run are added, then all are measured: stacks from before that (QEMU 8 and its kernels). The result
    /// depends on what counts as a run.
    TwoPass,
}

/// A finished measurement.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Measurement(
    /// The 48 bytes of an SHA-384 digest.
    pub [u8; 48],
);

impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Measurement({self})")
    }
}

/// A measurement in the making. Without any page it is the digest of nothing.
///
/// ```
/// use cvm_memory::addr::Gfn;
/// use cvm_memory_tdx::mrtd::Mrtd;
///
/// let mut mrtd = Mrtd::new();
/// mrtd.add_page(Gfn::containing(0x80_0000));
/// assert!(mrtd.finish().to_string().starts_with("73e66eb2f63d5a2c92c756c54b86b24f"));
/// ```
#[derive(Debug, Clone, Default)]
pub struct Mrtd {
    hash: Sha384,
}

impl Mrtd {
    /// A TD without memory (`TDH.MNG.INIT`).
    pub fn new() -> Self {
        Self::default()
    }

    /// `TDH.MEM.PAGE.ADD`.
    pub fn add_page(&mut self, gfn: Gfn) {
        self.command(b"MEM.PAGE.ADD\0\0\0\0", gfn.start_byte());
    }

    /// `TDH.MR.EXTEND` for every 256 bytes of a page.
    pub fn extend_page(&mut self, gfn: Gfn, contents: &Page) {
        let chunks = contents.chunks_exact(CHUNK);
        for (chunk, gpa) in chunks.zip((gfn.start_byte()..).step_by(CHUNK)) {
            self.command(b"MR.EXTEND\0\0\0\0\0\0\0", gpa);
            self.hash.update(chunk);
        }
    }

    /// `TDH.MR.FINALIZE`. What was measured so far can still be added to.
    pub fn finish(&self) -> Measurement {
        Measurement(self.hash.clone().finalize().into())
    }

    /// The 128 bytes that stand for a command: its name, its address, nothing.
    fn command(&mut self, name: &[u8; 16], gpa: u64) {
        self.hash.update(name);
        self.hash.update(gpa.to_le_bytes());
        self.hash.update([0; 104]);
    }
}
