//! What an SNP guest asks for.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::{BORDER, BORDER_PAGES, FILE_PAGES, GUEST_MEMFD, PAGE, WINDOW, page, usual_hva};
use crate::scenario::{Descriptor, Entries, File, Kind, Operation};

/// What is there to begin with, mostly: both windows in one file, private.
pub(super) fn world(kind: Kind) -> impl Strategy<Value = Vec<Operation>> {
    (0..16_u8, 3..=8_u64, any::<bool>()).prop_map(move |(any, pages, other)| {
        if kind != Kind::Snp || any == 0 {
            return Vec::new();
        }
        let file = File(0);
        let slot = |slot, gpa, pages, first| Operation::Region {
            slot,
            flags: GUEST_MEMFD,
            gpa,
            size: pages * PAGE,
            hva: usual_hva(slot),
            file: Descriptor::File(file),
            offset: first * PAGE,
        };
        let private = |gpa, pages| Operation::Attributes { gpa, size: pages * PAGE, attributes: 8, flags: 0 };
        let border = BORDER - BORDER_PAGES * PAGE;
        let mut all = vec![
            Operation::Create { file, size: FILE_PAGES * PAGE, flags: 0 },
            slot(1, WINDOW, pages, 0),
            private(WINDOW, 8),
        ];
        if other {
            all.extend([slot(2, border, 2 * BORDER_PAGES, 8), private(border, 2 * BORDER_PAGES)]);
        }
        all
    })
}

/// Entries for frames of the windows, most of which could be meant.
fn entry() -> impl Strategy<Value = u64> {
    let small = (page(), select(vec![1, 2, 1, 2, 1, 2, 0, 3]), select(vec![0, 0, 0, 0, 1, 2]))
        .prop_map(|(gpa, to, done)| to << 52 | gpa | done);
    let large = (
        select(vec![BORDER - 512 * PAGE, BORDER, BORDER + 512 * PAGE, BORDER + PAGE]),
        select(vec![1, 2]),
        select(vec![0, 0, 0, 1, 511, 512, 513]),
    )
        .prop_map(|(gpa, to, done)| 1 << 56 | to << 52 | gpa | done);
    prop_oneof![8 => small, 2 => large, 1 => any::<u64>()]
}

/// Runs of neighbours, so that there is something to gather.
fn run() -> impl Strategy<Value = Vec<u64>> {
    (page(), select(vec![1, 2]), 1..6_u64)
        .prop_map(|(gpa, to, pages)| (0..pages).map(|nr| (to << 52) | (gpa + nr * PAGE)).collect())
}

fn entries() -> impl Strategy<Value = Vec<u64>> {
    let piece = prop_oneof![2 => run().boxed(), 3 => entry().prop_map(|entry| vec![entry]).boxed()];
    vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

fn answer() -> impl Strategy<Value = u64> {
    select(vec![0, 0, 0, 0, 0, 11, 22])
}

fn psc_page(vcpus: u8) -> impl Strategy<Value = Operation> {
    let first = prop_oneof![6 => Just(0_u16), 1 => 0..4_u16, 1 => any::<u16>()];
    let last = prop_oneof![8 => Just(None), 1 => select(vec![0, 1, 252, 253, u16::MAX]).prop_map(Some)];
    (0..vcpus, first, last, entries(), answer()).prop_map(|(vcpu, first, last, entries, answer)| {
        let usual = u16::try_from(entries.len()).unwrap_or(0).saturating_sub(1);
        Operation::PscPage { vcpu, first, last: last.unwrap_or(usual), entries: Entries(entries), answer }
    })
}

fn pvalidate(vcpus: u8) -> impl Strategy<Value = Operation> {
    let small = page().prop_map(|gpa| (gpa, false));
    let large = select(vec![BORDER - 512 * PAGE, BORDER]).prop_map(|gpa| (gpa, true));
    (0..vcpus, prop_oneof![12 => small, 1 => large], select(vec![true, true, true, false]))
        .prop_map(|(vcpu, (gpa, large), validate)| Operation::Pvalidate { vcpu, gpa, large, validate })
}

fn vmgexit(vcpus: u8) -> impl Strategy<Value = Operation> {
    let frame = prop_oneof![3 => page(), 1 => any::<u64>().prop_map(|any| any & !0xfff)];
    let usual = (frame, select(vec![0x010, 0x012, 0x014, 0x080, 0x100])).prop_map(|(frame, code)| frame | code);
    (0..vcpus, prop_oneof![6 => usual.boxed(), 1 => any::<u64>().boxed()])
        .prop_map(|(vcpu, value)| Operation::Vmgexit { vcpu, value })
}

/// One request or acceptance.
pub(super) fn asks(vcpus: u8) -> impl Strategy<Value = Operation> {
    let to = prop_oneof![12 => select(vec![1_u8, 2]), 1 => 0..16_u8];
    let psc =
        (0..vcpus, page(), to, answer()).prop_map(|(vcpu, gpa, to, answer)| Operation::Psc { vcpu, gpa, to, answer });
    prop_oneof![16 => pvalidate(vcpus), 3 => psc, 3 => psc_page(vcpus), 1 => vmgexit(vcpus)]
}
