//! `cargo xtask test`: all tests, and one line that sums them up.

use std::env;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::{build, machine, run, setup};

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
    all(args.unit, args.filter.as_deref())
}

/// In CI a missing right is a failure of its own, and the tests say so.
fn skips_lab() -> bool {
    !machine::is_root() && env::var_os("CI").is_none()
}

/// Builds and runs the tests, without set-up.
pub(crate) fn all(unit: bool, filter: Option<&str>) -> Result<ExitCode> {
    let skip_lab = !unit && skips_lab();
    let mut tally = Tally::default();
    let mut tests = run::cargo();
    tests.args(["test", "--workspace", "--no-fail-fast"]);
    if unit || skip_lab {
        tests.args(["--lib", "--bins"]);
    } else {
        tests.env("SLUICE_BIN", build::tests()?);
    }
    if let Some(filter) = filter {
        tests.args(["--", filter]);
    }
    let status = run::tee(&mut tests, |line| tally.read(line))?;
    if skip_lab {
        tally.skipped += lab_tests(filter)?;
        println!("not root: the tests in network namespaces were skipped; to run them:");
        println!("  sudo env \"PATH=$PATH\" cargo xtask test");
    }
    for name in &tally.failures {
        println!("failed: {name}");
    }
    println!(
        "tests: {} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    if tally.passed + tally.failed + tally.skipped == 0 && status.success() {
        bail!("no test has `{}` in its name", filter.unwrap_or_default());
    }
    Ok(if status.success() && tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
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
    ]);
    list.args(filter);
    Ok(run::read(&mut list)?
        .lines()
        .filter(|line| line.ends_with(": test"))
        .count())
}

/// What the test programs said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
    failures: Vec<String>,
}

impl Tally {
    /// Takes in one line of libtest's output.
    fn read(&mut self, line: &str) {
        if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
        let Some((_, counts)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.split("; ") {
            let Some((number, word)) = count.split_once(' ') else {
                continue;
            };
            let number = number.parse().unwrap_or(0);
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_add_up() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: ok. 4 passed; 0 failed; 2 ignored; 0 measured; 7 filtered out; finished in 0.00s",
        ] {
            tally.read(line);
        }
        let expected = Tally {
            passed: 6,
            failed: 1,
            skipped: 2,
            failures: vec!["a::c".to_owned()],
        };
        assert_eq!(tally, expected);
    }
}
