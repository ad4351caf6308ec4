//! What is done to a VM, call by call.

use super::table::operations;
use super::words::{Descriptor, Entries, File, Hva};

operations! {
    /// One operation, in full: nothing else decides what it does. Addresses, sizes and offsets in bytes.
    #[derive(Hash)]
    Operation:

    /// `KVM_CREATE_GUEST_MEMFD`. A file of that name that is still open is closed first.
    Create "create" {
        /// Its name.
        file: File,
        /// Its size.
        size: u64,
        /// 1 MMAP, 2 INIT_SHARED.
        flags: u64,
    }
    /// Closes a file, and unmaps it.
    Close "close" {
        /// Which.
        file: File,
    }
    /// Maps all of a file at the start of its area, shared, to be read and written.
    Map "map" {
        /// Which.
        file: File,
    }
    /// `KVM_SET_USER_MEMORY_REGION2`.
    Region "region" {
        /// Address space in bits 31:16, id below.
        slot: u32,
        /// 1 LOG_DIRTY, 2 READONLY, 4 GUEST_MEMFD.
        flags: u32,
        /// Where it is in the guest.
        gpa: u64,
        /// Its size; zero deletes it.
        size: u64,
        /// Where it is in this process.
        hva: Hva,
        /// Its file.
        file: Descriptor,
        /// Where it is in its file.
        offset: u64,
    }
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    Attributes "attributes" {
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
        /// 8 private.
        attributes: u64,
        /// Zero.
        flags: u64,
    }
    /// `fallocate(2)` of a file.
    Fallocate "fallocate" {
        /// Which.
        file: File,
        /// 1 KEEP_SIZE, 2 PUNCH_HOLE; 0 allocates.
        mode: u32,
        /// Where; its bits are a signed number's.
        offset: u64,
        /// How much; its bits are a signed number's.
        len: u64,
    }
    /// `KVM_ENABLE_CAP` of the VM.
    EnableCap "enable-cap" {
        /// Its number.
        cap: u32,
        /// Its first argument.
        arg: u64,
    }
    /// `KVM_PRE_FAULT_MEMORY`, once.
    Prefault "prefault" {
        /// On which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
        /// Zero.
        flags: u64,
    }
    /// `KVM_GET_DIRTY_LOG`, into a bitmap for [`LOG_PAGES`](crate::scenario::LOG_PAGES).
    GetDirty "get-dirty" {
        /// Address space in bits 31:16, id below.
        slot: u32,
    }
    /// `KVM_CLEAR_DIRTY_LOG`.
    ClearDirty "clear-dirty" {
        /// Address space in bits 31:16, id below.
        slot: u32,
        /// First page.
        first: u64,
        /// How many pages.
        pages: u32,
        /// Which of each 64.
        bits: u64,
    }
    /// This process reads memory of its own; `EFAULT` where there is none.
    HostRead "host-read" {
        /// Where.
        at: Hva,
        /// How much.
        len: u64,
    }
    /// This process fills memory of its own; `EFAULT` where there is none.
    HostFill "host-fill" {
        /// Where.
        at: Hva,
        /// How much.
        len: u64,
        /// With what.
        byte: u8,
    }
    /// One instruction of a guest that reads 1, 2, 4 or 8 bytes. What is answered to MMIO is [`MMIO_BYTE`](super::MMIO_BYTE).
    Load "load" {
        /// By which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// How much.
        len: u8,
        /// How, where accesses say so.
        private: bool,
    }
    /// One instruction of a guest that writes 1, 2, 4 or 8 bytes.
    Store "store" {
        /// By which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// How much.
        len: u8,
        /// The bytes, the lowest first.
        value: u64,
        /// How, where accesses say so.
        private: bool,
    }
    /// A guest reads a byte, puts a return instruction there if it is none, and calls it if it is one then; also if
    /// nothing is there, so that the fetch fails.
    Fetch "fetch" {
        /// By which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// How, where accesses say so.
        private: bool,
    }
    /// A guest reads whole pages: of each the first 8 bytes, and the rest if that was memory.
    Dump "dump" {
        /// By which vCPU.
        vcpu: u8,
        /// Where; page aligned.
        gpa: u64,
        /// Pages of 4 KiB.
        pages: u64,
        /// How, where accesses say so.
        private: bool,
    }
    /// The guest's hypercall MAP_GPA_RANGE.
    MapGpaRange "map-gpa-range" {
        /// By which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// Pages of 4 KiB.
        pages: u64,
        /// Bits 3:0 page size, bit 4 private.
        attributes: u64,
        /// What is answered if it comes out as an exit.
        answer: u64,
    }
    /// An SNP guest accepts a page, or not any more.
    Pvalidate "pvalidate" {
        /// By which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// 2 MiB of it.
        large: bool,
        /// Which of the two.
        validate: bool,
    }
    /// An SNP guest asks for a page state change by register.
    Psc "psc" {
        /// By which vCPU.
        vcpu: u8,
        /// Where.
        gpa: u64,
        /// 1 private, 2 shared; there are no others.
        to: u8,
        /// What is answered if it comes out as an exit.
        answer: u64,
    }
    /// An SNP guest asks for page state changes by a buffer in its GHCB page.
    PscPage "psc-page" {
        /// By which vCPU.
        vcpu: u8,
        /// The entry to begin with.
        first: u16,
        /// The last one.
        last: u16,
        /// All.
        entries: Entries,
        /// What is answered to every exit.
        answer: u64,
    }
    /// An SNP guest exits with anything in the register of the GHCB.
    Vmgexit "vmgexit" {
        /// By which vCPU.
        vcpu: u8,
        /// That.
        value: u64,
    }
}

impl Operation {
    /// The vCPU that does it.
    pub const fn vcpu(&self) -> Option<u8> {
        match *self {
            Self::Prefault { vcpu, .. }
            | Self::Load { vcpu, .. }
            | Self::Store { vcpu, .. }
            | Self::Fetch { vcpu, .. }
            | Self::Dump { vcpu, .. }
            | Self::MapGpaRange { vcpu, .. }
            | Self::Pvalidate { vcpu, .. }
            | Self::Psc { vcpu, .. }
            | Self::PscPage { vcpu, .. }
            | Self::Vmgexit { vcpu, .. } => Some(vcpu),
            _ => None,
        }
    }

    /// The slot and nothing else of a deletion.
    pub const fn delete(slot: u32) -> Self {
        Self::Region {
            slot,
            flags: 0,
            gpa: 0,
            size: 0,
            hva: Hva::In(super::Area::Void, 0),
            file: Descriptor::None,
            offset: 0,
        }
    }
}
