//! Random sequences of changes against a model that knows only lists and pages.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// The model: what slots there are, and what files of what size. Everything else is found by looking at every page.
#[derive(Debug, Clone, Default)]
struct Model {
    slots: Vec<Memslot>,
    files: BTreeMap<FileId, u64>,
}

impl Model {
    /// Every reason for which KVM would refuse `slot`, by name.
    fn reasons(&self, limits: &Limits, slot: &Memslot) -> BTreeSet<&'static str> {
        let mut reasons = BTreeSet::new();
        let mut when = |refused: bool, reason| {
            if refused {
                reasons.insert(reason);
            }
        };
        let flags = slot.flags.bits();
        let (log, readonly, gmem) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        when(u32::from(slot.id.id) >= limits.slots_per_address_space, "id");
        when(slot.id.as_id >= limits.address_spaces, "address space");
        when(flags & !7 != 0, "flags");
        when(gmem && log, "log");
        when(gmem && readonly, "readonly");
        when(readonly && !limits.readonly, "no readonly");
        when(gmem && slot.binding.is_none(), "no binding");
        when(!gmem && slot.binding.is_some(), "no flag");
        let frames: BTreeSet<u64> = slot.gfns.iter().map(Gfn::get).collect();
        when(frames.is_empty(), "empty");
        when(frames.len() as u64 > limits.pages_per_slot, "size");
        when(frames.iter().any(|&frame| frame >= limits.top.get()), "top");
        when(!slot.hva.is_multiple_of(4096), "hva");
        when(u128::from(slot.hva) + 4096 * frames.len() as u128 > u128::from(limits.hva_end), "hva end");
        when(self.slots.iter().any(|held| held.id == slot.id), "id in use");
        let overlaps = |held: &Memslot| {
            held.id.as_id == slot.id.as_id && held.gfns.iter().any(|frame| frames.contains(&frame.get()))
        };
        when(self.slots.iter().any(overlaps), "overlap");
        if let Some(binding) = slot.binding {
            let pages = frames_of_file(slot);
            match self.files.get(&binding.file) {
                None => when(true, "file"),
                Some(size) => {
                    when(pages.iter().any(|(_, page)| page >= size), "bind");
                    let bound = |held: &Memslot| frames_of_file(held).iter().any(|page| pages.contains(page));
                    when(self.slots.iter().any(bound), "bind");
                }
            }
        }
        reasons
    }
}

fn file_id(number: u64) -> FileId {
    FileId::new(number + 1).unwrap()
}

/// Every page of a file that backs `slot`.
fn frames_of_file(slot: &Memslot) -> Vec<(FileId, u64)> {
    let Some(binding) = slot.binding else { return Vec::new() };
    (0..slot.gfns.pages()).map(|n| (binding.file, binding.start.get() + n)).collect()
}

fn name(error: &LayoutError) -> &'static str {
    match error {
        LayoutError::IdTooHigh { .. } => "id",
        LayoutError::UnknownFlags { .. } => "flags",
        LayoutError::LogDirtyWithGuestMemfd { .. } => "log",
        LayoutError::ReadonlyWithGuestMemfd { .. } => "readonly",
        LayoutError::ReadonlyUnsupported { .. } => "no readonly",
        LayoutError::FlagWithoutBinding { .. } => "no binding",
        LayoutError::BindingWithoutFlag { .. } => "no flag",
        LayoutError::Empty { .. } => "empty",
        LayoutError::UnalignedHva { .. } => "hva",
        LayoutError::HvaBeyondEnd { .. } => "hva end",
        LayoutError::NoSuchAddressSpace { .. } => "address space",
        LayoutError::TooLarge { .. } => "size",
        LayoutError::IdInUse { .. } => "id in use",
        LayoutError::GfnOverlap { .. } => "overlap",
        LayoutError::UnknownFile { .. } => "file",
        LayoutError::AboveTop { .. } => "top",
        LayoutError::Bind { .. } => "bind",
        LayoutError::FileRange { .. } | LayoutError::FileKnown { .. } | LayoutError::UnknownSlot { .. } => "other",
    }
}

#[derive(Debug, Clone)]
enum Op {
    Register(u64, u64),
    Insert(Memslot),
    Remove(SlotId),
    Close(u64),
}

fn any_id() -> impl Strategy<Value = SlotId> {
    (prop_oneof![9 => Just(0u16), 3 => Just(1), 1 => Just(2)], 0u16..13).prop_map(|(as_id, id)| SlotId { as_id, id })
}

fn any_slot() -> impl Strategy<Value = Memslot> {
    let len = prop_oneof![12 => 1u64..14, 1 => Just(0), 1 => 38u64..43];
    let hva = prop_oneof![20 => Just(0x7f00_0000_0000u64), 1 => Just(0x123), 1 => Just((1 << 56) - 0x5000), 1 => Just(u64::MAX << 12)];
    let flags = prop_oneof![12 => Just(4u32), 6 => Just(0), 2 => Just(1), 1 => 0u32..10];
    let binding = (prop_oneof![4 => Just(true), 1 => any::<bool>()], 0u64..4, 0u64..64);
    (any_id(), 0u64..118, len, hva, flags, binding).prop_map(|(id, start, len, hva, flags, (usual, file, page))| {
        Memslot {
            id,
            gfns: gfns(start, start + len),
            hva,
            flags: SlotFlags::from_bits_retain(flags),
            binding: (usual == (flags & 4 != 0)).then_some(FileBinding { file: file_id(file), start: file_page(page) }),
        }
    })
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0u64..4, 30u64..72).prop_map(|(file, pages)| Op::Register(file, pages)),
        24 => any_slot().prop_map(Op::Insert),
        5 => any_id().prop_map(Op::Remove),
        1 => (0u64..4).prop_map(Op::Close),
    ]
}

