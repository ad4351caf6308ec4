//! Firmware into a confidential VM's private memory, and what the VM is going to be measured as.
//!
//! ```text
//! cargo run --release --example launch -- --platform tdx --firmware OVMF.fd
//! cargo run --release --example launch -- --platform tdx --firmware OVMF.fd --backend kvm    # on a TDX machine
//! ```
//!
//! It stops where the guest would run: a firmware needs devices, which are a VMM's business.

mod td;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

type Failure = Box<dyn Error + Send + Sync>;

/// Puts a firmware image into the private memory of a confidential VM and finishes its launch.
#[derive(Debug, Parser)]
#[command(name = "launch")]
struct Args {
    /// The kind of confidential VM.
    #[arg(long, value_enum)]
    platform: Platform,
    /// The firmware image, whole: code and variables.
    #[arg(long)]
    firmware: PathBuf,
    /// Who builds the VM.
    #[arg(long, value_enum, default_value_t = Backend::Soft)]
    backend: Backend,
    /// Guest memory below the firmware, in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..=2048))]
    memory: u64,
    /// vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    vcpus: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Platform {
    /// A trust domain.
    Tdx,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// The model of the platform, on the software KVM.
    Soft,
    /// KVM, on a machine with the platform's hardware.
    Kvm,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.platform {
        Platform::Tdx => td::launch(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// An error with all its causes, on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
