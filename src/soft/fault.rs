//! A vCPU's access to one page: through its mapping if there is one, else by a fault that makes one.
//!
//! Mirrors `kvm_mmu_faultin_pfn()`, `kvm_tdp_mmu_page_fault()` and `kvm_handle_noslot_fault()` (`arch/x86/kvm/mmu/mmu.c`)
//! and `kvm_gmem_get_pfn()` (`virt/kvm/guest_memfd.c`).

use std::sync::Arc;

use nix::errno::Errno;

use super::arch::{Access, AccessKind, Denied, GmemPage, GuestView};
use super::dirty_ring::Ring;
use super::host;
use super::memslots::Slot;
use super::mmu::{Mmu, Spte, Target};
use super::sync::read;
use super::vm::Vm;
use crate::addr::{Gfn, Gpa, PAGE_SIZE};
use crate::hypervisor::MemoryFault;
use crate::layout::SlotFlags;

/// What a fault came to.
#[derive(Debug)]
pub(super) enum Fault {
    /// The page is mapped.
    Mapped,
    /// Something changed meanwhile: access again.
    Retry,
    /// The slot is being deleted or moved: access again, but let its updater go on first.
    SlotInvalid,
    /// `KVM_EXIT_MEMORY_FAULT`.
    Exit(MemoryFault),
    /// Shared access without a slot.
    NoSlot,
    /// Write to a read-only slot.
    ReadOnly,
    /// The slot's address in this process cannot be accessed. `KVM_RUN` fails without an exit.
    BadAddress,
}

/// The data of an access within one page.
pub(super) enum Data<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
    Fetch(&'a mut [u8]),
}

impl<'a> Data<'a> {
    pub(super) const fn of(write: bool, bytes: &'a mut [u8]) -> Self {
        if write { Self::Write(bytes) } else { Self::Read(bytes) }
    }

    pub(super) const fn kind(&self) -> AccessKind {
        match self {
            Self::Read(_) => AccessKind::Read,
            Self::Write(_) => AccessKind::Write,
            Self::Fetch(_) => AccessKind::Fetch,
        }
    }
}

/// What kind of fault an access is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// Nothing is mapped, or not for this.
    Plain,
    /// The mapping says MMIO, of an older generation of the memslots (`PFERR_RSVD`). Such an access counts as shared even
    /// where the attribute alone decides.
    StaleMmio,
}

/// What the hardware made of an access.
pub(super) enum Walk {
    /// It was carried out.
    Done,
    /// There is no mapping that allows it.
    Fault(Missing),
    /// The mapping says MMIO, and is right, or KVM does not hear of it.
    Mmio,
    /// The platform would not have it.
    Denied(Denied),
    /// What the mapping points at cannot be accessed.
    Failed(Errno),
}

/// Where the hardware finds what an access is about.
enum Found<'a> {
    At(&'a Target),
    /// Nowhere: every byte that is read is this.
    Noise(u8),
}

/// The MMU at one moment, for an instruction of the platform.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) mmu: &'a Mmu,
    /// [`Arch::mappings_have_privacy`](super::arch::Arch::mappings_have_privacy)
    pub(super) privacy: bool,
}

impl View<'_> {
    fn mapped(&self, gfn: Gfn, private: bool) -> Option<&Spte> {
        let spte = self.mmu.lookup(private, gfn)?;
        (spte.private == private && !matches!(spte.target, Target::Mmio(_))).then_some(spte)
    }
}

impl GuestView for View<'_> {
    fn gmem_page(&self, gfn: Gfn, private: bool) -> Option<GmemPage> {
        if self.privacy {
            self.mapped(gfn, private)?.target.gmem_page()
        } else {
            self.mmu.lookup(private, gfn)?.target.gmem_page()
        }
    }

    fn is_mapped(&self, gfn: Gfn, private: bool) -> bool {
        self.mapped(gfn, private).is_some()
    }

    fn read(&self, gpa: Gpa, private: bool, bytes: &mut [u8]) -> Option<()> {
        copy(&self.mapped(gpa.gfn(), private)?.target, gpa.page_offset(), &mut Data::Read(bytes)).ok()
    }

    fn write(&self, gpa: Gpa, private: bool, bytes: &[u8]) -> Option<()> {
        let spte = self.mapped(gpa.gfn(), private).filter(|spte| spte.writable)?;
        copy(&spte.target, gpa.page_offset(), &mut Data::Write(bytes)).ok()
    }
}

