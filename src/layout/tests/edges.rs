//! The numbered scenarios, each precise refusal, and the edges of files and of the address space.

use super::*;

const FILE: FileId = FileId::new(7).unwrap();

fn layout() -> Layout {
    let mut layout = Layout::new(Limits::default());
    layout.register_file(FILE, 0x1000).unwrap();
    layout
}

/// `slot` is refused for this reason by `insert` and by `insert_all`, and nothing has changed.
#[track_caller]
fn refused(layout: &Layout, slot: Memslot, reason: LayoutError) {
    let mut changed = layout.clone();
    assert_eq!(changed.insert(slot), Err(reason));
    assert_eq!(&changed, layout);
    let other = shared(SlotId::new(99), gfns(0x8000, 0x8001));
    assert_eq!(changed.insert_all([other, slot]), Err(reason));
    assert_eq!(&changed, layout);
}

#[test]
fn s03_low_high_split() {
    // 6 GiB: 2 GiB at 0 and 4 GiB at 4 GiB, out of one file.
    let mut layout = Layout::new(Limits::default());
    layout.register_file(FILE, 6 << 18).unwrap();
    let low = private(SlotId::new(0), GfnRange::from_bytes(0, 2 << 30).unwrap(), FILE, 0);
    let high = private(
        SlotId::new(1),
        GfnRange::from_bytes(4 << 30, 4 << 30).unwrap(),
        FILE,
        FilePage::containing(2 << 30).get(),
    );
    layout.insert(low).unwrap();
    layout.insert(high).unwrap();
    let at = |address: u64| layout.table().locate(Gfn::containing(address)).and_then(|at| at.file);
    assert_eq!(at(0), Some((FILE, file_page(0))));
    assert_eq!(at((2 << 30) - 1), Some((FILE, FilePage::containing((2 << 30) - 1))));
    assert_eq!(at(2 << 30), None);
    assert_eq!(at(0x1_0000_0000), Some((FILE, FilePage::containing(0x8000_0000))));
    assert_eq!(at((8 << 30) - 1), Some((FILE, FilePage::containing((6 << 30) - 1))));
    assert_eq!(at(8 << 30), None);
    // A hole across the seam of the file takes the end of one and the start of the other.
    let seam = FileRange::from_bytes(0x7fff_f000, 0x2000).unwrap();
    let clips: Vec<_> = layout.clip(FILE, seam).map(|clip| clip.gfns).collect();
    assert_eq!(clips, [gfns(0x7_ffff, 0x8_0000), gfns(0x10_0000, 0x10_0001)]);
}

#[test]
fn s04_chunking() {
    let limits = Limits { pages_per_slot: 1 << 18, ..Limits::default() };
    let mut layout = Layout::from_slots(limits, [(FILE, 5 << 17)], []).unwrap();
    let empty = layout.clone();
    let section = GfnRange::from_bytes(0, 5 << 29).unwrap();
    let whole = private(SlotId::new(0), section, FILE, 0);
    refused(&layout, whole, LayoutError::TooLarge { id: whole.id, pages: 5 << 17, limit: 1 << 18 });
    for (n, chunk) in (0..).zip(section.chunks(limits.pages_per_slot)) {
        layout.insert(private(SlotId::new(n), chunk, FILE, chunk.start().get())).unwrap();
    }
    let chunks: Vec<_> = layout
        .table()
        .slots()
        .map(|slot| (slot.gfns.bytes(), slot.file_range().map(|(_, pages)| pages.start_byte())))
        .collect();
    assert_eq!(chunks, [(1 << 30, Some(0)), (1 << 30, Some(0x4000_0000)), (1 << 29, Some(0x8000_0000))]);
    for n in 0..3 {
        layout.remove(SlotId::new(n)).unwrap();
    }
    assert_eq!(layout, empty);
}

#[test]
fn s06_double_bind() {
    let mut layout = layout();
    let first = private(SlotId::new(0), gfns(0, 0x200), FILE, 0);
    layout.insert(first).unwrap();
    let second = private(SlotId::new(1), gfns(0x1000, 0x1200), FILE, 0x100);
    let source = BindError::Overlap { slot: second.id, with: first.id, common: file_pages(0x100, 0x200) };
    refused(&layout, second, LayoutError::Bind { file: FILE, source });
    assert_eq!(layout.table().get(first.id), Some(&first));
    // The same pages of another file are free.
    layout.register_file(FileId::new(8).unwrap(), 0x1000).unwrap();
    layout.insert(private(SlotId::new(1), gfns(0x1000, 0x1200), FileId::new(8).unwrap(), 0x100)).unwrap();
}

