//! Structures as bytes, where a type alone cannot show that they are right.

use cvm_memory_tdx::exit::{TdVmCall, tdx_exit};
use cvm_memory_tdx::uapi::{EXIT_TDX, TdxExit};
use kvm_bindings::kvm_run;

/// By the header's offsets into `kvm_run`: flags 32, nr 40, ret 48, then what the call has.
fn run(nr: u64, data: [u64; 5]) -> kvm_run {
    let mut run = kvm_run { exit_reason: EXIT_TDX, ..Default::default() };
    let words = [0, nr, 0, data[0], data[1], data[2], data[3], data[4]];
    let mut padding = [0; 256];
    for (to, from) in padding.iter_mut().zip(words.iter().flat_map(|word| word.to_ne_bytes())) {
        *to = from.cast_signed();
    }
    run.__bindgen_anon_1.padding = padding;
    run
}

#[test]
fn what_a_td_asks_for() {
    let call = |nr, data| TdVmCall::from(&*tdx_exit(&mut run(nr, data)).unwrap());
    assert_eq!(call(0x10000, [1, 0, 0, 0, 0]), TdVmCall::GetTdVmCallInfo { leaf: 1 });
    assert_eq!(call(0x10002, [0x7000, 0x2000, 0, 0, 0]), TdVmCall::GetQuote { gpa: 0x7000, size: 0x2000 });
    assert_eq!(call(0x10004, [0x80, 0, 0, 0, 0]), TdVmCall::SetupEventNotifyInterrupt { vector: 0x80 });
    assert_eq!(call(0x10003, [9; 5]), TdVmCall::Other(0x10003));
    assert!(tdx_exit(&mut kvm_run { exit_reason: 3, ..run(0x10000, [0; 5]) }).is_none());
}

#[test]
#[allow(unsafe_code, reason = "the union is read back as KVM would")]
fn answers_go_where_kvm_reads_them() {
    let mut run = run(0x10000, [1, 0, 0, 0, 0]);
    let exit: &mut TdxExit = tdx_exit(&mut run).unwrap();
    exit.ret = 0x1122_3344;
    exit.data[1] = 5;
    // SAFETY: every byte of the union was set above.
    let bytes = unsafe { run.__bindgen_anon_1.padding }.map(i8::cast_unsigned);
    assert_eq!(bytes[16..24], 0x1122_3344_u64.to_ne_bytes());
    assert_eq!(bytes[32..40], 5_u64.to_ne_bytes());
}
