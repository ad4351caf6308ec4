//! The tracker where one has to know exactly what lies where: ids that are used again, writes in nobody's name, slots that KVM
//! does not log, calls that fail.

mod dirty_kit;
mod soft_kit;

use std::sync::Arc;
use std::time::Duration;

use cvm_memory::addr::{FilePage, GfnRange};
use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::dirty::{
    ClearError, Pace, Reaper, Stage, StartError, Stray, SyncError, SyncReport, Tracker, Unloggable,
};
use cvm_memory::gmem::FileId;
use cvm_memory::hypervisor::{Cap, Exit, PreFaultMemory, Vcpu};
use cvm_memory::layout::{FileBinding, Layout, Limits, Memslot, SlotFlags, SlotId};
use cvm_memory::soft::{SoftVcpu, SoftVm};
use cvm_memory_testkit::{Call, Recorder};
use dirty_kit::*;
use nix::errno::Errno;
use soft_kit::*;

/// An entry for page 10 of slot 3 is read when slot 3 is something else already: it stays with the memory that was written.
#[test]
fn r06_a_slot_id_that_is_used_again() {
    for told in [true, false] {
        let mut setup = Setup::new(RING, one_slot);
        setup.write(0x100 + 10);
        let successor = slot(setup.ram, 3, 0x800, 128, 64);
        if told {
            setup.tracker.before_delete(&one_slot(setup.ram)[0]).unwrap();
        }
        // Not even if nobody told before the slot went.
        set_region(&setup.soft, &delete(3)).unwrap();
        set_region(&setup.soft, &region(&successor)).unwrap();
        setup.tracker.edited(&layout(&[successor]));
        setup.write(0x800 + 20);
        let report = setup.sync();
        assert_eq!((report.stray, report.overrun), (None, false));
        assert_eq!(setup.dirty(), [pages(10, 11), pages(148, 149)], "told: {told}");
    }
}

/// The generation goes on through several edits that nobody syncs between.
#[test]
fn r06_a_slot_id_that_is_used_again_and_again() {
    let mut setup = Setup::new(RING, one_slot);
    for round in 0..4 {
        setup.write(0x100 + 10);
        setup.edit(&[slot(setup.ram, 3, 0x100, (round + 1) * 64, 64)]);
    }
    setup.write(0x100 + 10);
    setup.sync();
    let expected: Vec<_> = (0..5).map(|round| pages(round * 64 + 10, round * 64 + 11)).collect();
    assert_eq!(setup.dirty(), expected);
}

/// A write by KVM itself, in no vCPU's name: with rings that a log backs it is found by the last sync, and when its slot goes.
#[test]
fn r10_writes_in_no_vcpus_name() {
    let mut setup = Setup::new(BACKED, one_slot);
    setup.write(0x101);
    setup.soft.write_guest(0x102 * PAGE, &[1]).unwrap();
    setup.sync();
    assert_eq!(setup.dirty(), [pages(1, 2)]);
    assert_eq!(setup.tracker.sync(Stage::Last).unwrap().pages, 1);
    assert_eq!(setup.dirty(), [pages(2, 3)]);

    setup.soft.write_guest(0x103 * PAGE, &[1]).unwrap();
    setup.edit(&[slot(setup.ram, 3, 0x900, 64, 64)]);
    assert_eq!(setup.dirty(), [pages(3, 4)]);
    assert_eq!(setup.soft.lost_dirty_pages(), 0);
}

