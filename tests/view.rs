//! What devices see of guest memory: held against `vm-memory`'s own, and used by a virtio queue that knows nothing of it.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;

use cvm_memory::addr::{GfnRange, Gpa};
use cvm_memory::backing::{SharedBacking, SharedMemory, SharedSlice};
use cvm_memory::convert::{ConvertError, Outcome, PinPolicy, Request, State};
use cvm_memory::edit::Harvest;
use cvm_memory::layout::{Memslot, SlotFlags, SlotId};
use cvm_memory::memory::{CvmMemory, SlotSpec};
use cvm_memory::soft::SoftVm;
use cvm_memory::view::SharedView;
use nix::errno::Errno;
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, Permissions,
    VolatileMemory, VolatileSlice,
};

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;
const MIB: u64 = 1 << 20;

fn pages(start: u64, end: u64) -> GfnRange {
    GfnRange::from_bytes(start * PAGE, (end - start) * PAGE).unwrap()
}

/// 4 MiB from 0, everything private but `shared`.
fn view(shared: GfnRange) -> SharedView {
    let memory = CvmMemory::builder().ram(0, 4 * MIB).pins(PinPolicy::Refuse);
    let memory = memory.build(Arc::new(SoftVm::software_protected())).unwrap();
    convert(&memory, shared, State::Shared).unwrap().converted().unwrap();
    SharedView::new(Arc::new(memory))
}

fn convert(memory: &CvmMemory, range: GfnRange, to: State) -> Result<Outcome, ConvertError> {
    memory.convert(&Request { range, to })
}

/// Somebody who keeps dirty pages, by offset in the memory behind, and what was there when they were told.
#[derive(Debug, Default)]
struct Written(Mutex<BTreeSet<u64>>, Mutex<Vec<u8>>);

impl Harvest for Written {
    fn harvest(&self, _: &Memslot, _: &SharedSlice) -> Result<(), Errno> {
        Ok(())
    }

    fn wrote(&self, memory: &SharedSlice, bytes: u64) {
        let (first, last) = (memory.offset / PAGE, (memory.offset + bytes - 1) / PAGE);
        self.0.lock().unwrap().extend(first..=last);
        let mut seen = vec![0; usize::try_from(bytes).unwrap()];
        memory.backing.slice(memory.offset, bytes).unwrap().copy_to(&mut seen);
        self.1.lock().unwrap().append(&mut seen);
    }
}

impl Written {
    fn take(&self) -> Vec<u64> {
        std::mem::take(&mut *self.0.lock().unwrap()).into_iter().collect()
    }
}

/// A device reads a request and answers it, through descriptors that the guest wrote. It cannot be led to private memory.
#[test]
fn a_virtio_queue() {
    let view = view(pages(16, 20));
    let (table, avail, used) = (GuestAddress(16 * PAGE), GuestAddress(17 * PAGE), GuestAddress(18 * PAGE));
    let (request, answer, private) = (19 * PAGE, 19 * PAGE + 256, 32 * PAGE);
    let descriptors = [
        Descriptor::new(request, 5, 1, 1),
        Descriptor::new(answer, 8, 2, 0),
        // Another request, that would have the device read and write what is private.
        Descriptor::new(private, 5, 1, 3),
        Descriptor::new(20 * PAGE - 4, 8, 2, 0),
    ];
    for (descriptor, at) in descriptors.into_iter().zip(0..) {
        view.write_obj(descriptor, GuestAddress(table.0 + 16 * at)).unwrap();
    }
    view.write_slice(b"hello", GuestAddress(request)).unwrap();
    // Flags, index, and the heads of the two chains.
    for (field, at) in [0_u16, 2, 0, 2].into_iter().zip(0..) {
        view.write_obj(field, GuestAddress(avail.0 + 2 * at)).unwrap();
    }

    let low = |address: GuestAddress| u32::try_from(address.0).unwrap();
    let mut queue = Queue::new(4).unwrap();
    queue.set_size(4);
    queue.set_desc_table_address(Some(low(table)), Some(0));
    queue.set_avail_ring_address(Some(low(avail)), Some(0));
    queue.set_used_ring_address(Some(low(used)), Some(0));
    queue.set_ready(true);
    assert!(queue.is_valid(&view));

    let mut chain = queue.pop_descriptor_chain(&view).unwrap();
    let (first, second) = (chain.next().unwrap(), chain.next().unwrap());
    let mut bytes = [0; 5];
    view.read_slice(&mut bytes, first.addr()).unwrap();
    assert_eq!(&bytes, b"hello");
    view.write_slice(b"welcome!", second.addr()).unwrap();
    queue.add_used(&view, chain.head_index(), 8).unwrap();
    assert_eq!(view.read_obj::<u16>(GuestAddress(used.0 + 2)).unwrap(), 1, "one chain is used");

    let mut chain = queue.pop_descriptor_chain(&view).unwrap();
    let (first, second) = (chain.next().unwrap(), chain.next().unwrap());
    let refused = view.read_slice(&mut bytes, first.addr()).unwrap_err().to_string();
    assert_eq!(refused, "Guest memory error: access of 0x5 bytes at 0x20000");
    assert!(view.write_slice(b"welcome!", second.addr()).is_err());
    assert_eq!(view.read_obj::<u32>(GuestAddress(20 * PAGE - 4)).unwrap(), 0, "nothing of it was written");

    // Once the guest takes the pages of the ring back, the queue is of no use.
    convert(view.memory(), pages(17, 18), State::Private).unwrap().converted().unwrap();
    assert!(!queue.is_valid(&view));
    assert!(queue.pop_descriptor_chain(&view).is_none());
}

