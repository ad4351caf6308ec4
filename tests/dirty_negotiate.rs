//! What is chosen from what is offered, and every reason why something is not.

use cvm_memory::dirty::{Clearing, EnableError, Mechanism, Offer, OwnWrites, Refusal, Situation, Wish, negotiate};
use cvm_memory::hypervisor::{Cap, Hypervisor};
use cvm_memory::soft::SoftVm;
use cvm_memory_testkit::{Call, Recorder};
use nix::errno::Errno;

const MOST: u64 = 1 << 20;
/// As x86 offers it.
const BOTH: Offer = Offer { ring: MOST, ring_acq_rel: MOST, ring_with_bitmap: 0, manual_protect: 3 };
/// As a weakly ordered host offers it.
const WEAK: Offer = Offer { ring: 0, ring_with_bitmap: 1, ..BOTH };
const NOTHING: Offer = Offer { ring: 0, ring_acq_rel: 0, ring_with_bitmap: 0, manual_protect: 0 };
const FRESH: Situation =
    Situation { has_vcpus: false, has_slots: false, kernel_devices: false, own_writes: OwnWrites::None };

const fn ring(cap: Cap, bytes: u32, backed: bool) -> Mechanism {
    Mechanism::Ring { cap, bytes, backed }
}

fn choose(offer: Offer, situation: Situation, wish: Wish) -> Result<Mechanism, Refusal> {
    negotiate(&offer, &situation, wish).map(|choice| {
        assert!(choice.passed_over.is_empty());
        choice.mechanism
    })
}

#[test]
fn r08_sizes_of_a_ring() {
    let sized = |bytes| choose(BOTH, FRESH, Wish::Ring { bytes });
    for bytes in [0, 1000, 4095, 4097, 65535, MOST + 1, MOST * 3, u64::MAX] {
        assert_eq!(sized(bytes), Err(Refusal::RingSize { bytes }));
    }
    for bytes in [1, 16, 2048] {
        assert_eq!(sized(bytes), Err(Refusal::RingTooSmall { bytes, least: 4096 }));
    }
    for bytes in [4096, 16384, MOST] {
        let bytes_32 = u32::try_from(bytes).unwrap();
        assert_eq!(sized(bytes), Ok(ring(Cap::DIRTY_LOG_RING_ACQ_REL, bytes_32, false)));
    }
    // KVM would look at the lower half of 1 << 32 only.
    for bytes in [MOST * 2, 1 << 32, 1 << 63] {
        let refusal = Refusal::RingTooLarge { bytes, most: MOST };
        assert_eq!(sized(bytes), Err(refusal));
        assert!(refusal.to_string().contains("65536 entries"), "{refusal}");
    }
}

#[test]
fn r08_no_ring_at_all() {
    assert_eq!(choose(NOTHING, FRESH, Wish::Ring { bytes: 65536 }), Err(Refusal::NoRing));
    let best = negotiate(&NOTHING, &FRESH, Wish::Best).unwrap();
    assert_eq!(best.mechanism, Mechanism::Bitmap(Clearing::ByLooking));
    let no_clearing = Refusal::NoClearingByHand { needed: 1, offered: 0 };
    assert_eq!(best.passed_over, [Refusal::NoRing, Refusal::NoRing, no_clearing]);
}

#[test]
fn r09_either_ring_capability_will_do() {
    let wish = Wish::Ring { bytes: 4096 };
    let (plain, acq_rel) = (Cap::DIRTY_LOG_RING, Cap::DIRTY_LOG_RING_ACQ_REL);
    assert_eq!(choose(BOTH, FRESH, wish), Ok(ring(acq_rel, 4096, false)));
    assert_eq!(choose(WEAK, FRESH, wish), Ok(ring(acq_rel, 4096, false)));
    assert_eq!(choose(Offer { ring_acq_rel: 0, ..BOTH }, FRESH, wish), Ok(ring(plain, 4096, false)));
}

#[test]
fn r12_rings_and_clearing_by_hand_exclude_each_other() {
    let backed = ring(Cap::DIRTY_LOG_RING_ACQ_REL, 4096, true);
    let steps = backed.steps(&WEAK);
    let expected = [
        (Cap::MANUAL_DIRTY_LOG_PROTECT2, 0),
        (Cap::DIRTY_LOG_RING_ACQ_REL, 4096),
        (Cap::DIRTY_LOG_RING_WITH_BITMAP, 0),
    ];
    assert_eq!(steps, expected);
    assert_eq!(backed.steps(&NOTHING), expected[1..], "nothing to take back");
    for (clearing, options) in [(Clearing::ByLooking, 0), (Clearing::ByHand, 1), (Clearing::ByHandFromAll, 3)] {
        let steps = Mechanism::Bitmap(clearing).steps(&BOTH);
        assert_eq!(steps, [(Cap::MANUAL_DIRTY_LOG_PROTECT2, options)]);
    }
    assert_eq!(Mechanism::Bitmap(Clearing::ByLooking).steps(&NOTHING), []);
}

