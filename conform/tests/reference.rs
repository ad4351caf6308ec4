//! The interpreter of the contract against the software KVM, and against the kernel where there is one.
//!
//! Hand-made scenarios say themselves what the contract has to come to; random ones are compared only.

use cvm_memory::hypervisor::Cap;
use cvm_memory::hypervisor::kvm::KvmVm;
use cvm_memory_conform::differences::Differences;
use cvm_memory_conform::live::kvm::platform;
use cvm_memory_conform::machine::{Machine, Shape};
use cvm_memory_conform::scenario::{Area, Descriptor, File, Hva, Kind};
use cvm_memory_conform::{Live, Operation, Reference, Scenario, Step, play};
use cvm_memory_testkit::skip;
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};

const PAGE: u64 = 4096;
const VCPUS: u8 = 2;

/// Plays on the interpreter and on the software KVM.
fn on_soft(scenario: &Scenario) -> Result<(), String> {
    let shape = Shape { kind: scenario.kind, vcpus: scenario.vcpus, physical_bits: 46 };
    compare(scenario, shape, &mut Live::soft(shape), &Differences::default())
}

/// Plays on the interpreter and on the kernel; `known` is what this one is known to do differently.
fn on_kvm(scenario: &Scenario, known: &Differences) -> Result<(), String> {
    let mut live = Live::kvm(&skip::dev_kvm().expect("it was there before"), scenario.kind, scenario.vcpus);
    compare(scenario, live.shape(), &mut live, known)
}

fn compare(scenario: &Scenario, shape: Shape, live: &mut dyn Machine, known: &Differences) -> Result<(), String> {
    let mut reference = Reference::new(shape);
    play(scenario, shape, &mut [live, &mut reference], known)
        .map(drop)
        .map_err(|difference| format!("{difference}in\n{scenario}"))
}

/// What the kernel does differently, if it has VMs of that kind whose files can be mapped.
fn kernel(kind: Kind) -> Option<Differences> {
    let vm: KvmVm = skip::kvm(platform(kind)?)?;
    skip::require(&vm, Cap::GUEST_MEMFD_FLAGS, 1)?;
    Some(Differences::probe(&vm))
}

/// Scenarios of a file, separated by their first lines.
fn book() -> Vec<Scenario> {
    let text = include_str!("reference.txt");
    text.split("\nvm ")
        .skip(1)
        .map(|one| format!("vm {one}").parse().unwrap_or_else(|error| panic!("{error} in {one}")))
        .collect()
}

