//! Guest accesses to memory of this process, at addresses nobody has vouched for.
//!
//! KVM reaches a memslot's `userspace_addr` through page tables, where a bad address is `EFAULT` and never a signal. The same
//! is had here by asking the kernel to copy: `process_vm_readv(2)` on our own pid, or `/proc/self/mem` where a sandbox
//! refuses that call (there, a write also goes through a read-only mapping; nothing else differs).

use std::fs::OpenOptions;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

/// Copies from address `hva` of this process.
pub(super) fn read(hva: u64, data: &mut [u8]) -> Result<(), Errno> {
    let remote = [remote(hva, data.len())?];
    let wanted = data.len();
    match process_vm_readv(Pid::this(), &mut [IoSliceMut::new(data)], &remote) {
        Ok(copied) if copied == wanted => Ok(()),
        Err(Errno::EPERM | Errno::ENOSYS) => read_by_file(hva, data),
        _ => Err(Errno::EFAULT),
    }
}

/// Copies to address `hva` of this process.
pub(super) fn write(hva: u64, data: &[u8]) -> Result<(), Errno> {
    let remote = [remote(hva, data.len())?];
    match process_vm_writev(Pid::this(), &[IoSlice::new(data)], &remote) {
        Ok(copied) if copied == data.len() => Ok(()),
        Err(Errno::EPERM | Errno::ENOSYS) => write_by_file(hva, data),
        _ => Err(Errno::EFAULT),
    }
}

fn remote(hva: u64, len: usize) -> Result<RemoteIoVec, Errno> {
    Ok(RemoteIoVec { base: usize::try_from(hva).map_err(|_| Errno::EFAULT)?, len })
}

fn read_by_file(hva: u64, data: &mut [u8]) -> Result<(), Errno> {
    let memory = OpenOptions::new().read(true).open("/proc/self/mem").map_err(|_| Errno::EFAULT)?;
    memory.read_exact_at(data, hva).map_err(|_| Errno::EFAULT)
}

fn write_by_file(hva: u64, data: &[u8]) -> Result<(), Errno> {
    let memory = OpenOptions::new().write(true).open("/proc/self/mem").map_err(|_| Errno::EFAULT)?;
    memory.write_all_at(data, hva).map_err(|_| Errno::EFAULT)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    type Read = fn(u64, &mut [u8]) -> Result<(), Errno>;
    type Write = fn(u64, &[u8]) -> Result<(), Errno>;

    /// Both ways reach the same memory and refuse the same addresses.
    #[test]
    fn both_ways() {
        let ways: [(Read, Write); 2] = [(read, write), (read_by_file, write_by_file)];
        for (value, (read, write)) in [7_u64, 9].into_iter().zip(ways) {
            let word = Box::leak(Box::new(AtomicU64::new(0)));
            let hva = std::ptr::from_ref(word).expose_provenance() as u64;
            assert_eq!(write(hva, &value.to_ne_bytes()), Ok(()));
            assert_eq!(word.load(Ordering::SeqCst), value);
            let mut seen = [0; 8];
            assert_eq!(read(hva, &mut seen), Ok(()));
            assert_eq!(u64::from_ne_bytes(seen), value);
            for bad in [0, 4095, 1 << 47, 1 << 63, u64::MAX] {
                assert_eq!(read(bad, &mut seen), Err(Errno::EFAULT), "{bad:#x}");
                assert_eq!(write(bad, &seen), Err(Errno::EFAULT), "{bad:#x}");
            }
        }
    }
}
