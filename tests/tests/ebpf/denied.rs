//! What the programs tell of packets that they do not let through.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use router::control::{Denied, Policy, Rule};
use router::datapath::ebpf::{DeniedPacket, DeniedPackets, Options};
use router::datapath::limits::Limits;
use router_ebpf::abi::{Budget, SETTINGS, Settings, Side};
use router_ebpf::craft::*;
use router_ebpf::verdict::Verdict;

use super::fixture::*;

/// Runs `body` with a fixture where a source may have one flow, and with what the programs tell.
fn inside(body: impl FnOnce(&mut Fixture, &mut DeniedPackets) -> anyhow::Result<()> + Send) {
    let limits = Limits {
        flows_per_source: 1,
        ..Limits::default()
    };
    inside_with(limits, body);
}

/// As [`inside`], with other limits.
fn inside_with(
    limits: Limits,
    body: impl FnOnce(&mut Fixture, &mut DeniedPackets) -> anyhow::Result<()> + Send,
) {
    lab::test(|lab| {
        router(lab)?.enter(|| {
            let options = Options {
                sweep: false,
                limits,
                ..Options::default()
            };
            let mut fixture = Fixture::with("eth0", options)?;
            let mut denied = fixture.ebpf.take_denied().context("taken already")?;
            body(&mut fixture, &mut denied)
        })?
    });
}

/// Has no rule let anything through.
fn deny(fixture: &mut Fixture, denied: Denied) -> anyhow::Result<()> {
    fixture.change(|spec| {
        spec.policy = Policy {
            rules: vec![Rule {
                sources: vec![],
                destinations: vec![],
                protocols: vec![],
                ..Rule::default()
            }],
            denied,
        }
    })
}

/// Sends a packet, and yields its verdict and what is told of it.
fn told(
    fixture: &mut Fixture,
    denied: &mut DeniedPackets,
    side: Side,
    packet: &Ip,
) -> anyhow::Result<(Verdict, Option<DeniedPacket>)> {
    let input = match side {
        Side::Overlay => packet.bytes(),
        Side::Subnet => frame(fixture.mac, fixture.gateway_mac, &packet.bytes()),
    };
    let verdict = fixture.run(side, &input, 0)?.verdict;
    let mut packets = denied.read()?;
    ensure!(packets.len() <= 1, "{packets:?}");
    Ok((verdict, packets.pop()))
}

#[test]
fn what_is_denied_is_told_as_it_came() {
    inside(|fixture, denied| {
        deny(fixture, Denied::Drop)?;
        for family in FAMILIES {
            let peer = family.overlay(PEER);
            let near = family.subnet(Net::NEAR, GATEWAY);
            let foreign = family.foreign();
            let ends = |source: IpAddr, from, destination: IpAddr, to| {
                [
                    SocketAddr::new(source, from),
                    SocketAddr::new(destination, to),
                ]
            };
            for (side, packet, verdict, [source, destination]) in [
                (
                    Side::Overlay,
                    Ip::tcp(peer, near, SYN, &[], 9),
                    Verdict::DropPolicy,
                    ends(peer, 40_000, near, 443),
                ),
                (
                    Side::Overlay,
                    Ip::echo(peer, near),
                    Verdict::DropPolicy,
                    ends(peer, 7, near, 0),
                ),
                (
                    Side::Subnet,
                    Ip::udp(near, peer, 9),
                    Verdict::DropPolicy,
                    ends(near, 40_000, peer, 53),
                ),
                (
                    Side::Subnet,
                    Ip::echo(near, peer),
                    Verdict::DropPolicy,
                    ends(near, 0, peer, 7),
                ),
                (
                    Side::Overlay,
                    Ip::udp(foreign, near, 9),
                    Verdict::DropSpoofed,
                    ends(foreign, 40_000, near, 53),
                ),
            ] {
                let (got, packet_told) = told(fixture, denied, side, &packet)?;
                ensure!(got == verdict, "{got:?}");
                let packet_told = packet_told.context("nothing was told")?;
                let age = SystemTime::now().duration_since(packet_told.at);
                ensure!(age.is_ok_and(|age| age < Duration::from_secs(3600)));
                let wanted = DeniedPacket {
                    at: packet_told.at,
                    side,
                    verdict,
                    protocol: packet.protocol,
                    source,
                    destination,
                    len: packet.bytes().len() as u32,
                    tcp_flags: if packet.protocol == TCP { SYN } else { 0 },
                };
                ensure!(packet_told == wanted, "{packet_told:?}, not {wanted:?}");
            }
        }
        Ok(())
    });
}

