//! Scenarios at random, in a world that is small enough for everything in it to get in each other's way.
//!
//! A few files, slots and areas, two short windows of guest memory (one on both sides of a 2 MiB border), and at every field
//! the values at which something changes: ends of ranges, unaligned by one, the limits of KVM's types. proptest makes the
//! scenarios and shrinks those that fail.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::guard;
use crate::machine::Shape;
use crate::scenario::{Area, Descriptor, File, Hva, Kind, Operation, Scenario};

mod snp;

const PAGE: u64 = 4096;
/// First byte of the window in which most happens.
const WINDOW: u64 = 0x1000_0000;
/// Its pages.
const WINDOW_PAGES: u64 = 12;
/// A 2 MiB border; the other window is [`BORDER_PAGES`] to each side of it.
const BORDER: u64 = 0x1200_0000;
const BORDER_PAGES: u64 = 2;
/// Slots that scenarios mostly use. What is usual of each, but for where it is, depends on its id alone, so that giving
/// the same one again moves it, changes its flags, or does nothing.
const SLOTS: u32 = 6;
const FILES: u8 = 3;
const FILE_PAGES: u64 = 12;

const LOG_DIRTY: u32 = 1;
const READONLY: u32 = 2;
const GUEST_MEMFD: u32 = 4;
const MMAP: u64 = 1;
const INIT_SHARED: u64 = 2;
const KEEP_SIZE: u32 = 1;
const PUNCH_HOLE: u32 = 3;

/// Scenarios for machines of that shape.
pub fn scenario(shape: Shape) -> impl Strategy<Value = Scenario> {
    let Shape { kind, vcpus, .. } = shape;
    let few = if kind == Kind::Snp { 2 } else { 6 };
    let files = vec(usual_file(kind), 0..few);
    let slots = vec(prop_oneof![2 => gmem_slot(kind), 1 => plain_slot()], 0..=few);
    let world = snp::world(kind);
    // Most operations are about something that is there.
    let aim = prop_oneof![1 => Just(None), 3 => any::<u8>().prop_map(Some)];
    let rest = vec((operation(shape), aim), 1..100);
    (world, files, slots, rest).prop_map(move |(world, files, slots, rest)| {
        let mut there = There::default();
        let first = world.into_iter().chain(files).chain(slots).map(|operation| (operation, None));
        let steps = first.chain(rest).map(|(mut operation, aim)| {
            if let Some(aim) = aim {
                there.aim(kind, &mut operation, usize::from(aim));
            }
            there.note(&operation);
            operation.into()
        });
        Scenario { kind, vcpus, steps: steps.collect() }
    })
}

/// What a scenario has made so far, if all of it worked.
#[derive(Default)]
struct There {
    files: Vec<File>,
    /// Id, address, size.
    slots: Vec<(u32, u64, u64)>,
    /// Of those, the ids of some that have a file.
    with_file: Vec<u32>,
}

impl There {
    fn note(&mut self, operation: &Operation) {
        match *operation {
            Operation::Create { file, .. } => {
                self.files.retain(|other| *other != file);
                self.files.push(file);
            }
            Operation::Close { file } => self.files.retain(|other| *other != file),
            Operation::Region { slot, size: 0, .. } => self.slots.retain(|(other, ..)| *other != slot),
            Operation::Region { slot, gpa, size, flags, file, .. } => {
                let overlaps = |(other, start, pages): &(u32, u64, u64)| {
                    *other == slot || gpa < start.saturating_add(*pages) && *start < gpa.saturating_add(size)
                };
                let usable = match file {
                    Descriptor::File(file) => self.files.contains(&file),
                    _ => flags & GUEST_MEMFD == 0,
                };
                if usable && !self.slots.iter().any(overlaps) {
                    self.slots.push((slot, gpa, size));
                    self.with_file.retain(|other| *other != slot);
                    self.with_file.extend((flags & GUEST_MEMFD != 0).then_some(slot));
                }
            }
            _ => {}
        }
    }

