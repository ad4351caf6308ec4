//! Every way in which an exit is answered: what the guest gets, what the VMM is told, and what has changed.

use std::sync::{Arc, Mutex};
use std::thread;

use cvm_memory::addr::{FilePage, Gfn, GfnRange, PAGE_SIZE};
use cvm_memory::backing::SharedMemory;
use cvm_memory::backing::SharedSlice;
use cvm_memory::convert::{DiscardPolicy, Listener, ListenerError, PinPolicy, Request, SharedRun, State};
use cvm_memory::exits::{Action, ExitOptions, GuestError, Handled, VcpuExits};
use cvm_memory::hypervisor::{Exit, HypercallExit, Hypervisor, MemoryFault, Platform, Vcpu};
use cvm_memory::layout::{SlotFlags, SlotId};
use cvm_memory::memory::{Builder, CvmMemory, SlotSpec};
use cvm_memory::soft::{Arch, GuestOp, OpResult, SoftVcpu, SoftVm};
use cvm_memory_testkit::{Call, Recorder};
use nix::errno::Errno;

const GIB: u64 = 1 << 30;
const RAM: u64 = 8 << 20;
const EINVAL: u64 = 22;
const EAGAIN: u64 = 11;

struct Machine {
    vm: SoftVm,
    recorder: Recorder<SoftVm>,
    memory: Arc<CvmMemory>,
    exits: VcpuExits,
    vcpu: SoftVcpu,
}

fn machine_of(vm: SoftVm, change: impl FnOnce(Builder) -> Builder) -> Machine {
    let recorder = Recorder::new(vm.clone());
    let builder = change(CvmMemory::builder().ram(0, RAM).plain_ram(1 << 30, 2 << 20));
    let memory = Arc::new(builder.build(Arc::new(recorder.clone())).unwrap());
    recorder.take();
    let exits = VcpuExits::new(Arc::clone(&memory));
    let vcpu = vm.create_vcpu();
    Machine { vm, recorder, memory, exits, vcpu }
}

fn protected() -> Machine {
    machine_of(SoftVm::software_protected(), |builder| builder)
}

fn tagged() -> Machine {
    machine_of(SoftVm::tagged(), |builder| builder)
}

impl Machine {
    /// Runs until the operation is done or the VMM has something else to do than to go on.
    fn run(&mut self, op: GuestOp) -> (Option<OpResult>, Vec<Action>) {
        self.vcpu.start(op);
        let mut actions = Vec::new();
        loop {
            let mut exit = self.vcpu.run().expect("the VM runs on");
            if let Exit::Halt = exit {
                return (self.vcpu.take_result(), actions);
            }
            let action = self.exits.handle(&mut exit);
            let go_on = matches!(action, Action::Resume(_));
            actions.push(action);
            if !go_on {
                return (None, actions);
            }
        }
    }

    fn ask(&mut self, args: [u64; 4]) -> u64 {
        match self.run(GuestOp::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args }) {
            (Some(OpResult::Hypercall(answer)), _) => answer,
            other => panic!("{other:?}"),
        }
    }

    fn fault(&mut self, fault: MemoryFault) -> Action {
        self.exits.handle(&mut Exit::MemoryFault(fault))
    }

    fn attribute_calls(&self) -> usize {
        self.recorder.count_matching(|call| matches!(call, Call::SetMemoryAttributes(_)))
    }

    fn state(&self, gfn: u64) -> Option<State> {
        self.memory.state(Gfn::new(gfn).unwrap())
    }
}

fn fault(gpa: u64, flags: u64, errno: Errno) -> MemoryFault {
    MemoryFault { errno, flags, gpa, size: PAGE_SIZE }
}

fn private_fault(gpa: u64) -> MemoryFault {
    fault(gpa, MemoryFault::PRIVATE, Errno::EFAULT)
}

