//! The `relay` suite: what a router costs and carries where UDP is blocked and all goes through one derper over TLS,
//! beside tailscaled in its place. The client is real tailscaled in every case.

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use lab::site::{Arms, OVERLAY, SERVER, VPC};
use lab::sluice::{Config, Route, Sluice};
use lab::tailnet::{Hidden, KEY, Nat, Tailnet};
use lab::tailscaled::{self, Tailscaled};
use lab::{Lab, Process, wait_until};

use crate::case::{
    Case, CaseId, Context, Effort, Failure, Implementation, Measurement, Outcome, Round, Skipped,
    Suite, SuiteEntry,
};
use crate::cpu::{Cores, Snapshot, Usage};
use crate::wireguard::bed::{Pinned, steer};
use crate::wireguard::tcp::{Streams, Way, iperf_from};

const SUITE: &str = "relay";
/// What the others are divided by.
const REFERENCE: &str = "tailscaled";
const SOON: Duration = Duration::from_secs(30);

/// The suite, for the command line.
pub(crate) const ENTRY: SuiteEntry = SuiteEntry {
    name: SUITE,
    about: "a router and a client with UDP blocked, through a real derper: throughput and router CPU",
    build,
};

fn build(context: &Context) -> anyhow::Result<Suite> {
    let mut suite = Suite {
        reference: Some(REFERENCE.to_owned()),
        ..Suite::default()
    };
    let alone = !context.cores.ends.contains(&context.cores.router);
    let possible = match tailscaled::program("derper") {
        Ok(_) if alone => Ok(()),
        Ok(_) => Err("a router's cost needs a CPU of its own, and this machine has one".to_owned()),
        Err(why) => Err(why),
    };
    for kind in [Kind::Sluice, Kind::Tailscaled] {
        let bed = Rc::new(Lazy {
            kind,
            cores: context.cores.clone(),
            bed: RefCell::new(None),
        });
        for (way, name) in [(Way::Up, "tcp-1-up"), (Way::Down, "tcp-1-down")] {
            let id = CaseId::new(SUITE, name, kind.implementation());
            match &possible {
                Ok(()) => suite.cases.push(Box::new(Relayed {
                    id,
                    way,
                    bed: bed.clone(),
                })),
                Err(why) => suite.skipped.push(Skipped {
                    id,
                    why: why.clone(),
                }),
            }
        }
    }
    // What is compared stands together.
    suite.cases.sort_by(|a, b| a.id().case.cmp(&b.id().case));
    Ok(suite)
}

/// What the router is.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Sluice,
    Tailscaled,
}

impl Kind {
    fn implementation(self) -> Implementation {
        match self {
            Self::Sluice => Implementation::sluice(""),
            Self::Tailscaled => Implementation::peer(REFERENCE, tailscaled::VERSION),
        }
    }
}

struct Lazy {
    kind: Kind,
    cores: Cores,
    bed: RefCell<Option<Bed>>,
}

/// Fields are in the order in which they must go.
struct Bed {
    client: Tailscaled,
    _sluice: Option<Sluice>,
    _tailscaled: Option<Tailscaled>,
    _iperf: Process,
    hotel: Hidden,
    _net: Tailnet,
    _lab: Lab,
}

impl Bed {
    fn new(kind: Kind, cores: &Cores) -> anyhow::Result<Self> {
        let lab = Lab::new()?;
        let _pinned = Pinned::to(&cores.ends)?;
        let net = Tailnet::new(&lab, Arms::Two)?;
        let hotel = net.hidden(&lab, "hotel", 1, Nat::NoUdp)?;
        let site = &net.site;
        // Neither translates sources, so the VPC has to know the way back.
        site.core
            .as_ref()
            .context("a two-armed site")?
            .route(OVERLAY[0], "10.30.0.10")?;
        steer(&site.router, &["wan", "lan"], &[cores.router])?;
        let (mut sluice, mut other) = (None, None);
        {
            let _pinned = Pinned::to(&[cores.router])?;
            match kind {
                Kind::Sluice => {
                    let mut config = Config::joining(&net.control.url(), KEY)?;
                    if let Some(joining) = &mut config.tailnet {
                        joining.hostname = Some("router".to_owned());
                    }
                    config.log = "warn";
                    config.workers = Some(1);
                    config.routes = vec![Route {
                        cidr: VPC[0].to_owned(),
                        snat: false,
                        mode: "fast",
                    }];
                    sluice = Some(site.router.sluice_unsettled(&config)?);
                }
                Kind::Tailscaled => {
                    site.router.sysctl("net/ipv4/ip_forward", "1")?;
                    let routes = format!("--advertise-routes={}", VPC[0]);
                    other = Some(net.join(&site.router, &[&routes])?);
                }
            }
        }
        wait_until(SOON, "the router's route", || {
            let node = net.control.node("router");
            node.is_ok_and(|node| {
                let told = node.hostinfo["RoutableIPs"].is_array();
                if told {
                    net.control.approve(node.id, &VPC[..1]);
                }
                told
            })
        })?;
        let iperf = site
            .server
            .spawn("iperf3", site.server.command(["iperf3", "--server"]))?;
        let client = net.join(&hotel.host, &[])?;
        let bed = Self {
            client,
            _sluice: sluice,
            _tailscaled: other,
            _iperf: iperf,
            hotel,
            _net: net,
            _lab: lab,
        };
        wait_until(SOON, "the client to reach the server", || {
            bed.hotel
                .host
                .pings(&SERVER[0].to_string(), &[])
                .unwrap_or(false)
        })?;
        Ok(bed)
    }

    /// Through the relay and by no other way.
    fn is_relayed(&self) -> anyhow::Result<bool> {
        let peer = self.client.peer("router")?.context("the router is there")?;
        Ok(peer["CurAddr"] == "" && peer["Relay"] != "")
    }
}

struct Relayed {
    id: CaseId,
    way: Way,
    bed: Rc<Lazy>,
}

impl Relayed {
    fn measure(&self, bed: &Bed, round: Round) -> anyhow::Result<Vec<Measurement>> {
        let _pinned = Pinned::to(&self.bed.cores.ends)?;
        let IpAddr::V4(server) = SERVER[0] else {
            anyhow::bail!("the server's first address is of IPv4");
        };
        let seconds = match (round.effort, round.warm_up) {
            (Effort::Smoke, _) | (_, true) => 1,
            (Effort::Quick, _) => 3,
            (Effort::Full, _) => 5,
        };
        let streams = Streams {
            count: 1,
            way: self.way,
        };
        let before = Snapshot::take()?;
        let report = iperf_from(&bed.hotel.host, server, streams, seconds)?;
        let after = Snapshot::take()?;
        let usage = Usage::between(&before, &after);
        ensure!(bed.is_relayed()?, "it did not go through the relay");
        let cpu = usage.core_busy(self.bed.cores.router).as_secs_f64();
        Ok(vec![
            Measurement::higher("throughput", "Gbit/s", report.bits_per_second / 1e9),
            Measurement::lower("router-cpu", "CPU-s/GB", cpu / (report.bytes / 1e9)),
            Measurement::fact(
                "router-core-busy",
                "%",
                100.0 * cpu / usage.elapsed().as_secs_f64(),
            ),
        ])
    }
}

impl Case for Relayed {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        let mut slot = self.bed.bed.borrow_mut();
        let bed = match slot.take() {
            Some(bed) => bed,
            None => Bed::new(self.bed.kind, &self.bed.cores)?,
        };
        let measured = self.measure(&bed, round)?;
        *slot = Some(bed);
        Ok(measured.into())
    }
}
