//! The `wireguard` suite: what a router costs and carries, beside its peers, with the same client
//! and the same generator in every case.

pub(crate) mod bed;
mod blast;
mod churn;
pub(crate) mod junk;
mod latency;
pub(crate) mod programs;
mod resume;
pub(crate) mod router;
pub(crate) mod tcp;
mod udp;

use std::cell::RefCell;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use anyhow::anyhow;
use lab::Lab;

use crate::case::{
    Case, CaseId, Chart, ChartKind, Context, Effort, Failure, Implementation, Measurement, Outcome,
    Round, Skipped, Suite, SuiteEntry,
};
use crate::cpu::Cores;
use crate::generator::{self, Direction, Load, Peer, Rate};
use crate::scale::crowd::Crowd;

use bed::{Bed, Pinned, Placement};
use programs::{Candidate, Program, REFERENCE};
use router::Paths;
use tcp::{Streams, Way};
use udp::{Datagrams, PACED, SINGLE};

const SUITE: &str = "wireguard";

/// The suite, for the command line.
pub const ENTRY: SuiteEntry = SuiteEntry {
    name: SUITE,
    about: "a router between client and server, with crypto: throughput, packets, CPU, latency",
    build,
};

/// What one case does.
#[derive(Clone, Copy, Debug)]
enum What {
    Tcp(Streams),
    Udp(Datagrams),
    RoundTrips { loaded: bool },
    Connections,
}

impl What {
    fn name(self) -> String {
        match self {
            Self::Tcp(Streams { count, way }) => {
                let way = match way {
                    Way::Up => "up",
                    Way::Down => "down",
                    Way::Both => "both",
                };
                format!("tcp-{count}-{way}")
            }
            Self::Udp(datagrams) => udp::name(datagrams),
            Self::RoundTrips { loaded: false } => "round-trip-idle".to_owned(),
            Self::RoundTrips { loaded: true } => "round-trip-loaded".to_owned(),
            Self::Connections => "connections".to_owned(),
        }
    }
}

fn build(context: &Context) -> anyhow::Result<Suite> {
    let mut suite = Suite {
        reference: Some(REFERENCE.to_owned()),
        charts: charts(),
        ..Suite::default()
    };
    suite.cases.push(Box::new(Ceiling {
        id: CaseId::new(SUITE, "generator-ceiling", generator_itself()),
        cores: context.cores.clone(),
    }));
    let client = programs::client();
    let mut apart = Vec::new();
    let mut free = Vec::new();
    for Candidate {
        implementation,
        program,
    } in programs::candidates(context)
        .into_iter()
        .chain(programs::other_roles(context))
    {
        let why = match (program, &client) {
            (Ok(program), Ok(client)) if !context.cores.ends.contains(&context.cores.router) => {
                let bed = |placement| {
                    Rc::new(Lazy {
                        program: program.clone(),
                        client: client.clone(),
                        placement,
                        crowd: Crowd::NONE,
                        peers: bed::PEERS,
                        bed: RefCell::new(None),
                    })
                };
                apart.push((
                    implementation.clone(),
                    bed(Placement::Apart(context.cores.clone())),
                ));
                free.push((implementation, bed(Placement::Free)));
                continue;
            }
            (Ok(_), Ok(_)) => "the router needs a CPU to itself, and there is only one".to_owned(),
            (Err(why), _) => why,
            (_, Err(why)) => format!("the client: {why}"),
        };
        let id = CaseId::new(SUITE, "all", implementation);
        suite.skipped.push(Skipped { id, why });
    }
    let mut add = |what: What, beds: &[(Implementation, Rc<Lazy>)], suffix: &str| {
        for (implementation, bed) in beds {
            let name = format!("{}{suffix}", what.name());
            let id = CaseId::new(SUITE, name, implementation.clone());
            let bed = Rc::clone(bed);
            suite.cases.push(Box::new(BedCase { id, what, bed }));
        }
    };
    for what in cases(context.effort) {
        add(what, &apart, "");
    }
    for what in free_cases(context.effort) {
        add(what, &free, "-free");
    }
    Ok(suite)
}

fn tcp(count: u8, way: Way) -> What {
    What::Tcp(Streams { count, way })
}

fn udp(direction: Direction, payload: u16, flows: u32, peers: u16, rate: Rate) -> What {
    let load = Load {
        direction,
        payload,
        flows,
        rate,
    };
    What::Udp(Datagrams { load, peers })
}