#[test]
fn c20_a_bad_request_is_an_errno_to_the_guest_and_nothing_else() {
    let mut machine = protected();
    let top = u64::MAX - 0xfff;
    let bad: &[[u64; 4]] = &[
        [0, 1, 0x20, 0],                // a bit that means nothing
        [0, 1, u64::MAX, 0],            // all of them
        [0, 1, 0x13, 0],                // a page size that does not exist
        [RAM, 1, 0x10, 0],              // a hole cannot be private
        [RAM - 0x1000, 2, 0x10, 0],     // half of it
        [1 << 30, 1, 0x10, 0],          // memory without a private side, to private
        [1 << 30, 1, 0, 0],             // and to shared
        [0, (1 << 40) / 4096, 0x10, 0], // far beyond all memory
    ];
    for args in bad {
        assert_eq!(machine.ask(*args), EINVAL, "{args:x?}");
    }
    // What KVM refuses by itself never gets here; were it to, it would be refused all the same.
    for args in [[0x800, 1, 0x10, 0, 0, 0], [0, 0, 0x10, 0, 0, 0], [top, 2, 0, 0, 0, 0], [0, u64::MAX, 0, 0, 0, 0]] {
        let mut ret = 77;
        let call = HypercallExit { nr: HypercallExit::MAP_GPA_RANGE, args, ret: &mut ret };
        assert!(matches!(machine.exits.handle(&mut Exit::Hypercall(call)), Action::Resume(Handled::Refused)));
        assert_eq!(ret, EINVAL, "{args:x?}");
    }
    assert_eq!(machine.recorder.calls(), [], "nothing was applied");
    assert_eq!(machine.memory.statistics().requests.pages_converted, 0);
    // The VM runs on.
    assert_eq!(machine.ask([0, 1, 0, 0]), 0);
    assert_eq!(machine.state(0), Some(State::Shared));
}

#[test]
fn a_good_request_is_answered_with_zero_and_done() {
    let mut machine = protected();
    let (result, actions) = machine.run(GuestOp::Hypercall { nr: 12, args: [0x20_0000, 512, 0x01, 0] });
    assert_eq!(result, Some(OpResult::Hypercall(0)));
    assert!(matches!(actions[..], [Action::Resume(Handled::Converted { pages: 512 })]), "{actions:?}");
    assert!(!machine.vm.is_private(Gfn::new(512).unwrap()));
    let (_, actions) = machine.run(GuestOp::Hypercall { nr: 12, args: [0x20_0000, 512, 0x01, 0] });
    assert!(matches!(actions[..], [Action::Resume(Handled::Unchanged)]), "{actions:?}");
    // A whole device window, declared shared: nothing to do.
    assert_eq!(machine.ask([RAM, 1 << 18, 0, 0]), EINVAL, "the window has memory without a private side in it");
    assert_eq!(machine.ask([RAM, 1 << 16, 0, 0]), 0);
}

/// Byte ranges that devices were told of, by slot.
#[derive(Debug, Default)]
struct Mapped(Mutex<Vec<(u64, u64)>>);

impl Listener for Mapped {
    fn map(&self, run: &SharedRun) -> Result<(), ListenerError> {
        let mut mapped = self.0.lock().unwrap();
        let (start, bytes) = (run.gfns.start_byte(), run.gfns.bytes());
        match mapped.last_mut() {
            // One conversion comes slot by slot.
            Some((first, length)) if *first + *length == start && start % GIB != GIB / 2 => *length += bytes,
            _ => mapped.push((start, bytes)),
        }
        Ok(())
    }

    fn unmap(&self, _: &SharedRun) {}
}

