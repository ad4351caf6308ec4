//! Every interleaving of a few threads at the gate: nobody is inside while it is closed, no kick is lost (a guest leaves for
//! nothing else), and nobody waits for ever (loom reports a deadlock).

use std::time::Duration;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;

use super::{Gate, Kick};

/// A guest that runs until it is kicked.
#[derive(Debug, Default)]
struct Guest {
    kicked: AtomicBool,
}

impl Kick for Guest {
    fn entering(&self) {
        self.kicked.store(false, Ordering::SeqCst);
    }

    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
    }
}

fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

const EVER: Duration = Duration::from_secs(3600);

#[test]
fn a_guest_that_never_exits_is_let_out_and_nobody_is_inside_meanwhile() {
    explore(|| {
        let gate = std::sync::Arc::new(Gate::default());
        let guest = std::sync::Arc::new(Guest::default());
        let pass = Gate::register(&gate, std::sync::Arc::<Guest>::clone(&guest));
        let inside = Arc::new(AtomicUsize::new(0));
        let vcpu = {
            let inside = Arc::clone(&inside);
            thread::spawn(move || {
                // The first time it stays until it is kicked, and so does not end unless somebody closes the gate.
                {
                    let _in = pass.enter().unwrap();
                    inside.store(1, Ordering::SeqCst);
                    while !guest.kicked.load(Ordering::SeqCst) {
                        thread::yield_now();
                    }
                    inside.store(0, Ordering::SeqCst);
                }
                let _in = pass.enter().unwrap();
                inside.store(1, Ordering::SeqCst);
                inside.store(0, Ordering::SeqCst);
            })
        };
        while inside.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        {
            let _closed = gate.close(EVER).unwrap();
            assert_eq!(inside.load(Ordering::SeqCst), 0);
            thread::yield_now();
            assert_eq!(inside.load(Ordering::SeqCst), 0);
        }
        vcpu.join().unwrap();
    });
}

#[test]
fn two_who_close_it_take_turns() {
    explore(|| {
        let gate = std::sync::Arc::new(Gate::default());
        let pass = Gate::register(&gate, std::sync::Arc::new(Guest::default()));
        let busy = Arc::new(AtomicUsize::new(0));
        let close = |gate: &Gate, busy: &AtomicUsize| {
            let _closed = gate.close(EVER).unwrap();
            assert_eq!(busy.fetch_add(1, Ordering::SeqCst), 0);
            busy.fetch_sub(1, Ordering::SeqCst);
        };
        let other = {
            let (gate, busy) = (std::sync::Arc::clone(&gate), Arc::clone(&busy));
            thread::spawn(move || close(&gate, &busy))
        };
        {
            let _in = pass.enter().unwrap();
            assert_eq!(busy.load(Ordering::SeqCst), 0);
        }
        close(&gate, &busy);
        other.join().unwrap();
    });
}
