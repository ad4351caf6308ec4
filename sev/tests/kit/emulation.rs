//! What the lab's emulated firmware and RMP say of themselves; and a VM of type 4, or a skip.
#![allow(unused_imports, reason = "each test program uses its part")]

pub use cvm_memory_testkit::snp::{Emulation, Line, snp_vm};
