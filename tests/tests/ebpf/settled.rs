//! Flows that settle: who finds them, what becomes of them, and that nothing else does.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use lab::wait_until;
use router::datapath::Datapath as _;
use router::datapath::ebpf::{Ebpf, FlowFilter, Options, Pins};
use router::datapath::limits::{Limits, Timeouts};
use router_ebpf::abi::{Flow, Side};
use router_ebpf::craft::*;
use router_ebpf::verdict::Verdict;

use super::fixture::*;

/// Runs `body` with a fixture inside the router whose table has room for so many flows, and that
/// nobody sweeps.
fn inside(flows: u32, body: impl FnOnce(&mut Fixture) -> anyhow::Result<()> + Send) {
    lab::test(|lab| {
        router(lab)?.enter(|| {
            let options = Options {
                sweep: false,
                limits: Limits {
                    flows,
                    ..Limits::default()
                },
                ..Options::default()
            };
            body(&mut Fixture::with("eth0", options)?)
        })?
    });
}

/// The packet as its side sees it.
fn input(fixture: &Fixture, side: Side, packet: &Ip) -> Vec<u8> {
    match side {
        Side::Overlay => packet.bytes(),
        Side::Subnet => frame(fixture.mac, fixture.gateway_mac, &packet.bytes()),
    }
}

/// A packet of a TCP connection to port 443, of whatever flags.
fn segment(family: Family, net: Net, side: Side, port: u16, flags: u8) -> Ip {
    let (peer, server) = (family.overlay(PEER), family.subnet(net, 1));
    match side {
        Side::Overlay => Ip::tcp(peer, server, flags, &[], 8).ports(port, 443),
        Side::Subnet => {
            let outside = match net {
                Net::SNAT => family.subnet(Net::NEAR, ROUTER),
                _ => peer,
            };
            Ip::tcp(server, outside, flags, &[], 8).ports(443, port)
        }
    }
}

/// Has a segment carried, and yields what left.
fn carry(
    fixture: &mut Fixture,
    family: Family,
    net: Net,
    (side, port, flags): (Side, u16, u8),
) -> anyhow::Result<Vec<u8>> {
    let packet = input(fixture, side, &segment(family, net, side, port, flags));
    let outcome = fixture.run(side, &packet, 0)?;
    ensure!(
        outcome.verdict == Verdict::Forwarded,
        "{family:?} {net:?} {side:?} port {port}: {:?}",
        outcome.verdict
    );
    Ok(outcome.bytes)
}

/// The only flow that fits: whether it is established.
fn established(ebpf: &Ebpf, port: u16) -> anyhow::Result<bool> {
    let filter = FlowFilter {
        port: Some(port),
        ..FlowFilter::default()
    };
    let (found, _) = ebpf.flows().list(&filter, 10)?;
    let [flow] = found[..] else {
        anyhow::bail!("{found:?}");
    };
    flow.established.context("no TCP")
}

#[test]
fn a_settled_flow_goes_on_as_it_was() {
    inside(100, |fixture| {
        for family in FAMILIES {
            for net in [Net::SNAT, Net::NARROW] {
                let data = |side| (side, 4000 + u16::from(net.0), ACK);
                let port = 4000 + u16::from(net.0);
                carry(fixture, family, net, (Side::Overlay, port, SYN))?;
                carry(fixture, family, net, (Side::Subnet, port, SYN | ACK))?;
                let before = Side::ALL.map(|side| carry(fixture, family, net, data(side)));
                fixture.ebpf.settle_flows()?;
                let after = Side::ALL.map(|side| carry(fixture, family, net, data(side)));
                for (before, after) in before.into_iter().zip(after) {
                    ensure!(before? == after?, "{family:?} {net:?}");
                }
                // What changes is told wherever the entry is.
                ensure!(established(&fixture.ebpf, port)?);
                carry(fixture, family, net, (Side::Overlay, port, FIN | ACK))?;
                ensure!(established(&fixture.ebpf, port)?);
                carry(fixture, family, net, (Side::Subnet, port, FIN | ACK))?;
                ensure!(!established(&fixture.ebpf, port)?);

                // Where the router would send it changes; and back.
                fixture.ebpf.bump_generation()?;
                carry(fixture, family, net, data(Side::Overlay))?;
                carry(fixture, family, net, data(Side::Subnet))?;
                fixture.ebpf.end_flows()?;
                ensure!(fixture.ebpf.flows().entries()?.is_empty());
                let late = input(
                    fixture,
                    Side::Subnet,
                    &segment(family, Net::SNAT, Side::Subnet, port, ACK),
                );
                let outcome = fixture.run(Side::Subnet, &late, 0)?;
                ensure!(outcome.verdict == Verdict::PassUnrelated, "{outcome:?}");
            }
        }
        Ok(())
    });
}

