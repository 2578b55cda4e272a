//! What test programs print, read as it comes.

use std::fmt;

/// How many lines of what a failed test said are repeated at the end; all of it is further up.
const REPEATED: usize = 12;
/// Behind this line a panic tells where it was, not what.
const BACKTRACE: &str = "stack backtrace:";

/// What the test programs said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// As libtest counts them: a test that skipped itself is among them.
    pub(super) passed: usize,
    pub(super) failed: usize,
    pub(super) ignored: usize,
    /// Tests that passed.
    pub(super) named: Vec<String>,
    /// Tests that failed.
    pub(super) failures: Vec<Failure>,
    /// Tests that skipped themselves, with their reason.
    pub(super) reasons: Vec<String>,
    /// The output of passed tests is being read, and here is whose.
    passed_output: Option<String>,
    /// The output of this one of the failures is being read.
    failed_output: Option<usize>,
}

/// A test that failed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(super) name: String,
    /// The beginning of its output.
    pub(super) said: Vec<String>,
}

impl Tally {
    /// Takes in one line of libtest's output and tells whether the reader should see it: all but
    /// the output of passed tests, which is read for `skipped: ` alone.
    pub(super) fn read(&mut self, line: &str) -> bool {
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
        if let Some(name) = ended(line, "ok") {
            self.named.push(name.to_owned());
        } else if let Some(name) = ended(line, "FAILED") {
            self.failures.push(Failure {
                name: name.to_owned(),
                said: Vec::new(),
            });
        }
        if let Some(name) = enclosed(line, "---- ", " stdout ----") {
            self.failed_output = self.failures.iter().position(|one| one.name == name);
        } else if line == "failures:" {
            self.failed_output = None;
        } else if let Some(failure) = self.failed_output.and_then(|at| self.failures.get_mut(at))
            && failure.said.len() < REPEATED
            && failure.said.last().is_none_or(|last| last != BACKTRACE)
            && !line.is_empty()
        {
            failure.said.push(line.to_owned());
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

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed: {}", self.name)?;
        self.said
            .iter()
            .try_for_each(|line| write!(f, "\n    {line}"))
    }
}

/// The test of which libtest says here that it ended so; a time may follow.
fn ended<'a>(line: &'a str, how: &str) -> Option<&'a str> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ... ")?;
    rest.starts_with(how).then_some(name)
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
            "",
            "skipped: is only a word here",
            "stack backtrace:",
            "   0: where it was",
            "failures:",
            "    a::c",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: ok. 4 passed; 0 failed; 2 ignored; 0 measured; 7 filtered out; finished in 0.00s",
        ];
        let shown = lines.iter().filter(|line| tally.read(line)).count();
        assert_eq!(shown, lines.len() - 8);
        let expected = Tally {
            passed: 6,
            failed: 1,
            ignored: 2,
            named: vec!["a::b".to_owned()],
            failures: vec![Failure {
                name: "a::c".to_owned(),
                said: ["skipped: is only a word here", BACKTRACE]
                    .map(str::to_owned)
                    .into(),
            }],
            reasons: vec!["a::b: not root".to_owned()],
            ..Tally::default()
        };
        assert_eq!(tally, expected);
        assert_eq!(tally.to_string(), "tests: 5 passed, 1 failed, 3 skipped");
    }
}
