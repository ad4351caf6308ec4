//! The table and its instructions.

use std::collections::{BTreeMap, BTreeSet};

use cvm_memory::addr::Gfn;

use super::{Entry, Failure, PAGES_PER_2M, PageState, Pfn, Size};

/// Operands of RMPUPDATE, besides the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RmpUpdate {
    /// Whether it becomes a guest's; if not, only the size matters.
    pub assigned: bool,
    /// The guest's frame.
    pub gfn: Gfn,
    /// The guest.
    pub asid: u32,
    /// How much.
    pub size: Size,
    /// Whether only the firmware may change it afterwards.
    pub immutable: bool,
}

impl RmpUpdate {
    /// Back to the host.
    pub const fn unassign(size: Size) -> Self {
        Self { assigned: false, gfn: Gfn::ZERO, asid: 0, size, immutable: false }
    }
}

/// What PVALIDATE did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pvalidate {
    /// The state is the one asked for, and was another before.
    Changed,
    /// It was so already (CF=1).
    NoUpdate,
    /// It failed.
    Failed(Failure),
}

/// Why an access of a guest does not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A nested page fault: not assigned, another guest's, or at another address.
    NotYours,
    /// A nested page fault: a shared write to an assigned page.
    Assigned,
    /// A nested page fault: the entry is larger than the guest's operand; the host must smash it.
    Size,
    /// #VC in the guest, of which the host does not hear: not accepted.
    NotValidated,
}

/// The table.
#[derive(Debug, Clone, Default)]
pub struct Rmp {
    /// Of assigned pages, each of 4 KiB by itself.
    entries: BTreeMap<Pfn, Entry>,
    /// First pages of entries of 2 MiB.
    large: BTreeSet<Pfn>,
    /// Pages that a processor holds just now, such as the save area of a running vCPU.
    in_use: BTreeSet<Pfn>,
}

impl Rmp {
    /// All pages the host's.
    pub const fn new() -> Self {
        Self { entries: BTreeMap::new(), large: BTreeSet::new(), in_use: BTreeSet::new() }
    }

    /// The entry of a page, if it is assigned, and the size of the one that covers it.
    pub fn lookup(&self, pfn: Pfn) -> (Option<&Entry>, Size) {
        let size = if self.large.contains(&pfn.head()) { Size::Large } else { Size::Small };
        (self.entries.get(&pfn), size)
    }

    /// The state of a page.
    pub fn state(&self, pfn: Pfn) -> PageState {
        self.entries.get(&pfn).map_or(PageState::Hypervisor, Entry::state)
    }

