//! Any bytes as an IGVM file, with the checksum that it should have. The igvm crate's own panics are caught by the library,
//! and do not count here.
#![no_main]

use std::sync::Once;

use cvm_memory_sev::igvm::{IgvmImage, Parameters};
use libfuzzer_sys::fuzz_target;

static HOOK: Once = Once::new();

fn with_checksum(data: &[u8]) -> Vec<u8> {
    let mut file = data.to_vec();
    if file.len() < 24 {
        return file;
    }
    let field = |file: &[u8], at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let whole = file.len();
    let start = (field(&file, 8) as usize).min(whole);
    let end = start.saturating_add(field(&file, 12) as usize).min(whole);
    file[16..20].copy_from_slice(&(whole as u32).to_le_bytes());
    file[20..24].fill(0);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&file[..24]);
    crc.update(&file[start..end]);
    let crc = crc.finalize();
    file[20..24].copy_from_slice(&crc.to_le_bytes());
    file
}

fuzz_target!(|data: &[u8]| {
    HOOK.call_once(|| {
        let abort = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.location().is_some_and(|place| place.file().contains("/igvm-")) {
                abort(info);
            }
        }));
    });
    let parameters = Parameters { vcpus: 2, command_line: "quiet", ..Parameters::default() };
    if let Ok(image) = IgvmImage::parse(&with_checksum(data), &parameters) {
        let _digest = image.import_list().digest(image.vmsas());
    }
});