/// A vCPU that came back with a full ring gets room by one call, as often as it takes.
#[test]
fn r11_room_for_a_full_ring() {
    let mut setup = Setup::new(RING, |ram| vec![slot(ram, 3, 0x100, 0, PAGES)]);
    // A vCPU that has no ring here does no harm.
    let _idle = setup.soft.create_vcpu();
    setup.vcpu.start(fill(0x100 * PAGE, PAGES * PAGE, 7, false));
    let mut fulls = 0;
    loop {
        match setup.vcpu.run().unwrap() {
            Exit::Halt => break,
            Exit::DirtyRingFull => fulls += 1,
            exit => panic!("{exit:?}"),
        }
        assert_eq!(setup.tracker.ring_full().unwrap().pages, 256 - 64);
    }
    assert_eq!(fulls, 2);
    // The write that filled it up is not made before there is room, so it needs another entry.
    assert_eq!(setup.sync().pages, PAGES - 2 * (192 - 1));
    assert_eq!(setup.dirty(), [pages(0, PAGES)]);
}

/// With rings, clearing by hand is never enabled; and a slot without a log has no dirty pages.
#[test]
fn r12_no_log_is_no_error() {
    let setup = Setup::new(BY_LOOKING, one_slot);
    set_region(&setup.soft, &delete(3)).unwrap();
    assert_eq!(setup.sync(), SyncReport::default());
    let vm = Recorder::new(SoftVm::default_type());
    RING.enable(&vm, &cvm_memory::dirty::Offer::probe(&vm)).unwrap();
    let by_hand =
        |call: &Call| matches!(call, Call::EnableCap { cap: Cap::MANUAL_DIRTY_LOG_PROTECT2, args } if args[0] != 0);
    assert_eq!(vm.count_matching(by_hand), 0);
}

/// What was in a slot's log is in the bitmap when it goes, at the same pages of the backing, by whichever mechanism.
#[test]
fn r13_deleted_while_logged() {
    for mechanism in [BY_LOOKING, BY_HAND, RING, BACKED] {
        let mut setup = Setup::new(mechanism, one_slot);
        setup.write(0x105);
        setup.edit(&[]);
        assert_eq!(setup.dirty(), [pages(5, 6)], "{mechanism:?}");
        assert_eq!(setup.sync(), SyncReport::default());
        assert_eq!(setup.tracker.take_gfns(), []);
    }
}

/// One slot becomes two and a hole: pages of the parts are found in them, those of the hole by backing only.
#[test]
fn t10_a_split_keeps_bits() {
    for mechanism in [BY_LOOKING, BY_HAND, RING] {
        let mut setup = Setup::new(mechanism, |ram| vec![slot(ram, 1, 0x100, 0, 256)]);
        for page in [5, 0xb0, 200] {
            setup.write(0x100 + page);
        }
        setup.edit(&[slot(setup.ram, 1, 0x100, 0, 0xa0), slot(setup.ram, 2, 0x1c0, 0xc0, 64)]);
        setup.sync();
        assert_eq!(setup.tracker.take_gfns(), [gfns(0x105, 0x106), gfns(0x1c8, 0x1c9)]);
        assert_eq!(setup.dirty(), [pages(0xb0, 0xb1)]);
    }
}

/// Runs of frames go on over slots that touch; each address space has its own.
#[test]
fn runs_by_frame() {
    let mut setup = Setup::new(BY_LOOKING, |ram| vec![slot(ram, 1, 0x100, 100, 64), slot(ram, 2, 0x140, 0, 64)]);
    for gfn in [0x13e, 0x13f, 0x140, 0x150] {
        setup.write(gfn);
    }
    assert_eq!(setup.sync().pages, 4);
    assert_eq!(setup.tracker.take_gfns(), [gfns(0x13e, 0x141), gfns(0x150, 0x151)]);
    assert!(setup.bitmap.is_empty());
}