    /// Moves an operation to a file, or to a slot or the page behind it.
    fn aim(&self, kind: Kind, operation: &mut Operation, at: usize) {
        match operation {
            Operation::Fallocate { file, .. } | Operation::Map { file } | Operation::Close { file } => {
                if let Some(there) = self.files.get(at % self.files.len().max(1)) {
                    *file = *there;
                }
            }
            Operation::Region { slot, size: 0, .. }
            | Operation::GetDirty { slot }
            | Operation::ClearDirty { slot, .. } => {
                if let Some((there, ..)) = self.slots.get(at % self.slots.len().max(1)) {
                    *slot = *there;
                }
            }
            Operation::Load { gpa, .. }
            | Operation::Store { gpa, .. }
            | Operation::Fetch { gpa, .. }
            | Operation::Prefault { gpa, .. }
            | Operation::Attributes { gpa, .. }
            | Operation::Pvalidate { gpa, large: false, .. }
            | Operation::Psc { gpa, .. }
            | Operation::MapGpaRange { gpa, .. } => {
                // SNP guests accept only what is in files.
                let accepted = self.slots.iter().filter(|slot| self.with_file.contains(&slot.0)).collect::<Vec<_>>();
                let all = self.slots.iter().collect();
                let slots: Vec<_> = if kind == Kind::Snp && !accepted.is_empty() { accepted } else { all };
                if let Some((_, start, size)) = slots.get(at % slots.len().max(1))
                    && *size <= 512 * PAGE
                {
                    *gpa = start.wrapping_add(*gpa / PAGE % (*size / PAGE + 1) * PAGE).wrapping_add(*gpa % PAGE);
                }
            }
            _ => {}
        }
    }
}

/// One operation of whatever kind.
fn operation(shape: Shape) -> BoxedStrategy<Operation> {
    let Shape { kind, vcpus, mut physical_bits } = shape;
    if kind == Kind::Snp {
        physical_bits = physical_bits.min(guard::SNP_GUEST_BITS);
    }
    let asks = if kind == Kind::Snp { snp::asks(vcpus).boxed() } else { map_gpa_range(vcpus).boxed() };
    let (asks_weight, slots_weight) = if kind == Kind::Snp { (24, 1) } else { (2, 4) };
    let attributes_weight = if kind == Kind::Default { 1 } else { 8 };
    prop_oneof![
        2 => usual_file(kind),
        1 => any_file(),
        1 => file().prop_map(|file| Operation::Close { file }),
        2 => file().prop_map(|file| Operation::Map { file }),
        slots_weight => plain_slot(),
        slots_weight + 1 => gmem_slot(kind),
        3 => (0..SLOTS).prop_map(Operation::delete),
        2 => any_slot(physical_bits),
        attributes_weight => attributes(kind),
        6 => fallocate(),
        1 => enable_cap(),
        3 => prefault(vcpus),
        2 => (hva(), select(vec![1, 8, PAGE, 2 * PAGE])).prop_map(|(at, len)| Operation::HostRead { at, len }),
        4 => (hva(), select(vec![1, 8, PAGE, 2 * PAGE]), 1..=255_u8)
            .prop_map(|(at, len, byte)| Operation::HostFill { at, len, byte }),
        3 => slot_id().prop_map(|slot| Operation::GetDirty { slot }),
        2 => clear_dirty(),
        10 => load(kind, vcpus, physical_bits),
        12 => store(kind, vcpus, physical_bits),
        2 => (0..vcpus, address(physical_bits), any::<bool>())
            .prop_map(move |(vcpu, gpa, private)| Operation::Fetch { vcpu, gpa, private: private || kind == Kind::Snp }),
        1 => (0..vcpus, page(), 1..=4_u64, any::<bool>())
            .prop_map(|(vcpu, gpa, pages, private)| Operation::Dump { vcpu, gpa, pages, private }),
        asks_weight => asks,
    ]
    .boxed()
}

fn file() -> impl Strategy<Value = File> {
    (0..FILES).prop_map(File)
}

/// A page of the windows.
fn page() -> impl Strategy<Value = u64> {
    prop_oneof![
        5 => (0..WINDOW_PAGES).prop_map(|page| WINDOW + page * PAGE),
        2 => (0..2 * BORDER_PAGES).prop_map(|page| BORDER + page * PAGE - BORDER_PAGES * PAGE),
    ]
}

