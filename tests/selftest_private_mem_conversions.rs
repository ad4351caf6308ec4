//! The kernel's `private_mem_conversions_test`, through the library: memory that the guest turns private and shared again
//! by hypercall, page by page and in ranges that no slot and no large page is aligned to.
//!
//! Who sees what is checked from both sides: the guest reads what it wrote, and the host, by its own mapping, only ever
//! what was written while the page was shared.

mod selftest_kit;

use std::sync::Arc;
use std::thread;

use cvm_memory::addr::{FilePage, Gpa};
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::convert::{DiscardPolicy, State};
use cvm_memory::exits::{Action, Handled, VcpuExits};
use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{HypercallExit, MemoryRegion, Platform};
use cvm_memory::layout::SlotFlags;
use cvm_memory::memory::{Builder, CvmMemory, SlotSpec};
use cvm_memory_testkit::{Guest, GuestOp, Outcome};
use selftest_kit::*;

/// Where the first vCPU's memory is.
const BASE: u64 = 4 << 30;
/// What each vCPU plays with.
const DATA: u64 = 2 * MIB + PAGE;
/// What each vCPU has.
const STRIDE: u64 = 4 * MIB;
/// Offset and length.
const RANGES: [(u64, u64); 5] = [(0, PAGE), (0, 2 * MIB), (PAGE, PAGE), (PAGE, 2 * MIB), (2 * MIB, PAGE)];

/// First of all, by the guest.
const DEFAULT: u8 = 0xaa;
/// Then by the host, and what everything goes back to.
const REST: u8 = 0xcc;
/// By the guest, before its range turns private: what the host goes on seeing.
const BEFORE: u8 = 0x11;
/// By the guest, while it is private.
const SECRET: u8 = 0x22;
/// By the host into odd pages that are shared again, and by the guest at the end.
const AGAIN: u8 = 0x33;
/// By the host, when all is shared again.
const HOST: u8 = 0x44;

/// What is done to the side that loses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    /// Nothing: KVM's attribute is all that changes.
    Kept,
    /// The file's pages are allocated before they are used, and freed afterwards.
    Allocated,
    /// The library frees whichever side lost.
    Freed,
}

struct Setup<M> {
    vm: M,
    memory: Arc<CvmMemory>,
    file: Arc<GuestMemfd>,
    shared: Arc<SharedMemory>,
}

impl<M: Machine> Setup<M> {
    /// Memory for `vcpus`, in one file and `slots` slots.
    fn new(vcpus: u64, slots: u64, backing: Backing) -> Option<Self> {
        Self::with(vcpus, slots, backing, false)
    }

    /// The same, added to a VM that was made without any memory.
    fn added_later(vcpus: u64, slots: u64, backing: Backing) -> Option<Self> {
        Self::with(vcpus, slots, backing, true)
    }

    fn with(vcpus: u64, slots: u64, backing: Backing, later: bool) -> Option<Self> {
        let vm = M::create(Platform::SOFTWARE_PROTECTED)?;
        let size = vcpus * STRIDE;
        let file = Arc::new(vm.create_guest_memfd(size, 0).unwrap());
        let shared = Arc::new(SharedMemory::new(size).unwrap());
        let part = size / slots;
        let discard = if backing == Backing::Freed { DiscardPolicy::Immediate } else { DiscardPolicy::Never };
        let spec = |slot| SlotSpec {
            id: None,
            gpa: BASE + slot * part,
            size: part,
            shared: SharedSlice { backing: Arc::clone(&shared) as Arc<dyn SharedBacking>, offset: slot * part },
            private: Some((Arc::clone(&file), FilePage::containing(slot * part))),
            flags: SlotFlags::empty(),
        };
        let (now, then) = if later { (0..0, 0..slots) } else { (0..slots, 0..0) };
        let builder = now.map(spec).fold(CvmMemory::builder(), Builder::slot);
        let builder = builder.initial(State::Shared).discard(discard).address_limit(BASE + size);
        let memory = builder.build(Arc::new(vm.clone())).unwrap();
        memory.add_slots(then.map(spec).collect()).unwrap();
        Some(Self { vm, memory: Arc::new(memory), file, shared })
    }

    /// One vCPU with its part of the memory.
    fn player(&self, id: u64, backing: Backing) -> Player<'_, M> {
        let exits = VcpuExits::new(Arc::clone(&self.memory));
        Player { setup: self, guest: self.vm.guest(id), exits, start: id * STRIDE, backing, conversions: 0 }
    }
}

/// Offsets are into the memory of this vCPU.
struct Player<'a, M: Machine> {
    setup: &'a Setup<M>,
    guest: M::Guest,
    exits: VcpuExits,
    start: u64,
    backing: Backing,
    conversions: u32,
}

