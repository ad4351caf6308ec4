//! What came of an operation of the library, in words.

use cvm_memory::addr::GfnRange;
use cvm_memory::convert::{
    AddListenerError, ConvertError, LockError, Outcome, PinError, Refusal, RequestError, StepError,
};
use cvm_memory::exits::{Action, GuestError, Handled};
use cvm_memory::gmem::GmemError;
use cvm_memory::layout::{BindError, LayoutError};
use cvm_memory::memory::{AccessError, PrefaultFailed, SlotError};
use cvm_memory::prefault::PieceError;
use cvm_memory_testkit::chain;
use nix::errno::Errno;

use super::wire::bytes;

fn list(ranges: &[GfnRange]) -> String {
    let all: Vec<String> =
        ranges.iter().map(|gfns| format!("{:#x}..{:#x}", gfns.start_byte(), gfns.end_byte())).collect();
    if all.is_empty() { "nothing".into() } else { all.join(",") }
}

pub(super) fn outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Unchanged => "unchanged".into(),
        Outcome::Converted { pages } => format!("converted {pages}"),
        Outcome::RolledBack { cause } => format!("rolled back, {}", step(cause)),
        Outcome::Poisoned { done, unmapped, cause, .. } => {
            format!("poisoned, {}, done {}, unmapped {}", step(cause), list(done), list(unmapped))
        }
    }
}

pub(super) fn step(error: &StepError) -> String {
    match error {
        StepError::Attributes { gfns, errno, .. } => format!("attributes {} {errno:?}", bytes(gfns)),
        StepError::Listener { gfns, error } => {
            let errno = error.inner().downcast_ref::<Errno>();
            format!("map {} {}", bytes(gfns), errno.map_or_else(|| error.to_string(), |errno| format!("{errno:?}")))
        }
        StepError::Private { gfns, error: GmemError::Call { errno, .. } } => format!("punch {} {errno:?}", bytes(gfns)),
        StepError::Private { gfns, error } => format!("punch {} {error}", bytes(gfns)),
        StepError::Shared { gfns, errno } => format!("discard {} {errno:?}", bytes(gfns)),
        StepError::Record { gfns, .. } => format!("record {}", bytes(gfns)),
    }
}

fn lock(error: &LockError) -> &'static str {
    match error {
        LockError::Pinned { .. } => "pinned",
        LockError::Reentrant { .. } => "reentrant",
    }
}

pub(super) fn convert(error: &ConvertError) -> String {
    match error {
        ConvertError::Refused(Refusal::Hole { hole, .. }) => format!("refused, no memory {}", bytes(hole)),
        ConvertError::Refused(Refusal::NotConvertible { part, slot, .. }) => {
            format!("refused, never private {} slot={slot}", bytes(part))
        }
        ConvertError::Locked(error) => format!("refused, {}", lock(error)),
    }
}

pub(super) fn listener(error: &AddListenerError) -> String {
    match error {
        AddListenerError::Map(error) => format!("refused, {}", step(error)),
        AddListenerError::Locked(error) => format!("refused, {}", lock(error)),
    }
}

pub(super) fn slot(error: &SlotError) -> String {
    let reason = match error {
        SlotError::Range { .. } => "no whole pages".into(),
        SlotError::SharedTooShort { .. } => "memory too short".into(),
        SlotError::Layout(error) => layout(error),
        SlotError::NoFreeId { .. } => "no id is free".into(),
        SlotError::StillPrivate { gfns, .. } => format!("still private {}", bytes(gfns)),
        SlotError::Record { .. } => "beyond the record".into(),
        SlotError::Locked(error) => lock(error).into(),
        SlotError::Step { error, .. } => step(error),
        SlotError::FileInUse { .. } => "file in use".into(),
        SlotError::Kvm { errno, .. } => format!("region {errno:?}"),
        SlotError::AddressSpace { .. } => "another address space".into(),
        SlotError::Rebound { was, .. } => format!("pages of gfn {was:#x}"),
        SlotError::Edit(_) | SlotError::Harvest { .. } | SlotError::SharedTwice { .. } | SlotError::IsMemory { .. } => {
            chain(error)
        }
    };
    format!("refused, {reason}")
}

