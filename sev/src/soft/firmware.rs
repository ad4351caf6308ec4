//! The firmware of the machine, as far as a launch needs it.
//!
//! Mirrors the SEV-SNP firmware ABI, sections "SNP_LAUNCH_START" to "SNP_LAUNCH_FINISH". Which values of a CPUID page a real
//! firmware refuses is not modelled but for one case: reserved bits.

use crate::commands::{FirmwareStatus, LaunchFinish, LaunchStart};
use crate::cpuid::MAX_FUNCTIONS;
use crate::digest::{LaunchDigest, PageType};
use crate::page::Page;
use crate::rmp::{Entry, PageState};

/// The version of the ABI that this firmware has: a policy may ask for no later one.
const ABI: (u64, u64) = (1, 55);

/// What the firmware knows of a guest.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) digest: LaunchDigest,
    pub(super) running: bool,
    policy: u64,
}

/// Little-endian, at `offset`.
fn put(page: &mut Page, offset: usize, bytes: &[u8]) {
    page.put(offset, bytes);
}

impl Context {
    /// `SNP_LAUNCH_START`.
    pub(super) fn start(start: &LaunchStart) -> Result<Self, FirmwareStatus> {
        let (minor, major) = (start.policy & 0xff, start.policy >> 8 & 0xff);
        if (major, minor) > ABI {
            return Err(FirmwareStatus::POLICY_FAILURE);
        }
        Ok(Self { digest: LaunchDigest::INITIAL, running: false, policy: start.policy })
    }

    /// `SNP_LAUNCH_UPDATE` of one page that the RMP says this about. May change the contents: to what the guest will find, or,
    /// with [`FirmwareStatus::INVALID_PARAM`], to a CPUID table that would have been accepted.
    pub(super) fn update(
        &mut self,
        entry: Option<&Entry>,
        asid: u32,
        page_type: PageType,
        contents: &mut Page,
    ) -> Result<(), FirmwareStatus> {
        if self.running {
            return Err(FirmwareStatus::INVALID_GUEST_STATE);
        }
        let entry = entry.filter(|entry| entry.state() == PageState::PreGuest);
        let entry = entry.ok_or(FirmwareStatus::INVALID_PAGE_STATE)?;
        if entry.asid != asid {
            return Err(FirmwareStatus::INVALID_PAGE_OWNER);
        }
        match page_type {
            PageType::Zero => *contents = Page::ZERO,
            PageType::Cpuid => check_cpuid(contents)?,
            PageType::Secrets => {
                *contents = Page::ZERO;
                put(contents, 0, &3_u32.to_le_bytes());
                // The keys of the four VMPLs.
                for vmpl in 0..4_u8 {
                    let at = usize::from(vmpl).saturating_mul(32).saturating_add(0x20);
                    put(contents, at, &[vmpl.saturating_add(1); 32]);
                }
            }
            PageType::Normal | PageType::Unmeasured | PageType::Vmsa => {}
        }
        self.digest.add(page_type, entry.gfn, contents);
        Ok(())
    }

    /// `SNP_LAUNCH_FINISH`.
    pub(super) fn finish(&mut self, finish: &LaunchFinish) -> Result<(), FirmwareStatus> {
        if self.running {
            return Err(FirmwareStatus::INVALID_GUEST_STATE);
        }
        if let Some(id) = &finish.id_block {
            if id.block.first_chunk::<48>() != Some(self.digest.bytes()) {
                return Err(FirmwareStatus::BAD_MEASUREMENT);
            }
            let policy = id.block.last_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
            if policy != Some(self.policy) {
                return Err(FirmwareStatus::POLICY_FAILURE);
            }
        }
        self.running = true;
        Ok(())
    }
}

/// Refuses a table with too many functions, and clears reserved fields that are not zero.
fn check_cpuid(contents: &mut Page) -> Result<(), FirmwareStatus> {
    let count = usize::try_from(u32::from_le_bytes(contents.get(0))).unwrap_or(usize::MAX);
    if count > MAX_FUNCTIONS {
        return Err(FirmwareStatus::INVALID_PARAM);
    }
    let reserved = (0..count).map(|nr| (nr.saturating_mul(48).saturating_add(16 + 40), 8)).chain([(4, 4), (8, 8)]);
    let mut corrected = false;
    for (offset, len) in reserved {
        for byte in contents.iter_mut().skip(offset).take(len).filter(|byte| **byte != 0) {
            (*byte, corrected) = (0, true);
        }
    }
    if corrected { Err(FirmwareStatus::INVALID_PARAM) } else { Ok(()) }
}
