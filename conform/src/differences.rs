//! In what kernels are known to differ from Linux 7.3, by name. A difference is looked for once per kernel, by a probe; what
//! the probe does not find is not allowed for.
#![allow(unsafe_code, reason = "slots without any memory behind them are created")]

use std::os::fd::{AsFd, AsRawFd};

use cvm_memory::hypervisor::{Cap, Exit, Hypervisor, MemoryAttributes, MemoryRegion};
use cvm_memory_testkit::kvm_guest::is_emulated;
use cvm_memory_testkit::{Guest, GuestOp};
use nix::errno::Errno;

use crate::observation::Observation;
use crate::scenario::Operation;

const PAGE: u64 = 4096;
const GUEST_MEMFD: u32 = 4;

/// The differences of one kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    found: Vec<Known>,
}

/// One difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Before 7.2: pages of a file that are bound already are `EINVAL`, not `EEXIST`.
    BoundPagesAreInvalid,
    /// Before 7.2: offset and size are added as signed numbers, so that a sum beyond `i64::MAX` passes for less than the
    /// file's size.
    OffsetsAreSigned,
    /// A guest does not get past the instruction that makes a hypercall (seen on a KVM that runs its guests without the
    /// processor's help).
    NoHypercalls,
    /// Built without memory attributes: the call itself is unknown.
    NoAttributes,
    /// No `KVM_CAP_PRE_FAULT_MEMORY`: built without two-dimensional paging.
    NoPrefault,
    /// One address space: built without system management mode.
    OneAddressSpace,
    /// No access of a guest is made by the processor: KVM emulates all of them, and so reaches all memory by its address in
    /// this process.
    EmulatesAccesses,
    /// The processor itself is emulated, by QEMU, which now and then raises an exception for no reason in a guest's guest. What
    /// ends so before anything else is seen of it is done again.
    EmulatedProcessor,
}

const ALL: [Known; 8] = [
    Known::BoundPagesAreInvalid,
    Known::OffsetsAreSigned,
    Known::NoHypercalls,
    Known::NoAttributes,
    Known::NoPrefault,
    Known::OneAddressSpace,
    Known::EmulatesAccesses,
    Known::EmulatedProcessor,
];

impl Differences {
    /// What a kernel does differently. Creates slots and files in `vm`, and deletes them. `guest` is one of its guests, which
    /// does not wait for long.
    pub fn probe(vm: &dyn Hypervisor, guest: &mut dyn Guest) -> Self {
        Self { found: ALL.into_iter().filter(|known| known.probe(vm, guest)).collect() }
    }

    /// The names.
    pub fn found(&self) -> &[Known] {
        &self.found
    }

