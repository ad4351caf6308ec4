//! The secure EPT as the TDX module keeps it: one state per 4 KiB page, and what each command demands of it.
//!
//! A page table that KVM can only change by asking: every command names what it finds and is refused if the page is in
//! another state. It knows no slots and no faults; [`arch`](super::arch) is KVM's side of it. There are no large pages, as
//! in KVM so far, and the tables' own pages are not modelled: they are freed with the TD.
//!
//! Mirrors "Secure EPT entry states" of the TDX module's base architecture specification; the names of the commands are
//! those of its ABI.

use std::collections::BTreeMap;

use cvm_memory::addr::Gfn;
use cvm_memory::soft::GmemPage;

/// The state of a page; one that is FREE has no entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SeptState {
    /// Was PRESENT, and cannot be accessed any more.
    Blocked,
    /// The VMM has given it; the guest has not accepted it.
    Pending,
    /// Was PENDING, and cannot be accepted any more.
    PendingBlocked,
    /// The guest's, with contents.
    Present,
}

/// Why the module refuses a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The page is in another state than the command needs.
    #[error("gfn {gfn:#x} is {state:?}")]
    State {
        /// The frame.
        gfn: Gfn,
        /// What it is; `None` for FREE.
        state: Option<SeptState>,
    },
    /// The physical page belongs to another frame.
    #[error("the page for gfn {gfn:#x} is that of gfn {owner:#x}")]
    Owned {
        /// The frame that wants it.
        gfn: Gfn,
        /// The frame that has it.
        owner: Gfn,
    },
    /// vCPUs may still have it in their TLBs: nothing was tracked since it was blocked.
    #[error("gfn {gfn:#x} was not tracked since it was blocked")]
    NotTracked {
        /// The frame.
        gfn: Gfn,
    },
    /// The TD is finalised, or not yet.
    #[error("the td is in another phase of its life")]
    Phase,
}

/// A command that the module has carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// `TDH.MEM.PAGE.ADD`.
    Add(Gfn),
    /// `TDH.MEM.PAGE.AUG`.
    Aug(Gfn),
    /// `TDG.MEM.PAGE.ACCEPT`, by the guest.
    Accept(Gfn),
    /// `TDH.MEM.RANGE.BLOCK`.
    Block(Gfn),
    /// `TDH.MEM.TRACK`, and every vCPU out of the guest since.
    Track,
    /// `TDH.MEM.PAGE.REMOVE`.
    Remove(Gfn),
}

/// What an access by the guest finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The page.
    Page(GmemPage),
    /// A page that it has to accept first.
    Pending,
    /// Nothing: an EPT violation.
    Nothing,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    state: SeptState,
    page: GmemPage,
    /// The TLB epoch in which it was blocked.
    blocked_in: u64,
}

/// The secure EPT of one TD.
#[derive(Debug, Default)]
pub struct Sept {
    entries: BTreeMap<Gfn, Entry>,
    owners: BTreeMap<GmemPage, Gfn>,
    epoch: u64,
    finalized: bool,
    log: Option<Vec<Command>>,
}

impl Sept {
    /// The state of a frame; `None` for FREE.
    pub fn state(&self, gfn: Gfn) -> Option<SeptState> {
        self.entries.get(&gfn).map(|entry| entry.state)
    }

    /// Every frame that is not FREE, ascending.
    pub fn states(&self) -> impl Iterator<Item = (Gfn, SeptState)> {
        self.entries.iter().map(|(gfn, entry)| (*gfn, entry.state))
    }

    /// The frame that has a physical page.
    pub fn owner(&self, page: GmemPage) -> Option<Gfn> {
        self.owners.get(&page).copied()
    }

    /// Whether `TDH.MR.FINALIZE` was carried out.
    pub const fn is_finalized(&self) -> bool {
        self.finalized
    }

    /// From here on, commands are recorded.
    pub fn record(&mut self) {
        self.log = Some(Vec::new());
    }

