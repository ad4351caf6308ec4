//! Which of KVM's mechanisms to use: from what it offers, what is wanted and what else goes on, to a choice or a reason why not.
//!
//! A pure function. Userspace is in charge of choosing; what cannot work is refused here, by name, and not noticed when a page
//! is lost. Mirrors `kvm_vm_ioctl_enable_dirty_log_ring()` and `kvm_vm_ioctl_enable_cap_generic()` (`virt/kvm/kvm_main.c`).

use nix::errno::Errno;

use crate::hypervisor::{Cap, Hypervisor};

/// Bytes of a ring's entry.
pub const ENTRY_BYTES: u64 = 16;
/// The smallest ring there can be: a page.
pub const MIN_RING_BYTES: u64 = 4096;
/// The smallest ring for a processor that keeps 512 entries of its own, which the ring must always have room for.
pub const MIN_RING_BYTES_HARDWARE_LOG: u64 = 16384;

/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`, and with it `KVM_DIRTY_LOG_INITIALLY_SET`.
const MANUAL: u64 = 1;
const MANUAL_FROM_ALL: u64 = 3;

/// What takes pages out of a slot's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clearing {
    /// Looking at it. All of it at once, however much of it is of use.
    ByLooking,
    /// A call of its own, for as many pages at once as the caller likes.
    ByHand,
    /// As before, and a new log has every page in it: nothing is protected when logging starts, and the first round copies
    /// everything, as it would anyway.
    ByHandFromAll,
}

impl Clearing {
    /// The value of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    pub const fn options(self) -> u64 {
        match self {
            Self::ByLooking => 0,
            Self::ByHand => MANUAL,
            Self::ByHandFromAll => MANUAL_FROM_ALL,
        }
    }
}

/// What the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// A log per slot.
    Bitmap(Clearing),
    /// A ring of that many bytes per vCPU, and nothing else.
    Ring {
        /// A power of two.
        bytes: u64,
    },
    /// A ring of that many bytes per vCPU, and a log per slot for what is written in no vCPU's name.
    RingWithBitmap {
        /// A power of two.
        bytes: u64,
    },
    /// The first of these that can be had: rings with a log, rings, a log that is cleared by hand, a log. Rings as large as
    /// they can be.
    Best,
}

/// What one VM offers: zero for what it does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offer {
    /// `KVM_CAP_DIRTY_LOG_RING`: the most bytes.
    pub ring: u64,
    /// `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`: the most bytes.
    pub ring_acq_rel: u64,
    /// `KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`.
    pub ring_with_bitmap: u64,
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: legal options.
    pub manual_protect: u64,
}

impl Offer {
    /// Asks `vm`.
    pub fn probe(vm: &dyn Hypervisor) -> Self {
        Self {
            ring: vm.check_extension(Cap::DIRTY_LOG_RING),
            ring_acq_rel: vm.check_extension(Cap::DIRTY_LOG_RING_ACQ_REL),
            ring_with_bitmap: vm.check_extension(Cap::DIRTY_LOG_RING_WITH_BITMAP),
            manual_protect: vm.check_extension(Cap::MANUAL_DIRTY_LOG_PROTECT2),
        }
    }
}

/// Whether anybody in this process, or a device it has let at the memory, writes to guest memory. KVM hears of none of it,
/// whatever the mechanism.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnWrites {
    /// Nobody does.
    None,
    /// All of it is noted in the library's bitmaps, by [`DeviceDirty`](super::DeviceDirty) or by the caller.
    Noted,
    /// Some of it is noted nowhere.
    Unnoted,
}

/// What has happened to the VM so far, and who will write to its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation {
    /// Whether any vCPU was created.
    pub has_vcpus: bool,
    /// Whether there is any memslot.
    pub has_slots: bool,
    /// Whether something inside the kernel writes to guest memory in no vCPU's name.
    pub kernel_devices: bool,
    /// What userspace writes.
    pub own_writes: OwnWrites,
}

/// What is to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mechanism {
    /// A log per slot.
    Bitmap(Clearing),
    /// A ring per vCPU.
    Ring {
        /// The capability that enables it.
        cap: Cap,
        /// Bytes per vCPU.
        bytes: u32,
        /// Whether there is a log per slot for what is written in no vCPU's name.
        backed: bool,
    },
}

/// A choice, and what had to be passed over for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What is to be used.
    pub mechanism: Mechanism,
    /// Why it is nothing better; only after [`Wish::Best`].
    pub passed_over: Vec<Refusal>,
}

/// Why a wish cannot be fulfilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No rings.
    #[error("neither KVM_CAP_DIRTY_LOG_RING nor KVM_CAP_DIRTY_LOG_RING_ACQ_REL is offered")]
    NoRing,
    /// Rings, but no log beside them.
    #[error("KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP is not offered")]
    NoRingWithBitmap,
    /// Logs are not cleared by hand, or not as is asked for.
    #[error("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 offers options {offered:#x}, not {needed:#x}")]
    NoClearingByHand {
        /// The options.
        needed: u64,
        /// What the VM answered.
        offered: u64,
    },
    /// The size of a ring is not a power of two.
    #[error("a ring of {bytes:#x} bytes: not a power of two")]
    RingSize {
        /// In bytes.
        bytes: u64,
    },
    /// A ring is too small.
    #[error("a ring of {bytes:#x} bytes: at least {least:#x}")]
    RingTooSmall {
        /// In bytes.
        bytes: u64,
        /// In bytes.
        least: u64,
    },
    /// A ring is too large.
    #[error("a ring of {bytes:#x} bytes: at most {most:#x}, which is {} entries", most / ENTRY_BYTES)]
    RingTooLarge {
        /// In bytes.
        bytes: u64,
        /// In bytes.
        most: u64,
    },
    /// vCPUs have been created without a ring.
    #[error("rings must be enabled before the first vcpu is created")]
    VcpusExist,
    /// Slots have been created without a log.
    #[error("rings with a log must be enabled before the first memslot is created")]
    SlotsExist,
    /// A ring would lose what is written in no vCPU's name.
    #[error("devices in the kernel write in no vcpu's name, which rings without a log lose")]
    KernelDevices,
    /// Writes that nobody notes.
    #[error("this process or its devices write to memory, noted nowhere: kvm logs none of it")]
    Unnoted,
}

/// Chooses a mechanism.
///
/// ```
/// use cvm_memory::dirty::{Mechanism, Offer, OwnWrites, Refusal, Situation, Wish, negotiate};
/// use cvm_memory::hypervisor::Cap;
///
/// let offer = Offer { ring: 0, ring_acq_rel: 1 << 20, ring_with_bitmap: 0, manual_protect: 3 };
/// let situation =
///     Situation { has_vcpus: false, has_slots: false, kernel_devices: false, own_writes: OwnWrites::Noted };
/// let choice = negotiate(&offer, &situation, Wish::Ring { bytes: 65536 })?;
/// let cap = Cap::DIRTY_LOG_RING_ACQ_REL;
/// assert_eq!(choice.mechanism, Mechanism::Ring { cap, bytes: 65536, backed: false });
///
/// let busy = Situation { kernel_devices: true, ..situation };
/// assert_eq!(negotiate(&offer, &busy, Wish::Ring { bytes: 65536 }), Err(Refusal::KernelDevices));
/// # Ok::<(), Refusal>(())
/// ```
///
/// # Errors
/// [`Refusal`], the first reason that applies.
pub fn negotiate(offer: &Offer, situation: &Situation, wish: Wish) -> Result<Choice, Refusal> {
    if situation.own_writes == OwnWrites::Unnoted {
        return Err(Refusal::Unnoted);
    }
    let chosen = |mechanism| Choice { mechanism, passed_over: Vec::new() };
    match wish {
        Wish::Bitmap(clearing) => bitmap(offer, clearing).map(chosen),
        Wish::Ring { bytes } => ring(offer, situation, bytes, false).map(chosen),
        Wish::RingWithBitmap { bytes } => ring(offer, situation, bytes, true).map(chosen),
        Wish::Best => {
            let most = offer.ring.max(offer.ring_acq_rel);
            let candidates = [
                ring(offer, situation, most, true),
                ring(offer, situation, most, false),
                bitmap(offer, Clearing::ByHand),
                bitmap(offer, Clearing::ByLooking),
            ];
            let mut passed_over = Vec::new();
            for candidate in candidates {
                match candidate {
                    Ok(mechanism) => return Ok(Choice { mechanism, passed_over }),
                    Err(refusal) => passed_over.push(refusal),
                }
            }
            // Not reached: a log that is cleared by looking needs nothing.
            Err(passed_over.pop().unwrap_or(Refusal::NoRing))
        }
    }
}