#[test]
fn a_settled_flow_keeps_its_external_port() {
    inside(100, |fixture| {
        for family in FAMILIES {
            let syn = |peer: u8| {
                let (from, to) = (family.overlay(peer), family.subnet(Net::SNAT, 1));
                Ip::tcp(from, to, SYN, &[], 0).ports(0x1000, 443)
            };
            let external = |bytes: &[u8]| {
                let at = if family == Family::V4 { 34 } else { 54 };
                u16::from_be_bytes([bytes[at], bytes[at + 1]])
            };
            let first = fixture.run(Side::Overlay, &syn(PEER).bytes(), 0)?;
            ensure!(external(&first.bytes) == 0x1000, "{first:?}");
            fixture.ebpf.settle_flows()?;
            let second = fixture.run(Side::Overlay, &syn(PEER + 1).bytes(), 0)?;
            ensure!(second.verdict == Verdict::Forwarded);
            ensure!(external(&second.bytes) != 0x1000, "one port for two flows");
            fixture.ebpf.end_flows()?;
        }
        Ok(())
    });
}

/// More entries than a few blocks hold, in and out again and again: whether it has a slot or not, each
/// flow is found, and one that has ended is not.
#[test]
fn every_flow_is_found_with_a_slot_or_without() {
    const FLOWS: u16 = 700;
    inside(FLOWS.into(), |fixture| {
        let ports = |round: u16| (0..FLOWS).map(move |n| 2000 + 8 * n + round % 8);
        for round in 0..2 {
            for family in FAMILIES {
                for port in ports(round) {
                    carry(fixture, family, Net::NARROW, (Side::Overlay, port, SYN))?;
                    if port % 3 == 0 {
                        // Some settle late, when most slots are taken.
                        continue;
                    }
                    if port % 128 == 1 {
                        fixture.ebpf.settle_flows()?;
                    }
                }
                fixture.ebpf.settle_flows()?;
                for port in ports(round) {
                    carry(
                        fixture,
                        family,
                        Net::NARROW,
                        (Side::Subnet, port, SYN | ACK),
                    )?;
                    carry(fixture, family, Net::NARROW, (Side::Overlay, port, ACK))?;
                }
            }
            let entries = fixture.ebpf.flows().entries()?;
            ensure!(entries.len() == 4 * usize::from(FLOWS), "{}", entries.len());
            // A SYN begins anew, so the answers are only that.
            for (side, tuple, flow) in entries {
                let wanted = match side {
                    Side::Overlay => Flow::SYN | Flow::ACK,
                    Side::Subnet => Flow::SYN,
                };
                ensure!(flow.tcp == wanted, "{side:?} {tuple:?}: {flow:?}");
            }
            fixture.ebpf.end_flows()?;
            for family in FAMILIES {
                for port in ports(round).step_by(50) {
                    let side = Side::Overlay;
                    let packet = segment(family, Net::SNAT, side, port, ACK);
                    let outcome = fixture.run(side, &packet.bytes(), 0)?;
                    ensure!(outcome.verdict == Verdict::SlowNoFlow, "{outcome:?}");
                }
            }
        }
        Ok(())
    });
}

