//! A router whose programs are run on packets that nobody sends.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, ensure};
use ipnet::IpNet;
use lab::{Host, Lab};
use router::control::{Destination, Policy, Route, RouteMode, Rule};
use router::datapath::ebpf::{Ebpf, Options};
use router::datapath::limits::Limits;
use router::datapath::{Counter, Datapath as _, Link, Spec};
use router_ebpf::abi::{DEFAULT_FLOWS, Side};

use super::test_run;
use super::traffic::{Ends, Family, Kind, SERVICE, What};
use crate::bpf::Run;
use crate::case::Failure;
use crate::cpu::{self, Cores};

/// Hardware address of the router's NIC.
pub(super) const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x10];
/// Hardware address of the gateway to all routed networks.
pub(super) const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x20];
/// Tunnel MTU in bytes.
pub(super) const MTU: u16 = 1420;
/// `TC_ACT_REDIRECT` of linux/pkt_cls.h.
const REDIRECT: u32 = 7;
/// More than any packet of ours has after a program.
const LONGEST: usize = 256;
/// Most flows that are visited; that many lie in no cache.
const VISITED: u32 = 1 << 16;

/// How much is in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tables {
    /// Overlay CIDRs of each family.
    pub(super) overlay: u32,
    /// Routes of each family whose sources are translated; there is one more where they are not.
    pub(super) routes: u32,
    /// Rules of the policy; each has a peer, a network and ports of its own.
    pub(super) rules: u32,
    /// Flows of each established kind that is measured.
    pub(super) flows: u32,
}

impl Tables {
    pub(super) const ONE: Self = Self {
        overlay: 1,
        routes: 1,
        rules: 0,
        flows: 1,
    };

    /// Peer and network of the n-th flow, which visit the tables evenly and without a pattern.
    fn place(self, kind: Kind, n: u32) -> (u32, u32) {
        let routes = if kind.nat { self.routes } else { 1 };
        (spread(n, self.overlay), spread(n, routes))
    }

    fn ends(self, kind: Kind, n: u32) -> Ends {
        let (peer, network) = self.place(kind, n);
        kind.ends(n, peer, network)
    }
}

/// A number below `of`; a step without a common divisor comes to all of them.
fn spread(n: u32, of: u32) -> u32 {
    (u64::from(n) * 2_654_435_761 % u64::from(of)) as u32
}

/// The programs with their tables, in a namespace of their own.
pub(super) struct Bed {
    ebpf: Ebpf,
    empty: OwnedFd,
    router: Host,
    tun: u32,
    nic: u32,
    cores: Cores,
    tables: Tables,
    /// The frames of each established kind whose flows are in the table, and which is the next.
    opened: HashMap<Kind, (Vec<Vec<u8>>, usize)>,
    _lab: Lab,
}

impl Bed {
    pub(super) fn new(tables: Tables, cores: &Cores) -> anyhow::Result<Self> {
        let lab = Lab::new()?;
        let (router, gateway) = (lab.gateway("router")?, lab.host("gateway")?);
        // What it sends by itself would be counted with our packets.
        gateway.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        lab.link(
            router
                .port("eth0")
                .address("192.0.2.1/24")
                .address("2001:db8:ffff::1/64"),
            gateway.port("eth0"),
        )?;
        for words in [
            "link set eth0 address 02:00:00:00:00:10",
            "neighbour add 192.0.2.2 lladdr 02:00:00:00:00:20 dev eth0 nud permanent",
            "neighbour add 2001:db8:ffff::2 lladdr 02:00:00:00:00:20 dev eth0 nud permanent",
            "route add default via 192.0.2.2",
            "route add default via 2001:db8:ffff::2",
            "tuntap add dev tun0 mode tun",
            "link set tun0 mtu 1420 up",
            "route add 100.64.0.0/10 dev tun0",
            "route add fd64:db8::/32 dev tun0",
        ] {
            router.ip(words)?;
        }
        let (tun, nic) = (index(&router, "tun0")?, index(&router, "eth0")?);
        // Nobody but the bed ends a flow.
        let mut ebpf = Ebpf::load_with(Options {
            limits: Limits {
                flows: tables.flows.next_power_of_two().max(DEFAULT_FLOWS),
                flows_per_source: u32::MAX,
                ..Limits::default()
            },
            sweep: false,
            ..Options::default()
        })?;
        let spec = spec(tables, tun, nic)?;
        router.enter(|| ebpf.apply(&spec))??;
        Ok(Self {
            ebpf,
            empty: test_run::load_empty().context("load an empty program")?,
            router,
            tun,
            nic,
            cores: cores.clone(),
            tables,
            opened: HashMap::new(),
            _lab: lab,
        })
    }

