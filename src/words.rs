//! An array of atomic words, all zero, that costs memory only where it was written.
//!
//! It knows nothing of pages: a private anonymous mapping without reservation
//! (`mmap(2)`, `MAP_NORESERVE`), seen as a slice. Loom and Miri get the same array on the heap, where their doubles of
//! the atomics can live.

pub(crate) use backing::Words;

#[cfg(not(any(loom, miri)))]
mod backing {
    #![allow(unsafe_code)] // mmap(2), munmap(2) and a slice over what they hold.

    use std::num::NonZeroUsize;
    use std::ops::Deref;
    use std::ptr::NonNull;

    use nix::Error;
    use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

    use crate::sync::AtomicU64;

    /// `len` zeroed words, mapped on first write.
    pub(crate) struct Words {
        base: NonNull<AtomicU64>,
        len: usize,
    }

    impl Words {
        pub(crate) fn zeroed(len: u64) -> Result<Self, Error> {
            let len = usize::try_from(len.max(1)).map_err(|_| Error::ENOMEM)?;
            let bytes = len.checked_mul(size_of::<AtomicU64>()).and_then(NonZeroUsize::new).ok_or(Error::ENOMEM)?;
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            // SAFETY: no address is asked for, so no existing mapping can be replaced.
            let base = unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }?;
            // A huge page per touched spot would undo the laziness. Only advice: kernels without huge pages refuse it.
            // SAFETY: the range is the mapping just made, and the advice changes no contents.
            let _ = unsafe { madvise(base, bytes.get(), MmapAdvise::MADV_NOHUGEPAGE) };
            Ok(Self { base: base.cast(), len })
        }

        /// Word `at` will be wanted soon. Nothing happens if there is no such word.
        #[inline]
        pub(crate) fn prefetch(&self, at: usize) {
            #[cfg(target_arch = "x86_64")]
            if let Some(word) = self.get(at) {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                // SAFETY: a hint about memory that is mapped. Every x86-64 processor takes it.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(word).cast()) };
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = at;
        }
    }

    impl Deref for Words {
        type Target = [AtomicU64];

        #[inline]
        fn deref(&self) -> &[AtomicU64] {
            // SAFETY: `base` is page aligned and starts a mapping of `len` words that lives as long as `self`; zero
            // bytes are valid atomics; nobody holds a `&mut` or writes it other than through these atomics.
            unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
        }
    }

    impl Drop for Words {
        fn drop(&mut self) {
            // SAFETY: exactly the mapping made in `zeroed`; every borrow of it ended with the borrow of `self`.
            // An error could only mean that it is not mapped, and a drop has nobody to tell.
            let _ = unsafe { munmap(self.base.cast(), size_of_val::<[AtomicU64]>(self)) };
        }
    }

    // SAFETY: the mapping belongs to the process, not to a thread, and `Words` owns it alone.
    unsafe impl Send for Words {}
    // SAFETY: a shared `Words` gives out shared atomics and nothing else.
    unsafe impl Sync for Words {}
}

#[cfg(any(loom, miri))]
mod backing {
    use std::ops::Deref;

    use nix::Error;

    use crate::sync::AtomicU64;

    /// `len` zeroed words on the heap.
    pub(crate) struct Words(Box<[AtomicU64]>);

    impl Words {
        pub(crate) fn zeroed(len: u64) -> Result<Self, Error> {
            let len = usize::try_from(len.max(1)).map_err(|_| Error::ENOMEM)?;
            let mut words = Vec::new();
            words.try_reserve_exact(len).map_err(|_| Error::ENOMEM)?;
            words.extend((0..len).map(|_| AtomicU64::new(0)));
            Ok(Self(words.into()))
        }

        #[allow(clippy::unused_self, reason = "as the other one has it")]
        pub(crate) const fn prefetch(&self, _: usize) {}
    }

    impl Deref for Words {
        type Target = [AtomicU64];
        fn deref(&self) -> &[AtomicU64] {
            &self.0
        }
    }
}