/// The bytes of an access, `offset` into the page.
fn copy(target: &Target, offset: u64, data: &mut Data<'_>) -> Result<(), Errno> {
    match (target, data) {
        (Target::Gmem(file, frame), Data::Read(bytes) | Data::Fetch(bytes)) => file.read_at(frame, offset, bytes),
        (Target::Gmem(file, frame), Data::Write(bytes)) => file.write_at(frame, offset, bytes),
        (Target::Host(hva), Data::Read(bytes) | Data::Fetch(bytes)) => host::read(hva.saturating_add(offset), bytes),
        (Target::Host(hva), Data::Write(bytes)) => host::write(hva.saturating_add(offset), bytes),
        (Target::Mmio(_), _) => Err(Errno::EFAULT),
    }
}

impl Vm {
    /// The access as the hardware does it: all of an instruction's pieces, each so many bytes into a page, or nothing. The
    /// number is that of the piece that could not be done.
    pub(super) fn access(&self, pieces: &mut [(Gfn, u64, Data<'_>)], requested: bool) -> (usize, Walk) {
        let generation = self.slots().valid_generation(0);
        let mmu = self.mmu();
        let mut targets = Vec::with_capacity(pieces.len());
        for (index, (gfn, _, data)) in pieces.iter().enumerate() {
            match self.walk(&mmu, generation, *gfn, data.kind(), requested) {
                Ok(target) => targets.push(target),
                Err(walk) => return (index, walk),
            }
        }
        for (index, (found, (_, offset, data))) in targets.into_iter().zip(pieces).enumerate() {
            let copied = match (found, data) {
                (Found::At(target), data) => copy(target, *offset, data),
                (Found::Noise(byte), Data::Read(bytes) | Data::Fetch(bytes)) => {
                    bytes.fill(byte);
                    Ok(())
                }
                (Found::Noise(_), Data::Write(_)) => Err(Errno::EFAULT),
            };
            if let Err(errno) = copied {
                return (index, Walk::Failed(errno));
            }
        }
        (0, Walk::Done)
    }

    fn walk<'a>(
        &self,
        mmu: &'a Mmu,
        generation: Option<u64>,
        gfn: Gfn,
        kind: AccessKind,
        requested: bool,
    ) -> Result<Found<'a>, Walk> {
        let spte = mmu.lookup(requested, gfn).ok_or(Walk::Fault(Missing::Plain))?;
        if let Target::Mmio(of) = spte.target {
            return Err(match (self.arch().access_is_private(requested, false), self.arch().sticky_mmio()) {
                (true, true) => Walk::Denied(Denied::Exception),
                (true, false) => Walk::Fault(Missing::Plain),
                (false, sticky) if sticky || Some(of) == generation => Walk::Mmio,
                (false, _) => Walk::Fault(Missing::StaleMmio),
            });
        }
        let private = self.arch().access_is_private(requested, spte.private);
        let as_mapped = if self.arch().mappings_have_privacy() { private } else { spte.private };
        if !spte.allows(as_mapped, kind) {
            return Err(Walk::Fault(Missing::Plain));
        }
        let access = Access { gfn, kind, private, page: spte.target.gmem_page() };
        match self.arch().check_access(&access) {
            Ok(()) => Ok(Found::At(&spte.target)),
            Err(Denied::Noise(byte)) if kind != AccessKind::Write => Ok(Found::Noise(byte)),
            Err(denied) => Err(Walk::Denied(denied)),
        }
    }

    /// A fault at `gfn`, by the vCPU with that dirty ring. The caller is in an SRCU section, so that no slot it finds goes away
    /// under it.
    pub(super) fn fault(
        &self,
        gfn: Gfn,
        kind: AccessKind,
        requested: bool,
        missing: Missing,
        ring: Option<&Ring>,
    ) -> Fault {
        let seq = self.mmu().seq();
        let attribute = self.is_private(gfn);
        let private = self.arch().access_is_private(requested, attribute && missing != Missing::StaleMmio);
        let exit = |errno| {
            let flags = if private { MemoryFault::PRIVATE } else { 0 };
            Fault::Exit(MemoryFault { errno, flags, gpa: gfn.start_byte(), size: PAGE_SIZE })
        };
        if private != attribute {
            return exit(Errno::EFAULT);
        }
        let slot = self.slots().find(0, gfn).cloned();
        let Some(slot) = slot else {
            return if private { exit(Errno::EFAULT) } else { self.no_slot(gfn) };
        };
        if slot.invalid {
            return Fault::SlotInvalid;
        }
        if self.mmu().must_retry(seq, gfn) {
            return Fault::Retry;
        }
        let from_file = private || slot.file.as_ref().is_some_and(|file| file.only);
        let readonly = slot.flags.contains(SlotFlags::READONLY);
        let target = if from_file {
            match self.gmem_pfn(&slot, gfn) {
                Ok(target) => target,
                Err(errno) => return exit(errno),
            }
        } else {
            if readonly && kind == AccessKind::Write {
                return Fault::ReadOnly;
            }
            match slot.hva(gfn).filter(|hva| host::read(*hva, &mut [0]).is_ok()) {
                Some(hva) => Target::Host(hva),
                None => return Fault::BadAddress,
            }
        };
        let mut mmu = self.mmu_mut();
        if mmu.must_retry(seq, gfn) {
            return Fault::Retry;
        }
        if mmu.lookup(private, gfn).is_some_and(|spte| spte.allows(private, kind)) {
            // Somebody else was faster, or it is mapped ahead of use once more: `RET_PF_SPURIOUS`.
            return Fault::Mapped;
        }
        if let (true, Some(page)) = (private, target.gmem_page()) {
            self.arch().mapped_private(gfn, page);
        }
        if !readonly {
            // Whoever can write is taken to do so, whatever kind of access this is.
            self.mark_dirty(&slot, gfn, ring);
        }
        mmu.map(gfn, Spte { target, private, writable: !readonly });
        Fault::Mapped
    }

