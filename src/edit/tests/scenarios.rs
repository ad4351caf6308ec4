//! Scenarios with numbers, as plans: no KVM needed to see which calls there would be.

use super::*;

const GIB: u64 = 1 << 18;
/// 1 TiB into the address space of this process.
const HOST: u64 = 1 << 28;

fn ram(start: u64, end: u64) -> Slot {
    Slot { start, pages: end - start, host: HOST + start, flags: SlotFlags::empty() }
}

fn ram_region(start: u64, end: u64) -> Region {
    region(start, end, HOST + start, SlotFlags::empty())
}

fn frames(plan: &Plan) -> Vec<(&'static str, GfnRange)> {
    plan.steps.iter().map(|step| (step.kind(), step.slot().gfns)).collect()
}

#[test]
fn t01_nested_edits_come_to_one_difference() {
    let layout = layout_of(Limits::default(), &[ram(0, 4)]);
    let mut draft = draft_of(&layout);
    let untouched = draft.clone();
    let mut first = draft.begin();
    first.apply(Operation::PunchHole(gfns(1, 2))).unwrap();
    let mut second = first.begin();
    second.apply(Operation::Create(ram_region(1, 2))).unwrap();
    second.apply(Operation::Create(ram_region(8, 10))).unwrap();
    second.keep();
    {
        // Dropped: never was.
        let mut third = first.begin();
        third.apply(Operation::Delete(gfns(8, 10))).unwrap();
    }
    first.keep();
    let plan_of = |draft: &Draft| plan(&layout, draft, Prefer::FewSlots).unwrap();
    assert!(plan_of(&untouched).steps.is_empty());
    assert_eq!(frames(&plan_of(&draft)), [("create", gfns(8, 10))]);
}

#[test]
fn t02_vga_hole() {
    let layout = layout_of(Limits::default(), &[ram(0, GIB)]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::PunchHole(gfns(0xa0, 0xc0))).unwrap();
    for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
        let plan = plan(&layout, &draft, prefer).unwrap();
        let steps = [("delete", gfns(0, GIB)), ("create", gfns(0, 0xa0)), ("create", gfns(0xc0, GIB))];
        assert_eq!(frames(&plan), steps);
        assert_eq!(plan.steps[1].slot().id, SlotId::new(0), "what replaces a slot keeps its id");
        assert!(plan.stops_vcpus());
        assert_eq!(plan.replaced, [gfns(0, 0xa0), gfns(0xc0, GIB)]);
    }
}

#[test]
fn t04_touching_slots_stop_nobody() {
    let layout = layout_of(Limits::default(), &[ram(0, 1)]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::Delete(gfns(0, 1))).unwrap();
    draft.apply(Operation::Create(ram_region(1, 2))).unwrap();
    let plan = plan(&layout, &draft, Prefer::NoInterruption).unwrap();
    assert_eq!(frames(&plan), [("delete", gfns(0, 1)), ("create", gfns(1, 2))]);
    assert!(!plan.stops_vcpus());
}

#[test]
fn t05_what_continues_is_one_slot() {
    let (low, high) = (ram_region(0, 0x100), ram_region(0x100, 0x200));
    let slots = |high: Region, low: Region| {
        let layout = layout_of(Limits::default(), &[]);
        let mut draft = draft_of(&layout);
        draft.apply_all(vec![Operation::Create(high), Operation::Create(low)]).unwrap();
        [Prefer::FewSlots, Prefer::NoInterruption].map(|prefer| plan(&layout, &draft, prefer).unwrap().steps.len())
    };
    assert_eq!(slots(high, low), [1, 1]);
    assert_eq!(slots(Region { flags: SlotFlags::LOG_DIRTY, ..high }, low), [2, 2]);
    assert_eq!(slots(Region { flags: SlotFlags::READONLY, ..high }, low), [2, 2]);
    assert_eq!(slots(Region { hva: high.hva + 0x1000, ..high }, low), [2, 2]);
    assert_eq!(slots(Region { mapping: 1 << 40, ..high }, low), [2, 2]);
}

