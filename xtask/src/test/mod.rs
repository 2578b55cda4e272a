//! `cargo xtask test`: all tests, and one line that sums them up.

use std::env;
use std::fmt;
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Result, bail};

use crate::{build, kernels, machine, run, setup};

/// How many tests of a program run at a time, for all of them.
const TEST_THREADS: &str = "RUST_TEST_THREADS";

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
        tests.env(
            "SLUICE_BIN",
            build::lab(&["sluice", "demo"])?.join("sluice"),
        );
    }
    if env::var_os(TEST_THREADS).is_none() {
        tests.env(TEST_THREADS, threads().to_string());
    }
    // Tests that skip themselves say so in their output only.
    tests.args(["--", "--show-output"]).args(filter);
    tests.args(["--skip", kernels::TESTS]);
    let status = run::tee(&mut tests, |line| tally.read(line))?;
    if skip_lab {
        tally.ignored += lab_tests(filter)?;
        println!("not root: the tests in network namespaces were skipped; to run them:");
        println!("  sudo env \"PATH=$PATH\" cargo xtask test");
    }
    if !unit && !skip_lab {
        println!("not among them: the tests that boot other kernels, `cargo xtask kernels`");
    }
    end(&tally, status, filter)
}

/// How many tests run at a time, of those that take a processor some of the time: they wait for the lab.
fn threads() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    cpus + cpus / 2
}

/// Runs `tests`, a command of `cargo test` up to the arguments of the test programs, with those
/// tests that one of `filters` picks, two at a time: a guest takes one processor.
pub(crate) fn by_twos(tests: &mut Command, filters: &[String]) -> Result<ExitCode> {
    let mut tally = Tally::default();
    tests.args(["--", "--show-output", "--test-threads=2"]);
    tests.args(filters);
    let status = run::tee(tests, |line| tally.read(line))?;
    end(&tally, status, filters.first().map(String::as_str))
}

/// Sums up.
fn end(tally: &Tally, status: ExitStatus, filter: Option<&str>) -> Result<ExitCode> {
    for reason in &tally.reasons {
        println!("skipped: {reason}");
    }
    for name in &tally.failures {
        println!("failed: {name}");
    }
    println!("{tally}");
    if tally.passed + tally.failed + tally.ignored == 0 && status.success() {
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
        "--skip",
        kernels::TESTS,
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
    /// As libtest counts them: a test that skipped itself is among them.
    passed: usize,
    failed: usize,
    ignored: usize,
    /// Names of the tests that failed.
    failures: Vec<String>,
    /// Tests that skipped themselves, with their reason.
    reasons: Vec<String>,
    /// The output of passed tests is being read, and here is whose.
    passed_output: Option<String>,
}

impl Tally {
    /// Takes in one line of libtest's output and tells whether the reader should see it: all but
    /// the output of passed tests, which is read for `skipped: ` alone.
    fn read(&mut self, line: &str) -> bool {
        if line == "successes:" {
            self.passed_output = Some(String::new());
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.passed_output = None;
        }
        if let Some(test) = &mut self.passed_output {
            if let Some(name) = enclosed(line, "---- ", " stdout ----") {
                name.clone_into(test);
            } else if let Some(reason) = line.strip_prefix("skipped: ") {
                self.reasons.push(format!("{test}: {reason}"));
            }
            return false;
        }
        if let Some(name) = enclosed(line, "test ", " ... FAILED") {
            self.failures.push(name.to_owned());
        }
        if let Some((_, counts)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        {
            self.add(counts);
        }
        true
    }

    fn add(&mut self, counts: &str) {
        for count in counts.split("; ") {
            let Some((number, word)) = count.split_once(' ') else {
                continue;
            };
            let number: usize = number.parse().unwrap_or(0);
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// The line that sums up.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let skipped = self.reasons.len();
        write!(
            f,
            "tests: {} passed, {} failed, {} skipped",
            self.passed.saturating_sub(skipped),
            self.failed,
            self.ignored + skipped
        )
    }
}

fn enclosed<'a>(line: &'a str, before: &str, after: &str) -> Option<&'a str> {
    line.strip_prefix(before)?.strip_suffix(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_add_up() {
        let mut tally = Tally::default();
        let lines = [
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "",
            "successes:",
            "",
            "---- a::b stdout ----",
            "skipped: not root",
            "",
            "successes:",
            "    a::b",
            "",
            "failures:",
            "---- a::c stdout ----",
            "skipped: is only a word here",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: ok. 4 passed; 0 failed; 2 ignored; 0 measured; 7 filtered out; finished in 0.00s",
        ];
        let shown = lines.iter().filter(|line| tally.read(line)).count();
        assert_eq!(shown, lines.len() - 8);
        let expected = Tally {
            passed: 6,
            failed: 1,
            ignored: 2,
            failures: vec!["a::c".to_owned()],
            reasons: vec!["a::b: not root".to_owned()],
            passed_output: None,
        };
        assert_eq!(tally, expected);
        assert_eq!(tally.to_string(), "tests: 5 passed, 1 failed, 3 skipped");
    }
}