/// By hand: a log is cleared in pieces before its bits are shown, and only where there are any.
#[test]
fn cleared_before_it_is_shown() {
    let mut setup = Setup::new(BY_HAND, one_slot);
    setup.write(0x101);
    setup.vm.fail_matching(|call| matches!(call, Call::ClearDirtyLog { .. }), Errno::EINTR);
    let error = setup.tracker.sync(Stage::Running).unwrap_err();
    assert!(matches!(error, SyncError::Clear { first: 0, pages: 64, errno: Errno::EINTR, .. }), "{error:?}");
    assert!(setup.bitmap.is_empty(), "it is not protected yet");
    setup.vm.take();
    assert_eq!(setup.sync().pages, 1);
    let cleared = Call::ClearDirtyLog { slot: 3, first_page: 0, num_pages: 64, bits: 1 };
    assert_eq!(setup.vm.take(), [Call::GetDirtyLog { slot: 3 }, cleared]);
    assert_eq!(setup.dirty(), [pages(1, 2)]);
    setup.sync();
    assert_eq!(setup.vm.take(), [Call::GetDirtyLog { slot: 3 }], "nothing to clear");
}

/// Failures of rings and logs lose nothing.
#[test]
fn what_fails_is_found_by_the_next() {
    let mut setup = Setup::new(RING, one_slot);
    setup.write(0x101);
    setup.vm.fail_nth(1, Errno::EIO);
    setup.tracker.sync(Stage::Running).unwrap_err();
    assert!(setup.bitmap.is_empty());
    setup.sync();
    assert_eq!(setup.dirty(), [pages(1, 2)]);

    let mut setup = Setup::new(BY_LOOKING, one_slot);
    setup.write(0x101);
    setup.vm.fail_nth(1, Errno::EIO);
    let error = setup.tracker.sync(Stage::Running).unwrap_err();
    assert_eq!(error, SyncError::Get { slot: SlotId::new(3), errno: Errno::EIO });
    setup.vm.fail_nth(1, Errno::EIO);
    setup.tracker.before_delete(&one_slot(setup.ram)[0]).unwrap_err();
    setup.sync();
    assert_eq!(setup.dirty(), [pages(1, 2)]);
}

/// A slot that was replaced by a longer one behind the tracker's back: its log does not fit, and all of it is dirty.
#[test]
fn a_log_that_does_not_fit() {
    let mut setup = Setup::new(BY_LOOKING, one_slot);
    set_region(&setup.soft, &delete(3)).unwrap();
    set_region(&setup.soft, &region(&slot(setup.ram, 3, 0x100, 0, 65))).unwrap();
    setup.write(0x101);
    let report = setup.sync();
    assert!(report.overrun);
    assert_eq!(setup.dirty(), [pages(0, 64)]);
}

/// Entries that KVM has written over: everything is dirty, and a vCPU that can never run again is told of.
#[test]
fn an_overrun_ring() {
    let mut setup = Setup::new(RING, |ram| vec![slot(ram, 3, 0x100, 0, PAGES)]);
    let mut all = PreFaultMemory { gpa: 0x100 * PAGE, size: PAGES * PAGE, flags: 0 };
    setup.vcpu.pre_fault_memory(&mut all).unwrap();
    assert_eq!(setup.soft.lost_dirty_pages(), 256);
    let report = setup.sync();
    assert!(report.overrun);
    assert_eq!(setup.dirty(), [pages(0, PAGES)]);
    setup.vcpu.start(fill(0x100 * PAGE, 1, 7, false));
    let error = loop {
        assert!(matches!(setup.vcpu.run(), Ok(Exit::DirtyRingFull)));
        if let Err(error) = setup.tracker.ring_full() {
            break error;
        }
    };
    assert_eq!(error, SyncError::Stuck);
}

/// Room is made in all rings at once. More vCPUs than anybody has patience for may have stood still until then, and each of them
/// says so.
#[test]
fn many_rings_that_are_full_at_once() {
    let setup = Setup::new(RING, |ram| vec![slot(ram, 3, 0x100, 0, PAGES)]);
    let vcpus = (0..80).map(|_| {
        let mut vcpu = setup.soft.create_vcpu();
        setup.tracker.add_ring(vcpu.dirty_ring(4096).unwrap());
        vcpu.start(fill(0x100 * PAGE, 200 * PAGE, 1, false));
        assert!(matches!(vcpu.run(), Ok(Exit::DirtyRingFull)));
        // So that the next one has to be let at the same pages too.
        set_region(&setup.soft, &delete(3)).unwrap();
        set_region(&setup.soft, &region(&slot(setup.ram, 3, 0x100, 0, PAGES))).unwrap();
        vcpu
    });
    let mut vcpus: Vec<SoftVcpu> = vcpus.collect();
    for _ in &vcpus {
        setup.tracker.ring_full().unwrap();
    }
    for vcpu in &mut vcpus {
        assert!(matches!(vcpu.run(), Ok(Exit::Halt)));
    }
    assert_eq!(setup.tracker.ring_stats().fulls, 80);
}

