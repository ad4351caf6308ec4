//! The kernel's `pre_fault_memory_test`: memory mapped ahead of use, by the bare ioctl and by the library.
//!
//! A slot of 2 MiB and a page, as high as a guest's addresses go. A call either makes progress or fails: never both, and
//! never neither, even while its slot comes and goes.

mod selftest_kit;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use cvm_memory::addr::{FilePage, GfnRange};
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::convert::State;
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Cap, MemoryRegion, Platform, PreFaultMemory, Vcpu};
use cvm_memory::layout::{SlotFlags, SlotId};
use cvm_memory::memory::{CvmMemory, PrefaultFailed, SlotSpec};
use cvm_memory::prefault::{PieceError, PrefaultError, PrefaultOptions, Prefaulted};
use cvm_memory_testkit::skip::require;
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use nix::errno::Errno;
use selftest_kit::*;

const SIZE: u64 = 2 * MIB + PAGE;
const SLOT: u16 = 1;
/// How often the slot is deleted and made again under the calls.
const TIMES: u32 = 100;

/// Which VM, and which side of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Default,
    Shared,
    Private,
}

const KINDS: [Kind; 3] = [Kind::Default, Kind::Shared, Kind::Private];

impl Kind {
    fn platform(self) -> Platform {
        if self == Self::Default { Platform::DEFAULT } else { Platform::SOFTWARE_PROTECTED }
    }

    /// What the shared side is filled with; a private page is all zeroes.
    fn byte(self) -> u8 {
        if self == Self::Private { 0 } else { 0x77 }
    }

    /// What KVM answers where there is no slot.
    fn without_slot(self) -> Errno {
        if self == Self::Private { Errno::EFAULT } else { Errno::ENOENT }
    }
}

/// A VM with a vCPU, and where its memory goes.
fn machine<M: Machine>(kind: Kind) -> Option<(M, M::Guest, u64)> {
    let vm = M::create(kind.platform())?;
    require(&vm, Cap::PRE_FAULT_MEMORY, 1)?;
    let guest = vm.guest(0);
    let gpa = ((1_u64 << M::physical_bits(&guest)) - SIZE) & !(2 * MIB - 1);
    Some((vm, guest, gpa))
}

/// What calls came to.
#[derive(Debug, Default)]
struct Tally {
    whole: u64,
    partial: u64,
    errors: BTreeMap<&'static str, u64>,
}

/// Calls until all of it is mapped or a call fails, but for `EINTR`. Returns the bytes left.
fn pre_fault(vcpu: &mut dyn Vcpu, gpa: u64, size: u64, tally: &mut Tally) -> (Result<(), Errno>, u64) {
    let mut range = PreFaultMemory { gpa, size, flags: 0 };
    loop {
        let before = range;
        match vcpu.pre_fault_memory(&mut range) {
            Ok(()) => {
                assert!(range.size < before.size, "success without progress: {range:x?}");
                assert_eq!(range.gpa + range.size, gpa + size, "address and size move together");
                if range.size == 0 {
                    tally.whole += 1;
                    return (Ok(()), 0);
                }
                tally.partial += 1;
            }
            Err(errno) => {
                assert_eq!(range, before, "{errno} and progress");
                *tally.errors.entry(errno_name(errno)).or_default() += 1;
                if errno != Errno::EINTR {
                    return (Err(errno), range.size);
                }
            }
        }
    }
}

fn errno_name(errno: Errno) -> &'static str {
    match errno {
        Errno::EINTR => "EINTR",
        Errno::EAGAIN => "EAGAIN",
        Errno::ENOENT => "ENOENT",
        Errno::EFAULT => "EFAULT",
        other => other.desc(),
    }
}

/// Set when this goes, however that comes about.
struct Sets<'a>(&'a AtomicBool);

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Interrupts the vCPU's thread now and then.
///
/// The kernel needs that. Deleting a slot of a VM of the default type makes the roots of its page tables obsolete, and a
/// vCPU that is in the middle of mapping ahead tries each page again until it has a new one, which it gets outside that
/// loop only; the deletion waits for the vCPU to leave. Nothing but a signal ends it.
fn interrupt_until(over: &AtomicBool, interrupt: &impl Fn()) {
    while !over.load(Ordering::SeqCst) {
        interrupt();
        thread::sleep(Duration::from_millis(1));
    }
}

/// A raw slot, shared memory that is filled, and private pages where they are due. The file is only there for a VM that
/// can use it.
fn raw_slot<M: Machine>(vm: &M, kind: Kind, gpa: u64) -> (MemoryRegion, Option<GuestMemfd>) {
    let shared = leaked(SIZE);
    fill(shared, 0, SIZE, 0x77);
    let file = (kind != Kind::Default).then(|| vm.create_guest_memfd(SIZE, 0).unwrap());
    let region = plain_slot(SLOT.into(), gpa, SIZE, shared.hva());
    let region = match &file {
        Some(file) => MemoryRegion { flags: GUEST_MEMFD, guest_memfd: fd(file), ..region },
        None => region,
    };
    set(vm, &region).unwrap();
    if kind == Kind::Private {
        set_private(vm, gpa, SIZE, true);
    }
    (region, file)
}

