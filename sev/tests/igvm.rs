//! IGVM files become the list that KVM launches: contents, parameters, save areas last.
#![cfg(feature = "igvm")]

mod kit;

use cvm_memory::addr::GfnRange;
use cvm_memory_sev::digest::PageType;
use cvm_memory_sev::igvm::{IgvmError, IgvmImage, Parameters};
use cvm_memory_sev::vmsa::{CpuSignature, RESET_VECTOR, Vmsa, VmsaOptions};
use igvm::measurement::generate_snp_measurement;
use igvm::snp_defs::SevVmsa;
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader, IgvmRevision, IsolationType};
use igvm_defs::{
    IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType,
    IgvmPlatformType,
};
use kit::{firmware, hex};
use proptest::collection::vec;
use proptest::prelude::*;

fn is_context(directive: &IgvmDirectiveHeader) -> bool {
    matches!(directive, IgvmDirectiveHeader::SnpVpContext { .. })
}

/// What the igvm crate computes if the save areas come last.
fn measured_last(file: &IgvmFile, mask: u32) -> String {
    let (mut last, mut directives): (Vec<_>, Vec<_>) = file.directives().iter().cloned().partition(is_context);
    last.sort_by_key(|directive| match directive {
        IgvmDirectiveHeader::SnpVpContext { vp_index, .. } => *vp_index,
        _ => unreachable!(),
    });
    directives.extend(last);
    hex(&generate_snp_measurement(file.initializations(), &directives, mask).unwrap())
}

#[test]
fn a_real_file() {
    let bytes = firmware("trixie.igvm");
    let file = IgvmFile::new_from_binary(&bytes, Some(IsolationType::Snp)).unwrap();
    let image = IgvmImage::parse(&bytes, &Parameters::default()).unwrap();
    let list = image.import_list();
    let counts =
        [PageType::Normal, PageType::Secrets, PageType::Cpuid, PageType::Unmeasured].map(|t| list.count(Some(t)));
    assert_eq!(counts, [1085, 1, 1, 0]);
    assert_eq!((image.vmsas().len(), image.policy(), image.vouched_digest()), (1, Some(0x3_0000), None));
    assert_eq!(list.digest(image.vmsas()).to_string(), measured_last(&file, 2));
    // In the order of the file it would be another one, which no KVM ever reports.
    let in_file_order = hex(&generate_snp_measurement(file.initializations(), file.directives(), 2).unwrap());
    assert_eq!(
        in_file_order,
        "400d5c97bc301edcae91a2acca319b5e013d044f4dd63805ffded0a9bfa156367021d6eef29107003642d1cf4a532abc"
    );
    let context = file.directives().iter().position(is_context).unwrap();
    assert_eq!(in_file_order == measured_last(&file, 2), context + 1 == file.directives().len());
    println!("context is directive {context} of {}", file.directives().len());
}

fn page(gpa: u64, flags: IgvmPageDataFlags, data_type: IgvmPageDataType, data: &[u8]) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::PageData { gpa, compatibility_mask: 1, flags, data_type, data: data.to_vec() }
}

fn normal(gpa: u64, data: &[u8]) -> IgvmDirectiveHeader {
    page(gpa, IgvmPageDataFlags::new(), IgvmPageDataType::NORMAL, data)
}

fn context(vp_index: u16) -> IgvmDirectiveHeader {
    use zerocopy::FromBytes as _;
    let start = RESET_VECTOR - u32::from(vp_index);
    let vmsa = Vmsa::at_reset(VmsaOptions { start, cpu: CpuSignature::new(25, 1, 1), features: 1 });
    let vmsa = Box::new(SevVmsa::read_from_prefix(&vmsa.page()[..]).unwrap().0);
    IgvmDirectiveHeader::SnpVpContext { gpa: 0xffff_ffff_f000, compatibility_mask: 1, vp_index, vmsa }
}

fn area(index: u32, bytes: u64, initial: &[u8]) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::ParameterArea {
        number_of_bytes: bytes,
        parameter_area_index: index,
        initial_data: initial.to_vec(),
    }
}