    /// Runs `kind`'s program on `count` packets, each packet fresh, and returns the typical time of
    /// a run in nanoseconds, without that of reading the clock. Every packet must meet the verdict
    /// of its kind, by the counters.
    pub(super) fn time(&mut self, kind: Kind, count: u32) -> Result<f64, Failure> {
        let (frames, first) = match self.opened.remove(&kind) {
            Some(opened) => opened,
            None if kind.is_established() => (self.open(kind)?, 0),
            None => {
                let tables = self.tables;
                let frame = |n| kind.frame(tables.ends(kind, n));
                let frames = match kind.what {
                    What::New => {
                        let ends = tables.ends(kind, count);
                        self.carry(kind, ends, ends.overlay)?;
                        count
                    }
                    // As the underlay's: packets of few senders, over and over.
                    _ => tables.flows,
                };
                ((0..frames).map(frame).collect(), 0)
            }
        };
        let before = self.counters()?;
        let timed = || -> anyhow::Result<(Vec<u32>, Vec<u32>)> {
            let mut nothing = Vec::new();
            let mut times = Vec::new();
            for frame in frames.iter().cycle().skip(first).take(count as usize) {
                let empty = self.empty.as_fd();
                let empty = test_run::run(empty, frame, self.ingress(kind.side), &mut []);
                nothing.push(empty?.nanoseconds);
                times.push(self.run(kind.side, frame, &mut [])?.nanoseconds);
            }
            Ok((nothing, times))
        };
        let work = self.router.enter(|| {
            cpu::pin_thread(&[self.cores.router])?;
            timed()
        })??;
        self.check(kind, count.into(), &before)?;
        if kind.what == What::New {
            self.end_all_flows()?;
        } else if kind.is_established() {
            let next = (first + count as usize) % frames.len();
            self.opened.insert(kind, (frames, next));
        }
        let (nothing, times) = work;
        Ok(typical(times) - typical(nothing))
    }

    /// Opens the flows of `kind` from the overlay's side, and returns frames of as many as are to
    /// be visited. Each of these was carried once, and had become what it must.
    fn open(&mut self, kind: Kind) -> Result<Vec<Vec<u8>>, Failure> {
        let (opening, flows) = (kind.opening(), self.tables.flows);
        let frame = |n| opening.frame(self.tables.ends(kind, n));
        self.router.enter(|| -> Result<(), Failure> {
            for n in 0..flows {
                let Run { code, .. } = self.run(Side::Overlay, &frame(n), &mut [])?;
                if code != REDIRECT {
                    return Err(Failure::Wrong(format!(
                        "the first packet of flow {n} was not forwarded ({code})"
                    )));
                }
            }
            Ok(())
        })??;
        // As the sweeper does within seconds with flows that are in use.
        self.ebpf.settle_flows().map_err(anyhow::Error::from)?;
        (0..flows.min(VISITED))
            .map(|n| {
                let mut ends = self.tables.ends(kind, spread(n, flows));
                let peer = ends.overlay;
                let outside = self.carry(opening, ends, peer)?;
                if kind.side == Side::Subnet {
                    ends.overlay = outside;
                }
                if kind != opening {
                    self.carry(kind, ends, peer)?;
                }
                Ok(kind.frame(ends))
            })
            .collect()
    }

    /// Has one packet of `peer` carried and checks what became of it. Returns what the other side
    /// knows the peer's end as.
    fn carry(&self, kind: Kind, ends: Ends, peer: SocketAddr) -> Result<SocketAddr, Failure> {
        let frame = kind.frame(ends);
        let mut out = [0; LONGEST];
        let run = self
            .router
            .enter(|| self.run(kind.side, &frame, &mut out))??;
        let carried = kind.carried(out.get(..run.len).unwrap_or_default());
        let known_as = match (kind.side, carried) {
            (Side::Overlay, Some((from, to))) if to == ends.subnet => Some(from),
            (Side::Subnet, Some((from, to))) if from == ends.subnet => Some(to),
            _ => None,
        };
        let is_right = |known_as: &SocketAddr| match (kind.nat, kind.side) {
            (true, Side::Overlay) => known_as.ip() == kind.family.router(),
            _ => *known_as == peer,
        };
        known_as.filter(is_right).ok_or_else(|| {
            Failure::Wrong(format!(
                "a packet of {peer} as {ends:?} became {carried:?} (code {})",
                run.code
            ))
        })
    }