/// A log that starts with every page in it, and one that does not.
#[test]
fn from_all() {
    let mut setup = Setup::new(FROM_ALL, one_slot);
    assert_eq!(setup.sync().pages, 64);
    assert_eq!(setup.dirty(), [pages(0, 64)]);
    assert_eq!(setup.sync().pages, 0);
    setup.write(0x101);
    assert_eq!(setup.sync().pages, 1);
}

/// Slots with a guest_memfd: refused with the reason, or dirty all the time.
#[test]
fn slots_that_kvm_does_not_log() {
    let setup = Setup::new(BY_LOOKING, one_slot);
    let file = FileId::next();
    let binding = Some(FileBinding { file, start: FilePage::ZERO });
    let private = Memslot { flags: SlotFlags::GUEST_MEMFD, binding, ..slot(setup.ram, 4, 0x200, 64, 16) };
    let slots = [one_slot(setup.ram)[0], private];
    let layout = Layout::from_slots(Limits::default(), [(file, 16)], slots).unwrap();
    let refused = setup.tracker.start(&layout, Unloggable::Refuse).unwrap_err();
    assert_eq!(refused, StartError::Unloggable { slot: SlotId::new(4), gfns: private.gfns });
    assert!(refused.to_string().contains("guest_memfd"), "{refused}");
    assert_eq!(setup.sync(), SyncReport::default(), "nothing is tracked");
    setup.tracker.start(&layout, Unloggable::AlwaysDirty).unwrap();
    for _ in 0..2 {
        assert_eq!(setup.sync().pages, 16);
        assert_eq!(setup.tracker.take_gfns(), [private.gfns]);
    }
    // Neither does it log what it was not asked to.
    let silent = Memslot { flags: SlotFlags::empty(), ..one_slot(setup.ram)[0] };
    setup.tracker.start(&self::layout(&[silent]), Unloggable::Refuse).unwrap();
    assert_eq!(setup.sync(), SyncReport::default());
}

/// A slot over memory that nobody has added: an error, and everything is dirty once it was.
#[test]
fn memory_that_is_not_known() {
    let mut setup = Setup::new(RING, one_slot);
    let other: &'static SharedMemory = Box::leak(Box::new(SharedMemory::new(16 * PAGE).unwrap()));
    let there = slot(other, 5, 0x300, 0, 16);
    let error = StartError::NoBacking { slot: SlotId::new(5), hva: other.hva(), bytes: 16 * PAGE };
    assert_eq!(setup.tracker.start(&layout(&[there]), Unloggable::Refuse), Err(error));
    setup.tracker.start(&setup.layout, Unloggable::Refuse).unwrap();
    setup.edit(&[there]);
    assert_eq!(setup.tracker.sync(Stage::Last), Err(SyncError::Layout(error)));
    let bitmap = setup.tracker.add_backing(other).unwrap();
    setup.tracker.edited(&setup.layout);
    setup.sync();
    assert_eq!(bitmap.take().collect::<Vec<_>>(), [pages(0, 16)]);
    let frames: Vec<GfnRange> = setup.tracker.take_gfns();
    assert_eq!(frames, []);
}

