//! SNP guests on the software KVM, launched with an empty image.
#![allow(dead_code, reason = "each test program uses its part")]

use std::sync::Arc;

use cvm_memory::memory::{Builder, CvmMemory};
use cvm_memory_sev::commands::Init;
use cvm_memory_sev::launch::{FinishOptions, Launch, StartOptions};
use cvm_memory_sev::soft::{Machine, SnpGuest, SoftSnp};
use cvm_memory_sev::vmsa::{CpuSignature, SNP_ACTIVE, Vmsa};

pub struct Guests {
    pub snp: Arc<SoftSnp>,
    pub memory: Arc<CvmMemory>,
    pub vcpus: Vec<SnpGuest>,
}

/// A VM with this memory and so many vCPUs, launched.
pub fn launched(builder: Builder, vcpus: u32) -> Guests {
    launched_on(&Machine::new(), builder, vcpus)
}

/// The same on a machine that may have others.
pub fn launched_on(machine: &Arc<Machine>, builder: Builder, vcpus: u32) -> Guests {
    let snp = Arc::new(SoftSnp::on(machine));
    let launch = Launch::init(Arc::clone(&snp) as _, &Init::default()).unwrap();
    let memory = Arc::new(builder.build(Arc::new(snp.vm().clone())).unwrap());
    let mut guests: Vec<SnpGuest> = (0..vcpus).map(|_| SnpGuest::new(&snp, &memory)).collect();
    let vmsas = Vmsa::of_all(vcpus, 0x80_b004, CpuSignature::new(25, 1, 1), SNP_ACTIVE);
    for (vcpu, vmsa) in (0..).zip(&vmsas) {
        snp.set_registers(vcpu, vmsa);
    }
    let launch = launch.start(&StartOptions::default()).unwrap();
    let mut borrowed: Vec<_> = guests.iter_mut().map(SnpGuest::vcpu).collect();
    let launched = launch.finish(&mut borrowed, &vmsas, FinishOptions::default()).unwrap();
    assert_eq!(snp.firmware_digest(), Some(launched.digest));
    Guests { snp, memory, vcpus: guests }
}