/// Where a guest looks: often at the beginning or the end of a page, and across it.
fn address(physical_bits: u32) -> impl Strategy<Value = u64> {
    let offset = select(vec![0, 8, 0x7fc, 0xff8, 0xffc, 0xffe, 0xfff]);
    let top = 1 << physical_bits.min(47);
    prop_oneof![
        20 => (page(), offset).prop_map(|(page, offset)| page + offset),
        1 => select(vec![0x1000, 0xfec0_0000, 0x1_0000_0000, top - PAGE, top - 8]),
    ]
}

fn size() -> impl Strategy<Value = u64> {
    (1..=5_u64).prop_map(|pages| pages * PAGE)
}

fn odd_size(physical_bits: u32) -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => size(),
        2 => select(vec![
            0,
            1,
            PAGE - 1,
            PAGE + 1,
            512 * PAGE,
            ((1 << 31) - 1) * PAGE,
            (1 << 31) * PAGE,
            1 << physical_bits,
            1 << 62,
            1 << 63,
            0_u64.wrapping_sub(PAGE),
            u64::MAX,
        ]),
    ]
}

/// A file as a VMM makes them.
fn usual_file(kind: Kind) -> impl Strategy<Value = Operation> {
    let flags = if kind == Kind::Default {
        select(vec![0, MMAP | INIT_SHARED, MMAP | INIT_SHARED, MMAP])
    } else {
        select(vec![0, 0, 0, MMAP])
    };
    (file(), 2..=FILE_PAGES, flags).prop_map(|(file, pages, flags)| Operation::Create {
        file,
        size: pages * PAGE,
        flags,
    })
}

fn any_file() -> impl Strategy<Value = Operation> {
    let sizes = vec![0, 1, PAGE - 1, PAGE + 1, 3 * PAGE, 1 << 40, 1 << 62, (1 << 63) - PAGE, 1 << 63, u64::MAX];
    let flags = prop_oneof![4 => 0..8_u64, 1 => select(vec![1 << 32, 1 << 63, u64::MAX])];
    (file(), select(sizes), flags).prop_map(|(file, size, flags)| Operation::Create { file, size, flags })
}

fn usual_pages(slot: u32) -> u64 {
    u64::from(slot % 4) + 1
}

fn usual_hva(slot: u32) -> Hva {
    Hva::In(Area::Memory(0), u64::from(slot) * 8 * PAGE)
}

fn slot_flags() -> impl Strategy<Value = u32> {
    prop_oneof![4 => Just(0), 2 => Just(LOG_DIRTY), 1 => Just(READONLY), 1 => Just(READONLY | LOG_DIRTY)]
}

/// A slot of shared memory.
fn plain_slot() -> impl Strategy<Value = Operation> {
    (0..SLOTS, slot_flags(), page()).prop_map(|(slot, flags, gpa)| Operation::Region {
        slot,
        flags,
        gpa,
        size: usual_pages(slot) * PAGE,
        hva: usual_hva(slot),
        file: Descriptor::None,
        offset: 0,
    })
}

/// A page of a file; `None` is the one that goes with the address. An RMP knows at which address a page is, and a guest that
/// finds it elsewhere is lost.
fn offset(kind: Kind) -> BoxedStrategy<Option<u64>> {
    let any = (0..FILE_PAGES / 2).prop_map(Some);
    if kind == Kind::Snp { prop_oneof![9 => Just(None), 1 => any].boxed() } else { any.boxed() }
}

/// A slot with a file.
fn gmem_slot(kind: Kind) -> impl Strategy<Value = Operation> {
    // A file that the process can map is to be given its own mapping.
    let mapped = if kind == Kind::Default { 2 } else { 1 };
    (0..SLOTS, page(), size(), file(), offset(kind), prop_oneof![2 => Just(false), mapped => Just(true)]).prop_map(
        |(slot, gpa, size, file, page, mapped)| {
            // The same page of a file at the same address, mostly.
            let page = page.unwrap_or(if gpa < BORDER - BORDER_PAGES * PAGE {
                (gpa - WINDOW) / PAGE
            } else {
                8 + (gpa + BORDER_PAGES * PAGE - BORDER) / PAGE
            });
            Operation::Region {
                slot,
                flags: GUEST_MEMFD,
                gpa,
                size,
                hva: if mapped { Hva::In(Area::File(file), page * PAGE) } else { usual_hva(slot) },
                file: Descriptor::File(file),
                offset: page * PAGE,
            }
        },
    )
}