const fn at(parameter_area_index: u32, byte_offset: u32) -> IGVM_VHS_PARAMETER {
    IGVM_VHS_PARAMETER { parameter_area_index, byte_offset }
}

fn insert(gpa: u64, parameter_area_index: u32) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT { gpa, compatibility_mask: 1, parameter_area_index })
}

fn platform(platform_type: IgvmPlatformType) -> IgvmPlatformHeader {
    IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: 1,
        highest_vtl: 0,
        platform_type,
        platform_version: 1,
        shared_gpa_boundary: 0,
    })
}

fn file(directives: Vec<IgvmDirectiveHeader>) -> Result<IgvmFile, igvm::Error> {
    let policy = IgvmInitializationHeader::GuestPolicy { policy: 0x3_0000, compatibility_mask: 1 };
    IgvmFile::new(IgvmRevision::V1, vec![platform(IgvmPlatformType::SEV_SNP)], vec![policy], directives)
}

fn load(directives: Vec<IgvmDirectiveHeader>) -> Result<IgvmImage, IgvmError> {
    let memory = [GfnRange::from_bytes(0, 0x8000_0000).unwrap(), GfnRange::from_bytes(1 << 32, 0x4000_0000).unwrap()];
    let parameters = Parameters { vcpus: 3, memory: &memory, command_line: "quiet", ..Parameters::default() };
    IgvmImage::from_file(&file(directives).unwrap(), &parameters)
}

