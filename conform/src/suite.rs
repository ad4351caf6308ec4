//! Who is compared with whom.

use std::sync::atomic::Ordering;

use cvm_memory_testkit::kvm_guest::{SPURIOUS, is_emulated};

use crate::differences::{Differences, Known};
use crate::live::Live;
use crate::live::kvm::Offer;
use crate::machine::{CallsOnly, Shape};
use crate::observation::Observation;
use crate::play::{Difference, Played, play};
use crate::reference::Reference;
use crate::run::Tally;
use crate::scenario::{Operation, Scenario};
use crate::snp::{self, Snp};

/// The software KVM against the interpreter of the contract.
///
/// # Errors
/// The first difference.
pub fn soft(shape: Shape, scenario: &Scenario, tally: &mut Tally) -> Result<Played, Box<Difference>> {
    let (mut soft, mut reference) = (Live::soft(shape), Reference::new(shape));
    play(scenario, shape, &mut [&mut soft, &mut reference], &Differences::default(), |operation, seen| {
        tally.count(&operation.to_string(), &seen.to_string());
    })
}

/// A real KVM against the software KVM and the interpreter.
///
/// # Errors
/// The first difference.
pub fn kvm(offer: &Offer, scenario: &Scenario, tally: &mut Tally) -> Result<Played, Box<Difference>> {
    let shape = Shape { vcpus: scenario.vcpus, ..offer.shape };
    let mut kvm = Live::kvm(&offer.kvm, shape.kind, shape.vcpus);
    let mut count = |operation: &Operation, seen: &Observation| tally.count(&operation.to_string(), &seen.to_string());
    if offer.known.found().contains(&Known::EmulatesAccesses) {
        // The software KVM is not like that, and its guests' writes are elsewhere; its calls are the same.
        let (mut reference, mut soft) = (Reference::new(shape).emulating(), CallsOnly(Live::soft(shape)));
        return play(scenario, shape, &mut [&mut kvm, &mut reference, &mut soft], &offer.known, &mut count);
    }
    let (mut soft, mut reference) = (Live::soft(shape), Reference::new(shape));
    play(scenario, shape, &mut [&mut kvm, &mut soft, &mut reference], &offer.known, &mut count)
}

/// The model of SNP, twice: one is held to the rules of an RMP.
///
/// # Errors
/// The first difference.
pub fn snp_soft(shape: Shape, scenario: &Scenario, tally: &mut Tally) -> Result<Played, Box<Difference>> {
    let (mut ruled, mut soft) = (snp::Ruled(Snp::soft(shape)), Snp::soft(shape));
    play(scenario, shape, &mut [&mut ruled, &mut soft], &Differences::default(), |operation, seen| {
        tally.count(&operation.to_string(), &seen.to_string());
    })
}

/// KVM's own SNP code in the lab against the model. A guest that an exception of the emulated processor has led astray cannot be
/// set right, as nobody has its registers: such a scenario is played again.
///
/// # Errors
/// The first difference.
pub fn snp_kvm(offer: &snp::Offer, scenario: &Scenario, tally: &mut Tally) -> Result<Played, Box<Difference>> {
    let shape = Shape { vcpus: scenario.vcpus, ..offer.shape };
    let mut left = 2;
    loop {
        let (mut kvm, mut soft) = (Snp::kvm(offer, shape.vcpus), Snp::soft(shape));
        let mut counts = Vec::new();
        let each = |operation: &Operation, seen: &Observation| counts.push((operation.to_string(), seen.to_string()));
        match play(scenario, shape, &mut [&mut kvm, &mut soft], &Differences::default(), each) {
            Err(difference) if left > 0 && is_emulated() && snp::is_astray(&difference) => {
                SPURIOUS.fetch_add(1, Ordering::Relaxed);
                left -= 1;
            }
            outcome => {
                counts.iter().for_each(|(operation, seen)| tally.count(operation, seen));
                return outcome;
            }
        }
    }
}
