//! The guest's memory as this program lays it out, and where each frame lies on both sides.
//!
//! All slots are bound to one guest_memfd and share one memfd. They lie in pairs, with a hole after each pair; the pairs
//! are in the opposite order in the guest_memfd. So a frame, its shared byte and its private page are three different
//! numbers, and only the slots of one pair are neighbours on both sides. What is asked of the files here goes past the
//! library.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use cvm_memory::addr::{FilePage, FileRange, Gfn, GfnRange, PAGE_SIZE, PAGES_PER_2M, merge_adjacent};
use cvm_memory::backing::{SharedMemory, SharedSlice};
use cvm_memory::convert::State;
use cvm_memory::gmem::{GuestMemfd, cached_bytes};
use cvm_memory::hypervisor::Hypervisor;
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::SlotSpec;

use crate::Failure;

/// Where memory starts: above the addresses that a PC keeps for devices, and the guests' own code.
const BASE: u64 = 4 << 30;

#[derive(Debug)]
struct Slot {
    gfns: GfnRange,
    /// In the memfd.
    shared: u64,
    /// In the guest_memfd.
    private: FilePage,
}

#[derive(Debug)]
pub struct Ram {
    slots: Vec<Slot>,
    shared: Arc<SharedMemory>,
    private: Arc<GuestMemfd>,
}

impl Ram {
    pub fn new(vm: &dyn Hypervisor, bytes: u64, slots: u64) -> Result<Self, Failure> {
        let private = vm.create_guest_memfd(bytes, 0).map_err(|errno| format!("create a guest_memfd: {errno}"))?;
        let shared = SharedMemory::new(bytes)?;
        Ok(Self { slots: lay_out(bytes / PAGE_SIZE, slots)?, shared: Arc::new(shared), private: Arc::new(private) })
    }

    /// The slots, as the library is told of them.
    pub fn specs(&self) -> impl Iterator<Item = SlotSpec> {
        self.slots.iter().map(|slot| SlotSpec {
            id: None,
            gpa: slot.gfns.start_byte(),
            size: slot.gfns.bytes(),
            shared: SharedSlice { backing: self.shared.clone(), offset: slot.shared },
            private: Some((Arc::clone(&self.private), slot.private)),
            flags: SlotFlags::empty(),
        })
    }

    /// Where memory starts.
    pub const fn start(&self) -> Gfn {
        Gfn::containing(BASE)
    }

    pub fn slots(&self) -> impl Iterator<Item = GfnRange> {
        self.slots.iter().map(|slot| slot.gfns)
    }

    /// Where the shared side of `gfn` lies in the memfd.
    pub fn shared_offset(&self, gfn: Gfn) -> Option<u64> {
        let slot = self.slots.iter().find(|slot| slot.gfns.contains(gfn))?;
        Some(slot.shared + (gfn.start_byte() - slot.gfns.start_byte()))
    }

    /// The shared bytes of `gfns`, from the file itself: looking does not allocate.
    pub fn shared_bytes(&self, gfns: GfnRange) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        for (slot, part) in self.parts(gfns) {
            let offset = slot.shared + (part.start_byte() - slot.gfns.start_byte());
            let mut piece = vec![0; usize::try_from(part.bytes())?];
            self.shared.file().read_exact_at(&mut piece, offset)?;
            bytes.append(&mut piece);
        }
        Ok(bytes)
    }

    /// Bytes of memory that one side of `gfns` holds, or `None` where this kernel cannot tell.
    pub fn held(&self, gfns: GfnRange, side: State) -> Option<u64> {
        let held = |(slot, part): (&Slot, GfnRange)| match side {
            State::Shared => {
                let offset = slot.shared + (part.start_byte() - slot.gfns.start_byte());
                cached_bytes(self.shared.file().as_fd(), offset, part.bytes())
            }
            State::Private => {
                let pages: FileRange = part.rebase(slot.gfns.start(), slot.private)?;
                cached_bytes(self.private.as_fd(), pages.start_byte(), pages.bytes())
            }
        };
        self.parts(gfns).map(held).sum()
    }

    fn parts(&self, gfns: GfnRange) -> impl Iterator<Item = (&Slot, GfnRange)> {
        self.slots.iter().filter_map(move |slot| Some((slot, slot.gfns.intersection(&gfns)?)))
    }

    /// Cuts the memory into areas of so many pages each, in order.
    pub fn cut(&self, sizes: &[u64]) -> Vec<Area> {
        let mut rest: Vec<GfnRange> = self.slots().collect();
        sizes.iter().map(|&pages| take(&mut rest, pages)).collect()
    }

    pub fn pages(&self) -> u64 {
        self.slots().map(|gfns| gfns.pages()).sum()
    }
}

