//! The model of the RMP: sequences that the kernel's own functions have carried out, the instructions' rules, invariants.

use std::collections::{BTreeMap, BTreeSet};

use cvm_memory::addr::Gfn;
use cvm_memory_sev::rmp::{
    Entry, Failure, Fault, Host, MakePrivateError, PageState, Pfn, Pvalidate, Rmp, RmpUpdate, Size,
};
use cvm_memory_testkit::gfn;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::Value;

const ASID: u32 = 5;

#[test]
fn every_sequence_of_the_kernels_functions() {
    let vectors: Value = serde_json::from_slice(include_bytes!("../../tests/vectors/kernel_vectors.json")).unwrap();
    let (mut sequences, mut operations, mut smashed) = (0, 0, 0);
    for vector in vectors["rmp"].as_array().unwrap() {
        let name = vector["name"].as_str().unwrap();
        let large = vector["large_rmp"].as_bool().unwrap();
        let mut host = if large { Host::with_large_entries() } else { Host::new() };
        for op in vector["ops"].as_array().unwrap() {
            let number = |nr: usize| op[nr].as_u64().unwrap();
            match op[0].as_str().unwrap() {
                "private" => {
                    let result = host.make_private(Pfn(number(1)), gfn(0x10_0000 + number(1)), ASID, number(2));
                    assert_eq!(result.is_ok(), op[3] == 0, "{name}: {op}");
                }
                "shared" => host.reclaim(Pfn(number(1)), number(2)),
                other => panic!("{other}"),
            }
            operations += 1;
        }
        let mut runs: Vec<(u64, u64, u64, u64)> = Vec::new();
        for (Pfn(pfn), entry) in host.rmp().iter() {
            let level = if host.rmp().lookup(Pfn(pfn)).1 == Size::Large { 2 } else { 1 };
            let gpa = entry.gfn.start_byte();
            match runs.last_mut() {
                Some((start, count, same, first))
                    if *start + *count == pfn && *same == level && *first + (*count << 12) == gpa =>
                {
                    *count += 1;
                }
                _ => runs.push((pfn, 1, level, gpa)),
            }
        }
        let parse = |gpa: &Value| u64::from_str_radix(gpa.as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
        let expected: Vec<(u64, u64, u64, u64)> = vector["final"]
            .as_array()
            .unwrap()
            .iter()
            .map(|run| (run[0].as_u64().unwrap(), run[1].as_u64().unwrap(), run[2].as_u64().unwrap(), parse(&run[3])))
            .collect();
        assert_eq!(runs, expected, "{name}");
        let counters = host.counters();
        assert_eq!(counters.rmpupdate, vector["rmpupdate"].as_u64().unwrap(), "{name}");
        assert_eq!(counters.psmash, vector["psmash"].as_u64().unwrap(), "{name}");
        assert_eq!(counters.flushed_bytes, vector["clflush_bytes"].as_u64().unwrap(), "{name}");
        assert_eq!(counters.failed, vector["hw_fail"].as_u64().unwrap(), "{name}");
        (sequences, smashed) = (sequences + 1, smashed + counters.psmash);
    }
    println!("{sequences} sequences, {operations} operations, {smashed} smashed");
    assert!(sequences >= 53 && operations > 1000 && smashed > 30);
}

const fn assign(gfn: Gfn, size: Size) -> RmpUpdate {
    RmpUpdate { assigned: true, gfn, asid: ASID, size, immutable: false }
}

#[test]
fn codes_of_rmpupdate_and_psmash() {
    let mut rmp = Rmp::new();
    assert_eq!(rmp.update(Pfn(1), &assign(gfn(512), Size::Large)), Err(Failure::Input));
    assert_eq!(rmp.update(Pfn(512), &assign(gfn(1), Size::Large)), Err(Failure::Input));
    assert_eq!(rmp.smash(Pfn(512)), Err(Failure::Input));
    rmp.update(Pfn(512), &assign(gfn(1024), Size::Large)).unwrap();
    // Small within large, and the other way round.
    assert_eq!(rmp.update(Pfn(700), &assign(gfn(1), Size::Small)), Err(Failure::Overlap));
    assert_eq!(rmp.update(Pfn(700), &RmpUpdate::unassign(Size::Small)), Err(Failure::Overlap));
    rmp.update(Pfn(1030), &assign(gfn(1), Size::Small)).unwrap();
    assert_eq!(rmp.update(Pfn(1024), &assign(gfn(0), Size::Large)), Err(Failure::Overlap));
    assert_eq!(rmp.smash(Pfn(513)), Err(Failure::Input));
    rmp.set_in_use(Pfn(600), true);
    assert_eq!(rmp.smash(Pfn(512)), Err(Failure::InUse));
    rmp.set_in_use(Pfn(600), false);

    assert_eq!(rmp.validate(Pfn(512), ASID, gfn(1024), Size::Large, true), Ok(Pvalidate::Changed));
    rmp.smash(Pfn(512)).unwrap();
    let entry =
        Entry { gfn: gfn(1024 + 188), asid: ASID, immutable: false, validated: true, vmsa: false, permissions: [0; 3] };
    assert_eq!(rmp.lookup(Pfn(700)), (Some(&entry), Size::Small), "smashing keeps everything else");
    // An update of any kind clears what the guest has done.
    rmp.update(Pfn(700), &assign(gfn(1024 + 188), Size::Small)).unwrap();
    assert_eq!(rmp.state(Pfn(700)), PageState::GuestInvalid);

    rmp.set_in_use(Pfn(700), true);
    assert_eq!(rmp.update(Pfn(700), &RmpUpdate::unassign(Size::Small)), Err(Failure::InUse));
    rmp.set_in_use(Pfn(700), false);
    rmp.update(Pfn(701), &RmpUpdate { immutable: true, ..assign(gfn(9), Size::Small) }).unwrap();
    assert_eq!(rmp.state(Pfn(701)), PageState::PreGuest);
    assert_eq!(rmp.update(Pfn(701), &RmpUpdate::unassign(Size::Small)), Err(Failure::Permission));
    let codes = [Failure::Input, Failure::Permission, Failure::InUse, Failure::Overlap, Failure::SizeMismatch];
    assert_eq!(codes.map(Failure::code), [1, 2, 3, 4, 6]);
}

#[test]
fn what_the_guest_may_do() {
    let mut rmp = Rmp::new();
    rmp.update(Pfn(7), &assign(gfn(70), Size::Small)).unwrap();
    let check = |rmp: &Rmp, asid, at, private, write| rmp.check(Pfn(7), asid, gfn(at), private, write);
    assert_eq!(check(&rmp, ASID, 70, true, false), Err(Fault::NotValidated));
    assert_eq!(rmp.validate(Pfn(7), ASID, gfn(70), Size::Small, true), Ok(Pvalidate::Changed));
    assert_eq!(rmp.validate(Pfn(7), ASID, gfn(70), Size::Small, true), Ok(Pvalidate::NoUpdate));
    assert_eq!(check(&rmp, ASID, 70, true, true), Ok(()));
    assert_eq!(check(&rmp, ASID + 1, 70, true, false), Err(Fault::NotYours));
    assert_eq!(check(&rmp, ASID, 71, true, false), Err(Fault::NotYours));
    assert_eq!(check(&rmp, ASID, 70, false, true), Err(Fault::Assigned));
    assert_eq!(check(&rmp, ASID, 70, false, false), Ok(()));
    assert_eq!(rmp.check(Pfn(8), ASID, gfn(70), true, false), Err(Fault::NotYours));

    let large = |rmp: &mut Rmp, at| rmp.validate(Pfn(at), ASID, gfn(70), Size::Large, true);
    assert_eq!(large(&mut rmp, 7), Ok(Pvalidate::Failed(Failure::Input)), "not aligned");
    rmp.update(Pfn(512), &assign(gfn(512), Size::Small)).unwrap();
    let mismatch = rmp.validate(Pfn(512), ASID, gfn(512), Size::Large, true);
    assert_eq!(mismatch, Ok(Pvalidate::Failed(Failure::SizeMismatch)), "Linux then validates each page by itself");
    rmp.update(Pfn(1024), &assign(gfn(1024), Size::Large)).unwrap();
    let small = rmp.validate(Pfn(1030), ASID, gfn(1030), Size::Small, true);
    assert_eq!(small, Err(Fault::Size), "the host has to smash");

    let adjust = |rmp: &mut Rmp, vmpl, vmsa| rmp.adjust(Pfn(7), ASID, gfn(70), Size::Small, (vmpl, 0xf, vmsa));
    assert_eq!(adjust(&mut rmp, 0, true), Ok(Err(Failure::Permission)));
    assert_eq!(adjust(&mut rmp, 4, true), Ok(Err(Failure::Input)));
    assert_eq!(adjust(&mut rmp, 1, true), Ok(Ok(())));
    assert_eq!(rmp.lookup(Pfn(7)).0.map(|entry| (entry.vmsa, entry.permissions)), Some((true, [0xf, 0, 0])));
    assert_eq!(rmp.validate(Pfn(7), ASID, gfn(70), Size::Small, false), Err(Fault::NotYours), "a save area");
    let invalid = rmp.adjust(Pfn(512), ASID, gfn(512), Size::Small, (1, 0, false));
    assert_eq!(invalid, Err(Fault::NotValidated));
}

#[test]
fn the_first_address_stays() {
    let mut host = Host::new();
    assert_eq!(host.make_private(Pfn(3), gfn(30), ASID, 512), Err(MakePrivateError::NotOnePage));
    host.make_private(Pfn(3), gfn(30), ASID, 1).unwrap();
    // Bound elsewhere without a hole in between: KVM notices nothing, and the guest faults for ever.
    host.make_private(Pfn(3), gfn(99), ASID, 1).unwrap();
    assert_eq!(host.rmp().check(Pfn(3), ASID, gfn(99), true, false), Err(Fault::NotYours));
    host.reclaim(Pfn(3), 1);
    assert_eq!(host.rmp().state(Pfn(3)), PageState::Hypervisor);
    host.make_private(Pfn(3), gfn(99), ASID, 1).unwrap();
    assert_eq!(host.rmp().check(Pfn(3), ASID, gfn(99), true, false), Err(Fault::NotValidated));
}

#[derive(Debug, Clone)]
enum Op {
    Private { pfn: u64, pages: u64 },
    Reclaim { pfn: u64, pages: u64 },
    Validate { pfn: u64, large: bool, to: bool },
}

fn op() -> impl Strategy<Value = Op> {
    let pages = 1024_u64 + 512;
    prop_oneof![
        3 => (0..pages, prop_oneof![Just(1_u64), Just(512)]).prop_map(|(pfn, pages)| Op::Private { pfn, pages }),
        2 => (0..pages, 1..700_u64).prop_map(|(pfn, pages)| Op::Reclaim { pfn, pages }),
        2 => (0..pages, any::<bool>(), any::<bool>()).prop_map(|(pfn, large, to)| Op::Validate { pfn, large, to }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Against a page-by-page account: what is assigned, what is validated, what is large; and the host provokes no failure.
    #[test]
    fn invariants_of_the_host(ops in vec(op(), 0..40), large in any::<bool>()) {
        let mut host = if large { Host::with_large_entries() } else { Host::new() };
        let mut expected: BTreeMap<u64, bool> = BTreeMap::new();
        let mut blocks: BTreeSet<u64> = BTreeSet::new();
        for op in ops {
            match op {
                Op::Private { pfn, pages } => {
                    let result = host.make_private(Pfn(pfn), gfn(0x10_0000 + pfn), ASID, pages);
                    prop_assert_eq!(result.is_ok(), pages == 1 || large);
                    if result.is_ok() && !expected.contains_key(&pfn) {
                        let block = pfn / 512;
                        if pages == 512 && (block * 512..(block + 1) * 512).all(|page| !expected.contains_key(&page)) {
                            blocks.insert(block);
                            expected.extend((block * 512..(block + 1) * 512).map(|page| (page, false)));
                        } else {
                            expected.insert(pfn, false);
                        }
                    }
                }
                Op::Reclaim { pfn, pages } => {
                    host.reclaim(Pfn(pfn), pages);
                    // Only blocks of which some page that is touched stays in part are smashed; the others go whole.
                    blocks.retain(|block| block * 512 >= pfn + pages || (block + 1) * 512 <= pfn);
                    expected.retain(|page, _| !(pfn..pfn + pages).contains(page));
                }
                Op::Validate { pfn, large, to } => {
                    let pfn = if large { pfn & !511 } else { pfn };
                    let size = if large { Size::Large } else { Size::Small };
                    let result = host.rmp_mut().validate(Pfn(pfn), ASID, gfn(0x10_0000 + pfn), size, to);
                    let expected_result = match expected.get(&pfn) {
                        None => Err(Fault::NotYours),
                        Some(_) if blocks.contains(&(pfn / 512)) && !large => Err(Fault::Size),
                        Some(_) if !blocks.contains(&(pfn / 512)) && large => Ok(Pvalidate::Failed(Failure::SizeMismatch)),
                        Some(before) if *before == to => Ok(Pvalidate::NoUpdate),
                        Some(_) => Ok(Pvalidate::Changed),
                    };
                    prop_assert_eq!(result, expected_result);
                    if result.is_ok_and(|done| !matches!(done, Pvalidate::Failed(_))) {
                        let pages = if large { pfn..pfn + 512 } else { pfn..pfn + 1 };
                        expected.extend(pages.map(|page| (page, to)));
                    }
                }
            }
            let found: BTreeMap<u64, bool> = host.rmp().iter().map(|(pfn, entry)| (pfn.0, entry.validated)).collect();
            prop_assert_eq!(&found, &expected);
            // One page per frame of a guest, one frame per page.
            let frames: BTreeSet<Gfn> = host.rmp().iter().map(|(_, entry)| entry.gfn).collect();
            prop_assert_eq!(frames.len(), expected.len());
            for block in 0..4 {
                prop_assert_eq!(host.rmp().lookup(Pfn(block * 512)).1 == Size::Large, blocks.contains(&block));
            }
            prop_assert_eq!(host.counters().failed, 0);
        }
    }
}
