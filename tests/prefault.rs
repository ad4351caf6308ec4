//! Memory ahead of use: what is touched, in how many calls, and how it stops, resumes and fails.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cvm_memory::addr::{GfnRange, PAGE_SIZE};
use cvm_memory::convert::{Request, State};
use cvm_memory::hypervisor::{Cap, Exit, PreFaultMemory, Vcpu};
use cvm_memory::memory::{CvmMemory, PrefaultFailed};
use cvm_memory::prefault::{PieceError, PrefaultError, PrefaultOptions, Prefaulted, Progress};
use cvm_memory::soft::{GuestOp, OpResult, SoftVcpu, SoftVm};
use cvm_memory_testkit::{Call, Recorder};
use nix::errno::Errno;

const MIB: u64 = 1 << 20;

fn range(start: u64, size: u64) -> GfnRange {
    GfnRange::from_bytes(start, size).unwrap()
}

fn memory(vm: SoftVm, size: u64) -> (Recorder<SoftVm>, CvmMemory) {
    let recorder = Recorder::new(vm);
    let memory = CvmMemory::builder().ram(0, size).build(Arc::new(recorder.clone())).unwrap();
    recorder.take();
    (recorder, memory)
}

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn allocations(calls: &[Call]) -> Vec<(i64, i64)> {
    calls
        .iter()
        .filter_map(|call| match call {
            Call::Fallocate { offset, len, .. } if !call.is_punch_hole() => Some((*offset, *len)),
            _ => None,
        })
        .collect()
}

#[test]
fn only_what_is_declared_private_is_touched() {
    for vm in [SoftVm::software_protected(), SoftVm::tagged()] {
        let (recorder, memory) = memory(vm.clone(), 16 * MIB);
        let shared = range(2 * MIB, 3 * MIB);
        memory.convert(&Request { range: shared, to: State::Shared }).unwrap().converted().unwrap();
        recorder.take();
        let before = vm.counters();

        let mut vcpu = vm.create_vcpu();
        let options = PrefaultOptions::default();
        let done = memory.prefault(&memory.private_memory(), &mut [&mut vcpu], &options, &mut go_on).unwrap();

        assert_eq!(done, Prefaulted { bytes: 13 * MIB, left: vec![] });
        assert_eq!(memory.resident().private_bytes, Some(13 * MIB), "and not a page of the shared part");
        assert_eq!(memory.resident().shared_bytes, Some(0));
        // Pieces end at multiples of 16 MiB; the shared part divides the first.
        let mib = i64::try_from(MIB).unwrap();
        assert_eq!(allocations(&recorder.take()), [(0, 2 * mib), (5 * mib, 11 * mib)]);
        assert_eq!(vm.counters().since(&before).pre_fault_memory, 2);
        // Every page of it is mapped: no access faults any more.
        for gpa in [0, 2 * MIB - PAGE_SIZE, 5 * MIB, 16 * MIB - PAGE_SIZE] {
            vcpu.start(GuestOp::Read { gpa, len: 1, private: true });
            assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
            assert_eq!(vcpu.take_result(), Some(OpResult::Read(vec![0])));
        }
        let mapped: u64 = vm.mappings().iter().filter(|m| m.private).map(|m| m.gfns.bytes()).sum();
        assert_eq!(mapped, 13 * MIB);
        // Nothing is left to materialise, and doing it again needs no attribute.
        memory.prefault(&memory.private_memory(), &mut [&mut vcpu], &options, &mut go_on).unwrap();
        assert_eq!(recorder.count_matching(|call| matches!(call, Call::SetMemoryAttributes(_))), 0);
    }
}

#[test]
fn small_pieces_are_rounded_up_to_2_mib() {
    let (recorder, memory) = memory(SoftVm::software_protected(), 8 * MIB);
    let options = PrefaultOptions { piece_pages: 1, ..PrefaultOptions::default() };
    memory.prefault(&[range(0, 8 * MIB)], &mut [], &options, &mut go_on).unwrap();
    let calls = allocations(&recorder.take());
    assert_eq!(calls.len(), 4);
    assert!(calls.iter().all(|(_, len)| *len == 2 << 20));
}