#[test]
fn t05_file_pages_continue_too() {
    let (file, other) = (FileId::next(), FileId::next());
    let bound = |start, end, file, page| Region {
        binding: Some(FileBinding { file, start: FilePage::new(page).unwrap() }),
        flags: SlotFlags::GUEST_MEMFD,
        ..ram_region(start, end)
    };
    let slots = |high: Region| {
        let layout = Layout::from_slots(Limits::default(), [(file, 64), (other, 64)], []).unwrap();
        let mut draft = draft_of(&layout);
        draft.apply_all(vec![Operation::Create(bound(0, 8, file, 0)), Operation::Create(high)]).unwrap();
        plan(&layout, &draft, Prefer::FewSlots).unwrap().steps.len()
    };
    assert_eq!(slots(bound(8, 16, file, 8)), 1);
    assert_eq!(slots(bound(8, 16, file, 9)), 2, "a gap of one page in the file");
    assert_eq!(slots(bound(8, 16, other, 8)), 2);
}

#[test]
fn t06_no_difference_no_call() {
    let layout = layout_of(Limits::default(), &[ram(0, 8), ram(8, 16), ram(20, 24)]);
    let same = vec![ram_region(0, 8), ram_region(8, 16), ram_region(20, 24)];
    let mut draft = draft_of(&layout);
    for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
        assert!(plan(&layout, &draft, prefer).unwrap().steps.is_empty());
    }
    draft.apply(Operation::ReplaceAll(same)).unwrap();
    assert!(plan(&layout, &draft, Prefer::NoInterruption).unwrap().steps.is_empty());

    // Only the dirty log: a call for flags, and neighbours that happen to be alike now stay two.
    let mut draft = draft_of(&layout);
    draft.apply(Operation::SetFlags(gfns(8, 16), SlotFlags::LOG_DIRTY)).unwrap();
    for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
        let plan = plan(&layout, &draft, prefer).unwrap();
        assert_eq!(frames(&plan), [("set flags", gfns(8, 16))]);
        assert!(!plan.stops_vcpus(), "nobody loses a bit by logging from now on");
        let mut back = draft_of(&plan.layout);
        back.apply(Operation::SetFlags(gfns(8, 16), SlotFlags::empty())).unwrap();
        let plan = super::super::plan(&plan.layout, &back, prefer).unwrap();
        assert_eq!(frames(&plan), [("set flags", gfns(8, 16))]);
        assert!(plan.stops_vcpus(), "the log goes with the flag");
        assert_eq!(plan.harvest.len(), 1);
    }
}

#[test]
fn growing_beside_a_slot_or_with_it() {
    let layout = layout_of(Limits::default(), &[ram(0, GIB)]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::Grow { of: gfn(7), pages: 2 * GIB }).unwrap();
    let beside = plan(&layout, &draft, Prefer::NoInterruption).unwrap();
    assert_eq!(frames(&beside), [("create", gfns(GIB, 2 * GIB))]);
    assert!(!beside.stops_vcpus());
    let one = plan(&layout, &draft, Prefer::FewSlots).unwrap();
    assert_eq!(frames(&one), [("delete", gfns(0, GIB)), ("create", gfns(0, 2 * GIB))]);
    assert_eq!(one.replaced, [gfns(0, GIB)]);
}

#[test]
fn splitting_and_merging_are_asked_for() {
    let layout = layout_of(Limits::default(), &[ram(0, 8)]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::Split(gfn(3))).unwrap();
    for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
        let split = plan(&layout, &draft, prefer).unwrap();
        assert_eq!(frames(&split), [("delete", gfns(0, 8)), ("create", gfns(0, 3)), ("create", gfns(3, 8))]);
        let mut draft = draft_of(&split.layout);
        assert!(plan(&split.layout, &draft, prefer).unwrap().steps.is_empty(), "a split lasts");
        draft.apply(Operation::Merge(gfns(0, 8))).unwrap();
        let merged = plan(&split.layout, &draft, prefer).unwrap();
        assert_eq!(frames(&merged), [("delete", gfns(0, 3)), ("delete", gfns(3, 8)), ("create", gfns(0, 8))]);
    }
}

