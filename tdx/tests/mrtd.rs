//! Measurements against those that others have computed: vectors, and the `igvm` crate on random lists.

use std::path::Path;

use cvm_memory::addr::{Gfn, GfnRange};
use cvm_memory_tdx::import::{Import, ImportError, ImportList};
use cvm_memory_tdx::mrtd::Order;
use cvm_memory_tdx::width::Width;
use igvm::IgvmDirectiveHeader;
use igvm::measurement::generate_tdx_measurement;
use igvm_defs::{IgvmPageDataFlags, IgvmPageDataType};
use proptest::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
struct File {
    vectors: Vec<Vector>,
}

#[derive(Deserialize)]
struct Vector {
    name: String,
    order: String,
    mrtd: String,
    ops: Vec<Op>,
}

#[derive(Deserialize)]
struct Op {
    gpa: String,
    measure: bool,
    content: Content,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Content {
    Zero,
    Fill { byte: u8 },
    Ramp { mul: u64, add: u64 },
    Sha256Ctr { seed: String },
}

impl Content {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Zero => vec![0; 4096],
            Self::Fill { byte } => vec![*byte; 4096],
            Self::Ramp { mul, add } => (0..4096).map(|at: u64| u8::try_from((at * mul + add) % 256).unwrap()).collect(),
            Self::Sha256Ctr { seed } => {
                let block = |n: u32| Sha256::digest([seed.as_bytes(), &n.to_le_bytes()].concat());
                (0..128).flat_map(block).collect()
            }
        }
    }
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

fn list(imports: Vec<Import>) -> ImportList {
    ImportList::new(imports, Width::Bits48).unwrap()
}

/// Pages that follow each other as one import, as a region of the vectors' two-pass order is.
fn merged(ops: &[Op]) -> Vec<Import> {
    let mut imports: Vec<Import> = Vec::new();
    for op in ops {
        let gfns = GfnRange::page(Gfn::containing(hex(&op.gpa)));
        match imports.last_mut() {
            Some(last) if last.gfns.end() == gfns.start() && last.measured == op.measure => {
                last.gfns = last.gfns.hull(&gfns);
                last.contents.extend(op.content.bytes());
            }
            _ => imports.push(Import { gfns, measured: op.measure, contents: op.content.bytes() }),
        }
    }
    imports
}

#[test]
fn every_vector() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors/tdx_vectors.json");
    let file: File = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut two_pass = 0;
    for Vector { name, order, mrtd, ops } in &file.vectors {
        let order = match order.as_str() {
            "single_pass" => Order::SinglePass,
            "two_pass" => Order::TwoPass,
            other => panic!("{other}"),
        };
        two_pass += usize::from(order == Order::TwoPass);
        assert_eq!(list(merged(ops)).mrtd(order).to_string(), *mrtd, "{name}");
    }
    assert_eq!((file.vectors.len(), two_pass), (24, 2));
}

/// Computed by somebody else, page by page.
fn by_igvm(list: &ImportList) -> String {
    let page_data = |import: &Import, gfn: Gfn| IgvmDirectiveHeader::PageData {
        gpa: gfn.start_byte(),
        compatibility_mask: 1,
        flags: IgvmPageDataFlags::new().with_unmeasured(!import.measured),
        data_type: IgvmPageDataType::NORMAL,
        data: import.page(gfn).to_vec(),
    };
    let pages = list.imports().iter().flat_map(|import| import.gfns.iter().map(move |gfn| (import, gfn)));
    let directives: Vec<IgvmDirectiveHeader> = pages.map(|(import, gfn)| page_data(import, gfn)).collect();
    let digest = generate_tdx_measurement(&directives, 1).unwrap();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs of one to four pages at distinct places, in no order, some with less contents than pages.
fn imports() -> impl Strategy<Value = Vec<Import>> {
    let run = (1..=4_u64, any::<bool>(), prop::collection::vec(any::<u8>(), 0..600), 0..=4096_usize);
    let at = prop::collection::btree_set(0..1_u64 << 33, 0..12).prop_map(|at| at.into_iter().collect::<Vec<_>>());
    (at.prop_shuffle(), prop::collection::vec(run, 12)).prop_map(|(at, runs)| {
        let import = |(at, (pages, measured, pattern, skip)): (u64, (u64, bool, Vec<u8>, usize))| {
            let gfns = GfnRange::with_len(Gfn::new(at * 4).unwrap(), pages).unwrap();
            let most = usize::try_from(gfns.bytes()).unwrap();
            let contents = pattern.into_iter().cycle().take(if skip == 0 { 0 } else { most - skip.min(most) });
            Import { gfns, measured, contents: contents.collect() }
        };
        at.into_iter().zip(runs).map(import).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn random_lists_as_igvm_measures_them(imports in imports()) {
        let list = list(imports);
        prop_assert_eq!(list.mrtd(Order::SinglePass).to_string(), by_igvm(&list));
    }
}

fn import(start: u64, pages: u64) -> Import {
    let gfns = GfnRange::with_len(Gfn::new(start).unwrap(), pages).unwrap();
    Import { gfns, measured: false, contents: Vec::new() }
}

/// Measured or not, a page is added once.
#[test]
fn a_list_is_refused_as_a_whole() {
    let refused = |imports: Vec<Import>, width| ImportList::new(imports, width).unwrap_err();
    let gfns = |start, end| GfnRange::new(Gfn::new(start).unwrap(), Gfn::new(end).unwrap()).unwrap();
    let narrow = Width::Bits48;
    assert_eq!(refused(vec![import(1, 1), import(2, 0)], narrow), ImportError::Empty { index: 1 });
    let too_long = Import { contents: vec![0; 4097], ..import(7, 1) };
    assert_eq!(
        refused(vec![import(1, 1), too_long], narrow),
        ImportError::TooLong { index: 1, gfns: gfns(7, 8), bytes: 4097 }
    );
    let end = 1 << 35;
    let beyond = ImportError::Beyond { index: 0, gfns: gfns(end - 1, end + 1), bits: 48 };
    assert_eq!(refused(vec![import(end - 1, 2)], narrow), beyond);
    ImportList::new(vec![import(end - 1, 2)], Width::Bits52).unwrap();
    ImportList::new(vec![import(end - 1, 1)], narrow).unwrap();
    assert_eq!(
        refused(vec![import(8, 4), import(0, 4), import(3, 6)], narrow),
        ImportError::Overlap { first: 1, second: 2, gfns: gfns(3, 4) }
    );
    // One that covers several others.
    let cover = refused(vec![import(4, 1), import(6, 1), import(0, 16)], narrow);
    assert_eq!(cover, ImportError::Overlap { first: 0, second: 2, gfns: gfns(4, 5) });
    assert_eq!(ImportList::new(vec![import(4, 4), import(0, 4)], narrow).unwrap().pages(), 8);
}