/// Whoever has a slice has its pages: they stay shared until the last part of it has gone.
#[test]
fn a_slice_is_a_pin() {
    let view = view(pages(2, 6));
    let slices = |at, count| -> Vec<VolatileSlice<'_, _>> {
        view.get_slices(GuestAddress(at), count, Permissions::Read).unwrap().map(Result::unwrap).collect()
    };
    let mut slice = slices(2 * PAGE + 8, 4096);
    assert_eq!(slice.iter().map(VolatileSlice::len).sum::<usize>(), 4096);
    let part = slice.pop().unwrap().subslice(10, 1).unwrap();
    drop(slice);
    let refused = |range| matches!(convert(view.memory(), range, State::Private), Err(ConvertError::Locked(_)));
    assert!(refused(pages(2, 3)) && refused(pages(3, 4)), "though the part is a byte of the first page");
    assert!(!refused(pages(4, 6)), "not part of it");
    assert!(view.memory().remove_slot(SlotId::new(0)).is_err(), "nor does its slot go");
    drop(part);
    assert!(!refused(pages(2, 4)));

    // An iterator holds them from the beginning, whatever has been taken out of it.
    convert(view.memory(), pages(2, 4), State::Shared).unwrap().converted().unwrap();
    let some = view.get_slices(GuestAddress(2 * PAGE), 8, Permissions::Write).unwrap();
    assert!(refused(pages(2, 3)));
    drop(some);
    assert!(!refused(pages(2, 3)));
    assert_eq!(view.get_slices(GuestAddress(0), 0, Permissions::Write).unwrap().count(), 0, "nothing is no access");
    assert!(!view.check_range(GuestAddress(3 * PAGE - 1), 2, Permissions::Read));
    assert!(view.check_range(GuestAddress(3 * PAGE), 8, Permissions::Read));
    assert!(!view.check_range(GuestAddress(u64::MAX), 2, Permissions::Read));
}

/// No device writes for the guest what the guest cannot write itself; the VMM does, to put it there.
#[test]
fn read_only_memory() {
    let backing: Arc<dyn SharedBacking> = Arc::new(SharedMemory::new(2 * MIB).unwrap());
    let slots = [(0, SlotFlags::empty()), (MIB, SlotFlags::READONLY)].map(|(gpa, flags)| SlotSpec {
        id: None,
        gpa,
        size: MIB,
        shared: SharedSlice { backing: Arc::clone(&backing), offset: gpa },
        private: None,
        flags,
    });
    let builder = slots.into_iter().fold(CvmMemory::builder(), |builder, slot| builder.slot(slot));
    let view = SharedView::new(Arc::new(builder.build(Arc::new(SoftVm::default_type())).unwrap()));
    view.memory().write(Gpa(MIB - 1), &[1, 2]).unwrap();
    assert_eq!(view.read_obj::<[u8; 2]>(GuestAddress(MIB - 1)).unwrap(), [1, 2]);
    let refused = view.write_obj([3_u8; 2], GuestAddress(MIB - 1)).unwrap_err().to_string();
    assert_eq!(refused, "Guest memory error: write of 0x2 bytes at 0xfffff, some of which is read-only");
    assert_eq!(view.read_obj::<[u8; 2]>(GuestAddress(MIB - 1)).unwrap(), [1, 2]);
    view.write_obj(3_u8, GuestAddress(MIB - 1)).unwrap();
    let allowed = [Permissions::Read, Permissions::Write, Permissions::ReadWrite];
    assert_eq!(allowed.map(|access| view.check_range(GuestAddress(MIB), 8, access)), [true, false, false]);
}