    /// In the router's namespace.
    fn run(&self, side: Side, frame: &[u8], out: &mut [u8]) -> anyhow::Result<Run> {
        let program = self.ebpf.program(side)?.fd()?;
        test_run::run(program.as_fd(), frame, self.ingress(side), out).context("run the program")
    }

    fn ingress(&self, side: Side) -> u32 {
        match side {
            Side::Overlay => self.tun,
            Side::Subnet => self.nic,
        }
    }

    /// Empties the flow table.
    fn end_all_flows(&mut self) -> anyhow::Result<()> {
        self.opened.clear();
        Ok(self.ebpf.end_flows()?)
    }

    fn counters(&self) -> anyhow::Result<Vec<Counter>> {
        Ok(self.ebpf.counters()?)
    }

    /// Whether since `before` just `count` packets have met the verdict of `kind`, and none another.
    fn check(&self, kind: Kind, count: u64, before: &[Counter]) -> Result<(), Failure> {
        for (before, after) in before.iter().zip(self.counters()?) {
            let ours = after.program == kind.side.label();
            let expected = match ours && after.verdict == kind.verdict().label() {
                true => count,
                false => 0,
            };
            let met = after.packets - before.packets;
            if met != expected {
                return Err(Failure::Wrong(format!(
                    "{met} of {count} packets met {} in {}, not {expected}",
                    after.verdict, after.program
                )));
            }
        }
        Ok(())
    }
}

fn spec(tables: Tables, tun: u32, nic: u32) -> anyhow::Result<Spec> {
    let link = |index, name: &str| Link {
        index,
        name: name.to_owned(),
    };
    let network = |family: Family, nat, n| -> anyhow::Result<IpNet> {
        Ok(IpNet::new(family.subnet(nat, n), family.routed())?.trunc())
    };
    let mut spec = Spec {
        tun: link(tun, "tun0"),
        mtu: MTU,
        subnet: vec![link(nic, "eth0")],
        external: [(nic, Family::ALL.map(Family::router).into())].into(),
        ..Spec::default()
    };
    for family in Family::ALL {
        for n in 0..tables.overlay {
            spec.overlay.push(family.overlay(n).into());
        }
        let translated = (0..tables.routes).map(|n| (true, n));
        for (snat, n) in translated.chain([(false, 0)]) {
            spec.routes.push(Route {
                cidr: network(family, snat, n)?,
                snat,
                mode: RouteMode::Fast,
            });
        }
    }
    let rule = |n: u32| -> anyhow::Result<Rule> {
        let mut rule = Rule {
            sources: Vec::new(),
            destinations: Vec::new(),
            protocols: Vec::new(),
        };
        for family in Family::ALL {
            rule.sources.push(IpAddr::into(family.overlay(n)));
            for (nat, ports) in [
                (true, SERVICE..=SERVICE + 1),
                (false, 1000 + n as u16..=1100 + n as u16),
            ] {
                rule.destinations.push(Destination {
                    cidr: network(family, nat, n)?,
                    ports,
                });
            }
        }
        Ok(rule)
    };
    spec.policy = Policy {
        rules: (0..tables.rules).map(rule).collect::<Result<_, _>>()?,
        ..Policy::default()
    };
    Ok(spec)
}

fn index(host: &Host, name: &str) -> anyhow::Result<u32> {
    let c_name = std::ffi::CString::new(name)?;
    // SAFETY: the pointer is that of a live C string.
    let index = host.enter(|| unsafe { libc::if_nametoindex(c_name.as_ptr()) })?;
    ensure!(index != 0, "no interface {name}");
    Ok(index)
}

/// The mean of the middle half: as robust as a median, and finer than the clock's own steps.
fn typical(mut times: Vec<u32>) -> f64 {
    times.sort_unstable();
    let quarter = times.len() / 4;
    let middle = &times[quarter..times.len() - quarter];
    let sum: f64 = middle.iter().copied().map(f64::from).sum();
    sum / middle.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_do_not_count() {
        assert_eq!(typical(vec![1, 10, 11, 900]), 10.5);
        assert_eq!(typical(vec![7]), 7.0);
    }
}
