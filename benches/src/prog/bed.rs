//! A router whose programs are run on packets that nobody sends.

use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, ensure};
use ipnet::IpNet;
use lab::{Host, Lab};
use router::control::{Policy, Route, RouteMode};
use router::datapath::ebpf::Ebpf;
use router::datapath::{Counter, Datapath as _, Link, Spec};

use super::test_run;
use super::traffic::{Family, Kind};
use crate::case::Failure;
use crate::cpu::{self, Cores};

/// Hardware address of the router's NIC.
pub(super) const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x10];
/// Hardware address of the gateway to all routed networks.
pub(super) const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x20];
const MTU: u16 = 1420;

/// How much is in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tables {
    /// Overlay CIDRs of each family.
    pub(super) overlay: u32,
    /// Routes of each family.
    pub(super) routes: u32,
}

impl Tables {
    pub(super) const ONE: Self = Self {
        overlay: 1,
        routes: 1,
    };
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
    _lab: Lab,
}

impl Bed {
    pub(super) fn new(tables: Tables, cores: &Cores) -> anyhow::Result<Self> {
        let lab = Lab::new()?;
        let (router, gateway) = (lab.gateway("router")?, lab.host("gateway")?);
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
        let mut ebpf = Ebpf::load()?;
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
            _lab: lab,
        })
    }

    /// Runs `kind`'s program on `count` packets of different flows, each packet fresh, and returns
    /// the typical time of a run in nanoseconds, without that of reading the clock. Every packet
    /// must meet the verdict of its kind, by the counters.
    pub(super) fn time(&self, kind: Kind, count: u32) -> Result<f64, Failure> {
        let frames = self.frames(kind);
        let program = self.ebpf.program(kind.side).map_err(anyhow::Error::from)?;
        let program = program.fd().context("the program is not loaded")?.as_fd();
        let ingress = match kind.side {
            router_ebpf::abi::Side::Overlay => self.tun,
            router_ebpf::abi::Side::Subnet => self.nic,
        };
        let before = self.counters()?;
        let timed = || -> anyhow::Result<(Vec<u32>, Vec<u32>)> {
            let mut nothing = Vec::new();
            let mut times = Vec::new();
            for frame in frames.iter().cycle().take(count as usize) {
                let run = |program| test_run::run(program, frame, ingress);
                nothing.push(run(self.empty.as_fd())?.nanoseconds);
                times.push(run(program)?.nanoseconds);
            }
            Ok((nothing, times))
        };
        let work = self.router.enter(|| {
            cpu::pin_thread(&[self.cores.router])?;
            timed().context("run the program")
        })??;
        self.check(kind, count.into(), &before)?;
        let (nothing, times) = work;
        Ok(typical(times) - typical(nothing))
    }

    /// Packets of flows that are spread over the tables, in an order without pattern.
    fn frames(&self, kind: Kind) -> Vec<Vec<u8>> {
        /// As many flows as make every lookup go elsewhere, and their frames no burden themselves.
        const FLOWS: u32 = 1024;
        let Tables { overlay, routes } = self.tables;
        let flows = FLOWS.min(overlay.max(routes));
        // A step without a common divisor visits the table evenly.
        let spread = |n: u32, of: u32| (u64::from(n) * 2_654_435_761 % u64::from(of)) as u32;
        (0..flows)
            .map(|n| kind.frame(spread(n, overlay), spread(n, routes)))
            .collect()
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
    let mut spec = Spec {
        tun: link(tun, "tun0"),
        mtu: MTU,
        subnet: vec![link(nic, "eth0")],
        overlay: Vec::new(),
        routes: Vec::new(),
        policy: Policy::default(),
        external: Default::default(),
    };
    for family in [Family::V4, Family::V6] {
        for n in 0..tables.overlay {
            spec.overlay.push(family.overlay(n).into());
        }
        for n in 0..tables.routes {
            let cidr = IpNet::new(family.subnet(n), family.routed())?.trunc();
            spec.routes.push(Route {
                cidr,
                snat: false,
                mode: RouteMode::Fast,
            });
        }
    }
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
