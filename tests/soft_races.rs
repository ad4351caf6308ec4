//! Races: faults against conversions, holes and slots that go. The windows are opened by hooks, not by luck, except in the
//! last two tests, which let everything run at once.

mod soft_kit;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use cvm_memory::addr::Gfn;
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{Exit, Hypervisor, MemoryFault, Platform, Vcpu};
use cvm_memory::soft::{Arch, Event, GmemPage, OpResult, SoftVm, Tagged};
use nix::errno::Errno;
use soft_kit::*;

/// Stops the first fault on a private page after it has looked up everything and before it maps the page.
#[derive(Debug)]
struct Gate {
    armed: AtomicBool,
    reached: SyncSender<()>,
    go: Mutex<Receiver<()>>,
}

impl Arch for Gate {
    fn platform(&self) -> Platform {
        Tagged.platform()
    }
    fn make_private(&self, _: GmemPage, _: Gfn) -> Result<(), Errno> {
        if self.armed.swap(false, Ordering::SeqCst) {
            self.reached.send(()).unwrap();
            self.go.lock().unwrap().recv().unwrap();
        }
        Ok(())
    }
}

struct Stopped {
    vm: SoftVm,
    file: GuestMemfd,
    go: SyncSender<()>,
    vcpu: JoinHandle<Result<OpResult, MemoryFault>>,
}

/// A vCPU that reads a private page and is stopped in its fault.
fn stopped_in_a_fault() -> Stopped {
    let (reached_tx, reached) = sync_channel(1);
    let (go, go_rx) = sync_channel(1);
    let gate = Gate { armed: AtomicBool::new(true), reached: reached_tx, go: Mutex::new(go_rx) };
    let vm = SoftVm::with_arch(Arc::new(gate));
    let file = vm.create_guest_memfd(PAGE, 0).unwrap();
    set_region(&vm, &gmem_slot(0, 0, PAGE, Ram::new(1).hva(), &file, 0)).unwrap();
    set_private(&vm, 0, PAGE, true);
    let mut vcpu = vm.create_vcpu();
    let vcpu = std::thread::spawn(move || {
        vcpu.start(read(0, 1, true));
        match vcpu.run() {
            Ok(Exit::Halt) => Ok(vcpu.take_result().unwrap()),
            Ok(Exit::MemoryFault(fault)) => Err(fault),
            other => panic!("{other:?}"),
        }
    });
    reached.recv().unwrap();
    Stopped { vm, file, go, vcpu }
}

/// The attribute changes between lookup and mapping: the fault starts again, and finds that it differs now.
#[test]
fn a_fault_that_was_overtaken_by_a_conversion_starts_again() {
    let Stopped { vm, go, vcpu, file: _file } = stopped_in_a_fault();
    let seq = vm.invalidate_seq();
    set_private(&vm, 0, PAGE, false);
    assert_eq!((vm.invalidate_seq(), vm.invalidate_in_progress().0), (seq + 1, 0));
    go.send(()).unwrap();
    let fault = vcpu.join().unwrap().unwrap_err();
    assert_eq!((fault.errno, fault.flags), (Errno::EFAULT, 8));
    assert_eq!(mapped(&vm), []);
}

/// A slot is not gone before every fault that has found it is through.
#[test]
fn a_delete_waits_for_faults_that_hold_the_slot() {
    let Stopped { vm, go, vcpu, file: _file } = stopped_in_a_fault();
    let inner = vm.clone();
    let deleter = std::thread::spawn(move || set_region(&inner, &delete(0)));
    while vm.slots().iter().any(|slot| !slot.invalid) {
        std::thread::yield_now();
    }
    for _ in 0..1000 {
        std::thread::yield_now();
        assert!(!deleter.is_finished());
        assert_eq!(vm.slots().len(), 1, "INVALID, but there");
    }
    go.send(()).unwrap();
    assert_eq!(deleter.join().unwrap(), Ok(()));
    // Mapped before the zap and read, or zapped before that and not found any more.
    let result = vcpu.join().unwrap();
    assert!(
        matches!(&result, Ok(OpResult::Read(bytes)) if *bytes == [0]) || result.is_err_and(|fault| fault.flags == 8)
    );
    assert_eq!(mapped(&vm), []);
}

