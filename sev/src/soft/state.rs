//! What KVM and the firmware know of a guest and of its vCPUs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cvm_memory::addr::Gfn;
use cvm_memory::soft::GmemPage;

use crate::ghcb::psc::Cursor;
use crate::page::Page;
use crate::rmp::Pfn;

use super::firmware::Context;
use super::machine::Machine;

/// A page state change request that is being worked off.
#[derive(Debug, Clone, Copy)]
pub(super) struct PscState {
    pub(super) ghcb: u64,
    pub(super) scratch: u64,
    pub(super) cursor: Cursor,
    /// What userspace has answered, until it is used.
    pub(super) answer: Option<u64>,
}

/// Where the state of a vCPU lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum SaveArea {
    /// Nowhere yet: the vCPU was created and neither launched nor started by another one.
    #[default]
    None,
    /// In a page of KVM's, since the launch.
    Kvm,
    /// At a frame of the guest's, which is to be looked up.
    Pending(Gfn),
    /// In a page of the guest's.
    Guest(Gfn, Pfn),
    /// It was at a frame where nothing was found, or the vCPU was destroyed.
    Lost,
}

/// What KVM knows of a vCPU.
#[derive(Debug, Default)]
pub(super) struct VcpuState {
    pub(super) save_area: SaveArea,
    /// KVM's page for it, which stays the guest's until the VM goes.
    pub(super) kvm_page: Option<Pfn>,
    /// The frame of the GHCB page that the guest has registered.
    pub(super) ghcb: Option<u64>,
    pub(super) psc: Option<PscState>,
    /// One that was never finished stands in the way of the next.
    pub(super) stale_psc: bool,
}

/// What KVM and the firmware know of a guest.
#[derive(Debug, Default)]
pub(super) struct GuestState {
    pub(super) asid: Option<u32>,
    pub(super) features: u64,
    pub(super) context: Option<Context>,
    pub(super) vcpus: BTreeMap<u32, VcpuState>,
    /// What the VMM has set the vCPUs' registers to, as KVM would make pages of them.
    pub(super) registers: BTreeMap<u32, Page>,
}

impl GuestState {
    pub(super) fn is_running(&self) -> bool {
        self.context.as_ref().is_some_and(|context| context.running)
    }
}

/// The platform's side of a VM; its hooks are in `arch`.
#[derive(Debug)]
pub(super) struct SnpArch {
    machine: Arc<Machine>,
    guest: Mutex<GuestState>,
}

impl SnpArch {
    pub(super) fn new(machine: Arc<Machine>) -> Self {
        Self { machine, guest: Mutex::default() }
    }

    pub(super) const fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    pub(super) fn guest(&self) -> MutexGuard<'_, GuestState> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pfn(&self, page: GmemPage) -> Pfn {
        self.machine.lock().pfn(page)
    }
}

impl Drop for SnpArch {
    /// The VM is gone: KVM's own pages go back to the host, the ASID is free.
    fn drop(&mut self) {
        let guest = self.guest();
        let mut machine = self.machine.lock();
        for pfn in guest.vcpus.values().filter_map(|vcpu| vcpu.kvm_page) {
            machine.host.reclaim(pfn, 1);
        }
        if let Some(asid) = guest.asid {
            machine.free_asid(asid);
        }
    }
}
