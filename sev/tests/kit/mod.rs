//! What the tests of this crate share: the vectors and the firmware images, built into the programs so that they are there
//! in the lab too.
#![allow(dead_code, reason = "each test program uses its part")]

use cvm_memory_sev::page::Page;
use cvm_memory_sev::vmsa::{CpuSignature, Vmsa, VmsaOptions};
use serde_json::Value;
use sha2::{Digest as _, Sha256, Sha384};

macro_rules! vectors {
    ($name:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/", $name))
    };
}

pub fn snp_vectors() -> Value {
    serde_json::from_slice(vectors!("snp_vectors.json")).unwrap()
}

pub fn firmware_vectors() -> Value {
    serde_json::from_slice(vectors!("firmware_vectors.json")).unwrap()
}

pub fn synth_vectors() -> Value {
    serde_json::from_slice(vectors!("snp_synth_vectors.json")).unwrap()
}

/// A firmware image of Debian's, by the name of its file.
pub fn firmware(name: &str) -> Vec<u8> {
    let packed: &[u8] = match name {
        "bookworm-OVMF.fd" => vectors!("firmware/bookworm-OVMF.fd.xz"),
        "bookworm-OVMF_CODE_4M.fd" => vectors!("firmware/bookworm-OVMF_CODE_4M.fd.xz"),
        "sid-OVMF.inteltdx.ms.fd" => vectors!("firmware/sid-OVMF.inteltdx.ms.fd.xz"),
        "trixie-OVMF.fd" => vectors!("firmware/trixie-OVMF.fd.xz"),
        "trixie-OVMF_CODE_4M.fd" => vectors!("firmware/trixie-OVMF_CODE_4M.fd.xz"),
        "trixie.igvm" => vectors!("firmware/trixie.igvm.xz"),
        _ => panic!("no image {name}"),
    };
    let mut image = Vec::new();
    lzma_rs::xz_decompress(&mut &packed[..], &mut image).unwrap();
    image
}

pub fn number(value: &Value) -> u64 {
    match value {
        Value::String(text) => u64::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap(),
        other => other.as_u64().unwrap(),
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn sha384(bytes: &[u8]) -> String {
    hex(&Sha384::digest(bytes))
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The page that a vector describes.
pub fn content(content: &Value) -> Page {
    let field = |name| number(&content[name]);
    let byte = |value: u64| u8::try_from(value & 0xff).unwrap();
    let mut page = Page::ZERO;
    match content["kind"].as_str().unwrap() {
        "zero" => {}
        "fill" => page.fill(byte(field("byte"))),
        "ramp" => {
            for (at, to) in (0..).zip(page.iter_mut()) {
                *to = byte(at * field("mul") + field("add"));
            }
        }
        "sha256ctr" => {
            let seed = content["seed"].as_str().unwrap();
            for (at, chunk) in (0_u32..).zip(page.chunks_mut(32)) {
                chunk.copy_from_slice(&Sha256::digest([seed.as_bytes(), &at.to_le_bytes()].concat()));
            }
        }
        "vmsa" => {
            let cpu = CpuSignature::of_cpu_type(content["cpu"].as_str().unwrap()).unwrap();
            let start = u32::try_from(field("eip")).unwrap();
            page = Vmsa::at_reset(VmsaOptions { start, cpu, features: field("features") }).page().clone();
        }
        other => panic!("contents of kind {other}"),
    }
    page
}