/// A hole that is punched while a fault holds the page waits for nothing but the page, and the fault looks it up again.
#[test]
fn a_hole_under_a_fault() {
    let Stopped { vm, go, vcpu, file } = stopped_in_a_fault();
    let puncher = std::thread::spawn(move || {
        file.punch_hole(file.pages()).unwrap();
        file
    });
    while vm.invalidate_in_progress().0 == 0 {
        std::thread::yield_now();
    }
    go.send(()).unwrap();
    let file = puncher.join().unwrap();
    assert_eq!(vcpu.join().unwrap(), Ok(OpResult::Read(vec![0])));
    // The page is the one that is in the file now.
    assert_eq!(mapped(&vm), [gfns(0, 1)]);
    assert_eq!(file.resident_bytes().unwrap_or(PAGE), PAGE);
}

/// Two invalidations at once: the hull covers both and all between, and is emptied only when both have ended.
#[test]
fn hull_of_invalidations_that_overlap_in_time() {
    let vm = SoftVm::tagged();
    let files = [vm.create_guest_memfd(PAGE, 0).unwrap(), vm.create_guest_memfd(PAGE, 0).unwrap()];
    set_region(&vm, &gmem_slot(0, 0x100 * PAGE, PAGE, 0, &files[0], 0)).unwrap();
    set_region(&vm, &gmem_slot(1, 0x200 * PAGE, PAGE, 0, &files[1], 0)).unwrap();
    let [first, second] = files;
    let (inner, log) = (vm.clone(), Arc::new(Mutex::new(Vec::new())));
    let (seen, second) = (Arc::clone(&log), Mutex::new(Some(second)));
    vm.observe(move |event| {
        seen.lock().unwrap().push(inner.invalidate_in_progress());
        let second = second.lock().unwrap().take();
        if let (Event::Unmapped { .. }, Some(second)) = (event, second) {
            second.punch_hole(second.pages()).unwrap();
            seen.lock().unwrap().push(inner.invalidate_in_progress());
            // Kept open: closing would be an invalidation of its own.
            std::mem::forget(second);
        }
    });
    first.punch_hole(first.pages()).unwrap();
    let (one, both) = (gfns(0x100, 0x101), gfns(0x100, 0x201));
    let want = [(1, one), (2, both), (1, both), (1, both), (0, both)];
    assert_eq!(*log.lock().unwrap(), want);
    vm.stop_observing();
    // The next one begins with an empty hull.
    let inner = vm.clone();
    vm.observe(move |event| {
        if let Event::Unmapped { .. } = event {
            assert_eq!(inner.invalidate_in_progress(), (1, one));
        }
    });
    first.punch_hole(first.pages()).unwrap();
}