/// Between the first slot that is about to go and the edit's end, whose log is whose is not known: a sync says so, touches
/// nothing and loses nothing, by whichever mechanism. So does an edit that comes to nothing.
#[test]
fn a_sync_in_the_middle_of_an_edit() {
    for mechanism in [BY_LOOKING, BY_HAND, RING, BACKED] {
        let mut setup = Setup::new(mechanism, |ram| vec![slot(ram, 3, 0x100, 0, 64), slot(ram, 4, 0x200, 64, 64)]);
        setup.write(0x101);
        setup.write(0x202);
        let old = setup.layout.table().get(SlotId::new(3)).copied().unwrap();
        setup.tracker.before_delete(&old).unwrap();
        // A slot of the same id, elsewhere: its log is not the one that the tracker thinks.
        set_region(&setup.soft, &delete(3)).unwrap();
        set_region(&setup.soft, &region(&slot(setup.ram, 3, 0x300, 128, 64))).unwrap();
        setup.vm.take();
        for stage in [Stage::Running, Stage::Last] {
            assert_eq!(setup.tracker.sync(stage), Err(SyncError::Editing));
        }
        assert_eq!(SyncError::Editing.errno(), Errno::EBUSY);
        assert_eq!(setup.vm.take(), [], "{mechanism:?}");
        let slots = [slot(setup.ram, 3, 0x300, 128, 64), slot(setup.ram, 4, 0x200, 64, 64)];
        setup.tracker.edited(&layout(&slots));
        setup.write(0x303);
        setup.sync();
        assert_eq!(setup.dirty(), [pages(1, 2), pages(66, 67), pages(131, 132)], "{mechanism:?}");
        // Given up: the slots are what they were.
        setup.tracker.before_delete(&slots[1]).unwrap();
        setup.tracker.edited(&layout(&slots));
        assert_eq!(setup.sync(), SyncReport::default());
    }
}

/// Looking takes nothing and shows nothing; what is cleared is protected first and shown then, page by page as asked for, and
/// KVM is asked for whole words without losing a neighbour.
#[test]
fn found_first_and_cleared_later() {
    let mut setup = Setup::new(BY_HAND, |ram| {
        vec![slot(ram, 3, 0x100, 0, 131), slot(ram, 4, 0x183, 131, 64), slot(ram, 5, 0x800, 256, 8)]
    });
    let clear = |setup: &Setup, start, end| setup.tracker.clear(gfns(start, end));
    // Clear before any look.
    assert_eq!(clear(&setup, 0x100, 0x110), Err(ClearError::NotLooked { slot: SlotId::new(3) }));
    for gfn in [0x105, 0x106, 0x140, 0x182, 0x183, 0x1c0, 0x800] {
        setup.write(gfn);
    }
    assert_eq!(setup.tracker.look().unwrap().pages, 7);
    assert_eq!(setup.tracker.look().unwrap().pages, 7, "it takes nothing");
    assert!(setup.bitmap.is_empty(), "nothing is protected yet");
    setup.vm.take();
    // In the middle of a word: its neighbours stay.
    assert_eq!(clear(&setup, 0x106, 0x107), Ok(1));
    assert_eq!(setup.vm.take(), [Call::ClearDirtyLog { slot: 3, first_page: 0, num_pages: 64, bits: 1 }]);
    assert_eq!(setup.dirty(), [pages(6, 7)]);
    assert_eq!(clear(&setup, 0x106, 0x107), Ok(0), "once");
    assert_eq!(setup.vm.take(), []);
    // Written again after it was cleared: found again by the next look. Written again before: copied once.
    setup.write(0x106);
    setup.write(0x105);
    // Over the end of a slot, which is no multiple of 64, and into the next.
    assert_eq!(clear(&setup, 0x182, 0x184), Ok(2));
    let calls = [
        Call::ClearDirtyLog { slot: 3, first_page: 128, num_pages: 3, bits: 1 },
        Call::ClearDirtyLog { slot: 4, first_page: 0, num_pages: 64, bits: 1 },
    ];
    assert_eq!(setup.vm.take(), calls);
    assert_eq!(setup.dirty(), [pages(130, 132)]);
    // Frames in no slot: nothing is cleared, also where there is one.
    assert_eq!(clear(&setup, 0x100, 0x801), Err(ClearError::NotTracked { gfns: gfns(0x1c3, 0x800) }));
    assert_eq!(setup.vm.take(), []);
    // An unaligned address is none of a frame.
    GfnRange::from_bytes(0x100_800, 0x1000).unwrap_err();
    assert_eq!(setup.tracker.look().unwrap().pages, 5);
    assert_eq!(clear(&setup, 0x100, 0x1c3), Ok(4));
    assert_eq!(setup.dirty(), [pages(5, 7), pages(64, 65), pages(192, 193)]);
    // A failure keeps the pages for the next time.
    setup.vm.fail_matching(|call| matches!(call, Call::ClearDirtyLog { .. }), Errno::EINTR);
    let failed = clear(&setup, 0x800, 0x808);
    let error = SyncError::Clear { slot: SlotId::new(5), first: 0, pages: 8, errno: Errno::EINTR };
    assert_eq!((failed, error.errno()), (Err(ClearError::Sync(error)), Errno::EINTR));
    assert!(setup.bitmap.is_empty());
    assert_eq!(clear(&setup, 0x800, 0x808), Ok(1));
    assert_eq!(setup.dirty(), [pages(256, 257)]);
    // What was found and not cleared is carried across an edit.
    setup.write(0x107);
    setup.tracker.look().unwrap();
    let moved = [slot(setup.ram, 3, 0x900, 0, 131)];
    setup.edit(&moved);
    assert_eq!(setup.dirty(), [pages(7, 8)]);
    assert_eq!(clear(&setup, 0x900, 0x901), Err(ClearError::NotLooked { slot: SlotId::new(3) }));
    setup.tracker.before_delete(&moved[0]).unwrap();
    assert_eq!(clear(&setup, 0x900, 0x901), Err(ClearError::Sync(SyncError::Editing)));
    assert_eq!(setup.tracker.look(), Err(SyncError::Editing));
}

