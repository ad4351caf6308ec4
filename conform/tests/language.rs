//! The text of a scenario.

use cvm_memory_conform::Scenario;
use cvm_memory_conform::library::LibraryScenario;

#[test]
fn words_that_are_none_are_refused_with_their_line() {
    for (text, line, what) in [
        ("", 0, "`vm`"),
        ("create file=f0", 1, "`vm`"),
        ("vm kind=default", 1, "`vcpus` is missing"),
        ("vm kind=default vcpus=1\n\njump gpa=0", 3, "`jump`"),
        ("vm kind=default vcpus=1\nclose file=g0", 2, "`g0`"),
        ("vm kind=default vcpus=1\nclose file=f0 gpa=1", 2, "`gpa`"),
        ("vm kind=default vcpus=1\n= ok", 2, "nothing"),
        ("vm kind=default vcpus=1\nclose file=f0\n| ok", 3, "nothing was expected"),
        ("vm kind=default vcpus=1\nclose file=f0\n= ok\n= ok", 4, "second"),
        ("vm kind=default vcpus=300", 1, "`300`"),
    ] {
        let error = text.parse::<Scenario>().unwrap_err();
        assert_eq!(error.line, line, "{error}");
        assert!(error.reason.contains(what), "{error}");
    }
}

/// The library's table knows its own words, and those of the VM below it.
#[test]
fn words_of_the_library() {
    for (line, what) in [
        ("convert gpa=0 size=0x1000 to=nowhere", "`nowhere`"),
        ("fail call=luck nth=1 errno=EIO", "`luck`"),
        ("fail call=map nth=1 errno=EFOO", "`EFOO`"),
        ("discard policy=deferred", "`deferred`"),
        ("close file=g0", "`g0`"),
        ("jump", "`jump`"),
    ] {
        let error = format!("vm kind=protected vcpus=1\n{line}").parse::<LibraryScenario>().unwrap_err();
        assert!(error.line == 2 && error.reason.contains(what), "{error}");
    }
    for line in [
        "convert gpa=0x0 size=0x1000 to=private",
        "fail call=prefault nth=2 errno=EAGAIN",
        "discard policy=deferred:0x8000",
        "slot id=any flags=0 gpa=0x1000 size=0x1000 memory=b0 from=0 file=none offset=0",
        "load vcpu=0 gpa=0x1000 len=1 private=no",
    ] {
        let text = format!("vm kind=protected vcpus=1\n{line}\n= ok\n| more\n| and more\n");
        let scenario: LibraryScenario = text.parse().unwrap();
        assert_eq!(scenario.steps[0].expected.as_deref(), Some("ok\nmore\nand more"));
        assert_eq!(scenario.to_string(), text.replace("gpa=0x0 ", "gpa=0 "));
    }
}
