//! Accesses to memory that KVM took for device input or output.
//!
//! KVM emulates an access to a frame without a slot, and leaves it to userspace: a write has retired when userspace hears of
//! it, a read waits for its data; neither can be repeated. So if it was memory whose slot was being replaced, it is
//! completed here, on the memory itself, once that is over. A write to a read-only slot comes the same way and is a device's
//! business, as is everything that is not memory. Mirrors `emulator_read_write()` and `write_exit_mmio()` in
//! `arch/x86/kvm/x86.c`.

use crate::addr::{GfnRange, Gpa};
use crate::convert::PinError;
use crate::hypervisor::Mmio;
use crate::layout::SlotFlags;
use crate::memory::{AccessError, CvmMemory};

/// What an access came to.
pub(super) enum Access {
    /// It was to memory, and has been done.
    Completed,
    /// It was to memory, of which these frames are private.
    Private(GfnRange),
    /// It was not to memory, or not to such as takes it.
    Device,
}

/// Completes the access if it was one to memory.
pub(super) fn complete(memory: &CvmMemory, mmio: &mut Mmio<'_>) -> Access {
    let (gpa, write) = match mmio {
        Mmio::Read { gpa, .. } => (Gpa(*gpa), false),
        Mmio::Write { gpa, .. } => (Gpa(*gpa), true),
    };
    // Devices are most of what comes here: two look-ups without a lock tell them.
    let Some(flags) = memory.memory_in_flux(gpa.gfn()) else { return Access::Device };
    if write && flags.contains(SlotFlags::READONLY) {
        return Access::Device;
    }
    // This waits for whoever replaces the slot.
    let done = match mmio {
        Mmio::Read { data, .. } => memory.read(gpa, data),
        Mmio::Write { data, .. } => memory.write(gpa, data),
    };
    match done {
        Ok(()) => Access::Completed,
        Err(AccessError::Pin { error: PinError::NotShared { part, .. }, .. })
            if part.iter().all(|gfn| memory.state(gfn).is_some()) =>
        {
            Access::Private(part)
        }
        Err(_) => Access::Device,
    }
}