const fn bitmap(offer: &Offer, clearing: Clearing) -> Result<Mechanism, Refusal> {
    let (needed, offered) = (clearing.options(), offer.manual_protect);
    if offered & needed != needed {
        return Err(Refusal::NoClearingByHand { needed, offered });
    }
    Ok(Mechanism::Bitmap(clearing))
}

fn ring(offer: &Offer, situation: &Situation, bytes: u64, backed: bool) -> Result<Mechanism, Refusal> {
    // The second announces what we do anyway; where both are offered they do the same.
    let (cap, most) = match (offer.ring_acq_rel, offer.ring) {
        (0, 0) => return Err(Refusal::NoRing),
        (0, most) => (Cap::DIRTY_LOG_RING, most),
        (most, _) => (Cap::DIRTY_LOG_RING_ACQ_REL, most),
    };
    if backed && offer.ring_with_bitmap == 0 {
        return Err(Refusal::NoRingWithBitmap);
    }
    if !bytes.is_power_of_two() {
        return Err(Refusal::RingSize { bytes });
    }
    if bytes < MIN_RING_BYTES {
        return Err(Refusal::RingTooSmall { bytes, least: MIN_RING_BYTES });
    }
    let Some(bytes_32) = u32::try_from(bytes).ok().filter(|_| bytes <= most) else {
        return Err(Refusal::RingTooLarge { bytes, most });
    };
    if situation.has_vcpus {
        return Err(Refusal::VcpusExist);
    }
    if backed && situation.has_slots {
        return Err(Refusal::SlotsExist);
    }
    if !backed && situation.kernel_devices {
        return Err(Refusal::KernelDevices);
    }
    Ok(Mechanism::Ring { cap, bytes: bytes_32, backed })
}

