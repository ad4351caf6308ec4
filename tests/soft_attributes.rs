//! Attribute changes against sequences that Linux's own C functions computed: what is unmapped, how far the invalidation
//! reaches, and which huge pages are forbidden afterwards.

use cvm_memory::addr::Gfn;
use cvm_memory::soft::attributes::{Attributes, Flavour, Invalidation, Level, Mixed};
use cvm_memory_testkit::gfns;
use serde::Deserialize;

#[derive(Deserialize)]
struct Vectors {
    attributes: Vec<Sequence>,
}

#[derive(Deserialize)]
struct Sequence {
    name: String,
    /// First frame and number of pages.
    slot: [u64; 2],
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    start: u64,
    end: u64,
    attr: u64,
    #[serde(default)]
    noop: bool,
    unmap: Option<(u64, u64, String)>,
    invalidate: Option<[u64; 2]>,
    mixed_2m: Option<Vec<u64>>,
    mixed_1g: Option<Vec<u64>>,
}

fn sequences() -> Vec<Sequence> {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/kernel_vectors.json")).unwrap();
    serde_json::from_str::<Vectors>(&text).unwrap().attributes
}

fn blocks(mixed: &Mixed, level: Level) -> Vec<u64> {
    mixed.blocks(level).into_iter().map(Gfn::get).collect()
}

#[test]
fn every_step_is_the_kernels() {
    let (mut steps, mut wider) = (0, 0);
    let sequences = sequences();
    assert_eq!(sequences.len(), 40);
    for Sequence { name, slot, steps: list } in &sequences {
        let slot = gfns(slot[0], slot[0] + slot[1]);
        let mut attributes = Attributes::default();
        let mut mixed = Mixed::of_slot(slot, &attributes);
        for (n, step) in list.iter().enumerate() {
            steps += 1;
            let range = gfns(step.start, step.end);
            let private = step.attr == 8;
            assert_eq!(attributes.all(range, private), step.noop, "{name} step {n}");
            if step.noop {
                continue;
            }
            let got = Invalidation::of_change(slot, &mixed, range, private);
            attributes.set(range, private);
            mixed.update(slot, range, &attributes);

            let want_unmap = step.unmap.as_ref().map(|(start, end, kind)| {
                (gfns(*start, *end), if kind == "zap_shared" { Flavour::Shared } else { Flavour::Private })
            });
            assert_eq!(got.map(|i| (i.unmap, i.flavour)), want_unmap, "{name} step {n}");
            let want_hull = step.invalidate.map(|[start, end]| gfns(start, end));
            assert_eq!(got.map(|i| i.hull), want_hull, "{name} step {n}");
            wider += usize::from(got.is_some_and(|i| i.hull != i.unmap));
            if let Some(want) = &step.mixed_2m {
                assert_eq!(&blocks(&mixed, Level::M2), want, "{name} step {n}");
            }
            if let Some(want) = &step.mixed_1g {
                assert_eq!(&blocks(&mixed, Level::G1), want, "{name} step {n}");
            }
            // A slot created now gets the flags that the old one has come to.
            assert_eq!(Mixed::of_slot(slot, &attributes), mixed, "{name} step {n}");
        }
    }
    println!("{steps} steps, {wider} with a hull wider than what is unmapped");
    assert!(wider > 0);
}
