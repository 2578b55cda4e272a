//! What a run of the bench found: `report.json` and its other forms.
//!
//! The JSON schema is documented in docs/bench-report.md; whoever changes a field here changes it
//! there, and [`SCHEMA`] if an older reader would misread it.

pub mod chart;
pub mod compare;
pub mod table;

use std::path::Path;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::case::{Better, CaseId, Effort, Verdict};
use crate::host::Host;
use crate::stats::Summary;

/// Version of the JSON schema.
pub const SCHEMA: u32 = 1;

/// Foreign load above this many CPUs makes a result doubtful, and is marked.
pub const FOREIGN_LIMIT: f64 = 0.05;

/// Everything one run of the bench found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Commit of the bench and of Sluice; `+` behind it: with uncommitted changes.
    pub commit: String,
    /// When it started, UTC, RFC 3339.
    pub started: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// How much time the runs were given.
    pub effort: Effort,
    /// Rounds that count, the warm-up not among them.
    pub rounds: usize,
    /// What it ran on.
    pub host: Host,
    /// The numbers.
    pub results: Vec<Measured>,
    /// How transfers ended, where that was the question.
    pub verdicts: Vec<Verdicts>,
    /// What was not measured.
    pub missing: Vec<Missing>,
}

/// One metric of one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Which case.
    #[serde(flatten)]
    pub id: CaseId,
    /// What was measured.
    pub metric: String,
    /// Its unit.
    pub unit: String,
    /// Which direction is good.
    pub better: Better,
    /// The value of each round, in order.
    pub runs: Vec<f64>,
    /// Median, smallest and largest of `runs`.
    #[serde(flatten)]
    pub summary: Summary,
    /// Beside the suite's reference, where there is one and it is another implementation.
    pub ratio: Option<Ratio>,
    /// The largest foreign load in any of the runs, in CPUs.
    pub foreign: f64,
}

/// A metric divided by the reference's, round by round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Name of the implementation that it is divided by.
    pub reference: String,
    /// Of the rounds' ratios.
    #[serde(flatten)]
    pub summary: Summary,
}

/// How the runs of a case ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdicts {
    /// Which case.
    #[serde(flatten)]
    pub id: CaseId,
    /// The verdict of each round, in order.
    pub runs: Vec<Verdict>,
    /// The worst of them.
    pub worst: Verdict,
}

/// A case without numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Which case.
    #[serde(flatten)]
    pub id: CaseId,
    /// What kind of reason.
    pub kind: MissingKind,
    /// The reason.
    pub why: String,
}

/// Why a case has no numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MissingKind {
    /// Known before it was tried.
    Skipped,
    /// Found when it was tried; the run stands.
    Unmeasured,
    /// Something of ours broke; the run fails.
    Broken,
    /// The result was wrong; the run fails.
    Wrong,
}

impl Report {
    /// Reads a `report.json`.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        let name = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("read {name}"))?;
        let version: Version = serde_json::from_str(&text)
            .with_context(|| format!("{name} is not a report of the bench"))?;
        if version.schema != SCHEMA {
            bail!(
                "{name} has schema {}, this bench reads {SCHEMA}: measure the older commit again",
                version.schema
            );
        }
        serde_json::from_str(&text).with_context(|| format!("{name} is damaged"))
    }

    /// Writes it as JSON.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(self).context("write the report as JSON")?;
        text.push('\n');
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// What makes the run a failure.
    pub fn failures(&self) -> impl Iterator<Item = &Missing> {
        self.missing
            .iter()
            .filter(|m| matches!(m.kind, MissingKind::Broken | MissingKind::Wrong))
    }

    /// Fills every ratio: each metric beside that of `reference` in the same case.
    pub(crate) fn divide_by(&mut self, suite: &str, reference: &str) {
        let references: Vec<Measured> = self
            .results
            .iter()
            .filter(|r| r.id.suite == suite && r.id.implementation.name == reference)
            .cloned()
            .collect();
        for result in &mut self.results {
            let id = &result.id;
            if id.suite != suite
                || id.implementation.name == reference
                || result.better == Better::Neither
            {
                continue;
            }
            let same = references
                .iter()
                .find(|r| r.id.case == id.case && r.id.at == id.at && r.metric == result.metric);
            result.ratio = same
                .and_then(|r| Summary::ratio(&result.runs, &r.runs))
                .map(|summary| Ratio {
                    reference: reference.to_owned(),
                    summary,
                });
        }
    }
}

