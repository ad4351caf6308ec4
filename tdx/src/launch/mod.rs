//! Building a TD, in the one order that KVM takes: initialise it, make its vCPUs, add its first pages, finalise it.
//!
//! ```text
//! Start ─init→ Vcpus ─image→ Image ─add_all→ Complete ─finalize→ Launched
//! ```
//!
//! Each step is a type of its own and consumes the one before, so that a wrong order does not compile. vCPUs are handed in
//! and come back only at the end: what needs one, prefaulting above all, cannot be tried earlier, when KVM would refuse it.
//! The measurement is predicted page by page as KVM reports them added. Interrupted commands are taken up where KVM says it
//! stopped; what a command failed with, the TDX module's own word included, is in the error.
//!
//! It makes no slots and no vCPUs, and runs nothing. Mirrors `Documentation/virt/kvm/x86/intel-tdx.rst`.

mod error;

use std::ops::ControlFlow;
use std::time::Duration;

use cvm_memory::addr::{Gfn, GfnRange, Gpa, PAGE_SIZE};
use cvm_memory::backing::{SharedBacking, SharedMemory};
use cvm_memory::convert::{Outcome, State};
use cvm_memory::memory::CvmMemory;
use nix::errno::Errno;

use crate::import::{Import, ImportList};
use crate::mechanism::{Capabilities, Failure, InitVm, TdVcpu, TdVm};
use crate::mrtd::{Measurement, Mrtd};
use crate::uapi::{CommandId, InitMemRegion, MAX_CPUID_ENTRIES};
use crate::width::Width;

pub use error::LaunchError;

/// Pages that are handed to KVM in one call.
const STAGED_PAGES: u64 = 512;

/// How often in a row a command may ask to be tried again without having got on.
const PATIENCE: u32 = 1000;

/// What to wait before a command that found something busy is tried again.
const PAUSE: Duration = Duration::from_millis(1);

/// A VM of the TDX type, and nothing else yet.
///
/// ```
/// use cvm_memory::addr::GfnRange;
/// use cvm_memory::memory::CvmMemory;
/// use cvm_memory_tdx::import::{Import, ImportList};
/// use cvm_memory_tdx::launch::Start;
/// use cvm_memory_tdx::mechanism::InitVm;
/// use cvm_memory_tdx::model::SoftTd;
/// use cvm_memory_tdx::mrtd::Order;
/// use cvm_memory_tdx::width::Width;
/// use std::sync::Arc;
///
/// let td = SoftTd::new();
/// let mut vcpus = Start::new(td.clone()).init(&InitVm::new(Width::Bits48))?;
/// vcpus.add(td.create_vcpu()?, 0)?;
///
/// // Memory comes after the TD knows how wide its addresses are.
/// let memory = CvmMemory::builder().ram(0, 16 << 20).build(Arc::new(td.clone()))?;
/// let page = Import { gfns: GfnRange::from_bytes(0x1000, 0x1000)?, measured: true, contents: vec![0xf4; 0x1000] };
/// let list = ImportList::new(vec![page], Width::Bits48)?;
/// let expected = list.mrtd(Order::SinglePass);
///
/// let launched = vcpus.image(list, &memory)?.add_all()?.finalize()?;
/// assert_eq!(launched.mrtd, expected);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// While a TD is being built, its vCPUs are not the launcher's:
///
/// ```compile_fail,E0382
/// # use cvm_memory::hypervisor::{PreFaultMemory, Vcpu};
/// # use cvm_memory_tdx::{launch::Start, mechanism::InitVm, model::SoftTd, width::Width};
/// # let td = SoftTd::new();
/// # let mut vcpus = Start::new(td.clone()).init(&InitVm::new(Width::Bits48))?;
/// let mut vcpu = td.create_vcpu()?;
/// vcpus.add(vcpu, 0)?;
/// vcpu.pre_fault_memory(&mut PreFaultMemory { gpa: 0, size: 0x1000, flags: 0 })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Start<V> {
    td: V,
}

