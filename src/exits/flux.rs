//! Accesses to memory that KVM took for device input or output.
//!
//! KVM emulates an access to a frame without a slot, and leaves it to userspace: a write has retired when userspace hears of
//! it, a read waits for its data; neither can be repeated. So if it was memory whose slot was being replaced, it is
//! completed here, on the memory itself, once that is over. A write to a read-only slot comes the same way and is a device's
//! business, as is everything that is not memory. Mirrors `emulator_read_write()` and `write_exit_mmio()` in
//! `arch/x86/kvm/x86.c`.

use crate::addr::Gpa;
use crate::hypervisor::Mmio;
use crate::layout::SlotFlags;
use crate::memory::CvmMemory;

use super::Handled;

/// Completes the access if it was one to memory; `None` if not.
pub(super) fn complete(memory: &CvmMemory, mmio: &mut Mmio<'_>) -> Option<Handled> {
    let (gpa, write) = match mmio {
        Mmio::Read { gpa, .. } => (Gpa(*gpa), false),
        Mmio::Write { gpa, .. } => (Gpa(*gpa), true),
    };
    // Devices are most of what comes here: two look-ups without a lock tell them.
    let flags = memory.memory_in_flux(gpa.gfn())?;
    if write && flags.contains(SlotFlags::READONLY) {
        return None;
    }
    // This waits for whoever replaces the slot. What is not shared memory then is not the host's to touch.
    let done = match mmio {
        Mmio::Read { data, .. } => memory.read(gpa, data),
        Mmio::Write { data, .. } => memory.write(gpa, data),
    };
    done.ok().map(|()| Handled::Completed)
}