/// What a guest asks for at once is carried out a gibibyte at a time; whether it can be is known before.
#[test]
fn a_huge_request_is_carried_out_in_pieces() {
    let vm = SoftVm::tagged();
    let recorder = Recorder::new(vm.clone());
    let slot = |gpa| SlotSpec {
        id: None,
        gpa,
        size: 2 * GIB,
        shared: SharedSlice { backing: Arc::new(SharedMemory::new(2 * GIB).unwrap()), offset: 0 },
        private: Some((Arc::new(recorder.create_guest_memfd(2 * GIB, 0).unwrap()), FilePage::ZERO)),
        flags: SlotFlags::empty(),
    };
    let builder = CvmMemory::builder().slot(slot(0)).slot(slot(2 * GIB)).plain_ram(8 * GIB, PAGE_SIZE);
    let memory = Arc::new(builder.build(Arc::new(recorder.clone())).unwrap());
    let mut exits = VcpuExits::new(Arc::clone(&memory));
    let all = GfnRange::from_bytes(0, 4 * GIB).unwrap();
    let mapped = Arc::new(Mapped::default());
    let listener: Arc<dyn Listener> = mapped.clone();
    memory.add_listener(&listener).unwrap();
    mapped.0.lock().unwrap().clear();
    recorder.take();
    let mut ask = |gpa: u64, bytes: u64, attributes| {
        let args = [gpa, bytes / PAGE_SIZE, attributes, 0, 0, 0];
        let mut ret = 77;
        let call = HypercallExit { nr: HypercallExit::MAP_GPA_RANGE, args, ret: &mut ret };
        let action = exits.handle(&mut Exit::Hypercall(call));
        (ret, action)
    };
    // Refused for its last page, before its first is converted.
    assert_eq!(ask(4096, 8 * GIB, 0).0, EINVAL);
    assert_eq!(memory.converter().declared().count(all), all.pages());
    assert_eq!(recorder.take(), []);

    // An unaligned range, the end of which is a hole: half a gibibyte, two of a slot's other parts, and two more.
    let (answer, action) = ask(GIB / 2, 5 * GIB, 0);
    assert_eq!(answer, 0);
    let pages = (4 * GIB - GIB / 2) / PAGE_SIZE;
    assert!(matches!(action, Action::Resume(Handled::Converted { pages: done }) if done == pages), "{action:?}");
    assert_eq!(memory.converter().declared().count(all), all.pages() - pages);
    let mapped = std::mem::take(&mut *mapped.0.lock().unwrap());
    assert_eq!(mapped, [(GIB / 2, GIB), (3 * GIB / 2, GIB), (5 * GIB / 2, GIB), (7 * GIB / 2, GIB / 2)]);
    assert_eq!(memory.statistics().requests.requests, 2);
    // Again, nothing is left to do.
    assert!(matches!(ask(GIB / 2, 5 * GIB, 0).1, Action::Resume(Handled::Unchanged)));
}

#[test]
fn other_exits_are_not_ours() {
    let mut machine = protected();
    let mut ret = 5;
    let call = HypercallExit { nr: 1, args: [0; 6], ret: &mut ret };
    assert!(matches!(machine.exits.handle(&mut Exit::Hypercall(call)), Action::NotOurs));
    assert_eq!(ret, 5, "another's hypercall keeps its answer");
    assert!(matches!(machine.exits.handle(&mut Exit::Shutdown), Action::NotOurs));
    assert!(matches!(machine.exits.handle(&mut Exit::Other(Some(2))), Action::NotOurs));
}

/// A platform whose guests take "try again" for a failure.
#[derive(Debug)]
struct Impatient;

impl Arch for Impatient {
    fn platform(&self) -> Platform {
        Platform { guest_retries: false, name: "impatient", ..SoftVm::tagged().platform() }
    }
}

#[test]
fn try_again_is_said_only_to_who_would() {
    for (vm, answer) in [(SoftVm::tagged(), EAGAIN), (SoftVm::with_arch(Arc::new(Impatient)), EINVAL)] {
        let mut machine = machine_of(vm, |builder| builder.initial(State::Shared).pins(PinPolicy::Refuse));
        let memory = Arc::clone(&machine.memory);
        let pin = memory.pin(GfnRange::from_bytes(0x1000, 0x1000).unwrap()).unwrap();
        assert_eq!(machine.ask([0, 16, 0x10, 0]), answer);
        assert_eq!(machine.recorder.calls(), []);
        drop(pin);
        assert_eq!(machine.ask([0, 16, 0x10, 0]), 0);
        // A call that failed, and was undone.
        machine.recorder.fail_nth(1, Errno::ENOMEM);
        assert_eq!(machine.ask([0x10_0000, 16, 0x10, 0]), answer);
        assert_eq!(machine.state(0x100), Some(State::Shared));
    }
}