/// Within the slot, across its end, and beyond it.
fn by_the_ioctl<M: Machine>() {
    for kind in KINDS {
        let Some((vm, mut guest, gpa)) = machine::<M>(kind) else { return };
        let (region, file) = raw_slot(&vm, kind, gpa);
        let mut tally = Tally::default();
        let mut call = |offset, size| pre_fault(&mut guest, gpa + offset, size, &mut tally);

        assert_eq!(call(0, 2 * MIB), (Ok(()), 0), "{kind:?}");
        // Beyond the slot the attribute is shared, whatever it is within.
        assert_eq!(call(2 * MIB, 2 * PAGE), (Err(Errno::ENOENT), PAGE), "{kind:?}");
        assert_eq!(call(SIZE, PAGE), (Err(Errno::ENOENT), PAGE), "{kind:?}");
        if kind == Kind::Private {
            set_private(&vm, gpa + SIZE, PAGE, true);
            assert_eq!(call(2 * MIB, 2 * PAGE), (Err(Errno::EFAULT), PAGE));
            assert_eq!(call(SIZE, PAGE), (Err(Errno::EFAULT), PAGE));
        }
        assert_eq!(tally.partial, if kind == Kind::Private { 2 } else { 1 }, "{kind:?}");

        // What is not even looked at.
        for (gpa, size, flags) in
            [(gpa, 0, 0), (gpa + 1, PAGE, 0), (gpa, PAGE + 1, 0), (gpa, PAGE, 1), (!0xfff, 2 * PAGE, 0)]
        {
            let mut range = PreFaultMemory { gpa, size, flags };
            assert_eq!(guest.pre_fault_memory(&mut range), Err(Errno::EINVAL), "{range:x?}");
            assert_eq!(range, PreFaultMemory { gpa, size, flags });
        }

        // The guest finds its memory, and all of it was there.
        if let Some(file) = &file {
            assert_resident(file, if kind == Kind::Private { SIZE } else { 0 });
        }
        let seen = guest.perform(GuestOp::Check { gpa, len: SIZE, byte: kind.byte() });
        assert_eq!(seen, Outcome::Same, "{kind:?}");

        // Nothing is left to map.
        set(&vm, &deletion(&region)).unwrap();
        let mut call = |offset, size| pre_fault(&mut guest, gpa + offset, size, &mut tally);
        assert_eq!(call(0, SIZE), (Err(kind.without_slot()), SIZE), "{kind:?}");
    }
}

/// The slot is deleted and made again, and the thread interrupted, all the time.
fn by_the_ioctl_while_the_slot_comes_and_goes<M: Machine>() {
    for kind in KINDS {
        let Some((vm, mut guest, gpa)) = machine::<M>(kind) else { return };
        let (region, _file) = raw_slot(&vm, kind, gpa);
        let mut tally = Tally::default();
        let interrupt = M::interrupter(&guest);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let _over = Sets(&over);
                for _ in 0..TIMES {
                    set(&vm, &deletion(&region)).unwrap();
                    set(&vm, &region).unwrap();
                }
            });
            scope.spawn(|| interrupt_until(&over, &interrupt));
            loop {
                let last = over.load(Ordering::SeqCst);
                let (result, left) = pre_fault(&mut guest, gpa, SIZE, &mut tally);
                match result {
                    Ok(()) => assert_eq!(left, 0),
                    Err(errno) => {
                        assert!(errno == Errno::EAGAIN || errno == kind.without_slot(), "{kind:?}: {errno}");
                        assert!(!last, "{kind:?}: {errno} with the slot in place");
                    }
                }
                if last {
                    break;
                }
            }
        });
        println!("{}, {kind:?}, {TIMES} times: {tally:?}", M::NAME);
        let seen = guest.perform(GuestOp::Check { gpa, len: SIZE, byte: kind.byte() });
        assert_eq!(seen, Outcome::Same, "{kind:?}");
    }
}

/// A facade over the same slot. Nothing of it can be private on a VM of the default type.
fn memory<M: Machine>(vm: &M, kind: Kind, gpa: u64) -> (CvmMemory, SlotSpec) {
    let shared = SharedMemory::new(SIZE).unwrap();
    fill(&shared, 0, SIZE, 0x77);
    let shared: Arc<dyn SharedBacking> = Arc::new(shared);
    let file = (kind != Kind::Default).then(|| Arc::new(vm.create_guest_memfd(SIZE, 0).unwrap()));
    let slot = SlotSpec {
        id: Some(SlotId::new(SLOT)),
        gpa,
        size: SIZE,
        shared: SharedSlice { backing: shared, offset: 0 },
        private: file.map(|file| (file, FilePage::ZERO)),
        flags: SlotFlags::empty(),
    };
    let initial = State::from_private(kind == Kind::Private);
    let memory = CvmMemory::builder().initial(initial).slot(slot.clone()).build(Arc::new(vm.clone())).unwrap();
    (memory, slot)
}

