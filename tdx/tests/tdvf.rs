//! Metadata that is wrong in one place each, and the list of memory.

mod firmware_kit;

use cvm_memory::addr::{AddrError, Gfn, GfnRange, Gpa};
use cvm_memory_tdx::hob::{HobError, MemoryEntry, memory_list, td_hob};
use cvm_memory_tdx::import::Import;
use cvm_memory_tdx::tdvf::{SectionKind, Tdvf, TdvfError};
use cvm_memory_testkit::gfns;
use firmware_kit::{RawSection, descriptor, made};
use proptest::prelude::*;

fn refused(sections: &[RawSection]) -> TdvfError {
    Tdvf::parse(&made(&descriptor(sections))).unwrap_err()
}

#[test]
fn sections_become_imports_in_their_order() {
    let permanent = RawSection::new(4, 0x20_0000, 0x2000);
    let sections = [
        RawSection { size: 0x1800, memory: 0x3000, ..RawSection::code() },
        RawSection::new(3, 0x10_0000, 0x1000),
        RawSection::new(2, 0x8000, 0x1000),
        permanent,
        RawSection { gpa: 0x30_0000, attributes: 2, ..permanent },
        RawSection { kind: 1, offset: 0x1000, attributes: 0, gpa: 0xfff0_0000, ..RawSection::code() },
    ];
    let image = made(&descriptor(&sections));
    let tdvf = Tdvf::parse(&image).unwrap();
    assert_eq!(tdvf.sections()[4].kind, SectionKind::PermMem);
    assert_eq!(tdvf.added_memory(), [gfns(0x100, 0x101), gfns(8, 9), gfns(0x200, 0x202)]);
    let import = |gfns, measured, contents: &[u8]| Import { gfns, measured, contents: contents.to_vec() };
    assert_eq!(
        tdvf.imports(b"the list").unwrap(),
        [
            import(gfns(0xffff0, 0xffff3), true, &image[..0x1800]),
            import(gfns(0x100, 0x101), false, &[]),
            import(gfns(8, 9), false, b"the list"),
            import(gfns(0x200, 0x202), false, &[]),
            import(gfns(0xfff00, 0xfff01), false, &image[0x1000..0x2000]),
        ]
    );
    assert_eq!(tdvf.imports(&[1; 0x1000]).unwrap()[2].contents, [1; 0x1000]);
    let too_large = TdvfError::HobTooLarge { bytes: 0x1001, gfns: Some(gfns(8, 9)) };
    assert_eq!(tdvf.imports(&[1; 0x1001]), Err(too_large));
    let image = made(&descriptor(&[RawSection::code()]));
    let nowhere = TdvfError::HobTooLarge { bytes: 1, gfns: None };
    assert_eq!(Tdvf::parse(&image).unwrap().imports(&[1]), Err(nowhere));
}

#[test]
fn each_field_of_a_section_is_checked() {
    let code = RawSection::code();
    let memory = RawSection::new(3, 0x10_0000, 0x1000);
    assert_eq!(refused(&[code, RawSection { kind: 7, ..memory }]), TdvfError::Kind { index: 1, kind: 7 });
    for (section, attributes) in [(code, 4), (code, 2), (memory, 2), (RawSection { kind: 4, ..memory }, 3)] {
        let section = RawSection { attributes, ..section };
        assert_eq!(refused(&[section]), TdvfError::Attributes { index: 0, attributes });
    }
    let bad = |gpa, memory, error| {
        let section = RawSection { gpa, memory, size: 0, ..RawSection::new(3, 0, 0) };
        assert_eq!(refused(&[code, section]), TdvfError::Memory { index: 1, error });
    };
    bad(0x1000, 0, AddrError::Empty { start: 0x1000 });
    bad(0x1800, 0x1000, AddrError::Unaligned { start: 0x1800, size: 0x1000 });
    bad(0x1000, 0x1800, AddrError::Unaligned { start: 0x1000, size: 0x1800 });
    bad(0xffff_ffff_ffff_f000, 0x1000, AddrError::BeyondTop { start: 0xffff_ffff_ffff_f000, size: 0x1000 });

    let size = made(&descriptor(&[code])).len();
    let past = |offset, size: u32| {
        let section = RawSection { offset, size, memory: u64::from(size.next_multiple_of(0x1000)), ..code };
        refused(&[section])
    };
    let end = u32::try_from(size).unwrap();
    assert_eq!(
        past(end - 0xfff, 0x1000),
        TdvfError::PastEnd { index: 0, offset: end - 0xfff, size: 0x1000, image: size }
    );
    assert_eq!(past(u32::MAX, 1), TdvfError::PastEnd { index: 0, offset: u32::MAX, size: 1, image: size });
    let exact = RawSection { offset: end - 0x1000, ..code };
    Tdvf::parse(&made(&descriptor(&[exact]))).unwrap();

    let at = gfns(0xffff0, 0xffff1);
    for size in [0, 0x1001] {
        let section = RawSection { size, ..code };
        assert_eq!(refused(&[section]), TdvfError::Data { index: 0, size, gfns: at });
    }
    let with_data = RawSection { size: 1, ..memory };
    assert_eq!(refused(&[code, with_data]), TdvfError::Data { index: 1, size: 1, gfns: gfns(0x100, 0x101) });
}

