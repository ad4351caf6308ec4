//! Rule: clipping. The vectors of the kernel's formula, the seven ways to get it wrong, and brute force page by page.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

const A: SlotId = SlotId::new(0);
const B: SlotId = SlotId::new(1);

/// Slot A alone: frames from 0x1000, file pages [0x20, 0x30).
fn slot_a() -> Bindings {
    let mut bindings = Bindings::new(0x100).unwrap();
    bindings.bind(A, file_pages(0x20, 0x30), gfn(0x1000)).unwrap();
    bindings
}

/// Slot A, and right behind it in the file slot B: frames from 0x5000, file pages [0x30, 0x40).
fn slots_a_b() -> Bindings {
    let mut bindings = slot_a();
    bindings.bind(B, file_pages(0x30, 0x40), gfn(0x5000)).unwrap();
    bindings
}

fn clip(bindings: &Bindings, s: u64, e: u64) -> Vec<(SlotId, GfnRange)> {
    bindings.clip(file_pages(s, e)).map(|clip| (clip.slot, clip.gfns)).collect()
}

/// A binding as the kernel's variables, for the wrong variants to work on.
struct Slot {
    base: u64,
    pgoff: u64,
    npages: u64,
}
const SLOT_A: Slot = Slot { base: 0x1000, pgoff: 0x20, npages: 0x10 };
const SLOT_B: Slot = Slot { base: 0x5000, pgoff: 0x30, npages: 0x10 };

#[test]
fn clip_vectors_of_one_slot() {
    let bindings = slot_a();
    assert_eq!(clip(&bindings, 0x20, 0x30), [(A, gfns(0x1000, 0x1010))]);
    assert_eq!(clip(&bindings, 0x00, 0x28), [(A, gfns(0x1000, 0x1008))]);
    assert_eq!(clip(&bindings, 0x28, 0x40), [(A, gfns(0x1008, 0x1010))]);
    assert_eq!(clip(&bindings, 0x24, 0x25), [(A, gfns(0x1004, 0x1005))]);
    assert_eq!(clip(&bindings, 0x10, 0x20), []);
    assert_eq!(clip(&bindings, 0x30, 0x38), []);
    // The widest hole: what closing the file is to the kernel.
    assert_eq!(clip(&bindings, 0, FilePage::MAX.get()), [(A, gfns(0x1000, 0x1010))]);
    // No hole, inside the binding and at its edges.
    for at in [0x20, 0x28, 0x30] {
        assert_eq!(clip(&bindings, at, at), []);
    }
}

#[test]
fn clip_vector_of_two_slots() {
    let bindings = slots_a_b();
    assert_eq!(clip(&bindings, 0x28, 0x38), [(A, gfns(0x1008, 0x1010)), (B, gfns(0x5000, 0x5008))]);
    let files: Vec<_> = bindings.clip(file_pages(0x28, 0x38)).map(|clip| clip.file).collect();
    assert_eq!(files, [file_pages(0x28, 0x30), file_pages(0x30, 0x38)]);
}

/// Each wrong variant: the formula gives the vector, the variant gives something else on it.
#[test]
fn clip_w1_subtracts_the_file_offset() {
    let wrong = |slot: &Slot, s: u64| slot.base + s.max(slot.pgoff);
    assert_eq!(clip(&slot_a(), 0x24, 0x25), [(A, gfns(0x1004, 0x1005))]);
    assert_eq!(wrong(&SLOT_A, 0x24), 0x1024);
    // It passes for a slot at offset 0, which is why it goes unnoticed.
    let at_zero = Slot { base: 0x1000, pgoff: 0, npages: 0x10 };
    let mut bindings = Bindings::new(0x10).unwrap();
    bindings.bind(A, file_pages(0, at_zero.npages), gfn(at_zero.base)).unwrap();
    assert_eq!(clip(&bindings, 4, 5), [(A, gfns(wrong(&at_zero, 4), 0x1005))]);
}

#[test]
fn clip_w2_ends_are_exclusive() {
    // Wrong: an interval search, whose last index is inclusive, given `e`.
    let wrong = |slot: &Slot, s: u64, e: u64| slot.pgoff <= e && s < slot.pgoff + slot.npages;
    assert_eq!(clip(&slots_a_b(), 0x20, 0x30), [(A, gfns(0x1000, 0x1010))]);
    assert!(wrong(&SLOT_A, 0x20, 0x30) && wrong(&SLOT_B, 0x20, 0x30), "the neighbour would be visited");
    // The same at binding: the neighbour would be refused, but touching is not overlapping, on either side.
    let mut bindings = slot_a();
    assert!(wrong(&SLOT_A, 0x10, 0x20));
    bindings.bind(B, file_pages(0x10, 0x20), gfn(0x5000)).unwrap();
    bindings.bind(SlotId::new(2), file_pages(0x30, 0x40), gfn(0x6000)).unwrap();
    assert_eq!(bindings.len(), 3);
}

