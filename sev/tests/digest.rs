//! The launch digest, after each page, is the one that other programs compute.

mod kit;

use cvm_memory::addr::Gpa;
use cvm_memory_sev::digest::{LaunchDigest, PageType, VMSA_GPA};
use kit::{content, number, sha384, snp_vectors};

fn page_type(name: &str) -> PageType {
    (0..=u8::MAX).filter_map(PageType::from_raw).find(|page_type| page_type.to_string() == name).unwrap()
}

#[test]
fn every_sequence_after_every_page() {
    let vectors = snp_vectors();
    for (name, number) in vectors["page_types"].as_object().unwrap() {
        assert_eq!(u64::from(page_type(name).raw()), number.as_u64().unwrap());
    }
    let (mut sequences, mut pages, mut intermediate) = (0, 0, 0);
    for vector in vectors["vectors"].as_array().unwrap() {
        let name = vector["name"].as_str().unwrap();
        let after = vector["after_each_op"].as_array();
        let mut digest = LaunchDigest::INITIAL;
        for (nr, op) in vector["ops"].as_array().unwrap().iter().enumerate() {
            let page = content(&op["content"]);
            assert_eq!(sha384(&*page), op["content_sha384"].as_str().unwrap(), "{name}: contents of op {nr}");
            let gpa = Gpa(number(&op["gpa"]));
            match page_type(op["type"].as_str().unwrap()) {
                PageType::Vmsa => {
                    assert_eq!(gpa, VMSA_GPA);
                    digest.add_vmsa(&page);
                }
                page_type => digest.add(page_type, gpa.gfn(), &page),
            }
            pages += 1;
            if let Some(expected) = after.and_then(|after| after.get(nr)) {
                assert_eq!(digest.to_string(), expected.as_str().unwrap(), "{name}: after op {nr}");
                intermediate += 1;
            }
        }
        assert_eq!(digest.to_string(), vector["digest"].as_str().unwrap(), "{name}");
        sequences += 1;
    }
    println!("{sequences} sequences, {pages} pages, {intermediate} digests in between");
    assert!(sequences >= 29 && pages > 1000 && intermediate >= 29);
}
