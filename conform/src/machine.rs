//! What scenarios are played on.

use crate::observation::Observation;
use crate::scenario::{Kind, Operation};

/// A VM that takes operations and says what came of them.
pub trait Machine {
    /// A word for messages.
    fn name(&self) -> &'static str;

    /// Carries out one operation. Those that [`guard`](crate::guard) keeps out never come here.
    fn play(&mut self, operation: &Operation) -> Observation;

    /// What there is to be seen besides once an operation is over, of machines that have such.
    fn state(&mut self) -> Option<String> {
        None
    }
}

/// What all machines that are compared have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// What VM.
    pub kind: Kind,
    /// With how many vCPUs, each with a guest in it.
    pub vcpus: u8,
    /// Address bits of the processor (MAXPHYADDR): the limit of memslots and of guests.
    pub physical_bits: u32,
}

/// A machine of which only the answers to calls are looked at, and not what guests do or what is in memory.
#[derive(Debug)]
pub struct CallsOnly<M>(pub M);

impl<M: Machine> Machine for CallsOnly<M> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn play(&mut self, operation: &Operation) -> Observation {
        match self.0.play(operation) {
            call @ Observation::Call(_) => call,
            _ => Observation::Unknown,
        }
    }
}
