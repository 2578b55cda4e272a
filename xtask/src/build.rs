//! Building the programs that the other tasks run.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::run;

/// Builds the router and the demo.
pub(crate) fn programs() -> Result<()> {
    run::show(run::cargo().args(["build", "--workspace", "--bin", "sluice", "--bin", "demo"]))
}

/// Path of a built program: it lies beside this one.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("path of this program")?;
    Ok(own.with_file_name(name))
}

/// Builds the tests, and the router that the lab's tests run.
pub(crate) fn tests() -> Result<()> {
    run::show(run::cargo().args(["build", "--workspace", "--bins", "--tests"]))
}
