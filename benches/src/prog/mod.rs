//! Nanoseconds per packet of each eBPF program, by BPF_PROG_TEST_RUN.
//!
//! The kernel can repeat a run by itself, but on the packet that the last run has left: with a TTL
//! that falls, a header more, another address. So every run gets a fresh packet; what it takes to
//! read the clock twice is measured beside it with an empty program, and subtracted. That also
//! leaves the caches as they are between real packets, colder than in a loop.

mod bed;
mod memory;
mod test_run;
mod traffic;

use std::cell::RefCell;
use std::rc::Rc;

use router::datapath::ebpf::Ebpf;
use router_ebpf::abi::{MAX_OVERLAY, MAX_ROUTES, Side};

use crate::case::{
    Case, CaseId, Chart, ChartKind, Context, Effort, Failure, Implementation, Measurement, Outcome,
    Round, Skipped, Suite, SuiteEntry,
};
use crate::cpu::Cores;
use bed::{Bed, Tables};
use memory::OneRead;
use traffic::{Kind, What};

const SUITE: &str = "prog";
/// What a program takes that reads one line of memory among as many as there are flows, and does
/// nothing else.
const ONE_READ: &str = "one-read";

/// The suite, as the command line knows it.
pub(crate) const ENTRY: SuiteEntry = SuiteEntry {
    name: SUITE,
    about: "nanoseconds per packet of each eBPF program",
    build: suite,
};

fn suite(context: &Context) -> anyhow::Result<Suite> {
    let mut suite = Suite {
        charts: charts(),
        ..Suite::default()
    };
    let unsupported = Ebpf::support().err().map(|error| error.to_string());
    let mut add = |id: CaseId, kind: Kind, bed: &Rc<Lazy>| {
        if let Some(why) = unsupported.clone() {
            suite.skipped.push(Skipped { id, why });
            return;
        }
        let bed = Rc::clone(bed);
        suite.cases.push(Box::new(Timed { id, kind, bed }));
    };
    let warm = Lazy::new(Tables::ONE, context);
    for kind in Kind::all() {
        let id = CaseId::new(SUITE, kind.name(), Implementation::sluice(""));
        add(id, kind, &warm);
    }
    let mut skipped = Vec::new();
    let mut reads: Vec<Box<dyn Case>> = Vec::new();
    for (axis, counts) in axes(context.effort) {
        for &count in counts {
            if let Axis::Flows = axis {
                let id = CaseId::new(SUITE, ONE_READ, Implementation::sluice(""));
                let id = id.at(axis.name(), count.into());
                match unsupported.clone() {
                    Some(why) => skipped.push(Skipped { id, why }),
                    None => reads.push(Box::new(OneRead::new(id, count, &context.cores))),
                }
            }
            let bed = Lazy::new(axis.tables(count), context);
            for &(case, kind) in axis.cases() {
                let (side, what, nat) = kind;
                let name = format!("{}-{case}", side.label());
                let id = CaseId::new(SUITE, name, Implementation::sluice(""));
                let id = id.at(axis.name(), count.into());
                if count as usize > axis.most() {
                    let most = axis.most();
                    let why = format!("not in this version: the table holds {most} of each family");
                    skipped.push(Skipped { id, why });
                } else {
                    add(id, Kind::v4(side, what, nat), &bed);
                }
            }
        }
    }
    suite.cases.extend(reads);
    suite.skipped.extend(skipped);
    Ok(suite)
}

/// What grows.
#[derive(Clone, Copy, Debug)]
enum Axis {
    Flows,
    Rules,
    /// Rules, peers and routes alike.
    Sites,
    Overlay,
    Routes,
}

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Self::Flows => "flows",
            Self::Rules => "rules",
            Self::Sites => "rules, peers and routes",
            Self::Overlay => "overlay CIDRs",
            Self::Routes => "routes",
        }
    }

    fn tables(self, count: u32) -> Tables {
        let mut tables = Tables::ONE;
        match self {
            Self::Flows => tables.flows = count,
            Self::Rules => tables.rules = count,
            Self::Sites => {
                tables.overlay = count;
                tables.routes = count;
                tables.rules = count;
            }
            Self::Overlay => tables.overlay = count,
            Self::Routes => tables.routes = count,
        }
        tables
    }

    /// What is measured against it: case, program, kind of packet, whether it is translated. Only
    /// the first packet of a flow looks at routes, overlay and rules, and the underlay's.
    fn cases(self) -> &'static [(&'static str, (Side, What, bool))] {
        match self {
            Self::Flows => &[
                ("flows", (Side::Overlay, What::Udp, true)),
                ("flows", (Side::Subnet, What::Udp, true)),
            ],
            Self::Rules => &[("new-flow-rules", (Side::Overlay, What::New, true))],
            Self::Sites => &[("new-flow-sites", (Side::Overlay, What::New, true))],
            Self::Overlay => &[
                ("new-flow-tables", (Side::Overlay, What::New, true)),
                ("unrelated-tables", (Side::Subnet, What::Foreign, false)),
            ],
            Self::Routes => &[("new-flow-tables", (Side::Overlay, What::New, true))],
        }
    }

    /// How many of each family there may be.
    fn most(self) -> usize {
        match self {
            Self::Overlay => MAX_OVERLAY / 2,
            // One of them is that whose sources are not translated.
            Self::Routes => MAX_ROUTES / 2 - 1,
            Self::Flows | Self::Rules | Self::Sites => usize::MAX,
        }
    }
}

