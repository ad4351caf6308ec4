//! One vCPU at work: it converts pages of its own, and holds what guest and host then see against the model.

use std::error::Error;
use std::sync::Arc;
use std::thread;

use cvm_memory::addr::{GfnRange, Gpa, merge_adjacent};
use cvm_memory::convert::State;
use cvm_memory::exits::VcpuExits;
use cvm_memory::hypervisor::HypercallExit;
use cvm_memory::memory::CvmMemory;
use cvm_memory_testkit::{GuestOp, Outcome, chain};
use hdrhistogram::Histogram;
use indicatif::ProgressBar;

use crate::args::{Args, Discard};
use crate::backend::Backend;
use crate::devices::Devices;
use crate::model::{Keeps, Model, Page, UNKNOWN, ZEROS};
use crate::ram::{Area, Ram, Window};
use crate::workload::{Rng, Script};
use crate::{Cpu, Failure, Implicit};

/// Pages that are read or written at once.
const PIECE: u64 = 64;
/// Mismatches that are printed, per vCPU.
const PRINTED: u64 = 8;
const PAGE: usize = 4096;

pub struct Worker<'a> {
    pub cpu: Cpu,
    /// Requests done.
    pub done: u64,
    /// Pages whose every byte was compared.
    pub verified: u64,
    pub mismatches: u64,
    /// Pages that came back with their old contents, where nothing is ever freed.
    pub stale: u64,
    id: u64,
    pub failed: bool,
    pub around: Surroundings<'a>,
    pub discard: Discard,
    requests: u64,
    pub area: Area,
    model: Model,
    /// Pages that every vCPU converts.
    pub common: Area,
    script: Script,
    rng: Rng,
}

/// What a vCPU is surrounded by.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    pub backend: &'a Backend,
    pub memory: &'a Arc<CvmMemory>,
    pub ram: &'a Ram,
    pub devices: &'a Devices,
}

/// A worker for each vCPU. An eighth of the memory is everybody's, the rest is divided among them.
pub fn crew<'a>(args: &Args, around: &Surroundings<'a>) -> Result<Vec<Worker<'a>>, Failure> {
    let Surroundings { backend, memory, ram, .. } = *around;
    let vcpus = u64::from(args.vcpus);
    let common = ram.pages() / 8;
    let own = ram.pages() - common;
    let share = |id: u64, of: u64| of / vcpus + u64::from(id < of % vcpus);
    let mut sizes: Vec<u64> = (0..vcpus).map(|id| share(id, own)).collect();
    sizes.push(common);
    let mut areas = ram.cut(&sizes);
    let common = areas.pop().ok_or("no memory")?;
    let shared = args.discard == Discard::Never;
    let keeps = Keeps { private: shared && backend.private_contents_survive(), shared };
    (0..)
        .zip(areas)
        .map(|(id, area)| {
            let seed = args.seed.wrapping_add(id << 32);
            let pages = (0..area.pages()).map(|_| Page::NEW);
            Ok(Worker {
                cpu: Cpu {
                    guest: backend.guest(id)?,
                    memory: Arc::clone(memory),
                    exits: VcpuExits::new(Arc::clone(memory)),
                    latency: Histogram::new(3)?,
                    implicit: Implicit::default(),
                },
                done: 0,
                verified: 0,
                mismatches: 0,
                stale: 0,
                id,
                failed: false,
                around: *around,
                discard: args.discard,
                requests: share(id, args.requests),
                model: Model::new(pages, keeps, seed),
                script: Script::new(args.workload, area.pages(), Rng::new(seed)),
                area,
                common: common.clone(),
                rng: Rng::new(!seed),
            })
        })
        .collect()
}