/// Another thread's conversion waits for a device that is at it.
#[test]
fn conversions_wait_for_devices() {
    let memory = CvmMemory::builder().plain_ram(0, MIB).ram(MIB, MIB);
    let memory = memory.build(Arc::new(SoftVm::software_protected())).unwrap();
    convert(&memory, pages(256, 257), State::Shared).unwrap().converted().unwrap();
    let view = SharedView::new(Arc::new(memory));
    let mut slices = view.get_slices(GuestAddress(MIB), 16, Permissions::Write).unwrap();
    let slice = slices.next().unwrap().unwrap();
    thread::scope(|scope| {
        let converted = scope.spawn(|| convert(view.memory(), pages(256, 257), State::Private));
        // Whenever that comes, it finds the page shared or waits.
        slice.write_slice(&[7; 16], 0).unwrap();
        assert_eq!(view.memory().state(pages(256, 257).start()), Some(State::Shared));
        drop((slice, slices));
        assert!(matches!(converted.join().unwrap(), Ok(Outcome::Converted { pages: 1 })));
    });
}

/// A mapping in which somebody begins to keep dirty bits just as it is about to be written.
#[derive(Debug)]
struct Late {
    memory: SharedMemory,
    begin: OnceLock<(Weak<CvmMemory>, Arc<Written>)>,
}

// SAFETY: it is that of `memory`, and lives as long.
#[allow(unsafe_code, reason = "vouches for memory that vouches for itself")]
unsafe impl SharedBacking for Late {
    fn hva(&self) -> u64 {
        self.memory.hva()
    }

    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.memory.discard(offset, len)
    }

    fn resident_bytes(&self) -> Option<u64> {
        None
    }

    fn slice(&self, offset: u64, len: u64) -> Option<VolatileSlice<'_>> {
        if let Some((memory, written)) = self.begin.get() {
            memory.upgrade().unwrap().set_harvest(Some(Arc::clone(written) as Arc<dyn Harvest>)).unwrap();
        }
        self.memory.slice(offset, len)
    }
}

/// Who begins to keep dirty bits while a device is at a write has not seen it, so it must be told.
#[test]
fn a_write_in_progress_is_told() {
    let writes: [fn(&SharedView); 2] = [
        |view| view.memory().write(Gpa(5 * PAGE - 1), &[1, 2]).unwrap(),
        |view| view.write_slice(&[1, 2], GuestAddress(5 * PAGE - 1)).unwrap(),
    ];
    for write in writes {
        let backing = Arc::new(Late { memory: SharedMemory::new(MIB).unwrap(), begin: OnceLock::new() });
        let shared = SharedSlice { backing: Arc::clone(&backing) as Arc<dyn SharedBacking>, offset: 0 };
        let slot = SlotSpec { id: None, gpa: 0, size: MIB, shared, private: None, flags: SlotFlags::empty() };
        let memory = CvmMemory::builder().slot(slot).build(Arc::new(SoftVm::default_type())).unwrap();
        let view = SharedView::new(Arc::new(memory));
        let written = Arc::new(Written::default());
        backing.begin.set((Arc::downgrade(view.memory()), Arc::clone(&written))).unwrap();
        write(&view);
        assert_eq!(written.take(), [4, 5]);
        assert_eq!(*written.1.lock().unwrap(), [1, 2], "it had been written by then");
    }
}

/// One access of a device.
#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    /// So many bytes from a stream into memory.
    Fill(u64, usize),
    Store(u64, u64),
    /// Through parts of a slice.
    Parts(u64, usize),
}

impl Op {
    /// The first byte that is not part of it.
    fn end(&self) -> u64 {
        match self {
            Self::Write(at, bytes) => at + bytes.len() as u64,
            Self::Read(at, len) | Self::Fill(at, len) | Self::Parts(at, len) => at + *len as u64,
            Self::Store(at, _) => (at & !7) + 8,
        }
    }
}

fn any_op() -> impl Strategy<Value = Op> {
    let at = 0..(4 * PAGE + 40);
    let bytes = proptest::collection::vec(any::<u8>(), 0..5_000);
    prop_oneof![
        (at.clone(), bytes).prop_map(|(at, bytes)| Op::Write(at, bytes)),
        (at.clone(), 0..9_000_usize).prop_map(|(at, len)| Op::Read(at, len)),
        (at.clone(), 0..9_000_usize).prop_map(|(at, len)| Op::Fill(at, len)),
        (at.clone(), any::<u64>()).prop_map(|(at, value)| Op::Store(at, value)),
        (at, 1..9_000_usize).prop_map(|(at, len)| Op::Parts(at, len)),
    ]
}

