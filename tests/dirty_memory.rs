//! Memory that the tracker keeps dirty bits of: whose it is, when it is forgotten, and what becomes of its bits where KVM keeps no
//! log, or nobody could follow.

mod dirty_kit;
mod soft_kit;

use std::sync::Arc;

use cvm_memory::addr::FilePage;
use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::dirty::{Stage, StartError, SyncError, Unloggable};
use cvm_memory::gmem::FileId;
use cvm_memory::layout::{FileBinding, Layout, Limits, Memslot, SlotFlags, SlotId};
use cvm_memory_testkit::Window;
use dirty_kit::*;
use soft_kit::*;

/// The same mapping, brought by several owners: it is forgotten with the last of them.
#[test]
fn memory_with_several_owners_is_forgotten_with_the_last() {
    let setup = Setup::new(BY_LOOKING, one_slot);
    let ram: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(16 * PAGE).unwrap());
    let owner = || -> Arc<dyn SharedBacking> { Arc::new(Window::new(&ram, 0, 16 * PAGE)) };
    let (first, second) = (owner(), owner());
    let bitmap = setup.tracker.adopt(&first).unwrap();
    assert!(Arc::ptr_eq(&bitmap, &setup.tracker.adopt(&second).unwrap()));
    let there = Memslot { hva: ram.hva(), ..slot(setup.ram, 5, 0x300, 0, 16) };
    setup.tracker.start(&layout(&[there]), Unloggable::Refuse).unwrap();
    drop(first);
    // Other memory comes, and the slots are looked at again.
    let other: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(PAGE).unwrap());
    setup.tracker.adopt(&other).unwrap();
    setup.tracker.edited(&layout(&[there]));
    setup.tracker.wrote(ram.hva() + PAGE, 1);
    setup.sync();
    assert_eq!(setup.tracker.take_gfns(), [gfns(0x301, 0x302)]);
    drop(second);
    let error = StartError::NoBacking { slot: SlotId::new(5), hva: there.hva, bytes: 16 * PAGE };
    assert_eq!(setup.tracker.start(&layout(&[there]), Unloggable::Refuse), Err(error));
}

/// Mappings that overlap, as a part and the whole do: a write that KVM knows nothing of is found in either.
#[test]
fn a_write_to_memory_that_is_part_of_two() {
    let setup = Setup::new(BY_LOOKING, |_| Vec::new());
    let ram: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(16 * PAGE).unwrap());
    let part = setup.tracker.add_backing(&Window::new(&ram, 0, 4 * PAGE)).unwrap();
    setup.tracker.adopt(&ram).unwrap();
    let there = Memslot { hva: ram.hva(), ..slot(setup.ram, 5, 0x300, 0, 16) };
    setup.tracker.start(&layout(&[there]), Unloggable::Refuse).unwrap();
    setup.tracker.wrote(ram.hva() + 4 * PAGE - 1, 2);
    assert_eq!(setup.tracker.take_gfns(), [gfns(0x303, 0x305)]);
    assert_eq!(part.take().collect::<Vec<_>>(), [pages(3, 4)]);
}

/// A slot that KVM does not log may have been written until it went: its memory is dirty once more, whoever shows it then.
#[test]
fn a_slot_that_kvm_does_not_log_goes() {
    for mechanism in [BY_LOOKING, BY_HAND, RING] {
        let setup = Setup::new(mechanism, |_| Vec::new());
        let file = FileId::next();
        let binding = Some(FileBinding { file, start: FilePage::ZERO });
        let logged = slot(setup.ram, 4, 0x200, 64, 16);
        let private = Memslot { flags: SlotFlags::GUEST_MEMFD, binding, ..logged };
        let before = Layout::from_slots(Limits::default(), [(file, 16)], [private]).unwrap();
        setup.tracker.start(&before, Unloggable::AlwaysDirty).unwrap();
        setup.sync();
        assert_eq!(setup.tracker.take_gfns(), [private.gfns]);
        // Written since, and then the same memory is in a slot with a log, which begins with nothing in it.
        set_region(&setup.soft, &region(&logged)).unwrap();
        setup.tracker.edited(&layout(&[logged]));
        setup.sync();
        assert_eq!(setup.tracker.take_gfns(), [logged.gfns], "{mechanism:?}");
        setup.sync();
        assert_eq!(setup.tracker.take_gfns(), [], "{mechanism:?}");
    }
}

/// The id of a slot that KVM does not log is another's while vCPUs run: what they write there is nobody's at first.
#[test]
fn an_id_of_a_slot_that_kvm_does_not_log_is_used_again() {
    let mut setup = Setup::new(RING, |_| Vec::new());
    let file = FileId::next();
    let binding = Some(FileBinding { file, start: FilePage::ZERO });
    let private = Memslot { flags: SlotFlags::GUEST_MEMFD, binding, ..slot(setup.ram, 4, 0x200, 64, 16) };
    let before = Layout::from_slots(Limits::default(), [(file, 16)], [private]).unwrap();
    setup.tracker.start(&before, Unloggable::AlwaysDirty).unwrap();
    let logged = slot(setup.ram, 4, 0x300, 128, 16);
    setup.tracker.expect(&layout(&[logged]));
    set_region(&setup.soft, &region(&logged)).unwrap();
    setup.write(0x305);
    setup.tracker.sync(Stage::Running).unwrap();
    setup.tracker.edited(&layout(&[logged]));
    let gfns = setup.tracker.take_gfns();
    assert!(gfns.iter().any(|gfns| gfns.contains(gfn(0x305))), "{gfns:?}");
}

/// While slots cannot be followed, some may come, be written, and go: once they can, all memory is dirty, theirs too.
#[test]
fn memory_that_went_while_slots_could_not_be_followed() {
    let mut setup = Setup::new(BY_LOOKING, one_slot);
    let file = FileId::next();
    let binding = Some(FileBinding { file, start: FilePage::ZERO });
    let private = Memslot { flags: SlotFlags::GUEST_MEMFD, binding, ..slot(setup.ram, 4, 0x200, 64, 16) };
    let (stays, goes) = (one_slot(setup.ram)[0], slot(setup.ram, 5, 0x300, 128, 16));
    set_region(&setup.soft, &region(&goes)).unwrap();
    let all = Layout::from_slots(Limits::default(), [(file, 16)], [stays, goes, private]).unwrap();
    setup.tracker.edited(&all);
    assert!(matches!(setup.tracker.sync(Stage::Running), Err(SyncError::Layout(StartError::Unloggable { .. }))));
    setup.write(0x305);
    setup.tracker.before_delete(&goes).unwrap();
    set_region(&setup.soft, &delete(5)).unwrap();
    setup.tracker.edited(&layout(&[stays]));
    setup.sync();
    assert_eq!(setup.tracker.take_gfns(), [stays.gfns]);
    // The same memory is back, its log new.
    set_region(&setup.soft, &region(&goes)).unwrap();
    setup.tracker.edited(&layout(&[stays, goes]));
    setup.sync();
    assert_eq!(setup.tracker.take_gfns(), [goes.gfns]);
}