#[test]
fn s07_forbidden_flags() {
    let layout = layout();
    let slot = private(SlotId::new(0), gfns(0, 1), FILE, 0);
    let id = slot.id;
    let with = |flags| Memslot { flags: slot.flags | flags, ..slot };
    refused(&layout, with(SlotFlags::READONLY), LayoutError::ReadonlyWithGuestMemfd { id });
    refused(&layout, with(SlotFlags::LOG_DIRTY), LayoutError::LogDirtyWithGuestMemfd { id });
    refused(
        &layout,
        with(SlotFlags::from_bits_retain(0x8001_0000)),
        LayoutError::UnknownFlags { id, unknown: 0x8001_0000 },
    );
    refused(&layout, Memslot { binding: None, ..slot }, LayoutError::FlagWithoutBinding { id });
    let unflagged = Memslot { flags: SlotFlags::empty(), ..slot };
    refused(&layout, unflagged, LayoutError::BindingWithoutFlag { id, file: FILE });

    // Without a file either is fine, but read-only only where the VM has it.
    let plain = Memslot { flags: SlotFlags::READONLY | SlotFlags::LOG_DIRTY, ..shared(id, gfns(0, 1)) };
    Layout::new(Limits::default()).insert(plain).unwrap();
    let protected = Layout::new(Limits { readonly: false, ..Limits::default() });
    refused(&protected, plain, LayoutError::ReadonlyUnsupported { id });
}

#[test]
fn every_limit_holds_at_its_edge() {
    let limits = Limits { hva_end: (1 << 47) - PAGE_SIZE, address_spaces: 2, ..Limits::default() };
    let layout = Layout::from_slots(limits, [(FILE, 0x1000)], [shared(SlotId::new(5), gfns(0x100, 0x200))]).unwrap();
    let slot = shared(SlotId::new(0), gfns(0, 1));
    let id = slot.id;
    let accepted = |slot: Memslot| layout.clone().insert(slot).unwrap();

    // Slot ids, and address spaces.
    accepted(Memslot { id: SlotId::new(32_763), ..slot });
    let high = SlotId::new(32_764);
    refused(&layout, Memslot { id: high, ..slot }, LayoutError::IdTooHigh { id: high, limit: 32_764 });
    accepted(Memslot { id: SlotId { as_id: 1, id: 5 }, gfns: gfns(0x100, 0x200), ..slot });
    let beyond = SlotId { as_id: 2, id: 0 };
    refused(&layout, Memslot { id: beyond, ..slot }, LayoutError::NoSuchAddressSpace { id: beyond, count: 2 });

    // Size.
    let empty = Memslot { gfns: GfnRange::empty_at(gfn(3)), ..slot };
    refused(&layout, empty, LayoutError::Empty { id, at: gfn(3) });
    let base = gfn(1 << 32);
    accepted(Memslot { gfns: GfnRange::with_len(base, (1 << 31) - 1).unwrap(), hva: 0, ..slot });
    let large = GfnRange::with_len(base, 1 << 31).unwrap();
    let reason = LayoutError::TooLarge { id, pages: 1 << 31, limit: (1 << 31) - 1 };
    refused(&layout, Memslot { gfns: large, hva: 0, ..slot }, reason);

    // Host address.
    refused(&layout, Memslot { hva: 0x1001, ..slot }, LayoutError::UnalignedHva { id, hva: 0x1001 });
    accepted(Memslot { hva: 0, ..slot });
    accepted(Memslot { hva: limits.hva_end - PAGE_SIZE, ..slot });
    for hva in [limits.hva_end, 0xffff_ffff_ffff_f000] {
        let reason = LayoutError::HvaBeyondEnd { id, hva, size: PAGE_SIZE, limit: limits.hva_end };
        refused(&layout, Memslot { hva, ..slot }, reason);
    }

    // Overlap, by one frame on either side; touching is fine.
    accepted(Memslot { gfns: gfns(0xff, 0x100), ..slot });
    accepted(Memslot { gfns: gfns(0x200, 0x201), ..slot });
    for (start, end, common) in [(0xff, 0x101, gfns(0x100, 0x101)), (0x1ff, 0x201, gfns(0x1ff, 0x200))] {
        let overlap = LayoutError::GfnOverlap { id, with: SlotId::new(5), common };
        let mut changed = layout.clone();
        assert_eq!(changed.insert(Memslot { gfns: gfns(start, end), ..slot }), Err(overlap));
        assert_eq!(changed, layout);
    }
    let again = Memslot { id: SlotId::new(5), ..slot };
    refused(&layout, again, LayoutError::IdInUse { id: again.id, gfns: gfns(0x100, 0x200) });

    // The top of the guest's addresses.
    let top = limits.top.get();
    accepted(Memslot { gfns: gfns(top - 1, top), ..slot });
    let above = gfns(top - 1, top + 1);
    refused(&layout, Memslot { gfns: above, ..slot }, LayoutError::AboveTop { id, gfns: above, top: limits.top });

    // Files.
    let private_at = |start, len: u64| private(id, gfns(0x300, 0x300 + len), FILE, start);
    accepted(private_at(0xfff, 1));
    let source = BindError::BeyondFile { slot: id, pages: file_pages(0xfff, 0x1001), size: 0x1000 };
    refused(&layout, private_at(0xfff, 2), LayoutError::Bind { file: FILE, source });
    let unknown = FileId::new(1 << 40).unwrap();
    refused(&layout, private(id, gfns(0, 1), unknown, 0), LayoutError::UnknownFile { id, file: unknown });
    let wrapping = private(id, gfns(0, 2), FILE, FilePage::MAX.get() - 1);
    assert!(matches!(layout.clone().insert(wrapping), Err(LayoutError::FileRange { .. })));
}

