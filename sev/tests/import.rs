//! A list is validated as a whole: overlaps, and memory that is not there.

use cvm_memory::addr::{AddrError, GfnRange};
use cvm_memory_sev::cpuid::{CpuidFunction, CpuidTable, TooManyFunctions};
use cvm_memory_sev::digest::PageType;
use cvm_memory_sev::import::{Import, ImportList, InvalidList};
use proptest::collection::vec;
use proptest::prelude::*;

fn at(frame: u64) -> usize {
    usize::try_from(frame).unwrap()
}

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::from_bytes(start << 12, (end - start) << 12).unwrap()
}

#[test]
fn imports_are_whole_pages_of_what_there_is() {
    assert_eq!(Import::normal(0x1000, &[]).unwrap_err().error, AddrError::Empty { start: 0x1000 });
    assert_eq!(
        Import::normal(0x1000, &[0; 4095]).unwrap_err().error,
        AddrError::Unaligned { start: 0x1000, size: 4095 }
    );
    assert_eq!(Import::secrets(0x1001).unwrap_err().error, AddrError::Unaligned { start: 0x1001, size: 4096 });
    let top = u64::MAX - 0xfff;
    assert_eq!(Import::zero(top, 0x1000).unwrap_err().error, AddrError::BeyondTop { start: top, size: 0x1000 });
    let error = Import::shared(3, &[0; 4096]).unwrap_err();
    assert_eq!(error.to_string(), "shared contents at 0x3, 0x1000 bytes");
}

#[test]
fn private_imports_need_private_memory_and_shared_ones_any() {
    let list = |imports: &[Import]| imports.iter().cloned().collect::<ImportList>();
    let (private, memory) = ([range(0, 16), range(16, 32)], [range(0, 16), range(16, 32), range(64, 80)]);
    let good = list(&[
        Import::zero(8 << 12, 16 << 12).unwrap(),
        Import::normal(0, &[1; 0x2000]).unwrap(),
        Import::shared(66 << 12, &[2; 0x1000]).unwrap(),
        Import::shared(2 << 12, &[2; 0x1000]).unwrap(),
        Import::cpuid(3 << 12, CpuidTable::default()).unwrap(),
    ]);
    assert_eq!(good.validate(&private, &memory), Ok(()));
    assert_eq!((good.pages(), good.count(None), good.count(Some(PageType::Zero))), (21, 2, 16));

    let error = list(&[Import::secrets(66 << 12).unwrap()]).validate(&private, &memory).unwrap_err();
    assert!(matches!(error, InvalidList::NoPrivateMemory { missing, .. } if missing == range(66, 67)));
    let error = list(&[Import::zero(30 << 12, 4 << 12).unwrap()]).validate(&private, &memory).unwrap_err();
    assert!(matches!(error, InvalidList::NoPrivateMemory { missing, .. } if missing == range(32, 34)));
    let error = list(&[Import::shared(79 << 12, &[0; 0x2000]).unwrap()]).validate(&private, &memory).unwrap_err();
    assert!(matches!(error, InvalidList::NoMemory { missing, .. } if missing == range(80, 81)));
    let error = list(&[Import::zero(0, 0x2000).unwrap(), Import::shared(0x1000, &[0; 0x1000]).unwrap()]);
    assert_eq!(
        error.validate(&private, &memory).unwrap_err().to_string(),
        "0x0..0x2000 zero and 0x1000..0x2000 shared overlap"
    );
    assert_eq!(ImportList::default().validate(&[], &[]), Ok(()));
}

#[test]
fn what_is_shared_is_not_measured_and_order_counts() {
    let (a, b) = (Import::normal(0, &[1; 4096]).unwrap(), Import::zero(0x1000, 0x1000).unwrap());
    let digest = |imports: &[&Import]| imports.iter().copied().cloned().collect::<ImportList>().digest(&[]);
    assert_eq!(digest(&[&a, &Import::shared(0x2000, &[3; 4096]).unwrap(), &b]), digest(&[&a, &b]));
    assert_ne!(digest(&[&b, &a]), digest(&[&a, &b]));
    // A page of zeroes is not a page that the firmware zeroes.
    assert_ne!(digest(&[&Import::normal(0x1000, &[0; 4096]).unwrap()]), digest(&[&b]));
}

#[test]
fn a_cpuid_table_holds_sixty_four() {
    let function = |nr: u32| CpuidFunction { eax_in: nr, ecx_in: 1, eax: !nr, edx: 7, ..CpuidFunction::default() };
    let functions: Vec<CpuidFunction> = (0..64).map(function).collect();
    let table = CpuidTable::new(&functions).unwrap();
    assert_eq!(table.functions().collect::<Vec<_>>(), functions);
    // struct snp_cpuid_table: count, reserved, then 48 bytes each.
    assert_eq!(table.page()[..16], [64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(table.page()[16 + 48..][..8], [1, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(table.page()[16 + 48 + 24..][..4], (!1_u32).to_le_bytes());
    assert_eq!(table.page()[16 + 48 + 36..][..4], 7_u32.to_le_bytes());
    let too_many: Vec<CpuidFunction> = (0..65).map(function).collect();
    assert_eq!(CpuidTable::new(&too_many), Err(TooManyFunctions { functions: 65 }));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Against frame by frame.
    #[test]
    fn validation_is_the_brute_force(
        imports in vec((0..40_u64, 1..6_u64, any::<bool>()), 0..6),
        slots in vec((0..40_u64, 1..20_u64, any::<bool>()), 0..4),
    ) {
        let (mut private, mut memory) = (Vec::new(), Vec::new());
        let (mut is_private, mut is_memory) = ([false; 64], [false; 64]);
        let mut next = 0;
        for (gap, len, convertible) in slots {
            let (start, end) = ((next + gap % 4).min(63), (next + gap % 4 + len).min(63));
            if start == end { continue }
            next = end;
            memory.push(range(start, end));
            is_memory[at(start)..at(end)].fill(true);
            if convertible {
                private.push(range(start, end));
                is_private[at(start)..at(end)].fill(true);
            }
        }
        let (mut taken, mut good) = ([false; 64], true);
        let mut list = ImportList::default();
        for (start, len, shared) in imports {
            for frame in start..start + len {
                let frame = at(frame);
                good &= !taken[frame] && if shared { is_memory[frame] } else { is_private[frame] };
                taken[frame] = true;
            }
            list.push(if shared {
                Import::shared(start << 12, &vec![0; at(len) * 4096]).unwrap()
            } else {
                Import::zero(start << 12, len << 12).unwrap()
            });
        }
        prop_assert_eq!(list.validate(&private, &memory).is_ok(), good);
    }
}
