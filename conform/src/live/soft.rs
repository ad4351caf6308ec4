//! A machine of the software KVM.
#![allow(unsafe_code, reason = "the slot of a guest's own memory is created")]

use std::sync::Arc;

use cvm_memory::hypervisor::MemoryRegion;
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Guest, KvmGuest, SoftGuest};

use super::Live;
use crate::machine::Shape;
use crate::scenario::{Area, Hva, Kind};

impl Live {
    /// A new VM of the software KVM.
    pub fn soft(shape: Shape) -> Self {
        let vm = soft_vm(shape.kind);
        vm.limit_physical_bits(shape.physical_bits);
        let guests = (0..shape.vcpus).map(|_| Box::new(SoftGuest::new(&vm)) as Box<dyn Guest>).collect();
        let live = Self::around("soft", shape, Arc::new(vm), guests, &soft_vm(shape.kind), false);
        let userspace_addr = live.areas.address(Hva::In(Area::Void, 0));
        for vcpu in 0..shape.vcpus {
            // A guest of the real KVM has its code there. This one needs none, but others have to bump into it all the same.
            let own = KvmGuest::own_memory(vcpu.into());
            let region = MemoryRegion {
                slot: own.slot,
                guest_phys_addr: own.gpa,
                memory_size: own.size,
                userspace_addr,
                guest_memfd: -1,
                ..MemoryRegion::default()
            };
            live.region(&region).expect("a slot of the guest's own");
        }
        live
    }
}

fn soft_vm(kind: Kind) -> SoftVm {
    match kind {
        Kind::Default => SoftVm::default_type(),
        Kind::Protected => SoftVm::software_protected(),
        Kind::Tagged => SoftVm::tagged(),
        Kind::Snp => unreachable!("those are launched: `Snp::soft`"),
    }
}
