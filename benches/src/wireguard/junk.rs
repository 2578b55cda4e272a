//! The `guard` suite: what a flood of datagrams that are nobody's costs a router, and what it leaves
//! of an established tunnel, with and without the uplink's guard.

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::time::Duration;

use super::Lazy;
use super::bed::{self, Bed, Cost, Placement};
use super::programs::{self, Program};
use crate::case::{
    Case, CaseId, Chart, ChartKind, Context, Effort, Failure, Implementation, Measurement, Outcome,
    Round, Skipped, Suite, SuiteEntry,
};
use crate::cpu::Cores;
use crate::generator::{Direction, Load, Rate, Summary};
use crate::scale::crowd::Crowd;

const SUITE: &str = "guard";
/// Case, what it is about, forged datagrams per second.
const CASES: [(&str, &str, u32); 2] = [
    ("junk", "forged data", 1_000_000),
    ("noise", "every first byte", 100_000),
];

/// The suite, for the command line.
pub(crate) const ENTRY: SuiteEntry = SuiteEntry {
    name: SUITE,
    about: "a flood of forged data messages, and of junk, against an established tunnel, with and without the guard",
    build,
};

/// Packets per second through the tunnel: little enough for every router to carry beside a flood.
const TUNNEL: u32 = 5_000;
/// The first of the addresses that they claim to come from.
const SOURCES: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 1);

fn build(context: &Context) -> anyhow::Result<Suite> {
    let mut suite = Suite {
        reference: Some(Implementation::sluice("").name),
        charts: vec![Chart {
            name: format!("{SUITE}-cpu"),
            title: "Router CPU per forged datagram, ns (less is better)".to_owned(),
            metric: "router-cpu",
            kind: ChartKind::Bars(
                CASES
                    .iter()
                    .map(|(case, text, _)| ((*case).to_owned(), (*text).to_owned()))
                    .collect(),
            ),
        }],
        ..Suite::default()
    };
    let alone = !context.cores.ends.contains(&context.cores.router);
    let client = match programs::client() {
        Ok(client) if alone => Ok(client),
        Ok(_) => Err("the router needs a CPU to itself, and there is only one".to_owned()),
        Err(why) => Err(format!("the client: {why}")),
    };
    let variants = [("", false), ("guarded", true)];
    for ((case, _, flood), (variant, guard)) in CASES
        .into_iter()
        .flat_map(|case| variants.map(|variant| (case, variant)))
    {
        let id = CaseId::new(SUITE, case, Implementation::sluice(variant));
        match &client {
            Ok(client) => suite.cases.push(Box::new(Junk {
                id,
                guard,
                flood,
                junk: flood < 1_000_000,
                cores: context.cores.clone(),
                bed: Rc::new(Lazy {
                    program: Program::Sluice {
                        mode: "ebpf",
                        snat: false,
                        guard,
                    },
                    client: client.clone(),
                    placement: Placement::Apart(context.cores.clone()),
                    crowd: Crowd::NONE,
                    peers: bed::PEERS,
                    bed: RefCell::new(None),
                }),
            })),
            Err(why) => suite.skipped.push(Skipped {
                id,
                why: why.clone(),
            }),
        }
    }
    Ok(suite)
}

struct Junk {
    id: CaseId,
    guard: bool,
    /// Forged datagrams per second, and whether their first words are random too.
    flood: u32,
    junk: bool,
    cores: Cores,
    bed: Rc<Lazy>,
}

impl Case for Junk {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        let mut slot = self.bed.bed.borrow_mut();
        let bed = match slot.take() {
            Some(bed) => bed,
            None => self.prepare()?,
        };
        let outcome = self.measure(&bed, round);
        if !matches!(outcome, Err(Failure::Broken(_))) {
            *slot = Some(bed);
        }
        Ok(outcome?.into())
    }
}

impl Junk {
    fn prepare(&self) -> Result<Bed, Failure> {
        let bed = self.bed.build()?;
        bed.uplink_like_a_nic(&self.cores).map_err(|error| {
            Failure::Unmeasured(format!(
                "a thread that polls a NIC takes Linux 5.12: {error:#}"
            ))
        })?;
        Ok(bed)
    }

    fn measure(&self, bed: &Bed, round: Round) -> Result<Vec<Measurement>, Failure> {
        let _pinned = bed.at_the_ends()?;
        let calm = tunnel(bed, round, || Ok([0; 2]))?;
        let strangers = bed.router().strangers()?;
        let blast = bed.blast(SOURCES, self.flood, self.junk)?;
        let sent = || Ok([blast.sent()?, bed.not_taken()?]);
        let flooded = blast.during(|| tunnel(bed, round, sent))?;
        let (before, after) = (strangers, bed.router().strangers()?);
        let [by_guard, by_engine] = [0, 1].map(|at| after[at] - before[at]);
        let dropped = if self.guard { by_guard } else { by_engine };
        // Of a million receivers, a few are one that a peer has.
        if dropped == 0 || self.guard && by_engine > by_guard / 1000 {
            return Err(Failure::Wrong(format!(
                "of {} forged datagrams the guard dropped {by_guard} and the engine {by_engine}",
                flooded.grown[0]
            )));
        }
        let busy = |run: &Tunnel| run.cost.cpu.as_secs_f64() / run.cost.elapsed.as_secs_f64();
        let seconds = flooded.cost.elapsed.as_secs_f64();
        let spent = (busy(&flooded) - busy(&calm)).max(0.0) * seconds;
        let [offered, not_taken] = flooded.grown;
        let arrived = offered.saturating_sub(not_taken) as f64;
        let sent = flooded.summary.sent as f64;
        let lost = 100.0 * flooded.summary.lost() as f64 / sent.max(1.0);
        Ok(vec![
            Measurement::lower("router-cpu", "ns/datagram", 1e9 * spent / arrived),
            Measurement::lower("tunnel-lost", "%", lost),
            Measurement::fact("offered", "datagrams/s", offered as f64 / seconds),
            Measurement::fact("arrived", "datagrams/s", arrived / seconds),
            Measurement::fact("router-core-busy", "%", 100.0 * busy(&flooded)),
        ])
    }
}

/// What happened while packets went through the tunnel.
struct Tunnel {
    summary: Summary,
    cost: Cost,
    /// By how much counters have grown.
    grown: [u64; 2],
}

/// Packets through the tunnel for a while, what the router spent in all meanwhile, and by how much
/// `counters` have grown.
fn tunnel(
    bed: &Bed,
    round: Round,
    counters: impl Fn() -> anyhow::Result<[u64; 2]>,
) -> Result<Tunnel, Failure> {
    let duration = Duration::from_millis(match (round.effort, round.warm_up) {
        (Effort::Full, false) => 3000,
        (Effort::Quick, false) => 500,
        _ => 300,
    });
    let mut generator = bed.generator(1)?;
    let traffic = generator.start(Load {
        direction: Direction::Up,
        payload: 64,
        flows: 16,
        rate: Rate::Paced(TUNNEL),
    })?;
    let (grown, cost) = bed.cost_of(|| {
        let before = counters()?;
        std::thread::sleep(duration);
        let after = counters()?;
        Ok([0, 1].map(|at| after[at].saturating_sub(before[at])))
    })?;
    Ok(Tunnel {
        summary: traffic.finish()?,
        cost,
        grown,
    })
}
