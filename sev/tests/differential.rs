//! Random images against crates that other people wrote: `igvm` for lists of pages, `sev` for OVMF images.

#[path = "kit/image.rs"]
mod image;
mod kit;

use std::fs;
use std::path::PathBuf;

use cvm_memory_sev::cpuid::CpuidTable;
use cvm_memory_sev::digest::VMSA_GPA;
use cvm_memory_sev::firmware::{KernelHashes, Ovmf};
use cvm_memory_sev::import::{Import, ImportList};
use cvm_memory_sev::page::Page;
use cvm_memory_sev::vmsa::{CpuSignature, Vmsa};
use igvm::measurement::generate_snp_measurement;
use igvm::snp_defs::SevVmsa;
use igvm::{IgvmDirectiveHeader, IgvmInitializationHeader};
use igvm_defs::{IgvmPageDataFlags, IgvmPageDataType};
use kit::hex;
use proptest::collection::vec;
use proptest::prelude::*;
use sev::measurement::snp::{SnpMeasurementArgs, snp_calc_launch_digest};
use sev::measurement::vcpu_types::CpuType;
use sev::measurement::vmsa::GuestFeatures;

#[derive(Debug, Clone)]
enum Kind {
    Normal,
    Unmeasured,
    Secrets,
    Cpuid,
    Shared,
}

fn kind() -> impl Strategy<Value = Kind> {
    use Kind::*;
    prop_oneof![Just(Normal), Just(Unmeasured), Just(Secrets), Just(Cpuid), Just(Shared)]
}

/// Directives of the igvm crate for the same page: contents shorter than a page are filled up with zeroes there.
fn page_data(gpa: u64, kind: &Kind, data: &[u8]) -> IgvmDirectiveHeader {
    let (flags, data_type) = match kind {
        Kind::Normal => (IgvmPageDataFlags::new(), IgvmPageDataType::NORMAL),
        Kind::Unmeasured => (IgvmPageDataFlags::new().with_unmeasured(true), IgvmPageDataType::NORMAL),
        Kind::Secrets => (IgvmPageDataFlags::new(), IgvmPageDataType::SECRETS),
        Kind::Cpuid => (IgvmPageDataFlags::new(), IgvmPageDataType::CPUID_DATA),
        Kind::Shared => (IgvmPageDataFlags::new().with_shared(true), IgvmPageDataType::NORMAL),
    };
    IgvmDirectiveHeader::PageData { gpa, compatibility_mask: 1, flags, data_type, data: data.to_vec() }
}

fn import(gpa: u64, kind: &Kind, data: &[u8]) -> Import {
    let mut page = data.to_vec();
    page.resize(page.len().next_multiple_of(4096).max(4096), 0);
    match kind {
        Kind::Normal => Import::normal(gpa, &page),
        Kind::Unmeasured => Import::unmeasured(gpa, &page),
        Kind::Secrets => Import::secrets(gpa),
        Kind::Cpuid => Import::cpuid(gpa, CpuidTable::from_page(Page::split(&page)[0].clone())),
        Kind::Shared => Import::shared(gpa, &page),
    }
    .unwrap()
}

fn vmsa_of(page: &Page) -> Box<SevVmsa> {
    use zerocopy::FromBytes as _;
    Box::new(SevVmsa::read_from_prefix(&page[..]).unwrap().0)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lists_as_the_igvm_crate_measures_them(
        pages in vec((0..1_u64 << 36, kind(), vec(any::<u8>(), 0..=4096)), 0..12),
        vcpus in 0..4_u32,
        start in any::<u32>(),
    ) {
        let list: ImportList = pages.iter().map(|(gfn, kind, data)| import(gfn << 12, kind, data)).collect();
        let mut directives: Vec<IgvmDirectiveHeader> =
            pages.iter().map(|(gfn, kind, data)| page_data(gfn << 12, kind, data)).collect();
        let vmsas = Vmsa::of_all(vcpus, start, CpuSignature::new(25, 1, 1), 1);
        for (vp_index, vmsa) in (0..).zip(&vmsas) {
            directives.push(IgvmDirectiveHeader::SnpVpContext {
                gpa: VMSA_GPA.get(),
                compatibility_mask: 1,
                vp_index,
                vmsa: vmsa_of(vmsa.page()),
            });
        }
        let policy = [IgvmInitializationHeader::GuestPolicy { policy: 0x3_0000, compatibility_mask: 1 }];
        let expected = generate_snp_measurement(&policy, &directives, 1).unwrap();
        prop_assert_eq!(list.digest(&vmsas).to_string(), hex(&expected));
    }
}

