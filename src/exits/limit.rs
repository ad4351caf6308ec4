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
        let now = Instant::now();
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= PERIOD) {
            self.since = Some(now);
            self.lines = 0;
        }
        if self.lines == LINES {
            self.swallowed = self.swallowed.saturating_add(1);
            return;
        }
        self.lines = self.lines.saturating_add(1);
        let swallowed = std::mem::take(&mut self.swallowed);
        tracing::warn!(error, swallowed, "guest's request refused");
    }
}
