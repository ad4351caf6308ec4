//! The TDX platform of [`cvm_memory`].
//!
//! This crate is for everything that the generic crate must not name: the measured build of a TD, MapGPA and a model of
//! the secure EPT for the software KVM. It holds none of that yet: it fixes the crate's place in the workspace, so that
//! the generic crate can be kept free of vendors from the start.