#[test]
fn s04_chunks_of_the_largest_slot() {
    let limits = Limits { pages_per_slot: GIB, ..Limits::default() };
    let layout = layout_of(limits, &[]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::Create(ram_region(0, 2 * GIB + GIB / 2))).unwrap();
    for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
        let chunked = plan(&layout, &draft, prefer).unwrap();
        let chunks = [gfns(0, GIB), gfns(GIB, 2 * GIB), gfns(2 * GIB, 2 * GIB + GIB / 2)];
        assert_eq!(frames(&chunked), chunks.map(|gfns| ("create", gfns)));
        let mut draft = draft_of(&chunked.layout);
        draft.apply(Operation::Delete(gfns(0, 2 * GIB + GIB / 2))).unwrap();
        let gone = plan(&chunked.layout, &draft, prefer).unwrap();
        assert_eq!(frames(&gone), chunks.map(|gfns| ("delete", gfns)));
        assert!(gone.layout.table().is_empty());
    }
    // Half a slot more: what is there stays, in either way.
    let layout = layout_of(limits, &[ram(0, GIB), ram(GIB, GIB + GIB / 2)]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::ReplaceAll(vec![ram_region(0, 2 * GIB)])).unwrap();
    let few = plan(&layout, &draft, Prefer::FewSlots).unwrap();
    assert_eq!(frames(&few), [("delete", gfns(GIB, GIB + GIB / 2)), ("create", gfns(GIB, 2 * GIB))]);
    let beside = plan(&layout, &draft, Prefer::NoInterruption).unwrap();
    assert_eq!(frames(&beside), [("create", gfns(GIB + GIB / 2, 2 * GIB))]);
}

#[test]
fn s05_more_slots_than_ids_is_an_error_and_nothing_else() {
    let limits = Limits { slots_per_address_space: 20, ..Limits::default() };
    let slots: Vec<_> = (0..16).map(|at| ram(2 * at, 2 * at + 1)).collect();
    let layout = layout_of(limits, &slots);
    let more = |count: u64| {
        let mut draft = draft_of(&layout);
        draft
            .apply_all((100..100 + count).map(|at| Operation::Create(ram_region(2 * at, 2 * at + 1))).collect())
            .unwrap();
        plan(&layout, &draft, Prefer::FewSlots)
    };
    assert_eq!(more(4).unwrap().layout.table().len(), 20);
    assert_eq!(more(5), Err(PlanError::NoFreeId { needed: 5, free: 4 }));
    // The ids of what goes are there for what comes.
    let mut draft = draft_of(&layout);
    let away: Vec<_> = (0..8).map(|at| Operation::Delete(gfns(2 * at, 2 * at + 1))).collect();
    draft.apply_all(away).unwrap();
    draft.apply_all((100..112).map(|at| Operation::Create(ram_region(2 * at, 2 * at + 1))).collect()).unwrap();
    let plan = plan(&layout, &draft, Prefer::FewSlots).unwrap();
    let mut table = model::Table::new(&layout);
    plan.steps.iter().for_each(|step| table.apply(step));
    assert_eq!(table.0.len(), 20);
}

#[test]
fn s08_read_only_is_toggled_by_two_calls_with_one_id() {
    let layout = layout_of(Limits::default(), &[ram(0, 4), ram(0xc0, 0x100)]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::SetFlags(gfns(0xc0, 0x100), SlotFlags::READONLY)).unwrap();
    for prefer in [Prefer::FewSlots, Prefer::NoInterruption] {
        let plan = plan(&layout, &draft, prefer).unwrap();
        assert_eq!(frames(&plan), [("delete", gfns(0xc0, 0x100)), ("create", gfns(0xc0, 0x100))]);
        assert_eq!(plan.steps[0].slot().id, plan.steps[1].slot().id);
    }
}