struct Files(PathBuf);

impl Files {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("cvm-memory-sev-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    fn file(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, data).unwrap();
        path
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Sections as OVMF could have them: the pages of one kind are single, memory has any size, zero included.
fn section() -> impl Strategy<Value = [u32; 3]> {
    // Not at address zero: that is how a table says that it is nowhere.
    (1..0x8_0000_u32, 0..8_u32, prop_oneof![Just(1_u32), Just(2), Just(3), Just(4), Just(0x10)]).prop_map(
        |(gfn, pages, kind)| {
            let pages = if kind == 1 { pages } else { 1 };
            [gfn << 12, pages << 12, kind]
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn images_as_the_sev_crate_measures_them(
        (pages, seed, sections, reset) in (1..6_usize, any::<u8>(), vec(section(), 0..12), any::<u32>()),
        (vcpus, features) in (1..5_u32, 1..64_u64),
        // No blanks around the command line: the other crate takes them off, and a hash is of bytes.
        kernel in proptest::option::of((vec(any::<u8>(), 0..64), proptest::option::of(vec(any::<u8>(), 0..64)), "([!-~]([ -~]{0,38}[!-~])?)?")),
        offset in 0..0x1000_u32 - 176,
    ) {
        let place = sections.iter().find(|section| section[2] == 0x10).map(|section| section[0] + offset);
        // With several sections for the hashes only the first is the one that the table points to.
        let mut seen = false;
        let sections: Vec<[u32; 3]> =
            sections.into_iter().filter(|section| section[2] != 0x10 || !std::mem::replace(&mut seen, true)).collect();
        let image = image::image(pages, seed, &sections, reset, place);
        let files = Files::new();
        let theirs = snp_calc_launch_digest(SnpMeasurementArgs {
            vcpus,
            vcpu_type: CpuType::EpycGenoa,
            ovmf_file: files.file("firmware", &image),
            guest_features: GuestFeatures(features),
            kernel_file: kernel.as_ref().map(|(kernel, ..)| files.file("kernel", kernel)),
            initrd_file: kernel.as_ref().and_then(|(_, initrd, _)| initrd.as_ref().map(|data| files.file("initrd", data))),
            append: kernel.as_ref().map(|(.., append)| append.as_str()),
            ovmf_hash_str: None,
            vmm_type: None,
        });
        let ovmf = Ovmf::parse(&image).unwrap();
        let hashes = kernel.as_ref().map(|(kernel, initrd, append)| {
            KernelHashes::new(kernel, initrd.as_deref().unwrap_or_default(), append)
        });
        let list = ovmf.import_list(&CpuidTable::default(), hashes.as_ref());
        match (list, theirs) {
            (Ok(list), Ok(theirs)) => {
                let vmsas = ovmf.vmsas(vcpus, CpuSignature::of_cpu_type("EPYC-Genoa").unwrap(), features).unwrap();
                prop_assert_eq!(list.digest(&vmsas).to_string(), theirs.get_hex_ld());
            }
            (Err(_), Err(_)) => prop_assert!(kernel.is_some() && place.is_none()),
            (ours, theirs) => prop_assert!(false, "ours: {ours:?}, theirs: {theirs:?}"),
        }
    }
}
