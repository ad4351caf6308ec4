//! Who is compared with whom.

use crate::differences::Differences;
use crate::live::Live;
use crate::live::kvm::Offer;
use crate::machine::Shape;
use crate::play::{Difference, Played, play};
use crate::reference::Reference;
use crate::run::Tally;
use crate::scenario::Scenario;

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
    let (mut soft, mut reference) = (Live::soft(shape), Reference::new(shape));
    play(scenario, shape, &mut [&mut kvm, &mut soft, &mut reference], &offer.known, |operation, seen| {
        tally.count(&operation.to_string(), &seen.to_string());
    })
}
