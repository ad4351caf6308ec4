//! What the user asked for.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Launches real firmware into private memory, and says the digest that its owner will see.
#[derive(Debug, Clone, Parser)]
#[command(name = "launch")]
pub struct Args {
    /// The kind of confidential VM.
    #[arg(long, value_enum)]
    pub platform: PlatformChoice,
    /// The firmware image.
    #[arg(long)]
    pub firmware: PathBuf,
    /// vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub vcpus: u32,
    /// Who launches; auto takes KVM if it offers such VMs.
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    pub backend: BackendChoice,
    /// Guest memory below the firmware, in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..=2048))]
    pub memory: u64,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PlatformChoice {
    /// TDX.
    Tdx,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    /// KVM if it offers such VMs, else the software KVM.
    Auto,
    /// KVM.
    Kvm,
    /// The software KVM.
    Soft,
}

impl Args {
    pub fn from_command_line() -> Self {
        Self::parse()
    }
}