    /// The commands recorded so far; recording goes on.
    pub fn take_log(&mut self) -> Vec<Command> {
        self.log.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// FREE to PRESENT, before the TD runs.
    ///
    /// # Errors
    /// [`Refusal`]; nothing has changed. So for every command.
    pub fn add(&mut self, gfn: Gfn, page: GmemPage) -> Result<(), Refusal> {
        if self.finalized {
            return Err(Refusal::Phase);
        }
        self.insert(gfn, page, SeptState::Present)?;
        self.done(Command::Add(gfn));
        Ok(())
    }

    /// FREE to PENDING, once the TD can run.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn aug(&mut self, gfn: Gfn, page: GmemPage) -> Result<(), Refusal> {
        if !self.finalized {
            return Err(Refusal::Phase);
        }
        self.insert(gfn, page, SeptState::Pending)?;
        self.done(Command::Aug(gfn));
        Ok(())
    }

    /// PENDING to PRESENT, by the guest. Whoever calls this zeroes the page.
    ///
    /// # Errors
    /// [`Refusal`], with [`SeptState::Present`] for a page that was accepted or added before.
    pub fn accept(&mut self, gfn: Gfn) -> Result<(), Refusal> {
        let entry = self.entry(gfn)?;
        if entry.state != SeptState::Pending {
            return Err(Refusal::State { gfn, state: Some(entry.state) });
        }
        entry.state = SeptState::Present;
        self.done(Command::Accept(gfn));
        Ok(())
    }

    /// Out of the guest's reach: PRESENT to BLOCKED, PENDING to PENDING_BLOCKED.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn block(&mut self, gfn: Gfn) -> Result<(), Refusal> {
        let epoch = self.epoch;
        let entry = self.entry(gfn)?;
        entry.state = match entry.state {
            SeptState::Present => SeptState::Blocked,
            SeptState::Pending => SeptState::PendingBlocked,
            state => return Err(Refusal::State { gfn, state: Some(state) }),
        };
        entry.blocked_in = epoch;
        self.done(Command::Block(gfn));
        Ok(())
    }

    /// A new TLB epoch. The caller has every vCPU out of the guest.
    pub fn track(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.done(Command::Track);
    }

    /// BLOCKED to FREE; what the page held is lost.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn remove(&mut self, gfn: Gfn) -> Result<(), Refusal> {
        let epoch = self.epoch;
        let Entry { state, page, blocked_in } = *self.entry(gfn)?;
        if !matches!(state, SeptState::Blocked | SeptState::PendingBlocked) {
            return Err(Refusal::State { gfn, state: Some(state) });
        }
        if blocked_in == epoch {
            return Err(Refusal::NotTracked { gfn });
        }
        self.entries.remove(&gfn);
        self.owners.remove(&page);
        self.done(Command::Remove(gfn));
        Ok(())
    }

    /// `TDH.MR.FINALIZE`, once.
    ///
    /// # Errors
    /// [`Refusal::Phase`].
    pub const fn finalize(&mut self) -> Result<(), Refusal> {
        if self.finalized {
            return Err(Refusal::Phase);
        }
        self.finalized = true;
        Ok(())
    }

    /// What the guest finds at `gfn`.
    pub fn find(&self, gfn: Gfn) -> Found {
        match self.entries.get(&gfn) {
            Some(Entry { state: SeptState::Present, page, .. }) => Found::Page(*page),
            Some(Entry { state: SeptState::Pending, .. }) => Found::Pending,
            _ => Found::Nothing,
        }
    }

    fn entry(&mut self, gfn: Gfn) -> Result<&mut Entry, Refusal> {
        self.entries.get_mut(&gfn).ok_or(Refusal::State { gfn, state: None })
    }

    fn insert(&mut self, gfn: Gfn, page: GmemPage, state: SeptState) -> Result<(), Refusal> {
        if let Some(entry) = self.entries.get(&gfn) {
            return Err(Refusal::State { gfn, state: Some(entry.state) });
        }
        if let Some(owner) = self.owner(page) {
            return Err(Refusal::Owned { gfn, owner });
        }
        self.entries.insert(gfn, Entry { state, page, blocked_in: 0 });
        self.owners.insert(page, gfn);
        Ok(())
    }

    fn done(&mut self, command: Command) {
        if let Some(log) = &mut self.log {
            log.push(command);
        }
    }
}
