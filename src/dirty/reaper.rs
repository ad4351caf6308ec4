//! Emptying rings before they are full: as seldom as they fill slowly, as often as they fill fast.
//!
//! A vCPU whose ring is full stands still until somebody makes room, which is no loss but a delay. [`Pace`] says how long to
//! wait, from how full the rings were after the last wait; it knows no clock, and neither does [`Reaper`], which is told by its
//! caller when a wait is over. What is reaped is in the bitmaps; nobody who copies has to wait for the reaper.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::negotiate::Mechanism;
use super::tracker::{Reaped, SyncError, Tracker};

/// Part of a ring that should be full when it is emptied. The rest is for a vCPU that suddenly writes more.
const AIM: u32 = 4;

/// How long to wait between two looks at the rings.
///
/// ```
/// use cvm_memory::dirty::{Pace, Reaped};
/// use std::time::Duration;
///
/// let ms = Duration::from_millis;
/// let mut pace = Pace::new(ms(1), ms(100));
/// let quarter = Reaped { fullest: 256, size: 1024, ..Reaped::default() };
/// assert_eq!(pace.next(&Reaped::default()), ms(2)); // nothing to do: later next time
/// assert_eq!(pace.next(&quarter), ms(2)); // just right
/// assert_eq!(pace.next(&Reaped { fullest: 512, ..quarter }), ms(1)); // twice as much as there should be
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    shortest: Duration,
    longest: Duration,
    period: Duration,
    fulls: u64,
}

impl Pace {
    /// Between `shortest` and `longest`, to begin with as often as that allows. A period of zero is taken for a microsecond.
    pub fn new(shortest: Duration, longest: Duration) -> Self {
        let shortest = shortest.max(Duration::from_micros(1));
        Self { shortest, longest: longest.max(shortest), period: shortest, fulls: 0 }
    }

    /// The present period.
    pub const fn period(&self) -> Duration {
        self.period
    }

    /// The next period, given what was found after the last one: such that the fullest ring gets a quarter full if vCPUs go on
    /// as they did. At most twice as long as before; and half of it if a vCPU had to stand still, however full the rings are now
    /// that it has made room.
    pub fn next(&mut self, found: &Reaped) -> Duration {
        let stood_still = found.fulls > self.fulls;
        self.fulls = found.fulls;
        let twice = self.period.saturating_mul(2);
        let fitting = match (found.size.checked_div(AIM), found.fullest) {
            (None | Some(0), _) | (_, 0) => twice,
            (Some(aim), fullest) => self.period.saturating_mul(aim).checked_div(fullest).unwrap_or(twice).min(twice),
        };
        let half = self.period.checked_div(2).unwrap_or_default();
        let next = if stood_still { fitting.min(half) } else { fitting };
        self.period = next.clamp(self.shortest, self.longest);
        self.period
    }
}

/// What a reaper has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReaperStats {
    /// Looks at the rings.
    pub looks: u64,
    /// Looks that found nothing.
    pub idle: u64,
    /// Pages that it found.
    pub pages: u64,
    /// Times that a vCPU stood still because its ring was full, since the reaper began.
    pub fulls: u64,
    /// The most entries that a ring held at once, and of how many.
    pub fullest: (u32, u32),
    /// The shortest period so far.
    pub shortest: Duration,
    /// The longest period so far.
    pub longest: Duration,
}

/// Empties the rings of a [`Tracker`] now and then.
///
/// ```no_run
/// # fn f(tracker: std::sync::Arc<cvm_memory::dirty::Tracker>, stop: std::sync::mpsc::Receiver<()>) {
/// use cvm_memory::dirty::{Pace, Reaper};
/// use std::sync::mpsc::RecvTimeoutError;
/// use std::time::Duration;
///
/// let pace = Pace::new(Duration::from_millis(1), Duration::from_secs(1));
/// let mut reaper = Reaper::new(tracker, pace).expect("a ring");
/// let waited = move |period| matches!(stop.recv_timeout(period), Err(RecvTimeoutError::Timeout));
/// std::thread::spawn(move || reaper.run(waited));
/// # }
/// ```
pub struct Reaper {
    tracker: Arc<Tracker>,
    pace: Pace,
    stats: ReaperStats,
    /// Times that a vCPU had stood still before.
    before: u64,
}

impl Reaper {
    /// `None` if there are no rings to look at: logs do not fill up.
    pub fn new(tracker: Arc<Tracker>, pace: Pace) -> Option<Self> {
        let Mechanism::Ring { .. } = tracker.mechanism() else { return None };
        let before = tracker.ring_stats().fulls;
        let stats = ReaperStats { shortest: pace.period(), longest: pace.period(), ..ReaperStats::default() };
        Some(Self { tracker, pace: Pace { fulls: before, ..pace }, stats, before })
    }

    /// What it has done so far.
    pub const fn stats(&self) -> ReaperStats {
        self.stats
    }

    /// Looks once. Returns how long to wait until the next time.
    ///
    /// # Errors
    /// [`SyncError`]; nothing is lost, and it may look again.
    pub fn look(&mut self) -> Result<Duration, SyncError> {
        let found = self.tracker.reap()?;
        let period = self.pace.next(&found);
        let stats = &mut self.stats;
        stats.looks = stats.looks.saturating_add(1);
        stats.idle = stats.idle.saturating_add(u64::from(found.fullest == 0));
        stats.pages = stats.pages.saturating_add(found.report.pages);
        stats.fulls = found.fulls.saturating_sub(self.before);
        stats.fullest = stats.fullest.max((found.fullest, found.size));
        stats.shortest = stats.shortest.min(period);
        stats.longest = stats.longest.max(period);
        Ok(period)
    }

    /// Looks until `wait` says that it is enough by `false`, or a look fails.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn run(&mut self, mut wait: impl FnMut(Duration) -> bool) -> Result<(), SyncError> {
        while wait(self.look()?) {}
        Ok(())
    }
}

impl fmt::Debug for Reaper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reaper").field("pace", &self.pace).field("stats", &self.stats).finish_non_exhaustive()
    }
}
