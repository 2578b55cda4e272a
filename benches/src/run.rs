//! Measures the cases of a suite in interleaved rounds.

use std::time::{Duration, Instant, SystemTime};

use crate::case::{Case, CaseId, Chart, Context, Failure, Outcome, Round, Skipped, Suite};
use crate::cpu::{Snapshot, Usage};
use crate::host::{self, Host};
use crate::report::{Measured, Missing, MissingKind, Report, SCHEMA, Verdicts};
use crate::stats::Summary;

/// Told what goes on, for whoever waits.
pub trait Progress {
    /// A run of a case begins.
    fn begin(&mut self, step: &Step<'_>);
    /// It ended, after `took`.
    fn end(&mut self, step: &Step<'_>, took: Duration, outcome: &Result<Outcome, Failure>);
}

/// One run of one case.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Which case.
    pub id: &'a CaseId,
    /// Which round.
    pub round: Round,
    /// Number of rounds that count.
    pub rounds: usize,
    /// Number of this step within the suite, from 0, warm-ups included.
    pub index: usize,
    /// Number of steps of the suite.
    pub steps: usize,
}

/// An empty report of a run that starts now.
pub fn start(context: &Context, rounds: usize) -> Report {
    Report {
        schema: SCHEMA,
        commit: host::commit(),
        started: host::rfc3339(SystemTime::now()),
        seconds: 0.0,
        effort: context.effort,
        rounds,
        host: Host::describe(&context.cores),
        results: Vec::new(),
        verdicts: Vec::new(),
        missing: Vec::new(),
    }
}

/// A case and what its runs gave so far.
struct Running {
    case: Box<dyn Case>,
    outcomes: Vec<Outcome>,
    foreign: f64,
    lost: Option<(MissingKind, String)>,
}

/// Measures `suite` and adds what came out to `report`: one round that warms up and does not
/// count, then `report.rounds` rounds, each of every case once. A case that fails is not run
/// again. Returns the charts that the suite wants drawn.
pub fn measure(
    suite: Suite,
    warm_up: bool,
    report: &mut Report,
    progress: &mut dyn Progress,
) -> Vec<Chart> {
    for Skipped { id, why } in suite.skipped {
        let kind = MissingKind::Skipped;
        report.missing.push(Missing { id, kind, why });
    }
    let mut running: Vec<Running> = suite
        .cases
        .into_iter()
        .map(|case| Running {
            case,
            outcomes: Vec::new(),
            foreign: 0.0,
            lost: None,
        })
        .collect();

    let effort = report.effort;
    let warm_ups = warm_up.then_some(Round {
        index: 0,
        warm_up: true,
        effort,
    });
    let counted = (0..report.rounds).map(|index| Round {
        index,
        warm_up: false,
        effort,
    });
    let rounds: Vec<Round> = warm_ups.into_iter().chain(counted).collect();
    let steps = rounds.len() * running.len();
    let mut index = 0;
    for round in rounds {
        for one in &mut running {
            if one.lost.is_none() {
                one.run(round, report.rounds, (index, steps), progress);
            }
            index += 1;
        }
    }

    let name = running.first().map(|r| r.case.id().suite.clone());
    for one in running {
        one.finish(report);
    }
    if let (Some(name), Some(reference)) = (name, suite.reference) {
        report.divide_by(&name, &reference);
    }
    suite.charts
}

impl Running {
    fn run(
        &mut self,
        round: Round,
        rounds: usize,
        (index, steps): (usize, usize),
        progress: &mut dyn Progress,
    ) {
        let id = self.case.id().clone();
        let step = Step {
            id: &id,
            round,
            rounds,
            index,
            steps,
        };
        progress.begin(&step);
        let before = Snapshot::take();
        let start = Instant::now();
        let outcome = self.case.run(round);
        let took = start.elapsed();
        progress.end(&step, took, &outcome);
        let after = Snapshot::take();
        match outcome {
            Ok(_) if round.warm_up => {}
            Ok(outcome) => {
                self.outcomes.push(outcome);
                if let (Ok(before), Ok(after)) = (before, after) {
                    let foreign = Usage::between(&before, &after).foreign();
                    self.foreign = self.foreign.max(foreign);
                }
            }
            Err(failure) => self.lost = Some(judge(&id, failure)),
        }
    }