impl Worker<'_> {
    /// The guest boots: it puts a secret into every page it has.
    pub fn fill(&mut self) -> Result<(), Failure> {
        self.area.in_pieces(PIECE).iter().try_for_each(|window| self.guest_writes(window))
    }

    /// Does its part of the requests. One in eight goes to the pages that are everybody's.
    pub fn work(&mut self, bar: &ProgressBar) -> Result<(), Failure> {
        for _ in 0..self.requests {
            if self.rng.one_in(8) {
                self.share_in_common()?;
            } else {
                let ask = self.script.next();
                for window in self.area.windows(ask.first, ask.pages) {
                    self.convert(&window, ask.to)?;
                }
            }
            self.done += 1;
            bar.inc(1);
        }
        Ok(())
    }

    /// Converts pages of its own, and looks at all of them from both sides.
    fn convert(&mut self, window: &Window, to: State) -> Result<(), Failure> {
        let touch =
            self.around.memory.platform().accesses_carry_privacy && window.gfns.pages() <= 4 && self.rng.one_in(2);
        if !touch {
            self.ask(window.gfns, to)?;
        }
        let before: Vec<_> = window.pages().map(|(number, _)| self.model.page(number)).collect();
        self.model.turn(window, to);
        if touch {
            self.touch(window)?;
        }
        for piece in pieces(window) {
            match to {
                State::Shared => self.look_at_shared(&piece)?,
                State::Private => self.look_at_private(&piece)?,
            }
        }
        if self.model.keeps(to) {
            let came_back =
                window.pages().zip(before).filter(|((_, _), page)| page.state != to && page.side(to) != ZEROS);
            self.stale += came_back.count() as u64;
        }
        self.loser_is_free(window.gfns, to);
        Ok(())
    }

    /// Without asking: the guest accesses the pages as if they had been converted, and changes nothing.
    fn touch(&mut self, window: &Window) -> Result<(), Failure> {
        for (number, gfn) in window.pages() {
            let page = self.model.page(number);
            if page.state.is_private() {
                self.guest_reads(GfnRange::page(gfn), State::Private)?;
            } else {
                // To read what is private as if it were shared is no fault to every processor: it may find ciphertext.
                let data = vec![self.model.first_byte(gfn, page.shared)];
                self.cpu.guest.set_private(false);
                self.cpu.perform(GuestOp::Write { gpa: gfn.start_byte(), data })?;
            }
        }
        Ok(())
    }

    /// What the guest wrote the host reads, and the other way round.
    fn look_at_shared(&mut self, window: &Window) -> Result<(), Failure> {
        self.states(window);
        self.guest_sees(window)?;
        self.host_sees(window);
        self.guest_writes(window)?;
        self.host_sees(window);
        self.host_writes(window);
        self.guest_sees(window)
    }

    /// What the guest writes stays with the guest.
    fn look_at_private(&mut self, window: &Window) -> Result<(), Failure> {
        self.states(window);
        self.host_is_refused(window);
        self.guest_sees(window)?;
        self.guest_writes(window)?;
        self.guest_sees(window)?;
        self.secret_is_kept(window)
    }

    /// Looks at every page of its own, whatever was done to it.
    pub fn sweep(&mut self) -> Result<(), Failure> {
        for window in self.area.in_pieces(PIECE) {
            self.states(&window);
            for run in self.runs(&window) {
                self.guest_sees(&run)?;
                match self.model.page(run.first).state {
                    State::Shared => self.host_sees(&run),
                    State::Private => {
                        self.host_is_refused(&run);
                        self.secret_is_kept(&run)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Converts pages that others convert at the same time. What they hold is anybody's guess, and not looked at.
    fn share_in_common(&mut self) -> Result<(), Failure> {
        let (first, pages) = (self.rng.within(0..self.common.pages()), self.rng.within(1..65));
        let to = State::from_private(self.rng.one_in(2));
        for window in self.common.windows(first, pages) {
            self.ask(window.gfns, to)?;
            if self.rng.one_in(4) {
                let page = GfnRange::page(window.gfns.start());
                let state = State::from_private(self.rng.one_in(2));
                self.guest_reads(page, state)?;
            }
            // A device tries its luck.
            let _refused = self.around.memory.write(Gpa(window.gfns.start_byte()), b"device");
        }
        Ok(())
    }

    /// The guest's request, by hypercall.
    fn ask(&mut self, gfns: GfnRange, to: State) -> Result<(), Failure> {
        let attributes = if to.is_private() { 1 << 4 } else { 0 };
        let args = [gfns.start_byte(), gfns.pages(), attributes, 0];
        let answer = self.cpu.perform(GuestOp::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args })?;
        self.expect(answer == Outcome::Answer(0), || format!("gfns {gfns} to {to}: the guest was told {answer:?}"));
        Ok(())
    }

    fn guest_reads(&mut self, gfns: GfnRange, state: State) -> Result<Vec<u8>, Failure> {
        self.cpu.guest.set_private(state.is_private());
        let len = usize::try_from(gfns.bytes())?;
        match self.cpu.perform(GuestOp::Read { gpa: gfns.start_byte(), len })? {
            Outcome::Data(bytes) => Ok(bytes),
            other => Err(format!("a read came to {other:?}").into()),
        }
    }

    fn guest_writes(&mut self, window: &Window) -> Result<(), Failure> {
        for run in self.runs(window) {
            let data = self.model.fill(&run);
            self.cpu.guest.set_private(self.model.page(run.first).state.is_private());
            self.cpu.perform(GuestOp::Write { gpa: run.gfns.start_byte(), data })?;
        }
        Ok(())
    }

    fn host_writes(&mut self, window: &Window) {
        let data = self.model.fill(window);
        let written = self.around.memory.write(Gpa(window.gfns.start_byte()), &data);
        self.expect(written.is_ok(), || format!("host cannot write {}: {written:?}", window.gfns));
    }

    /// The guest finds in a window, all of one state, what the model says.
    fn guest_sees(&mut self, window: &Window) -> Result<(), Failure> {
        let bytes = self.guest_reads(window.gfns, self.model.page(window.first).state)?;
        self.contents(window, &bytes, "guest");
        Ok(())
    }

    fn host_sees(&mut self, window: &Window) {
        let mut bytes = vec![0; window.gfns.iter().count() * PAGE];
        match self.around.memory.read(Gpa(window.gfns.start_byte()), &mut bytes) {
            Ok(()) => self.contents(window, &bytes, "host"),
            Err(error) => self.expect(false, || format!("host cannot read {}: {}", window.gfns, chain(&error))),
        }
    }

    fn contents(&mut self, window: &Window, bytes: &[u8], who: &str) {
        for ((number, gfn), found) in window.pages().zip(bytes.chunks_exact(PAGE)) {
            let page = self.model.page(number);
            let same = self.model.is(gfn, page.current(), found);
            self.verified += 1;
            self.expect(same, || format!("{who} sees other bytes in gfn {gfn:#x} than {page:?}"));
        }
    }

    fn host_is_refused(&mut self, window: &Window) {
        for (_, gfn) in window.pages() {
            let read = self.around.memory.read(Gpa(gfn.start_byte()), &mut [0]);
            self.expect(read.is_err(), || format!("host reads private gfn {gfn:#x}"));
        }
    }

    /// The shared memory behind private pages holds nothing of theirs: zeros, or what was shared before if that is freed
    /// later or never.
    fn secret_is_kept(&mut self, window: &Window) -> Result<(), Failure> {
        let bytes = self.around.ram.shared_bytes(window.gfns)?;
        let now = self.discard == Discard::Immediate;
        for ((number, gfn), found) in window.pages().zip(bytes.chunks_exact(PAGE)) {
            let page = self.model.page(number);
            self.verified += 1;
            let left = match page.shared {
                UNKNOWN => !self.model.is(gfn, page.private, found),
                shared => self.model.is(gfn, shared, found),
            };
            let fine = self.model.is(gfn, ZEROS, found) || (left && !now);
            self.expect(fine, || format!("shared memory of private gfn {gfn:#x} holds bytes it should not: {page:?}"));
        }
        Ok(())
    }

    /// What lost holds no memory any more.
    fn loser_is_free(&mut self, gfns: GfnRange, to: State) {
        let side = to.opposite();
        if self.discard == Discard::Immediate {
            let held = self.around.ram.held(gfns, side).unwrap_or(0);
            self.expect(held == 0, || format!("{held} bytes of the {side} side of gfns {gfns} were not freed"));
        }
    }

    fn states(&mut self, window: &Window) {
        for (number, gfn) in window.pages() {
            let (state, page) = (self.around.memory.state(gfn), self.model.page(number));
            self.expect(state == Some(page.state), || format!("gfn {gfn:#x} is {state:?}, not {page:?}"));
            let reach = self.around.devices.reach(gfn);
            self.expect(reach != page.state.is_private(), || format!("devices reach gfn {gfn:#x}: {reach}; {page:?}"));
        }
    }

    /// A window in parts that are each of one state.
    fn runs(&self, window: &Window) -> Vec<Window> {
        let mut runs: Vec<Window> = Vec::new();
        for (first, gfn) in window.pages() {
            let page = GfnRange::page(gfn);
            match runs.last_mut() {
                Some(run) if self.model.page(run.first).state == self.model.page(first).state => {
                    run.gfns = run.gfns.hull(&page);
                }
                _ => runs.push(Window { first, gfns: page }),
            }
        }
        runs
    }

    pub fn expect(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.mismatches += 1;
            if self.mismatches <= PRINTED {
                eprintln!("mismatch: vCPU {}: {}", self.id, what());
            }
        }
    }

    /// A vCPU that cannot go on is a mismatch too: this guest does nothing that a VM may stop for.
    fn fail(&mut self, error: &(dyn Error + 'static)) {
        self.failed = true;
        self.expect(false, || chain(error));
    }

    /// Takes over `area`, in the states that the library says it has.
    fn adopt(&mut self, area: Area) {
        let all = area.windows(0, area.pages());
        let found = |gfn| {
            let state = self.around.memory.state(gfn).unwrap_or(State::Shared);
            Page { state, private: UNKNOWN, shared: UNKNOWN }
        };
        let keeps = Keeps { private: true, shared: true };
        self.model = Model::new(all.iter().flat_map(Window::pages).map(|(_, gfn)| found(gfn)), keeps, 0);
        self.area = area;
    }
}

fn pieces(window: &Window) -> Vec<Window> {
    let parts = window.gfns.split_every(PIECE);
    parts
        .scan(window.first, |first, gfns| {
            let piece = Window { first: *first, gfns };
            *first += gfns.iter().count();
            Some(piece)
        })
        .collect()
}

/// The pages that everybody converted. Their states are known to the library alone, but nobody may contradict it: the
/// guest writes to all of them, and the host must see just what was written to pages said to be shared.
pub fn check_common(workers: &mut [Worker<'_>]) {
    let Some(worker) = workers.iter_mut().find(|worker| !worker.failed) else { return };
    worker.adopt(worker.common.clone());
    if let Err(error) = worker.fill().and_then(|()| worker.sweep()) {
        worker.fail(error.as_ref());
    }
    for complaint in worker.around.devices.take_complaints() {
        worker.expect(false, || complaint);
    }
    // And the software KVM can be asked.
    let Surroundings { backend, memory, ram, .. } = worker.around;
    if let Some(attributes) = backend.private_gfns() {
        let told = ram.slots().flat_map(|gfns| memory.converter().materialised().member_runs(gfns).collect::<Vec<_>>());
        let told = merge_adjacent(told);
        worker.expect(attributes == told, || format!("attributes {attributes:?} but the record says {told:?}"));
    }
}

/// One thread for each vCPU. A vCPU that has failed does nothing more.
pub fn on_all<'a>(workers: &mut [Worker<'a>], work: impl Fn(&mut Worker<'a>) -> Result<(), Failure> + Sync) {
    thread::scope(|scope| {
        for worker in workers.iter_mut().filter(|worker| !worker.failed) {
            let work = &work;
            scope.spawn(move || {
                if let Err(error) = work(worker) {
                    worker.fail(error.as_ref());
                }
            });
        }
    });
}
