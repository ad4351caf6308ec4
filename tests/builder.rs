//! Building memory from slots of the caller's: what a private side needs of the VM is seen to, whoever made the file.

use std::sync::Arc;

use cvm_memory::addr::{FilePage, Gfn};
use cvm_memory::backing::{SharedMemory, SharedSlice};
use cvm_memory::convert::State;
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::hypervisor::{HypercallExit, Hypervisor};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{CvmMemory, SlotSpec};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Guest, GuestOp, Outcome, SoftGuest};

const SIZE: u64 = 2 << 20;

/// Without `KVM_CAP_EXIT_HYPERCALL` KVM answers the guest `-KVM_ENOSYS` by itself, and the page stays private.
#[test]
fn a_guest_whose_only_slots_are_the_callers_can_ask_for_conversions() {
    let vm = SoftVm::software_protected();
    let file = Arc::new(vm.create_guest_memfd(SIZE, 0).unwrap());
    let shared = SharedSlice { backing: Arc::new(SharedMemory::new(SIZE).unwrap()), offset: 0 };
    let private = Some((file, FilePage::ZERO));
    let slot = SlotSpec { id: None, gpa: 0, size: SIZE, shared, private, flags: SlotFlags::empty() };
    let memory = Arc::new(CvmMemory::builder().slot(slot).build(Arc::new(vm.clone())).unwrap());

    let mut exits = VcpuExits::new(Arc::clone(&memory));
    let mut handled = Vec::new();
    let ask = GuestOp::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args: [0, 1, 0, 0] };
    let answer = SoftGuest::new(&vm).complete(ask, &mut |mut exit| handled.push(exits.handle(&mut exit)));

    assert_eq!(answer, Outcome::Answer(0));
    assert!(matches!(handled[..], [Action::Resume(Handled::Converted { pages: 1 })]), "{handled:?}");
    assert_eq!(memory.state(Gfn::ZERO), Some(State::Shared));
}

/// All memory that can be private is bound to one file, each page of it once, whatever lies between.
#[test]
fn memory_that_is_never_private_takes_no_pages_of_the_file() {
    let ram = |first: u64, second: u64| {
        CvmMemory::builder().ram(first, SIZE).plain_ram(4 * SIZE, SIZE).ram(second, 2 * SIZE).plain_ram(5 * SIZE, SIZE)
    };
    for (first, second) in [(0, 8 * SIZE), (8 * SIZE, 0)] {
        let memory = ram(first, second).build(Arc::new(SoftVm::tagged())).unwrap();
        let file = |gpa: u64| memory.reader().lookup(Gfn::containing(gpa)).unwrap().file.map(|(_, offset)| offset);
        assert_eq!([first, second].map(file), [Some(0), Some(SIZE)]);
        assert_eq!([4 * SIZE, 5 * SIZE].map(file), [None, None]);
        assert_eq!(memory.space().files().map(|file| file.size()).collect::<Vec<_>>(), [3 * SIZE]);
    }
}
