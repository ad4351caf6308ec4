//! Random scenarios: the real KVM against the software KVM.
//!
//! `CVM_SCENARIOS=N` and `CVM_SEED=S` say how many and which; `CVM_SECONDS=T` plays for as long.

use std::time::Duration;

use cvm_memory::hypervisor::Cap;
use cvm_memory_conform::differences::Differences;
use cvm_memory_conform::live::kvm::platform;
use cvm_memory_conform::machine::{Machine, Shape};
use cvm_memory_conform::run::{Plan, run};
use cvm_memory_conform::scenario::Kind;
use cvm_memory_conform::{Live, play};
use cvm_memory_testkit::{KvmGuest, skip};

fn kvm_is_soft(kind: Kind, scenarios: u64) {
    let Some(vm) = skip::kvm(platform(kind).unwrap()) else { return };
    for cap in [Cap::USER_MEMORY2, Cap::GUEST_MEMFD] {
        if skip::require(&vm, cap, 1).is_none() {
            return;
        }
    }
    let known = {
        let mut guest = KvmGuest::new(&vm, 0);
        guest.set_patience(Duration::from_secs(2));
        Differences::probe(&vm, &mut guest)
    };
    println!("{kind:?}: known differences of this kernel: {:?}", known.found());
    drop(vm);
    let kvm = skip::dev_kvm().unwrap();
    let shape = Live::kvm(&kvm, kind, 1).shape();
    let shape = Shape { vcpus: 1, ..shape };
    let tally = run(
        Plan::from_env(scenarios),
        shape,
        &|scenario, tally| {
            let (mut kvm, mut soft) = (Live::kvm(&kvm, kind, shape.vcpus), Live::soft(shape));
            let machines: &mut [&mut dyn Machine] = &mut [&mut kvm, &mut soft];
            play(scenario, shape, machines, &known, |operation, seen| {
                tally.count(&operation.to_string(), &seen.to_string());
            })
        },
        &|_| {},
    );
    match tally {
        Ok(tally) => println!("{kind:?}: {tally}"),
        Err(failure) => panic!("{kind:?}: {failure}"),
    }
}

#[test]
fn default() {
    kvm_is_soft(Kind::Default, 200);
}

#[test]
fn protected() {
    kvm_is_soft(Kind::Protected, 200);
}
