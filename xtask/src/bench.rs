//! `cargo xtask bench`: builds the router and the benchmark as they are shipped, and runs it.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::{build, machine, run, setup};

/// The benchmark's exit status when `--compare` found something of ours worse.
const WORSE: i32 = 3;
/// A case that a slower router cannot hide from, on a machine of any speed.
const TELLING: &str = "udp-64-256-flows-1-peer-flood-up, sluice";

/// Options of `bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Proves that every suite works and that --compare sees a router built without optimisation, instead
    /// of measuring. For CI: quick, and on a busy machine too.
    #[arg(long)]
    check: bool,
    /// Passed on to the benchmark; `cargo xtask bench -- --help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// Runs the task. The exit status is the benchmark's.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    machine::need_root("bench")?;
    setup::ensure(setup::LAB)?;
    if args.check {
        check()?;
        return Ok(ExitCode::SUCCESS);
    }
    let programs = build::shipped(&["sluice", "bench"])?;
    let mut bench = run::command(programs.join("bench"));
    bench
        .args(&args.rest)
        .env("SLUICE_BIN", programs.join("sluice"));
    run::status(&mut bench)
}

/// Every suite in its shortest form, then the proof. Without set-up.
pub(crate) fn check() -> Result<()> {
    // The slow router first: what is built last stays under the usual name.
    let slow = build::slow_router()?;
    let programs = build::lab(&["sluice", "bench"])?;
    let sluice = programs.join("sluice");
    let bench = |sluice: &Path, arguments: &[&str]| -> Command {
        let mut bench = run::command(programs.join("bench"));
        bench.args(arguments).env("SLUICE_BIN", sluice);
        bench
    };
    run::show(&mut bench(
        &sluice,
        &["--smoke", "--out", "target/bench/smoke"],
    ))?;

    let before = "target/bench/before";
    let telling = ["wireguard", "--quick", "--only", TELLING, "--out"];
    run::show(&mut bench(&sluice, &[&telling[..], &[before]].concat()))?;
    let old = format!("{before}/report.json");
    let compare = ["target/bench/after", "--compare", &old];
    let mut slower = bench(&slow, &[&telling[..], &compare].concat());
    println!(
        "> {}, with a router that is not optimised",
        run::line(&slower)
    );
    let status = slower.status().context("run the benchmark")?;
    fs::remove_file(&slow).with_context(|| format!("remove {}", slow.display()))?;
    if status.code() != Some(WORSE) {
        bail!("--compare did not see that the router had become slower ({status})");
    }
    println!("--compare has seen the slow-down");
    Ok(())
}