fn hva() -> impl Strategy<Value = Hva> {
    prop_oneof![
        6 => (0..2_u8, 0..64_u64).prop_map(|(area, page)| Hva::In(Area::Memory(area), page * PAGE)),
        3 => (file(), 0..FILE_PAGES).prop_map(|(file, page)| Hva::In(Area::File(file), page * PAGE)),
    ]
}

/// A slot with anything in its fields.
fn any_slot(physical_bits: u32) -> impl Strategy<Value = Operation> {
    let slot = prop_oneof![
        4 => 0..SLOTS,
        2 => (0..SLOTS).prop_map(|slot| slot | 1 << 16),
        1 => select(vec![32762, 32764, 32767, 0x8000, 0xffff, 2 << 16, u32::MAX]),
    ];
    let flags = prop_oneof![4 => 0..8_u32, 1 => select(vec![8, 16, 1 << 31, u32::MAX])];
    let top = 1_u64 << physical_bits;
    let gpa = prop_oneof![
        4 => page(),
        1 => select(vec![
            WINDOW + 1,
            WINDOW + 0x800,
            top - PAGE,
            top,
            (1 << 52) - PAGE,
            1 << 52,
            1 << 63,
            0_u64.wrapping_sub(PAGE),
            u64::MAX,
        ]),
    ];
    let hva = prop_oneof![
        4 => hva(),
        1 => Just(Hva::In(Area::Void, 0)),
        1 => select(vec![1, 0x800, 0x8000_0000_0000_0000, 0xffff_ffff_ffff_f000]).prop_map(Hva::Raw),
    ];
    let descriptor = prop_oneof![
        3 => file().prop_map(Descriptor::File),
        1 => select(vec![Descriptor::None, Descriptor::Memfd, Descriptor::Foreign]),
    ];
    let offset = prop_oneof![
        3 => (0..2 * FILE_PAGES).prop_map(|page| page * PAGE),
        1 => select(vec![
            1,
            0x800,
            (1 << 63) - PAGE,
            (1 << 63) - 2 * PAGE,
            1 << 63,
            0_u64.wrapping_sub(PAGE),
            0_u64.wrapping_sub(4 * PAGE),
        ]),
    ];
    (slot, flags, gpa, odd_size(physical_bits), hva, descriptor, offset).prop_map(
        |(slot, flags, gpa, size, hva, file, offset)| Operation::Region { slot, flags, gpa, size, hva, file, offset },
    )
}

fn attributes(kind: Kind) -> impl Strategy<Value = Operation> {
    let private = if kind == Kind::Snp { vec![0, 8, 8, 8, 8, 8, 8] } else { vec![0, 8, 8] };
    let usual = (page(), size(), select(private));
    let large =
        (select(vec![WINDOW, BORDER - 512 * PAGE, BORDER]), select(vec![512 * PAGE, 1024 * PAGE]), select(vec![0, 8]));
    let odd = (
        select(vec![WINDOW, WINDOW + 1, WINDOW + 0x800, 0_u64.wrapping_sub(PAGE), 1 << 63, u64::MAX]),
        select(vec![0, 1, PAGE, PAGE + 1, 1 << 63, 0_u64.wrapping_sub(PAGE)]),
        select(vec![0, 8, 1, 9, u64::MAX]),
    );
    let range = prop_oneof![12 => usual.boxed(), 1 => large.boxed(), 1 => odd.boxed()];
    let flags = prop_oneof![30 => Just(0), 1 => select(vec![1, 1 << 63])];
    (range, flags).prop_map(|((gpa, size, attributes), flags)| Operation::Attributes { gpa, size, attributes, flags })
}