    /// The page at `gfn` for the state of a vCPU, as a platform's own code looks it up: whatever the attribute says, and not
    /// waiting for a slot that is being replaced. `EAGAIN` while the frame is being invalidated. The caller is in an SRCU section.
    pub(super) fn state_page(&self, gfn: Gfn) -> Result<GmemPage, Errno> {
        let seq = self.mmu().seq();
        let slot = self.slots().find(0, gfn).filter(|slot| !slot.invalid).cloned().ok_or(Errno::ENOENT)?;
        let target = self.gmem_pfn(&slot, gfn)?;
        if self.mmu().must_retry(seq, gfn) {
            return Err(Errno::EAGAIN);
        }
        target.gmem_page().ok_or(Errno::EFAULT)
    }

    /// `kvm_gmem_get_pfn()`.
    fn gmem_pfn(&self, slot: &Arc<Slot>, gfn: Gfn) -> Result<Target, Errno> {
        let held = slot.file.as_ref().ok_or(Errno::EFAULT)?;
        let page = slot.file_page(gfn).ok_or(Errno::EIO)?;
        let file = held.get().ok_or(Errno::EFAULT)?;
        if read(&file.bindings).find(page).map(|binding| binding.slot) != Some(slot.id) {
            return Err(Errno::EIO);
        }
        let frame = file.get_page(self.arch(), page, gfn)?;
        Ok(Target::Gmem(file, frame))
    }

    /// `kvm_handle_noslot_fault()` for a shared access: it leaves a mapping that says so.
    fn no_slot(&self, gfn: Gfn) -> Fault {
        let target = Target::Mmio(self.slots().generation(0));
        self.mmu_mut().map(gfn, Spte { target, private: false, writable: false });
        Fault::NoSlot
    }
}

#[cfg(test)]
mod tests {
    use super::super::arch::Plain;
    use super::*;
    use crate::hypervisor::MemoryRegion;

    /// A fault that found no slot ends while one is being created: what it leaves behind is out of date once the slot is there.
    #[test]
    fn a_slot_comes_while_a_fault_finds_none() {
        let vm = Vm::new(Arc::new(Plain));
        let gfn = Gfn::ZERO;
        let touch = || vm.access(&mut [(gfn, 0, Data::Fetch(&mut [0]))], false).1;
        let section = vm.srcu.enter();
        assert!(vm.slots().find(0, gfn).is_none());
        std::thread::scope(|scope| {
            let create =
                scope.spawn(|| vm.set_region(&MemoryRegion { memory_size: PAGE_SIZE, ..MemoryRegion::default() }));
            // It waits for the fault that is under way.
            while vm.slots().find(0, gfn).is_none() {
                std::thread::yield_now();
            }
            assert!(matches!(vm.no_slot(gfn), Fault::NoSlot));
            assert!(matches!(touch(), Walk::Fault(Missing::StaleMmio)), "nothing counts during a swap");
            drop(section);
            create.join().unwrap().unwrap();
        });
        assert!(matches!(touch(), Walk::Fault(Missing::StaleMmio)));
        // Where there is none, it stays.
        let other = Gfn::containing(PAGE_SIZE);
        assert!(matches!(vm.no_slot(other), Fault::NoSlot));
        assert!(matches!(vm.access(&mut [(other, 0, Data::Fetch(&mut [0]))], false).1, Walk::Mmio));
    }
}