#[test]
fn it_stops_where_it_is_told_and_resumes_there() {
    let vm = SoftVm::software_protected();
    let (recorder, memory) = memory(vm.clone(), 8 * MIB);
    let options = PrefaultOptions { piece_pages: 512, ..PrefaultOptions::default() };
    let mut seen = Vec::new();
    let mut vcpu = vm.create_vcpu();
    let first = memory
        .prefault(&[range(0, 8 * MIB)], &mut [&mut vcpu], &options, &mut |progress| {
            seen.push(progress);
            if progress.done == 6 * MIB { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!(first, Prefaulted { bytes: 6 * MIB, left: vec![range(6 * MIB, 2 * MIB)] });
    let expected: Vec<Progress> = (1..=3).map(|n| Progress { done: n * 2 * MIB, total: 8 * MIB }).collect();
    assert_eq!(seen, expected);
    let second = memory.prefault(&first.left, &mut [&mut vcpu], &options, &mut go_on).unwrap();
    assert_eq!(second, Prefaulted { bytes: 2 * MIB, left: vec![] });
    assert_eq!(allocations(&recorder.take()).len(), 4, "nothing was done twice");
}

#[test]
fn several_vcpus_share_the_work() {
    let vm = SoftVm::software_protected();
    let (recorder, memory) = memory(vm.clone(), 32 * MIB);
    let mut vcpus: Vec<SoftVcpu> = (0..4).map(|_| vm.create_vcpu()).collect();
    let mut vcpus: Vec<&mut dyn Vcpu> = vcpus.iter_mut().map(|vcpu| vcpu as &mut dyn Vcpu).collect();
    let options = PrefaultOptions { piece_pages: 512, ..PrefaultOptions::default() };
    let mut last = 0;
    let done = memory
        .prefault(&[range(0, 32 * MIB)], &mut vcpus, &options, &mut |progress| {
            assert!(progress.done > last && progress.total == 32 * MIB);
            last = progress.done;
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((done.bytes, done.left.len(), last), (32 * MIB, 0, 32 * MIB));
    let mut offsets = allocations(&recorder.take());
    offsets.sort_unstable();
    assert_eq!(offsets, (0..16).map(|n| (n << 21, 2 << 20)).collect::<Vec<(i64, i64)>>());
    assert_eq!(vm.mappings().iter().map(|m| m.gfns.bytes()).sum::<u64>(), 32 * MIB);
}

/// A vCPU whose kernel answers from a list, then does everything at once.
#[derive(Debug, Default)]
struct Scripted {
    answers: VecDeque<Result<u64, Errno>>,
    calls: u64,
    /// Answers every call so, for ever.
    always: Option<Errno>,
    /// Makes nonsense of the structure.
    nonsense: Option<PreFaultMemory>,
    idle: bool,
}

impl Vcpu for Scripted {
    fn pre_fault_memory(&mut self, range: &mut PreFaultMemory) -> Result<(), Errno> {
        self.calls += 1;
        if let Some(nonsense) = self.nonsense {
            *range = nonsense;
            return Ok(());
        }
        if self.idle {
            return Ok(());
        }
        if let Some(errno) = self.always {
            return Err(errno);
        }
        let bytes = self.answers.pop_front().unwrap_or(Ok(range.size))?;
        range.gpa += bytes;
        range.size -= bytes;
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>, Errno> {
        Err(Errno::EINVAL)
    }
}

fn failed(result: Result<Prefaulted, PrefaultFailed>) -> PrefaultError {
    match result {
        Err(PrefaultFailed::Stopped(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn c18_interrupted_and_partial_calls_are_gone_on_with() {
    let (_, memory) = memory(SoftVm::software_protected(), 4 * MIB);
    let answers = [Err(Errno::EINTR), Ok(MIB), Err(Errno::EAGAIN), Err(Errno::EINTR), Ok(PAGE_SIZE), Ok(MIB)];
    let mut vcpu = Scripted { answers: answers.into(), ..Scripted::default() };
    let options = PrefaultOptions { allocate: false, patience: 1, ..PrefaultOptions::default() };
    let result = memory.prefault(&[range(0, 4 * MIB)], &mut [&mut vcpu], &options, &mut go_on);
    // Two refusals in a row are one too many for this patience.
    let error = failed(result);
    let PieceError::Map { gpa, errno, .. } = error.cause else { panic!("{error:?}") };
    assert_eq!((gpa, errno, vcpu.calls), (MIB, Errno::EINTR, 4));
    assert_eq!(error.done.left, [range(0, 4 * MIB)]);
    // With more, it goes through.
    let mut vcpu = Scripted { answers: answers.into(), ..Scripted::default() };
    let options = PrefaultOptions { allocate: false, ..PrefaultOptions::default() };
    let done = memory.prefault(&[range(0, 4 * MIB)], &mut [&mut vcpu], &options, &mut go_on).unwrap();
    assert_eq!((done.bytes, vcpu.calls), (4 * MIB, 7));
}

#[test]
fn a_kernel_that_never_gets_on_is_given_up() {
    let (_, memory) = memory(SoftVm::software_protected(), 4 * MIB);
    let options = PrefaultOptions { allocate: false, patience: 10, ..PrefaultOptions::default() };
    for always in [Errno::EAGAIN, Errno::EINTR] {
        let mut vcpu = Scripted { always: Some(always), ..Scripted::default() };
        let error = failed(memory.prefault(&[range(0, 4 * MIB)], &mut [&mut vcpu], &options, &mut go_on));
        assert!(matches!(error.cause, PieceError::Map { errno, gpa: 0, .. } if errno == always), "{error:?}");
        assert_eq!(vcpu.calls, 11);
    }
    let mut vcpu = Scripted { idle: true, ..Scripted::default() };
    let error = failed(memory.prefault(&[range(0, 4 * MIB)], &mut [&mut vcpu], &options, &mut go_on));
    assert!(matches!(error.cause, PieceError::Map { .. }), "{error:?}");
    assert_eq!(vcpu.calls, 11);
}

#[test]
fn errors_and_nonsense_are_errors_at_once() {
    let (_, memory) = memory(SoftVm::software_protected(), 4 * MIB);
    let options = PrefaultOptions { allocate: false, ..PrefaultOptions::default() };
    for errno in [Errno::EFAULT, Errno::ENOENT, Errno::EOPNOTSUPP, Errno::ENOMEM, Errno::EHWPOISON, Errno::EIO] {
        let mut vcpu = Scripted { answers: [Ok(MIB), Err(errno)].into(), ..Scripted::default() };
        let error = failed(memory.prefault(&[range(0, 4 * MIB)], &mut [&mut vcpu], &options, &mut go_on));
        assert!(matches!(error.cause, PieceError::Map { errno: e, gpa: MIB, .. } if e == errno), "{error:?}");
        assert_eq!((error.at, error.done.left.as_slice()), (range(0, 4 * MIB), &[range(0, 4 * MIB)][..]));
    }
    let grown = PreFaultMemory { gpa: 0, size: 8 * MIB, flags: 0 };
    let jumped = PreFaultMemory { gpa: MIB, size: MIB, flags: 0 };
    let wrapped = PreFaultMemory { gpa: u64::MAX, size: u64::MAX, flags: 0 };
    for nonsense in [grown, jumped, wrapped] {
        let mut vcpu = Scripted { nonsense: Some(nonsense), ..Scripted::default() };
        let error = failed(memory.prefault(&[range(0, 4 * MIB)], &mut [&mut vcpu], &options, &mut go_on));
        assert!(matches!(error.cause, PieceError::Map { errno: Errno::EIO, gpa: 0, .. }), "{error:?}");
        assert_eq!(vcpu.calls, 1);
    }
}

#[test]
fn allocation_is_repeated_when_interrupted_and_fails_when_not() {
    let (recorder, memory) = memory(SoftVm::software_protected(), 4 * MIB);
    let options = PrefaultOptions::default();
    recorder.fail_nth(1, Errno::EINTR);
    memory.prefault(&[range(0, 4 * MIB)], &mut [], &options, &mut go_on).unwrap();
    assert_eq!(allocations(&recorder.take()).len(), 2);
    recorder.fail_nth(1, Errno::ENOMEM);
    let error = failed(memory.prefault(&[range(0, 4 * MIB)], &mut [], &options, &mut go_on));
    assert!(matches!(error.cause, PieceError::Allocate { .. }), "{error:?}");
    assert_eq!(allocations(&recorder.take()).len(), 1);
    // The attribute of lazily declared memory comes first.
    let (recorder, memory) = self::memory(SoftVm::tagged(), 4 * MIB);
    recorder.fail_nth(1, Errno::ENOMEM);
    let error = failed(memory.prefault(&[range(0, 4 * MIB)], &mut [], &options, &mut go_on));
    assert!(matches!(error.cause, PieceError::Materialise { .. }), "{error:?}");
    assert_eq!(allocations(&recorder.take()).len(), 0);
}

#[test]
fn a_vm_that_cannot_map_ahead_says_so_before_anything_is_done() {
    let vm = SoftVm::software_protected();
    let unable = Recorder::new(vm.clone());
    unable.answer(Cap::PRE_FAULT_MEMORY, 0);
    let memory = CvmMemory::builder().ram(0, 4 * MIB).build(Arc::new(unable)).unwrap();
    let mut vcpu = vm.create_vcpu();
    let options = PrefaultOptions::default();
    let result = memory.prefault(&[range(0, 4 * MIB)], &mut [&mut vcpu], &options, &mut go_on);
    let Err(PrefaultFailed::Missing(missing)) = result else { panic!("{result:?}") };
    assert_eq!(missing.cap, Cap::PRE_FAULT_MEMORY);
    assert_eq!(memory.resident().private_bytes, Some(0));
    // Allocating needs no capability.
    memory.prefault(&[range(0, 4 * MIB)], &mut [], &options, &mut go_on).unwrap();
    assert_eq!(memory.resident().private_bytes, Some(4 * MIB));
}

#[test]
fn what_becomes_shared_meanwhile_is_left_alone() {
    let vm = SoftVm::software_protected();
    let (recorder, memory) = memory(vm, 8 * MIB);
    let options = PrefaultOptions { piece_pages: 512, map: false, ..PrefaultOptions::default() };
    let calls = AtomicU64::new(0);
    let done = memory
        .prefault(&[range(0, 8 * MIB)], &mut [], &options, &mut |_| {
            if calls.fetch_add(1, Ordering::Relaxed) == 0 {
                memory
                    .convert(&Request { range: range(4 * MIB, 2 * MIB), to: State::Shared })
                    .unwrap()
                    .converted()
                    .unwrap();
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(done, Prefaulted { bytes: 6 * MIB, left: vec![] });
    assert_eq!(memory.resident().private_bytes, Some(6 * MIB));
    assert_eq!(allocations(&recorder.take()).len(), 3);
}

/// A process that may have no more threads: the calling one does it all.
#[test]
fn without_threads_to_be_had() {
    const CHILD: &str = "CVM_PREFAULT_WITHOUT_THREADS";
    if std::env::var_os(CHILD).is_none() {
        // Stacks that no thread can be given. The harness runs its test on the main thread then.
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "without_threads_to_be_had"]).env("RUST_MIN_STACK", (1_u64 << 46).to_string());
        let output = child.env(CHILD, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    std::thread::Builder::new().spawn(|| {}).unwrap_err();
    let vm = SoftVm::software_protected();
    let (_, memory) = memory(vm.clone(), 8 * MIB);
    let (mut first, mut second) = (vm.create_vcpu(), vm.create_vcpu());
    let options = PrefaultOptions { piece_pages: 512, ..PrefaultOptions::default() };
    let done = memory.prefault(&[range(0, 8 * MIB)], &mut [&mut first, &mut second], &options, &mut go_on).unwrap();
    assert_eq!(done, Prefaulted { bytes: 8 * MIB, left: vec![] });
}
