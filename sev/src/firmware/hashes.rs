//! The table of hashes by which measured firmware recognises the kernel that it is given unmeasured.
//!
//! Mirrors QEMU's `sev_add_kernel_loader_hashes()` (`target/i386/sev.c`) and edk2's `BlobVerifierLibSevHashes`.

use sha2::{Digest as _, Sha256};

/// Bytes of the table, padding included.
pub const TABLE_BYTES: usize = 176;

/// 9438d606-4f22-4cc9-b479-a793d411fd21
const TABLE: [u8; 16] =
    [0x06, 0xd6, 0x38, 0x94, 0x22, 0x4f, 0xc9, 0x4c, 0xb4, 0x79, 0xa7, 0x93, 0xd4, 0x11, 0xfd, 0x21];
/// 4de79437-abd2-427f-b835-d5b172d2045b
const KERNEL: [u8; 16] =
    [0x37, 0x94, 0xe7, 0x4d, 0xd2, 0xab, 0x7f, 0x42, 0xb8, 0x35, 0xd5, 0xb1, 0x72, 0xd2, 0x04, 0x5b];
/// 44baf731-3a2f-4bd7-9af1-41e29169781d
const INITRD: [u8; 16] =
    [0x31, 0xf7, 0xba, 0x44, 0x2f, 0x3a, 0xd7, 0x4b, 0x9a, 0xf1, 0x41, 0xe2, 0x91, 0x69, 0x78, 0x1d];
/// 97d02dd8-bd20-4c94-aa78-e7714d36ab2a
const CMDLINE: [u8; 16] =
    [0xd8, 0x2d, 0xd0, 0x97, 0x20, 0xbd, 0x94, 0x4c, 0xaa, 0x78, 0xe7, 0x71, 0x4d, 0x36, 0xab, 0x2a];

/// GUID, size, hash.
const ENTRY_BYTES: u16 = 50;
/// GUID, size, three entries.
const USED_BYTES: u16 = 168;

/// Hashes of a kernel, its initial RAM disk and its command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelHashes {
    kernel: [u8; 32],
    initrd: [u8; 32],
    cmdline: [u8; 32],
}

impl KernelHashes {
    /// Of these files. Without an initial RAM disk it is that of an empty one; the command line ends with a NUL, which is
    /// added here.
    pub fn new(kernel: &[u8], initrd: &[u8], cmdline: &str) -> Self {
        let cmdline = Sha256::new().chain_update(cmdline).chain_update([0]).finalize();
        Self { kernel: Sha256::digest(kernel).into(), initrd: Sha256::digest(initrd).into(), cmdline: cmdline.into() }
    }

    /// The table as the firmware reads it.
    pub fn table(&self) -> [u8; TABLE_BYTES] {
        let mut bytes = Vec::with_capacity(TABLE_BYTES);
        bytes.extend(TABLE);
        bytes.extend(USED_BYTES.to_le_bytes());
        for (guid, hash) in [(CMDLINE, self.cmdline), (INITRD, self.initrd), (KERNEL, self.kernel)] {
            bytes.extend(guid);
            bytes.extend(ENTRY_BYTES.to_le_bytes());
            bytes.extend(hash);
        }
        let mut table = [0; TABLE_BYTES];
        for (to, from) in table.iter_mut().zip(bytes) {
            *to = from;
        }
        table
    }
}
