//! What moved between two reports.

use std::fmt::Write as _;

use crate::case::CaseId;
use crate::report::table::word;
use crate::report::{FOREIGN_LIMIT, Measured, Report, number};
use crate::stats::{self, Change};

/// What moved between two reports, and what did not allow to tell.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// What moved beyond the noise.
    pub moved: Vec<Moved>,
    /// Metrics that stayed within the noise.
    pub same: usize,
    /// Metrics with a single run on either side: nothing can be said.
    pub unknown: usize,
    /// What the older report has and the newer lacks, of the suites that the newer ran.
    pub gone: Vec<String>,
    /// What only the newer report has.
    pub new: Vec<String>,
    /// Why the two may not be comparable.
    pub caveats: Vec<String>,
}

/// One thing that moved.
#[derive(Clone, Debug, PartialEq)]
pub struct Moved {
    /// Which case.
    pub id: CaseId,
    /// From what to what, in words.
    pub what: String,
    /// Whether it got worse.
    pub worse: bool,
}

fn same_case(a: &CaseId, b: &CaseId) -> bool {
    (&a.suite, &a.case, &a.at, &a.implementation.name)
        == (&b.suite, &b.case, &b.at, &b.implementation.name)
}

fn name(id: &CaseId) -> String {
    format!("{} {}, {}", id.suite, id.label(), id.implementation.name)
}

impl Comparison {
    /// From `old` to `new`.
    pub fn of(old: &Report, new: &Report) -> Self {
        let mut comparison = Self {
            caveats: caveats(old, new),
            ..Self::default()
        };
        for result in &new.results {
            let matches = |r: &&Measured| same_case(&r.id, &result.id) && r.metric == result.metric;
            match old.results.iter().find(matches) {
                Some(before) => comparison.result(before, result),
                None => comparison
                    .new
                    .push(format!("{} {}", name(&result.id), result.metric)),
            }
        }
        for verdict in &new.verdicts {
            let Some(before) = old.verdicts.iter().find(|v| same_case(&v.id, &verdict.id)) else {
                comparison
                    .new
                    .push(format!("{} verdict", name(&verdict.id)));
                continue;
            };
            if before.worst == verdict.worst {
                comparison.same += 1;
            } else {
                comparison.moved.push(Moved {
                    id: verdict.id.clone(),
                    what: format!("{} → {}", word(before.worst), word(verdict.worst)),
                    worse: verdict.worst > before.worst,
                });
            }
        }
        comparison.find_gone(old, new);
        let peers = comparison
            .moved
            .iter()
            .filter(|m| !m.id.implementation.ours);
        let peers = peers.count();
        if peers > 0 {
            comparison.caveats.push(format!(
                "{peers} of what moved is not ours: the machine or the peers changed too"
            ));
        }
        comparison
    }

    fn result(&mut self, before: &Measured, after: &Measured) {
        let (share, worse) = match stats::change(&before.runs, &after.runs, after.better) {
            Change::Same => {
                self.same += 1;
                return;
            }
            Change::Unknown => {
                self.unknown += 1;
                return;
            }
            Change::Better(share) => (share, false),
            Change::Worse(share) => (share, true),
        };
        let side = |m: &Measured| {
            let s = &m.summary;
            format!("{} ({}–{})", number(s.median), number(s.min), number(s.max))
        };
        let change = if share.is_finite() {
            format!("{:+.0} %", share * 100.0)
        } else {
            "from nothing".to_owned()
        };
        self.moved.push(Moved {
            id: after.id.clone(),
            what: format!(
                "{} {} → {} {}, {change}",
                after.metric,
                side(before),
                side(after),
                after.unit
            ),
            worse,
        });
    }

    /// A case that was measured and no longer is must be said, unless its suite was not asked for.
    fn find_gone(&mut self, old: &Report, new: &Report) {
        let ran = |suite: &str| {
            let results = new.results.iter().map(|r| &r.id);
            let missing = new.missing.iter().map(|m| &m.id);
            results.chain(missing).any(|id| id.suite == suite)
        };
        for before in old.results.iter().filter(|r| ran(&r.id.suite)) {
            let matches = |r: &Measured| same_case(&r.id, &before.id) && r.metric == before.metric;
            if !new.results.iter().any(matches) {
                let missing = new.missing.iter().find(|m| same_case(&m.id, &before.id));
                let why = missing.map(|m| format!(": {}", m.why)).unwrap_or_default();
                self.gone
                    .push(format!("{} {}{why}", name(&before.id), before.metric));
            }
        }
    }

