//! Images of real firmware, and small ones with every kind of section, are imported as other programs measure them.

mod kit;

use cvm_memory_sev::cpuid::CpuidTable;
use cvm_memory_sev::digest::{LaunchDigest, PageType};
use cvm_memory_sev::firmware::{FirmwareError, Ovmf, SectionType};
use cvm_memory_sev::import::{Import, ImportList};
use cvm_memory_sev::vmsa::CpuSignature;
use kit::{firmware, firmware_vectors, number, sha256, synth_vectors};
use serde_json::Value;

/// The file of ours that a vector was computed from.
fn file_of(vector: &Value) -> String {
    let release = vector["name"].as_str().unwrap().split([' ', '-']).nth(1).unwrap();
    format!("{release}-{}", vector["file"].as_str().unwrap())
}

/// Continues `digest` with the imports after the image itself: hashing that once is enough.
fn finished(list: &ImportList, firmware: LaunchDigest, vmsas: &[cvm_memory_sev::vmsa::Vmsa]) -> LaunchDigest {
    let mut digest = firmware;
    for import in list.iter().skip(1) {
        for (nr, gfn) in import.gfns().into_iter().enumerate() {
            let page = import.pages().get(nr).cloned().unwrap_or_default();
            digest.add(import.page_type().unwrap(), gfn, &page);
        }
    }
    vmsas.iter().for_each(|vmsa| digest.add_vmsa(vmsa.page()));
    digest
}

#[test]
fn real_images() {
    let mut digests = 0;
    for vector in firmware_vectors().as_array().unwrap() {
        let name = file_of(vector);
        let image = firmware(&name);
        assert_eq!(sha256(&image), vector["sha256"].as_str().unwrap(), "{name}");
        let Some(expected) = vector.get("snp_launch_digest").and_then(Value::as_object) else {
            assert!(vector["sev_metadata"].as_array().unwrap().is_empty());
            assert!(matches!(Ovmf::parse(&image), Err(FirmwareError::Missing { entry: "sev metadata" })), "{name}");
            continue;
        };
        let ovmf = Ovmf::parse(&image).unwrap();
        assert_eq!(ovmf.gpa(), number(&vector["gpa"]));
        assert_eq!(u64::from(ovmf.start_of_others().unwrap()), number(&vector["sev_es_reset_eip"]));
        for (section, expected) in ovmf.sections().iter().zip(vector["sev_metadata"].as_array().unwrap()) {
            assert_eq!(u64::from(section.gpa), number(&expected["gpa"]));
            assert_eq!(u64::from(section.size), number(&expected["size"]));
            let section_type = match expected["type"].as_str().unwrap() {
                "SNP_SEC_MEM" => SectionType::Memory,
                "SNP_SECRETS" => SectionType::Secrets,
                "CPUID" => SectionType::Cpuid,
                "SVSM_CAA" => SectionType::CallingArea,
                other => panic!("section {other}"),
            };
            assert_eq!(section.section_type, section_type);
        }
        assert_eq!(ovmf.sections().len(), vector["sev_metadata"].as_array().unwrap().len());

        let list = ovmf.import_list(&CpuidTable::default(), None).unwrap();
        let count = |key: &str| vector["snp_pages"].get(key).map_or(0, number);
        assert_eq!(list.count(Some(PageType::Normal)), count("normal"));
        assert_eq!(list.count(Some(PageType::Cpuid)), count("CPUID"));
        assert_eq!(list.count(Some(PageType::Secrets)), count("SNP_SECRETS"));
        assert_eq!(list.count(Some(PageType::Zero)), count("SNP_SEC_MEM") + count("SVSM_CAA"));
        assert!(list.iter().all(|import| !import.gfns().is_empty()), "an empty section is refused by KVM");

        let alone: ImportList = [Import::normal(ovmf.gpa(), &image).unwrap()].into_iter().collect();
        let hash = alone.digest(&[]);
        assert_eq!(hash.to_string(), vector["snp_ovmf_hash"].as_str().unwrap(), "{name}");
        for (key, expected) in expected {
            let mut words = key.split(' ');
            let cpu = CpuSignature::of_cpu_type(words.next().unwrap()).unwrap();
            let vcpus = words.next().unwrap().strip_prefix("vcpus=").unwrap().parse().unwrap();
            let features = number(&Value::from(words.next().unwrap().strip_prefix("features=").unwrap()));
            let vmsas = ovmf.vmsas(vcpus, cpu, features).unwrap();
            assert_eq!(finished(&list, hash, &vmsas).to_string(), expected.as_str().unwrap(), "{name}, {key}");
            digests += 1;
        }
        let one = ovmf.vmsas(1, CpuSignature::of_cpu_type("EPYC-v4").unwrap(), 1).unwrap();
        assert_eq!(list.digest(&one).to_string(), expected["EPYC-v4 vcpus=1 features=0x1"].as_str().unwrap());
    }
    println!("{digests} digests");
    assert!(digests >= 96);
}

#[test]
fn small_images_with_every_section() {
    let (vectors, mut types) = (synth_vectors(), std::collections::BTreeSet::new());
    let cpu = CpuSignature::of_cpu_type(vectors["cpu"].as_str().unwrap()).unwrap();
    let mut images = 0;
    for vector in vectors["vectors"].as_array().unwrap() {
        let name = vector["file"].as_str().unwrap();
        let image = std::fs::read(format!("{}/../tests/vectors/snp_synth/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert_eq!(sha256(&image), vector["sha256"].as_str().unwrap());
        let ovmf = Ovmf::parse(&image).unwrap();
        let sections: Vec<[u64; 3]> = ovmf
            .sections()
            .iter()
            .map(|section| [section.gpa.into(), section.size.into(), section.section_type as u64])
            .collect();
        let expected: Vec<[u64; 3]> = vector["sections"]
            .as_array()
            .unwrap()
            .iter()
            .map(|section| [0, 1, 2].map(|nr| number(&section[nr])))
            .collect();
        assert_eq!(sections, expected, "{name}");
        types.extend(sections.iter().map(|section| section[2]));
        let list = ovmf.import_list(&CpuidTable::default(), None).unwrap();
        let vcpus = u32::try_from(number(&vector["vcpus"])).unwrap();
        let vmsas = ovmf.vmsas(vcpus, cpu, number(&vectors["guest_features"])).unwrap();
        assert_eq!(list.digest(&vmsas).to_string(), vector["launch_digest"].as_str().unwrap(), "{name}");
        images += 1;
    }
    assert_eq!(types.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4, 16]);
    assert!(images >= 20);
}