/// Cases in which the router has a CPU to itself.
fn cases(effort: Effort) -> Vec<What> {
    use Direction::{Down, Up};
    let paced = Rate::Paced(PACED);
    let mut cases = vec![
        tcp(1, Way::Up),
        tcp(1, Way::Down),
        udp(Up, 64, 256, 1, paced),
        udp(Up, 64, 256, 1, Rate::Flood),
        What::RoundTrips { loaded: false },
    ];
    match effort {
        Effort::Quick => return cases,
        Effort::Smoke => {
            cases.extend([
                What::Connections,
                udp(Up, 512, 1024, 64, paced),
                udp(Down, 1200, 1024, 64, Rate::Flood),
            ]);
            return cases;
        }
        Effort::Full => {}
    }
    cases.extend([
        What::Connections,
        udp(Down, 64, 256, 1, paced),
        udp(Down, 64, 256, 1, Rate::Flood),
        tcp(4, Way::Up),
        tcp(4, Way::Down),
        tcp(1, Way::Both),
        tcp(4, Way::Both),
        What::RoundTrips { loaded: true },
    ]);
    for payload in [64, 512, 1200] {
        for (flows, peers) in [(1, 1), (256, 1), (1024, 1), (1024, 64)] {
            for rate in [paced, Rate::Flood] {
                if (payload, flows, peers) != (64, 256, 1) {
                    cases.push(udp(Up, payload, flows, peers, rate));
                }
                if flows == 1024 && peers == 64 {
                    cases.push(udp(Down, payload, flows, peers, rate));
                }
            }
        }
    }
    cases
}

/// Cases in which the scheduler places everything: on two CPUs, where a client on one of them limits
/// any router on the other, only these tell what the machine can carry.
fn free_cases(effort: Effort) -> Vec<What> {
    match effort {
        Effort::Smoke | Effort::Quick => vec![tcp(1, Way::Down)],
        Effort::Full => vec![tcp(1, Way::Up), tcp(1, Way::Down), tcp(4, Way::Both)],
    }
}

fn charts() -> Vec<Chart> {
    let bars = |name: &str, title: &str, metric, cases: &[(What, &str, &str)]| Chart {
        name: name.to_owned(),
        title: title.to_owned(),
        metric,
        kind: ChartKind::Bars(
            cases
                .iter()
                .map(|(what, suffix, label)| {
                    (format!("{}{suffix}", what.name()), (*label).to_owned())
                })
                .collect(),
        ),
    };
    let (up, down) = (tcp(1, Way::Up), tcp(1, Way::Down));
    let paced = |direction| udp(direction, 64, 256, 1, Rate::Paced(PACED));
    vec![
        bars(
            "wireguard-cpu",
            "Router CPU-seconds per gigabyte of TCP (less is better)",
            "router-cpu",
            &[(up, "", "up"), (down, "", "down")],
        ),
        bars(
            "wireguard-packet-cpu",
            "Router CPU per 64-byte UDP packet, µs (less is better)",
            "router-cpu",
            &[
                (paced(Direction::Up), "", "up"),
                (paced(Direction::Down), "", "down"),
            ],
        ),
        bars(
            "wireguard-throughput",
            "TCP through the whole machine, Gbit/s (more is better)",
            "throughput",
            &[(up, "-free", "up"), (down, "-free", "down")],
        ),
    ]
}

/// 64-byte packets of `flows` flows of `peers` peers up through Sluice with `crowd` in its
/// configuration; or why that cannot be measured here. Sources are translated unless there are more
/// flows than one address has ports. With a number of workers in the crowd the scheduler places
/// them, and the router is flooded; else it has a CPU to itself, and what comes is paced.
pub(crate) fn scaled(
    context: &Context,
    id: CaseId,
    crowd: Crowd,
    flows: u32,
    peers: u16,
) -> Result<Box<dyn Case>, String> {
    let alone = !context.cores.ends.contains(&context.cores.router);
    let (placement, rate) = match crowd.workers {
        Some(_) => (Placement::Free, Rate::Flood),
        None if alone => {
            let rate = if peers > bed::PEERS { SINGLE } else { PACED };
            (Placement::Apart(context.cores.clone()), Rate::Paced(rate))
        }
        None => return Err("the router needs a CPU to itself, and there is only one".to_owned()),
    };
    let client = programs::client().map_err(|why| format!("the client: {why}"))?;
    let bed = Lazy {
        program: Program::Sluice {
            mode: "ebpf",
            snat: flows < u16::MAX.into(),
            guard: false,
        },
        client,
        placement,
        crowd,
        peers,
        bed: RefCell::new(None),
    };
    Ok(Box::new(BedCase {
        id,
        what: udp(Direction::Up, 64, flows, peers, rate),
        bed: Rc::new(bed),
    }))
}

/// Peers that come, change and go by `wg set` beside those of `crowd`, while `peers` others carry
/// packets; or why that cannot be measured here.
pub(crate) fn churning(
    context: &Context,
    id: CaseId,
    crowd: Crowd,
    peers: u16,
) -> Result<Box<dyn Case>, String> {
    let bed = among_many(context, crowd, peers)?;
    Ok(Box::new(churn::Churn { id, peers, bed }))
}

/// A router that hands over to the next daemon while `peers` beside those of `crowd` have sessions; or
/// why that cannot be measured here.
pub(crate) fn resuming(
    context: &Context,
    id: CaseId,
    crowd: Crowd,
    peers: u16,
) -> Result<Box<dyn Case>, String> {
    let bed = among_many(context, crowd, peers)?;
    Ok(Box::new(resume::Resume { id, peers, bed }))
}