impl<V: TdVm> Start<V> {
    /// From a VM of the TDX type, without vCPUs and slots.
    pub const fn new(td: V) -> Self {
        Self { td }
    }

    /// What TDs may be like on this machine.
    ///
    /// # Errors
    /// [`LaunchError::Command`].
    pub fn capabilities(&self) -> Result<Capabilities, LaunchError> {
        self.td.capabilities().map_err(failed(CommandId::Capabilities))
    }

    /// Initialises the TD.
    ///
    /// # Errors
    /// [`LaunchError`] for what the machine does not offer, before KVM is asked; and for what KVM refuses.
    pub fn init<C: TdVcpu>(self, init: &InitVm) -> Result<Vcpus<V, C>, LaunchError> {
        let offered = self.capabilities()?;
        for (what, wanted, offered) in
            [("td attributes", init.attributes, offered.attributes), ("extended features", init.xfam, offered.xfam)]
        {
            if wanted & !offered != 0 {
                return Err(LaunchError::Unsupported { what, wanted, offered });
            }
        }
        let entries = init.cpuid.len();
        if entries > MAX_CPUID_ENTRIES {
            return Err(LaunchError::TooManyCpuid { entries });
        }
        let width = init.width().ok_or(LaunchError::NoWidth)?;
        patiently(CommandId::InitVm, || self.td.init_vm(init))?;
        Ok(Vcpus { td: self.td, width, vcpus: Vec::new() })
    }
}

/// A TD that vCPUs and memory can be made for.
#[derive(Debug)]
pub struct Vcpus<V, C> {
    td: V,
    width: Width,
    vcpus: Vec<C>,
}

impl<V: TdVm, C: TdVcpu> Vcpus<V, C> {
    /// The VM.
    pub const fn td(&self) -> &V {
        &self.td
    }

    /// How wide the TD's addresses are.
    pub const fn width(&self) -> Width {
        self.width
    }

    /// Takes over a vCPU of this TD and initialises it. `rcx` is what it starts with: where firmware finds the list of
    /// memory.
    ///
    /// # Errors
    /// [`LaunchError::Command`].
    pub fn add(&mut self, mut vcpu: C, rcx: u64) -> Result<(), LaunchError> {
        patiently(CommandId::InitVcpu, || vcpu.init_vcpu(rcx))?;
        self.vcpus.push(vcpu);
        Ok(())
    }

    /// All vCPUs are there; now the pages of `list` are to be added to `memory`, which is the TD's. The list is held against
    /// the memory as a whole, and KVM is told that it is private where it has not been yet.
    ///
    /// # Errors
    /// [`LaunchError`]; no page has been added.
    pub fn image(self, list: ImportList, memory: &CvmMemory) -> Result<Image<V, C>, LaunchError> {
        if self.vcpus.is_empty() {
            return Err(LaunchError::NoVcpu);
        }
        for import in list.imports() {
            let mut reader = memory.reader();
            let unfit = |gfn: &Gfn| {
                !reader.lookup(*gfn).is_some_and(|page| page.state == State::Private && page.file.is_some())
            };
            if let Some(gfn) = import.gfns.iter().find(unfit) {
                return Err(LaunchError::NotPrivate { gfn });
            }
        }
        for &Import { gfns, .. } in list.imports() {
            let outcome = memory.converter().materialise(gfns);
            let cause: Box<dyn std::error::Error + Send + Sync> = match outcome {
                Ok(Outcome::Unchanged | Outcome::Converted { .. }) => continue,
                Ok(Outcome::RolledBack { cause } | Outcome::Poisoned { cause, .. }) => Box::new(cause),
                Err(error) => Box::new(error),
            };
            return Err(LaunchError::Private { gfns, cause });
        }
        let staged = STAGED_PAGES.min(list.pages()).max(1);
        let staging = SharedMemory::new(staged.saturating_mul(PAGE_SIZE))?;
        let Self { td, vcpus, .. } = self;
        Ok(Image { td, vcpus, list, staging, mrtd: Mrtd::new(), import: 0, gfn: None, done: 0 })
    }
}

