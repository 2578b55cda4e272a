//! What grows with the number of peers, routes, rules, flows and workers.

pub mod crowd;
mod daemon;

use crate::case::{
    CaseId, Chart, ChartKind, Context, Effort, Implementation, Skipped, Suite, SuiteEntry,
};
use crate::{cpu, wireguard};
use crowd::Crowd;
use daemon::Daemon;

const SUITE: &str = "scale";
/// Flows of the packets where their number is not what grows.
const FLOWS: u32 = 256;
/// Peers that all talk, and their flows.
const LIVE: (u16, u32) = (1_000, 100_000);
/// Rules beside the peers that many come and go among.
const RULES: u32 = 2_000;

/// The suite, as the command line knows it.
pub(crate) const ENTRY: SuiteEntry = SuiteEntry {
    name: SUITE,
    about: "packets, start, reload and memory against peers, flows, routes, rules and workers",
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
    let (peers, rules, live) = match context.effort {
        Effort::Smoke => (10, 10, 10),
        Effort::Quick | Effort::Full => (10_000, RULES, LIVE.0),
    };
    let all = Crowd {
        peers,
        rules,
        ..Crowd::ONE
    };
    let id = CaseId::new(SUITE, "daemon-all", Implementation::sluice(""));
    suite.cases.push(Box::new(Daemon { id, crowd: all }));
    let id = CaseId::new(SUITE, "churn", Implementation::sluice(""));
    let crowd = Crowd { routes: 0, ..all };
    match wireguard::churning(context, id.clone(), crowd, live) {
        Ok(case) => suite.cases.push(case),
        Err(why) => suite.skipped.push(Skipped { id, why }),
    }
    let id = CaseId::new(SUITE, "resume", Implementation::sluice(""));
    match wireguard::resuming(context, id.clone(), crowd, live) {
        Ok(case) => suite.cases.push(case),
        Err(why) => suite.skipped.push(Skipped { id, why }),
    }
    let mut add = |axis: &str, count: u32, crowd: Crowd, flows: u32, peers: u16| {
        let id = CaseId::new(SUITE, format!("packets-{axis}"), Implementation::sluice(""));
        let id = id.at(axis, count.into());
        match wireguard::scaled(context, id.clone(), crowd, flows, peers) {
            Ok(case) => suite.cases.push(case),
            Err(why) => suite.skipped.push(Skipped { id, why }),
        }
    };
    for (axis, counts) in axes(context.effort) {
        for &count in counts {
            let mut crowd = Crowd::NONE;
            *axis.of(&mut crowd) = count;
            add(axis.name(), count, crowd, FLOWS, 1);
        }
    }
    for &flows in flows(context.effort) {
        add("flows", flows, Crowd::NONE, flows, 1);
    }
    if context.effort != Effort::Quick {
        for workers in 1..=cpu::affinity()?.len() as u32 {
            let crowd = Crowd {
                workers: Some(workers),
                ..Crowd::NONE
            };
            add("workers", workers, crowd, FLOWS, 64);
        }
        let (peers, flows) = LIVE;
        add("live-peers", peers.into(), Crowd::NONE, flows, peers);
    }
    Ok(suite)
}

/// Live flows of the generator: no more than a translation has ports toward one service (31,744).
fn flows(effort: Effort) -> &'static [u32] {
    match effort {
        Effort::Smoke => &[10],
        Effort::Quick => &[30_000],
        Effort::Full => &[1, 100, 1_000, 10_000, 30_000],
    }
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
            (Axis::Peers, &[10_000]),
            (Axis::Routes, &[]),
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
    let lines = |name: &str, title: &str, metric, cases: &[(&str, &str)]| Chart {
        name: format!("{SUITE}-{name}"),
        title: title.to_owned(),
        metric,
        kind: ChartKind::Lines(
            cases
                .iter()
                .map(|(case, label)| ((*case).to_owned(), (*label).to_owned()))
                .collect(),
        ),
    };
    let daemon: &[(&str, &str)] = &[("daemon-peers", "peers")];
    vec![
        lines(
            "start",
            "From start to ready, 10 allowed IPs per peer (less is better)",
            "start",
            daemon,
        ),
        lines(
            "memory",
            "Resident memory, 10 allowed IPs per peer (less is better)",
            "resident",
            daemon,
        ),
        lines(
            "packets",
            "Router CPU per 64-byte UDP packet, µs (less is better)",
            "router-cpu",
            &[
                ("packets-peers", "peers"),
                ("packets-flows", "flows"),
                ("packets-routes", "routes"),
                ("packets-rules", "rules"),
            ],
        ),
    ]
}