    /// Whether the kernel would do something there after which nothing could be compared any more.
    pub(crate) fn avoid(&self, operation: &Operation) -> Option<&'static str> {
        match *operation {
            Operation::Region { size, offset, .. }
                if self.found.contains(&Known::OffsetsAreSigned)
                    && offset.checked_add(size).is_some_and(|end| end > i64::MAX.unsigned_abs()) =>
            {
                Some("this kernel takes offsets for signed numbers")
            }
            Operation::Region { slot, .. } | Operation::GetDirty { slot } | Operation::ClearDirty { slot, .. }
                if slot >> 16 != 0 && self.found.contains(&Known::OneAddressSpace) =>
            {
                Some("this kernel has one address space")
            }
            Operation::Attributes { .. } if self.found.contains(&Known::NoAttributes) => {
                Some("this kernel has no attributes")
            }
            Operation::Prefault { .. } if self.found.contains(&Known::NoPrefault) => {
                Some("this kernel does not prefault")
            }
            Operation::MapGpaRange { .. } | Operation::EnableCap { cap: 201, .. }
                if self.found.contains(&Known::NoHypercalls) =>
            {
                Some("this kernel has no hypercalls")
            }
            _ => None,
        }
    }

    /// Whether what Linux 7.3 does there is what this kernel does, but for what [`agree`](Self::agree) allows for.
    pub(crate) fn is_comparable(&self, seen: &Observation) -> bool {
        !self.found.contains(&Known::EmulatesAccesses) || matches!(seen, Observation::Call(_))
    }

    /// Whether all saw the same, once what the first is known to do differently is allowed for. Then all are made equal to
    /// what Linux 7.3 does, and `explained` is counted up.
    pub(crate) fn agree(
        &self,
        operation: &Operation,
        seen: &mut [(&'static str, Observation)],
        explained: &mut u64,
    ) -> bool {
        let Some(((_, first), others)) = seen.split_first_mut() else { return true };
        let mut others = others.iter().filter(|(_, observation)| *observation != Observation::Unknown);
        let Some((_, second)) = others.next() else { return true };
        if !others.all(|(_, observation)| observation == second) {
            return false;
        }
        if first == second {
            return true;
        }
        let known = self.found.iter().any(|known| known.explains(operation, first, second));
        if known {
            *explained += 1;
            *first = second.clone();
        }
        known
    }
}

impl Known {
    fn probe(self, vm: &dyn Hypervisor, guest: &mut dyn Guest) -> bool {
        let Ok(file) = vm.create_guest_memfd(PAGE, 0) else { return false };
        let fd = file.as_fd().as_raw_fd();
        let slot = |slot, gpa, offset| MemoryRegion {
            slot,
            flags: GUEST_MEMFD,
            guest_phys_addr: gpa,
            memory_size: PAGE,
            userspace_addr: 0,
            guest_memfd_offset: offset,
            guest_memfd: fd,
        };
        let (one, other) = (slot(100, 1 << 32, 0), slot(101, 2 << 32, 0));
        match self {
            Self::BoundPagesAreInvalid => {
                if set(vm, &one).is_err() {
                    return false;
                }
                let answer = set(vm, &other);
                for region in [one, other] {
                    let _there_may_be_none = set(vm, &MemoryRegion { memory_size: 0, ..region });
                }
                answer == Err(Errno::EINVAL)
            }
            Self::EmulatedProcessor => is_emulated(),
            Self::OneAddressSpace => {
                let platform = vm.platform();
                !platform.private_memory && vm.check_extension(Cap::MULTI_ADDRESS_SPACE) < 2
            }
            Self::EmulatesAccesses => {
                let nothing = MemoryRegion { flags: 0, guest_memfd: -1, ..one };
                if set(vm, &nothing).is_err() {
                    return false;
                }
                guest.start(GuestOp::Read { gpa: nothing.guest_phys_addr, len: 1 });
                let emulated = matches!(guest.run(), Ok(Exit::Mmio(_)));
                set(vm, &MemoryRegion { memory_size: 0, ..nothing }).expect("to delete what was created");
                emulated
            }
            Self::NoPrefault => vm.check_extension(Cap::PRE_FAULT_MEMORY) == 0,
            Self::NoAttributes => {
                let nothing = MemoryAttributes { address: 0, size: PAGE, attributes: 0, flags: 0 };
                vm.set_memory_attributes(&nothing) == Err(Errno::ENOTTY)
            }
            Self::NoHypercalls => {
                guest.start(GuestOp::Hypercall { nr: u64::MAX, args: [0; 4] });
                !matches!(guest.run(), Ok(Exit::Halt))
            }
            Self::OffsetsAreSigned => {
                let beyond = slot(100, 1 << 32, i64::MAX.unsigned_abs() & !(PAGE - 1));
                let accepted = set(vm, &beyond).is_ok();
                if accepted {
                    set(vm, &MemoryRegion { memory_size: 0, ..beyond }).expect("to delete what was created");
                }
                accepted
            }
        }
    }

    /// Whether this is why the kernel did `first` where Linux 7.3 does `second`.
    fn explains(self, operation: &Operation, first: &Observation, second: &Observation) -> bool {
        match (self, operation) {
            (Self::BoundPagesAreInvalid, Operation::Region { flags, .. }) => {
                flags & GUEST_MEMFD != 0
                    && *first == Observation::Call(Err(Errno::EINVAL))
                    && *second == Observation::Call(Err(Errno::EEXIST))
            }
            _ => false,
        }
    }
}

fn set(vm: &dyn Hypervisor, region: &MemoryRegion) -> Result<(), Errno> {
    // SAFETY: nothing is mapped at the address, and no guest runs.
    unsafe { vm.set_user_memory_region2(region) }
}
