//! `cargo xtask test`: all tests, and one line that sums them up.

use std::env;
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Result, bail};

use crate::{build, image, kernels, machine, run, setup};

mod tally;

use tally::{Failure, Tally};

/// How many tests of a program run at a time, for all of them.
const TEST_THREADS: &str = "RUST_TEST_THREADS";
/// How many schedules of the simulated internet are tried (`tailnet::paths::model::simulation`), and how many in CI.
const SCHEDULES: (&str, &str) = ("SLUICE_SCHEDULES", "10000");
/// So many failed tests are tried once more. Where more have failed, it was not by chance.
const TRIED_AGAIN: usize = 3;

/// Options of `test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the tests beside the code, which need no root.
    #[arg(long)]
    unit: bool,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

/// Runs the task. The exit status is 0 only if every test that ran passed.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let units = args.unit || skips_lab();
    setup::ensure(if units { setup::BUILD } else { setup::LAB })?;
    all(args.unit, args.filter.as_deref(), false)?;
    Ok(ExitCode::SUCCESS)
}

/// In CI a missing right is a failure of its own, and the tests say so.
fn skips_lab() -> bool {
    !machine::is_root() && env::var_os("CI").is_none()
}

/// Builds and runs the tests, without set-up; `thorough` as in CI. Yields what is to be looked at
/// although all passed; the error says which have failed.
pub(crate) fn all(unit: bool, filter: Option<&str>, thorough: bool) -> Result<Vec<String>> {
    let skip_lab = !unit && skips_lab();
    let mut tally = Tally::default();
    let mut tests = run::cargo();
    tests.args(["test", "--workspace"]);
    if !unit && !skip_lab {
        tests.env(
            "SLUICE_BIN",
            build::lab(&["sluice", "demo"])?.join("sluice"),
        );
    }
    let again = in_lab(&tests);
    tests.arg("--no-fail-fast");
    if unit || skip_lab {
        tests.args(["--lib", "--bins"]);
    }
    if thorough && env::var_os(SCHEDULES.0).is_none() {
        tests.env(SCHEDULES.0, SCHEDULES.1);
    }
    if env::var_os(TEST_THREADS).is_none() {
        tests.env(TEST_THREADS, threads().to_string());
    }
    // Tests that skip themselves say so in their output only.
    tests.args(["--", "--show-output"]).args(filter);
    tests.args(["--skip", kernels::TESTS, "--skip", image::TESTS]);
    let status = run::tee(&mut tests, |line| tally.read(line))?;
    if skip_lab {
        tally.ignored += lab_tests(filter)?;
        println!("not root: the tests in network namespaces were skipped; to run them:");
        println!("  sudo env \"PATH=$PATH\" cargo xtask test");
    }
    if !unit && !skip_lab {
        println!(
            "not among them: the tests that boot other kernels, `cargo xtask kernels`, and those of whole \
             systems, `cargo xtask image test`"
        );
    }
    end(&tally, status, filter, thorough.then_some(again))
}

/// How many tests run at a time, of those that take a processor some of the time: they wait for the lab.
fn threads() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    2 * cpus
}

/// Runs those tests of the lab that one of `filters` picks, two at a time: a guest takes one
/// processor. `tests` is a command of `cargo test` as far as packages. Yields as [`all`] does.
pub(crate) fn by_twos(tests: &Command, filters: &[String], thorough: bool) -> Result<Vec<String>> {
    let mut tally = Tally::default();
    let again = in_lab(tests);
    let mut tests = in_lab(tests);
    tests.args(["--", "--show-output", "--test-threads=2"]);
    tests.args(filters);
    let status = run::tee(&mut tests, |line| tally.read(line))?;
    let filter = filters.first().map(String::as_str);
    end(&tally, status, filter, thorough.then_some(again))
}

/// The same command for the lab's tests alone.
fn in_lab(tests: &Command) -> Command {
    let mut lab = run::command(tests.get_program());
    lab.args(tests.get_args()).args(["--test", "integration"]);
    for (name, value) in tests.get_envs() {
        match value {
            Some(value) => lab.env(name, value),
            None => lab.env_remove(name),
        };
    }
    lab
}

