//! The writers' locks: a fixed number of them, each on cache lines of its own, shared out over the chunks by a hash.

use std::sync::PoisonError;

use crate::sync::{Mutex, MutexGuard};

/// log2 of the number of stripes: enough that two of many vCPUs seldom meet, 32 KiB in all.
const STRIPES_SHIFT: u32 = if cfg!(loom) { 1 } else { 8 };
const STRIPES: usize = 1 << STRIPES_SHIFT;

/// Two lines, because x86 prefetches them in pairs.
#[repr(align(128))]
#[derive(Default)]
struct Stripe(Mutex<()>);

pub(super) struct Stripes(Box<[Stripe; STRIPES]>);

impl Stripes {
    pub(super) fn new() -> Self {
        Self(Box::new(std::array::from_fn(|_| Stripe(Mutex::new(())))))
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.0)
    }

    /// Keeps every other writer out of the pages of `chunk`'s leaf. Nobody holds two, so no order is needed.
    pub(super) fn lock(&self, chunk: u64) -> Option<MutexGuard<'_, ()>> {
        // Multiplying by 2^64 / phi scatters both neighbours and strides over the top bits.
        let hash = chunk.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - STRIPES_SHIFT);
        let stripe = self.0.get(usize::try_from(hash).ok()?)?;
        // The lock guards no value that a panic could have left half-made.
        Some(stripe.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
