//! Any bytes as an OVMF image: a list or an error. What is accepted has a digest, whatever it imports.
#![no_main]

use cvm_memory_sev::cpuid::CpuidTable;
use cvm_memory_sev::firmware::{KernelHashes, Ovmf};
use cvm_memory_sev::vmsa::CpuSignature;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(firmware) = Ovmf::parse(data) else { return };
    let hashes = KernelHashes::new(b"kernel", b"initrd", "quiet");
    for hashes in [None, Some(&hashes)] {
        let Ok(list) = firmware.import_list(&CpuidTable::default(), hashes) else { continue };
        assert!(list.iter().all(|import| !import.gfns().is_empty()));
        // Sections may claim gigabytes: hashing those finds nothing.
        if list.pages() < 64 {
            let vmsas = firmware.vmsas(2, CpuSignature::new(25, 1, 1), 1);
            let _digest = list.digest(&vmsas.unwrap_or_default());
        }
    }
});
