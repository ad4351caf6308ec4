//! Files and memory of this process: section 3 of the contract.

use nix::errno::Errno;

use super::{PAGE, Reference, index};
use crate::scenario::{AREA_BYTES, AREA_ROOM, Area, File, Hva};

const MMAP: u64 = 1;
const INIT_SHARED: u64 = 2;

/// A guest_memfd.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inode {
    pub(super) size: u64,
    pub(super) flags: u64,
}

impl Inode {
    pub(super) const fn can_be_mapped(&self) -> bool {
        self.flags & MMAP != 0
    }
}

/// A page of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// Of a file, by its number.
    File(usize, u64),
    /// Of an [`Area::Memory`].
    Memory(u8, u64),
}

impl Reference {
    /// 3.1.
    pub(super) fn create(&mut self, file: File, size: u64, flags: u64) -> Result<(), Errno> {
        let _unless_there_was_none = self.close(file); // as the language has it
        let legal = if self.has_private_memory() { MMAP } else { MMAP | INIT_SHARED };
        if flags & !legal != 0 {
            return Err(Errno::EINVAL);
        }
        if size.cast_signed() <= 0 || !size.is_multiple_of(PAGE) {
            return Err(Errno::EINVAL);
        }
        self.open.insert(file, self.inodes.len());
        self.inodes.push(Inode { size, flags });
        Ok(())
    }

    /// 3.3, the last paragraph: slots stay, without a file.
    pub(super) fn close(&mut self, file: File) -> Result<(), Errno> {
        let inode = self.open.remove(&file).ok_or(Errno::EBADF)?;
        self.mapped.remove(&file);
        for slot in self.slots.values_mut() {
            if slot.file.is_some_and(|(bound, _)| bound == inode) {
                slot.file = None;
            }
        }
        self.contents.retain(|place, _| !matches!(place, Place::File(of, _) if *of == inode));
        Ok(())
    }

    /// 3.7: `mmap` of a whole file, shared and without PROT_EXEC.
    pub(super) fn map(&mut self, file: File) -> Result<(), Errno> {
        let inode = self.inodes[*self.open.get(&file).ok_or(Errno::EBADF)?];
        if inode.size > AREA_ROOM {
            return Err(Errno::ENOMEM);
        }
        if inode.flags & MMAP == 0 {
            return Err(Errno::ENODEV);
        }
        self.mapped.insert(file);
        Ok(())
    }

    /// 3.2.
    pub(super) fn fallocate(&mut self, file: File, mode: u32, offset: u64, len: u64) -> Result<(), Errno> {
        const KEEP_SIZE: u32 = 0x01;
        const PUNCH_HOLE: u32 = 0x02;
        const COLLAPSE_RANGE: u32 = 0x08;
        const ZERO_RANGE: u32 = 0x10;
        const INSERT_RANGE: u32 = 0x20;
        const UNSHARE_RANGE: u32 = 0x40;
        const WRITE_ZEROES: u32 = 0x80;
        let inode = *self.open.get(&file).ok_or(Errno::EBADF)?;
        // What vfs_fallocate checks for every filesystem.
        let (start, length) = (offset.cast_signed(), len.cast_signed());
        if start < 0 || length <= 0 {
            return Err(Errno::EINVAL);
        }
        // Modes are one of these, and KEEP_SIZE: with PUNCH_HOLE always, with those that change the size never.
        match (mode & !KEEP_SIZE, mode & KEEP_SIZE != 0) {
            (0 | UNSHARE_RANGE | ZERO_RANGE, _)
            | (PUNCH_HOLE, true)
            | (COLLAPSE_RANGE | INSERT_RANGE | WRITE_ZEROES, false) => {}
            _ => return Err(Errno::EOPNOTSUPP),
        }
        if start.checked_add(length).is_none() {
            return Err(Errno::EFBIG);
        }
        // The table of 3.2, row by row.
        if mode & KEEP_SIZE == 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        if mode & !(KEEP_SIZE | PUNCH_HOLE) != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        if !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(Errno::EINVAL);
        }
        if mode & PUNCH_HOLE == 0 {
            // Neither zeroes nor converts: nobody can tell that anything was done.
            return if offset + len > self.inodes[inode].size { Err(Errno::EINVAL) } else { Ok(()) };
        }
        // Beyond the end there is nothing, which is legal. What was there is zero at the next access.
        let punched = offset / PAGE..(offset + len) / PAGE;
        self.contents
            .retain(|place, _| !matches!(place, Place::File(of, page) if *of == inode && punched.contains(page)));
        Ok(())
    }

    /// The page that this process has at an address of its own; `None` if touching it would fail.
    pub(super) fn host_page(&self, (area, offset): (Area, u64)) -> Option<Place> {
        match area {
            Area::Void => None,
            Area::Memory(index) => (offset < AREA_BYTES).then_some(Place::Memory(index, offset / PAGE)),
            Area::File(name) => {
                let inode = *self.open.get(&name)?;
                let Inode { size, flags } = self.inodes[inode];
                // 3.7: SIGBUS beyond its end, and everywhere if it is not INIT_SHARED.
                let there = self.mapped.contains(&name) && offset < size && flags & INIT_SHARED != 0;
                there.then_some(Place::File(inode, offset / PAGE))
            }
        }
    }

    /// This process reads: all of it, or `EFAULT`.
    pub(super) fn host_read(&self, at: Hva, len: u64) -> Result<Vec<u8>, Errno> {
        let Hva::In(area, start) = at else { return Err(Errno::EFAULT) };
        let mut bytes = Vec::new();
        for offset in start..start + len {
            let page = self.host_page((area, offset)).ok_or(Errno::EFAULT)?;
            bytes.push(self.byte(page, offset % PAGE));
        }
        Ok(bytes)
    }

    /// This process writes; what comes before memory that is not there is written all the same.
    pub(super) fn host_fill(&mut self, at: Hva, len: u64, byte: u8) -> Result<(), Errno> {
        let Hva::In(area, start) = at else { return Err(Errno::EFAULT) };
        for offset in start..start + len {
            let page = self.host_page((area, offset)).ok_or(Errno::EFAULT)?;
            self.set_byte(page, offset % PAGE, byte);
        }
        Ok(())
    }

    /// A byte of a page. Pages that were never written are zero (3.5, step 6).
    pub(super) fn byte(&self, page: Place, offset: u64) -> u8 {
        self.contents.get(&page).map_or(0, |page| page[index(offset)])
    }

    pub(super) fn set_byte(&mut self, page: Place, offset: u64, byte: u8) {
        self.contents.entry(page).or_insert_with(|| Box::new([0; 4096]))[index(offset)] = byte;
    }
}