/// Read-only segments of ROM shadow come and go around memory that stays: the plan touches no more than it must.
#[test]
fn a_segment_of_rom_shadow() {
    let layout = layout_of(Limits::default(), &[ram(0, 0x100)]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::SetFlags(gfns(0xd0, 0xe0), SlotFlags::READONLY)).unwrap();
    let shadowed = plan(&layout, &draft, Prefer::NoInterruption).unwrap();
    let steps = [
        ("delete", gfns(0, 0x100)),
        ("create", gfns(0, 0xd0)),
        ("create", gfns(0xd0, 0xe0)),
        ("create", gfns(0xe0, 0x100)),
    ];
    assert_eq!(frames(&shadowed), steps);
    let mut draft = draft_of(&shadowed.layout);
    draft.apply(Operation::SetFlags(gfns(0xd0, 0xe0), SlotFlags::empty())).unwrap();
    let back = plan(&shadowed.layout, &draft, Prefer::NoInterruption).unwrap();
    assert_eq!(frames(&back), [("delete", gfns(0xd0, 0xe0)), ("create", gfns(0xd0, 0xe0))]);
}

#[test]
fn s07_what_kvm_forbids_is_refused_before_any_call() {
    use crate::layout::LayoutError;
    let file = FileId::next();
    let slot = Memslot {
        id: SlotId::new(0),
        gfns: gfns(0, 8),
        hva: HOST << 12,
        flags: SlotFlags::GUEST_MEMFD,
        binding: Some(FileBinding { file, start: FilePage::ZERO }),
    };
    let planned = |limits: Limits, flags| {
        let layout = Layout::from_slots(limits, [(file, 64)], [slot]).unwrap();
        let mut draft = draft_of(&layout);
        draft.apply(Operation::SetFlags(gfns(0, 8), flags)).unwrap();
        plan(&layout, &draft, Prefer::NoInterruption).map(|plan| kinds(&plan))
    };
    let id = slot.id;
    let logged = planned(Limits::default(), SlotFlags::LOG_DIRTY);
    assert_eq!(logged, Err(PlanError::Layout(LayoutError::LogDirtyWithGuestMemfd { id })));
    let read_only = planned(Limits::default(), SlotFlags::READONLY);
    assert_eq!(read_only, Err(PlanError::Layout(LayoutError::ReadonlyWithGuestMemfd { id })));
    let limits = Limits { readonly: false, ..Limits::default() };
    let layout = layout_of(limits, &[ram(0, 8)]);
    let mut draft = draft_of(&layout);
    draft.apply(Operation::SetFlags(gfns(0, 8), SlotFlags::READONLY)).unwrap();
    let protected = plan(&layout, &draft, Prefer::NoInterruption);
    assert_eq!(protected, Err(PlanError::Layout(LayoutError::ReadonlyUnsupported { id })));

    // It moves as two calls, since KVM moves no such slot.
    let layout = Layout::from_slots(Limits::default(), [(file, 64)], [slot]).unwrap();
    let mut draft = draft_of(&layout);
    draft.apply(Operation::Move { from: gfns(0, 8), to: gfn(100) }).unwrap();
    let moved = plan(&layout, &draft, Prefer::NoInterruption).unwrap();
    assert_eq!(kinds(&moved), ["delete", "create"]);
}

#[test]
fn s06_a_file_page_belongs_to_one_slot() {
    use crate::layout::{BindError, LayoutError};
    let file = FileId::next();
    let bound = |start, end, page| Region {
        binding: Some(FileBinding { file, start: FilePage::new(page).unwrap() }),
        flags: SlotFlags::GUEST_MEMFD,
        ..ram_region(start, end)
    };
    let slot = bound(0, 0x200, 0).slot(SlotId::new(0));
    let layout = Layout::from_slots(Limits::default(), [(file, 0x1000)], [slot]).unwrap();
    let mut draft = draft_of(&layout);
    draft.apply(Operation::Create(bound(0x1000, 0x1200, 0x100))).unwrap();
    let error = plan(&layout, &draft, Prefer::FewSlots).unwrap_err();
    let common = crate::addr::FileRange::new(FilePage::new(0x100).unwrap(), FilePage::new(0x200).unwrap()).unwrap();
    let (id, with) = (SlotId::new(1), SlotId::new(0));
    let overlap = BindError::Overlap { slot: id, with, common };
    assert_eq!(error, PlanError::Layout(LayoutError::Bind { file, source: overlap }));
}