/// Where finding a page takes it there is nothing to clear.
#[test]
fn nothing_to_clear_by_hand() {
    for mechanism in [BY_LOOKING, RING] {
        let setup = Setup::new(mechanism, one_slot);
        let error = SyncError::NotByHand { mechanism };
        assert_eq!(setup.tracker.look(), Err(error));
        assert_eq!(setup.tracker.clear(gfns(0x100, 0x101)), Err(ClearError::Sync(error)));
    }
}

/// What no layout has: address space, slot or page of an entry. Told of by the sync, and everything else is found.
#[test]
fn entries_that_name_nothing() {
    for stray in [0x0001_0003, 0x0000_7fff, 0xffff_ffff] {
        for (slot, page) in [(stray, 0), (3, 64), (3, u64::MAX)] {
            let mut setup = Setup::new(RING, one_slot);
            setup.write(0x101);
            // Over what KVM has put there: a kernel that is wrong.
            let ring = setup.vcpu.dirty_ring(4096).unwrap();
            ring.entries()[0].set_dirty(slot, page);
            setup.write(0x102);
            let report = setup.sync();
            assert_eq!(report.stray, Some(Stray { slot: SlotId::from_raw(slot), page }));
            assert_eq!((report.pages, setup.dirty()), (1, vec![pages(2, 3)]));
            assert_eq!(setup.sync().stray, None, "once");
        }
    }
}