#[test]
fn a_budget_makes_guests_ask_again_that_would() {
    for (vm, retries) in [(SoftVm::tagged(), true), (SoftVm::with_arch(Arc::new(Impatient)), false)] {
        let mut machine = machine_of(vm, |builder| builder.initial(State::Shared));
        let options = ExitOptions { budget: Some(32), ..ExitOptions::default() };
        machine.exits = VcpuExits::with_options(Arc::clone(&machine.memory), options);
        let again = if retries { EAGAIN } else { 0 };
        // The first is carried out whatever its size, the next one only on a second try.
        assert_eq!(machine.ask([0, 64, 0x10, 0]), 0);
        assert_eq!(machine.ask([0x10_0000, 16, 0x10, 0]), again);
        assert_eq!(machine.state(0x100), Some(State::from_private(!retries)));
        assert_eq!(machine.ask([0x10_0000, 16, 0x10, 0]), 0);
        // Requests that leave nothing to do cost nothing.
        assert_eq!(machine.ask([0, 64, 0x10, 0]), again);
        assert_eq!(machine.ask([0, 64, 0x10, 0]), 0);
        assert_eq!(machine.ask([0, 64, 0x10, 0]), 0);
        assert_eq!(machine.ask([0x20_0000, 32, 0x10, 0]), 0);
        assert_eq!(machine.ask([0x30_0000, 1, 0x10, 0]), again);
    }
}

/// A guest's access cannot be told to try again, as its requests are where devices are not waited for: it waits for the
/// device, however little patience there is with identical faults.
#[test]
fn an_access_waits_for_a_device() {
    let mut machine = machine_of(SoftVm::tagged(), |builder| builder.initial(State::Shared).pins(PinPolicy::Refuse));
    let options = ExitOptions { repeats: 0, ..ExitOptions::default() };
    machine.exits = VcpuExits::with_options(Arc::clone(&machine.memory), options);
    let memory = Arc::clone(&machine.memory);
    let pin = memory.pin(GfnRange::from_bytes(0x3000, 0x1000).unwrap()).unwrap();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| machine.run(GuestOp::Write { gpa: 0x3000, data: vec![7; 16], private: true }));
        // The lock shows that it waits; if it does not, it is over already.
        while !format!("{memory:?}").contains("Wanted") && !vcpu.is_finished() {
            thread::yield_now();
        }
        drop(pin);
        let (result, actions) = vcpu.join().unwrap();
        assert_eq!(result, Some(OpResult::Done), "{actions:?}");
        assert!(matches!(actions[..], [Action::Resume(Handled::Converted { pages: 1 })]), "{actions:?}");
    });
}

#[test]
fn a_touch_converts_the_page_both_ways() {
    let mut machine = tagged();
    // Shared access to memory that is private in KVM.
    let data = vec![7; 16];
    machine.run(GuestOp::Write { gpa: 0x3000, data: data.clone(), private: true });
    let (result, actions) = machine.run(GuestOp::Read { gpa: 0x3000, len: 16, private: false });
    assert!(matches!(actions[..], [Action::Resume(Handled::Converted { pages: 1 })]), "{actions:?}");
    assert_eq!(result, Some(OpResult::Read(vec![0; 16])), "not what was private");
    assert_eq!([machine.state(2), machine.state(3)], [Some(State::Private), Some(State::Shared)]);
    // And back.
    machine.run(GuestOp::Write { gpa: 0x3000, data, private: false });
    let (result, actions) = machine.run(GuestOp::Read { gpa: 0x3000, len: 16, private: true });
    assert!(matches!(actions[..], [Action::Resume(Handled::Converted { pages: 1 })]), "{actions:?}");
    assert_eq!(result, Some(OpResult::Read(vec![0; 16])), "not what was shared, nor what was private before");
    let requests = machine.memory.statistics().requests;
    assert_eq!((requests.shared_faults, requests.pages_converted), (1, 2));
}

