//! What accesses of guests meet: sections 5 and 6 of the contract.

use nix::errno::Errno;

use super::files::Place;
use super::slots::{READONLY, Slot};
use super::{PAGE, Reference, index};
use crate::observation::{End, Observation, Seen};
use crate::scenario::{Kind, MMIO_BYTE};

/// What a stage-2 fault on a page comes to.
#[derive(Debug, Clone, Copy)]
enum Page {
    /// It is mapped, and the guest goes on.
    Ram(Place),
    /// The instruction is emulated.
    Emulate,
    /// `KVM_EXIT_MEMORY_FAULT`.
    MemoryFault,
    /// `KVM_RUN` fails.
    Failed(Errno),
}

/// The bytes of `[gpa, gpa + len)` by pages: address, and how many.
fn by_pages(gpa: u64, len: u64) -> Vec<(u64, u64)> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    for address in gpa..gpa + len {
        match pieces.last_mut() {
            Some((_, bytes)) if !address.is_multiple_of(PAGE) => *bytes += 1,
            _ => pieces.push((address, 1)),
        }
    }
    pieces
}

impl Reference {
    /// 5.1: whether an access is private. `tag` is how the guest does it, where that matters. What was found to be MMIO once
    /// (RSVD) is shared to the software-protected type, whatever the attribute has become.
    fn access_is_private(&self, gfn: u64, tag: bool) -> bool {
        match self.shape.kind {
            Kind::Default => false,
            Kind::Protected => self.private.contains(&gfn) && !self.mmio.contains_key(&gfn),
            Kind::Tagged | Kind::Snp => tag,
        }
    }

    /// 5.5: a page that was found to be MMIO stays so, unnoticed by KVM, until a slot is changed.
    fn is_known_mmio(&self, gfn: u64, private: bool) -> bool {
        !private && self.mmio.get(&gfn) == Some(&self.generation)
    }

    /// 3.5: the page of a slot's file.
    fn page_of_file(slot: &Slot, gfn: u64) -> Option<Place> {
        slot.file.map(|(inode, first)| Place::File(inode, gfn - slot.first_gfn + first))
    }

    /// The page of this process behind a slot.
    fn page_of_host(&self, slot: &Slot, gfn: u64) -> Option<Place> {
        let (area, offset) = slot.hva;
        self.host_page((area, offset + (gfn - slot.first_gfn) * PAGE))
    }

    /// What an access meets: what is known, or else a fault.
    fn meet(&mut self, gfn: u64, private: bool, write: bool) -> Page {
        if self.emulates || self.is_known_mmio(gfn, private) { Page::Emulate } else { self.fault(gfn, private, write) }
    }

    /// A stage-2 fault; the rows are those of 5.2.
    fn fault(&mut self, gfn: u64, private: bool, write: bool) -> Page {
        let page = self.find(gfn, private, write);
        match page {
            Page::Ram(_) => {
                self.mmio.remove(&gfn);
            }
            Page::Emulate if self.slot_of(gfn).is_none() => {
                self.mmio.insert(gfn, self.generation);
            }
            Page::Emulate | Page::MemoryFault | Page::Failed(_) => {}
        }
        page
    }

    fn find(&self, gfn: u64, private: bool, write: bool) -> Page {
        // Row 1, even if there is no slot.
        if private != self.private.contains(&gfn) {
            return Page::MemoryFault;
        }
        let Some(slot) = self.slot_of(gfn) else {
            // Row 2; and 5.5.
            return if private { Page::MemoryFault } else { Page::Emulate };
        };
        // Rows 3 and 4: no file, or a closed one.
        if private || slot.gmem_only {
            return Self::page_of_file(&slot, gfn).map_or(Page::MemoryFault, Page::Ram);
        }
        // 5.5: a write to a READONLY slot.
        if write && slot.flags & READONLY != 0 {
            return Page::Emulate;
        }
        // After the table of 5.2: no memory behind a shared mapping is EFAULT, without an exit.
        self.page_of_host(&slot, gfn).map_or(Page::Failed(Errno::EFAULT), Page::Ram)
    }

