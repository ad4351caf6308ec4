//! A machine of `/dev/kvm`.

use std::sync::Arc;
use std::time::Duration;

use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory::hypervisor::{Cap, Platform};
use cvm_memory_testkit::{Guest, KvmGuest, skip};
use kvm_ioctls::Kvm;

use super::Live;
use crate::differences::{Differences, Known};
use crate::machine::Shape;
use crate::scenario::Kind;

/// For how long one instruction may take, on a machine that is itself emulated and busy. A guest that takes longer is
/// reported with its registers, and is a difference.
const PATIENCE: Duration = Duration::from_secs(15);

impl Live {
    /// A new VM of `/dev/kvm`; the number of its address bits is the processor's.
    ///
    /// # Panics
    /// If KVM has no such VMs; see [`Offer::of`].
    pub fn kvm(kvm: &Kvm, kind: Kind, vcpus: u8) -> Self {
        let platform = platform(kind).expect("a kind that KVM can have");
        let create = || KvmVm::create(kvm, platform).expect("a VM");
        let vm = create();
        let mut guests: Vec<_> = (0..vcpus).map(|vcpu| KvmGuest::new(&vm, vcpu.into())).collect();
        guests.iter_mut().for_each(|guest| guest.set_patience(PATIENCE));
        let physical_bits = guests.first().map_or(36, KvmGuest::physical_bits);
        let shape = Shape { kind, vcpus, physical_bits };
        let guests = guests.into_iter().map(|guest| Box::new(guest) as Box<dyn Guest>).collect();
        Self::around("kvm", shape, Arc::new(vm), guests, &create(), true)
    }
}

/// What `/dev/kvm` has of one kind.
#[derive(Debug)]
pub struct Offer {
    /// The device.
    pub kvm: Kvm,
    /// What VM, with one vCPU.
    pub shape: Shape,
    /// What this kernel is known to do differently.
    pub known: Differences,
}

impl Offer {
    /// What there is of `kind`; if nothing, that is said on a line of its own, and is a failure where a KVM was promised.
    pub fn of(kind: Kind) -> Option<Self> {
        let vm = if kind == Kind::Protected { skip::private_kvm()? } else { skip::kvm(platform(kind)?)? };
        skip::require(&vm, Cap::USER_MEMORY2, 1)?;
        skip::require(&vm, Cap::GUEST_MEMFD, 1)?;
        let mut guest = KvmGuest::new(&vm, 0);
        // Ample for one instruction, and short for one that a KVM never gets past.
        guest.set_patience(Duration::from_secs(2));
        let known = Differences::probe(&vm, &mut guest);
        // `kvm_mmu_max_gfn()`: without two-dimensional paging the processor sets no limit to slots; the guest's, of 47 bits for
        // the kind of addresses it uses, is below either.
        let two_dimensional = !known.found().contains(&Known::NoPrefault) || guest.physical_bits() < 47;
        let physical_bits = if two_dimensional { guest.physical_bits() } else { 52 };
        let shape = Shape { kind, vcpus: 1, physical_bits };
        Some(Self { kvm: skip::dev_kvm()?, shape, known })
    }
}

/// The platform of a kind, if the kernel has it.
pub const fn platform(kind: Kind) -> Option<Platform> {
    match kind {
        Kind::Default => Some(Platform::DEFAULT),
        Kind::Protected => Some(Platform::SOFTWARE_PROTECTED),
        Kind::Tagged | Kind::Snp => None,
    }
}
