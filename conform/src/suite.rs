//! Who is compared with whom.

use cvm_memory_testkit::kvm_guest::is_emulated;

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
    steadily(tally, |each| {
        let mut kvm = Live::kvm(&offer.kvm, shape.kind, shape.vcpus);
        if offer.known.found().contains(&Known::EmulatesAccesses) {
            // The software KVM is not like that, and its guests' writes are elsewhere; its calls are the same.
            let (mut reference, mut soft) = (Reference::new(shape).emulating(), CallsOnly(Live::soft(shape)));
            return play(scenario, shape, &mut [&mut kvm, &mut reference, &mut soft], &offer.known, each);
        }
        let (mut soft, mut reference) = (Live::soft(shape), Reference::new(shape));
        play(scenario, shape, &mut [&mut kvm, &mut soft, &mut reference], &offer.known, each)
    })
}

/// Plays what one thread does from beginning to end, which comes to the same every time. An emulated processor does something of
/// its own now and then; so there a difference counts that is seen every time, and the others are printed and counted.
fn steadily(
    tally: &mut Tally,
    mut play: impl FnMut(&mut dyn FnMut(&Operation, &Observation)) -> Result<Played, Box<Difference>>,
) -> Result<Played, Box<Difference>> {
    let mut left = if is_emulated() { 2 } else { 0 };
    loop {
        let mut counts = Vec::new();
        let outcome = play(&mut |operation, seen| counts.push((operation.to_string(), seen.to_string())));
        match outcome {
            Err(difference) if left > 0 => {
                eprintln!("seen once, played again: {difference}");
                left -= 1;
                tally.unsteady += 1;
            }
            outcome => {
                counts.iter().for_each(|(operation, seen)| tally.count(operation, seen));
                return outcome;
            }
        }
    }
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

/// KVM's own SNP code in the lab against the model.
///
/// # Errors
/// The first difference.
pub fn snp_kvm(offer: &snp::Offer, scenario: &Scenario, tally: &mut Tally) -> Result<Played, Box<Difference>> {
    let shape = Shape { vcpus: scenario.vcpus, ..offer.shape };
    steadily(tally, |each| {
        let (mut kvm, mut soft) = (Snp::kvm(offer, shape.vcpus), Snp::soft(shape));
        play(scenario, shape, &mut [&mut kvm, &mut soft], &Differences::default(), each)
    })
}