    /// 2.5, 5.5: where the emulator finds a page. It goes through this process's memory, whatever the attribute and the
    /// file say; where that fails, the access is MMIO.
    fn emulated(&self, gfn: u64, write: bool) -> Option<Place> {
        let slot = self.slot_of(gfn)?;
        if write && slot.flags & READONLY != 0 {
            return None;
        }
        self.page_of_host(&slot, gfn)
    }

    /// One instruction that accesses `[gpa, gpa + len)`: for each of its pages, in order, where it is; `None` is MMIO.
    /// Or how else it ended.
    fn places(&mut self, gpa: u64, len: u64, tag: bool, write: bool) -> Result<Vec<(u64, u64, Option<Place>)>, End> {
        let pieces = by_pages(gpa, len);
        let mut mapped = Vec::new();
        for &(address, bytes) in &pieces {
            let gfn = address / PAGE;
            let private = self.access_is_private(gfn, tag);
            match self.meet(gfn, private, write) {
                Page::Ram(page) => mapped.push((address, bytes, Some(page))),
                Page::MemoryFault => {
                    let flags = if private { 8 } else { 0 };
                    return Err(End::Fault { errno: Errno::EFAULT, flags, gpa: gfn * PAGE, size: PAGE });
                }
                Page::Failed(errno) => return Err(End::Failed(errno)),
                // All of the instruction is, whatever its other pages are.
                Page::Emulate => {
                    let emulated = |(address, bytes)| (address, bytes, self.emulated(address / PAGE, write));
                    return Ok(pieces.into_iter().map(emulated).collect());
                }
            }
        }
        Ok(mapped)
    }

    /// One instruction that reads.
    fn read(&mut self, gpa: u64, len: u64, tag: bool, seen: &mut Vec<Seen>) -> End {
        let places = match self.places(gpa, len, tag, false) {
            Ok(places) => places,
            Err(end) => return end,
        };
        let mut data = Vec::new();
        for (address, bytes, place) in places {
            for offset in 0..bytes {
                data.push(place.map_or(MMIO_BYTE, |page| self.byte(page, address % PAGE + offset)));
            }
            if place.is_none() {
                // Instructions are of at most 8 bytes, and so is each of its pieces.
                seen.push(Seen::MmioRead { gpa: address, len: index(bytes) });
            }
        }
        End::Data(data)
    }

    /// One instruction that writes.
    fn write(&mut self, gpa: u64, data: &[u8], tag: bool, seen: &mut Vec<Seen>) -> End {
        let places = match self.places(gpa, data.len() as u64, tag, true) {
            Ok(places) => places,
            Err(end) => return end,
        };
        for (address, bytes, place) in places {
            let piece = &data[index(address - gpa)..][..index(bytes)];
            match place {
                Some(page) => {
                    for (offset, byte) in (address % PAGE..).zip(piece) {
                        self.set_byte(page, offset, *byte);
                    }
                }
                None => seen.push(Seen::MmioWrite { gpa: address, data: piece.to_vec() }),
            }
        }
        End::Done
    }

    pub(super) fn load(&mut self, gpa: u64, len: u8, tag: bool) -> Observation {
        let mut seen = Vec::new();
        let end = self.read(gpa, len.into(), tag, &mut seen);
        Observation::Guest { seen, end }
    }

    pub(super) fn store(&mut self, gpa: u64, len: u8, value: u64, tag: bool) -> Observation {
        let mut seen = Vec::new();
        let end = self.write(gpa, &value.to_le_bytes()[..usize::from(len)], tag, &mut seen);
        Observation::Guest { seen, end }
    }