#[test]
fn clip_w3_offset_plus_size_is_unsigned() {
    let (offset, size, file_size) = (0x7fff_ffff_ffff_f000_u64, 0x1000_u64, 0x10_0000_u64);
    let wrong =
        |offset: u64, size: u64| offset.cast_signed().wrapping_add(size.cast_signed()) <= file_size.cast_signed();
    assert!(wrong(offset, size), "the sum is negative and passes");
    let mut bindings = Bindings::new(file_size / PAGE_SIZE).unwrap();
    let pages = FileRange::from_bytes(offset, size).unwrap();
    assert_eq!(bindings.bind(A, pages, gfn(0)), Err(BindError::BeyondFile { slot: A, pages, size: 0x100 }));
    assert!(bindings.is_empty());
    // Nor where the sum wraps as an unsigned number does.
    assert!(wrong(offset, offset));
    let pages = FileRange::from_bytes(offset, offset).unwrap();
    assert_eq!(bindings.bind(A, pages, gfn(0)), Err(BindError::BeyondFile { slot: A, pages, size: 0x100 }));
}

#[test]
fn clip_w4_clamps_the_end_at_the_end_of_the_binding() {
    let wrong = |slot: &Slot, e: u64| slot.base.wrapping_add(slot.npages.min(e)).wrapping_sub(slot.pgoff);
    assert_eq!(clip(&slot_a(), 0x28, 0x40), [(A, gfns(0x1008, 0x1010))]);
    assert_eq!(wrong(&SLOT_A, 0x40), 0xff0, "an end below the start");
}

#[test]
fn clip_w5_clamps_the_start() {
    let wrong = |slot: &Slot, s: u64| slot.base + s - slot.pgoff;
    assert_eq!(clip(&slot_a(), 0x00, 0x28), [(A, gfns(0x1000, 0x1008))]);
    assert_eq!(wrong(&SLOT_A, 0), 0xfe0, "0x20 frames below the slot, of somebody else");
}

#[test]
fn clip_w6_clips_every_slot_against_the_range_as_given() {
    // Wrong: the clamped bounds replace the range, and the next slot is clipped against them.
    let (mut s, mut e) = (0x28, 0x38);
    let mut wrong = |slot: &Slot| {
        (s, e) = (slot.pgoff.max(s), (slot.pgoff + slot.npages).min(e));
        (slot.base + s - slot.pgoff, slot.base + e - slot.pgoff)
    };
    let right = clip(&slots_a_b(), 0x28, 0x38);
    assert_eq!(right, [(A, gfns(0x1008, 0x1010)), (B, gfns(0x5000, 0x5008))]);
    assert_eq!(wrong(&SLOT_A), (0x1008, 0x1010));
    assert_eq!(wrong(&SLOT_B), (0x5000, 0x5000), "B stays mapped");
}

#[test]
fn clip_w7_begin_and_end_visit_the_same_bindings() {
    /// What is left in progress after a begin over some slots and an end over others.
    fn left(begun: &[SlotId], ended: &[SlotId]) -> BTreeMap<SlotId, i32> {
        let mut in_progress = BTreeMap::new();
        begun.iter().for_each(|slot| *in_progress.entry(*slot).or_insert(0) += 1);
        ended.iter().for_each(|slot| *in_progress.entry(*slot).or_insert(0) -= 1);
        in_progress.retain(|_, count| *count != 0);
        in_progress
    }
    let bindings = slots_a_b();
    let visited = |s, e| -> Vec<SlotId> { bindings.clip(file_pages(s, e)).map(|clip| clip.slot).collect() };
    for (s, e) in [(0x20, 0x30), (0x28, 0x38), (0x30, 0x40), (0x10, 0x20), (0x40, 0x50), (0, 0x1000), (0x28, 0x28)] {
        assert_eq!(left(&visited(s, e), &visited(s, e)), BTreeMap::new(), "[{s:#x}, {e:#x})");
    }
    // A clone of the iterator goes over the same set too: one clip serves begin and end.
    let clips = bindings.clip(file_pages(0x28, 0x38));
    assert!(clips.clone().eq(clips));
    // Wrong: begin visits who has a page of [s, e), end everybody of the file.
    let everybody: Vec<SlotId> = bindings.iter().map(|run| run.slot).collect();
    assert_eq!(left(&visited(0x20, 0x30), &everybody), BTreeMap::from([(B, -1)]));
}

