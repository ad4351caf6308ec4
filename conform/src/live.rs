//! A VM behind the library's seam, with everything around it that a scenario names.

mod areas;
pub(crate) mod guests;
pub mod kvm;
mod soft;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use cvm_memory::gmem::GuestMemfd;
use cvm_memory::hypervisor::{
    Cap, ClearDirtyLog, DirtyLog, Hypervisor, MemoryAttributes, MemoryRegion, PreFaultMemory,
};
use cvm_memory_testkit::Guest;
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::guard;
use crate::machine::{Machine, Shape};
use crate::observation::Observation;
use crate::scenario::{Descriptor, File, LOG_PAGES, Operation};
use areas::Areas;

/// A VM of the software KVM or of `/dev/kvm`, with guests, files and memory.
#[derive(Debug)]
pub struct Live {
    name: &'static str,
    shape: Shape,
    // In the order in which they have to go: who uses the memory, then the memory.
    guests: Vec<Box<dyn Guest>>,
    files: BTreeMap<File, GuestMemfd>,
    foreign: GuestMemfd,
    memfd: OwnedFd,
    vm: Arc<dyn Hypervisor>,
    areas: Areas,
    /// Whether its files are the kernel's guest_memfd, which mmap refuses by itself.
    kernel_files: bool,
}

impl Live {
    pub(crate) fn around(
        name: &'static str,
        shape: Shape,
        vm: Arc<dyn Hypervisor>,
        guests: Vec<Box<dyn Guest>>,
        other_vm: &dyn Hypervisor,
        kernel_files: bool,
    ) -> Self {
        let foreign = other_vm.create_guest_memfd(16 * 4096, 0).expect("a guest_memfd of another VM");
        let memfd = memfd_create("ordinary", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        ftruncate(&memfd, 16 * 4096).expect("to make it larger");
        Self { name, shape, guests, files: BTreeMap::new(), foreign, memfd, vm, areas: Areas::new(), kernel_files }
    }

    /// What it has in common with the machines it is compared with.
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// The VM.
    pub fn vm(&self) -> &dyn Hypervisor {
        &*self.vm
    }

    /// The VM, for whoever shares it.
    pub(crate) fn shared_vm(&self) -> Arc<dyn Hypervisor> {
        Arc::clone(&self.vm)
    }

    /// A vCPU's guest.
    pub(crate) fn guest(&mut self, vcpu: u8) -> &mut dyn Guest {
        &mut *self.guests[usize::from(vcpu)]
    }

    /// Gives the guests away, to threads of their own; [`put_guests`](Self::put_guests) takes them back.
    pub(crate) fn take_guests(&mut self) -> Vec<Box<dyn Guest>> {
        std::mem::take(&mut self.guests)
    }

    /// Takes the guests back. They have to go before the VM.
    pub(crate) fn put_guests(&mut self, guests: Vec<Box<dyn Guest>>) {
        self.guests = guests;
    }

    fn descriptor(&self, descriptor: Descriptor) -> RawFd {
        match descriptor {
            Descriptor::File(name) => self.files.get(&name).map_or(-1, |file| file.as_fd().as_raw_fd()),
            Descriptor::None => -1,
            Descriptor::Memfd => self.memfd.as_raw_fd(),
            Descriptor::Foreign => self.foreign.as_fd().as_raw_fd(),
        }
    }

    fn close(&mut self, file: File) -> Result<(), Errno> {
        self.areas.unmap(file);
        self.files.remove(&file).map(drop).ok_or(Errno::EBADF)
    }

    fn map(&mut self, name: File) -> Result<(), Errno> {
        let file = self.files.get(&name).ok_or(Errno::EBADF)?;
        self.areas.map(name, file, self.kernel_files)
    }

    fn prefault(&mut self, vcpu: u8, gpa: u64, size: u64, flags: u64) -> Observation {
        let mut range = PreFaultMemory { gpa, size, flags };
        let answer = self.guests[usize::from(vcpu)].pre_fault_memory(&mut range);
        Observation::Prefault { answer, gpa: range.gpa, size: range.size }
    }

    #[allow(unsafe_code, reason = "slots let guests at memory of this process")]
    fn region(&self, region: &MemoryRegion) -> Result<(), Errno> {
        // SAFETY: the address is in an area of this machine, or one that no KVM accepts (`guard`). Areas are larger than any
        // slot and are unmapped after the VM is gone; nothing in them is referred to by anything but raw copies.
        unsafe { self.vm.set_user_memory_region2(region) }
    }
}

impl Machine for Live {
    fn name(&self) -> &'static str {
        self.name
    }

