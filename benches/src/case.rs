//! What a suite hands to the runner: cases that can be measured again and again.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cpu::Cores;

/// How much time a run may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    /// Proves that every case works; its numbers mean nothing.
    Smoke,
    /// All suites in about three minutes.
    Quick,
    /// As long as good numbers take.
    Full,
}

/// What every suite is built from.
#[derive(Clone, Debug)]
pub struct Context {
    /// How much time there is.
    pub effort: Effort,
    /// The `sluice` binary under test.
    pub sluice: PathBuf,
    /// Which CPUs the router and the far ends are pinned to.
    pub cores: Cores,
}

/// Something that is measured: Sluice, a peer, or the kernel alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Implementation {
    /// Short name, e.g. `sluice`, `wireguard-go`, `kernel+nft`.
    pub name: String,
    /// Its own version as it states it; the kernel's release for the kernel.
    pub version: String,
    /// Whether it is this project's. A broken run of our own fails the whole run, one of a peer's
    /// is listed as not measured.
    pub ours: bool,
}

impl Implementation {
    /// Something of this project; `variant` is empty or tells two of ours apart, e.g. `fast path`.
    pub fn sluice(variant: &str) -> Self {
        let name = if variant.is_empty() {
            "sluice".to_owned()
        } else {
            format!("sluice {variant}")
        };
        Self {
            name,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ours: true,
        }
    }

    /// Something that is not this project's.
    pub fn peer(name: impl Into<String>, version: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            ours: false,
        }
    }
}

/// Where a case lies on an axis, e.g. 1,000 flows. Cases that differ in nothing else form a line
/// in a chart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct At {
    /// What grows, in the plural: `flows`, `peers`, `routes`.
    pub axis: String,
    /// How many there are.
    pub value: u64,
}

/// The name of a case: what is measured, of which implementation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CaseId {
    /// Suite, e.g. `wireguard`.
    pub suite: String,
    /// What is done, e.g. `tcp-1-up`. The same for every implementation that does it.
    pub case: String,
    /// Where on an axis, for a case that is one of a series.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<At>,
    /// What it is done by.
    pub implementation: Implementation,
}

impl CaseId {
    /// A case that is not one of a series.
    pub fn new(suite: &str, case: impl Into<String>, implementation: Implementation) -> Self {
        Self {
            suite: suite.to_owned(),
            case: case.into(),
            at: None,
            implementation,
        }
    }

    /// The same case at a point of an axis.
    #[must_use]
    pub fn at(mut self, axis: &str, value: u64) -> Self {
        self.at = Some(At {
            axis: axis.to_owned(),
            value,
        });
        self
    }

    /// Case and place on the axis, without the implementation: `established (1k flows)`.
    pub fn label(&self) -> String {
        match &self.at {
            None => self.case.clone(),
            Some(at) => format!("{} ({} {})", self.case, short(at.value), at.axis),
        }
    }
}

/// 1000 as `1k`, 1,000,000 as `1M`; other numbers as they are.
pub(crate) fn short(n: u64) -> String {
    match n {
        n if n >= 1_000_000 && n.is_multiple_of(1_000_000) => format!("{}M", n / 1_000_000),
        n if n >= 1_000 && n.is_multiple_of(1_000) => format!("{}k", n / 1_000),
        n => n.to_string(),
    }
}

/// Which direction of a metric is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Costs and latencies.
    Lower,
    /// Rates.
    Higher,
    /// Neither: a fact worth printing, e.g. the load that was offered. Never compared.
    Neither,
}

/// One number of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// What was measured, e.g. `throughput`, `router-cpu`.
    pub metric: &'static str,
    /// Its unit, e.g. `Gbit/s`, `CPU-s/GB`, `ns/packet`.
    pub unit: &'static str,
    /// The number.
    pub value: f64,
    /// Which direction is good.
    pub better: Better,
}

impl Measurement {
    /// A cost or latency.
    pub fn lower(metric: &'static str, unit: &'static str, value: f64) -> Self {
        Self {
            metric,
            unit,
            value,
            better: Better::Lower,
        }
    }

