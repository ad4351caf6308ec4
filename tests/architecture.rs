//! The shape of the house: imports point one way, no vendor is named where none may be, unsafe code stays in few rooms.
//!
//! Read off the sources as text, so that a change of shape is a change of this file, and is seen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms of the generic crate, from the ground up: each may use those before it, and itself.
const LAYERS: &[&str] = &[
    "sync",
    "words",
    "addr",
    "page_set",
    "gmem",
    "stats",
    "layout",
    "backing",
    "hypervisor",
    "soft",
    "dirty",
    "convert",
    "gate",
    "edit",
    "prefault",
    "memory",
    "exits",
    "view",
];

/// Words of platforms that the generic crate must not know.
const VENDORS: &[&str] = &["sev", "snp", "tdx", "amd", "intel", "rmp", "sept", "ghcb", "vmsa", "tdvf", "ovmf", "arm"];

/// Files in which unsafe code is allowed, and no others.
const UNSAFE: &[&str] = &[
    "src/backing/shared.rs",
    "src/gate/signal.rs",
    "src/gmem/residency.rs",
    "src/hypervisor/dirty_log.rs",
    "src/hypervisor/kvm/exit.rs",
    "src/hypervisor/kvm/gmem.rs",
    "src/hypervisor/kvm/raw.rs",
    "src/hypervisor/kvm/ring.rs",
    "src/hypervisor/kvm/vcpu.rs",
    "src/hypervisor/kvm/vm.rs",
    "src/hypervisor/mod.rs",
    "src/memory/slots.rs",
    "src/soft/hypervisor.rs",
    "src/view/mod.rs",
    "src/words.rs",
];

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_path_buf(), text));
            }
        }
    }
    found.sort();
    found
}

/// The text without comments, so that prose may refer to what code may not.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// The names that follow `prefix` in the code: `crate::a` and `crate::{a, b::c}` alike.
fn imported<'a>(code: &'a str, prefix: &str) -> BTreeSet<&'a str> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            None => names.extend(words(rest).next()),
            Some(list) => {
                let (mut depth, mut name) = (0, true);
                for (at, c) in list.char_indices() {
                    match c {
                        '}' if depth == 0 => break,
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 0 => name = true,
                        _ if name && (c.is_alphanumeric() || c == '_') => {
                            names.extend(words(&list[at..]).next());
                            name = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    names
}

fn room(path: &Path) -> Option<&str> {
    let part = path.components().nth(1)?.as_os_str().to_str()?;
    Some(part.strip_suffix(".rs").unwrap_or(part))
}

#[test]
fn imports_point_down_only() {
    for (path, text) in sources("src") {
        let Some(room) = room(&path).filter(|room| *room != "lib") else { continue };
        let own = LAYERS.iter().position(|layer| *layer == room);
        let own = own.unwrap_or_else(|| panic!("{} is in no layer", path.display()));
        for name in imported(&code(&text), "crate::") {
            let Some(other) = LAYERS.iter().position(|layer| *layer == name) else { continue };
            assert!(other <= own, "{}: {room} must not use {name}", path.display());
        }
    }
}

#[test]
fn every_layer_exists() {
    let rooms: BTreeSet<String> = sources("src").iter().filter_map(|(path, _)| room(path).map(String::from)).collect();
    let listed: BTreeSet<String> = LAYERS.iter().map(|layer| (*layer).to_owned()).chain(["lib".to_owned()]).collect();
    assert_eq!(rooms, listed);
}

/// Within a room, files that stand side by side import each other in one direction.
#[test]
fn no_cycles_between_neighbouring_files() {
    let mut edges: BTreeMap<PathBuf, BTreeSet<PathBuf>> = BTreeMap::new();
    let files = sources("src");
    for (path, text) in files.iter().filter(|(path, _)| !path.ends_with("tests.rs") && !path.ends_with("mod.rs")) {
        let folder = path.parent().unwrap();
        let code = code(text);
        let neighbours = imported(&code, "super::")
            .into_iter()
            .flat_map(|name| [folder.join(format!("{name}.rs")), folder.join(name).join("mod.rs")]);
        let known = neighbours.filter(|other| other != path && files.iter().any(|(path, _)| path == other));
        edges.entry(path.clone()).or_default().extend(known);
    }
    assert!(edges.values().map(BTreeSet::len).sum::<usize>() > 20, "the imports were not found");
    // Take away files that import nothing that is left, or that nothing left imports, until none is, or a cycle is.
    while !edges.is_empty() {
        let imported: BTreeSet<PathBuf> = edges.values().flatten().cloned().collect();
        let free: Vec<PathBuf> = edges
            .iter()
            .filter(|(path, to)| !imported.contains(*path) || to.iter().all(|other| !edges.contains_key(other)))
            .map(|(path, _)| path.clone())
            .collect();
        assert!(!free.is_empty(), "a cycle among {edges:#?}");
        for path in free {
            edges.remove(&path);
        }
    }
}

#[test]
fn the_generic_crate_names_no_vendor() {
    for (path, text) in sources("src") {
        for word in words(&text) {
            for part in word.to_lowercase().split('_') {
                assert!(!VENDORS.contains(&part), "{} says {word}", path.display());
            }
        }
    }
}

#[test]
fn unsafe_code_stays_where_it_is_allowed() {
    let unsafe_files: Vec<String> = sources("src")
        .into_iter()
        .filter(|(path, text)| !path.ends_with("tests.rs") && words(&code(text)).any(|word| word == "unsafe"))
        .map(|(path, _)| path.to_str().unwrap().to_owned())
        .collect();
    assert_eq!(unsafe_files, UNSAFE);
}

#[test]
fn files_can_be_read_in_one_sitting() {
    for (path, text) in
        ["src", "sev/src", "tdx/src", "testkit/src", "tests", "examples", "benches"].map(sources).concat()
    {
        let lines = text.lines().count();
        assert!(lines <= 600, "{} has {lines} lines", path.display());
    }
}

#[test]
fn the_sources_speak_of_the_project_alone() {
    for folder in ["src", "sev/src", "tdx/src", "testkit/src", "tests", "examples", "benches"] {
        for (path, text) in sources(folder) {
            assert!(!text.contains(concat!("/", "work/")), "{} names a path of some machine", path.display());
        }
    }
}

/// The patch of the lab's kernel has another licence than the crate.
#[test]
fn the_labs_kernel_is_not_packaged() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let excluded = manifest.lines().filter_map(|line| line.strip_prefix("exclude = "));
    assert!(excluded.flat_map(|list| list.split('"')).any(|path| path == "/tests/lab"));
}

/// The table of rules in ARCHITECTURE.md names files and tests that exist.
#[test]
fn the_map_names_what_is_there() {
    let map = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    let all = ["src", "tests", "benches", "sev", "tdx", "conform"].map(sources).concat();
    let (mut files, mut tests) = (0, 0);
    for line in map.lines().filter(|line| line.starts_with("| ")) {
        let mut file = None;
        for name in line.split('`').skip(1).step_by(2) {
            if name.ends_with(".rs") && !name.contains('*') {
                let path =
                    all.iter().find(|(path, _)| *path == Path::new(name) || *path == Path::new("src").join(name));
                file = Some(path.unwrap_or_else(|| panic!("{name} does not exist")));
                files += 1;
            } else if let Some((path, text)) = file
                && name.len() > 8
                && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            {
                assert!(text.contains(&format!("fn {name}")), "{} has no {name}", path.display());
                tests += 1;
            }
        }
    }
    assert!(files > 30 && tests > 30, "only {files} files and {tests} tests were found");
}
