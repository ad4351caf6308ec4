//! An instruction that KVM carries out itself, since a part of what it accesses is not memory.
//!
//! KVM then reaches memory by its address in this process, whatever the page's attribute and the slot's file are, and hands
//! to userspace what it cannot reach: pages without a slot, with one that is being replaced, read-only ones if it writes, and
//! addresses where nothing is. Memory is accessed at once, before userspace hears of the rest.
//! Mirrors `emulator_read_write()` (`arch/x86/kvm/x86.c`) and `kvm_vcpu_write_guest_page()`.

use std::collections::VecDeque;

use super::dirty_ring::Ring;
use super::host;
use super::vm::Vm;
use crate::addr::{Gpa, PAGE_SIZE};
use crate::layout::SlotFlags;

/// What userspace has to do for an emulated instruction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fragment {
    pub(super) gpa: u64,
    pub(super) len: usize,
    pub(super) write: bool,
}

/// An instruction under way.
#[derive(Debug)]
pub(super) struct Emulation {
    bytes: Vec<u8>,
    write: bool,
    /// What is still to be done, as offsets into the bytes; the first is being done if `asked`.
    fragments: VecDeque<(u64, std::ops::Range<usize>)>,
    asked: bool,
}

impl Emulation {
    /// The next piece for userspace. `mmio` is where data comes and goes: what a read before was answered is taken from it.
    pub(super) fn next(&mut self, mmio: &mut [u8]) -> Option<Fragment> {
        if std::mem::take(&mut self.asked)
            && let Some((_, range)) = self.fragments.pop_front()
            && !self.write
        {
            copy(self.bytes.get_mut(range).unwrap_or_default(), mmio);
        }
        let (gpa, range) = self.fragments.front()?;
        let bytes = self.bytes.get(range.clone()).unwrap_or_default();
        mmio.fill(0);
        if self.write {
            copy(mmio, bytes);
        }
        self.asked = true;
        Some(Fragment { gpa: *gpa, len: bytes.len(), write: self.write })
    }

    /// What it read or wrote.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

fn copy(to: &mut [u8], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

impl Vm {
    /// Begins to emulate an access to `len` bytes, or a write of `output`, by the vCPU with that dirty ring.
    pub(super) fn emulate(&self, gpa: u64, output: Option<&[u8]>, len: usize, ring: Option<&Ring>) -> Emulation {
        let mut bytes = output.map_or_else(|| vec![0; len], <[u8]>::to_vec);
        let mut fragments = VecDeque::new();
        let mut done = 0_usize;
        while done < bytes.len() {
            let at = Gpa(gpa.wrapping_add(u64::try_from(done).unwrap_or(u64::MAX)));
            let in_page = usize::try_from(PAGE_SIZE.saturating_sub(at.page_offset())).unwrap_or(usize::MAX);
            let range = done..bytes.len().min(done.saturating_add(in_page));
            done = range.end;
            let piece = bytes.get_mut(range.clone()).unwrap_or_default();
            if !self.reach(at, piece, output.is_some(), ring) {
                fragments.push_back((at.get(), range));
            }
        }
        Emulation { bytes, write: output.is_some(), fragments, asked: false }
    }

    /// Accesses memory by its address in this process, within a page. Returns whether that could be done.
    fn reach(&self, at: Gpa, bytes: &mut [u8], write: bool, ring: Option<&Ring>) -> bool {
        if self.arch().sticky_mmio() {
            // KVM cannot see the instruction. The guest asks for the access by itself, and gets it from userspace.
            return false;
        }
        let _srcu = self.srcu.enter();
        let slot = self.slots().find(0, at.gfn()).cloned();
        let Some(slot) = slot.filter(|slot| !slot.invalid) else { return false };
        let Some(hva) = slot.hva(at.gfn()).and_then(|hva| hva.checked_add(at.page_offset())) else { return false };
        if write {
            let written = !slot.flags.contains(SlotFlags::READONLY) && host::write(hva, bytes).is_ok();
            if written {
                self.mark_dirty(&slot, at.gfn(), ring);
            }
            written
        } else {
            host::read(hva, bytes).is_ok()
        }
    }
}