fn lay_out(pages: u64, slots: u64) -> Result<Vec<Slot>, Failure> {
    let size = |at: u64| pages / slots + u64::from(at < pages % slots);
    let mut laid_out = Vec::new();
    let (mut gfn, mut shared) = (Gfn::containing(BASE), 0);
    for at in 0..slots {
        let gfns = GfnRange::with_len(gfn, size(at))?;
        laid_out.push(Slot { gfns, shared, private: FilePage::ZERO });
        shared += gfns.bytes();
        let hole = if at % 2 == 1 { PAGES_PER_2M } else { 0 };
        gfn = gfns.end().checked_add(hole).ok_or("memory beyond the top")?;
    }
    let mut page = FilePage::ZERO;
    for pair in laid_out.chunks_mut(2).rev() {
        for slot in pair {
            slot.private = page;
            page = page.checked_add(slot.gfns.pages()).ok_or("a file beyond the top")?;
        }
    }
    Ok(laid_out)
}

/// Takes `pages` pages from the front.
fn take(rest: &mut Vec<GfnRange>, pages: u64) -> Area {
    let (mut taken, mut left) = (Vec::new(), pages);
    while left > 0 && !rest.is_empty() {
        let first = rest.remove(0);
        let cut = first.start().checked_add(left).filter(|cut| first.contains(*cut));
        let (now, later) = cut.and_then(|cut| first.split_at(cut)).unwrap_or((first, GfnRange::empty_at(first.end())));
        left -= now.pages();
        taken.push(now);
        if !later.is_empty() {
            rest.insert(0, later);
        }
    }
    Area { gfns: merge_adjacent(taken) }
}

/// Part of the memory, its pages numbered from zero across slots and holes.
#[derive(Debug, Clone)]
pub struct Area {
    gfns: Vec<GfnRange>,
}

/// Contiguous pages of an area.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Number of the first one.
    pub first: usize,
    pub gfns: GfnRange,
}

impl Area {
    pub fn gfns(&self) -> &[GfnRange] {
        &self.gfns
    }

    pub fn pages(&self) -> u64 {
        self.gfns.iter().map(GfnRange::pages).sum()
    }

    /// The windows that make up the pages `[first, first + pages)`, as far as there are any: more than one around a hole.
    pub fn windows(&self, first: u64, pages: u64) -> Vec<Window> {
        let (mut windows, mut number) = (Vec::new(), 0);
        for gfns in &self.gfns {
            let from = first.max(number);
            let to = (first + pages).min(number + gfns.pages());
            let start = gfns.start().checked_add(from - number);
            if let (true, Some(Ok(gfns)), Ok(first)) = (
                from < to,
                start.map(|start| GfnRange::with_len(start, to.saturating_sub(from))),
                usize::try_from(from),
            ) {
                windows.push(Window { first, gfns });
            }
            number += gfns.pages();
        }
        windows
    }

    /// All of it, in windows of at most `pages` pages.
    pub fn in_pieces(&self, pages: u64) -> Vec<Window> {
        let starts = (0..self.pages()).step_by(usize::try_from(pages).unwrap_or(usize::MAX));
        starts.flat_map(|first| self.windows(first, pages)).collect()
    }
}

impl Window {
    /// The numbers of its pages, with their frames.
    pub fn pages(&self) -> impl Iterator<Item = (usize, Gfn)> + use<> {
        (self.first..).zip(self.gfns)
    }
}
