//! Page state changes by page: what userspace sees of each buffer, what the guest finds in it afterwards, and bad buffers.

#[path = "kit/soft.rs"]
mod soft;

use cvm_memory::hypervisor::{Exit, Vcpu as _};
use cvm_memory::memory::CvmMemory;
use cvm_memory_sev::ghcb::page::{
    EXIT_AP_CREATION, EXIT_INFO_1, EXIT_INFO_2, EXIT_PSC, SCRATCH, SHARED_BUFFER, USAGE, VALID_BITMAP,
};
use cvm_memory_sev::ghcb::psc::{Buffer, Cursor, Entry, Header, MAX_ENTRIES, Next, max_entries};
use cvm_memory_sev::ghcb::{MapGpaRange, Operation};
use cvm_memory_sev::soft::{SnpGuest, vmgexit};
use proptest::collection::vec;
use proptest::prelude::*;
use soft::{Guests, launched};

const GHCB: u64 = 0x1000;
const MIB: u64 = 1 << 20;

fn guests() -> Guests {
    let mut guests = launched(CvmMemory::builder().ram(0, 64 * MIB), 2);
    guests.vcpus[0].set_up_ghcb(GHCB).unwrap();
    guests
}

/// A buffer in memory of ours.
struct Memory(Vec<u64>);

impl Memory {
    fn new(header: Header, entries: &[Entry]) -> Self {
        Self([header.raw()].into_iter().chain(entries.iter().map(|entry| entry.raw())).collect())
    }

    fn entry(&self, nr: usize) -> Entry {
        Entry::from_raw(self.0[nr + 1])
    }
}

impl Buffer for Memory {
    type Error = u64;

    fn read(&mut self, offset: u64) -> Result<u64, u64> {
        self.0.get(usize::try_from(offset / 8).unwrap()).copied().ok_or(offset)
    }

    fn write(&mut self, offset: u64, value: u64) -> Result<(), u64> {
        *self.0.get_mut(usize::try_from(offset / 8).unwrap()).ok_or(offset)? = value;
        Ok(())
    }
}

fn private(gfn: u64, large: bool) -> Entry {
    Entry::new(gfn, Operation::Private, large)
}

fn shared(gfn: u64, large: bool) -> Entry {
    Entry::new(gfn, Operation::Shared, large)
}

/// Works a buffer off, answering every exit with `answer`: the exits, how it ended, the buffer afterwards.
fn work(header: Header, entries: &[Entry], answer: u64) -> (Vec<MapGpaRange>, u64, Memory) {
    let mut memory = Memory::new(header, entries);
    let mut cursor = Cursor::new(MAX_ENTRIES);
    let mut exits = Vec::new();
    let mut next = cursor.next(&mut memory).unwrap();
    loop {
        match next {
            Next::Finished(completion) => return (exits, completion.raw(), memory),
            Next::Exit(exit) => exits.push(exit),
        }
        next = cursor.complete(&mut memory, answer).unwrap();
    }
}

fn all(entries: &[Entry]) -> Header {
    Header { cur_entry: 0, end_entry: u16::try_from(entries.len() - 1).unwrap() }
}

#[test]
fn fields_stand_where_the_specification_has_them() {
    let raw = 0x0120_1234_5678_9abc_u64;
    let entry = Entry { cur_page: 0xabc, gfn: 0x0001_2345_6789, operation: 2, large: true };
    assert_eq!((Entry::from_raw(raw), entry.raw()), (entry, raw));
    assert_eq!(Entry::from_raw(raw | 0xfe << 56), entry, "reserved bits are not looked at");
    let header = Header { cur_entry: 3, end_entry: 252 };
    assert_eq!((Header::from_raw(0x00fc_0003), header.raw()), (header, 0x00fc_0003));
    assert_eq!([2032, 2031, 16, 15, 8, 7, 0].map(max_entries), [253, 252, 1, 0, 0, 0, 0]);
    let change = MapGpaRange { gfn: 0x200, pages: 512, operation: Operation::Private, large: true };
    assert_eq!(change.args(), [0x20_0000, 512, 0x11, 0, 0, 0]);
    assert_eq!(MapGpaRange { operation: Operation::Shared, large: false, ..change }.args()[2], 0);
}

