//! `cargo xtask bench`: builds the router and the benchmark as they are shipped, and runs it.

use std::process::ExitCode;

use anyhow::Result;

use crate::{build, machine, run, setup};

/// Options of `bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Passed on to the benchmark; `cargo xtask bench -- --help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// Runs the task. The exit status is the benchmark's.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    machine::need_root("bench")?;
    setup::ensure(setup::LAB)?;
    let programs = build::shipped(&["sluice", "bench"])?;
    let mut bench = run::command(programs.join("bench"));
    bench
        .args(&args.rest)
        .env("SLUICE_BIN", programs.join("sluice"));
    run::status(&mut bench)
}