#[test]
fn hand_made_scenarios_come_to_what_the_contract_says() {
    let differences: Vec<String> = book().iter().filter_map(|scenario| on_soft(scenario).err()).collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn the_kernel_plays_the_hand_made_scenarios_so() {
    let mut differences = Vec::new();
    for kind in [Kind::Default, Kind::Protected] {
        let Some(known) = kernel(kind) else { continue };
        differences.extend(
            book()
                .iter()
                .filter(|scenario| scenario.kind == kind)
                .filter_map(|scenario| on_kvm(scenario, &known).err()),
        );
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn random_default() {
    random(Kind::Default, 300, on_soft);
}

#[test]
fn random_protected() {
    random(Kind::Protected, 300, on_soft);
}

#[test]
fn random_tagged() {
    random(Kind::Tagged, 300, on_soft);
}

#[test]
fn random_on_the_kernel() {
    for kind in [Kind::Default, Kind::Protected] {
        if let Some(known) = kernel(kind) {
            random(kind, 25, |scenario| on_kvm(scenario, &known));
        }
    }
}

fn random(kind: Kind, cases: u32, compare: impl Fn(&Scenario) -> Result<(), String>) {
    let cases = std::env::var("CVM_SCENARIOS").ok().and_then(|cases| cases.parse().ok()).unwrap_or(cases);
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let steps = prop::collection::vec(operation(), 1..40);
    let result = TestRunner::new(config).run(&steps, |operations| {
        let steps = operations.into_iter().map(Step::from).collect();
        compare(&Scenario { kind, vcpus: VCPUS, steps }).map_err(TestCaseError::fail)
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// Pages close together, so that things meet, and now and then an address in between.
fn gpa() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0x100..0x110_u64).prop_map(|page| page * PAGE),
        1 => (0x100..0x110_u64, prop::sample::select(vec![1, 8, 0xff9, 0xfff])).prop_map(|(page, offset)| page * PAGE + offset),
    ]
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![12 => (1..6_u64).prop_map(|pages| pages * PAGE), 1 => Just(0), 1 => Just(1), 1 => Just(u64::MAX - 0xfff)]
}

/// Where in a file: near its start, or near the end of everything.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        12 => (0..6_u64).prop_map(|pages| pages * PAGE),
        1 => Just(1),
        1 => prop::sample::select(vec![(1 << 63) - PAGE, 1 << 63, u64::MAX - 0xfff]),
    ]
}

fn file() -> impl Strategy<Value = File> {
    (0..3_u8).prop_map(File)
}

fn hva() -> impl Strategy<Value = Hva> {
    let area =
        prop_oneof![4 => (0..2_u8).prop_map(Area::Memory), 3 => file().prop_map(Area::File), 1 => Just(Area::Void)];
    let near = (area, 0..6_u64).prop_map(|(area, page)| Hva::In(area, page * PAGE));
    let at_the_end = (0..2_u8).prop_map(|index| Hva::In(Area::Memory(index), 62 * PAGE));
    prop_oneof![12 => near, 2 => at_the_end, 1 => Just(Hva::In(Area::Memory(0), 8)), 1 => Just(Hva::Raw(1 << 63))]
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    prop_oneof![
        12 => file().prop_map(Descriptor::File),
        1 => Just(Descriptor::None),
        1 => Just(Descriptor::Memfd),
        1 => Just(Descriptor::Foreign),
    ]
}

/// Where an access begins: often right before the end of a page.
fn access() -> impl Strategy<Value = u64> {
    (0xff..0x111_u64, prop::sample::select(vec![0, 0x10, 0xff8, 0xffc, 0xffd, 0xfff]))
        .prop_map(|(page, offset)| page * PAGE + offset)
}

fn operation() -> impl Strategy<Value = Operation> {
    let slot = prop_oneof![20 => 0..4_u32, 1 => Just(0x1_0001), 1 => Just(0x2_0000), 1 => Just(32764)];
    let flags = prop_oneof![8 => Just(4_u32), 6 => Just(0), 3 => Just(1), 3 => Just(2), 1 => 0..16_u32];
    let len = prop::sample::select(vec![1_u8, 2, 4, 8]);
    prop_oneof![
        3 => (file(), 1..9_u64, 0..4_u64).prop_map(|(file, pages, flags)| Operation::Create { file, size: pages * PAGE, flags }),
        1 => (file(), any::<u64>(), 0..8_u64).prop_map(|(file, size, flags)| Operation::Create { file, size: size | 1, flags }),
        1 => file().prop_map(|file| Operation::Close { file }),
        2 => file().prop_map(|file| Operation::Map { file }),
        10 => (slot.clone(), flags, gpa(), size(), hva(), descriptor(), offset()).prop_map(
            |(slot, flags, gpa, size, hva, file, offset)| Operation::Region { slot, flags, gpa, size, hva, file, offset }
        ),
        2 => slot.prop_map(Operation::delete),
        5 => (gpa(), size(), prop_oneof![6 => Just(8_u64), 5 => Just(0), 1 => 1..16_u64], prop_oneof![12 => Just(0_u64), 1 => Just(1)])
            .prop_map(|(gpa, size, attributes, flags)| Operation::Attributes { gpa, size, attributes, flags }),
        4 => (file(), prop_oneof![4 => Just(3_u32), 2 => Just(1), 1 => 0..0x200_u32], offset(), size())
            .prop_map(|(file, mode, offset, len)| Operation::Fallocate { file, mode, offset, len }),
        1 => (prop::sample::select(vec![168_u32, 201, 204, 225]), prop::sample::select(vec![0_u64, 1, 2, 3, 0x1000, 0x1001]))
            .prop_map(|(cap, arg)| Operation::EnableCap { cap, arg }),
        2 => (0..VCPUS, gpa(), size(), prop_oneof![12 => Just(0_u64), 1 => Just(1)])
            .prop_map(|(vcpu, gpa, size, flags)| Operation::Prefault { vcpu, gpa, size, flags }),
        1 => (hva(), 0..0x3000_u64).prop_map(|(at, len)| Operation::HostRead { at, len }),
        2 => (hva(), 0..0x3000_u64, any::<u8>()).prop_map(|(at, len, byte)| Operation::HostFill { at, len, byte }),
        6 => (0..VCPUS, access(), len.clone(), any::<bool>())
            .prop_map(|(vcpu, gpa, len, private)| Operation::Load { vcpu, gpa, len, private }),
        8 => (0..VCPUS, access(), len, any::<u64>(), any::<bool>())
            .prop_map(|(vcpu, gpa, len, value, private)| Operation::Store { vcpu, gpa, len, value, private }),
        2 => (0..VCPUS, access(), any::<bool>()).prop_map(|(vcpu, gpa, private)| Operation::Fetch { vcpu, gpa, private }),
        1 => (0..VCPUS, gpa(), prop_oneof![Just(0_u64), Just(1), Just(u64::MAX), Just(1 << 52)], 0..32_u64, prop::sample::select(vec![0_u64, 11, 22, 1 << 40]))
            .prop_map(|(vcpu, gpa, pages, attributes, answer)| Operation::MapGpaRange { vcpu, gpa, pages, attributes, answer }),
    ]
}
