//! What grows with the number of peers, routes and rules.

pub mod crowd;
mod daemon;

use crate::case::{CaseId, Chart, ChartKind, Context, Effort, Implementation, Suite, SuiteEntry};
use crowd::Crowd;
use daemon::Daemon;

const SUITE: &str = "scale";

/// The suite, as the command line knows it.
pub(crate) const ENTRY: SuiteEntry = SuiteEntry {
    name: SUITE,
    about: "start, reload and memory against peers, routes and rules",
    build: suite,
};

fn suite(context: &Context) -> anyhow::Result<Suite> {
    let mut suite = Suite {
        charts: charts(),
        ..Suite::default()
    };
    for (axis, counts) in axes(context.effort) {
        for &count in counts {
            let mut crowd = Crowd::ONE;
            *axis.of(&mut crowd) = count;
            let id = CaseId::new(
                SUITE,
                format!("daemon-{}", axis.name()),
                Implementation::sluice(""),
            );
            suite.cases.push(Box::new(Daemon {
                id: id.at(axis.name(), count.into()),
                crowd,
            }));
        }
    }
    Ok(suite)
}

/// What is made many of.
#[derive(Clone, Copy, Debug)]
enum Axis {
    Peers,
    Routes,
    Rules,
}

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Self::Peers => "peers",
            Self::Routes => "routes",
            Self::Rules => "rules",
        }
    }

    fn of(self, crowd: &mut Crowd) -> &mut u32 {
        match self {
            Self::Peers => &mut crowd.peers,
            Self::Routes => &mut crowd.routes,
            Self::Rules => &mut crowd.rules,
        }
    }
}

fn axes(effort: Effort) -> [(Axis, &'static [u32]); 3] {
    match effort {
        Effort::Smoke => [
            (Axis::Peers, &[10]),
            (Axis::Routes, &[10]),
            (Axis::Rules, &[10]),
        ],
        Effort::Quick => [
            (Axis::Peers, &[1, 10_000]),
            (Axis::Routes, &[10_000]),
            (Axis::Rules, &[1_000]),
        ],
        Effort::Full => [
            (Axis::Peers, &[1, 100, 1_000, 10_000]),
            (Axis::Routes, &[1, 1_000, 10_000, 100_000]),
            (Axis::Rules, &[1, 100, 1_000]),
        ],
    }
}

fn charts() -> Vec<Chart> {
    let lines = |name: &str, title: &str, metric| Chart {
        name: format!("{SUITE}-{name}"),
        title: title.to_owned(),
        metric,
        kind: ChartKind::Lines(vec![("daemon-peers".to_owned(), "peers".to_owned())]),
    };
    vec![
        lines(
            "start",
            "From start to ready, 10 allowed IPs per peer (less is better)",
            "start",
        ),
        lines(
            "memory",
            "Resident memory, 10 allowed IPs per peer (less is better)",
            "resident",
        ),
    ]
}