    /// Of each page the first 8 bytes, and then all of it if no MMIO was seen.
    pub(super) fn dump(&mut self, gpa: u64, pages: u64, tag: bool) -> Observation {
        let mut page = |index| {
            let mut seen = Vec::new();
            match self.read(gpa + index * PAGE, 8, tag, &mut seen) {
                End::Data(_) if seen.is_empty() => self.read(gpa + index * PAGE, PAGE, tag, &mut seen),
                end => end,
            }
        };
        Observation::Pages((0..pages).map(&mut page).collect())
    }

    /// Reads a byte; makes it a return instruction if it is memory and none yet; executes it if it is one, or if nothing is
    /// there.
    pub(super) fn fetch(&mut self, gpa: u64, tag: bool) -> Observation {
        /// `ret`
        const RETURN: u8 = 0xc3;
        let mut seen = Vec::new();
        let mut end = self.read(gpa, 1, tag, &mut seen);
        if let End::Data(data) = &end
            && seen.is_empty()
            && *data != [RETURN]
        {
            end = match self.write(gpa, &[RETURN], tag, &mut seen) {
                End::Done if seen.is_empty() => self.read(gpa, 1, tag, &mut seen),
                End::Done => End::NoCode,
                end => end,
            };
        }
        if let End::Data(_) = end {
            let gfn = gpa / PAGE;
            let private = self.access_is_private(gfn, tag);
            end = match self.meet(gfn, private, false) {
                Page::Ram(_) => End::Done,
                Page::Emulate if self.emulates && self.emulated(gfn, false).is_some() => End::Done,
                // 5.6: it cannot be emulated, either.
                Page::Emulate => End::InternalError,
                Page::MemoryFault | Page::Failed(_) => unreachable!("it could be read"),
            };
        }
        Observation::Guest { seen, end }
    }

    /// 5.4, for a guest's VMCALL.
    pub(super) fn map_gpa_range(&self, gpa: u64, pages: u64, attributes: u64, answer: u64) -> Observation {
        const MAP_GPA_RANGE: u64 = 12;
        const ENOSYS: i64 = 1000;
        const EINVAL: i64 = 22;
        let at_once = |answer: i64| Observation::Guest { seen: Vec::new(), end: End::Answer(answer.cast_unsigned()) };
        if self.exit_hypercall & 1 << MAP_GPA_RANGE == 0 {
            return at_once(-ENOSYS);
        }
        if !gpa.is_multiple_of(PAGE) || pages == 0 || (gpa / PAGE).checked_add(pages).is_none() {
            return at_once(-EINVAL);
        }
        let seen = vec![Seen::Hypercall { nr: MAP_GPA_RANGE, args: [gpa, pages, attributes] }];
        // Of confidential VMs, whose protocols have room for no other answers.
        if self.shape.kind == Kind::Tagged && ![0, 11, 22].contains(&answer) {
            return Observation::Guest { seen, end: End::Failed(Errno::EINVAL) };
        }
        Observation::Guest { seen, end: End::Answer(answer) }
    }

    /// 6: `KVM_PRE_FAULT_MEMORY`.
    pub(super) fn prefault(&mut self, gpa: u64, size: u64, flags: u64) -> Observation {
        let refused = Observation::Prefault { answer: Err(Errno::EINVAL), gpa, size };
        if flags != 0 || !gpa.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) || size == 0 {
            return refused;
        }
        let Some(end) = gpa.checked_add(size) else { return refused };
        for gfn in gpa / PAGE..end / PAGE {
            // Of which kind it is, the attribute says.
            let errno = match self.fault(gfn, self.private.contains(&gfn), false) {
                Page::Ram(_) => continue,
                Page::Emulate => Errno::ENOENT,
                Page::MemoryFault => Errno::EFAULT,
                Page::Failed(errno) => errno,
            };
            let reached = gfn * PAGE;
            let answer = if reached == gpa { Err(errno) } else { Ok(()) };
            return Observation::Prefault { answer, gpa: reached, size: end - reached };
        }
        Observation::Prefault { answer: Ok(()), gpa: end, size: 0 }
    }
}