#[test]
fn sections_are_checked_together() {
    let code = RawSection::code();
    let memory = |kind, page: u64, pages: u64| RawSection::new(kind, page << 12, pages << 12);
    assert_eq!(refused(&[]), TdvfError::Count { bfv: 0, td_hob: 0 });
    assert_eq!(refused(&[code, memory(2, 1, 1), memory(2, 2, 1)]), TdvfError::Count { bfv: 1, td_hob: 2 });
    let overlap = TdvfError::Overlap { first: 1, second: 2, gfns: gfns(5, 6) };
    assert_eq!(refused(&[code, memory(3, 4, 2), memory(2, 5, 3)]), overlap);
    // Memory that is accepted later overlaps as well.
    let later = RawSection { attributes: 2, ..memory(4, 5, 3) };
    assert_eq!(refused(&[code, memory(3, 4, 2), later]), overlap);
    let half = 1 << 19;
    assert_eq!(refused(&[code, memory(3, 1 << 24, half), memory(3, 1 << 25, half)]), TdvfError::TooMuch { index: 2 });
    // As much as there can be, and no page more.
    Tdvf::parse(&made(&descriptor(&[code, memory(3, 1 << 24, half), memory(3, 1 << 25, half - 1)]))).unwrap();
}

#[test]
fn the_descriptor_is_found_and_whole() {
    let good = descriptor(&[RawSection::code()]);
    let image = made(&good);
    Tdvf::parse(&image).unwrap();
    let at = 0x2000;
    let with = |at: usize, bytes: &[u8]| {
        let mut image = image.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        Tdvf::parse(&image).map(drop)
    };
    let size = image.len();
    let offset = u32::try_from(size - at).unwrap();
    assert_eq!(with(at, b"TDVG"), Err(TdvfError::BadDescriptor { offset, size }));
    assert_eq!(with(at + 8, &[2]), Err(TdvfError::Version { version: 2 }));
    for length in [0, 15, 16, 47, 49, 80, u32::MAX] {
        let wrong = TdvfError::Length { length, sections: 1 };
        assert_eq!(with(at + 4, &length.to_le_bytes()), Err(wrong));
    }
    for sections in [0, 2, 1 << 27, u32::MAX] {
        let wrong = TdvfError::Length { length: 48, sections };
        assert_eq!(with(at + 12, &sections.to_le_bytes()), Err(wrong));
    }
    // The entry of the table: 22 bytes, before 26 of another, 18 of the table's own and 32 of reset vector.
    let entry = size - 32 - 18 - 26 - 22;
    for offset in [0, 15, u32::try_from(size).unwrap() + 1, u32::MAX] {
        assert_eq!(with(entry, &offset.to_le_bytes()), Err(TdvfError::BadDescriptor { offset, size }));
    }
    assert_eq!(with(entry + 6, &[0]), Err(TdvfError::NoMetadata));
    // A length below its own trailer would never end; one beyond the table leaves it.
    for length in [0_u16, 17, 18, 21, 49, u16::MAX] {
        assert_eq!(with(entry + 4, &length.to_le_bytes()), Err(TdvfError::BadTable { at: entry + 22 }), "{length}");
    }
    let table = size - 32 - 18;
    for length in [0_u16, 17, u16::MAX] {
        assert_eq!(with(table, &length.to_le_bytes()), Err(TdvfError::NoTable { size }));
    }
    assert_eq!(with(table, &18_u16.to_le_bytes()), Err(TdvfError::NoMetadata));
    assert_eq!(with(table + 2, &[0]), Err(TdvfError::NoTable { size }));
    for length in 0..64 {
        assert_eq!(Tdvf::parse(&[0; 64][..length]), Err(TdvfError::NoTable { size: length }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever stands in the metadata, what is accepted keeps to the image and to itself.
    #[test]
    fn any_bytes_are_refused_or_sound(flips in prop::collection::vec((0..220_usize, any::<u8>()), 0..6)) {
        let sections = [RawSection::code(), RawSection::new(2, 0x8000, 0x1000), RawSection::new(3, 0x9000, 0x1000)];
        let mut image = made(&descriptor(&sections));
        for (at, byte) in flips {
            image[0x2000 + at] = byte;
        }
        if let Ok(tdvf) = Tdvf::parse(&image) {
            for (one, section) in tdvf.sections().iter().enumerate() {
                prop_assert!(section.data.end <= image.len());
                prop_assert!(section.data.len() as u64 <= section.gfns.bytes());
                prop_assert!(tdvf.sections()[..one].iter().all(|other| !other.gfns.overlaps(&section.gfns)));
            }
            prop_assert!(tdvf.imports(&[]).is_ok());
        }
    }

    /// Against page by page: every page of RAM once, accepted if and only if it was added.
    #[test]
    fn the_list_of_memory_is_ram(
        ram in prop::collection::vec((0..64_u64, 0..12_u64), 0..5),
        added in prop::collection::vec((0..64_u64, 0..5_u64), 0..4),
    ) {
        let range = |&(start, pages): &(u64, u64)| gfns(start, start + pages);
        let (ram, added) = (ram.iter().map(range).collect::<Vec<_>>(), added.iter().map(range).collect::<Vec<_>>());
        let times = |ranges: &[GfnRange], page| ranges.iter().filter(|gfns| gfns.contains(Gfn::new(page).unwrap())).count();
        let twice = |ranges: &[GfnRange]| (0..80).any(|page| times(ranges, page) > 1);
        let astray = |gfns: &GfnRange| !gfns.is_empty() && !ram.iter().any(|ram| ram.contains_range(gfns));
        match memory_list(&ram, &added) {
            Err(HobError::Overlap { .. }) => prop_assert!(twice(&ram) || twice(&added)),
            Err(HobError::NotRam { gfns }) => prop_assert!(added.contains(&gfns) && astray(&gfns)),
            Err(other) => prop_assert!(false, "{}", other),
            Ok(list) => {
                prop_assert!(!twice(&ram) && !twice(&added) && !added.iter().any(astray));
                for page in 0..80 {
                    let is_added = times(&added, page) == 1;
                    let entries = list.iter().filter(|entry| entry.gfns.contains(Gfn::new(page).unwrap()));
                    let unaccepted: Vec<bool> = entries.map(|entry| entry.unaccepted).collect();
                    let expected = if times(&ram, page) == 1 { vec![!is_added] } else { vec![] };
                    prop_assert_eq!(unaccepted, expected, "page {}", page);
                }
                prop_assert!(list.is_sorted_by_key(|entry| entry.gfns.start()));
                prop_assert!(list.iter().all(|entry| !entry.gfns.is_empty()));
            }
        }
    }
}

/// Byte by byte as the PI specification has it.
#[test]
fn the_list_as_firmware_reads_it() {
    let memory = [
        MemoryEntry { gfns: gfns(0, 0x800), unaccepted: true },
        MemoryEntry { gfns: gfns(0x800, 0x806), unaccepted: false },
    ];
    let list = td_hob(Gpa(0x80_9000), &memory).unwrap();
    let u16 = |at: usize| u16::from_le_bytes(list[at..at + 2].try_into().unwrap());
    let u32 = |at: usize| u32::from_le_bytes(list[at..at + 4].try_into().unwrap());
    let u64 = |at: usize| u64::from_le_bytes(list[at..at + 8].try_into().unwrap());
    assert_eq!((u16(0), u16(2), u32(4), u32(8), u32(12)), (1, 56, 0, 9, 0));
    assert_eq!([16, 24, 32, 40].map(u64), [0; 4]);
    // The list ends with the entry that says so.
    assert_eq!(u64(48), 0x80_9000 + 56 + 2 * 48);
    for (at, kind, start, bytes) in [(56, 7, 0, 0x80_0000), (104, 0, 0x80_0000, 0x6000)] {
        assert_eq!((u16(at), u16(at + 2), u32(at + 4), u64(at + 8), u64(at + 16)), (3, 48, 0, 0, 0));
        assert_eq!((u32(at + 24), u32(at + 28), u64(at + 32), u64(at + 40)), (kind, 7, start, bytes));
    }
    assert_eq!((u16(152), u16(154), u32(156), list.len()), (0xffff, 8, 0, 160));
    assert_eq!(td_hob(Gpa(u64::MAX - 50), &[]), Err(HobError::TooLong { base: Gpa(u64::MAX - 50), entries: 0 }));
}
