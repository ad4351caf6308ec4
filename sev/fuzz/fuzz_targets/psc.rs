//! A guest that writes any bytes into its buffer, also while it is worked off: it ends, and reaches no byte outside.
#![no_main]

use cvm_memory_sev::ghcb::msr;
use cvm_memory_sev::ghcb::psc::{Buffer, Cursor, Next, max_entries};
use libfuzzer_sys::fuzz_target;

/// The buffer, and what the guest writes there meanwhile: a word at each read.
struct Guest<'a> {
    words: Vec<u64>,
    meanwhile: &'a [u8],
}

impl Buffer for Guest<'_> {
    type Error = std::convert::Infallible;

    fn read(&mut self, offset: u64) -> Result<u64, Self::Error> {
        if let Some(([at, value], rest)) = self.meanwhile.split_first_chunk() {
            self.meanwhile = rest;
            let at = usize::from(*at) % self.words.len();
            self.words[at] ^= u64::from(*value).rotate_left(u32::from(*value) % 64);
        }
        Ok(self.words[usize::try_from(offset / 8).unwrap()])
    }

    fn write(&mut self, offset: u64, value: u64) -> Result<(), Self::Error> {
        self.words[usize::try_from(offset / 8).unwrap()] = value;
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((scratch, rest)) = data.split_first_chunk::<2>() else { return };
    let _any = rest.first_chunk().map(|bytes| msr::parse(u64::from_le_bytes(*bytes)));
    let max = max_entries(u64::from(u16::from_le_bytes(*scratch) % 2040));
    let words = rest.chunks(8).map(|chunk| chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)));
    let mut words: Vec<u64> = words.take(usize::from(max) + 1).collect();
    let used = words.len() * 8;
    words.resize(usize::from(max) + 1, 0);
    let mut guest = Guest { words, meanwhile: rest.get(used..).unwrap_or_default() };
    let mut cursor = Cursor::new(max);
    let Ok(mut next) = cursor.next(&mut guest);
    // Only a guest that keeps writing goes on longer than there are entries.
    let limit = guest.meanwhile.len() + 512;
    for _ in 0..limit {
        match next {
            Next::Finished(_) => return,
            Next::Exit(change) => assert!(change.pages > 0 && change.pages <= 253 * 512),
        }
        let Ok(after) = cursor.complete(&mut guest, 0);
        next = after;
    }
    panic!("it does not end");
});
