//! Random scenarios, and those that were found to matter: the software KVM against the interpreter of the contract, and a
//! real KVM against both.
//!
//! `CVM_SCENARIOS=N` and `CVM_SEED=S` say how many and which; `CVM_SECONDS=T` plays for as long.

use std::sync::atomic::Ordering;

use cvm_memory_conform::differences::Known;
use cvm_memory_conform::live::kvm::Offer;
use cvm_memory_conform::machine::Shape;
use cvm_memory_conform::run::{Plan, Play, run};
use cvm_memory_conform::scenario::Kind;
use cvm_memory_conform::{book, suite};
use cvm_memory_testkit::kvm_guest::SPURIOUS;
use cvm_memory_testkit::skip;

/// Address bits where no processor has a say: few enough for their end to be reached.
const PHYSICAL_BITS: u32 = 40;

fn random(name: &str, shape: Shape, scenarios: u64, play: &Play<'_>) {
    match run(Plan::from_env(scenarios), shape, play, &|_| {}) {
        Ok(tally) => {
            println!("{name} {:?}: {tally}", shape.kind);
            // So that nothing passes for having been compared that was not.
            assert!(
                tally.scenarios > 0 && tally.played.operations > 20 * tally.scenarios,
                "next to nothing was played"
            );
            assert!(tally.played.skipped * 5 < tally.played.operations, "too much was left out");
            assert!(tally.is_steady(), "{} differences came once", tally.unsteady);
            let again = SPURIOUS.load(Ordering::Relaxed);
            assert!(again * 200 < tally.played.operations + 2000, "{again} accesses had to be made again");
        }
        Err(failure) => panic!("{name} {:?}: {failure}", shape.kind),
    }
}

fn soft(kind: Kind) {
    let shape = Shape { kind, vcpus: 2, physical_bits: PHYSICAL_BITS };
    random("soft", shape, 250, &|scenario, tally| suite::soft(shape, scenario, tally));
}

fn kvm(kind: Kind) {
    let Some(offer) = Offer::of(kind) else { return };
    println!("{kind:?}: known differences of this kernel: {:?}", offer.known.found());
    if std::env::var(skip::REQUIRE).as_deref() == Ok("1") {
        // Where a KVM was promised it is the lab's, which is Linux 7.3 itself.
        let others = offer.known.found().iter().filter(|known| **known != Known::EmulatedProcessor);
        assert_eq!(others.count(), 0, "a probe went wrong, and would have things left out");
    }
    let shape = Shape { vcpus: 2, ..offer.shape };
    random("kvm", shape, 100, &|scenario, tally| suite::kvm(&offer, scenario, tally));
}

#[test]
fn soft_default() {
    soft(Kind::Default);
}

#[test]
fn soft_protected() {
    soft(Kind::Protected);
}

#[test]
fn soft_tagged() {
    soft(Kind::Tagged);
}

#[test]
fn kvm_default() {
    kvm(Kind::Default);
}

#[test]
fn kvm_protected() {
    kvm(Kind::Protected);
}

/// What the contract says of many small things, and what was found once and shrunk.
fn known_scenarios() -> Vec<(String, cvm_memory_conform::Scenario)> {
    book::CONTRACT.iter().chain(book::FOUND).flat_map(book::Entry::scenarios).collect()
}

#[test]
fn known_scenarios_on_soft() {
    let mut failed = String::new();
    for (name, scenario) in known_scenarios() {
        let shape = Shape { kind: scenario.kind, vcpus: scenario.vcpus, physical_bits: 46 };
        if let Err(difference) = suite::soft(shape, &scenario, &mut Default::default()) {
            failed += &format!("{name}: {difference}\n");
        }
    }
    assert!(failed.is_empty(), "\n{failed}");
}

#[test]
fn known_scenarios_on_kvm() {
    let mut failed = String::new();
    for kind in [Kind::Default, Kind::Protected] {
        let Some(offer) = Offer::of(kind) else { continue };
        for (name, scenario) in known_scenarios().iter().filter(|(_, scenario)| scenario.kind == kind) {
            if let Err(difference) = suite::kvm(&offer, scenario, &mut Default::default()) {
                failed += &format!("{name}: {difference}\n");
            }
        }
    }
    assert!(failed.is_empty(), "\n{failed}");
}
