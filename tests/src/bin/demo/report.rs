//! What the demo says: numbered steps, checks below them, a last line that counts.

use std::io::IsTerminal;
use std::process::ExitCode;

/// The counts, and how to print.
pub(crate) struct Report {
    colour: bool,
    steps: usize,
    passed: usize,
    failed: usize,
}

impl Report {
    pub(crate) fn new() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self {
            colour,
            steps: 0,
            passed: 0,
            failed: 0,
        }
    }

    /// Says what is done next.
    pub(crate) fn step(&mut self, text: &str) {
        self.steps += 1;
        println!("{:>2}. {text}", self.steps);
    }

    /// Says something that is no check.
    pub(crate) fn note(&self, text: &str) {
        println!("    {text}");
    }

    /// Counts a promise as kept or not. `outcome` holds what was seen.
    pub(crate) fn check(&mut self, promise: &str, outcome: anyhow::Result<String>) {
        match outcome {
            Ok(seen) if seen.is_empty() => self.pass(promise),
            Ok(seen) => self.pass(&format!("{promise}: {seen}")),
            Err(error) => {
                self.failed += 1;
                println!("    {} {promise}: {error:#}", self.paint("31", "FAILED"));
            }
        }
    }

    /// Prints the last line; the exit status tells the same.
    pub(crate) fn finish(&self) -> ExitCode {
        let line = format!(
            "demo: {} checks passed, {} failed",
            self.passed, self.failed
        );
        if self.failed == 0 {
            println!("{}", self.paint("32", &line));
            ExitCode::SUCCESS
        } else {
            println!("{}", self.paint("31", &line));
            ExitCode::FAILURE
        }
    }

    pub(crate) fn failed(&self) -> bool {
        self.failed > 0
    }

    fn pass(&mut self, text: &str) {
        self.passed += 1;
        println!("    {} {text}", self.paint("32", "ok"));
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}