    fn play(&mut self, operation: &Operation) -> Observation {
        if let Some(reason) = guard::refuse(self.shape, operation) {
            return Observation::Skipped(reason);
        }
        let answer = match *operation {
            Operation::Create { file, size, flags } => {
                let _unless_there_was_none = self.close(file);
                self.vm.create_guest_memfd(size, flags).map(|new| {
                    self.files.insert(file, new);
                })
            }
            Operation::Close { file } => self.close(file),
            Operation::Map { file } => self.map(file),
            Operation::Region { slot, flags, gpa, size, hva, file, offset } => {
                let userspace_addr = self.areas.address(hva);
                self.region(&MemoryRegion {
                    slot,
                    flags,
                    guest_phys_addr: gpa,
                    memory_size: size,
                    userspace_addr,
                    guest_memfd_offset: offset,
                    guest_memfd: self.descriptor(file),
                })
            }
            Operation::Attributes { gpa, size, attributes, flags } => {
                self.vm.set_memory_attributes(&MemoryAttributes { address: gpa, size, attributes, flags })
            }
            Operation::Fallocate { file, mode, offset, len } => match self.files.get(&file) {
                Some(file) => fallocate(file, mode, offset, len),
                None => Err(Errno::EBADF),
            },
            Operation::EnableCap { cap, arg } => self.vm.enable_cap(Cap(cap), [arg, 0, 0, 0]),
            Operation::Prefault { vcpu, gpa, size, flags } => return self.prefault(vcpu, gpa, size, flags),
            Operation::GetDirty { slot } => {
                let mut log = DirtyLog::for_pages(LOG_PAGES).expect("a short log");
                let answer = self.vm.get_dirty_log(slot, &mut log);
                return Observation::Dirty(answer.map(|()| log.words().to_vec()));
            }
            Operation::ClearDirty { slot, first, pages, bits } => {
                let bitmap = vec![bits; usize::try_from(pages.div_ceil(64)).expect("small")];
                let clear = ClearDirtyLog { slot, first_page: first, num_pages: pages, bitmap: &bitmap };
                self.vm.clear_dirty_log(&clear)
            }
            Operation::HostRead { at, len } => return Observation::Bytes(self.areas.read(at, len)),
            Operation::HostFill { at, len, byte } => self.areas.fill(at, len, byte),
            Operation::Load { .. }
            | Operation::Store { .. }
            | Operation::Fetch { .. }
            | Operation::Dump { .. }
            | Operation::MapGpaRange { .. }
            | Operation::Pvalidate { .. }
            | Operation::Psc { .. }
            | Operation::PscPage { .. }
            | Operation::Vmgexit { .. } => {
                let vcpu = operation.vcpu().unwrap_or_default();
                return guests::play(&mut *self.guests[usize::from(vcpu)], operation);
            }
        };
        Observation::Call(answer)
    }
}

/// `fallocate(2)` through whatever the file is.
fn fallocate(file: &GuestMemfd, mode: u32, offset: u64, len: u64) -> Result<(), Errno> {
    let mode = FallocateFlags::from_bits_retain(mode.cast_signed());
    file.ops().fallocate(mode, offset.cast_signed(), len.cast_signed())
}
