//! Building the programs that the other tasks run.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::run;

/// Builds programs of the workspace and returns the folder they are in.
pub(crate) fn programs(names: &[&str]) -> Result<PathBuf> {
    cargo_build(&bins(names))?;
    folder()
}

/// Builds programs with the release profile and returns the folder they are in.
pub(crate) fn shipped(names: &[&str]) -> Result<PathBuf> {
    let mut options = bins(names);
    options.push("--release");
    cargo_build(&options)?;
    Ok(folder()?.with_file_name("release"))
}

/// Builds the tests and the router that the lab's tests run, and returns the router's path.
pub(crate) fn tests() -> Result<PathBuf> {
    cargo_build(&["--bins", "--tests"])?;
    Ok(folder()?.join("sluice"))
}

fn bins<'a>(names: &[&'a str]) -> Vec<&'a str> {
    names.iter().flat_map(|name| ["--bin", name]).collect()
}

/// Always the whole workspace, for then every build of a crate has the same features and serves
/// the next task too.
fn cargo_build(options: &[&str]) -> Result<()> {
    run::show(run::cargo().args(["build", "--workspace"]).args(options))
}

/// Where cargo puts the programs of the dev profile: this one is among them.
fn folder() -> Result<PathBuf> {
    let mut path = env::current_exe().context("path of this program")?;
    path.pop();
    Ok(path)
}