#[test]
fn the_largest_file() {
    assert_eq!(MAX_FILE_PAGES, (1 << 51) - 1);
    for pages in [0, MAX_FILE_PAGES + 1, u64::MAX] {
        assert_eq!(Bindings::new(pages), Err(BindError::FileSize { pages }));
    }
    let mut bindings = Bindings::new(MAX_FILE_PAGES).unwrap();
    let (one, two) = (SlotId::new(1), SlotId::new(2));
    let last = file_pages(MAX_FILE_PAGES - 1, MAX_FILE_PAGES);
    bindings.bind(one, last, gfn(0x77)).unwrap();
    let beyond = file_pages(MAX_FILE_PAGES, MAX_FILE_PAGES + 1);
    let reason = BindError::BeyondFile { slot: two, pages: beyond, size: MAX_FILE_PAGES };
    assert_eq!(bindings.bind(two, beyond, gfn(0)), Err(reason));
    // All the pages below, at the highest frames they fit.
    let below = file_pages(0, MAX_FILE_PAGES - 1);
    let base = gfn(Gfn::MAX.get() - below.pages());
    let reason = BindError::BeyondTop { slot: two, base: gfn(base.get() + 1), pages: below.pages() };
    assert_eq!(bindings.bind(two, below, gfn(base.get() + 1)), Err(reason));
    bindings.bind(two, below, base).unwrap();
    let hole = file_pages(MAX_FILE_PAGES - 2, FilePage::MAX.get());
    let clips: Vec<_> = bindings.clip(hole).map(|clip| (clip.slot, clip.gfns)).collect();
    assert_eq!(clips, [(two, gfns(Gfn::MAX.get() - 1, Gfn::MAX.get())), (one, gfns(0x77, 0x78))]);
    assert_eq!(bindings.find(FilePage::MAX), None);
}

#[test]
fn closing_a_file_leaves_its_slots_without_it() {
    let mut layout = layout();
    layout.register_file(FileId::new(8).unwrap(), 0x10).unwrap();
    let slots = [
        private(SlotId::new(0), gfns(0x100, 0x110), FILE, 0x20),
        private(SlotId::new(1), gfns(0x200, 0x210), FILE, 0x10),
        private(SlotId::new(2), gfns(0x300, 0x310), FileId::new(8).unwrap(), 0),
    ];
    layout.insert_all(slots).unwrap();
    let before = layout.snapshot();
    assert_eq!(layout.close_file(FILE), [(slots[1].id, slots[1].gfns), (slots[0].id, slots[0].gfns)]);
    assert_eq!(layout.close_file(FILE), []);
    assert!(layout.bindings(FILE).is_none() && layout.clip(FILE, file_pages(0, 0x1000)).next().is_none());
    let at = layout.table().locate(gfn(0x105)).unwrap();
    assert_eq!((at.hva, at.file, at.slot.flags), (slots[0].hva + 0x5000, None, SlotFlags::GUEST_MEMFD));
    assert_eq!(layout.table().get(slots[2].id), Some(&slots[2]));
    // What was published earlier has not changed.
    assert_eq!(before.get(slots[0].id), Some(&slots[0]));
    // Removing such a slot is fine; adding it back is not.
    layout.remove(slots[0].id).unwrap();
    refused(&layout, slots[0], LayoutError::UnknownFile { id: slots[0].id, file: FILE });
    assert_eq!(layout.remove(slots[0].id), Err(LayoutError::UnknownSlot { id: slots[0].id }));
    assert_eq!(
        layout.register_file(FileId::new(8).unwrap(), 1),
        Err(LayoutError::FileKnown { file: FileId::new(8).unwrap() })
    );
}

#[test]
fn a_person_can_read_it() {
    let low = Memslot { flags: SlotFlags::READONLY | SlotFlags::LOG_DIRTY, ..shared(SlotId::new(3), gfns(0, 0x301)) };
    let high = private(SlotId::new(1), GfnRange::from_bytes(1 << 32, 3 << 30).unwrap(), FILE, 0x200);
    let table = SlotTable::new(vec![high, low]);
    let lines = "slot 0:3 gpa [0x0, 0x301000) 3076 KiB hva 0x7f0000000000 readonly log-dirty\n\
                 slot 0:1 gpa [0x100000000, 0x1c0000000) 3 GiB hva 0x7f0000000000 file #7 at 0x200000\n";
    assert_eq!(table.to_string(), lines);
    let closed = Memslot { binding: None, ..high };
    assert!(closed.to_string().ends_with(" file closed"));
    let overlap = LayoutError::overlap(&shared(SlotId::new(4), gfns(0x300, 0x400)), &low);
    assert_eq!(overlap.to_string(), "slot 0:4: gfns [0x300, 0x301) belong to slot 0:3 already");
}