fn fallocate() -> impl Strategy<Value = Operation> {
    let mode = prop_oneof![
        8 => Just(PUNCH_HOLE),
        3 => Just(KEEP_SIZE),
        1 => select(vec![0, 2, 0x08, 0x10, 0x11, 0x20, 0x40, 0x41, 0x80, 0x13, 0x43, 0x8000_0000]),
    ];
    let offset = prop_oneof![
        8 => (0..=FILE_PAGES).prop_map(|page| page * PAGE),
        1 => select(vec![1, 0x800, 1 << 40, (1 << 63) - PAGE, (1 << 63) - 1, 1 << 63, u64::MAX]),
    ];
    let len = prop_oneof![
        8 => size(),
        1 => select(vec![0, 1, PAGE + 1, 1 << 62, (1 << 63) - PAGE, (1 << 63) - 1, 1 << 63, u64::MAX]),
    ];
    (file(), mode, offset, len).prop_map(|(file, mode, offset, len)| Operation::Fallocate { file, mode, offset, len })
}

fn enable_cap() -> impl Strategy<Value = Operation> {
    prop_oneof![
        (Just(201), select(vec![0, 0x1000, 0x1000, 1, u64::MAX])),
        (Just(204), select(vec![0, 1, 2])),
        (Just(213), select(vec![0, 1 << 7, 1 << 7])),
        (Just(168), select(vec![0, 1, 1, 3, 2, 4])),
    ]
    .prop_map(|(cap, arg)| Operation::EnableCap { cap, arg })
}

fn slot_id() -> impl Strategy<Value = u32> {
    prop_oneof![
        16 => 0..SLOTS,
        1 => select(vec![1 << 16, 2 << 16, 32764, 0xffff, u32::MAX]),
    ]
}

fn clear_dirty() -> impl Strategy<Value = Operation> {
    let first = prop_oneof![8 => Just(0), 1 => select(vec![1, 64, 1 << 40, u64::MAX])];
    let pages = prop_oneof![8 => 0..=6_u32, 1 => select(vec![64, 65])];
    (slot_id(), first, pages, any::<u64>()).prop_map(|(slot, first, pages, bits)| Operation::ClearDirty {
        slot,
        first,
        pages,
        bits,
    })
}

fn prefault(vcpus: u8) -> impl Strategy<Value = Operation> {
    let usual = (page(), size(), Just(0));
    let odd = (
        select(vec![WINDOW, WINDOW + 1, 0_u64.wrapping_sub(PAGE)]),
        select(vec![0, 1, PAGE, PAGE + 1, 0_u64.wrapping_sub(PAGE)]),
        select(vec![0, 1]),
    );
    let range = prop_oneof![8 => usual.boxed(), 1 => odd.boxed()];
    (0..vcpus, range).prop_map(|(vcpu, (gpa, size, flags))| Operation::Prefault { vcpu, gpa, size, flags })
}

fn private(kind: Kind) -> impl Strategy<Value = bool> {
    select(if kind == Kind::Snp { vec![true, true, true, false] } else { vec![true, false] })
}

fn load(kind: Kind, vcpus: u8, physical_bits: u32) -> impl Strategy<Value = Operation> {
    (0..vcpus, address(physical_bits), select(vec![1, 2, 4, 8]), private(kind))
        .prop_map(|(vcpu, gpa, len, private)| Operation::Load { vcpu, gpa, len, private })
}

fn store(kind: Kind, vcpus: u8, physical_bits: u32) -> impl Strategy<Value = Operation> {
    (0..vcpus, address(physical_bits), select(vec![1, 2, 4, 8]), any::<u64>(), private(kind))
        .prop_map(|(vcpu, gpa, len, value, private)| Operation::Store { vcpu, gpa, len, value, private })
}

fn map_gpa_range(vcpus: u8) -> impl Strategy<Value = Operation> {
    let gpa =
        prop_oneof![6 => page().boxed(), 1 => select(vec![WINDOW + 1, 0_u64.wrapping_sub(PAGE), u64::MAX]).boxed()];
    let pages = prop_oneof![6 => (1..=6_u64).boxed(), 1 => select(vec![0, 1 << 52, u64::MAX]).boxed()];
    let answer = select(vec![0, 0, 22, 11, 5, u64::MAX]);
    (0..vcpus, gpa, pages, select(vec![0x10, 0, 0x11, 0x12, u64::MAX]), answer).prop_map(
        |(vcpu, gpa, pages, attributes, answer)| Operation::MapGpaRange { vcpu, gpa, pages, attributes, answer },
    )
}