    /// All assigned pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (Pfn, &Entry)> {
        self.entries.iter().map(|(pfn, entry)| (*pfn, entry))
    }

    /// Marks a page as held by a processor, or not any more.
    pub fn set_in_use(&mut self, pfn: Pfn, in_use: bool) {
        if in_use {
            self.in_use.insert(pfn);
        } else {
            self.in_use.remove(&pfn);
        }
    }

    /// RMPUPDATE, by the host. Clears everything that the guest has set.
    ///
    /// # Errors
    /// [`Failure::Input`], [`Failure::Permission`], [`Failure::InUse`], [`Failure::Overlap`].
    pub fn update(&mut self, pfn: Pfn, update: &RmpUpdate) -> Result<(), Failure> {
        let RmpUpdate { assigned, gfn, asid, size, immutable } = *update;
        let aligned = size == Size::Small || (pfn.is_head() && (!assigned || gfn.get().is_multiple_of(PAGES_PER_2M)));
        if !aligned || (assigned && gfn.checked_add(size.pages()).is_none()) {
            return Err(Failure::Input);
        }
        let covered = self.large.contains(&pfn.head());
        if size == Size::Small && covered {
            return Err(Failure::Overlap);
        }
        let pages = pfn..pfn.add(size.pages());
        if self.entries.range(pages.clone()).any(|(_, entry)| entry.immutable) {
            return Err(Failure::Permission);
        }
        if self.in_use.range(pages.clone()).next().is_some() {
            return Err(Failure::InUse);
        }
        if size == Size::Large && !covered && self.entries.range(pages.clone()).next().is_some() {
            return Err(Failure::Overlap);
        }
        if !assigned {
            self.entries.extract_if(pages, |_, _| true).for_each(drop);
            self.large.remove(&pfn);
            return Ok(());
        }
        if size == Size::Large {
            self.large.insert(pfn);
        }
        for nr in 0..size.pages() {
            let entry = Entry {
                gfn: gfn.checked_add(nr).unwrap_or(gfn),
                asid,
                immutable,
                validated: false,
                vmsa: false,
                permissions: [0; 3],
            };
            self.entries.insert(pfn.add(nr), entry);
        }
        Ok(())
    }

    /// PSMASH, by the host: one entry of 2 MiB becomes 512. Nothing else changes.
    ///
    /// # Errors
    /// [`Failure::Input`] if it is not such an entry; [`Failure::Permission`], [`Failure::InUse`].
    pub fn smash(&mut self, pfn: Pfn) -> Result<(), Failure> {
        if !self.large.contains(&pfn) {
            return Err(Failure::Input);
        }
        let pages = pfn..pfn.add(PAGES_PER_2M);
        if self.entries.range(pages.clone()).any(|(_, entry)| entry.immutable) {
            return Err(Failure::Permission);
        }
        if self.in_use.range(pages).next().is_some() {
            return Err(Failure::InUse);
        }
        self.large.remove(&pfn);
        Ok(())
    }

    /// Whether a guest may access the page behind its frame.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn check(&self, pfn: Pfn, asid: u32, gfn: Gfn, private: bool, write: bool) -> Result<(), Fault> {
        match self.entries.get(&pfn) {
            entry if private => match entry {
                Some(entry) if entry.asid == asid && entry.gfn == gfn && !entry.immutable => {
                    if entry.validated {
                        Ok(())
                    } else {
                        Err(Fault::NotValidated)
                    }
                }
                _ => Err(Fault::NotYours),
            },
            Some(_) if write => Err(Fault::Assigned),
            _ => Ok(()),
        }
    }

    /// The entry that an instruction of the guest's works on.
    fn of_guest(&mut self, pfn: Pfn, asid: u32, gfn: Gfn, size: Size) -> Result<Result<&mut Entry, Failure>, Fault> {
        let large = self.large.contains(&pfn.head());
        match self.entries.get_mut(&pfn) {
            Some(entry) if entry.asid == asid && entry.gfn == gfn && !entry.immutable => match (size, large) {
                (Size::Large, false) => Ok(Err(Failure::SizeMismatch)),
                (Size::Small, true) => Err(Fault::Size),
                _ => Ok(Ok(entry)),
            },
            _ => Err(Fault::NotYours),
        }
    }

    /// PVALIDATE, by the guest: accepts the page, or not any more.
    ///
    /// # Errors
    /// [`Fault`]: a nested page fault, after which the guest executes it again.
    pub fn validate(&mut self, pfn: Pfn, asid: u32, gfn: Gfn, size: Size, validated: bool) -> Result<Pvalidate, Fault> {
        if size == Size::Large && !gfn.get().is_multiple_of(PAGES_PER_2M) {
            return Ok(Pvalidate::Failed(Failure::Input));
        }
        let entry = match self.of_guest(pfn, asid, gfn, size)? {
            // A page that holds a save area is not to be had otherwise.
            Ok(entry) if entry.vmsa => return Err(Fault::NotYours),
            Ok(entry) => entry,
            Err(failure) => return Ok(Pvalidate::Failed(failure)),
        };
        let before = entry.validated;
        for entry in self.entries.range_mut(pfn..pfn.add(size.pages())).map(|(_, entry)| entry) {
            entry.validated = validated;
        }
        Ok(if before == validated { Pvalidate::NoUpdate } else { Pvalidate::Changed })
    }

    /// RMPADJUST, by the guest at VMPL 0: what `vmpl` may do, and whether the page holds a save area.
    ///
    /// # Errors
    /// [`Fault`]: a nested page fault, after which the guest executes it again; for a page that is not validated, #VC.
    pub fn adjust(
        &mut self,
        pfn: Pfn,
        asid: u32,
        gfn: Gfn,
        size: Size,
        (vmpl, permissions, vmsa): (u8, u8, bool),
    ) -> Result<Result<(), Failure>, Fault> {
        let entry = match self.of_guest(pfn, asid, gfn, size)? {
            Ok(entry) => entry,
            Err(failure) => return Ok(Err(failure)),
        };
        if !entry.validated {
            return Err(Fault::NotValidated);
        }
        // The target must be less privileged than the one who asks.
        let Some(level) = vmpl.checked_sub(1).map(usize::from) else { return Ok(Err(Failure::Permission)) };
        for entry in self.entries.range_mut(pfn..pfn.add(size.pages())).map(|(_, entry)| entry) {
            let Some(of_level) = entry.permissions.get_mut(level) else { return Ok(Err(Failure::Input)) };
            *of_level = permissions;
            entry.vmsa = vmsa;
        }
        Ok(Ok(()))
    }

    /// The firmware takes a page that is being launched: validated, and the guest's from now on.
    pub(crate) fn launch(&mut self, pfn: Pfn, vmsa: bool) {
        if let Some(entry) = self.entries.get_mut(&pfn) {
            (entry.immutable, entry.validated, entry.vmsa) = (false, true, vmsa);
        }
    }

    /// The firmware gives a page back that could not be launched (`SNP_PAGE_RECLAIM`).
    pub(crate) fn reclaim(&mut self, pfn: Pfn) {
        if let Some(entry) = self.entries.get_mut(&pfn) {
            entry.immutable = false;
        }
    }
}
