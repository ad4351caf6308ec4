//! Small images in the shape of OVMF's, well-formed or not.
#![allow(dead_code, reason = "each test program uses its part")]

pub const FOOTER: &str = "96b582de-1fb2-45f7-baea-a366c55a082d";
pub const METADATA: &str = "dc886566-984a-4798-a75e-5585a7bf67cc";
pub const RESET: &str = "00f771de-1a7e-4fcb-890e-68c77e2fb44e";
pub const HASHES: &str = "7255371f-3a3b-4b04-927b-1da6efa8d454";

/// A GUID as it stands in memory: the first three fields are little-endian.
pub fn guid(text: &str) -> Vec<u8> {
    let fields: Vec<Vec<u8>> = text
        .split('-')
        .map(|field| {
            (0..field.len()).step_by(2).map(|at| u8::from_str_radix(&field[at..at + 2], 16).unwrap()).collect()
        })
        .collect();
    let swapped = fields[..3].iter().flat_map(|field| field.iter().rev().copied());
    swapped.chain(fields[3..].concat()).collect()
}

/// `data`, its size and its GUID.
pub fn entry(data: &[u8], name: &str) -> Vec<u8> {
    let size = u16::try_from(data.len() + 18).unwrap();
    [data, &size.to_le_bytes(), &guid(name)].concat()
}

/// The table of GUIDs of these entries, footer included.
pub fn table(entries: &[Vec<u8>]) -> Vec<u8> {
    let entries = entries.concat();
    let size = u16::try_from(entries.len() + 18).unwrap();
    [&entries, &size.to_le_bytes()[..], &guid(FOOTER)].concat()
}

/// Sections as address, size and type.
pub fn metadata(sections: &[[u32; 3]]) -> Vec<u8> {
    let (size, count) = (16 + 12 * sections.len(), sections.len());
    let header = [u32::try_from(size).unwrap(), 1, u32::try_from(count).unwrap()];
    let words = header.iter().chain(sections.as_flattened()).flat_map(|word| word.to_le_bytes());
    b"ASEV".iter().copied().chain(words).collect()
}

/// `pages` pages of noise from `seed`, with `metadata` 0x400 bytes before the end and `table` at the end.
pub fn assemble(pages: usize, seed: u8, metadata: &[u8], table: &[u8]) -> Vec<u8> {
    let noise = (seed..u8::MAX).chain(0..251).cycle();
    let mut image: Vec<u8> = noise.take(pages * 4096).collect();
    let end = image.len();
    image[end - 0x400..][..metadata.len()].copy_from_slice(metadata);
    image[end - 32 - table.len()..][..table.len()].copy_from_slice(table);
    image
}

/// A whole image. `hashes` is where it wants the hashes of a kernel.
pub fn image(pages: usize, seed: u8, sections: &[[u32; 3]], reset: u32, hashes: Option<u32>) -> Vec<u8> {
    let mut entries = vec![entry(&0x400_u32.to_le_bytes(), METADATA), entry(&reset.to_le_bytes(), RESET)];
    entries.push(entry(&[seed; 7], "01234567-89ab-cdef-0123-456789abcdef"));
    if let Some(gpa) = hashes {
        entries.insert(1, entry(&[gpa.to_le_bytes(), 0x400_u32.to_le_bytes()].concat(), HASHES));
    }
    assemble(pages, seed, &metadata(sections), &table(&entries))
}
