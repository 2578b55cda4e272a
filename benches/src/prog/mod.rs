//! Nanoseconds per packet of each eBPF program, by BPF_PROG_TEST_RUN.
//!
//! The kernel can repeat a run by itself, but on the packet that the last run has left: with a TTL
//! that falls, a header more, another address. So every run gets a fresh packet; what it takes to
//! read the clock twice is measured beside it with an empty program, and subtracted. That also
//! leaves the caches as they are between real packets, colder than in a loop.

mod bed;
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
use traffic::{Family, Kind, What};

const SUITE: &str = "prog";

/// The suite, as the command line knows it.
pub(crate) const ENTRY: SuiteEntry = SuiteEntry {
    name: SUITE,
    about: "nanoseconds per packet of each eBPF program",
    build: suite,
};

/// What the programs of this version do not do yet.
const NOT_YET: [(&str, &str); 4] = [
    ("established-nat", "the programs do not translate sources"),
    ("new-flow", "the programs keep no flows"),
    ("flows", "the programs keep no flows"),
    ("rules", "the programs leave policy to the kernel"),
];

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
    let mut too_many = Vec::new();
    for (axis, counts, most) in axes(context.effort) {
        for &count in counts {
            let mut tables = Tables::ONE;
            match axis {
                "overlay CIDRs" => tables.overlay = count,
                _ => tables.routes = count,
            }
            let bed = Lazy::new(tables, context);
            for side in Side::ALL {
                let kind = Kind {
                    side,
                    family: Family::V4,
                    what: What::Udp,
                };
                let name = format!("{}-tables", side.label());
                let id = CaseId::new(SUITE, name, Implementation::sluice(""));
                let id = id.at(axis, count.into());
                // Both families are in the tables.
                if 2 * count as usize > most {
                    let why =
                        format!("not in this version: the table holds {most} of both families");
                    too_many.push(Skipped { id, why });
                } else {
                    add(id, kind, &bed);
                }
            }
        }
    }
    suite.skipped.extend(too_many);
    for (case, why) in NOT_YET {
        suite.skipped.push(Skipped {
            id: CaseId::new(SUITE, case, Implementation::sluice("")),
            why: format!("not in this version: {why}"),
        });
    }
    Ok(suite)
}

fn axes(effort: Effort) -> [(&'static str, &'static [u32], usize); 2] {
    let (overlay, routes): (&[u32], &[u32]) = match effort {
        Effort::Smoke => (&[10], &[10]),
        Effort::Quick => (&[1, 100_000], &[1, 1_000]),
        Effort::Full => (&[1, 100, 10_000, 100_000], &[1, 100, 1_000, 100_000]),
    };
    [
        ("overlay CIDRs", overlay, MAX_OVERLAY),
        ("routes", routes, MAX_ROUTES),
    ]
}

fn charts() -> Vec<Chart> {
    let pair = |case: &str, label: &str| (case.to_owned(), label.to_owned());
    vec![Chart {
        name: "prog-time".to_owned(),
        title: "Time in the eBPF program, per packet (less is better)".to_owned(),
        metric: "time",
        kind: ChartKind::Bars(vec![
            pair("from_overlay-udp-v4", "From the tunnel, IPv4"),
            pair("from_overlay-udp-v6", "From the tunnel, IPv6"),
            pair("from_subnet-udp-v4", "From the subnet, IPv4"),
            pair("from_subnet-udp-v6", "From the subnet, IPv6"),
            pair("from_subnet-unrelated-v4", "From the subnet, not ours"),
        ]),
    }]
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
        let count = match (round.effort, round.warm_up) {
            (Effort::Smoke, _) => 100,
            (_, true) => 1_000,
            (Effort::Quick, _) => 10_000,
            (Effort::Full, _) => 50_000,
        };
        let mut bed = self.bed.bed.borrow_mut();
        let bed = match bed.as_mut() {
            Some(bed) => bed,
            None => bed.insert(Bed::new(self.bed.tables, &self.bed.cores)?),
        };
        let time = bed.time(self.kind, count)?;
        Ok(vec![Measurement::lower("time", "ns/packet", time)].into())
    }
}
