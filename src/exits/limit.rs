//! A limit on what one vCPU can write into the log: a guest must not be able to fill a disk.

use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_secs(5);
const LINES: u32 = 8;

/// So many lines in so much time; what was swallowed is counted, and said with the next line.
#[derive(Debug, Default)]
pub(super) struct RateLimit {
    since: Option<Instant>,
    lines: u32,
    swallowed: u64,
}

impl RateLimit {
    pub(super) fn warn(&mut self, error: &(dyn std::error::Error + 'static)) {
        if let Some(swallowed) = self.admit(Instant::now()) {
            tracing::warn!(error, swallowed, "guest's request refused");
        }
    }

    /// Whether another line may be written at `now`; with how many that were not, since the last one that was.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= PERIOD) {
            self.since = Some(now);
            self.lines = 0;
        }
        if self.lines == LINES {
            self.swallowed = self.swallowed.saturating_add(1);
            return None;
        }
        self.lines = self.lines.saturating_add(1);
        Some(std::mem::take(&mut self.swallowed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever a guest asks for, and however fast: so many lines per period, and every one that is missing is counted.
    #[test]
    fn a_guest_that_goes_on_asking_fills_no_log() {
        let (start, mut limit) = (Instant::now(), RateLimit::default());
        let asked = 20_000;
        let written: Vec<u64> = (0..asked).filter_map(|ms| limit.admit(start + Duration::from_millis(ms))).collect();
        assert_eq!(written.len(), 4 * 8, "20 s");
        assert_eq!(written.len() as u64 + written.iter().sum::<u64>() + limit.swallowed, asked);
        assert_eq!(written[..9], [0, 0, 0, 0, 0, 0, 0, 0, 4_992]);
        // Who seldom asks is always heard, after the next line has told of the rest.
        let seldom = (1..4).map(|day| limit.admit(start + Duration::from_secs(86_400 * day)));
        assert_eq!(seldom.collect::<Vec<_>>(), [Some(4_992), Some(0), Some(0)]);
    }
}
