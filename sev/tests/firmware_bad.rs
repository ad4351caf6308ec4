//! Images that lie are refused with what is wrong, and none of them makes the parser panic.

#[path = "kit/image.rs"]
mod image;
mod kit;

use cvm_memory_sev::cpuid::CpuidTable;
use cvm_memory_sev::firmware::{FirmwareError, KernelHashes, Ovmf, SectionType};
use cvm_memory_sev::vmsa::CpuSignature;
use image::{HASHES, METADATA, RESET, assemble, entry, metadata, table};
use proptest::collection::vec;
use proptest::prelude::*;

const SECTIONS: [[u32; 3]; 2] = [[0x80_0000, 0x9000, 1], [0x80_e000, 0x1000, 3]];

fn meta_entry() -> Vec<u8> {
    entry(&0x400_u32.to_le_bytes(), METADATA)
}

/// Why an image with this metadata and this table is refused.
fn refused(metadata: &[u8], table: &[u8]) -> FirmwareError {
    Ovmf::parse(&assemble(2, 1, metadata, table)).unwrap_err()
}

fn list_refused(sections: &[[u32; 3]], hashes_at: Option<u32>, hashes: bool) -> FirmwareError {
    let image = image::image(1, 1, sections, 0, hashes_at);
    let hashes = hashes.then(|| KernelHashes::new(b"kernel", b"", ""));
    Ovmf::parse(&image).unwrap().import_list(&CpuidTable::default(), hashes.as_ref()).unwrap_err()
}

#[test]
fn sizes() {
    for size in [0, 1, 4095, 4097] {
        assert_eq!(Ovmf::parse(&vec![0; size]).unwrap_err(), FirmwareError::Size { size: size as u64 });
    }
    assert_eq!(Ovmf::parse(&[0; 4096]).unwrap_err(), FirmwareError::NoTable);
}

#[test]
fn tables() {
    let good = metadata(&SECTIONS);
    assert_eq!(refused(&good, &table(&[])), FirmwareError::Missing { entry: "sev metadata" });
    assert_eq!(
        refused(&good, &table(&[entry(&[1, 2, 3], METADATA)])),
        FirmwareError::Missing { entry: "sev metadata" }
    );
    let twice = table(&[meta_entry(), meta_entry()]);
    assert_eq!(refused(&good, &twice), FirmwareError::Duplicate { entry: "sev metadata" });
    // The table claims to be longer than the image, or shorter than its own footer.
    let mut long = table(&[meta_entry()]);
    let at = long.len() - 18;
    long[at..at + 2].copy_from_slice(&0xffff_u16.to_le_bytes());
    assert_eq!(refused(&good, &long), FirmwareError::TableEntry { offset: 0x2000 - 32, size: 0xffff });
    long[at..at + 2].copy_from_slice(&17_u16.to_le_bytes());
    assert_eq!(refused(&good, &long), FirmwareError::TableEntry { offset: 0x2000 - 32, size: 17 });
    // So does an entry; one of no size would be read for ever.
    for size in [0, 17, 0x400_u16] {
        let mut bad = entry(&[0; 4], RESET);
        bad[4..6].copy_from_slice(&size.to_le_bytes());
        let error = refused(&good, &table(&[bad, meta_entry()]));
        assert_eq!(error, FirmwareError::TableEntry { offset: 0x2000 - 32 - 18 - 22, size });
    }
}

