//! What ends a launch, on the model: the save areas that are measured are those that KVM makes.

use std::sync::Arc;

use cvm_memory_sev::commands::Init;
use cvm_memory_sev::digest::LaunchDigest;
use cvm_memory_sev::launch::{FinishError, FinishOptions, Launch, StartOptions, Started};
use cvm_memory_sev::soft::SoftSnp;
use cvm_memory_sev::vmsa::{CpuSignature, DEBUG_SWAP, RESET_VECTOR, SNP_ACTIVE, Vmsa, VmsaOptions};

/// A VM of these features, whose launch has started.
fn started(vmsa_features: u64) -> (Arc<SoftSnp>, Launch<Started>) {
    let snp = Arc::new(SoftSnp::new());
    let launch = Launch::init(Arc::clone(&snp) as _, &Init { vmsa_features, ..Init::default() }).unwrap();
    (snp, launch.start(&StartOptions::default()).unwrap())
}

fn vmsa(features: u64) -> Vmsa {
    Vmsa::at_reset(VmsaOptions { start: RESET_VECTOR, cpu: CpuSignature::new(25, 1, 1), features })
}

/// No register that a VMM sets says which features a vCPU has: KVM gives all of them those of the VM. A digest with others is
/// none that the guest's owner will see.
#[test]
fn every_vcpu_has_the_features_of_the_vm() {
    for (vm, other) in [(0, SNP_ACTIVE | DEBUG_SWAP), (DEBUG_SWAP, SNP_ACTIVE), (0, 0), (DEBUG_SWAP, DEBUG_SWAP)] {
        let (snp, launch) = started(vm);
        let mut vcpus = [snp.vm().create_vcpu(), snp.vm().create_vcpu()];
        let mut vcpus: Vec<_> = vcpus.iter_mut().collect();
        let vm = vm | SNP_ACTIVE;
        let refused = launch.finish(&mut vcpus, &[vmsa(vm), vmsa(other)], FinishOptions::default()).unwrap_err();
        assert_eq!(refused, FinishError::Features { vcpu: 1, features: other, vm });
        assert_eq!(snp.firmware_digest(), Some(LaunchDigest::INITIAL), "KVM was not asked");
    }
    for features in [0, DEBUG_SWAP] {
        let (snp, launch) = started(features);
        let mut vcpus = [snp.vm().create_vcpu(), snp.vm().create_vcpu()];
        for nr in [0, 1] {
            snp.set_registers(nr, &vmsa(0));
        }
        let vmsas = [vmsa(features | SNP_ACTIVE), vmsa(features | SNP_ACTIVE)];
        let mut vcpus: Vec<_> = vcpus.iter_mut().collect();
        let launched = launch.finish(&mut vcpus, &vmsas, FinishOptions::default()).unwrap();
        assert_eq!(snp.firmware_digest(), Some(launched.digest));
    }
}
