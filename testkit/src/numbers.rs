//! Numbers that look like chance, and are the same in every run.

/// A linear congruential generator (Knuth's MMIX), begun with any number.
#[derive(Debug)]
pub struct Numbers(pub u64);

impl Numbers {
    /// One below `bound`, which is at most 2^31.
    pub const fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}
