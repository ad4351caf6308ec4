//! What the user asked for.

use clap::{Parser, ValueEnum};
use cvm_memory::addr::PAGE_SIZE;
use cvm_memory::convert::DiscardPolicy;
use cvm_memory::memory::Materialise;

/// Boots a guest that converts pages between shared and private, and checks from both sides that every byte is where it
/// belongs.
#[derive(Debug, Clone, Parser)]
#[command(name = "convert_pages")]
pub struct Args {
    /// Who runs the guest; auto takes KVM if it offers private memory.
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    pub backend: BackendChoice,
    /// A platform whose protocol the guest speaks.
    #[arg(long, value_enum)]
    pub platform: Option<PlatformChoice>,
    /// The kind of VM of the software KVM, without a platform.
    #[arg(long, value_enum, default_value_t = SoftVmKind::Tagged)]
    pub soft_vm: SoftVmKind,
    /// Guest memory in bytes, with an optional suffix K, M, G or T.
    #[arg(long, default_value = "64M", value_parser = bytes)]
    pub memory: u64,
    /// Slots, all bound to one guest_memfd.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub slots: u16,
    /// vCPUs, each on a thread of its own.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub vcpus: u16,
    /// What the guest does.
    #[arg(long, value_enum, default_value_t = Workload::Boot)]
    pub workload: Workload,
    /// Conversions that all vCPUs together ask for.
    #[arg(long, default_value_t = 2000)]
    pub requests: u64,
    /// What becomes of the side of a page that lost.
    #[arg(long, value_enum, default_value_t = Discard::Immediate)]
    pub discard: Discard,
    /// When KVM is told that a page is private; by default lazily where the VM allows it.
    #[arg(long, value_enum)]
    pub materialise: Option<MaterialiseChoice>,
    /// Allocate and map all private memory before the guest runs.
    #[arg(long)]
    pub prefault: bool,
    /// Where the random numbers start.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    /// KVM if it offers private memory, else the software KVM.
    Auto,
    /// The software KVM.
    Soft,
    /// KVM, with a software-protected VM if no platform is named.
    Kvm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PlatformChoice {
    /// SEV-SNP: page state changes by the guest's GHCB page, acceptance. On KVM if it offers such VMs, else on a model.
    Snp,
    /// A trust domain: pages have to be accepted, and lose what they held when they are shared. A model.
    Tdx,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SoftVmKind {
    /// Each access says if it is private, as in a VM with hardware protection.
    Tagged,
    /// The attribute alone decides, as in KVM's software-protected VMs.
    Protected,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Like a Linux guest: a bounce buffer shared in 2 MiB requests, then scattered pages, some asked for again.
    Boot,
    /// A bounce buffer whose windows become private and shared again.
    Swiotlb,
    /// The same few windows, back and forth.
    Pingpong,
    /// Random single pages, in random states.
    Scatter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// Freed as part of the conversion.
    Immediate,
    /// Freed later, in larger pieces.
    Deferred,
    /// Not freed: a page that comes back may show what it held.
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MaterialiseChoice {
    /// At the first private access.
    Lazy,
    /// With the slot.
    Eager,
}

impl Args {
    /// The command line, or its end: help, or an error with exit status 2.
    pub fn from_command_line() -> Self {
        let args = Self::parse();
        if let Err(problem) = args.check() {
            use clap::CommandFactory;
            Self::command().error(clap::error::ErrorKind::ValueValidation, problem).exit();
        }
        args
    }

    /// Whether there is a page for everybody.
    fn check(&self) -> Result<(), String> {
        if self.platform == Some(PlatformChoice::Tdx) && self.backend == BackendChoice::Kvm {
            return Err("--platform tdx: there is a model of it, which runs on the software KVM".into());
        }
        let needed = u64::from(self.slots).max(8 * (u64::from(self.vcpus) + 1)) * PAGE_SIZE;
        if self.memory < needed {
            let Self { memory, slots, vcpus, .. } = self;
            return Err(format!(
                "--memory: {memory} bytes are too few for {slots} slots and {vcpus} vCPUs; the least is {needed}"
            ));
        }
        Ok(())
    }

    pub const fn discard_policy(&self) -> DiscardPolicy {
        match self.discard {
            Discard::Immediate => DiscardPolicy::Immediate,
            // Small enough that conversions run into it.
            Discard::Deferred => DiscardPolicy::Deferred { budget: self.memory / 32 },
            Discard::Never => DiscardPolicy::Never,
        }
    }

    pub fn materialise(&self) -> Option<Materialise> {
        self.materialise.map(|choice| match choice {
            MaterialiseChoice::Lazy => Materialise::Lazy,
            MaterialiseChoice::Eager => Materialise::Eager,
        })
    }
}

/// A number of bytes with an optional binary suffix, a page multiple and not zero.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(format!("`{suffix}` is no suffix: use K, M, G or T")),
    };
    let number: u64 = number.parse().map_err(|_| format!("`{number}` is no number of bytes"))?;
    let bytes = number.checked_mul(1 << shift).filter(|bytes| *bytes <= 1 << 46);
    match bytes {
        None => Err("more than 64T".into()),
        Some(0) => Err("a guest without memory".into()),
        Some(bytes) if bytes % PAGE_SIZE != 0 => Err(format!("not a multiple of the page size, {PAGE_SIZE}")),
        Some(bytes) => Ok(bytes),
    }
}