/// A number for people: three significant digits, thousands separated.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 1000.0 {
        let digits = format!("{:.0}", size);
        let mut out = String::new();
        for (i, digit) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                out.push(',');
            }
            out.push(digit);
        }
        return if value < 0.0 { format!("-{out}") } else { out };
    }
    let decimals = match size {
        s if s == 0.0 || s >= 99.95 => 0,
        s if s >= 9.995 => 1,
        s if s >= 0.9995 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::case::{At, Implementation};
    use crate::cpu::Cores;
    use crate::host::Nic;

    fn implementation(name: &str, version: &str, ours: bool) -> Implementation {
        Implementation {
            name: name.to_owned(),
            version: version.to_owned(),
            ours,
        }
    }

    /// A report with something of everything.
    pub(crate) fn sample() -> Report {
        let ours = implementation("sluice", "0.1.0", true);
        let kernel = implementation("kernel", "6.18", false);
        let result = |suite: &str, case: &str, by: &Implementation, value: f64| Measured {
            id: CaseId::new(suite, case, by.clone()),
            metric: "rate".to_owned(),
            unit: "packets/s".to_owned(),
            better: Better::Higher,
            runs: vec![value, value * 0.95, value * 1.05],
            summary: Summary {
                median: value,
                min: value * 0.95,
                max: value * 1.05,
            },
            ratio: None,
            foreign: 0.0,
        };
        let mut results = vec![
            result("clear", "small-up", &ours, 2e6),
            result("clear", "small-up", &kernel, 1e6),
        ];
        results[0].foreign = 0.5;
        for value in [1, 1000, 1_000_000] {
            let mut point = result("scale", "flows", &ours, 1e6 / (1.0 + value as f64 / 1e6));
            point.id.at = Some(At {
                axis: "flows".to_owned(),
                value,
            });
            results.push(point);
        }
        let mut report = Report {
            schema: SCHEMA,
            commit: "0123456789ab".to_owned(),
            started: "2026-11-21T10:00:00Z".to_owned(),
            seconds: 12.5,
            effort: Effort::Quick,
            rounds: 3,
            host: Host {
                kernel: "6.18.0".to_owned(),
                arch: "x86_64".to_owned(),
                cpu: "Some <CPU> & more".to_owned(),
                cpus: 2,
                memory_mib: 4000,
                machine: String::new(),
                virtual_machine: true,
                cores: Cores {
                    router: 1,
                    ends: vec![0],
                },
                nics: vec![Nic {
                    name: "eth0".to_owned(),
                    driver: "virtio_net".to_owned(),
                    mtu: 1500,
                    offloads: [("tso".to_owned(), true)].into(),
                }],
            },
            results,
            verdicts: vec![Verdicts {
                id: CaseId::new("mtu", "mtu-1420", ours),
                runs: vec![Verdict::Pass, Verdict::Stall],
                worst: Verdict::Stall,
            }],
            missing: vec![Missing {
                id: CaseId::new("clear", "large-up", kernel),
                kind: MissingKind::Unmeasured,
                why: "no room".to_owned(),
            }],
        };
        report.divide_by("clear", "kernel");
        report
    }

    #[test]
    fn a_report_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        sample().write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap(), sample());
    }

    #[test]
    fn a_foreign_or_newer_file_is_refused_with_a_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            format!("{:#}", Report::read(&path).unwrap_err())
        };
        assert!(refused("{}").contains("is not a report of the bench"));
        assert!(refused("{\"schema\": 99}").contains("has schema 99, this bench reads"));
        assert!(refused("{\"schema\": 1}").contains("is damaged"));
    }

    /// The names that docs/bench-report.md promises.
    #[test]
    fn the_schema_is_as_documented() {
        let json = serde_json::to_value(sample()).unwrap();
        let doc = include_str!("../../../docs/bench-report.md");
        let mut names = Vec::new();
        fn collect(value: &serde_json::Value, names: &mut Vec<String>) {
            match value {
                serde_json::Value::Object(map) => {
                    for (name, value) in map {
                        names.push(name.clone());
                        if name != "offloads" {
                            collect(value, names);
                        }
                    }
                }
                serde_json::Value::Array(list) => list.iter().for_each(|v| collect(v, names)),
                _ => {}
            }
        }
        collect(&json, &mut names);
        for name in names {
            assert!(
                doc.contains(&format!("`{name}`")),
                "{name} is not documented"
            );
        }
        assert!(doc.contains(&format!("schema {SCHEMA}")));
    }

    #[test]
    fn numbers() {
        let cases = [
            (0.0, "0"),
            (0.1234, "0.123"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (99.97, "100"),
            (123.4, "123"),
            (1234.5, "1,234"),
            (1_234_567.0, "1,234,567"),
            (-1234.0, "-1,234"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }
}
