//! Puts real firmware into private memory and says what the guest's owner will see: the digest of its attestation report.
//!
//! The digest is predicted from the image alone, then the image is launched: on KVM where it offers such VMs, else on the
//! software KVM with a model of the firmware, and the output says which. What is particular to a platform is in its file.
//!
//! ```text
//! cargo run --release --example launch -- --platform snp --firmware OVMF.fd --cpu EPYC-v4
//! cargo run --release --example launch -- --platform tdx --firmware OVMF.fd
//! ```

mod args;
mod snp;
mod td;

use std::error::Error;
use std::io::IsTerminal;
use std::process::ExitCode;

use cvm_memory_testkit::chain;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use args::{Args, PlatformChoice};

type Failure = Box<dyn Error + Send + Sync>;

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    platform: &'static str,
    firmware: String,
    /// Who ran the launch, and where.
    backend: &'static str,
    /// Pages by type, in the order of the types.
    pages: Vec<(String, u64)>,
    vcpus: u32,
    /// Computed from the image.
    predicted_digest: String,
    /// What the launch ended with.
    launched_digest: String,
    /// Why the two differ, or other things to know.
    notes: Vec<String>,
    #[serde(skip)]
    map: String,
}

fn main() -> ExitCode {
    let args = Args::from_command_line();
    let launched = match args.platform {
        PlatformChoice::Snp => snp::run(&args),
        PlatformChoice::Tdx => td::run(&args),
    };
    match launched.and_then(|report| print(&report, args.json)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn print(report: &Report, json: bool) -> Result<(), Failure> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
        return Ok(());
    }
    let Report { platform, firmware, backend, pages, vcpus, predicted_digest, launched_digest, notes, map } = report;
    println!("{platform} guest from {firmware}, {vcpus} vCPUs, launched on {backend}");
    for (name, count) in pages {
        println!("{count:>8} pages {name}");
    }
    println!("predicted {predicted_digest}");
    println!("launched  {launched_digest}");
    for note in notes {
        println!("note: {note}");
    }
    println!("{map}");
    Ok(())
}

/// A bar for people who watch; nothing for programs.
fn progress(args: &Args) -> ProgressBar {
    if args.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:>12} {wide_bar} {pos}/{len} pages {elapsed}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
