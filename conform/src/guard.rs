//! What no machine is asked to do, because it would take the guest's own memory away, or take for ever.
//!
//! The same for all machines and independent of their state, so that it hides no difference.

use cvm_memory_testkit::KvmGuest;

use crate::machine::Shape;
use crate::scenario::{AREA_BYTES, Area, Hva, Kind, LOG_PAGES, Operation};

/// Pages that one operation may be about.
const MANY_PAGES: u64 = 1 << 14;
const PAGE: u64 = 4096;
const FALLOC_FL_KEEP_SIZE: u32 = 1;
const LOG_DIRTY: u32 = 1;
/// Bits of an SNP guest's addresses in the lab: above them is the C-bit.
pub(crate) const SNP_GUEST_BITS: u32 = 39;

/// Why `operation` is not played; `None` if it is.
pub fn refuse(shape: Shape, operation: &Operation) -> Option<&'static str> {
    if operation.vcpu().is_some_and(|vcpu| vcpu >= shape.vcpus) {
        return Some("there is no such vCPU");
    }
    if let Some(reason) = platform(shape, operation) {
        return Some(reason);
    }
    match *operation {
        Operation::Region { flags, size, .. } if flags & LOG_DIRTY != 0 && (1 << 30..1 << 44).contains(&size) => {
            Some("too many pages to log")
        }
        Operation::Region { slot, size, hva, .. } => region(shape, slot, size, hva),
        Operation::Attributes { gpa, size, .. } => attributes(shape, gpa, size),
        Operation::Fallocate { mode, len, .. } => {
            // It might be legal, and then it would be done: files may be of any size.
            let many = (MANY_PAGES * PAGE + 1..1 << 63).contains(&len);
            (mode == FALLOC_FL_KEEP_SIZE && many).then_some("too many pages to allocate")
        }
        Operation::Prefault { gpa, size, .. } => {
            (size / PAGE > MANY_PAGES && gpa.checked_add(size).is_some()).then_some("too many pages to prefault")
        }
        Operation::Load { gpa, len, .. } | Operation::Store { gpa, len, .. } => {
            let instruction = matches!(len, 1 | 2 | 4 | 8);
            if instruction { guest(shape, gpa, len.into()) } else { Some("no instruction does that") }
        }
        Operation::Fetch { gpa, .. } => guest(shape, gpa, 1),
        Operation::Dump { gpa, pages, .. } => {
            if pages > 4096 || gpa % PAGE != 0 {
                Some("no dump is like that")
            } else {
                guest(shape, gpa, pages * PAGE)
            }
        }
        Operation::HostRead { at, len } | Operation::HostFill { at, len, .. } => match at {
            Hva::In(area, offset) if !matches!(area, Area::Void) && offset <= AREA_BYTES && len <= AREA_BYTES => None,
            _ => Some("this process does not look there"),
        },
        Operation::ClearDirty { pages, .. } => (u64::from(pages) > LOG_PAGES).then_some("too many pages to clear"),
        Operation::Create { .. }
        | Operation::Close { .. }
        | Operation::Map { .. }
        | Operation::EnableCap { .. }
        | Operation::GetDirty { .. }
        | Operation::MapGpaRange { .. }
        | Operation::Psc { .. }
        | Operation::PscPage { .. }
        | Operation::Vmgexit { .. } => None,
        Operation::Pvalidate { gpa, .. } => guest(shape, gpa, PAGE),
    }
}

/// What guests of the other kinds do.
fn platform(shape: Shape, operation: &Operation) -> Option<&'static str> {
    let snp = shape.kind == Kind::Snp;
    match *operation {
        Operation::Pvalidate { .. } | Operation::Psc { .. } | Operation::PscPage { .. } | Operation::Vmgexit { .. }
            if !snp =>
        {
            Some("only SNP guests do that")
        }
        Operation::MapGpaRange { .. } if snp => Some("SNP guests ask otherwise"),
        Operation::Fetch { private: false, .. } if snp => Some("instructions are private"),
        Operation::Pvalidate { gpa, large: true, .. } if !gpa.is_multiple_of(512 * PAGE) => {
            Some("the emulation does not do as the processor does")
        }
        // `WARN_ON_ONCE()`, at the request after it.
        Operation::PscPage { answer, .. } if ![0, 11, 22].contains(&answer) => Some("KVM complains of such an answer"),
        Operation::PscPage { ref entries, .. } if entries.0.len() > 253 => Some("too many entries"),
        Operation::Vmgexit { value, .. } if matches!(value & 0xfff, 0 | 0x002 | 0x004 | 0x006) => {
            Some("a request that is not about memory, or another page")
        }
        _ => None,
    }
}

fn region(shape: Shape, slot: u32, size: u64, hva: Hva) -> Option<&'static str> {
    if (0..shape.vcpus).any(|vcpu| KvmGuest::own_memory(vcpu.into()).slot == slot) {
        return Some("a guest's own slot");
    }
    match hva {
        // Nobody takes these.
        Hva::Raw(address) if address % PAGE != 0 || address >> 56 != 0 => None,
        Hva::Raw(_) => Some("an address that may be anything's"),
        Hva::In(_, offset) if offset > 1 << 30 => Some("further into an area than areas go"),
        Hva::In(..) if size > 1 << 43 && size < 1 << 56 => Some("larger than an area, and not absurd"),
        Hva::In(..) => None,
    }
}

fn attributes(shape: Shape, gpa: u64, size: u64) -> Option<&'static str> {
    let end = gpa.checked_add(size)?; // refused by everybody
    if size / PAGE > MANY_PAGES {
        return Some("too many pages to convert");
    }
    own_memory(shape, gpa, end).then_some("a guest's own memory")
}

fn own_memory(shape: Shape, gpa: u64, end: u64) -> bool {
    (0..shape.vcpus).any(|vcpu| {
        let own = KvmGuest::own_memory(vcpu.into());
        gpa < own.gpa + own.size && own.gpa < end
    })
}

fn guest(shape: Shape, gpa: u64, len: u64) -> Option<&'static str> {
    let bits = if shape.kind == Kind::Snp { SNP_GUEST_BITS } else { 47 };
    let reach = 1 << shape.physical_bits.min(bits);
    match gpa.checked_add(len) {
        Some(end) if end <= reach => own_memory(shape, gpa, end).then_some("a guest's own memory"),
        _ => Some("out of the guest's reach"),
    }
}