    /// Whether anything of ours got worse beyond the noise. Peers do not count.
    pub fn worse(&self) -> bool {
        self.moved
            .iter()
            .any(|m| m.worse && m.id.implementation.ours)
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut section = |title: &str, lines: Vec<String>| {
            if !lines.is_empty() {
                let _ = writeln!(out, "{title}:");
                for line in lines {
                    let _ = writeln!(out, "  {line}");
                }
            }
        };
        let moved = |worse: bool| -> Vec<String> {
            let of_kind = self.moved.iter().filter(|m| m.worse == worse);
            of_kind
                .map(|m| format!("{}: {}", name(&m.id), m.what))
                .collect()
        };
        section("careful", self.caveats.clone());
        section("worse", moved(true));
        section("better", moved(false));
        section("no longer measured", self.gone.clone());
        section("measured for the first time", self.new.clone());
        let _ = write!(
            out,
            "{} moved, {} within the noise",
            self.moved.len(),
            self.same
        );
        if self.unknown > 0 {
            let _ = write!(
                out,
                ", {} with a single run, which tells nothing",
                self.unknown
            );
        }
        out.push('\n');
        out
    }
}

fn caveats(old: &Report, new: &Report) -> Vec<String> {
    let mut caveats = Vec::new();
    let mut differs = |what: &str, a: &dyn std::fmt::Display, b: &dyn std::fmt::Display| {
        let (a, b) = (a.to_string(), b.to_string());
        if a != b {
            caveats.push(format!("{what} differs: {a}, now {b}"));
        }
    };
    differs("the CPU", &old.host.cpu, &new.host.cpu);
    differs("the number of CPUs", &old.host.cpus, &new.host.cpus);
    differs("the kernel", &old.host.kernel, &new.host.kernel);
    let effort = |r: &Report| format!("{:?}", r.effort).to_lowercase();
    differs("the effort", &effort(old), &effort(new));
    for (which, report) in [("older", old), ("newer", new)] {
        let loaded = report.results.iter().filter(|r| r.foreign > FOREIGN_LIMIT);
        let loaded = loaded.count();
        if loaded > 0 {
            caveats.push(format!(
                "the {which} report has {loaded} of {} results measured under foreign load",
                report.results.len()
            ));
        }
    }
    caveats
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Verdict;
    use crate::report::tests::sample;
    use crate::stats::Summary;

    fn scale(result: &mut Measured, factor: f64) {
        for run in &mut result.runs {
            *run *= factor;
        }
        result.summary = Summary::of(&result.runs).unwrap();
    }

    #[test]
    fn nothing_moves_between_a_report_and_itself() {
        let comparison = Comparison::of(&sample(), &sample());
        assert!(comparison.moved.is_empty() && !comparison.worse());
        assert!(comparison.gone.is_empty() && comparison.new.is_empty());
        assert_eq!(
            comparison.same,
            sample().results.len() + sample().verdicts.len()
        );
    }

    #[test]
    fn a_slow_down_of_ours_is_worse() {
        let mut new = sample();
        scale(&mut new.results[0], 0.5);
        let comparison = Comparison::of(&sample(), &new);
        assert!(comparison.worse());
        let text = comparison.text();
        assert!(
            text.contains("worse:\n  clear small-up, sluice: rate"),
            "{text}"
        );
        assert!(text.contains("-50 %"), "{text}");
        // The other way round it is an improvement.
        let comparison = Comparison::of(&new, &sample());
        assert!(!comparison.worse() && comparison.moved.len() == 1);
    }

    #[test]
    fn a_peer_that_moves_is_a_caveat() {
        let mut new = sample();
        scale(&mut new.results[1], 0.5);
        let comparison = Comparison::of(&sample(), &new);
        assert!(!comparison.worse());
        assert!(comparison.caveats.iter().any(|c| c.contains("not ours")));
    }

    #[test]
    fn what_is_gone_is_said_but_not_of_suites_that_did_not_run() {
        let mut new = sample();
        new.results.remove(0);
        let comparison = Comparison::of(&sample(), &new);
        assert_eq!(comparison.gone, ["clear small-up, sluice rate"]);
        let back = Comparison::of(&new, &sample());
        assert_eq!(back.new, ["clear small-up, sluice rate"]);
        new.results.clear();
        new.missing.clear();
        assert!(Comparison::of(&sample(), &new).gone.is_empty());
    }

    #[test]
    fn a_worse_verdict_is_worse() {
        let mut old = sample();
        old.verdicts[0].worst = Verdict::Pass;
        assert!(Comparison::of(&old, &sample()).worse());
        assert!(!Comparison::of(&sample(), &old).worse());
    }

    #[test]
    fn single_runs_tell_nothing() {
        let mut new = sample();
        for result in &mut new.results {
            result.runs.truncate(1);
            scale(result, 0.1);
        }
        let comparison = Comparison::of(&sample(), &new);
        assert!(!comparison.worse());
        assert_eq!(comparison.unknown, new.results.len());
    }
}
