//! Nothing may hang. A run of a real vCPU has a watchdog of its own, which reports the registers; this is for everything else:
//! calls that do not return, and a software KVM that goes round in circles. Then there is nothing left to go on with: who
//! hangs at what is said, and the process ends.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use crate::scenario::Operation;

/// For how long one operation may take. Far more than any does, on the slowest of machines.
const LIMIT: Duration = Duration::from_secs(180);

/// What is going on: on which machine, what, and since when.
static GOING_ON: Mutex<BTreeMap<u64, (&'static str, Operation, Instant)>> = Mutex::new(BTreeMap::new());

/// What is over when this goes.
struct GoingOn(u64);

impl Drop for GoingOn {
    fn drop(&mut self) {
        GOING_ON.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

/// Does `what`, which is `operation` on `machine`.
pub(crate) fn bounded<T>(machine: &'static str, operation: &Operation, what: impl FnOnce() -> T) -> T {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        std::thread::Builder::new().name("patience".into()).spawn(watch).expect("a thread");
    });
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let entry = (machine, operation.clone(), Instant::now());
    GOING_ON.lock().unwrap_or_else(PoisonError::into_inner).insert(id, entry);
    let _over = GoingOn(id);
    what()
}

fn watch() {
    loop {
        std::thread::sleep(LIMIT / 16);
        let going_on = GOING_ON.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hung = going_on.values().filter(|(_, _, since)| since.elapsed() > LIMIT).peekable();
        if hung.peek().is_some() {
            for (machine, operation, since) in hung {
                eprintln!("{machine} has been at this for {:?}: {operation}", since.elapsed());
            }
            std::process::abort();
        }
    }
}
