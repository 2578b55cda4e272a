//! AWS's own mock of the metadata service, beside which `cloud::mock` runs the router.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::{run, tailscale};

const MODULE: &str = "github.com/aws/amazon-ec2-metadata-mock";
const VERSION: &str = "1.13.0";
const PROGRAM: &str = "ec2-metadata-mock";

/// Builds the program from the module proxy, if it is not there; without Go it says so, and the test skips itself.
pub(super) fn ensure() -> Result<Option<PathBuf>> {
    let folder = run::repository().join(format!("target/peers/{PROGRAM}-{VERSION}"));
    let program = folder.join(PROGRAM);
    if program.exists() {
        println!("{PROGRAM} {VERSION}: present");
        return Ok(Some(program));
    }
    let Some(go) = tailscale::go() else {
        println!(
            "{PROGRAM} {VERSION}: skipped, there is no go; the test beside it will skip itself"
        );
        return Ok(None);
    };
    println!("{PROGRAM} {VERSION}: building (takes half a minute)");
    let started = Instant::now();
    let workshop = folder.join("build");
    build(&go, &workshop).with_context(|| format!("{PROGRAM} {VERSION}"))?;
    fs::rename(workshop.join(PROGRAM), &program).with_context(|| program.display().to_string())?;
    // Two hundred megabytes that only another build would need.
    fs::remove_dir_all(&workshop).with_context(|| format!("remove {}", workshop.display()))?;
    println!(
        "{PROGRAM} {VERSION}: built in {:.0} s",
        started.elapsed().as_secs_f64()
    );
    Ok(Some(program))
}

fn build(go: &Path, workshop: &Path) -> Result<()> {
    let source = workshop.join("source");
    fs::create_dir_all(&source).with_context(|| source.display().to_string())?;
    fs::write(source.join("go.mod"), "module mock\n").context("go.mod")?;
    let run = |arguments: &[&str]| tailscale::run_go(go, &source, workshop, arguments);
    let program = workshop.join(PROGRAM);
    let package = format!("{MODULE}/cmd/{PROGRAM}");
    run(&["get", &format!("{package}@v{VERSION}")])?;
    run(&[
        "build",
        "-trimpath",
        "-ldflags=-s -w",
        "-o",
        &program.to_string_lossy(),
        &package,
    ])
}