fn layout(error: &LayoutError) -> String {
    match error {
        LayoutError::IdInUse { .. } => "id in use".into(),
        LayoutError::IdTooHigh { .. } => "no such id".into(),
        LayoutError::GfnOverlap { common, with, .. } => format!("addresses of slot {} {}", with.raw(), bytes(common)),
        LayoutError::LogDirtyWithGuestMemfd { .. } => "a file and a dirty log".into(),
        LayoutError::ReadonlyWithGuestMemfd { .. } => "a file and read-only".into(),
        LayoutError::Bind { source: BindError::Overlap { with, common, .. }, .. } => {
            format!("file pages of slot {} offset={:#x} size={:#x}", with.raw(), common.start_byte(), common.bytes())
        }
        LayoutError::Bind { source: BindError::BeyondFile { .. }, .. } => "beyond the file".into(),
        LayoutError::UnknownSlot { .. } => "no such slot".into(),
        other => other.to_string(),
    }
}

pub(super) fn access(error: &AccessError) -> String {
    match error {
        AccessError::Range { .. } => "refused, no such bytes".into(),
        AccessError::Pin { error: PinError::NotShared { part, .. }, .. } => {
            format!("refused, not shared {}", bytes(part))
        }
        AccessError::Pin { error: PinError::Locked(error), .. } => format!("refused, {}", lock(error)),
    }
}

pub(super) fn ahead(error: &PrefaultFailed) -> String {
    match error {
        PrefaultFailed::Missing(missing) => missing.to_string(),
        PrefaultFailed::Stopped(error) => {
            let cause = match &error.cause {
                PieceError::Locked(error) => lock(error).into(),
                PieceError::Materialise { cause, .. } => step(cause),
                PieceError::Allocate { error: GmemError::Call { errno, .. }, .. } => format!("allocate {errno:?}"),
                PieceError::Allocate { error, .. } => error.to_string(),
                PieceError::Map { gpa, errno, .. } => format!("prefault gpa={gpa:#x} {errno:?}"),
            };
            format!("stopped, {cause}, done {:#x}, left {}", error.done.bytes, list(&error.done.left))
        }
    }
}

pub(super) fn action(action: &Action) -> String {
    match action {
        Action::Resume(Handled::Converted { pages }) => format!("converted {pages}"),
        Action::Resume(Handled::Materialised { pages }) => format!("materialised {pages}"),
        Action::Resume(Handled::Unchanged) => "unchanged".into(),
        Action::Resume(Handled::Completed) => "completed".into(),
        Action::Resume(Handled::Retried) => "retried".into(),
        Action::Resume(Handled::Postponed) => "postponed".into(),
        Action::Resume(Handled::Refused) => "refused".into(),
        Action::NotOurs => "not ours".into(),
        Action::GuestError(error) => format!("guest error, {}", guest(error)),
        Action::Prefault(gpa) => format!("to be prefaulted gpa={gpa:#x}"),
        Action::HwPoison(gpa) => format!("broken memory gpa={gpa:#x}"),
        Action::Stuck(fault) => format!("stuck gpa={:#x}", fault.gpa),
        Action::Unresolvable(fault) => format!("unresolvable gpa={:#x} {:?}", fault.gpa, fault.errno),
        Action::Poisoned(poisoned) => outcome(poisoned),
    }
}

fn guest(error: &GuestError) -> String {
    match error {
        GuestError::Malformed(RequestError::Flags { flags, .. }) => format!("unknown flags {flags:#x}"),
        GuestError::Malformed(_) => "no whole pages".into(),
        GuestError::Refused(error) => convert(error),
        GuestError::NotMemory { gfn, to } => format!("no memory gpa={:#x} {to}", gfn.start_byte()),
        GuestError::Implicit { gfn, to } => format!("not asked for gpa={:#x} {to}", gfn.start_byte()),
        GuestError::Failed { gfn, to, cause } => format!("gpa={:#x} {to}: {}", gfn.start_byte(), step(cause)),
    }
}
