//! Edits of a TD's layout: deleting a slot takes the private pages behind it away for good, so none is deleted unasked.

mod td_kit;

use cvm_memory::edit::Hazard;
use cvm_memory::memory::{CommitOptions, EditError};
use cvm_memory::soft::OpResult;
use cvm_memory_tdx::model::accept as accepted;
use cvm_memory_tdx::model::sept::{Sept, SeptState};
use td_kit::*;

#[test]
fn private_pages_are_not_lost_unasked() {
    let mut td = Running::new(4 * MIB);
    assert_eq!(td.accept(5 * PAGE, 0), accepted::SUCCESS);
    assert_eq!(td.run(fill(5 * PAGE, PAGE, 0x5a, true)), Ok(OpResult::Done));
    td.td.arch().with_sept(Sept::record);

    let memory = td.memory.clone();
    let mut edit = memory.edit();
    edit.split(2 * MIB).unwrap();
    let error = edit.commit(&CommitOptions::default()).unwrap_err();
    assert!(matches!(error, EditError::Hazard(Hazard::LosesPrivate { .. })), "{error}");
    assert_eq!(td.td.arch().with_sept(Sept::take_log), [], "refused before anything was done");
    assert_eq!(td.run(check(5 * PAGE, PAGE, 0x5a, true)), Ok(OpResult::Done));

    // Whoever insists gets it: the page is gone, and has to be accepted anew.
    let mut edit = memory.edit();
    edit.split(2 * MIB).unwrap();
    edit.commit(&CommitOptions { lose_private: true, ..CommitOptions::default() }).unwrap();
    assert_eq!(td.state(5), None);
    assert_eq!(td.accept(5 * PAGE, 0), accepted::SUCCESS);
    assert_eq!(td.state(5), Some(SeptState::Present));
    assert_eq!(td.run(check(5 * PAGE, PAGE, 0, true)), Ok(OpResult::Done));
}

/// Memory that the guest has shared is another matter.
#[test]
fn shared_memory_moves_freely() {
    let mut td = Running::new(4 * MIB);
    assert_eq!(td.map_gpa(1 << 47, 4 * MIB).0, 0);
    let memory = td.memory.clone();
    let mut edit = memory.edit();
    edit.split(2 * MIB).unwrap();
    edit.commit(&CommitOptions::default()).unwrap();
}