#[test]
fn neighbours_go_together() {
    let entries = [
        private(8, false),
        private(9, false),
        shared(10, false),
        shared(12, false),
        private(512, true),
        private(1024, true),
        private(1536, false),
        private(1537, false),
    ];
    let (exits, end, memory) = work(all(&entries), &entries, 0);
    let found: Vec<_> = exits.iter().map(|exit| (exit.gfn, exit.pages, exit.operation, exit.large)).collect();
    use Operation::{Private, Shared};
    let expected = [
        (8, 2, Private, false),
        (10, 1, Shared, false),
        (12, 1, Shared, false),
        (512, 1024, Private, true),
        (1536, 2, Private, false),
    ];
    assert_eq!(found, expected);
    assert_eq!(end, 0);
    assert_eq!(Header::from_raw(memory.0[0]).cur_entry, 8);
    let done: Vec<u16> = (0..8).map(|nr| memory.entry(nr).cur_page).collect();
    assert_eq!(done, [1, 1, 1, 1, 512, 512, 1, 1]);
    // All 253, of 2 MiB: one exit.
    let most: Vec<Entry> = (0..253).map(|nr| private(nr * 512, true)).collect();
    let (exits, end, _) = work(all(&most), &most, 0);
    assert_eq!((exits.len(), exits[0].pages, end), (1, 129_536, 0));
}

#[test]
fn what_is_done_is_skipped_and_what_is_begun_is_gone_on_with() {
    let done = Entry { cur_page: 1, ..private(8, false) };
    let begun = Entry { cur_page: 500, ..private(512, true) };
    let entries = [done, begun, private(1024, true)];
    let (exits, end, memory) = work(all(&entries), &entries, 0);
    let found: Vec<_> = exits.iter().map(|exit| (exit.gfn, exit.pages, exit.large)).collect();
    // The hint still says 2 MiB, though what is left is not aligned to that; the next entry goes by itself.
    assert_eq!(found, [(1012, 12, true), (1024, 512, true)]);
    assert_eq!((end, memory.entry(1).cur_page), (0, 512));
    // Not even with one of 2 MiB that stands where the 4 KiB pages end, which there cannot be.
    let entries = [begun, private(524, true)];
    let (exits, end, _) = work(all(&entries), &entries, 0);
    assert_eq!((exits.len(), exits[0].pages, end), (1, 12, 0x1_0000_0002));
    let everything = [done, Entry { cur_page: 512, ..private(512, true) }];
    assert_eq!(work(all(&everything), &everything, 0).0, []);
    // From the middle, and from behind the end.
    let entries = [private(1, false), private(2, false)];
    let from = |cur_entry| work(Header { cur_entry, end_entry: 1 }, &entries, 0);
    assert_eq!((from(1).0.len(), from(1).2.entry(0).cur_page), (1, 0));
    assert_eq!((from(2).0.len(), from(2).1), (0, 0));
    assert_eq!((from(u16::MAX).0.len(), from(u16::MAX).1), (0, 0));
}

#[test]
fn errors_leave_the_batch_as_it_was() {
    let entries = [private(8, false), shared(9, false)];
    let (exits, end, memory) = work(all(&entries), &entries, 22);
    assert_eq!((exits.len(), end), (1, 0x100_0000_0000));
    assert_eq!((memory.entry(0).cur_page, Header::from_raw(memory.0[0]).cur_entry), (0, 0));
    for end_entry in [253, 254, u16::MAX] {
        assert_eq!(work(Header { cur_entry: 0, end_entry }, &entries, 0).1, 0x1_0000_0001);
    }
    for bad in [
        Entry { cur_page: 2, ..private(8, false) },
        Entry { cur_page: 513, ..private(512, true) },
        private(513, true),
        Entry { cur_page: 0xfff, ..shared(8, false) },
    ] {
        let (exits, end, _) = work(all(&[shared(1, false), bad]), &[shared(1, false), bad], 0);
        assert_eq!((exits.len(), end), (1, 0x1_0000_0002), "{bad:?}");
    }
    // Operations that KVM does not carry out are done without an exit.
    let other =
        [Entry { operation: 3, ..private(512, true) }, Entry { operation: 0, ..private(8, false) }, shared(9, false)];
    let (exits, end, memory) = work(all(&other), &other, 0);
    assert_eq!((exits.len(), end), (1, 0));
    assert_eq!([0, 1, 2].map(|nr| memory.entry(nr).cur_page), [512, 1, 1]);
}

