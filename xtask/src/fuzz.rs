//! `cargo xtask fuzz`: the fuzz targets of every parser that outsiders reach (`fuzz/`).
//!
//! libFuzzer with the stable toolchain: coverage is an ordinary pass of LLVM, and a sanitizer, which
//! is not, would find little in code that is nearly all safe. `cargo fuzz` works in `fuzz/` as well.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::run;

/// The targets: file names in `fuzz/fuzz_targets`, each with a corpus of its name.
const TARGETS: [&str; 9] = [
    "underlay",
    "inner",
    "programs",
    "config",
    "uapi",
    "import",
    "tailnet",
    "relay",
    "user_data",
];

/// How long all targets together run in CI.
pub(crate) const CI: Duration = Duration::from_secs(60);

/// What libFuzzer wants of the compiler (the flags of cargo-fuzz), and nothing of it in build
/// scripts: they are built for the host, and a named target keeps flags from those.
const FLAGS: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1 --cfg fuzzing";

/// Options of `fuzz`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The target; all of them if none is named.
    target: Option<String>,
    /// Seconds in all.
    #[arg(long, default_value_t = CI.as_secs())]
    seconds: u64,
    /// Keep in the repository's corpus the inputs that add coverage to it.
    #[arg(long)]
    keep: bool,
}

/// Runs the task.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let time = Duration::from_secs(args.seconds);
    run(args.target.as_deref(), time)?;
    if args.keep {
        for target in chosen(args.target.as_deref())? {
            keep(target)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the targets and runs them, each for its share of the time.
pub(crate) fn run(target: Option<&str>, time: Duration) -> Result<()> {
    let targets = chosen(target)?;
    if run::which("c++").is_none() {
        println!("skipped: no fuzzing, for libFuzzer needs a C++ compiler; apt-get install g++");
        return Ok(());
    }
    build()?;
    let share = (time / targets.len() as u32).as_secs().max(1);
    let mut failed = Vec::new();
    for target in targets {
        let (found, finds) = (folder("corpus")?.join(target), folder("artifacts")?);
        // libFuzzer wants each folder to be there, and git keeps none that is empty.
        for folder in [&found, &run::repository().join(corpus(target))] {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let mut fuzzer = run::command(program(target));
        fuzzer
            .arg(&found)
            .args(seeds(target))
            .arg(format!("-max_total_time={share}"))
            .arg(format!("-artifact_prefix={}/{target}-", finds.display()))
            .args(["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048"])
            // Nothing of what the daemon would log.
            .env("RUST_LOG", "off");
        let purpose = format!("fuzz {target} for {share} s");
        if let Err(error) = run::long(&purpose, &mut fuzzer) {
            println!("{error:#}");
            failed.push(target);
        }
    }
    if !failed.is_empty() {
        let finds = folder("artifacts")?;
        bail!(
            "{} failed; the input is in {}, and with it as its argument the program in {} fails again",
            failed.join(", "),
            finds.display(),
            program("").display()
        );
    }
    Ok(())
}

fn chosen(target: Option<&str>) -> Result<Vec<&'static str>> {
    let fits = |name: &&str| target.is_none_or(|target| target == *name);
    let chosen: Vec<_> = TARGETS.into_iter().filter(fits).collect();
    if chosen.is_empty() {
        bail!("no such target; there are {}", TARGETS.join(", "));
    }
    Ok(chosen)
}

fn build() -> Result<()> {
    let mut build = run::cargo();
    build
        .args(["build", "--release"])
        .args(["--manifest-path", "fuzz/Cargo.toml", "--target", &host()])
        .arg("--target-dir")
        .arg(output())
        .env("RUSTFLAGS", FLAGS);
    run::long("build the fuzz targets", &mut build)
}

/// Adds to a corpus of the repository what has been found here and adds coverage.
fn keep(target: &str) -> Result<()> {
    let mut merge = Command::new(program(target));
    merge
        .current_dir(run::repository())
        .args(["-merge=1", "-max_len=1024"])
        .args([corpus(target), folder("corpus")?.join(target)]);
    run::long(&format!("keep what {target} has found"), &mut merge)
}

fn host() -> String {
    format!("{}-unknown-linux-gnu", env::consts::ARCH)
}

/// Cargo's output folder for the targets.
fn output() -> PathBuf {
    run::repository().join("target/fuzz")
}

fn program(target: &str) -> PathBuf {
    output().join(host()).join("release").join(target)
}

/// The corpus of the repository.
fn corpus(target: &str) -> PathBuf {
    Path::new("fuzz/corpus").join(target)
}

/// Folders whose files are inputs to begin with.
fn seeds(target: &str) -> Vec<PathBuf> {
    let more = (target == "config").then(|| "tests/fixtures/config".into());
    [corpus(target)].into_iter().chain(more).collect()
}

/// A folder for what the fuzzers write.
fn folder(name: &str) -> Result<PathBuf> {
    let folder = output().join(name);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}