fn ahead(memory: &CvmMemory, vcpu: &mut dyn Vcpu, gpa: u64, size: u64) -> Result<Prefaulted, PrefaultFailed> {
    let range = GfnRange::from_bytes(gpa, size).unwrap();
    let options = PrefaultOptions::default();
    memory.prefault(&[range], &mut [vcpu], &options, &mut |_| ControlFlow::Continue(()))
}

/// The library maps what is private memory, and nothing else; where there is none it has nothing to do.
fn by_the_library<M: Machine>() {
    for kind in KINDS {
        let Some((vm, mut guest, gpa)) = machine::<M>(kind) else { return };
        let (memory, slot) = memory(&vm, kind, gpa);
        let private = |bytes: u64| if kind == Kind::Private { bytes } else { 0 };
        for (offset, size, done) in [(0, 2 * MIB, 2 * MIB), (2 * MIB, 2 * PAGE, PAGE), (SIZE, PAGE, 0), (0, SIZE, SIZE)]
        {
            let done = Prefaulted { bytes: private(done), left: Vec::new() };
            assert_eq!(ahead(&memory, &mut guest, gpa + offset, size).unwrap(), done, "{kind:?}");
        }
        if let Some((file, _)) = &slot.private {
            assert_resident(file, private(SIZE));
        }
        let issued = memory.statistics().issued;
        assert_eq!((issued.pre_fault, issued.allocate), if kind == Kind::Private { (3, 3) } else { (0, 0) });
        let seen = guest.perform(GuestOp::Check { gpa, len: SIZE, byte: kind.byte() });
        assert_eq!(seen, Outcome::Same, "{kind:?}");
    }
}

/// The kernel loses the slot, and the library is not told: an error that says what is done and what is left.
fn by_the_library_without_the_slot<M: Machine>() {
    let Some((vm, mut guest, gpa)) = machine::<M>(Kind::Private) else { return };
    let (memory, slot) = memory(&vm, Kind::Private, gpa);
    let file = &slot.private.as_ref().unwrap().0;
    let region = gmem_slot(SLOT.into(), gpa, SIZE, fd(file), 0);
    set(&vm, &deletion(&region)).unwrap();
    let range = GfnRange::from_bytes(gpa, SIZE).unwrap();
    let error = ahead(&memory, &mut guest, gpa, SIZE).unwrap_err();
    let PrefaultFailed::Stopped(PrefaultError { done, at, cause }) = error else { panic!("{error:?}") };
    assert_eq!((done, at), (Prefaulted { bytes: 0, left: vec![range] }, range));
    let PieceError::Map { gfns, gpa: first, errno } = cause else { panic!("{cause:?}") };
    assert_eq!((gfns, first, errno), (range, gpa, Errno::EFAULT));

    set(&vm, &MemoryRegion { userspace_addr: slot.shared.hva(), ..region }).unwrap();
    assert_eq!(ahead(&memory, &mut guest, gpa, SIZE).unwrap(), Prefaulted { bytes: SIZE, left: Vec::new() });
}

/// A slot that comes and goes through the library is waited for, an interruption is nothing to speak of, and so no call
/// fails.
fn by_the_library_while_the_slot_comes_and_goes<M: Machine>() {
    for kind in KINDS {
        let Some((vm, mut guest, gpa)) = machine::<M>(kind) else { return };
        let (memory, slot) = memory(&vm, kind, gpa);
        let interrupt = M::interrupter(&guest);
        let over = AtomicBool::new(false);
        let (mut whole, mut absent) = (0_u64, 0_u64);
        thread::scope(|scope| {
            scope.spawn(|| {
                let _over = Sets(&over);
                for _ in 0..TIMES {
                    memory.remove_slot(SlotId::new(SLOT)).unwrap();
                    memory.add_slots(vec![slot.clone()]).unwrap();
                }
            });
            scope.spawn(|| interrupt_until(&over, &interrupt));
            loop {
                let last = over.load(Ordering::SeqCst);
                let done = ahead(&memory, &mut guest, gpa, SIZE).unwrap();
                match done {
                    Prefaulted { bytes: SIZE, ref left } if left.is_empty() => whole += 1,
                    Prefaulted { bytes: 0, ref left } if left.is_empty() => absent += 1,
                    other => panic!("{other:?}"),
                }
                if last {
                    assert_eq!(done.bytes, if kind == Kind::Private { SIZE } else { 0 });
                    break;
                }
            }
        });
        println!("{}, {kind:?}, {TIMES} times: {whole} whole, {absent} with nothing to do", M::NAME);
        let seen = guest.perform(GuestOp::Check { gpa, len: SIZE, byte: kind.byte() });
        assert_eq!(seen, Outcome::Same, "{kind:?}");
    }
}

on_both_machines!(
    by_the_ioctl,
    by_the_ioctl_while_the_slot_comes_and_goes,
    by_the_library,
    by_the_library_without_the_slot,
    by_the_library_while_the_slot_comes_and_goes,
);