/// The exits that a guest's request makes, as userspace sees them, each answered with `answer`; and the two result fields.
fn request(guest: &mut SnpGuest, header: Header, entries: &[Entry], answer: u64) -> (Vec<[u64; 6]>, [u64; 2]) {
    let buffer: Vec<u8> = Memory::new(header, entries).0.into_iter().flat_map(u64::to_le_bytes).collect();
    guest.write_shared(GHCB + SHARED_BUFFER, &buffer).unwrap();
    let fields = [(0x390, EXIT_PSC), (EXIT_INFO_1, 0), (EXIT_INFO_2, 0), (SCRATCH, GHCB + SHARED_BUFFER)];
    for (offset, value) in fields {
        guest.write_shared(GHCB + offset, &value.to_le_bytes()).unwrap();
    }
    // Bits 114 to 117.
    guest.write_shared(GHCB + VALID_BITMAP + 14, &[0x3c]).unwrap();
    let mut exits = Vec::new();
    let vcpu = guest.vcpu();
    vcpu.start(vmgexit(GHCB));
    loop {
        match vcpu.run().unwrap() {
            Exit::Halt => break,
            Exit::Hypercall(exit) => {
                assert_eq!(exit.nr, 12);
                exits.push(exit.args);
                *exit.ret = answer;
            }
            other => panic!("{other:?}"),
        }
    }
    let results = [EXIT_INFO_1, EXIT_INFO_2].map(|offset| guest.field(GHCB, offset).unwrap());
    (exits, results)
}

#[test]
fn a_guest_asks_by_page() {
    let mut guests = guests();
    let guest = &mut guests.vcpus[0];
    let entries = [shared(0x800, true), shared(0xa00, true), private(9, false)];
    let (exits, results) = request(guest, all(&entries), &entries, 0);
    assert_eq!(exits, [[0x80_0000, 1024, 1, 0, 0, 0], [0x9000, 1, 0x10, 0, 0, 0]]);
    assert_eq!(results, [0, 0]);
    assert_eq!(guest.field(GHCB, SHARED_BUFFER).unwrap() & 0xffff, 3, "the guest sees how far it came");
    let (_, results) = request(guest, all(&entries), &entries, 22);
    assert_eq!(results, [0, 0x100_0000_0000]);
    assert_eq!(guest.field(GHCB, SHARED_BUFFER).unwrap() & 0xffff, 0);
    let (exits, results) = request(guest, Header { cur_entry: 0, end_entry: 253 }, &entries, 0);
    assert_eq!((exits.len(), results), (0, [0, 0x1_0000_0001]));
}

#[test]
fn bad_pages_are_refused_with_the_reason() {
    let mut guests = guests();
    let guest = &mut guests.vcpus[0];
    let refused = |guest: &mut SnpGuest, code: u64| {
        guest.request(GHCB, code, 0, 0).unwrap();
        [EXIT_INFO_1, EXIT_INFO_2].map(|offset| guest.field(GHCB, offset).unwrap())
    };
    assert_eq!(refused(guest, 0x8000_0042), [2, 6], "no such event");
    guest.write_shared(GHCB + USAGE, &1_u32.to_le_bytes()).unwrap();
    assert_eq!(refused(guest, EXIT_PSC), [2, 2], "invalid usage");
    guest.write_shared(GHCB + USAGE, &[0; 4]).unwrap();
    // The scratch area before, behind and across the end of the shared buffer; anywhere in it; and not said to be valid.
    let done = Memory::new(Header { cur_entry: 0, end_entry: 0 }, &[Entry { cur_page: 1, ..shared(9, false) }]).0;
    let done: Vec<u8> = done.into_iter().flat_map(u64::to_le_bytes).collect();
    for (scratch, expected) in [
        (GHCB + 0x7f8, [2, 3]),
        (GHCB + 0xff0, [2, 3]),
        (0, [2, 3]),
        (u64::MAX, [2, 3]),
        (GHCB + 0xfe8, [0, 0x1_0000_0001]),
        (GHCB + 0x905, [0, 0]),
    ] {
        guest.request(GHCB, 0x8000_0042, 0, 0).unwrap();
        let header = Header { cur_entry: 0, end_entry: 0 };
        guest.write_shared(GHCB + 0xfe8, &header.raw().to_le_bytes()).unwrap();
        guest.write_shared(GHCB + 0x905, &done).unwrap();
        for (offset, value) in [(0x390, EXIT_PSC), (SCRATCH, scratch)] {
            guest.write_shared(GHCB + offset, &value.to_le_bytes()).unwrap();
        }
        guest.perform(vmgexit(GHCB)).unwrap();
        let found = [EXIT_INFO_1, EXIT_INFO_2].map(|offset| guest.field(GHCB, offset).unwrap());
        assert_eq!(found, expected, "{scratch:#x}");
    }
    guest.write_shared(GHCB + VALID_BITMAP, &[0; 16]).unwrap();
    guest.perform(vmgexit(GHCB)).unwrap();
    assert_eq!(guest.field(GHCB, EXIT_INFO_2).unwrap(), 4, "missing input");
    // Another page than the registered one.
    guest.change(0x2000, 1, Operation::Shared).unwrap();
    guest.request(0x2000, EXIT_PSC, 0, 0).unwrap();
    assert_eq!(guest.field(0x2000, EXIT_INFO_2).unwrap(), 1, "not registered");
    guest.request(GHCB, EXIT_AP_CREATION, 9 << 32 | 1, 0x5000).unwrap();
    assert_eq!(guest.field(GHCB, EXIT_INFO_2).unwrap(), 4, "RAX is missing");
}

