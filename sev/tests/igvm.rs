//! IGVM files become the list that KVM launches: contents, parameters, save areas last.
#![cfg(feature = "igvm")]

mod kit;

use std::sync::Arc;

use cvm_memory::addr::GfnRange;
use cvm_memory::memory::CvmMemory;
use cvm_memory_sev::commands::{Init, SnpCommands};
use cvm_memory_sev::digest::{LaunchDigest, PageType};
use cvm_memory_sev::igvm::{IgvmError, IgvmImage, Parameters};
use cvm_memory_sev::launch::{FinishError, Launch, Policy, StartOptions};
use cvm_memory_sev::soft::SoftSnp;
use cvm_memory_sev::vmsa::{CpuSignature, RESET_VECTOR, Vmsa, VmsaOptions};
use igvm::measurement::generate_snp_measurement;
use igvm::snp_defs::SevVmsa;
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader, IgvmRevision, IsolationType};
use igvm_defs::{
    IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY, IGVM_VHS_SNP_ID_BLOCK_SIGNATURE,
    IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
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

/// An ID block with bytes that are all different, as far as that goes.
fn id_block(author_key_enabled: u8) -> IgvmDirectiveHeader {
    let signature =
        |first: u8| Box::new(IGVM_VHS_SNP_ID_BLOCK_SIGNATURE { r_comp: [first; 72], s_comp: [first + 1; 72] });
    let key = |curve: u32, first: u8| {
        Box::new(IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY { curve, reserved: 0, qx: [first; 72], qy: [first + 1; 72] })
    };
    let author = author_key_enabled > 0;
    IgvmDirectiveHeader::SnpIdBlock {
        compatibility_mask: 1,
        author_key_enabled,
        reserved: [0; 3],
        ld: [0x11; 48],
        family_id: [0x22; 16],
        image_id: [0x33; 16],
        version: 1,
        guest_svn: 0x0403_0201,
        id_key_algorithm: 1,
        author_key_algorithm: author.into(),
        id_key_signature: signature(0x40),
        id_public_key: key(2, 0x50),
        author_key_signature: signature(if author { 0x60 } else { 0 }),
        author_public_key: key(2, 0x70),
    }
}

/// Without an author key.
fn anonymous_block() -> IgvmDirectiveHeader {
    let mut block = id_block(0);
    if let IgvmDirectiveHeader::SnpIdBlock { author_key_signature, author_public_key, .. } = &mut block {
        author_key_signature.s_comp = [0; 72];
        **author_public_key = IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY { curve: 0, reserved: 0, qx: [0; 72], qy: [0; 72] };
    }
    block
}

/// Written and read by the igvm crate, then laid out as the firmware ABI has it.
#[test]
fn the_id_block_is_the_firmwares() {
    let mut bytes = Vec::new();
    file(vec![normal(0x5000, &[1]), context(0), id_block(1)]).unwrap().serialize(&mut bytes).unwrap();
    let image = IgvmImage::parse(&bytes, &Parameters::default()).unwrap();
    let block = image.id_block().unwrap();
    let expected =
        [&[0x11; 48][..], &[0x22; 16], &[0x33; 16], &[1, 0, 0, 0], &[1, 2, 3, 4], &0x3_0000_u64.to_le_bytes()];
    assert_eq!(block.block[..], expected.concat());
    let zeros = |bytes: usize| vec![0; bytes];
    let signature = |first: u8| [vec![first; 72], vec![first + 1; 72], zeros(512 - 144)].concat();
    let key = |first: u8| [vec![2, 0, 0, 0], vec![first; 72], vec![first + 1; 72], zeros(1028 - 148)].concat();
    let algorithms = vec![1, 0, 0, 0, 1, 0, 0, 0];
    let id = [algorithms, zeros(56), signature(0x40), key(0x50), zeros(60)].concat();
    let auth = [id, signature(0x60), key(0x70), zeros(892)].concat();
    assert_eq!(block.auth[..], auth);
    assert!(block.author_key);
    // What the file says is what the launch has to come to.
    let options = image.finish_options();
    assert_eq!((options.expected, options.id_block.as_ref()), (Some(LaunchDigest::new([0x11; 48])), Some(block)));

    let image = load(vec![context(0), anonymous_block()]).unwrap();
    let block = image.id_block().unwrap();
    assert!(!block.author_key && block.auth[0x680..].iter().all(|byte| *byte == 0));
    let none = load(vec![context(0)]).unwrap().finish_options();
    assert_eq!((none.expected, none.id_block), (None, None));
}

#[test]
fn an_id_block_that_makes_no_sense_is_refused() {
    let reason = |result: Result<IgvmImage, IgvmError>| match result.unwrap_err() {
        IgvmError::IdBlock { reason } => reason,
        other => panic!("{other}"),
    };
    assert_eq!(reason(load(vec![anonymous_block(), anonymous_block()])), "twice");
    assert_eq!(reason(load(vec![id_block(0)])), "an author key that is not enabled");
    assert_eq!(reason(load(vec![id_block(2)])), "an author key is enabled or not");
    let platforms = vec![platform(IgvmPlatformType::SEV_SNP)];
    let no_policy = IgvmFile::new(IgvmRevision::V1, platforms, vec![], vec![anonymous_block()]).unwrap();
    let refused = IgvmImage::from_file(&no_policy, &Parameters::default());
    assert_eq!(reason(refused), "the file has no policy to vouch for");
}

/// The model's firmware takes the block for the digest that it vouches for; with another the VM is not lost.
#[test]
fn a_launch_with_an_id_block() {
    let vouching = |digest: [u8; 48]| {
        let mut block = anonymous_block();
        if let IgvmDirectiveHeader::SnpIdBlock { ld, .. } = &mut block {
            *ld = digest;
        }
        load(vec![normal(0x5000, &[1]), context(0), block]).unwrap()
    };
    let digest = load(vec![normal(0x5000, &[1]), context(0)]).unwrap();
    let digest = digest.import_list().digest(digest.vmsas());
    for good in [true, false] {
        let image = vouching(if good { *digest.bytes() } else { [9; 48] });
        let snp = Arc::new(SoftSnp::new());
        let launch = Launch::init(Arc::clone(&snp) as Arc<dyn SnpCommands>, &Init::default()).unwrap();
        let memory = CvmMemory::builder().ram(0, 1 << 20).build(Arc::new(snp.vm().clone())).unwrap();
        let mut vcpu = snp.vm().create_vcpu();
        snp.set_registers(0, &image.vmsas()[0]);
        let policy = Policy::new(image.policy().unwrap()).unwrap();
        let mut launch = launch.start(&StartOptions { policy, ..StartOptions::default() }).unwrap();
        launch.import(&memory, image.import_list(), &mut |_| {}).unwrap();
        let result = launch.finish(&mut [&mut vcpu], image.vmsas(), image.finish_options());
        match good {
            true => assert_eq!(result.unwrap().digest, digest),
            false => assert!(matches!(result, Err(FinishError::Digest { digest: found, .. }) if found == digest)),
        }
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