/// A mapping that goes takes its bitmap with it: what comes to lie at its address has another.
#[test]
fn memory_that_goes_is_forgotten() {
    let setup = Setup::new(BY_LOOKING, one_slot);
    let backing: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(16 * PAGE).unwrap());
    let bitmap = setup.tracker.adopt(&backing).unwrap();
    assert!(Arc::ptr_eq(&bitmap, &setup.tracker.adopt(&backing).unwrap()));
    assert!(Arc::ptr_eq(&bitmap, &setup.tracker.add_backing(backing.as_ref()).unwrap()));
    assert!(Arc::ptr_eq(&setup.bitmap, &setup.tracker.add_backing(setup.ram).unwrap()));
    let there = Memslot { hva: backing.hva(), ..slot(setup.ram, 5, 0x300, 0, 16) };
    setup.tracker.start(&layout(&[there]), Unloggable::Refuse).unwrap();
    drop(backing);
    let error = StartError::NoBacking { slot: SlotId::new(5), hva: there.hva, bytes: 16 * PAGE };
    assert_eq!(setup.tracker.start(&layout(&[there]), Unloggable::Refuse), Err(error));
    assert_eq!(Arc::strong_count(&bitmap), 2, "of the tracker's, until other memory is added");
    // A tracker that was not started, or was stopped, follows nothing.
    setup.tracker.edited(&setup.layout);
    assert_eq!(setup.sync(), SyncReport::default());
}

/// A reaper looks more often the faster rings fill, less often the slower, and at once half as long after a vCPU stood still.
#[test]
fn a_reaper_keeps_pace() {
    let ms = Duration::from_millis;
    let mut setup = Setup::new(RING, |ram| vec![slot(ram, 3, 0x100, 0, PAGES)]);
    let tracker = Arc::new(setup.tracker);
    let mut reaper = Reaper::new(Arc::clone(&tracker), Pace::new(ms(1), ms(64))).unwrap();
    // Nothing happens: ever longer, up to the longest.
    let idle: Vec<_> = (0..8).map(|_| reaper.look().unwrap()).collect();
    assert_eq!(idle, [2, 4, 8, 16, 32, 64, 64, 64].map(ms));
    let mut page = 0;
    let mut write = |vcpu: &mut SoftVcpu, count: u64| {
        for _ in 0..count {
            finish(vcpu, fill((0x100 + page % PAGES) * PAGE, 1, 1, false));
            page += 1;
        }
    };
    // A quarter of the ring's 256 entries is what it aims at.
    for (entries, period) in [(64, 64), (128, 32), (128, 16), (16, 32), (32, 64)] {
        write(&mut setup.vcpu, entries);
        assert_eq!(reaper.look().unwrap(), ms(period), "{entries} entries");
    }
    // A vCPU that stands still makes room by itself. That there is little in the ring now says nothing.
    setup.vcpu.start(fill(0x100 * PAGE, 200 * PAGE, 7, false));
    let mut fulls = 0;
    while let Exit::DirtyRingFull = setup.vcpu.run().unwrap() {
        tracker.ring_full().unwrap();
        fulls += 1;
    }
    assert_eq!(fulls, 1);
    assert_eq!(reaper.look().unwrap(), ms(32));
    assert_eq!(reaper.look().unwrap(), ms(64), "that is over");
    let stats = reaper.stats();
    assert_eq!((stats.looks, stats.idle, stats.fulls, stats.fullest), (15, 9, 1, (128, 256)));
    assert_eq!((stats.shortest, stats.longest), (ms(1), ms(64)));
    // Until it is told that it is enough; and a failure loses nothing.
    let mut waits = Vec::new();
    reaper
        .run(|period| {
            waits.push(period);
            waits.len() < 3
        })
        .unwrap();
    assert_eq!(waits, [64, 64, 64].map(ms));
    write(&mut setup.vcpu, 1);
    setup.vm.fail_matching(|call| matches!(call, Call::ResetDirtyRings), Errno::EIO);
    assert!(reaper.run(|_| unreachable!()).is_err());
    tracker.sync(Stage::Last).unwrap();
    assert_eq!(setup.bitmap.take().map(|run| run.pages()).sum::<u64>(), page.max(200));
    assert!(Reaper::new(Arc::new(Tracker::new(Arc::new(setup.vm), BY_LOOKING)), Pace::new(ms(1), ms(2))).is_none());
}
