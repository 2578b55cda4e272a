//! `cargo xtask demo`: builds the router and the lab's demo, and runs it.

use std::process::ExitCode;

use anyhow::Result;

use crate::{build, machine, run, setup};

/// Options of `demo`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Passed on to the demo: `tailnet` shows a router in a tailnet, `--keep` leaves the lab up and prints commands to try by hand.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// Runs the task. The exit status is the demo's.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    machine::need_root("demo")?;
    setup::ensure(setup::LAB)?;
    run(&args.rest)
}

/// Builds and runs the demo, without set-up.
pub(crate) fn run(options: &[String]) -> Result<ExitCode> {
    let programs = build::lab(&["sluice", "demo"])?;
    let mut demo = run::command(programs.join("demo"));
    demo.args(options)
        .env("SLUICE_BIN", programs.join("sluice"));
    run::status(&mut demo)
}