fn entry() -> impl Strategy<Value = Entry> {
    let gfn = prop_oneof![0..64_u64, (0..8_u64).prop_map(|block| block * 512), 0..1_u64 << 40];
    let cur_page = prop_oneof![4 => Just(0_u16), 1 => 0..4096_u16, 1 => Just(512), 1 => Just(1)];
    (cur_page, gfn, 0..16_u8, any::<bool>()).prop_map(|(cur_page, gfn, operation, large)| Entry {
        cur_page,
        gfn,
        operation: operation % 4,
        large,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Against an account entry by entry: exactly the pages that were asked for and not done yet are asked of userspace, in
    /// order, until the first impossible entry.
    #[test]
    fn every_page_once(entries in vec(entry(), 1..20), start in 0..22_u16) {
        // A page of 2 MiB that was begun, with a follower that KVM takes for its neighbour, is another matter.
        prop_assume!(entries.iter().all(|entry| !entry.large || [0, 512].contains(&(entry.cur_page % 4096)) || entry.cur_page > 512));
        let header = Header { cur_entry: start, ..all(&entries) };
        let (exits, end, _) = work(header, &entries, 0);
        let mut expected: Vec<(u64, Operation)> = Vec::new();
        let mut bad = false;
        for entry in entries.iter().skip(start.into()) {
            let pages = if entry.large { 512 } else { 1 };
            bad = entry.cur_page > pages || entry.gfn % u64::from(pages) != 0;
            if bad {
                break;
            }
            if let Some(operation) = Operation::from_raw(entry.operation) {
                expected.extend((u64::from(entry.cur_page)..u64::from(pages)).map(|nr| (entry.gfn + nr, operation)));
            }
        }
        let asked: Vec<(u64, Operation)> =
            exits.iter().flat_map(|exit| (0..exit.pages).map(|nr| (exit.gfn + nr, exit.operation))).collect();
        // An entry of 2 MiB that is not aligned may be merged without having been looked at: KVM checks the first only.
        prop_assert!(asked.starts_with(&expected) || asked == expected);
        prop_assert!(!bad || end == 0x1_0000_0002 || asked.len() > expected.len());
        prop_assert!(bad || (end == 0 && asked == expected));
    }

    /// Any bytes at all: it ends, and touches nothing outside the buffer.
    #[test]
    fn hostile_buffers_end(words in vec(any::<u64>(), 254), header in any::<u64>(), max in 0..254_u16, answers in vec(0..2_u64, 300)) {
        let mut memory = Memory([header].into_iter().chain(words).take(usize::from(max) + 1).collect());
        let mut cursor = Cursor::new(max);
        let mut next = cursor.next(&mut memory).unwrap();
        let mut rounds = 0;
        for answer in answers {
            match next {
                Next::Finished(_) => break,
                Next::Exit(exit) => {
                    rounds += 1;
                    prop_assert!(exit.pages > 0 && exit.pages <= 129_536);
                }
            }
            next = cursor.complete(&mut memory, answer / 2 + answer % 2 * u64::from(rounds % 50 == 49)).unwrap();
        }
        prop_assert!(matches!(next, Next::Finished(_)) && rounds <= 253);
    }
}