#[test]
fn implicit_conversions_can_be_refused() {
    let mut machine = tagged();
    machine.exits = VcpuExits::with_options(
        Arc::clone(&machine.memory),
        ExitOptions { implicit_conversion: false, ..ExitOptions::default() },
    );
    machine.run(GuestOp::Fill { gpa: 0, len: 1, byte: 1, private: true });
    let (_, actions) = machine.run(GuestOp::Read { gpa: 0, len: 1, private: false });
    let [Action::GuestError(GuestError::Implicit { gfn, to: State::Shared })] = actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!((gfn, machine.state(0)), (Gfn::ZERO, Some(State::Private)));
}

#[test]
fn a_block_is_materialised_by_its_first_private_touch() {
    let mut machine = tagged();
    for page in 0..1024 {
        machine.run(GuestOp::Write { gpa: page * PAGE_SIZE, data: vec![1], private: true });
    }
    let calls: Vec<Call> = machine.recorder.take();
    let sizes: Vec<(u64, u64)> = calls
        .iter()
        .map(|call| match call {
            Call::SetMemoryAttributes(attributes) => (attributes.address, attributes.size),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(sizes, [(0, 2 << 20), (2 << 20, 2 << 20)]);
    let statistics = machine.memory.statistics();
    assert_eq!((statistics.requests.private_faults, statistics.requests.pages_materialised), (2, 1024));
    assert_eq!(statistics.requests.pages_converted, 0, "it had been declared");
}

#[test]
fn c17_unknown_flags_are_an_error_and_no_conversion() {
    let mut machine = protected();
    for flags in [1, 1 << 4, MemoryFault::PRIVATE | 1, u64::MAX] {
        let action = machine.fault(fault(0, flags, Errno::EFAULT));
        assert!(matches!(action, Action::GuestError(GuestError::Malformed(_))), "{action:?}");
    }
    for (gpa, size) in [(1, PAGE_SIZE), (0, 0), (0, 12), (!0xfff, PAGE_SIZE)] {
        let action = machine.fault(MemoryFault { errno: Errno::EFAULT, flags: 0, gpa, size });
        assert!(matches!(action, Action::GuestError(GuestError::Malformed(_))), "{action:?}");
    }
    assert_eq!(machine.recorder.calls(), []);
}

#[test]
fn a_broken_page_is_not_a_request() {
    let mut machine = tagged();
    machine.run(GuestOp::Fill { gpa: 0x5000, len: 8, byte: 1, private: true });
    let file = machine.memory.space().files().next().unwrap().clone();
    machine.vm.poison(&file, FilePage::new(5).unwrap()).unwrap();
    let before = machine.attribute_calls();
    let (_, actions) = machine.run(GuestOp::Read { gpa: 0x5000, len: 8, private: true });
    assert!(matches!(actions[..], [Action::HwPoison(gpa)] if gpa.get() == 0x5000), "{actions:?}");
    assert_eq!(machine.attribute_calls(), before);
    // Punching the page is what mends it.
    let page = GfnRange::from_bytes(0x5000, 0x1000).unwrap();
    for to in [State::Shared, State::Private] {
        machine.memory.convert(&Request { range: page, to }).unwrap().converted().unwrap();
    }
    let (result, _) = machine.run(GuestOp::Read { gpa: 0x5000, len: 8, private: true });
    assert_eq!(result, Some(OpResult::Read(vec![0; 8])));
}

#[test]
fn what_the_kernel_cannot_provide_is_said() {
    let mut machine = protected();
    for errno in [Errno::ENOMEM, Errno::EIO, Errno::ENOENT, Errno::EINVAL] {
        let action = machine.fault(fault(0, MemoryFault::PRIVATE, errno));
        assert!(matches!(action, Action::Unresolvable(MemoryFault { errno: e, .. }) if e == errno), "{action:?}");
    }
}

#[test]
fn an_identical_fault_with_nothing_to_resolve_does_not_spin() {
    let mut machine = protected();
    let repeats = ExitOptions::default().repeats;
    let mut left = 0;
    let stuck = loop {
        match machine.fault(private_fault(0x1000)) {
            Action::Resume(Handled::Unchanged) => left += 1,
            other => break other,
        }
        assert!(left <= repeats);
    };
    assert!(matches!(stuck, Action::Stuck(fault) if fault == private_fault(0x1000)), "{stuck:?}");
    assert_eq!(left, repeats);
    // Any other exit in between is progress.
    for _ in 0..repeats * 2 {
        let action = machine.fault(private_fault(0x1000));
        assert!(matches!(action, Action::Resume(Handled::Unchanged)), "{action:?}");
        assert!(matches!(machine.exits.handle(&mut Exit::Halt), Action::NotOurs));
    }
    // Two faults that take turns are two guests' instructions making progress; another page starts anew.
    for _ in 0..repeats * 2 {
        for gpa in [0x2000, 0x3000] {
            let action = machine.fault(private_fault(gpa));
            assert!(matches!(action, Action::Resume(Handled::Unchanged)), "{action:?}");
        }
    }
}

#[test]
fn a_slot_that_has_gone_is_an_error_of_the_guest() {
    let mut machine = tagged();
    machine.run(GuestOp::Fill { gpa: 0, len: 1, byte: 1, private: true });
    machine.memory.remove_slot(SlotId::from_raw(0)).unwrap();
    for private in [true, false] {
        let (_, actions) = machine.run(GuestOp::Read { gpa: 0, len: 1, private });
        assert!(matches!(actions[..], [Action::GuestError(GuestError::NotMemory { .. })]), "{private}: {actions:?}");
    }
    // Memory without a private side.
    let (_, actions) = machine.run(GuestOp::Read { gpa: 1 << 30, len: 1, private: true });
    assert!(matches!(actions[..], [Action::GuestError(GuestError::Refused(_))]), "{actions:?}");
}

#[test]
fn a_conversion_that_fails_leaves_the_guest_its_page() {
    let mut machine = tagged();
    machine.run(GuestOp::Fill { gpa: 0, len: 4, byte: 9, private: true });
    machine.recorder.fail_nth(1, Errno::ENOMEM);
    let (_, actions) = machine.run(GuestOp::Read { gpa: 0, len: 4, private: false });
    assert!(matches!(actions[..], [Action::GuestError(GuestError::Failed { .. })]), "{actions:?}");
    let (result, actions) = machine.run(GuestOp::Read { gpa: 0, len: 4, private: true });
    assert_eq!((result, actions.len()), (Some(OpResult::Read(vec![9; 4])), 0));
}

#[test]
fn what_can_be_neither_done_nor_undone_is_told() {
    let mut machine = machine_of(SoftVm::software_protected(), |b| b.discard(DiscardPolicy::Immediate));
    // Of two separate pieces to free, the second one fails.
    machine.ask([0x4000, 1, 0, 0]);
    let punches = std::sync::atomic::AtomicU64::new(0);
    machine.recorder.fail_matching(
        move |call| call.is_punch_hole() && punches.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1,
        Errno::EIO,
    );
    let (_, actions) = machine.run(GuestOp::Hypercall { nr: 12, args: [0x2000, 8, 0, 0] });
    assert!(matches!(actions[..], [Action::Poisoned(_)]), "{actions:?}");
    for gfn in 2..10 {
        assert_eq!(machine.state(gfn), Some(State::Shared), "as the outcome says");
        assert!(!machine.vm.is_private(Gfn::new(gfn).unwrap()));
    }
    assert_eq!(machine.memory.statistics().requests.poisoned, 1);
    // The piece that was not freed is left to be freed.
    assert!(machine.memory.trim(u64::MAX).unwrap() >= 5 * PAGE_SIZE);
}
