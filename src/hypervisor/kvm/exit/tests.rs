//! Exits decoded from the bytes that the kernel's header says, not from the bindings' fields.

use std::mem::size_of;

use super::*;

/// A `kvm_run` with `fields` (offset, bytes) written over zeroes.
fn run(reason: u32, fields: &[(usize, &[u8])]) -> kvm_run {
    let mut image = [0_u8; size_of::<kvm_run>()];
    for (offset, bytes) in fields.iter().copied().chain([(8, &reason.to_ne_bytes()[..])]) {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    // SAFETY: `kvm_run` is made of integers only, so any bytes are one.
    unsafe { std::mem::transmute::<[u8; size_of::<kvm_run>()], kvm_run>(image) }
}

#[test]
fn a_memory_fault_keeps_its_errno_whatever_it_is() {
    let given = run(39, &[(32, &8_u64.to_ne_bytes()), (40, &0x7000_u64.to_ne_bytes()), (48, &4096_u64.to_ne_bytes())]);
    for errno in [Errno::EFAULT, Errno::EHWPOISON, Errno::ENOMEM, Errno::EIO, Errno::ENOENT, Errno::EINVAL] {
        let expected = MemoryFault { errno, flags: MemoryFault::PRIVATE, gpa: 0x7000, size: 4096 };
        assert_eq!(memory_fault(&given, errno), Some(expected));
    }
}

#[test]
fn an_interrupted_run_is_no_memory_fault_and_neither_is_another_reason() {
    assert_eq!(memory_fault(&run(39, &[]), Errno::EINTR), None);
    assert_eq!(memory_fault(&run(39, &[]), Errno::EAGAIN), None);
    assert_eq!(memory_fault(&run(0, &[]), Errno::EFAULT), None);
}

#[test]
fn a_hypercall_is_answered_in_place() {
    let mut given = run(3, &[(32, &12_u64.to_ne_bytes()), (40, &0x1000_u64.to_ne_bytes()), (48, &2_u64.to_ne_bytes())]);
    match decode(&mut given) {
        Exit::Hypercall(HypercallExit { nr, args, ret }) => {
            assert_eq!((nr, args), (HypercallExit::MAP_GPA_RANGE, [0x1000, 2, 0, 0, 0, 0]));
            *ret = 22;
        }
        exit => panic!("{exit:?}"),
    }
    // SAFETY: integers only; the union begins at 32, and `ret` is at 88 in the kernel's header.
    let payload = unsafe { given.__bindgen_anon_1.padding };
    assert_eq!(payload[88 - 32..96 - 32], [22, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn mmio_has_its_direction_and_length() {
    let fields: &[(usize, &[u8])] = &[(32, &0xfee0_0000_u64.to_ne_bytes()), (40, &[1, 2, 3, 4]), (48, &[2, 0, 0, 0])];
    let mut given = run(6, fields);
    assert!(matches!(decode(&mut given), Exit::Mmio(Mmio::Read { gpa: 0xfee0_0000, data: [1, 2] })));
    given = run(6, &[fields, &[(52, &[1])]].concat());
    assert!(matches!(decode(&mut given), Exit::Mmio(Mmio::Write { gpa: 0xfee0_0000, data: [1, 2] })));
    // A length that no kernel gives does not reach beyond the eight bytes.
    given = run(6, &[fields, &[(48, &[0xff; 4])]].concat());
    assert!(matches!(decode(&mut given), Exit::Mmio(Mmio::Read { data: [1, 2, 3, 4, 0, 0, 0, 0], .. })));
}

#[test]
fn the_rest_is_told_by_number() {
    assert!(matches!(decode(&mut run(5, &[])), Exit::Halt));
    assert!(matches!(decode(&mut run(8, &[])), Exit::Shutdown));
    let mut failed = run(9, &[(32, &u64::MAX.to_ne_bytes()), (40, &3_u32.to_ne_bytes())]);
    assert!(matches!(decode(&mut failed), Exit::FailEntry { reason: u64::MAX, cpu: 3 }));
    assert!(matches!(decode(&mut run(17, &[(32, &[1])])), Exit::InternalError { suberror: Some(1) }));
    assert!(matches!(decode(&mut run(31, &[])), Exit::DirtyRingFull));
    assert!(matches!(Exit::from_kvm(VcpuExit::Unsupported(31), Errno::EINTR), Exit::DirtyRingFull));
    for reason in [0, 2, 24, 40, 43] {
        assert!(matches!(decode(&mut run(reason, &[])), Exit::Other(Some(number)) if number == reason));
    }
}

#[test]
fn what_kvm_ioctls_gave_means_the_same() {
    let fault = Exit::from_kvm(VcpuExit::MemoryFault { flags: 0, gpa: 0x5000, size: 4096 }, Errno::EHWPOISON);
    let expected = MemoryFault { errno: Errno::EHWPOISON, flags: 0, gpa: 0x5000, size: 4096 };
    assert!(matches!(fault, Exit::MemoryFault(fault) if fault == expected));
    for (exit, reason) in [
        (VcpuExit::Unknown, 0),
        (VcpuExit::IoOut(0x3f8, &[1]), 2),
        (VcpuExit::IoIn(0x3f8, &mut [1]), 2),
        (VcpuExit::IrqWindowOpen, 7),
        (VcpuExit::Intr, 10),
        (VcpuExit::SystemEvent(1, &[]), 24),
        (VcpuExit::Unsupported(40), 40),
    ] {
        assert!(matches!(Exit::from_kvm(exit, Errno::EIO), Exit::Other(Some(number)) if number == reason));
    }
    assert!(matches!(Exit::from_kvm(VcpuExit::InternalError, Errno::EIO), Exit::InternalError { suberror: None }));
}
