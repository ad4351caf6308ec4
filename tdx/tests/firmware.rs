//! Real firmware images: their sections and measurements as others found them.

mod firmware_kit;

use cvm_memory::addr::GfnRange;
use cvm_memory_tdx::hob::{memory_list, td_hob};
use cvm_memory_tdx::import::ImportList;
use cvm_memory_tdx::mrtd::Order;
use cvm_memory_tdx::tdvf::{Attributes, SectionKind, Tdvf, TdvfError};
use cvm_memory_tdx::width::Width;
use firmware_kit::{image, vectors};
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
struct Firmware {
    name: String,
    sha256: String,
    tdvf_sections: Option<Vec<RawSection>>,
    mrtd_single_pass: Option<String>,
    mrtd_two_pass: Option<String>,
}

#[derive(Deserialize)]
struct RawSection {
    data_offset: String,
    raw_size: String,
    gpa: String,
    mem_size: String,
    attr: String,
    #[serde(rename = "type")]
    kind: String,
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

const IMAGES: [&str; 5] = [
    "sid-OVMF.inteltdx.ms.fd.xz",
    "trixie-OVMF_CODE_4M.fd.xz",
    "trixie-OVMF.fd.xz",
    "bookworm-OVMF_CODE_4M.fd.xz",
    "bookworm-OVMF.fd.xz",
];

/// The image with that digest.
fn by_digest(sha256: &str) -> Vec<u8> {
    let hex = |image: &[u8]| Sha256::digest(image).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    IMAGES.into_iter().map(image).find(|image| hex(image) == sha256).unwrap()
}

#[test]
fn every_image_is_measured_or_refused() {
    let text = std::fs::read_to_string(vectors("firmware_vectors.json")).unwrap();
    let all: Vec<Firmware> = serde_json::from_str(&text).unwrap();
    let (mut measured, mut refused) = (0, 0);
    for firmware in &all {
        let image = by_digest(&firmware.sha256);
        let parsed = Tdvf::parse(&image);
        let (Some(single), Some(two)) = (&firmware.mrtd_single_pass, &firmware.mrtd_two_pass) else {
            // What is cut off is described all the same, or nothing is.
            match (&firmware.tdvf_sections, parsed) {
                (Some(_), Err(TdvfError::PastEnd { index: 0, offset: 0x84000, size: 0x37_c000, image: 0x37_c000 }))
                | (None, Err(TdvfError::NoMetadata)) => refused += 1,
                (_, other) => panic!("{}: {other:?}", firmware.name),
            }
            continue;
        };
        let tdvf = parsed.unwrap();
        for (section, raw) in tdvf.sections().iter().zip(firmware.tdvf_sections.as_ref().unwrap()) {
            assert_eq!((section.gfns.start_byte(), section.gfns.bytes()), (hex(&raw.gpa), hex(&raw.mem_size)));
            let (start, end) = (hex(&raw.data_offset), hex(&raw.data_offset) + hex(&raw.raw_size));
            assert_eq!((section.data.start as u64, section.data.end as u64), (start, end));
            assert_eq!(section.attributes.contains(Attributes::MEASURED), hex(&raw.attr) == 1);
            let kind = match raw.kind.as_str() {
                "BFV" => SectionKind::Bfv,
                "CFV" => SectionKind::Cfv,
                "TD_HOB" => SectionKind::TdHob,
                "TEMP_MEM" => SectionKind::TempMem,
                other => panic!("{other}"),
            };
            assert_eq!(section.kind, kind);
        }
        assert_eq!(tdvf.sections().len(), 6);
        // What is in the list of memory makes no difference to the measurement.
        let ram = [GfnRange::from_bytes(0, 0x8000_0000).unwrap(), GfnRange::from_bytes(1 << 32, 1 << 31).unwrap()];
        let memory = memory_list(&ram, &tdvf.added_memory()).unwrap();
        let hob = td_hob(tdvf.td_hob().unwrap().gfns.start().into(), &memory).unwrap();
        let list = ImportList::new(tdvf.imports(&hob).unwrap(), Width::Bits48).unwrap();
        assert_eq!(list.mrtd(Order::SinglePass).to_string(), *single, "{}", firmware.name);
        assert_eq!(list.mrtd(Order::TwoPass).to_string(), *two, "{}", firmware.name);
        measured += 1;
    }
    assert_eq!((measured, refused), (3, 2));
}

/// Cut anywhere, an image is refused and nothing else happens.
#[test]
fn cut_images() {
    let whole = image("trixie-OVMF.fd.xz");
    Tdvf::parse(&whole).unwrap();
    for cut in [1, 2, 16, 32, 48, 50, 1 << 12, 0x8_4000, whole.len() - 100, whole.len() - 1, whole.len()] {
        // What is lost at the end takes the table along; what is lost at the start, the end of some data.
        assert!(Tdvf::parse(&whole[..whole.len() - cut]).is_err(), "{cut:#x}");
        assert!(Tdvf::parse(&whole[cut..]).is_err(), "{cut:#x}");
    }
}
