//! SNP machines: the model against KVM's own SNP code, in the lab. `CVM_SCENARIOS=N`, `CVM_SEED=S` and `CVM_SECONDS=T` as
//! elsewhere.

use std::time::Instant;

use cvm_memory_conform::machine::Shape;
use cvm_memory_conform::run::{Plan, Play, Tally, run};
use cvm_memory_conform::scenario::Kind;
use cvm_memory_conform::{book, snp, suite};

fn random(name: &str, shape: Shape, scenarios: u64, play: &Play<'_>) {
    // In the lab what is counted is counted for the whole machine: one guest at a time.
    let plan = Plan { threads: 1, ..Plan::from_env(scenarios) };
    let start = Instant::now();
    match run(plan, shape, play, &|_| {}) {
        Ok(tally) => {
            println!("{name}: in {:?}, {tally}", start.elapsed());
            assert!(
                tally.scenarios > 0 && tally.played.operations > 20 * tally.scenarios,
                "next to nothing was played"
            );
            assert!(tally.played.skipped * 5 < tally.played.operations, "too much was left out");
            assert!(tally.is_steady(), "{} differences came once", tally.unsteady);
        }
        Err(failure) => panic!("{name}: {failure}"),
    }
}

fn known(play: &Play<'_>) {
    let mut failed = String::new();
    for (name, scenario) in book::SNP.iter().flat_map(book::Entry::scenarios) {
        if let Err(difference) = play(&scenario, &mut Tally::default()) {
            failed += &format!("{name}: {difference}\n");
        }
    }
    assert!(failed.is_empty(), "\n{failed}");
}

const fn soft_shape(vcpus: u8) -> Shape {
    Shape { kind: Kind::Snp, vcpus, physical_bits: 40 }
}

#[test]
fn soft() {
    random("soft", soft_shape(2), 150, &|scenario, tally| suite::snp_soft(soft_shape(2), scenario, tally));
}

#[test]
fn known_on_soft() {
    known(&|scenario, tally| suite::snp_soft(soft_shape(scenario.vcpus), scenario, tally));
}

#[test]
fn known_on_kvm() {
    let Some(offer) = snp::Offer::here() else { return };
    known(&|scenario, tally| suite::snp_kvm(&offer, scenario, tally));
}

#[test]
fn kvm() {
    let Some(offer) = snp::Offer::here() else { return };
    let shape = Shape { vcpus: 2, ..offer.shape };
    random("kvm", shape, 100, &|scenario, tally| suite::snp_kvm(&offer, scenario, tally));
}
