//! Guest memory of confidential VMs: guest_memfd, memslots, page state, conversions, and a software KVM to test it all.
//!
//! A launcher builds a [`CvmMemory`](memory::CvmMemory) on a VM, gives each vCPU thread a
//! [`VcpuExits`](exits::VcpuExits), and hands it the exits it does not know. Below that facade every part can be used by
//! itself:
//!
//! | module | what it is |
//! |---|---|
//! | [`addr`] | frames, file pages and ranges of them: all arithmetic |
//! | [`page_set`] | a concurrent set of frames with wait-free reads |
//! | [`gmem`] | one guest_memfd |
//! | [`layout`] | slots, bindings, clipping, look-ups |
//! | [`backing`] | the memory behind the slots |
//! | [`hypervisor`] | the seam to KVM, and the real one behind it |
//! | [`soft`] | the software KVM |
//! | [`dirty`] | which memory was written |
//! | [`convert`] | page state changes: request, plan, commit |
//! | [`gate`] | keeps vCPUs out while memory is in flux |
//! | [`edit`] | changes of the layout: draft, plan, commit |
//! | [`prefault`] | memory ahead of use |
//! | [`memory`] | the facade |
//! | [`exits`] | from a vCPU's exit to what the VMM must do |
//! | [`view`] | what devices see, through `vm-memory`'s traits |
//! | [`stats`] | counters |
//!
//! Addresses and sizes are in bytes where they are called so (`gpa`, `size`, `bytes`), else in pages of 4096 bytes; ranges
//! are half-open. This crate names no vendor: what is particular to one is in a crate of its own that plugs into the
//! hypervisor seam and into the software KVM.
//!
//! What is not here: slots of address spaces other than 0 (system management mode), which [`edit`] can plan and [`memory`] does
//! not make; dirty tracking of memory that can be private, for which KVM has no mechanism; conversion in place, of a guest_memfd
//! that is mapped; migration of private contents.
//!
//! What has run where: the software KVM is a model; the real KVM was run on Linux 7.3 under emulation, and default VMs on an
//! ordinary host. Nothing has run on confidential-computing hardware.
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing
    )
)]

pub mod addr;
pub mod backing;
pub mod convert;
pub mod dirty;
pub mod edit;
pub mod exits;
pub mod gate;
pub mod gmem;
pub mod hypervisor;
pub mod layout;
pub mod memory;
pub mod page_set;
pub mod prefault;
pub mod soft;
pub mod stats;
mod sync;
pub mod view;
mod words;

#[doc = include_str!("../README.md")]
#[cfg(doctest)]
#[allow(missing_debug_implementations)]
pub struct ReadmeSample;