/// Two vCPUs read all the time while another thread converts and punches. `state` is odd while a conversion is under way, and
/// says which kind is in force otherwise: a read that falls within one state sees that kind's bytes.
#[test]
fn no_stale_byte_under_conversion() {
    const TIMES: u64 = 100;
    for vm in [SoftVm::software_protected(), SoftVm::tagged()] {
        let pages = 4;
        let file = vm.create_guest_memfd(pages * PAGE, 0).unwrap();
        let ram = Ram::new(pages);
        ram.fill(0x11);
        set_region(&vm, &gmem_slot(0, 0, pages * PAGE, ram.hva(), &file, 0)).unwrap();
        // 0 shared, 2 private and fresh, then on by 4.
        let state = Arc::new(AtomicU64::new(0));
        // The state in which each of them last read.
        let seen = Arc::new([AtomicU64::new(u64::MAX), AtomicU64::new(u64::MAX)]);
        let readers: Vec<_> = (0..2)
            .map(|who| {
                let (mut vcpu, state, seen) = (vm.create_vcpu(), Arc::clone(&state), Arc::clone(&seen));
                let leave = vcpu.immediate_exit();
                let thread = std::thread::spawn(move || {
                    let mut checked = [0_u64; 2];
                    loop {
                        let before = state.load(Ordering::SeqCst);
                        let private = before & 2 != 0;
                        vcpu.start(read(0, pages * PAGE, private));
                        match vcpu.run() {
                            Ok(Exit::Halt) => {}
                            Ok(Exit::MemoryFault(_)) => continue,
                            Err(Errno::EINTR) => return checked,
                            other => panic!("{other:?}"),
                        }
                        let Some(OpResult::Read(bytes)) = vcpu.take_result() else { panic!() };
                        if before & 1 == 0 && state.load(Ordering::SeqCst) == before {
                            let want = if private { 0 } else { 0x11 };
                            assert!(bytes.iter().all(|byte| *byte == want), "state {before}: {bytes:x?}");
                            checked[usize::from(private)] += 1;
                            seen[who].store(before, Ordering::SeqCst);
                        }
                    }
                });
                (leave, thread)
            })
            .collect();
        let mut vcpu = vm.create_vcpu();
        // No state goes before both have read in it.
        let in_force = |now: u64| {
            let is_behind = |(seen, (_, thread)): (&AtomicU64, &(_, JoinHandle<_>))| {
                seen.load(Ordering::SeqCst) != now && !thread.is_finished()
            };
            while seen.iter().zip(&readers).any(is_behind) {
                std::thread::yield_now();
            }
        };
        for _ in 0..TIMES {
            // To private. Something is left there, and freed again, before the state is in force.
            state.fetch_add(1, Ordering::SeqCst);
            set_private(&vm, 0, pages * PAGE, true);
            finish(&mut vcpu, fill(0, pages * PAGE, 0xcc, true));
            file.punch_hole(file.pages()).unwrap();
            in_force(state.fetch_add(1, Ordering::SeqCst) + 1);
            state.fetch_add(1, Ordering::SeqCst);
            set_private(&vm, 0, pages * PAGE, false);
            in_force(state.fetch_add(1, Ordering::SeqCst) + 1);
        }
        for (leave, thread) in readers {
            leave.set(true);
            let [shared, private] = thread.join().unwrap();
            assert!(shared >= TIMES && private >= TIMES, "{shared} shared and {private} private reads checked");
        }
    }
}

/// vCPUs, conversions, holes and slots that come and go, all at once: everything ends.
#[test]
fn no_deadlock() {
    let vm = SoftVm::tagged();
    let pages = 8;
    let file = Arc::new(vm.create_guest_memfd(pages * PAGE, 0).unwrap());
    let ram = Ram::new(pages);
    let slot = gmem_slot(0, 0, pages * PAGE, ram.hva(), &file, 0);
    set_region(&vm, &slot).unwrap();
    let (mut leaves, mut vcpus) = (Vec::new(), Vec::new());
    for index in 0..2 {
        let mut vcpu = vm.create_vcpu();
        leaves.push(vcpu.immediate_exit());
        vcpus.push(std::thread::spawn(move || {
            let mut private = index == 0;
            loop {
                vcpu.start(fill(17, pages * PAGE - 99, 1, private));
                loop {
                    match vcpu.run() {
                        Ok(Exit::Halt) => break,
                        Ok(Exit::Mmio(_)) => {}
                        Ok(Exit::MemoryFault(fault)) => {
                            private = fault.flags == 0;
                            break;
                        }
                        Err(Errno::EINTR) => return,
                        other => panic!("{other:?}"),
                    }
                }
            }
        }));
    }
    let spawn = |work: Box<dyn Fn() + Send>| std::thread::spawn(move || (0..100).for_each(|_| work()));
    let (a, b) = (vm.clone(), Arc::clone(&file));
    let workers = [
        spawn(Box::new(move || {
            set_private(&a, 0, 5 * PAGE, true);
            set_private(&a, 3 * PAGE, 5 * PAGE, false);
        })),
        spawn(Box::new(move || {
            b.punch_hole(file_pages(2, 6)).unwrap();
            b.allocate(file_pages(1, 3)).unwrap();
        })),
    ];
    for _ in 0..100 {
        set_region(&vm, &delete(0)).unwrap();
        set_region(&vm, &slot).unwrap();
    }
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    leaves.iter().for_each(|leave| leave.set(true));
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    assert_eq!(vm.invalidate_in_progress().0, 0);
}