#[test]
fn what_came_too_late_is_said_at_once() {
    let vcpus = Situation { has_vcpus: true, ..FRESH };
    let slots = Situation { has_slots: true, ..FRESH };
    let (alone, backed) = (Wish::Ring { bytes: 4096 }, Wish::RingWithBitmap { bytes: 4096 });
    assert_eq!(choose(WEAK, vcpus, alone), Err(Refusal::VcpusExist));
    assert_eq!(choose(WEAK, vcpus, backed), Err(Refusal::VcpusExist));
    choose(WEAK, slots, alone).unwrap();
    assert_eq!(choose(WEAK, slots, backed), Err(Refusal::SlotsExist));
    assert_eq!(choose(BOTH, FRESH, backed), Err(Refusal::NoRingWithBitmap));
    let by_hand = Wish::Bitmap(Clearing::ByHandFromAll);
    choose(BOTH, Situation { has_slots: true, ..vcpus }, by_hand).unwrap();
    let offer = Offer { manual_protect: 1, ..BOTH };
    assert_eq!(choose(offer, FRESH, by_hand), Err(Refusal::NoClearingByHand { needed: 3, offered: 1 }));
}

#[test]
fn whoever_writes_outside_a_vcpu_is_logged_or_refused() {
    let kernel = Situation { kernel_devices: true, ..FRESH };
    assert_eq!(choose(WEAK, kernel, Wish::Ring { bytes: 4096 }), Err(Refusal::KernelDevices));
    choose(WEAK, kernel, Wish::RingWithBitmap { bytes: 4096 }).unwrap();
    choose(WEAK, kernel, Wish::Bitmap(Clearing::ByHand)).unwrap();
    let best = negotiate(&BOTH, &kernel, Wish::Best).unwrap();
    assert_eq!(best.mechanism, Mechanism::Bitmap(Clearing::ByHand));
    assert_eq!(best.passed_over, [Refusal::NoRingWithBitmap, Refusal::KernelDevices]);
    let unnoted = Situation { own_writes: OwnWrites::Unnoted, ..FRESH };
    for wish in [
        Wish::Best,
        Wish::Bitmap(Clearing::ByLooking),
        Wish::Ring { bytes: 4096 },
        Wish::RingWithBitmap { bytes: 4096 },
    ] {
        assert_eq!(choose(WEAK, unnoted, wish), Err(Refusal::Unnoted));
        negotiate(&WEAK, &Situation { own_writes: OwnWrites::Noted, ..FRESH }, wish).unwrap();
    }
}

#[test]
fn best_is_what_there_is() {
    let acq_rel = Cap::DIRTY_LOG_RING_ACQ_REL;
    let most = u32::try_from(MOST).unwrap();
    let best = negotiate(&WEAK, &FRESH, Wish::Best).unwrap();
    assert_eq!((best.mechanism, best.passed_over), (ring(acq_rel, most, true), vec![]));
    let best = negotiate(&BOTH, &FRESH, Wish::Best).unwrap();
    assert_eq!((best.mechanism, best.passed_over), (ring(acq_rel, most, false), vec![Refusal::NoRingWithBitmap]));
    let late = Situation { has_vcpus: true, has_slots: true, ..FRESH };
    let best = negotiate(&WEAK, &late, Wish::Best).unwrap();
    assert_eq!(best.mechanism, Mechanism::Bitmap(Clearing::ByHand));
    assert_eq!(best.passed_over, [Refusal::VcpusExist, Refusal::VcpusExist]);
}

/// The calls that are made, and that the first which fails is the last; with a hint where a small ring was refused.
#[test]
fn enabling() {
    let vm = Recorder::new(SoftVm::default_type());
    let offer = Offer::probe(&vm);
    Mechanism::Bitmap(Clearing::ByHand).enable(&vm, &offer).unwrap();
    let call = Call::EnableCap { cap: Cap::MANUAL_DIRTY_LOG_PROTECT2, args: [1, 0, 0, 0] };
    assert_eq!(vm.take(), [call]);

    let cap = Cap::DIRTY_LOG_RING_ACQ_REL;
    vm.fail_nth(2, Errno::EINVAL);
    let error = ring(cap, 4096, true).enable(&vm, &offer).unwrap_err();
    assert_eq!(error, EnableError { cap, value: 4096, errno: Errno::EINVAL });
    assert_eq!(vm.take().len(), 2);
    assert!(error.to_string().ends_with("needs 0x4000)"), "{error}");
    let larger = EnableError { value: 16384, ..error };
    assert!(!larger.to_string().contains("needs"), "{larger}");
    assert_eq!(vm.check_extension(Cap::MANUAL_DIRTY_LOG_PROTECT2), 3);
}