#[test]
fn the_next_daemon_finds_settled_flows_as_they_are() {
    lab::test(|lab| {
        let host = router(lab)?;
        let bpffs = host.bpffs()?;
        host.enter(|| {
            let options = || -> anyhow::Result<Options> {
                Ok(Options {
                    sweep: false,
                    pins: Ok(Pins::open_in(bpffs, "tun0")?),
                    ..Options::default()
                })
            };
            let mut first = Fixture::with("eth0", options()?)?;
            for family in FAMILIES {
                let port = 4000;
                carry(&mut first, family, Net::SNAT, (Side::Overlay, port, SYN))?;
                carry(
                    &mut first,
                    family,
                    Net::SNAT,
                    (Side::Subnet, port, SYN | ACK),
                )?;
                carry(&mut first, family, Net::SNAT, (Side::Overlay, port, ACK))?;
                first.ebpf.settle_flows()?;
                for side in Side::ALL {
                    carry(&mut first, family, Net::SNAT, (side, port, FIN | ACK))?;
                }
            }
            let entries = |fixture: &Fixture| -> anyhow::Result<BTreeMap<_, _>> {
                let all = fixture.ebpf.flows().entries()?.into_iter();
                Ok(all
                    .map(|(side, tuple, flow)| ((side as u8, tuple), flow))
                    .collect())
            };
            let before = entries(&first)?;
            ensure!(before.len() == 4 && before.values().all(|flow| flow.tcp & Flow::FIN != 0));
            first.ebpf.leave()?;
            let mut second = Fixture::with("eth0", options()?)?;
            ensure!(entries(&second)? == before);
            Ok(second.ebpf.remove()?)
        })?
    });
}

#[test]
fn the_sweeper_settles_what_is_in_use_and_ends_it_when_it_is_idle() {
    lab::test(|lab| {
        router(lab)?.enter(|| {
            let options = Options {
                limits: Limits {
                    timeouts: Timeouts {
                        udp: Duration::from_secs(2),
                        ..Timeouts::default()
                    },
                    ..Limits::default()
                },
                ..Options::default()
            };
            let mut fixture = Fixture::with("eth0", options)?;
            fixture.ebpf.apply(&fixture.spec)?;
            let packets = FAMILIES.map(|family| {
                Ip::udp(family.overlay(PEER), family.subnet(Net::SNAT, 1), 8).bytes()
            });
            let settled = |fixture: &Fixture| -> anyhow::Result<[u64; 2]> {
                let report = fixture.ebpf.flow_report().context("nobody sweeps")?;
                ensure!(report.error.is_none(), "{report:?}");
                Ok(report.families.map(|family| family.settled))
            };
            let deadline = std::time::Instant::now() + Duration::from_secs(30);
            while settled(&fixture)? != [2, 2] {
                ensure!(
                    std::time::Instant::now() < deadline,
                    "{:?}",
                    settled(&fixture)?
                );
                for packet in &packets {
                    let outcome = fixture.run(Side::Overlay, packet, 0)?;
                    ensure!(outcome.verdict == Verdict::Forwarded);
                    let reply = reply(&fixture, &outcome.bytes)?;
                    let outcome = fixture.run(Side::Subnet, &reply, 0)?;
                    ensure!(outcome.verdict == Verdict::Forwarded);
                }
            }
            wait_until(Duration::from_secs(30), "the end of the flows", || {
                fixture
                    .ebpf
                    .flows()
                    .entries()
                    .is_ok_and(|all| all.is_empty())
            })?;
            wait_until(Duration::from_secs(30), "the end of their slots", || {
                settled(&fixture).is_ok_and(|settled| settled == [0, 0])
            })?;
            Ok(())
        })?
    });
}

/// The answer to a packet that left so, with its Ethernet header.
fn reply(fixture: &Fixture, left: &[u8]) -> anyhow::Result<Vec<u8>> {
    let left = Ip::read(&left[14..]).context("no IP packet left")?;
    let port = u16::from_be_bytes([left.payload[0], left.payload[1]]);
    let reply = Ip::udp(left.destination, left.source, 8).ports(53, port);
    Ok(frame(fixture.mac, fixture.gateway_mac, &reply.bytes()))
}