    /// A rate.
    pub fn higher(metric: &'static str, unit: &'static str, value: f64) -> Self {
        Self {
            better: Better::Higher,
            ..Self::lower(metric, unit, value)
        }
    }

    /// A fact that is neither good nor bad.
    pub fn fact(metric: &'static str, unit: &'static str, value: f64) -> Self {
        Self {
            better: Better::Neither,
            ..Self::lower(metric, unit, value)
        }
    }
}

/// How a transfer ended, for cases where that says more than its speed. Ordered from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Pass,
    /// Complete, but not as fast as the path allows.
    Slow,
    /// Never completed.
    Stall,
}

/// What one run of a case yields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Its numbers; every run of a case yields the same metrics.
    pub measurements: Vec<Measurement>,
    /// How it ended, where that is a question.
    pub verdict: Option<Verdict>,
}

impl From<Vec<Measurement>> for Outcome {
    fn from(measurements: Vec<Measurement>) -> Self {
        Self {
            measurements,
            verdict: None,
        }
    }
}

/// Why a run of a case yields nothing. `?` on an `anyhow::Result` makes a [`Failure::Broken`].
#[derive(Debug)]
pub enum Failure {
    /// It cannot be measured here and now, for a reason that is nobody's fault. Listed.
    Unmeasured(String),
    /// It was measured and the result is wrong: payload lost or corrupted, or a path not taken
    /// that the case claims to time. Fails the whole run.
    Wrong(String),
    /// Something did not work. Fails the whole run if the implementation is ours, else is listed.
    Broken(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Broken(error)
    }
}

/// Which run of a case this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Number of the round, from 0; the warm-up has its own count.
    pub index: usize,
    /// A warm-up: its numbers are thrown away, so it may be shorter. It must still check results.
    pub warm_up: bool,
    /// How much time the run may take.
    pub effort: Effort,
}

/// Something that can be measured again and again.
///
/// A case may build what it needs in its first run and keep it: all cases of a suite live until
/// the suite's last round is over. What it keeps must be idle between its runs, since other cases
/// are measured meanwhile. `Drop` takes everything away again.
pub trait Case {
    /// Its name.
    fn id(&self) -> &CaseId;

    /// Measures once.
    fn run(&mut self, round: Round) -> Result<Outcome, Failure>;
}

/// A case that a suite knows of and cannot run here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// What is not measured.
    pub id: CaseId,
    /// Why not, as a sentence that says what would bring it.
    pub why: String,
}

/// What a chart draws.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChartKind {
    /// One group of bars per case of this list, one bar per implementation. Each case comes with
    /// the label that the group carries.
    Bars(Vec<(String, String)>),
    /// One line per case and implementation over [`CaseId::at`]; the cases of this list, each with
    /// its label.
    Lines(Vec<(String, String)>),
}

/// A chart that a suite wants drawn of its results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chart {
    /// File name without extension, e.g. `wireguard-cpu`. The suite's name, a hyphen, and a name
    /// that is unique within it.
    pub name: String,
    /// Title, which says what is good: `Router CPU per gigabyte (less is better)`. The unit is
    /// appended.
    pub title: String,
    /// The metric that is drawn.
    pub metric: &'static str,
    /// Bars or lines.
    pub kind: ChartKind,
}

impl Chart {
    /// The suite whose results it draws.
    pub(crate) fn suite(&self) -> &str {
        self.name.split('-').next().unwrap_or_default()
    }
}

/// The cases of one suite.
#[derive(Default)]
pub struct Suite {
    /// Cases in the order in which each round takes them. Keep those that are compared with each
    /// other next to each other.
    pub cases: Vec<Box<dyn Case>>,
    /// What is not measured, and why.
    pub skipped: Vec<Skipped>,
    /// Name of the implementation that the others' results are divided by, case by case.
    pub reference: Option<String>,
    /// Charts of its results.
    pub charts: Vec<Chart>,
}

/// A suite as the command line knows it.
pub struct SuiteEntry {
    /// Name on the command line and in the report.
    pub name: &'static str,
    /// One line on what it measures.
    pub about: &'static str,
    /// Finds out what can be measured here. Cheap: what is costly belongs in a case's first run.
    pub build: fn(&Context) -> anyhow::Result<Suite>,
}
