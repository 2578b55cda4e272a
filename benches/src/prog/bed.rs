//! A router whose programs are run on packets that nobody sends.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::os::fd::AsFd as _;

use anyhow::{Context as _, ensure};
use ipnet::IpNet;
use lab::{Host, Lab};
use router::control::{Destination, Policy, Route, RouteMode, Rule};
use router::datapath::ebpf::{Ebpf, Options};
use router::datapath::limits::Limits;
use router::datapath::{Counter, Datapath as _, Link, Spec};
use router_ebpf::abi::{DEFAULT_FLOWS, Side};

use super::test_run::{self, Clock};
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
/// More than any packet of ours has after a program.
const LONGEST: usize = 256;

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

    /// The ends of the n-th flow as packets of `kind` name them.
    fn seen(self, kind: Kind, n: u32) -> Ends {
        kind.seen(self.ends(kind, n))
    }
}

/// A number below `of`; a step without a common divisor comes to all of them.
fn spread(n: u32, of: u32) -> u32 {
    (u64::from(n) * 2_654_435_761 % u64::from(of)) as u32
}

/// The programs with their tables, in a namespace of their own.
pub(super) struct Bed {
    ebpf: Ebpf,
    clock: Clock,
    router: Host,
    tun: u32,
    nic: u32,
    cores: Cores,
    tables: Tables,
    /// The established kinds whose flows are in the table, and which of them is the next to have a packet.
    opened: HashMap<Kind, u32>,
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
            clock: Clock::new().context("load an empty program")?,
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
        let tables = self.tables;
        let first = match self.opened.get(&kind) {
            Some(next) => *next,
            None => {
                self.prepare(kind, count)?;
                0
            }
        };
        // A packet is made when it is needed: many of them would drive the flows out of the caches.
        let frame = |n: u32| match kind.what {
            What::New => kind.frame(tables.ends(kind, n)),
            // All flows, without a pattern; of what has none the packets of few senders, over and over.
            _ => {
                let n = (u64::from(first) + u64::from(n)) % u64::from(tables.flows);
                kind.frame(tables.seen(kind, spread(n as u32, tables.flows)))
            }
        };
        let before = self.counters()?;
        let program = self.ebpf.program(kind.side).map_err(anyhow::Error::from)?;
        let program = program.fd().map_err(anyhow::Error::from)?.as_fd();
        let frames = (0..count).map(frame);
        let time = self.router.enter(|| -> anyhow::Result<f64> {
            cpu::pin_thread(&[self.cores.router])?;
            let time = self.clock.time(program, frames, self.ingress(kind.side));
            time.context("run the program")
        })??;
        self.check(kind, count.into(), &before)?;
        if kind.what == What::New {
            self.end_all_flows()?;
        } else if kind.is_established() {
            let next = (u64::from(first) + u64::from(count)) % u64::from(tables.flows);
            self.opened.insert(kind, next as u32);
        }
        Ok(time)
    }

    /// Has the tables hold what packets of `kind` need.
    fn prepare(&mut self, kind: Kind, count: u32) -> Result<(), Failure> {
        if kind.is_established() {
            return self.open(kind);
        }
        if kind.what == What::New {
            return self.carry_all(kind, count..=count);
        }
        Ok(())
    }

    /// Opens the flows of `kind` from the overlay's side. One packet of each is carried, and becomes what it
    /// must, before it counts.
    fn open(&mut self, kind: Kind) -> Result<(), Failure> {
        let (opening, all) = (kind.opening(), 0..=self.tables.flows - 1);
        self.carry_all(opening, all.clone())?;
        // As the sweeper does within seconds with flows that are in use.
        self.ebpf.settle_flows().map_err(anyhow::Error::from)?;
        if kind != opening {
            self.carry_all(kind, all)?;
        }
        Ok(())
    }

    fn carry_all(&self, kind: Kind, mut flows: RangeInclusive<u32>) -> Result<(), Failure> {
        self.router
            .enter(|| flows.try_for_each(|n| self.carry(kind, self.tables.ends(kind, n))))?
    }

    /// In the router's namespace: has one packet between `ends` carried and checks what became of it.
    fn carry(&self, kind: Kind, ends: Ends) -> Result<(), Failure> {
        let frame = kind.frame(kind.seen(ends));
        let mut out = [0; LONGEST];
        let run = self.run(kind.side, &frame, &mut out)?;
        let carried = kind.carried(out.get(..run.len).unwrap_or_default());
        let outside = kind.outside(ends);
        let wanted = match kind.side {
            Side::Overlay => (outside.overlay, outside.subnet),
            Side::Subnet => (ends.subnet, ends.overlay),
        };
        if carried != Some(wanted) {
            return Err(Failure::Wrong(format!(
                "a packet of {ends:?} became {carried:?}, not {wanted:?} (code {})",
                run.code
            )));
        }
        Ok(())
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
        external: [(nic, Family::ALL.map(Family::router).to_vec().into())].into(),
        ..Spec::default()
    };
    for family in Family::ALL {
        for n in 0..tables.overlay {
            spec.overlay.insert(family.overlay(n).into(), 0);
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
        let mut rule = Rule::default();
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