/// What it came to: the bytes read, or that it was refused.
fn perform(memory: &impl GuestMemory, op: &Op) -> Option<Vec<u8>> {
    match op {
        Op::Write(at, bytes) => memory.write_slice(bytes, GuestAddress(*at)).ok().map(|()| Vec::new()),
        Op::Read(at, len) => {
            let mut bytes = vec![0; *len];
            memory.read_slice(&mut bytes, GuestAddress(*at)).ok().map(|()| bytes)
        }
        Op::Fill(at, len) => {
            let stream: Vec<u8> = (0..253).cycle().take(*len).collect();
            memory.read_exact_volatile_from(GuestAddress(*at), &mut &*stream, *len).ok().map(|()| Vec::new())
        }
        Op::Store(at, value) => {
            memory.store(*value, GuestAddress(*at & !7), Ordering::SeqCst).ok()?;
            memory.load::<u64>(GuestAddress(*at & !7), Ordering::SeqCst).ok().map(|value| value.to_ne_bytes().to_vec())
        }
        Op::Parts(at, len) => {
            for slice in memory.get_slices(GuestAddress(*at), *len, Permissions::Write).ok()? {
                let slice = slice.ok()?;
                let (low, high) = slice.split_at(slice.len() / 2).ok()?;
                high.write_slice(&vec![3; high.len() / 2], 0).ok()?;
                low.offset(low.len() / 2).ok()?.write_slice(&vec![5; low.len() - low.len() / 2], 0).ok()?;
                let last = slice.get_ref::<u8>(slice.len() - 1).ok()?;
                last.store(9);
                slice.store(4_u8, slice.len() - 1, Ordering::SeqCst).ok()?;
            }
            Some(Vec::new())
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Shared memory is to a device what `vm-memory`'s own mapping is: the same bytes, the same refusals, the same dirty pages.
    /// Pages 2 and 3 lie in another slot, and in another mapping.
    #[test]
    fn a_device_cannot_tell(ops in proptest::collection::vec(any_op(), 1..12)) {
        let halves = [SharedMemory::new(2 * PAGE).unwrap(), SharedMemory::new(2 * PAGE).unwrap()];
        let written = [Arc::new(Written::default()), Arc::new(Written::default())];
        let both = Arc::new(Both { hvas: [halves[0].hva(), halves[1].hva()], written: written.clone() });
        let slots = halves.into_iter().zip(0..).map(|(half, at)| SlotSpec {
            id: None,
            gpa: at * 2 * PAGE,
            size: 2 * PAGE,
            shared: SharedSlice { backing: Arc::new(half), offset: 0 },
            private: None,
            flags: SlotFlags::empty(),
        });
        let builder = slots.fold(CvmMemory::builder().harvest(both), |builder, slot| builder.slot(slot));
        let view = SharedView::new(Arc::new(builder.build(Arc::new(SoftVm::default_type())).unwrap()));
        let parts = [(GuestAddress(0), 2 * PAGE_BYTES), (GuestAddress(2 * PAGE), 2 * PAGE_BYTES)];
        let peer = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&parts).unwrap();
        for op in &ops {
            let seen = perform(&view, op);
            if op.end() > 4 * PAGE {
                // All or nothing, while the peer does what it can.
                prop_assert_eq!(seen, None, "{:?}", op);
            } else {
                prop_assert_eq!(seen, perform(&peer, op), "{:?}", op);
            }
        }
        let all = |memory: &dyn Fn(&mut [u8])| -> Vec<u8> {
            let mut bytes = vec![0; 4 * PAGE_BYTES];
            memory(&mut bytes);
            bytes
        };
        let seen = all(&|bytes| view.read_slice(bytes, GuestAddress(0)).unwrap());
        prop_assert!(seen == all(&|bytes| peer.read_slice(bytes, GuestAddress(0)).unwrap()));
        for (region, written) in peer.iter().zip(&written) {
            let dirty = (0..).zip([0, PAGE_BYTES]).filter(|(_, at)| region.bitmap().dirty_at(*at)).map(|(page, _)| page);
            prop_assert_eq!(written.take(), dirty.collect::<Vec<u64>>());
        }
    }
}

/// Dirty pages of two mappings.
#[derive(Debug)]
struct Both {
    hvas: [u64; 2],
    written: [Arc<Written>; 2],
}

impl Harvest for Both {
    fn harvest(&self, _: &Memslot, _: &SharedSlice) -> Result<(), Errno> {
        Ok(())
    }

    fn wrote(&self, memory: &SharedSlice, bytes: u64) {
        let at = self.hvas.iter().position(|hva| *hva == memory.backing.hva()).unwrap();
        self.written[at].wrote(memory, bytes);
    }
}