    /// Turns the runs into results, or into the reason why there are none.
    fn finish(self, report: &mut Report) {
        let id = self.case.id().clone();
        let results = match self.lost {
            Some(lost) => Err(lost),
            None => {
                collect(&id, &self.outcomes, self.foreign).map_err(|why| (MissingKind::Broken, why))
            }
        };
        match results {
            Ok(results) => report.results.extend(results),
            Err((kind, why)) => {
                report.missing.push(Missing { id, kind, why });
                return;
            }
        }
        let runs: Vec<_> = self.outcomes.iter().filter_map(|o| o.verdict).collect();
        if let Some(&worst) = runs.iter().max() {
            report.verdicts.push(Verdicts { id, runs, worst });
        }
    }
}

fn judge(id: &CaseId, failure: Failure) -> (MissingKind, String) {
    match failure {
        Failure::Unmeasured(why) => (MissingKind::Unmeasured, why),
        Failure::Wrong(why) => (MissingKind::Wrong, why),
        Failure::Broken(error) if id.implementation.ours => {
            (MissingKind::Broken, format!("{error:#}"))
        }
        Failure::Broken(error) => (MissingKind::Unmeasured, format!("{error:#}")),
    }
}

/// The metrics of a case over its rounds. An error names what a case must not do.
fn collect(id: &CaseId, outcomes: &[Outcome], foreign: f64) -> Result<Vec<Measured>, String> {
    let Some(first) = outcomes.first() else {
        return Err("no round was run".to_owned());
    };
    let mut results = Vec::new();
    for (i, measurement) in first.measurements.iter().enumerate() {
        let metric = measurement.metric;
        let runs: Option<Vec<f64>> = outcomes
            .iter()
            .map(|o| o.measurements.get(i).filter(|m| m.metric == metric))
            .map(|m| m.map(|m| m.value))
            .collect();
        let Some(runs) = runs else {
            return Err(format!("not every round measured {metric}"));
        };
        let Some(summary) = Summary::of(&runs) else {
            return Err(format!("{metric} is not a number in every round: {runs:?}"));
        };
        results.push(Measured {
            id: id.clone(),
            metric: metric.to_owned(),
            unit: measurement.unit.to_owned(),
            better: measurement.better,
            runs,
            summary,
            ratio: None,
            foreign,
        });
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use anyhow::anyhow;

    use super::*;
    use crate::case::{Effort, Implementation, Measurement, Verdict};
    use crate::cpu::Cores;

    type Log = Rc<RefCell<Vec<String>>>;
    type Script = fn(Round) -> Result<Outcome, Failure>;

    struct Scripted {
        id: CaseId,
        log: Log,
        script: Script,
    }

    impl Case for Scripted {
        fn id(&self) -> &CaseId {
            &self.id
        }
        fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
            let mark = if round.warm_up { "w" } else { "" };
            let name = &self.id.implementation.name;
            self.log
                .borrow_mut()
                .push(format!("{name}{mark}{}", round.index));
            (self.script)(round)
        }
    }

    struct Silent;
    impl Progress for Silent {
        fn begin(&mut self, _: &Step<'_>) {}
        fn end(&mut self, _: &Step<'_>, _: Duration, _: &Result<Outcome, Failure>) {}
    }

    fn seconds(value: f64) -> Result<Outcome, Failure> {
        Ok(vec![Measurement::lower("time", "s", value)].into())
    }

    fn run(cases: &[(&str, bool, Script)], reference: Option<&str>) -> (Report, Vec<String>) {
        let log = Log::default();
        let cases = cases.iter().map(|&(name, ours, script)| {
            let mut implementation = Implementation::peer(name, "1");
            implementation.ours = ours;
            Box::new(Scripted {
                id: CaseId::new("test", "nap", implementation),
                log: log.clone(),
                script,
            }) as Box<dyn Case>
        });
        let skipped = Skipped {
            id: CaseId::new("test", "nap", Implementation::peer("absent", "")),
            why: "not installed".to_owned(),
        };
        let suite = Suite {
            cases: cases.collect(),
            skipped: vec![skipped],
            reference: reference.map(str::to_owned),
            charts: Vec::new(),
        };
        let context = Context {
            effort: Effort::Quick,
            sluice: "/nonexistent".into(),
            cores: Cores::choose().unwrap(),
        };
        let mut report = start(&context, 3);
        measure(suite, true, &mut report, &mut Silent);
        let log = log.borrow().clone();
        (report, log)
    }

    #[test]
    fn rounds_interleave_and_the_warm_up_does_not_count() {
        let script: Script = |r| {
            seconds(if r.warm_up {
                99.0
            } else {
                1.0 + r.index as f64
            })
        };
        let double: Script = |r| seconds(2.0 + 2.0 * r.index as f64);
        let (report, log) = run(&[("a", true, script), ("b", false, double)], Some("a"));
        assert_eq!(log, ["aw0", "bw0", "a0", "b0", "a1", "b1", "a2", "b2"]);
        assert_eq!(report.results[0].runs, [1.0, 2.0, 3.0]);
        assert_eq!(report.results[0].ratio, None);
        let ratio = report.results[1].ratio.as_ref().unwrap();
        assert_eq!((ratio.reference.as_str(), ratio.summary.max), ("a", 2.0));
        assert_eq!(report.missing[0].kind, MissingKind::Skipped);
        assert_eq!(report.failures().count(), 0);
    }

    #[test]
    fn failures_are_listed_and_judged() {
        let fine: Script = |_| seconds(1.0);
        let broken: Script = |r| match r.index {
            1 => Err(anyhow!("died").into()),
            _ => seconds(1.0),
        };
        let wrong: Script = |_| Err(Failure::Wrong("payload differs".to_owned()));
        let uneven: Script = |r| match r.index {
            2 => Ok(Outcome::default()),
            _ => seconds(1.0),
        };
        let (report, log) = run(
            &[
                ("fine", true, fine),
                ("ours", true, broken),
                ("theirs", false, broken),
                ("wrong", false, wrong),
                ("uneven", true, uneven),
            ],
            None,
        );
        let kinds: Vec<_> = report.missing.iter().map(|m| m.kind).collect();
        use MissingKind::{Broken, Skipped, Unmeasured, Wrong};
        assert_eq!(kinds, [Skipped, Broken, Unmeasured, Wrong, Broken]);
        assert_eq!(report.failures().count(), 3);
        assert_eq!(report.results.len(), 1);
        // A failed case is not run again.
        assert_eq!(log.iter().filter(|l| l.starts_with("wrong")).count(), 1);
        assert_eq!(log.iter().filter(|l| l.starts_with("ours")).count(), 3);
    }

    #[test]
    fn the_worst_verdict_counts() {
        let script: Script = |r| {
            let mut outcome = seconds(1.0)?;
            outcome.verdict = Some(if r.index == 1 {
                Verdict::Stall
            } else {
                Verdict::Pass
            });
            Ok(outcome)
        };
        let (report, _) = run(&[("a", true, script)], None);
        assert_eq!(report.verdicts[0].worst, Verdict::Stall);
        assert_eq!(report.verdicts[0].runs.len(), 3);
    }
}
