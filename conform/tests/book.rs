//! The book, played on the software KVM, and on `/dev/kvm` as far as that has the kind of VM.
//!
//! A scenario's expectations are what its source says, so each machine is held against the book and not against the other.
//! Only what an older kernel is known to do differently, by name, is explained by playing beside the software KVM.

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use cvm_memory_conform::book::{self, Entry};
use cvm_memory_conform::differences::Differences;
use cvm_memory_conform::library::{self, LibraryScenario};
use cvm_memory_conform::live::kvm::Offer;
use cvm_memory_conform::machine::{Machine, Shape};
use cvm_memory_conform::scenario::Kind;
use cvm_memory_conform::{Live, Reference, Scenario, play};

/// As most processors have; any number that the guests of the book fit into.
const PHYSICAL_BITS: u32 = 46;

fn parsed<S: std::str::FromStr<Err = cvm_memory_conform::scenario::ParseError>>(entry: &Entry) -> S {
    entry.text.parse().unwrap_or_else(|error| panic!("{}: {error}", entry.name))
}

/// Plays every entry, and says at the end which went wrong.
fn each(chapter: &[Entry], mut play: impl FnMut(&Entry) -> Result<(), String>) {
    let mut failed = String::new();
    for entry in chapter {
        match catch_unwind(AssertUnwindSafe(|| play(entry))) {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => failed += &format!("{}: {reason}\n", entry.name),
            Err(_) => failed += &format!("{}: a panic, see above\n", entry.name),
        }
    }
    assert!(failed.is_empty(), "\n{failed}");
}

#[test]
fn kvm_scenarios_on_soft() {
    each(book::KVM, |entry| {
        let scenario: Scenario = parsed(entry);
        let shape = Shape { kind: scenario.kind, vcpus: scenario.vcpus, physical_bits: PHYSICAL_BITS };
        let (mut soft, mut reference) = (Live::soft(shape), Reference::new(shape));
        let machines: &mut [&mut dyn Machine] = &mut [&mut soft, &mut reference];
        let played = play(&scenario, shape, machines, &Differences::default(), |_, _| {});
        println!("{}: {played:?}", entry.name);
        played.map(drop).map_err(|it| it.to_string())
    });
}

/// The kinds that this KVM has; the others are skipped, a line each.
fn kinds() -> Vec<Offer> {
    [Kind::Default, Kind::Protected].into_iter().filter_map(Offer::of).collect()
}

#[test]
fn kvm_scenarios_on_kvm() {
    let kinds = kinds();
    each(book::KVM, |entry| {
        let scenario: Scenario = parsed(entry);
        let Some(Offer { kvm, known, .. }) = kinds.iter().find(|offer| offer.shape.kind == scenario.kind) else {
            return Ok(());
        };
        let mut kvm = Live::kvm(kvm, scenario.kind, scenario.vcpus);
        let shape = kvm.shape();
        let mut soft = Live::soft(shape);
        let mut machines: Vec<&mut dyn Machine> = vec![&mut kvm];
        // Beside it, what it does differently is told apart from what it does wrong.
        if !known.found().is_empty() {
            machines.push(&mut soft);
        }
        let played = play(&scenario, shape, &mut machines, known, |_, _| {}).map_err(|it| it.to_string())?;
        println!("{}: {} operations, {} explained", entry.name, played.operations, played.explained);
        Ok(())
    });
}

#[test]
fn library_scenarios_on_soft() {
    each(book::LIBRARY, |entry| {
        let scenario: LibraryScenario = parsed(entry);
        let shape = Shape { kind: scenario.kind, vcpus: scenario.vcpus, physical_bits: PHYSICAL_BITS };
        let operations = library::play(&scenario, Live::soft(shape))?;
        println!("{}: {operations} operations", entry.name);
        Ok(())
    });
}

#[test]
fn library_scenarios_on_kvm() {
    let kinds = kinds();
    each(book::LIBRARY, |entry| {
        let scenario: LibraryScenario = parsed(entry);
        let Some(Offer { kvm, .. }) = kinds.iter().find(|offer| offer.shape.kind == scenario.kind) else {
            return Ok(());
        };
        let operations = library::play(&scenario, Live::kvm(kvm, scenario.kind, scenario.vcpus))?;
        println!("{}: {operations} operations", entry.name);
        Ok(())
    });
}

/// No file is forgotten. Where there is no tree, there is nothing to be forgotten in.
#[test]
fn the_book_is_whole() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("book");
    for (chapter, entries) in [("kvm", book::KVM), ("library", book::LIBRARY)] {
        let Ok(files) = fs::read_dir(folder.join(chapter)) else { return };
        let files: BTreeSet<String> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        let names: BTreeSet<String> = entries.iter().map(|entry| format!("{}.scn", entry.name)).collect();
        assert_eq!(names, files, "{chapter}");
    }
}

/// Text, data, and the same data again.
#[test]
fn the_book_can_be_printed() {
    for entry in book::KVM {
        let scenario: Scenario = parsed(entry);
        assert_eq!(scenario.to_string().parse::<Scenario>().unwrap(), scenario, "{}", entry.name);
    }
    for entry in book::LIBRARY {
        let scenario: LibraryScenario = parsed(entry);
        assert_eq!(scenario.to_string().parse::<LibraryScenario>().unwrap(), scenario, "{}", entry.name);
    }
}