#[test]
fn s09_invalidation_clip() {
    let mut bindings = Bindings::new(0x1000).unwrap();
    bindings.bind(A, file_pages(0x80, 0x280), gfn(0x100)).unwrap();
    assert_eq!(clip(&bindings, 0x40, 0x90), [(A, gfns(0x100, 0x110))]);
    assert_eq!(clip(&bindings, 0x270, 0x300), [(A, gfns(0x2f0, 0x300))]);
    assert_eq!(clip(&bindings, 0x280, 0x290), []);
}

#[test]
fn unbind_and_close_name_what_they_invalidate() {
    let mut bindings = slots_a_b();
    assert_eq!(bindings.unbind(A), Some(gfns(0x1000, 0x1010)));
    assert_eq!(bindings.unbind(A), None);
    assert_eq!(clip(&bindings, 0, 0x100), [(B, gfns(0x5000, 0x5010))]);
    let mut bindings = slots_a_b();
    assert_eq!(bindings.close(), [(A, gfns(0x1000, 0x1010)), (B, gfns(0x5000, 0x5010))]);
    assert_eq!(bindings.close(), []);
    assert_eq!(clip(&bindings, 0, 0x100), []);
}

/// The pages of one file, each with its slot and frame: the brute force.
type Pages = BTreeMap<u64, (SlotId, u64)>;

/// A binding asked for: slot, first file page, length, first frame.
type Ask = (u16, u64, u64, u64);

/// Binds page by page, if every page is in the file and free, and the slot is new.
fn bind_brute(pages: &mut Pages, size: u64, (id, start, len, base): Ask) -> bool {
    let slot = SlotId::new(id);
    let refused = len == 0
        || pages.values().any(|(held, _)| *held == slot)
        || (start..start + len).any(|page| page >= size || pages.contains_key(&page));
    if !refused {
        pages.extend((0..len).map(|n| (start + n, (slot, base + n))));
    }
    !refused
}

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    prop::collection::vec((0u16..12, 0u64..70, 0u64..20, 0u64..1000), 0..16)
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn clip_is_the_brute_force_page_by_page(
        files in prop::collection::vec((1u64..72, asks()), 1..4),
        holes in prop::collection::vec((0u64..80, 0u64..80), 1..8),
    ) {
        for (size, asks) in files {
            let (mut bindings, mut pages) = (Bindings::new(size).unwrap(), Pages::new());
            let mut accepted = Vec::new();
            for ask @ (id, start, len, base) in asks {
                let before = bindings.clone();
                let bound = bindings.bind(SlotId::new(id), file_pages(start, start + len), gfn(base));
                prop_assert_eq!(bound.is_ok(), bind_brute(&mut pages, size, ask), "{:?}", bound);
                match bound {
                    Ok(()) => accepted.push(Binding { slot: SlotId::new(id), pages: file_pages(start, start + len), base: gfn(base) }),
                    Err(_) => prop_assert_eq!(&bindings, &before),
                }
            }
            let mut at_once = Bindings::new(size).unwrap();
            at_once.bind_all(accepted).unwrap();
            prop_assert_eq!(&at_once, &bindings);

            for &(start, len) in &holes {
                let clips: Vec<Clip> = bindings.clip(file_pages(start, start + len)).collect();
                let clipped: Vec<_> = clips.iter().flat_map(|clip| {
                    assert!(!clip.gfns.is_empty() && clip.gfns.pages() == clip.file.pages());
                    clip.file.iter().zip(clip.gfns).map(|(page, gfn)| (page.get(), (clip.slot, gfn.get())))
                }).collect();
                let brute: Vec<_> = pages.range(start..start + len).map(|(page, at)| (*page, *at)).collect();
                prop_assert_eq!(clipped, brute);
                let slots: BTreeSet<SlotId> = clips.iter().map(|clip| clip.slot).collect();
                prop_assert_eq!(slots.len(), clips.len(), "one clip per slot");
            }
            for page in 0..80 {
                let found = bindings.find(file_page(page)).map(|run| run.slot);
                prop_assert_eq!(found, pages.get(&page).map(|(slot, _)| *slot));
            }
        }
    }
}
