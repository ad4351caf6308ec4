//! The recorder, in front of a hypervisor that accepts everything and counts what reaches it.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use cvm_memory::addr::{FilePage, FileRange};
use cvm_memory::gmem::GmemFlags;

use super::*;

#[derive(Debug, Clone, Default)]
struct Accepting {
    reached: Arc<AtomicUsize>,
}

impl Accepting {
    fn count(&self) -> Result<(), Errno> {
        self.reached.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

#[derive(Debug)]
struct AcceptingFile(std::fs::File, Accepting);

impl GmemOps for AcceptingFile {
    fn fallocate(&self, _: FallocateFlags, _: i64, _: i64) -> Result<(), Errno> {
        self.1.count()
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Hypervisor for Accepting {
    fn platform(&self) -> Platform {
        Platform::SOFTWARE_PROTECTED
    }

    fn check_extension(&self, cap: Cap) -> u64 {
        cap.0.into()
    }

    fn enable_cap(&self, _: Cap, _: [u64; 4]) -> Result<(), Errno> {
        self.count()
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<GuestMemfd, Errno> {
        self.count()?;
        let ops = AcceptingFile(std::fs::File::open("/dev/null").unwrap(), self.clone());
        GuestMemfd::new(size, GmemFlags::from_bits_retain(flags), Box::new(ops)).map_err(|_| Errno::EINVAL)
    }

    unsafe fn set_user_memory_region2(&self, _: &MemoryRegion) -> Result<(), Errno> {
        self.count()
    }

    fn set_memory_attributes(&self, _: &MemoryAttributes) -> Result<(), Errno> {
        self.count()
    }
}

fn pair() -> (Recorder<Accepting>, Arc<AtomicUsize>) {
    let inner = Accepting::default();
    let reached = Arc::clone(&inner.reached);
    (Recorder::new(inner), reached)
}

fn attributes(address: u64) -> MemoryAttributes {
    MemoryAttributes { address, size: 4096, attributes: 8, flags: 0 }
}

#[test]
fn every_call_that_changes_something_is_written_down_in_order() {
    let (vm, reached) = pair();
    let region = MemoryRegion { slot: 3, memory_size: 4096, ..MemoryRegion::default() };
    let args = [1, 2, 3, 4];

    vm.enable_cap(Cap::EXIT_HYPERCALL, args).unwrap();
    let file = vm.create_guest_memfd(8192, 1).unwrap();
    // SAFETY: the hypervisor inside looks at nothing.
    unsafe { vm.set_user_memory_region2(&region) }.unwrap();
    vm.set_memory_attributes(&attributes(0x1000)).unwrap();
    file.punch_hole(FileRange::with_len(FilePage::ZERO, 1).unwrap()).unwrap();

    let mode = FallocateFlags::FALLOC_FL_KEEP_SIZE | FallocateFlags::FALLOC_FL_PUNCH_HOLE;
    let expected = [
        Call::EnableCap { cap: Cap::EXIT_HYPERCALL, args },
        Call::CreateGuestMemfd { size: 8192, flags: 1 },
        Call::SetUserMemoryRegion2(region),
        Call::SetMemoryAttributes(attributes(0x1000)),
        Call::Fallocate { file: file.id(), mode, offset: 0, len: 4096 },
    ];
    assert_eq!(vm.calls(), expected);
    assert_eq!(vm.count_matching(Call::is_punch_hole), 1);
    assert!(vm.entries().iter().all(|entry| entry.result == Some(Ok(())) && !entry.injected));
    assert_eq!(reached.load(Ordering::SeqCst), 5);

    // Questions are passed on and not written down.
    assert_eq!((vm.platform(), vm.check_extension(Cap(77))), (Platform::SOFTWARE_PROTECTED, 77));
    assert_eq!((vm.take().len(), vm.count()), (5, 0));
}

#[test]
fn a_capability_is_answered_as_told_and_no_other() {
    let (vm, _) = pair();
    vm.answer(Cap(77), 1);
    vm.answer(Cap(77), 0);
    assert_eq!([76, 77, 78].map(|cap| vm.clone().check_extension(Cap(cap))), [76, 0, 78]);
}

#[test]
fn the_nth_call_fails_and_never_arrives() {
    let (vm, reached) = pair();
    vm.fail_nth(2, Errno::ENOMEM);
    vm.fail_nth(4, Errno::EIO);
    let answers: Vec<_> = (0..5).map(|i| vm.set_memory_attributes(&attributes(i * 4096))).collect();
    assert_eq!(answers, [Ok(()), Err(Errno::ENOMEM), Ok(()), Err(Errno::EIO), Ok(())]);
    assert_eq!(reached.load(Ordering::SeqCst), 3);
    let injected: Vec<_> = vm.entries().iter().map(|entry| entry.injected).collect();
    assert_eq!(injected, [false, true, false, true, false]);
    assert_eq!(vm.clear_faults(), 0);
}

#[test]
fn a_call_that_matches_fails_once_on_files_too() {
    let (vm, reached) = pair();
    vm.fail_matching(Call::is_punch_hole, Errno::EINTR);
    vm.fail_nth(100, Errno::EIO);
    let file = vm.create_guest_memfd(8192, 0).unwrap();
    let page = FileRange::with_len(FilePage::ZERO, 1).unwrap();
    assert_eq!(file.allocate(page), Ok(()));
    assert!(file.punch_hole(page).is_err());
    assert_eq!(file.punch_hole(page), Ok(()));
    assert_eq!(reached.load(Ordering::SeqCst), 3);
    assert_eq!(vm.clear_faults(), 1, "the hundredth call was still to come");
}

#[test]
fn calls_of_many_threads_are_all_there_and_fail_as_often_as_told() {
    let (vm, reached) = pair();
    for n in [1, 100, 400] {
        vm.fail_nth(n, Errno::ENOMEM);
    }
    let failed = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|id| {
                let vm = &vm;
                let fails = move |i: &u64| vm.set_memory_attributes(&attributes(id * 1000 + i)).is_err();
                scope.spawn(move || (0..100).filter(fails).count())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>()
    });
    assert_eq!((failed, vm.count(), reached.load(Ordering::SeqCst)), (3, 400, 397));
    let mut seen = vm.calls();
    seen.sort_by_key(|call| match call {
        Call::SetMemoryAttributes(attributes) => attributes.address,
        other => panic!("{other:?}"),
    });
    seen.dedup();
    assert_eq!(seen.len(), 400);
}
