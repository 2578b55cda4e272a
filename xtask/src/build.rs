//! Building the programs that the other tasks run.

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::run;

/// The lab's router: the dev profile, whose dependencies are optimised already, with the router's
/// own packet path optimised too. As an option it leaves `cargo test` as quick as it is, and all
/// else that the dev profile has built is shared.
const LAB: [&str; 2] = ["--config", "profile.dev.package.router.opt-level=2"];

/// Builds programs as the lab runs them, and returns the folder they are in.
pub(crate) fn lab(names: &[&str]) -> Result<PathBuf> {
    let mut options = bins(names);
    options.extend(LAB);
    cargo_build(&options)?;
    folder()
}

/// Builds a router that is slow, for nothing of it is optimised but its dependencies, under a name
/// of its own.
pub(crate) fn slow_router() -> Result<PathBuf> {
    cargo_build(&bins(&["sluice"]))?;
    let slow = folder()?.join("sluice-slow");
    fs::copy(folder()?.join("sluice"), &slow).context("copy the slow router")?;
    Ok(slow)
}

/// Builds programs as they are shipped and returns the folder they are in.
pub(crate) fn shipped(names: &[&str]) -> Result<PathBuf> {
    let mut options = bins(names);
    options.push("--release");
    cargo_build(&options)?;
    Ok(folder()?.with_file_name("release"))
}

/// Builds an example as the tests are built, and returns the folder it is in.
pub(crate) fn example(name: &str) -> Result<PathBuf> {
    cargo_build(&["--locked", "--example", name])?;
    Ok(folder()?.join("examples"))
}

fn bins<'a>(names: &[&'a str]) -> Vec<&'a str> {
    names.iter().flat_map(|name| ["--bin", name]).collect()
}

/// Always the whole workspace, for then a crate has the same features in every build.
fn cargo_build(options: &[&str]) -> Result<()> {
    run::show(run::cargo().args(["build", "--workspace"]).args(options))
}

/// Where cargo puts the programs of the dev profile: this one is among them.
fn folder() -> Result<PathBuf> {
    let mut path = env::current_exe().context("path of this program")?;
    path.pop();
    Ok(path)
}
