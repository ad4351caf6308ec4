//! `KVM_PRE_FAULT_MEMORY`: the order of its checks, its progress, and the scenario of the kernel's pre_fault_memory_test.

mod soft_kit;

use std::sync::Arc;

use cvm_memory::hypervisor::{Hypervisor, Platform, PreFaultMemory, Vcpu};
use cvm_memory::soft::{Arch, SoftVm, Tagged};
use nix::errno::Errno;
use soft_kit::*;

const SIZE_2M: u64 = 2 << 20;

fn prefault(vm: &SoftVm, gpa: u64, size: u64, flags: u64) -> (Result<(), Errno>, u64, u64) {
    let mut range = PreFaultMemory { gpa, size, flags };
    let result = vm.create_vcpu().pre_fault_memory(&mut range);
    (result, range.gpa, range.size)
}

/// pre_fault_memory_test: a slot of 2 MiB + 4 KiB at the top of guest memory; three types of memory.
#[test]
fn selftest_numbers() {
    let base = (1 << 52) - (SIZE_2M + PAGE);
    let ram = Ram::new(513);
    for (vm, private) in
        [(SoftVm::default_type(), false), (SoftVm::software_protected(), false), (SoftVm::software_protected(), true)]
    {
        let file = vm.create_guest_memfd(SIZE_2M + PAGE, 0).unwrap();
        let slot = if private {
            set_private(&vm, base, SIZE_2M + 4 * PAGE, true);
            gmem_slot(5, base, SIZE_2M + PAGE, ram.hva(), &file, 0)
        } else {
            shared_slot(5, base, SIZE_2M + PAGE, ram.hva())
        };
        set_region(&vm, &slot).unwrap();
        assert_eq!(prefault(&vm, base, SIZE_2M, 0), (Ok(()), base + SIZE_2M, 0));
        let end = base + SIZE_2M + PAGE;
        assert_eq!(prefault(&vm, base + SIZE_2M, 2 * PAGE, 0), (Ok(()), end, PAGE));
        // Shared memory without a slot is ENOENT, private memory is EFAULT.
        let missing = if private { Errno::EFAULT } else { Errno::ENOENT };
        assert_eq!(prefault(&vm, end, PAGE, 0), (Err(missing), end, PAGE));
        let first = base >> 12;
        assert_eq!(mapped(&vm), [gfns(first, first + 513)]);
        if private {
            assert_eq!(file.resident_bytes().unwrap_or(SIZE_2M + PAGE), SIZE_2M + PAGE);
        }
    }
}

#[test]
fn arguments() {
    let vm = SoftVm::default_type();
    set_region(&vm, &shared_slot(0, 0, PAGE, Ram::new(1).hva())).unwrap();
    for (gpa, size, flags) in [
        (0, PAGE, 1),
        (0, 0, 0),
        (1, PAGE, 0),
        (0, PAGE + 1, 0),
        (!(PAGE - 1), PAGE, 0),
        (PAGE, 0_u64.wrapping_sub(PAGE), 0),
    ] {
        assert_eq!(prefault(&vm, gpa, size, flags), (Err(Errno::EINVAL), gpa, size));
    }
}

#[derive(Debug)]
struct NotYet;

impl Arch for NotYet {
    fn platform(&self) -> Platform {
        Tagged.platform()
    }
    fn pre_fault_allowed(&self) -> bool {
        false
    }
}

#[test]
fn bad_arguments_come_before_not_allowed() {
    let vm = SoftVm::with_arch(Arc::new(NotYet));
    assert_eq!(prefault(&vm, 1, PAGE, 0).0, Err(Errno::EINVAL));
    assert_eq!(prefault(&vm, 0, PAGE, 0).0, Err(Errno::EOPNOTSUPP));
}

#[test]
fn errors_of_the_first_page_only() {
    let vm = SoftVm::tagged();
    let file = vm.create_guest_memfd(4 * PAGE, 0).unwrap();
    set_region(&vm, &gmem_slot(0, 0, 4 * PAGE, 0, &file, 0)).unwrap();
    set_region(&vm, &shared_slot(1, 8 * PAGE, PAGE, 0)).unwrap();
    set_private(&vm, 0, 4 * PAGE, true);
    set_private(&vm, 8 * PAGE, PAGE, true);
    vm.poison(&file, cvm_memory::addr::FilePage::new(2).unwrap()).unwrap();
    assert_eq!(prefault(&vm, 0, 4 * PAGE, 0), (Ok(()), 2 * PAGE, 2 * PAGE));
    assert_eq!(prefault(&vm, 2 * PAGE, 2 * PAGE, 0), (Err(Errno::EHWPOISON), 2 * PAGE, 2 * PAGE));
    // A private page of a slot without a file.
    assert_eq!(prefault(&vm, 8 * PAGE, PAGE, 0).0, Err(Errno::EFAULT));
    // A shared page at a bad address. Prefault takes the kind from the attribute and never converts.
    set_private(&vm, 0, PAGE, false);
    assert_eq!(prefault(&vm, 0, PAGE, 0).0, Err(Errno::EFAULT));
    assert!(!vm.is_private(gfn(0)));
    drop(file);
    assert_eq!(prefault(&vm, PAGE, PAGE, 0).0, Err(Errno::EFAULT));
    // A vCPU told to leave.
    let mut vcpu = vm.create_vcpu();
    vcpu.immediate_exit().set(true);
    assert_eq!(vcpu.pre_fault_memory(&mut PreFaultMemory { gpa: 0, size: PAGE, flags: 0 }), Err(Errno::EINTR));
}

/// pre_fault_memory_test: a slot that is deleted and created again meanwhile; each call makes progress or fails, never both.
#[test]
fn against_a_slot_that_comes_and_goes() {
    let vm = SoftVm::software_protected();
    let pages = 64;
    let file = vm.create_guest_memfd(pages * PAGE, 0).unwrap();
    let slot = gmem_slot(0, 0, pages * PAGE, 0, &file, 0);
    set_region(&vm, &slot).unwrap();
    set_private(&vm, 0, pages * PAGE, true);
    let mut vcpu = vm.create_vcpu();
    let worker = std::thread::spawn(move || {
        let mut seen = [0_u32; 3];
        for _ in 0..50 {
            let mut range = PreFaultMemory { gpa: 0, size: pages * PAGE, flags: 0 };
            while range.size > 0 {
                let before = range;
                match vcpu.pre_fault_memory(&mut range) {
                    Ok(()) => {
                        assert!(range.size < before.size && range.gpa + range.size == pages * PAGE);
                        seen[0] += 1;
                    }
                    Err(errno @ (Errno::EAGAIN | Errno::EFAULT)) => {
                        assert_eq!(range, before);
                        seen[if errno == Errno::EAGAIN { 1 } else { 2 }] += 1;
                        std::thread::yield_now();
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
        seen
    });
    while !worker.is_finished() {
        set_region(&vm, &delete(0)).unwrap();
        set_region(&vm, &slot).unwrap();
    }
    let [progress, again, missing] = worker.join().unwrap();
    println!("{progress} calls made progress, {again} EAGAIN, {missing} EFAULT");
}