#[test]
fn every_kind_of_page_and_contexts_last() {
    let (plain, shared) = (IgvmPageDataFlags::new(), IgvmPageDataFlags::new().with_shared(true));
    let directives = vec![
        context(1),
        normal(0x5000, &[1; 17]),
        page(0x1000, plain, IgvmPageDataType::SECRETS, &[]),
        context(0),
        page(0x2000, plain, IgvmPageDataType::CPUID_DATA, &[]),
        page(0x3000, plain, IgvmPageDataType::CPUID_XF, &[]),
        page(0x4000, plain.with_unmeasured(true), IgvmPageDataType::NORMAL, &[2; 4096]),
        page(0x6000, shared, IgvmPageDataType::NORMAL, &[3; 9]),
        area(0, 0x2000, &[9; 5]),
        IgvmDirectiveHeader::VpCount(at(0, 8)),
        IgvmDirectiveHeader::CommandLine(at(0, 0xffe)),
        IgvmDirectiveHeader::MemoryMap(at(0, 0x1010)),
        IgvmDirectiveHeader::EnvironmentInfo(at(0, 0x1ffc)),
        insert(0x8000, 0),
        IgvmDirectiveHeader::RequiredMemory {
            gpa: 0x10_0000,
            compatibility_mask: 1,
            number_of_bytes: 0x2000,
            vtl2_protectable: false,
        },
    ];
    let image = load(directives.clone()).unwrap();
    let types: Vec<_> =
        image.import_list().iter().map(|import| (import.gfns().start_byte(), import.page_type())).collect();
    use PageType::*;
    let expected = [
        (0x5000, Some(Normal)),
        (0x1000, Some(Secrets)),
        (0x2000, Some(Cpuid)),
        (0x3000, Some(Cpuid)),
        (0x4000, Some(Unmeasured)),
        (0x6000, None),
        (0x8000, Some(Unmeasured)),
    ];
    assert_eq!(types, expected);
    assert_eq!(
        image.import_list().digest(image.vmsas()).to_string(),
        measured_last(&file(directives).unwrap(), 1).as_str()
    );
    assert_eq!(image.required_memory(), [GfnRange::from_bytes(0x10_0000, 0x2000).unwrap()]);

    let parameters: Vec<u8> =
        image.import_list().iter().last().unwrap().pages().iter().flat_map(|page| page.to_vec()).collect();
    assert_eq!(parameters[..12], [9, 9, 9, 9, 9, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(&parameters[0xffe..0x1004], b"quiet\0");
    let map: Vec<u64> =
        parameters[0x1010..][..72].chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(map, [0, 0x8_0000, 0, 0x10_0000, 0x4_0000, 0, 0, 0, 0]);
}

#[test]
fn what_cannot_be_launched_is_refused() {
    let reason = |directives| match load(directives).unwrap_err() {
        IgvmError::Parameter { reason, .. } | IgvmError::Context { reason, .. } => reason,
        other => panic!("{other}"),
    };
    assert_eq!(reason(vec![context(1)]), "those before it have none");
    assert_eq!(
        reason(vec![area(0, 0x1000, &[]), IgvmDirectiveHeader::VpCount(at(0, 0xffd)), insert(0, 0)]),
        "too small"
    );
    assert_eq!(
        reason(vec![area(0, 0x1000, &[]), IgvmDirectiveHeader::VpCount(at(0, u32::MAX)), insert(0, 0)]),
        "too small"
    );
    assert_eq!(reason(vec![area(0, 1 << 40, &[])]), "too large");
    assert_eq!(reason(vec![area(0, 0x80_0000, &[]), area(1, 0x80_1000, &[])]), "too large");
    let madt = vec![area(0, 0x1000, &[]), IgvmDirectiveHeader::Madt(at(0, 0)), insert(0, 0)];
    assert!(matches!(load(madt), Err(IgvmError::Unsupported { what: "an acpi table as parameter", .. })));
    let large = IgvmPageDataFlags::new().with_is_2mb_page(true);
    let large = vec![page(0x20_0000, large, IgvmPageDataType::NORMAL, &[])];
    assert!(matches!(load(large), Err(IgvmError::Unsupported { gpa: 0x20_0000, .. })));

    let other =
        IgvmFile::new(IgvmRevision::V1, vec![platform(IgvmPlatformType::VSM_ISOLATION)], vec![], vec![]).unwrap();
    assert!(matches!(IgvmImage::from_file(&other, &Parameters::default()), Err(IgvmError::NotForSnp)));
    for file in [&[][..], &[0; 24], b"IGVM", &[0xff; 64]] {
        assert!(matches!(IgvmImage::parse(file, &Parameters::default()), Err(IgvmError::Format(_))));
    }
}

/// The overlap is found where all overlaps are: in the list, before anything is launched.
#[test]
fn overlapping_pages_are_found_by_the_list() {
    let image = load(vec![normal(0x3000, &[1]), normal(0x1000, &[1]), normal(0x3000, &[2])]);
    let all = [GfnRange::from_bytes(0, 1 << 32).unwrap()];
    assert!(image.unwrap().import_list().validate(&all, &all).is_err());
}

/// Sets the checksum that the header of `file` should have, so that what follows is looked at.
fn with_checksum(mut file: Vec<u8>) -> Vec<u8> {
    let field = |file: &[u8], at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
    let headers = field(&file, 8).saturating_add(field(&file, 12)).clamp(24, file.len());
    let start = field(&file, 8).min(headers);
    file[20..24].fill(0);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&file[..24]);
    crc.update(&file[start..headers]);
    let crc = crc.finalize();
    file[20..24].copy_from_slice(&crc.to_le_bytes());
    file
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_file_makes_it_panic(changes in vec((0..700_usize, any::<u8>()), 0..6), cut in 0..64_usize) {
        let mut good = Vec::new();
        let directives = vec![
            normal(0x5000, &[1; 17]),
            area(0, 0x1000, &[9; 5]),
            IgvmDirectiveHeader::VpCount(at(0, 8)),
            IgvmDirectiveHeader::MemoryMap(at(0, 16)),
            insert(0x8000, 0),
            context(0),
        ];
        file(directives).unwrap().serialize(&mut good).unwrap();
        let mut bad = good;
        for (at, byte) in changes {
            if let Some(place) = bad.get_mut(at) {
                *place = byte;
            }
        }
        bad.truncate(bad.len() - cut.saturating_sub(60));
        let bad = with_checksum(bad);
        // The igvm crate's own panics are caught; they need not be heard.
        std::panic::set_hook(Box::new(|info| {
            if !info.location().is_some_and(|place| place.file().contains("/igvm-")) {
                eprintln!("{info}");
            }
        }));
        let _any = IgvmImage::parse(&bad, &Parameters::default());
    }
}
