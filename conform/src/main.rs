//! Plays scenarios and says where machines differ: random ones for as long as asked, or those of files.
//!
//! ```text
//! cargo run --release -p cvm-memory-conform -- --kind protected --seconds 3600
//! tests/lab/cargo run --release -p cvm-memory-conform -- --against kvm --scenarios 2000
//! cargo run --release -p cvm-memory-conform -- --play conform/book/found/mmio-outlives-conversion.scn
//! ```

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use cvm_memory_conform::live::kvm::Offer;
use cvm_memory_conform::machine::Shape;
use cvm_memory_conform::run::{Failure, Plan, Play, Tally, run};
use cvm_memory_conform::scenario::Kind;
use cvm_memory_conform::{Scenario, snp, suite};
use indicatif::{ProgressBar, ProgressStyle};

/// Plays scenarios on several machines and says where they differ.
#[derive(Debug, Parser)]
struct Args {
    /// Who is held against the software KVM.
    #[arg(long, value_enum, default_value_t = Against::Reference)]
    against: Against,
    /// What VMs; all that there are if not given.
    #[arg(long, value_enum)]
    kind: Option<KindChoice>,
    /// Random scenarios of each kind.
    #[arg(long, default_value_t = 1000)]
    scenarios: u64,
    /// Instead of a number, for as long; seconds for each kind.
    #[arg(long)]
    seconds: Option<u64>,
    /// Scenario `n` comes from this seed plus `n`.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// vCPUs.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    vcpus: u8,
    /// Plays these files instead.
    #[arg(long, num_args = 1..)]
    play: Vec<PathBuf>,
    /// Prints one JSON object per kind.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Against {
    /// The interpreter of the kernel contract.
    Reference,
    /// `/dev/kvm`, and the interpreter too.
    Kvm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KindChoice {
    /// KVM's default type.
    Default,
    /// The software-protected type.
    Protected,
    /// Accesses carry their privacy; against the interpreter only.
    Tagged,
    /// SEV-SNP: the model by its rules, or against KVM's own SNP code in the lab.
    Snp,
}

impl From<KindChoice> for Kind {
    fn from(choice: KindChoice) -> Self {
        match choice {
            KindChoice::Default => Self::Default,
            KindChoice::Protected => Self::Protected,
            KindChoice::Tagged => Self::Tagged,
            KindChoice::Snp => Self::Snp,
        }
    }
}

/// Address bits where no processor has a say.
const PHYSICAL_BITS: u32 = 40;

/// Who plays scenarios of one kind; `None` if there is no such KVM, which has been said then.
fn with_players<T>(args: &Args, kind: Kind, use_them: impl FnOnce(Shape, &Play<'_>) -> T) -> Option<T> {
    match args.against {
        Against::Reference if kind == Kind::Snp => {
            let shape = Shape { kind, vcpus: args.vcpus, physical_bits: PHYSICAL_BITS };
            let play = |scenario: &Scenario, tally: &mut Tally| {
                suite::snp_soft(Shape { vcpus: scenario.vcpus, ..shape }, scenario, tally)
            };
            Some(use_them(shape, &play))
        }
        Against::Kvm if kind == Kind::Snp => {
            let offer = snp::Offer::here()?;
            let shape = Shape { vcpus: args.vcpus, ..offer.shape };
            Some(use_them(shape, &|scenario: &Scenario, tally: &mut Tally| suite::snp_kvm(&offer, scenario, tally)))
        }
        Against::Reference => {
            let shape = Shape { kind, vcpus: args.vcpus, physical_bits: PHYSICAL_BITS };
            let play = |scenario: &Scenario, tally: &mut Tally| {
                suite::soft(Shape { vcpus: scenario.vcpus, ..shape }, scenario, tally)
            };
            Some(use_them(shape, &play))
        }
        Against::Kvm => {
            let offer = Offer::of(kind)?;
            let shape = Shape { vcpus: args.vcpus, ..offer.shape };
            Some(use_them(shape, &|scenario: &Scenario, tally: &mut Tally| suite::kvm(&offer, scenario, tally)))
        }
    }
}

fn random(args: &Args, kind: Kind) -> Option<Result<Tally, Box<Failure>>> {
    let plan = Plan {
        seed: args.seed,
        scenarios: if args.seconds.is_some() { u64::MAX } else { args.scenarios },
        time: args.seconds.map(Duration::from_secs),
        // What the lab's emulation counts it counts for the whole machine.
        threads: if kind == Kind::Snp { 1 } else { std::thread::available_parallelism().map_or(1, Into::into) },
    };
    let watched = !args.json && std::io::stderr().is_terminal();
    let bar = if !watched {
        ProgressBar::hidden()
    } else if args.seconds.is_some() {
        ProgressBar::new_spinner()
    } else {
        ProgressBar::new(args.scenarios)
    };
    if let Ok(style) = ProgressStyle::with_template("{msg:>10} {wide_bar} {pos} scenarios {elapsed}") {
        bar.set_style(style);
    }
    bar.set_message(format!("{kind:?}"));
    let outcome = with_players(args, kind, |shape, play| run(plan, shape, play, &|done| bar.set_position(done)));
    bar.finish_and_clear();
    outcome
}

/// Whether there was anybody to play it.
fn play_file(args: &Args, path: &PathBuf) -> Result<bool, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let scenario: Scenario = text.parse().map_err(|error| format!("{error}"))?;
    let played = with_players(args, scenario.kind, |_, play| play(&scenario, &mut Tally::default()));
    match played {
        None => Ok(false),
        Some(Ok(_)) => Ok(true),
        Some(Err(difference)) => Err(difference.to_string()),
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut good = true;
    for path in &args.play {
        match play_file(&args, path) {
            Ok(true) => println!("{}: no difference", path.display()),
            Ok(false) => println!("{}: not played", path.display()),
            Err(reason) => {
                good = false;
                println!("{}: {reason}", path.display());
            }
        }
    }
    let kinds = match (args.kind, args.against) {
        (Some(kind), _) => vec![kind.into()],
        (None, Against::Reference) => vec![Kind::Default, Kind::Protected, Kind::Tagged],
        (None, Against::Kvm) => vec![Kind::Default, Kind::Protected],
    };
    for kind in kinds.into_iter().filter(|_| args.play.is_empty()) {
        match random(&args, kind) {
            None => {}
            Some(Ok(tally)) if args.json => println!("{}", tally.json(kind)),
            Some(Ok(tally)) => println!("{kind:?}: {tally}"),
            Some(Err(failure)) => {
                good = false;
                if args.json {
                    println!(
                        "{}",
                        serde_json::json!({ "kind": format!("{kind:?}"), "difference": failure.to_string() })
                    );
                } else {
                    println!("{kind:?}: {failure}");
                }
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