/// A router with a CPU of its own, `crowd` in its configuration, and `peers` that the generator plays.
fn among_many(context: &Context, crowd: Crowd, peers: u16) -> Result<Lazy, String> {
    if context.cores.ends.contains(&context.cores.router) {
        return Err("the router needs a CPU to itself, and there is only one".to_owned());
    }
    let client = programs::client().map_err(|why| format!("the client: {why}"))?;
    Ok(Lazy {
        program: Program::Sluice {
            mode: "ebpf",
            snat: true,
            guard: false,
        },
        client,
        placement: Placement::Apart(context.cores.clone()),
        crowd,
        peers,
        bed: RefCell::new(None),
    })
}

/// A bed that is built when it is first needed, and again after something broke.
struct Lazy {
    program: Program,
    client: Vec<OsString>,
    placement: Placement,
    crowd: Crowd,
    peers: u16,
    bed: RefCell<Option<Bed>>,
}

impl Lazy {
    fn build(&self) -> anyhow::Result<Bed> {
        Bed::new(
            &self.program,
            &self.client,
            self.placement.clone(),
            self.crowd,
            self.peers,
        )
    }

    /// Measures on the bed, which stays unless something broke.
    fn with<T>(&self, measure: impl FnOnce(&mut Bed) -> Result<T, Failure>) -> Result<T, Failure> {
        let mut slot = self.bed.borrow_mut();
        let mut bed = match slot.take() {
            Some(bed) => bed,
            None => self.build()?,
        };
        let outcome = measure(&mut bed);
        if !matches!(outcome, Err(Failure::Broken(_))) {
            *slot = Some(bed);
        }
        outcome
    }
}

struct BedCase {
    id: CaseId,
    what: What,
    bed: Rc<Lazy>,
}

impl Case for BedCase {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        let measured = self.bed.with(|bed| self.measure(bed, round))?;
        Ok(measured.into())
    }
}

impl BedCase {
    fn measure(&self, bed: &Bed, round: Round) -> Result<Vec<Measurement>, Failure> {
        let _pinned = bed.at_the_ends()?;
        let before = bed.router().paths()?;
        let apart = matches!(self.bed.placement, Placement::Apart(_));
        let mut measured = match self.what {
            What::Tcp(streams) => tcp::run(bed, streams, round, apart)?,
            What::Udp(datagrams) => udp::run(bed, datagrams, round, apart)?,
            What::RoundTrips { loaded } => latency::round_trips(bed, round, loaded)?,
            What::Connections => latency::connections(bed, round)?,
        };
        if let (Some(before), Some(after)) = (before, bed.router().paths()?) {
            measured.push(fast_path_share(before, after)?);
        }
        Ok(measured)
    }
}

/// How much of a case of ours the fast path carried. The counters must agree with the path that the
/// status claims.
fn fast_path_share(before: Paths, after: Paths) -> Result<Measurement, Failure> {
    let fast = after.fast - before.fast;
    let slow = after.slow - before.slow;
    let all = fast + slow;
    if after.claims_fast && fast < all - all / 20 || all == 0 {
        return Err(Failure::Wrong(format!(
            "the status claims the fast path, but it carried {fast} packets and the slow path {slow}"
        )));
    }
    let share = 100.0 * fast as f64 / all as f64;
    Ok(Measurement::higher("fast-path", "%", share))
}

fn generator_itself() -> Implementation {
    Implementation::peer("generator", env!("CARGO_PKG_VERSION"))
}

/// How fast the generator is into a socket that drops: what no router here can be measured above.
struct Ceiling {
    id: CaseId,
    cores: Cores,
}

impl Case for Ceiling {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        const SINK: SocketAddr = SocketAddr::new(
            std::net::IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)),
            router::PORT,
        );
        let lab = Lab::new()?;
        let (client, sink) = (lab.host("client")?, lab.host("sink")?);
        lab.link(
            client.port("eth0").address("192.0.2.1/24"),
            sink.port("eth0").address("192.0.2.2/24"),
        )?;
        bed::steer(&sink, &["eth0"], &[self.cores.router])?;
        let _pinned = Pinned::to(&self.cores.ends)?;
        let private = ::router::wireguard::keys::PrivateKey::generate()
            .map_err(|error| anyhow!("generate a key: {error}"))?;
        let peers = vec![Peer {
            private,
            address: Ipv4Addr::new(100, 64, 1, 1),
        }];
        let load = Load {
            direction: Direction::Up,
            payload: 64,
            flows: 256,
            rate: Rate::Flood,
        };
        let duration = Duration::from_millis(if round.effort == Effort::Full {
            1000
        } else {
            200
        });
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let summary = generator::ceiling(
            load,
            peers,
            sink.udp_socket(SINK)?,
            || client.udp_socket(any),
            duration,
        )?;
        let sent = summary.sent as f64;
        let per_second = sent / summary.elapsed.as_secs_f64();
        let nanos = summary.sender_cpu.as_nanos() as f64 / sent;
        Ok(vec![
            Measurement::fact("offered", "packets/s", per_second),
            Measurement::fact("generator-cpu", "ns/packet", nanos),
        ]
        .into())
    }
}