/// The layout holds what the model holds, asked frame by frame and page by page.
fn same(layout: &Layout, model: &Model) -> Result<(), TestCaseError> {
    let mut sorted = model.slots.clone();
    sorted.sort_by_key(|slot| (slot.id.as_id, slot.gfns.start()));
    prop_assert_eq!(layout.table().slots().copied().collect::<Vec<_>>(), sorted);
    for as_id in 0..3 {
        for frame in 0..130 {
            let found = layout.table().space(as_id).locate(gfn(frame));
            let held =
                model.slots.iter().find(|slot| slot.id.as_id == as_id && slot.gfns.iter().any(|g| g.get() == frame));
            prop_assert_eq!(found.map(|at| at.slot), held);
            let (Some(found), Some(held)) = (found, held) else { continue };
            let offset = frame - held.gfns.start().get();
            prop_assert_eq!(found.hva, held.hva + offset * 4096);
            let page = held.binding.map(|binding| (binding.file, file_page(binding.start.get() + offset)));
            prop_assert_eq!(found.file, page);
        }
    }
    for file in (1..5).filter_map(FileId::new) {
        let clips: BTreeSet<_> = layout
            .clip(file, file_pages(5, 50))
            .flat_map(|clip| clip.file.iter().zip(clip.gfns).map(move |(page, gfn)| (page.get(), clip.slot, gfn.get())))
            .collect();
        let brute: BTreeSet<_> = model
            .slots
            .iter()
            .flat_map(|slot| {
                frames_of_file(slot).into_iter().zip(slot.gfns).map(|(page, gfn)| (page, slot.id, gfn.get()))
            })
            .filter(|((of, page), ..)| *of == file && (5..50).contains(page))
            .map(|((_, page), slot, gfn)| (page, slot, gfn))
            .collect();
        prop_assert_eq!(clips, brute);
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn sequences_are_the_model(ops in prop::collection::vec(any_op(), 1..if cfg!(miri) { 8 } else { 60 })) {
        let limits = small();
        let (mut layout, mut model) = (Layout::new(limits), Model::default());
        for file in 0..3 {
            layout.register_file(file_id(file), 64).unwrap();
            model.files.insert(file_id(file), 64);
        }
        for op in ops {
            let before = layout.clone();
            match op {
                Op::Register(file, pages) => {
                    let known = model.files.contains_key(&file_id(file));
                    prop_assert_eq!(layout.register_file(file_id(file), pages).is_err(), known);
                    model.files.entry(file_id(file)).or_insert(pages);
                }
                Op::Insert(slot) => {
                    let reasons = model.reasons(&limits, &slot);
                    match layout.insert(slot) {
                        Ok(()) => {
                            prop_assert!(reasons.is_empty(), "accepted in spite of {:?}", reasons);
                            model.slots.push(slot);
                        }
                        Err(error) => {
                            prop_assert!(reasons.contains(name(&error)), "{} is none of {:?}", error, reasons);
                            prop_assert_eq!(&layout, &before);
                        }
                    }
                }
                Op::Remove(id) => {
                    let at = model.slots.iter().position(|slot| slot.id == id);
                    let held = at.map(|at| model.slots.remove(at));
                    prop_assert_eq!(layout.remove(id).ok(), held);
                }
                Op::Close(file) => {
                    let file = file_id(file);
                    model.files.remove(&file);
                    let mut lost = Vec::new();
                    for slot in model.slots.iter_mut().filter(|slot| slot.binding.is_some_and(|b| b.file == file)) {
                        lost.push((slot.id, slot.gfns));
                        slot.binding = None;
                    }
                    let mut closed = layout.close_file(file);
                    closed.sort_unstable();
                    lost.sort_unstable();
                    prop_assert_eq!(closed, lost);
                }
            }
        }
        same(&layout, &model)?;
    }

    #[test]
    fn all_at_once_is_one_by_one(slots in prop::collection::vec(any_slot(), 0..8), spoiled in any::<bool>()) {
        let files = || (0..3).map(|file| (file_id(file), 64));
        let mut one_by_one = Layout::from_slots(small(), files(), []).unwrap();
        let accepted: Vec<Memslot> = slots.iter().filter(|slot| one_by_one.insert(**slot).is_ok()).copied().collect();
        let at_once = Layout::from_slots(small(), files(), accepted.iter().copied()).unwrap();
        prop_assert_eq!(&at_once, &one_by_one);

        // All of them pass together exactly if each passes in turn; or else nothing has changed.
        let (first, rest) = accepted.split_at(accepted.len() / 2);
        let mut grown = Layout::from_slots(small(), files(), first.iter().copied()).unwrap();
        let before = grown.clone();
        let batch: Vec<Memslot> = if spoiled { slots } else { rest.to_vec() };
        let mut in_turn = before.clone();
        let each = batch.iter().try_for_each(|slot| in_turn.insert(*slot));
        let all = grown.insert_all(batch);
        prop_assert_eq!(all.is_ok(), each.is_ok());
        prop_assert_eq!(&grown, if all.is_ok() { &in_turn } else { &before });
    }
}
