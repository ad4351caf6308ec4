//! The gate's rules, one by one.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::thread;

use super::*;

/// A guest that runs until it is kicked, unless it is deaf.
#[derive(Debug, Default)]
struct Guest {
    kicked: AtomicBool,
    kicks: AtomicU32,
    deaf: bool,
}

impl Guest {
    fn run(&self) {
        while !self.kicked.load(Ordering::SeqCst) {
            thread::yield_now();
        }
    }
}

impl Kick for Guest {
    fn entering(&self) {
        self.kicked.store(false, Ordering::SeqCst);
    }

    fn kick(&self) {
        self.kicks.fetch_add(1, Ordering::SeqCst);
        if !self.deaf {
            self.kicked.store(true, Ordering::SeqCst);
        }
    }
}

const EVER: Duration = Duration::from_secs(3600);

/// T12: a vCPU in the guest is kicked once, leaves, and enters again only once the gate is open; a second closer waits.
#[test]
fn t12_a_closed_gate_admits_nobody() {
    let gate = Arc::new(Gate::default());
    let guest = Arc::new(Guest::default());
    let pass = Gate::register(&gate, Arc::<Guest>::clone(&guest));
    let (entered, is_inside) = channel();
    let (left, has_left) = channel();
    thread::scope(|scope| {
        let (runs, of_guest) = (&pass, &guest);
        scope.spawn(move || {
            for _ in 0..2 {
                let inside = runs.enter().unwrap();
                entered.send(()).unwrap();
                of_guest.run();
                drop(inside);
                left.send(()).unwrap();
            }
        });
        is_inside.recv().unwrap();
        let closed = gate.close(EVER).unwrap();
        has_left.recv().unwrap();
        assert_eq!(guest.kicks.load(Ordering::SeqCst), 1, "kicked once");
        let second = scope.spawn(|| drop(gate.close(EVER).unwrap()));
        assert!(is_inside.try_recv().is_err(), "nobody is let in");
        assert!(!second.is_finished(), "the second waits for the first");
        drop(closed);
        second.join().unwrap();
        // Whichever came first, the vCPU gets in, and out again.
        is_inside.recv().unwrap();
        drop(gate.close(EVER).unwrap());
        has_left.recv().unwrap();
    });
    assert_eq!(gate.closures(), 3);
}

#[test]
fn a_vcpu_that_never_leaves_is_named_and_the_gate_opens() {
    let gate = Arc::new(Gate::default());
    let deaf = Gate::register(&gate, Arc::new(Guest { deaf: true, ..Guest::default() }));
    let other = Gate::register(&gate, Arc::new(Guest::default()));
    thread::scope(|scope| {
        let (entered, is_inside) = channel();
        let (leave, may_leave) = channel::<()>();
        let deaf = &deaf;
        scope.spawn(move || {
            let _inside = deaf.enter().unwrap();
            entered.send(()).unwrap();
            may_leave.recv().unwrap();
        });
        is_inside.recv().unwrap();
        let patience = Duration::from_millis(1);
        let error = gate.close(patience).unwrap_err();
        assert_eq!(error, GateError::NeverLeft { inside: vec![deaf.id()], patience });
        drop(other.enter().unwrap());
        leave.send(()).unwrap();
    });
    drop(gate.close(EVER).unwrap());
}

#[test]
fn nobody_waits_for_himself() {
    let gate = Arc::new(Gate::default());
    let pass = Gate::register(&gate, Arc::new(Guest::default()));
    let inside = pass.enter().unwrap();
    assert_eq!(gate.close(EVER).unwrap_err(), GateError::Inside { vcpu: pass.id() });
    assert_eq!(gate.refuse_deadlock(), Err(GateError::Inside { vcpu: pass.id() }));
    assert_eq!(pass.enter().unwrap_err(), GateError::Twice { vcpu: pass.id() });
    drop(inside);
    let closed = gate.close(EVER).unwrap();
    assert_eq!(gate.close(EVER).unwrap_err(), GateError::ClosedByMe);
    assert_eq!(pass.enter().unwrap_err(), GateError::ClosedByMe);
    drop(closed);
    drop(pass.enter().unwrap());
}

/// Who keeps it closed may wait for somebody who wants to close it.
#[test]
fn nobody_waits_for_ever_for_somebody_who_keeps_it_closed() {
    let gate = Arc::new(Gate::default());
    let closed = gate.close(EVER).unwrap();
    let patience = Duration::from_millis(1);
    let other = Arc::clone(&gate);
    let waits = thread::spawn(move || other.close(patience).map(drop));
    assert_eq!(waits.join().unwrap(), Err(GateError::KeptClosed { patience }));
    drop(closed);
    drop(gate.close(patience).unwrap());
}

/// A kick that comes before the guest is entered counts; one from before the gate was entered does not.
#[test]
fn a_vcpu_that_has_gone_holds_nobody_up() {
    let gate = Arc::new(Gate::default());
    let guest = Arc::new(Guest::default());
    let pass = Gate::register(&gate, Arc::<Guest>::clone(&guest));
    guest.kick();
    let inside = pass.enter().unwrap();
    assert!(!guest.kicked.load(Ordering::SeqCst), "an old kick is forgotten");
    drop(inside);
    drop(pass);
    drop(gate.close(EVER).unwrap());
    assert_eq!(guest.kicks.load(Ordering::SeqCst), 1, "nobody was inside to be kicked");
}