impl<M: Machine> Player<'_, M> {
    /// The guest does something that needs nobody's help.
    fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        let gpa = BASE + self.start + offset;
        assert_eq!(self.guest.perform(GuestOp::Fill { gpa, len, byte }), Outcome::Done);
    }

    fn guest_sees(&mut self, offset: u64, len: u64, byte: u8) {
        if len != 0 {
            let gpa = BASE + self.start + offset;
            let seen = self.guest.perform(GuestOp::Check { gpa, len, byte });
            assert_eq!(seen, Outcome::Same, "{byte:#x} at {offset:#x}, {len:#x} bytes, {:?}", self.backing);
        }
    }

    fn host_sees(&self, offset: u64, len: u64, byte: u8) {
        let at = self.start + offset;
        assert!(
            is_all(&self.setup.shared, at, len, byte),
            "{byte:#x} at {offset:#x}, {len:#x} bytes, {:?}",
            self.backing
        );
    }

    fn host_fills(&self, offset: u64, len: u64, byte: u8) {
        // As a device does, so that the record has its say.
        let at = Gpa(BASE + self.start + offset);
        self.setup.memory.write(at, &vec![byte; usize::try_from(len).unwrap()]).unwrap();
    }

    /// The guest asks for a conversion, and gets it.
    fn map(&mut self, offset: u64, len: u64, to: State) {
        let gpa = BASE + self.start + offset;
        if to.is_private() && self.backing == Backing::Allocated {
            self.setup.file.allocate(file_range(self.start + offset, len)).unwrap();
        }
        let attributes = if to.is_private() { 0x10 } else { 0 };
        let op = GuestOp::Hypercall { nr: HypercallExit::MAP_GPA_RANGE, args: [gpa, len / PAGE, attributes, 0] };
        let (exits, mut handled) = (&mut self.exits, Vec::new());
        let answer = self.guest.complete(op, &mut |mut exit| match exits.handle(&mut exit) {
            Action::Resume(what) => handled.push(what),
            other => panic!("{exit:?}: {other:?}"),
        });
        assert_eq!(answer, Outcome::Answer(0));
        assert!(matches!(handled[..], [Handled::Converted { .. } | Handled::Unchanged]), "{handled:?}");
        self.conversions += 1;
        if !to.is_private() && self.backing == Backing::Allocated {
            self.punch(offset, len);
        }
    }

    fn punch(&self, offset: u64, len: u64) {
        self.setup.file.punch_hole(file_range(self.start + offset, len)).unwrap();
    }

    /// What the host has of a page that was shared with `before`, and is private now.
    fn host_sees_old(&self, offset: u64, len: u64, before: u8) {
        let left = if self.backing == Backing::Freed { 0 } else { before };
        self.host_sees(offset, len, left);
        let at = Gpa(BASE + self.start + offset);
        assert!(self.setup.memory.read(at, &mut [0]).is_err(), "a device may read private memory");
    }

    /// Memory is shared until the guest says otherwise.
    fn starts_shared(&mut self) {
        self.fill(0, DATA, DEFAULT);
        self.guest_sees(0, DATA, DEFAULT);
        self.host_sees(0, DATA, DEFAULT);
        self.host_fills(0, DATA, REST);
        self.guest_sees(0, DATA, REST);
    }

    fn converts(&mut self, offset: u64, len: u64) {
        let pages = || (offset..offset + len).step_by(4096);
        let is_odd = |page: u64| (page - offset) / PAGE % 2 == 1;

        // There and back.
        self.fill(offset, len, BEFORE);
        self.map(offset, len, State::Private);
        // Fresh memory, since every round begins without any.
        self.guest_sees(offset, len, 0);
        self.fill(offset, len, SECRET);
        self.guest_sees(offset, len, SECRET);
        self.host_sees_old(offset, len, BEFORE);
        self.guest_sees(0, offset, REST);
        self.guest_sees(offset + len, DATA - offset - len, REST);

        // Holes in private memory.
        let odd: Vec<u64> = pages().filter(|page| is_odd(*page)).collect();
        // Each is a call; of many, the ends and the middle will do.
        let some = odd.iter().enumerate().filter(|(n, _)| *n < 4 || *n + 4 >= odd.len() || (120..136).contains(n));
        let some: Vec<u64> = some.map(|(_, page)| *page).collect();
        for &page in &some {
            self.map(page, PAGE, State::Shared);
            let old = if self.backing == Backing::Freed { 0 } else { BEFORE };
            self.guest_sees(page, PAGE, old);
            self.host_fills(page, PAGE, AGAIN);
            self.guest_sees(page, PAGE, AGAIN);
        }
        for page in pages() {
            if some.contains(&page) {
                self.host_sees(page, PAGE, AGAIN);
            } else if some.iter().any(|hole| page.abs_diff(*hole) == PAGE) {
                self.guest_sees(page, PAGE, SECRET);
                self.host_sees_old(page, PAGE, BEFORE);
            }
        }

        // All back.
        self.map(offset, len, State::Shared);
        self.fill(offset, len, AGAIN);
        self.host_sees(offset, len, AGAIN);
        self.host_fills(offset, len, HOST);
        self.guest_sees(offset, len, HOST);
        self.fill(offset, len, REST);
        self.guest_sees(0, DATA, REST);
        self.host_sees(0, DATA, REST);
        // The next round is to begin without private memory; who frees what loses has none.
        if self.backing != Backing::Freed {
            self.punch(0, DATA);
        }
    }

    /// Pages taken from the file are zeroes when they are touched again, whichever hole they were in.
    fn finds_holes(&mut self, precise: bool) {
        self.map(0, DATA, State::Private);
        for (offset, len) in RANGES {
            self.fill(offset, len, REST);
            self.guest_sees(offset, len, REST);
            if precise {
                self.punch(offset, len);
            } else {
                self.punch(0, DATA);
            }
            self.guest_sees(offset, len, 0);
        }
        self.map(0, DATA, State::Shared);
    }

    fn play(&mut self) {
        self.starts_shared();
        for (offset, len) in RANGES {
            self.converts(offset, len);
        }
        for precise in [true, false] {
            self.finds_holes(precise);
        }
    }
}