#[test]
fn the_metadata_must_be_there_and_whole() {
    let at = |offset: u32| table(&[entry(&offset.to_le_bytes(), METADATA)]);
    let reason = |error| match error {
        FirmwareError::Metadata { reason, .. } => reason,
        other => panic!("{other}"),
    };
    let good = metadata(&SECTIONS);
    assert_eq!(reason(refused(&good, &at(0x2001))), "not in the image");
    assert_eq!(reason(refused(&good, &at(u32::MAX))), "not in the image");
    assert_eq!(reason(refused(&good, &at(0))), "cut off");
    assert_eq!(reason(refused(&good, &at(15))), "cut off");
    assert_eq!(reason(refused(&good, &at(0x404))), "no signature");
    let with = |offset: usize, value: u32| {
        let mut bad = good.clone();
        bad[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        reason(refused(&bad, &at(0x400)))
    };
    assert_eq!(with(8, 2), "not of version 1");
    assert_eq!(with(4, 15), "cut off");
    assert_eq!(with(4, 0x401), "cut off");
    assert_eq!(with(4, u32::MAX), "cut off");
    assert_eq!(with(12, 3), "more sections than there is room for");
    assert_eq!(with(12, u32::MAX), "more sections than there is room for");
}

#[test]
fn sections() {
    let unknown = refused(&metadata(&[[0x1000, 0x2000, 5]]), &table(&[meta_entry()]));
    assert_eq!(unknown, FirmwareError::UnknownSection { section_type: 5, gpa: 0x1000, size: 0x2000 });
    for kind in [2, 3] {
        let error = list_refused(&[[0x1000, 0x2000, kind]], None, false);
        assert!(matches!(error, FirmwareError::NotOnePage { section } if section.gpa == 0x1000), "{error}");
    }
    for section in [[0x800, 0x1000, 1], [0x1000, 0x1800, 1], [0x1000, 1, 4], [0x801, 0x1000, 2]] {
        let error = list_refused(&[section], None, false);
        assert!(matches!(error, FirmwareError::Import(_)), "{error}");
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("unaligned"));
    }
}

#[test]
fn hashes_need_their_place() {
    const SECTION: [u32; 3] = [0x81_0000, 0x1000, 0x10];
    assert_eq!(list_refused(&SECTIONS, None, true), FirmwareError::NoHashes);
    assert_eq!(list_refused(&[SECTION], None, true), FirmwareError::Missing { entry: "kernel hashes" });
    // An address of zero is what images without support have there.
    assert_eq!(list_refused(&[SECTION], Some(0), true), FirmwareError::Missing { entry: "kernel hashes" });
    for gpa in [0x80_f000, 0x80_ffff, 0x81_0f51, 0x81_0fff, 0x81_1000, u32::MAX] {
        let error = list_refused(&[SECTION], Some(gpa), true);
        assert!(
            matches!(error, FirmwareError::HashesOutside { section, .. } if section.section_type == SectionType::KernelHashes)
        );
    }
    let hashes = KernelHashes::new(b"kernel", b"initrd", "console=ttyS0");
    let image = image::image(1, 1, &[SECTION], 0, Some(0x81_0f50));
    let list = Ovmf::parse(&image).unwrap().import_list(&CpuidTable::default(), Some(&hashes)).unwrap();
    assert_eq!(list.iter().last().unwrap().pages()[0][0xf50..], hashes.table());

    // A place that is too small for the table.
    let entries = [meta_entry(), entry(&[0x81_0000_u32.to_le_bytes(), 175_u32.to_le_bytes()].concat(), HASHES)];
    let image = assemble(1, 1, &metadata(&[SECTION]), &table(&entries));
    let error = Ovmf::parse(&image).unwrap().import_list(&CpuidTable::default(), Some(&hashes)).unwrap_err();
    assert!(matches!(error, FirmwareError::HashesOutside { size: 175, .. }));
}

#[test]
fn several_vcpus_need_the_reset_block() {
    let image = assemble(1, 1, &metadata(&SECTIONS), &table(&[meta_entry()]));
    let ovmf = Ovmf::parse(&image).unwrap();
    let cpu = CpuSignature::of_cpu_type("EPYC").unwrap();
    assert_eq!(ovmf.vmsas(1, cpu, 1).unwrap().len(), 1);
    assert_eq!(ovmf.vmsas(2, cpu, 1).unwrap_err(), FirmwareError::Missing { entry: "reset block" });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes anywhere near the structures are overwritten: whatever comes of it is a list or an error.
    #[test]
    fn no_image_makes_it_panic(changes in vec((0..0x460_usize, any::<u8>()), 1..12)) {
        let mut image = image::image(1, 1, &SECTIONS, 0x80_b004, Some(0x81_0000));
        let end = image.len();
        for (back, byte) in changes {
            image[end - 1 - back.min(end - 1)] = byte;
        }
        if let Ok(ovmf) = Ovmf::parse(&image) {
            let _any = ovmf.import_list(&CpuidTable::default(), Some(&KernelHashes::new(b"", b"", "")));
        }
    }
}
