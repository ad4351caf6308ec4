//! Speed of cvm-memory beside its peers: `cargo bench`. What the programs share is how they judge: by ratios within a round, of
//! which the median counts, and by gates that fail a run only where that is asked for.

use std::process::ExitCode;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// xorshift64: a few cycles, so that it is not what is measured.
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    /// The numbers that follow from `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next one.
    #[inline]
    #[allow(clippy::should_implement_trait, reason = "there is no end, and nothing of an iterator's is of use")]
    pub const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Evenly among `[0, bound)`, without a division.
    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "the upper half of 128 bits")]
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Makes what comes next depend on `bit`.
    #[inline]
    pub fn mix(&mut self, bit: bool) {
        self.0 ^= u64::from(bit) << 5;
    }

    /// Any order, all alike.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            let other = usize::try_from(self.below(last as u64 + 1)).expect("an index");
            list.swap(last, other);
        }
    }
}

/// What this thread has had of its processor: what others do on it meanwhile is not in it.
///
/// # Panics
/// If there is no such clock.
pub fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock").into()
}

/// The one in the middle.
///
/// # Panics
/// If there is none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Median over the rounds of `a` by `b` of the same round.
pub fn ratio(a: &[f64], b: &[f64]) -> f64 {
    median(a.iter().zip(b).map(|(a, b)| a / b).collect())
}

/// Whether everything is to run once, small: `--quick`, or `--test`, which `cargo test --benches` passes.
pub fn is_quick() -> bool {
    std::env::args().any(|arg| arg == "--quick" || arg == "--test")
}

/// Fails if a gate was missed and `CVM_BENCH_GATE=1` asks for it. A quick run is too short to judge.
pub fn verdict(held: bool) -> ExitCode {
    let strict = !is_quick() && std::env::var("CVM_BENCH_GATE").is_ok_and(|value| value == "1");
    if strict && !held { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