fn axes(effort: Effort) -> [(Axis, &'static [u32]); 5] {
    let counts: [&[u32]; 5] = match effort {
        Effort::Smoke => [&[10]; 5],
        Effort::Quick => [
            &[1, 10_000],
            &[1, 100, 1_000],
            &[100, 1_000],
            &[100_000],
            &[1_000],
        ],
        Effort::Full => [
            &[1, 1_000, 64_000, 1_000_000],
            &[1, 10, 100, 1_000],
            &[1, 10, 100, 1_000],
            &[1, 100, 10_000, 100_000],
            &[1, 100, 1_000, 100_000],
        ],
    };
    let axes = [
        Axis::Flows,
        Axis::Rules,
        Axis::Sites,
        Axis::Overlay,
        Axis::Routes,
    ];
    std::array::from_fn(|at| (axes[at], counts[at]))
}

fn charts() -> Vec<Chart> {
    let pair = |case: &str, label: &str| (case.to_owned(), label.to_owned());
    let chart = |name: &str, title: &str, kind| Chart {
        name: format!("{SUITE}-{name}"),
        title: title.to_owned(),
        metric: "time",
        kind,
    };
    vec![
        chart(
            "time",
            "Time in the eBPF program, per packet (less is better)",
            ChartKind::Bars(vec![
                pair("from_overlay-nat-udp-v4", "From the tunnel, NAT, IPv4"),
                pair("from_overlay-nat-udp-v6", "From the tunnel, NAT, IPv6"),
                pair("from_subnet-nat-udp-v4", "From the subnet, NAT, IPv4"),
                pair("from_subnet-nat-udp-v6", "From the subnet, NAT, IPv6"),
                pair("from_overlay-udp-v4", "From the tunnel, no NAT, IPv4"),
                pair("from_subnet-udp-v4", "From the subnet, no NAT, IPv4"),
                pair("from_overlay-nat-new-flow-v4", "New flow, NAT, IPv4"),
                pair("from_subnet-unrelated-v4", "From the subnet, not ours"),
            ]),
        ),
        chart(
            "flows",
            "Time in the eBPF program with so many flows, NAT (less is better)",
            ChartKind::Lines(vec![
                pair("from_overlay-flows", "From the tunnel"),
                pair("from_subnet-flows", "From the subnet"),
                pair(ONE_READ, "One read of memory"),
            ]),
        ),
        chart(
            "rules",
            "Time in the eBPF program, first packet of a flow, NAT (less is better)",
            ChartKind::Lines(vec![
                pair("from_overlay-new-flow-rules", "rules"),
                pair("from_overlay-new-flow-sites", "rules, peers and routes"),
            ]),
        ),
    ]
}

/// Packets of a round.
fn count(round: Round) -> u32 {
    match (round.effort, round.warm_up) {
        (Effort::Smoke, _) => 100,
        (_, true) => 1_000,
        (Effort::Quick, _) => 10_000,
        (Effort::Full, _) => 50_000,
    }
}

/// A bed that is made when it is first needed.
struct Lazy {
    tables: Tables,
    cores: Cores,
    bed: RefCell<Option<Bed>>,
}

impl Lazy {
    fn new(tables: Tables, context: &Context) -> Rc<Self> {
        Rc::new(Self {
            tables,
            cores: context.cores.clone(),
            bed: RefCell::new(None),
        })
    }
}

/// One kind of packet with tables of one size.
struct Timed {
    id: CaseId,
    kind: Kind,
    bed: Rc<Lazy>,
}

impl Case for Timed {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        let count = count(round);
        let mut bed = self.bed.bed.borrow_mut();
        let bed = match bed.as_mut() {
            Some(bed) => bed,
            None => bed.insert(Bed::new(self.bed.tables, &self.bed.cores)?),
        };
        let time = bed.time(self.kind, count)?;
        Ok(vec![Measurement::lower("time", "ns/packet", time)].into())
    }
}
