//! Initial contents of private pages, before a vCPU has run.
//!
//! Mirrors `kvm_gmem_populate()` (`virt/kvm/guest_memfd.c`); the commands that call it belong to the platforms.

use std::sync::Arc;

use nix::errno::Errno;

use super::arch::GmemPage;
use super::file::PAGE_BYTES;
use super::host;
use super::mmu::{Spte, Target};
use super::sync::write;
use super::vm::Vm;
use crate::addr::{Gfn, GfnRange, PAGE_SIZE};

/// What a platform does to one page that is given initial contents: the page, its frame, and the contents, which it may change.
pub type FillPage<'a> = dyn FnMut(GmemPage, Gfn, &mut [u8]) -> Result<(), Errno> + 'a;

impl Vm {
    pub(super) fn populate(
        &self,
        start: Gfn,
        pages: u64,
        mut source: Option<u64>,
        each: &mut FillPage<'_>,
    ) -> Result<u64, Errno> {
        let _slots_lock = self.lock_slots();
        let slot = self.slots().find(0, start).cloned().ok_or(Errno::EINVAL)?;
        let held = slot.file.as_ref().ok_or(Errno::EINVAL)?;
        let file = held.get().ok_or(Errno::EFAULT)?;
        let asked = GfnRange::with_len(start, pages).map_err(|_| Errno::EINVAL)?;
        let gfns = asked.intersection(&slot.gfns).ok_or(Errno::EINVAL)?;
        let mut done = 0_u64;
        for gfn in gfns {
            let result = (|| {
                let mut contents = vec![0; PAGE_BYTES];
                if let Some(hva) = source {
                    host::read(hva, &mut contents)?;
                }
                let page = slot.file_page(gfn).ok_or(Errno::EIO)?;
                let _exclusive = write(&file.invalidate_lock);
                if !self.is_private(gfn) {
                    return Err(Errno::EINVAL);
                }
                let gmem_page = GmemPage { file: file.inode(), page };
                let frame = file.populate(page, &mut contents, |contents| each(gmem_page, gfn, contents))?;
                if self.arch().maps_populated() {
                    let target = Target::Gmem(Arc::clone(&file), frame);
                    self.mmu_mut().map(gfn, Spte { target, private: true, writable: true });
                }
                Ok(())
            })();
            match result {
                Ok(()) => {}
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
            done = done.saturating_add(1);
            source = source.and_then(|hva| hva.checked_add(PAGE_SIZE));
        }
        Ok(done)
    }
}