/// KVM would not have a mechanism that should work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("enable {cap} with {value:#x}{}", hint(*cap, *value))]
pub struct EnableError {
    /// The capability.
    pub cap: Cap,
    /// Its argument.
    pub value: u64,
    /// What KVM answered.
    #[source]
    pub errno: Errno,
}

fn hint(cap: Cap, value: u64) -> &'static str {
    let ring = matches!(cap, Cap::DIRTY_LOG_RING | Cap::DIRTY_LOG_RING_ACQ_REL);
    if ring && value < MIN_RING_BYTES_HARDWARE_LOG {
        " (a processor with a dirty log of its own needs 0x4000)"
    } else {
        ""
    }
}

impl Mechanism {
    /// The capabilities to enable, in order, each with its argument. Clearing by hand is taken back where rings are used:
    /// pages that are not protected from the start would never get into one.
    pub fn steps(&self, offer: &Offer) -> Vec<(Cap, u64)> {
        let manual = |options| {
            let step = (Cap::MANUAL_DIRTY_LOG_PROTECT2, options);
            (offer.manual_protect != 0).then_some(step)
        };
        match *self {
            Self::Bitmap(clearing) => manual(clearing.options()).into_iter().collect(),
            Self::Ring { cap, bytes, backed } => {
                let mut steps: Vec<_> = manual(0).into_iter().collect();
                steps.push((cap, u64::from(bytes)));
                steps.extend(backed.then_some((Cap::DIRTY_LOG_RING_WITH_BITMAP, 0)));
                steps
            }
        }
    }

    /// Carries out [`steps`](Self::steps) on `vm`.
    ///
    /// # Errors
    /// [`EnableError`] for the first that fails; the ones before it stay enabled. A ring cannot be given back.
    pub fn enable(&self, vm: &dyn Hypervisor, offer: &Offer) -> Result<(), EnableError> {
        for (cap, value) in self.steps(offer) {
            vm.enable_cap(cap, [value, 0, 0, 0]).map_err(|errno| EnableError { cap, value, errno })?;
        }
        Ok(())
    }
}
