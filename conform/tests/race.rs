//! Races: on the software KVM, and on a real one. `CVM_SCENARIOS=N`, `CVM_SEED=S` and `CVM_SECONDS=T` as elsewhere.

use std::sync::atomic::Ordering;

use cvm_memory_conform::Live;
use cvm_memory_conform::live::kvm::Offer;
use cvm_memory_conform::machine::Shape;
use cvm_memory_conform::race::{race, vcpus};
use cvm_memory_conform::run::Plan;
use cvm_memory_conform::scenario::Kind;
use cvm_memory_testkit::kvm_guest::SPURIOUS;

fn races(name: &str, kind: Kind, count: u64, machine: impl Fn() -> Live) {
    let plan = Plan::from_env(count);
    let start = std::time::Instant::now();
    let (mut operations, mut played, mut disturbed) = (0, 0, 0);
    while played < plan.scenarios && plan.time.is_none_or(|time| start.elapsed() < time) {
        let seed = plan.seed.wrapping_add(played);
        let spurious = SPURIOUS.load(Ordering::Relaxed);
        match race(kind, seed).run(seed, machine()) {
            Ok(done) => operations += done,
            // An access that was made twice is not in the model.
            Err(_) if SPURIOUS.load(Ordering::Relaxed) != spurious => disturbed += 1,
            Err(unexplained) => panic!("{unexplained}"),
        }
        played += 1;
    }
    assert!(disturbed * 20 <= played, "the processor disturbed {disturbed} races of {played}");
    println!("{name} {kind:?}: {played} races, {operations} operations, all explained, but {disturbed} not judged");
}

fn soft(kind: Kind) {
    races("soft", kind, 150, || Live::soft(Shape { kind, vcpus: vcpus(), physical_bits: 40 }));
}

fn kvm(kind: Kind) {
    let Some(offer) = Offer::of(kind) else { return };
    races("kvm", kind, 100, || Live::kvm(&offer.kvm, kind, vcpus()));
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
fn kvm_default() {
    kvm(Kind::Default);
}

#[test]
fn kvm_protected() {
    kvm(Kind::Protected);
}