/// How far the image has been added, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Added.
    pub done: u64,
    /// In all.
    pub total: u64,
}

/// A TD whose first pages are being added.
#[derive(Debug)]
pub struct Image<V, C> {
    td: V,
    vcpus: Vec<C>,
    list: ImportList,
    /// Where KVM finds the contents.
    staging: SharedMemory,
    mrtd: Mrtd,
    /// The import that is next, and the frame within it if it was begun.
    import: usize,
    gfn: Option<Gfn>,
    done: u64,
}

/// What came of adding.
#[derive(Debug)]
pub enum Added<V, C> {
    /// All of it.
    Complete(Complete<V, C>),
    /// The caller stopped it; it can go on.
    Stopped(Image<V, C>),
}

impl<V: TdVm, C: TdVcpu> Image<V, C> {
    /// The measurement of what has been added so far.
    pub fn mrtd(&self) -> Measurement {
        self.mrtd.finish()
    }

    /// Adds what is left, and tells `progress` after every call to KVM, which may stop it.
    ///
    /// # Errors
    /// [`LaunchError::Page`] with the first frame that was not added.
    pub fn add_with(
        mut self,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Added<V, C>, LaunchError> {
        let total = self.list.pages();
        while let Some(piece) = self.next_piece() {
            self.stage(piece)?;
            let mut region =
                InitMemRegion { source_addr: self.staging.hva(), gpa: piece.start_byte(), nr_pages: piece.pages() };
            let mut fruitless = 0;
            while region.nr_pages != 0 {
                fruitless = if self.add_some(piece, &mut region, fruitless)? { 0 } else { fruitless.saturating_add(1) };
                if progress(Progress { done: self.done, total }).is_break() {
                    return Ok(Added::Stopped(self));
                }
            }
        }
        let Self { td, vcpus, mrtd, .. } = self;
        Ok(Added::Complete(Complete { td, vcpus, mrtd }))
    }

    /// Adds what is left.
    ///
    /// # Errors
    /// As [`add_with`](Self::add_with).
    pub fn add_all(self) -> Result<Complete<V, C>, LaunchError> {
        let mut image = self;
        loop {
            match image.add_with(&mut |_| ControlFlow::Continue(()))? {
                Added::Complete(complete) => return Ok(complete),
                Added::Stopped(rest) => image = rest,
            }
        }
    }

    /// What goes into the next call: as much of one import as there is room for.
    fn next_piece(&mut self) -> Option<GfnRange> {
        loop {
            let gfns = self.list.imports().get(self.import)?.gfns;
            let start = self.gfn.unwrap_or(gfns.start());
            let rest = GfnRange::new(start, gfns.end()).ok()?;
            if let Some(piece) = rest.chunks(STAGED_PAGES).next() {
                return Some(piece);
            }
            self.import = self.import.saturating_add(1);
            self.gfn = None;
        }
    }

    fn stage(&self, piece: GfnRange) -> Result<(), LaunchError> {
        let Some(import) = self.list.imports().get(self.import) else { return Ok(()) };
        for gfn in piece {
            let offset = gfn.start_byte().saturating_sub(piece.start_byte());
            self.staging.write(offset, import.page(gfn).as_slice())?;
        }
        Ok(())
    }

    /// One call: whether it added anything.
    fn add_some(&mut self, piece: GfnRange, region: &mut InitMemRegion, fruitless: u32) -> Result<bool, LaunchError> {
        let Some(import) = self.list.imports().get(self.import) else { return Ok(false) };
        let vcpu = self.vcpus.first_mut().ok_or(LaunchError::NoVcpu)?;
        let before = *region;
        let result = vcpu.init_mem_region(region, import.measured);
        let pages = before.nr_pages.checked_sub(region.nr_pages);
        let bytes = pages.and_then(|pages| pages.checked_mul(PAGE_SIZE));
        let moved = |from: u64, to: u64| bytes.is_some_and(|bytes| from.checked_add(bytes) == Some(to));
        if !moved(before.gpa, region.gpa) || !moved(before.source_addr, region.source_addr) {
            return Err(LaunchError::Progress { gfns: piece, gpa: Gpa(region.gpa), left: region.nr_pages });
        }
        let (from, to) = (Gpa(before.gpa).gfn(), Gpa(region.gpa).gfn());
        for gfn in GfnRange::new(from, to).unwrap_or(GfnRange::empty_at(to)) {
            self.mrtd.add_page(gfn);
            if import.measured {
                self.mrtd.extend_page(gfn, &import.page(gfn));
            }
        }
        self.gfn = Some(to);
        self.done = self.done.saturating_add(pages.unwrap_or(0));
        let got_on = from != to;
        match result {
            // A success that did nothing would come back for ever.
            Ok(()) if !got_on => {
                Err(LaunchError::Progress { gfns: piece, gpa: Gpa(region.gpa), left: region.nr_pages })
            }
            Ok(()) => Ok(true),
            Err(Failure { errno, .. })
                if is_transient(CommandId::InitMemRegion, errno) && (got_on || fruitless < PATIENCE) =>
            {
                pause(errno);
                Ok(got_on)
            }
            Err(failure) => Err(LaunchError::Page { gfn: to, failure }),
        }
    }
}

/// A TD that has all its pages.
#[derive(Debug)]
pub struct Complete<V, C> {
    td: V,
    vcpus: Vec<C>,
    mrtd: Mrtd,
}

impl<V: TdVm, C: TdVcpu> Complete<V, C> {
    /// The measurement that the TD is going to have.
    pub fn mrtd(&self) -> Measurement {
        self.mrtd.finish()
    }

