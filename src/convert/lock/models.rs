//! Every interleaving of a few threads with the range locks: nobody is let in beside an exclusive holder, nobody waits for
//! ever (loom reports a deadlock), and whoever wants a range exclusively gets it though pins come and go.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::{LockError, PinPolicy, RangeLock};
use crate::addr::{Gfn, GfnRange};

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start).unwrap(), Gfn::new(end).unwrap()).unwrap()
}

/// Pages with somebody in them: a thousand for an exclusive holder, one for a pin.
#[derive(Default)]
struct Pages([AtomicUsize; 3]);

impl Pages {
    fn visit(&self, range: GfnRange, weight: usize, allowed: impl Fn(usize) -> bool) {
        let pages = || range.iter().map(|gfn| &self.0[usize::try_from(gfn.get()).unwrap()]);
        for page in pages() {
            let others = page.fetch_add(weight, Ordering::SeqCst);
            assert!(allowed(others), "let in beside {others}");
        }
        thread::yield_now();
        for page in pages() {
            page.fetch_sub(weight, Ordering::SeqCst);
        }
    }
}

const EXCLUSIVE: usize = 1000;

#[derive(Clone, Copy)]
enum Role {
    Convert(GfnRange),
    Pin(GfnRange),
}

fn run(role: Role, lock: &RangeLock, pages: &Pages) {
    match role {
        Role::Convert(range) => {
            // Loom has no clock: a conversion that would wait for pins is tried without, below.
            let _guard = lock.exclusive(range, None).unwrap();
            pages.visit(range, EXCLUSIVE, |others| others < EXCLUSIVE);
        }
        Role::Pin(range) => {
            let _guard = lock.shared(range).unwrap();
            pages.visit(range, 1, |_| true);
        }
    }
}

fn explore(roles: &'static [Role]) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let (lock, pages) = (Arc::new(RangeLock::default()), Arc::new(Pages::default()));
        let others: Vec<_> = roles[1..]
            .iter()
            .map(|&role| {
                let (lock, pages) = (Arc::clone(&lock), Arc::clone(&pages));
                thread::spawn(move || run(role, &lock, &pages))
            })
            .collect();
        run(roles[0], &lock, &pages);
        others.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn overlapping_conversions_exclude_each_other() {
    // Function pointers cannot make ranges in a constant, so the roles are leaked once.
    let roles = vec![Role::Convert(range(0, 2)), Role::Convert(range(1, 3))];
    explore(roles.leak());
}

#[test]
fn three_conversions_all_get_their_turn() {
    let roles = vec![Role::Convert(range(0, 2)), Role::Convert(range(1, 3)), Role::Convert(range(2, 3))];
    explore(roles.leak());
}

#[test]
fn a_pin_and_a_conversion_that_minds_no_pins_both_end() {
    let roles = vec![Role::Convert(range(0, 2)), Role::Pin(range(1, 2))];
    explore(roles.leak());
}

#[test]
fn a_pin_waits_for_the_conversion_and_refuses_one_that_will_not_wait() {
    loom::model(|| {
        let (lock, pages) = (Arc::new(RangeLock::default()), Arc::new(Pages::default()));
        let pinning = {
            let (lock, pages) = (Arc::clone(&lock), Arc::clone(&pages));
            thread::spawn(move || {
                let _pin = lock.shared(range(1, 2)).unwrap();
                pages.visit(range(1, 2), 1, |others| others == 0);
            })
        };
        match lock.exclusive(range(0, 2), Some(PinPolicy::Refuse)) {
            Ok(_guard) => pages.visit(range(0, 2), EXCLUSIVE, |others| others == 0),
            Err(LockError::Pinned { pinned, .. }) => assert_eq!(pinned, range(1, 2)),
            Err(other) => panic!("{other}"),
        }
        pinning.join().unwrap();
        // Refused or not, nothing is left behind.
        drop(lock.exclusive(range(0, 3), Some(PinPolicy::Refuse)).unwrap());
    });
}