#[test]
fn each_reason_is_told_and_nothing_else() {
    inside(|fixture, denied| {
        for family in FAMILIES {
            fixture.change(|spec| spec.policy = Policy::default())?;
            let udp = |net, port| {
                let packet = Ip::udp(family.overlay(PEER), family.subnet(net, GATEWAY), 9);
                packet.ports(5000, port)
            };
            let mut expect = |fixture: &mut Fixture, packet: &Ip, wanted, is_told| {
                let (verdict, packet) = told(fixture, denied, Side::Overlay, packet)?;
                ensure!(verdict == wanted, "{verdict:?}, not {wanted:?}");
                let verdict_told = packet.map(|packet| packet.verdict);
                ensure!(verdict_told == is_told, "{wanted:?}: {verdict_told:?}");
                Ok(())
            };
            expect(fixture, &udp(Net::NEAR, 53), Verdict::Forwarded, None)?;
            let limit = Verdict::DropSourceLimit;
            expect(fixture, &udp(Net::NEAR, 54), limit, Some(limit))?;
            let stack = Verdict::SlowStackRoute;
            expect(fixture, &udp(Net::STACK, 53), stack, None)?;
            // A packet that became its answer is told as it was.
            deny(fixture, Denied::Reject)?;
            let syn = Ip::tcp(
                family.overlay(PEER),
                family.subnet(Net::NEAR, GATEWAY),
                SYN,
                &[],
                0,
            );
            let reject = Verdict::RejectPolicy;
            expect(fixture, &syn, reject, Some(reject))?;
            // Not when there are too many.
            use_up(fixture, Budget::Denied, u64::MAX / 2)?;
            expect(fixture, &syn, reject, None)?;
            use_up(fixture, Budget::Denied, 0)?;
            expect(fixture, &syn, reject, Some(reject))?;
        }
        Ok(())
    });
}

/// Sends two datagrams from these ports, of which the first opens a flow and the second is refused
/// with this verdict, and told.
fn the_second_is_told(
    fixture: &mut Fixture,
    denied: &mut DeniedPackets,
    (family, net): (Family, Net),
    ports: [u16; 2],
    verdict: Verdict,
) -> anyhow::Result<()> {
    let [source, destination] = [family.overlay(PEER), family.subnet(net, GATEWAY)];
    let [first, second] = ports.map(|port| Ip::udp(source, destination, 9).ports(port, 53));
    let outcome = told(fixture, denied, Side::Overlay, &first)?;
    ensure!(outcome == (Verdict::Forwarded, None), "{outcome:?}");
    // Each time anew: nothing of it stays.
    for _ in 0..2 {
        let (got, packet) = told(fixture, denied, Side::Overlay, &second)?;
        ensure!(got == verdict, "{got:?}");
        let packet = packet.context("nothing was told")?;
        ensure!(packet.verdict == verdict && packet.side == Side::Overlay);
        let ends = [
            SocketAddr::new(source, ports[1]),
            SocketAddr::new(destination, 53),
        ];
        ensure!([packet.source, packet.destination] == ends, "{packet:?}");
    }
    // Who has a flow is not concerned.
    let outcome = told(fixture, denied, Side::Overlay, &first)?;
    ensure!(outcome == (Verdict::Forwarded, None), "{outcome:?}");
    Ok(())
}

#[test]
fn a_full_table_is_told() {
    let limits = Limits {
        flows: 1,
        ..Limits::default()
    };
    inside_with(limits, |fixture, denied| {
        for family in FAMILIES {
            let way = (family, Net::NEAR);
            the_second_is_told(fixture, denied, way, [5000, 5001], Verdict::DropTableFull)?;
        }
        Ok(())
    });
}

#[test]
fn exhausted_ports_are_told() {
    inside_with(Limits::default(), |fixture, denied| {
        // One port to translate to, and sources whose own is not kept.
        let mut map: aya::maps::Array<_, Settings> = map(&fixture.ebpf, SETTINGS)?.try_into()?;
        let mut settings = map.get(&0, 0)?;
        settings.ports = [2000; 2];
        map.set(0, settings, 0)?;
        for family in FAMILIES {
            let way = (family, Net::SNAT);
            the_second_is_told(fixture, denied, way, [500, 501], Verdict::DropNatExhausted)?;
        }
        Ok(())
    });
}
