//! The demo: a laptop reaches a web server and a database in a VPC through Sluice. It says what it
//! does, checks every promise on real packets, and leaves nothing behind.
//!
//! `cargo xtask demo` builds the router and runs this with `SLUICE_BIN` set.

mod checks;
mod packets;
mod report;
mod services;
mod tailnet;
mod tour;

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use lab::{Footprint, Lab, requirements, sluice};

use report::Report;

/// A laptop reaches a web server and a database in a VPC through Sluice: all in network namespaces
/// of this machine, with real packets, and every promise checked.
#[derive(Parser)]
struct Options {
    /// What to show; all but `tailnet` is told above.
    #[arg(value_enum, default_value = "vpc")]
    part: Part,
    /// Leave everything running, and print commands to try by hand.
    #[arg(long)]
    keep: bool,
    /// Remove what `--keep` has left.
    #[arg(long, conflicts_with = "keep")]
    remove: bool,
    /// Wait for the end of the process with this id, then remove what it has left.
    #[arg(long, hide = true, conflicts_with_all = ["keep", "remove"])]
    guard: Option<u32>,
}

/// What is shown.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Clients whose keys stand in a file.
    Vpc,
    /// A router that joins a tailnet, and real clients of it.
    Tailnet,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match options {
        Options {
            guard: Some(pid), ..
        } => guard(pid),
        Options { remove: true, .. } => remove(),
        Options { keep, part, .. } => demo(part, keep),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("demo: {error:#}");
        ExitCode::from(2)
    })
}

fn demo(part: Part, keep: bool) -> anyhow::Result<ExitCode> {
    ready()?;
    let started = Instant::now();
    let before = Footprint::of_machine()?;
    let _guard = start_guard()?;
    let lab = if keep { Lab::lasting()? } else { Lab::new()? };
    let id = lab.id().to_owned();
    let mut report = Report::new();

    let toured = match part {
        Part::Vpc => tour::run(&lab, keep, &mut report),
        Part::Tailnet => tailnet::run(&lab, keep, &mut report),
    };
    if let Err(error) = toured {
        report.check("the demo runs to its end", Err(error));
    }
    if report.failed() {
        lab.print_logs();
    }
    if keep {
        lab.keep()?;
    } else {
        report.step("remove everything");
        drop(lab);
        let left = leftovers(&id, &before);
        report.check("nothing is left on this machine", left);
    }
    println!("    ({:.1} s)", started.elapsed().as_secs_f64());
    Ok(report.finish())
}

/// Says in one go what keeps the demo from running.
fn ready() -> anyhow::Result<()> {
    if let Some(reason) = lab::unable() {
        anyhow::bail!("{reason}");
    }
    let missing: Vec<&str> = requirements::missing(true)
        .iter()
        .map(|r| r.package)
        .collect();
    ensure!(
        missing.is_empty(),
        "packages are missing: {}; `cargo xtask setup` brings them",
        missing.join(" ")
    );
    sluice::binary().map(drop)
}

fn leftovers(id: &str, before: &Footprint) -> anyhow::Result<String> {
    let traces = lab::traces(id);
    ensure!(traces.is_empty(), "{}", traces.join(", "));
    let changed = before.difference(&Footprint::of_machine()?);
    ensure!(changed.is_empty(), "{}", changed.join("; "));
    Ok("namespaces, links, rules, nftables, programs, files".to_owned())
}

/// Starts the process that cleans up should this one be killed. Its standard input ends with us.
fn start_guard() -> anyhow::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--guard", &std::process::id().to_string()])
        .stdin(Stdio::piped())
        .process_group(0);
    command.spawn().context("the demo's guard")
}

fn guard(pid: u32) -> anyhow::Result<ExitCode> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    let removed = lab::sweep_after(pid)?;
    if !removed.is_empty() {
        eprintln!("demo: it was interrupted; the lab is removed");
    }
    Ok(ExitCode::SUCCESS)
}

fn remove() -> anyhow::Result<ExitCode> {
    let kept = lab::remove_kept()?;
    lab::sweep()?;
    println!(
        "removed: {}",
        if kept.is_empty() {
            "nothing was there".to_owned()
        } else {
            kept.join(", ")
        }
    );
    Ok(ExitCode::SUCCESS)
}
