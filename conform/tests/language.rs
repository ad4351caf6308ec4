//! The text of a scenario.

use cvm_memory_conform::Scenario;

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
        ("vm kind=default vcpus=300", 1, "`300`"),
    ] {
        let error = text.parse::<Scenario>().unwrap_err();
        assert_eq!(error.line, line, "{error}");
        assert!(error.reason.contains(what), "{error}");
    }
}