/// Sums up. Where `again` is given, failed tests of the lab are tried once more by it: its real
/// sockets and clocks share the machine with others, and one of many hundred tests must not hold up
/// a change that it has nothing to do with. Such a test is faulty or has found a fault, which is
/// why it is told.
fn end(
    tally: &Tally,
    status: ExitStatus,
    filter: Option<&str>,
    again: Option<Command>,
) -> Result<Vec<String>> {
    for reason in &tally.reasons {
        println!("skipped: {reason}");
    }
    println!("{tally}");
    if tally.passed + tally.failed + tally.ignored == 0 && status.success() {
        bail!("no test has `{}` in its name", filter.unwrap_or_default());
    }
    if status.success() && tally.failed == 0 {
        return Ok(Vec::new());
    }
    if tally.failures.is_empty() {
        bail!("the tests ended with {status}");
    }
    // A program that ended early has not run all.
    let whole = tally.failed == tally.failures.len();
    let passed = match again {
        Some(again) if whole && tally.failed <= TRIED_AGAIN => pass_now(again, &tally.failures)?,
        _ => Vec::new(),
    };
    judge(&tally.failures, &passed)
}

/// What is to be said of `failures`, of which those named in `passed` passed when they were tried
/// once more: an error if not all did.
fn judge(failures: &[Failure], passed: &[String]) -> Result<Vec<String>> {
    let (told, failed): (Vec<_>, Vec<_>) = failures
        .iter()
        .partition(|failure| passed.contains(&failure.name));
    let told = told
        .iter()
        .map(|failure| format!("passed at the second attempt only; {failure}"));
    if failed.is_empty() {
        return Ok(told.collect());
    }
    let all: Vec<String> = failed.iter().map(ToString::to_string).chain(told).collect();
    bail!("{} failed:\n{}", failed.len(), all.join("\n"))
}

/// Runs the tests of these names alone, one by one, and yields which of them pass.
fn pass_now(mut again: Command, failures: &[Failure]) -> Result<Vec<String>> {
    let mut tally = Tally::default();
    again.args(["--", "--show-output", "--exact", "--test-threads=1"]);
    again.args(failures.iter().map(|failure| &failure.name));
    run::tee(&mut again, |line| tally.read(line))?;
    Ok(tally.named)
}

/// How many tests the lab has that `filter` picks.
fn lab_tests(filter: Option<&str>) -> Result<usize> {
    let mut list = run::cargo();
    list.args([
        "test",
        "--workspace",
        "--test",
        "integration",
        "--",
        "--list",
        "--format=terse",
        "--skip",
        kernels::TESTS,
        "--skip",
        image::TESTS,
    ]);
    list.args(filter);
    Ok(run::read(&mut list)?
        .lines()
        .filter(|line| line.ends_with(": test"))
        .count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_at_the_second_attempt_is_told_and_what_does_not_has_failed() {
        let failures = ["a::b", "a::c"].map(|name| Failure {
            name: name.to_owned(),
            ..Failure::default()
        });
        let passed = ["a::b", "a::c"].map(str::to_owned);
        let told = judge(&failures, &passed).unwrap();
        assert_eq!(told.len(), 2);
        assert!(told[0].starts_with("passed at the second attempt only; failed: a::b"));
        let error = judge(&failures, &passed[..1]).unwrap_err().to_string();
        assert!(
            error.starts_with("1 failed:\nfailed: a::c\npassed at"),
            "{error}"
        );
        assert!(
            judge(&failures, &[])
                .unwrap_err()
                .to_string()
                .starts_with("2 failed")
        );
    }

    #[test]
    fn the_second_attempt_is_the_same_command_for_the_lab_alone() {
        let mut tests = run::command("cargo");
        tests.args(["test", "--workspace"]).env("SLUICE_BIN", "/x");
        let lab = in_lab(&tests);
        assert_eq!(run::line(&lab), "cargo test --workspace --test integration");
        let is_set = |(name, value): (&std::ffi::OsStr, Option<&std::ffi::OsStr>)| {
            name == "SLUICE_BIN" && value.is_some_and(|value| value == "/x")
        };
        assert!(lab.get_envs().any(is_set));
    }
}