    /// Closes the measurement: from here on the TD can run.
    ///
    /// # Errors
    /// [`LaunchError::Command`].
    pub fn finalize(self) -> Result<Launched<V, C>, LaunchError> {
        patiently(CommandId::FinalizeVm, || self.td.finalize())?;
        Ok(Launched { mrtd: self.mrtd.finish(), td: self.td, vcpus: self.vcpus })
    }
}

/// A TD that can run.
#[derive(Debug)]
pub struct Launched<V, C> {
    /// The VM.
    pub td: V,
    /// Its vCPUs, in the order in which they were handed in.
    pub vcpus: Vec<C>,
    /// Its MRTD, as predicted.
    pub mrtd: Measurement,
}

fn failed(command: CommandId) -> impl FnOnce(Failure) -> LaunchError {
    move |failure| LaunchError::Command { command: command.name(), failure }
}

/// Whether a command asks to be tried again. What is busy is something else for each.
const fn is_transient(command: CommandId, errno: Errno) -> bool {
    match (command, errno) {
        (_, Errno::EINTR)
        // The module lacks entropy, or is at something else.
        | (CommandId::InitVm | CommandId::InitMemRegion, Errno::EAGAIN)
        | (CommandId::FinalizeVm, Errno::EBUSY) => true,
        _ => false,
    }
}

/// Gives whatever is busy the time to be so no more. A signal has been dealt with by now.
fn pause(errno: Errno) {
    if errno != Errno::EINTR {
        std::thread::sleep(PAUSE);
    }
}

/// A command that does all or nothing, until it succeeds or patience ends.
fn patiently(command: CommandId, mut call: impl FnMut() -> Result<(), Failure>) -> Result<(), LaunchError> {
    for _ in 0..PATIENCE {
        match call() {
            Err(failure) if is_transient(command, failure.errno) => pause(failure.errno),
            result => return result.map_err(failed(command)),
        }
    }
    call().map_err(failed(command))
}
