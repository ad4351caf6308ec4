//! What the tests of firmware images share: the images, and small ones made by hand.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::BufReader;
use std::path::{Path, PathBuf};

pub fn vectors(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors").join(name)
}

/// A packed firmware image.
pub fn image(name: &str) -> Vec<u8> {
    let packed = std::fs::File::open(vectors("firmware").join(name)).unwrap();
    let mut image = Vec::new();
    lzma_rs::xz_decompress(&mut BufReader::new(packed), &mut image).unwrap();
    image
}

/// A section of a made image, field by field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawSection {
    pub offset: u32,
    pub size: u32,
    pub gpa: u64,
    pub memory: u64,
    pub kind: u32,
    pub attributes: u32,
}

impl RawSection {
    pub const fn new(kind: u32, gpa: u64, memory: u64) -> Self {
        Self { offset: 0, size: 0, gpa, memory, kind, attributes: 0 }
    }

    /// A page of code at the start of the image.
    pub const fn code() -> Self {
        Self { offset: 0, size: 0x1000, gpa: 0xffff_0000, memory: 0x1000, kind: 0, attributes: 1 }
    }
}

pub fn guid(text: &str) -> [u8; 16] {
    let digits = text.replace('-', "");
    let mut bytes: Vec<u8> = (0..16).map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap()).collect();
    // The first three groups are little-endian numbers.
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes.try_into().unwrap()
}

/// The descriptor with these sections.
pub fn descriptor(sections: &[RawSection]) -> Vec<u8> {
    let mut bytes = b"TDVF".to_vec();
    bytes.extend((16 + 32 * u32::try_from(sections.len()).unwrap()).to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(u32::try_from(sections.len()).unwrap().to_le_bytes());
    for section in sections {
        bytes.extend(section.offset.to_le_bytes());
        bytes.extend(section.size.to_le_bytes());
        bytes.extend(section.gpa.to_le_bytes());
        bytes.extend(section.memory.to_le_bytes());
        bytes.extend(section.kind.to_le_bytes());
        bytes.extend(section.attributes.to_le_bytes());
    }
    bytes
}

/// An image: two pages of code, the descriptor, the table of GUIDs, the reset vector.
pub fn made(descriptor: &[u8]) -> Vec<u8> {
    let mut image: Vec<u8> = (0..0x2000_u32).map(|at| u8::try_from(at % 251).unwrap()).collect();
    image.extend(descriptor);
    let mut table = Vec::new();
    // An entry of somebody else, before and after.
    let foreign = |table: &mut Vec<u8>| {
        table.extend([0xee; 8]);
        table.extend(26_u16.to_le_bytes());
        table.extend(guid("4c2eb361-7d9b-4cc3-8081-127c90d3d294"));
    };
    foreign(&mut table);
    let behind = 22 + 26 + 18 + 32 + 26;
    table.extend(u32::try_from(descriptor.len() + behind).unwrap().to_le_bytes());
    table.extend(22_u16.to_le_bytes());
    table.extend(guid("e47a6535-984a-4798-865e-4685a7bf8ec2"));
    foreign(&mut table);
    let length = u16::try_from(table.len() + 18).unwrap();
    table.extend(length.to_le_bytes());
    table.extend(guid("96b582de-1fb2-45f7-baea-a366c55a082d"));
    image.extend(table);
    image.extend([0x90; 32]);
    image
}
