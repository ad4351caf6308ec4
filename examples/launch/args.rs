//! What the user asked for.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Launches real firmware into private memory, and says the digest that its owner will see.
#[derive(Debug, Clone, Parser)]
#[command(name = "launch")]
pub struct Args {
    /// The kind of confidential VM.
    #[arg(long, value_enum, default_value_t = PlatformChoice::Snp)]
    pub platform: PlatformChoice,
    /// The firmware image.
    #[arg(long)]
    pub firmware: PathBuf,
    /// The image is an IGVM file, which brings its own vCPU contexts.
    #[arg(long)]
    pub igvm: bool,
    /// A kernel whose hash the firmware is to trust.
    #[arg(long, conflicts_with = "igvm")]
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    #[arg(long, requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Its command line.
    #[arg(long, requires = "kernel", default_value = "")]
    pub append: String,
    /// vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub vcpus: u32,
    /// Type of the vCPUs, as QEMU names it.
    #[arg(long, default_value = "EPYC-v4")]
    pub cpu: String,
    /// Features of the save areas.
    #[arg(long, default_value = "0x1", value_parser = number)]
    pub guest_features: u64,
    /// Who launches; auto takes KVM if it offers such VMs.
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    pub backend: BackendChoice,
    /// Guest memory below the firmware, in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=2048))]
    pub memory: u64,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PlatformChoice {
    /// SEV-SNP.
    Snp,
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
    /// The command line, or its end: help, or an error with exit status 2.
    pub fn from_command_line() -> Self {
        let args = Self::parse();
        if let Err(problem) = args.check() {
            use clap::CommandFactory;
            Self::command().error(clap::error::ErrorKind::ArgumentConflict, problem).exit();
        }
        args
    }

    /// Nothing that is asked for is left out of the digest without a word.
    fn check(&self) -> Result<(), &'static str> {
        match self.platform {
            PlatformChoice::Tdx if self.igvm => {
                Err("--igvm: only the images of SEV-SNP guests are read from such files")
            }
            PlatformChoice::Tdx if self.kernel.is_some() => {
                Err("--kernel: a TD's firmware measures its kernel by itself")
            }
            PlatformChoice::Tdx | PlatformChoice::Snp => Ok(()),
        }
    }
}

/// A number, decimal or hexadecimal.
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is no number"))
}