fn conversions<M: Machine>(vcpus: u64, slots: u64, backing: Backing) {
    let Some(setup) = Setup::<M>::new(vcpus, slots, backing) else { return };
    // KVM creates one vCPU at a time.
    let players: Vec<_> = (0..vcpus).map(|id| setup.player(id, backing)).collect();
    let conversions: u32 = thread::scope(|scope| {
        let mut running = Vec::new();
        for mut player in players {
            running.push(scope.spawn(move || {
                player.play();
                player.conversions
            }));
        }
        running.into_iter().map(|player| player.join().unwrap()).sum()
    });
    println!("{}: {vcpus} vCPUs, {slots} slots, {backing:?}: {conversions} conversions", M::NAME);
    if backing != Backing::Kept {
        assert_resident(&setup.file, 0);
    }

    // Everything goes, the VM before the file; the file goes on.
    let Setup { vm, memory, file, shared } = setup;
    assert_eq!(Arc::strong_count(&memory), 1);
    drop((memory, shared, vm));
    file.punch_hole(file.pages()).unwrap();
    file.allocate(file.pages()).unwrap();
    assert_resident(&file, file.size());
}

fn one_vcpu_one_slot_without_allocation<M: Machine>() {
    conversions::<M>(1, 1, Backing::Kept);
}

fn one_vcpu_one_slot_with_allocation<M: Machine>() {
    conversions::<M>(1, 1, Backing::Allocated);
}

fn one_vcpu_two_slots_and_what_loses_is_freed<M: Machine>() {
    conversions::<M>(1, 2, Backing::Freed);
}

fn one_vcpu_four_slots_with_allocation<M: Machine>() {
    conversions::<M>(1, 4, Backing::Allocated);
}

fn two_vcpus_one_slot_with_allocation<M: Machine>() {
    conversions::<M>(2, 1, Backing::Allocated);
}

fn two_vcpus_two_slots_without_allocation<M: Machine>() {
    conversions::<M>(2, 2, Backing::Kept);
}

fn two_vcpus_four_slots_and_what_loses_is_freed<M: Machine>() {
    conversions::<M>(2, 4, Backing::Freed);
}

/// Memory that comes when the VM is there already is converted like any other.
fn memory_added_later<M: Machine>() {
    let Some(setup) = Setup::<M>::added_later(1, 2, Backing::Freed) else { return };
    let mut player = setup.player(0, Backing::Freed);
    player.starts_shared();
    player.converts(PAGE, PAGE);
}

/// The VM's descriptor goes while a slot is still bound to the file: the file works until it goes itself (I12).
fn the_file_outlives_the_vm_with_a_slot_bound<M: Machine>() {
    let Some(vm) = M::create(Platform::SOFTWARE_PROTECTED) else { return };
    let file = vm.create_guest_memfd(STRIDE, 0).unwrap();
    let shared = leaked(STRIDE);
    let region = gmem_slot(0, BASE, STRIDE, fd(&file), 0);
    set(&vm, &MemoryRegion { userspace_addr: shared.hva(), ..region }).unwrap();
    set_private(&vm, BASE, STRIDE, true);
    let mut guest = vm.guest(0);
    assert_eq!(guest.perform(GuestOp::Fill { gpa: BASE, len: DATA, byte: SECRET }), Outcome::Done);
    assert_resident(&file, DATA);

    drop(guest);
    drop(vm);
    for (offset, len) in RANGES {
        file.punch_hole(file_range(offset, len)).unwrap();
        file.allocate(file_range(offset, len)).unwrap();
        file.punch_hole(file_range(offset, len)).unwrap();
    }
    assert_resident(&file, 0);
}

on_both_machines!(
    one_vcpu_one_slot_without_allocation,
    one_vcpu_one_slot_with_allocation,
    one_vcpu_two_slots_and_what_loses_is_freed,
    one_vcpu_four_slots_with_allocation,
    two_vcpus_one_slot_with_allocation,
    two_vcpus_two_slots_without_allocation,
    two_vcpus_four_slots_and_what_loses_is_freed,
    memory_added_later,
    the_file_outlives_the_vm_with_a_slot_bound,
);
