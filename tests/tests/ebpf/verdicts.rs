//! Each verdict, for both programs and both families.

use anyhow::ensure;
use router_ebpf::abi::Side;
use router_ebpf::craft::*;
use router_ebpf::verdict::{Class, Verdict};

use super::fixture::*;

/// A packet and what must become of it.
struct Case {
    name: &'static str,
    side: Side,
    packet: Ip,
    gso_size: u32,
    verdict: Verdict,
}

fn case(name: &'static str, side: Side, packet: Ip, verdict: Verdict) -> Case {
    Case {
        name,
        side,
        packet,
        gso_size: 0,
        verdict,
    }
}

fn cases(family: Family) -> Vec<Case> {
    use Verdict::*;
    let peer = family.overlay(PEER);
    let near = family.subnet(Net::NEAR, GATEWAY);
    let to = |net| Ip::udp(peer, family.subnet(net, GATEWAY), 100);
    let from = |net| Ip::udp(family.subnet(net, GATEWAY), peer, 100);
    let with = |mut ip: Ip, change: &dyn Fn(&mut Ip)| {
        change(&mut ip);
        ip
    };
    let v4 = family == Family::V4;
    let ip_header = if v4 { 20 } else { 40 };
    let fits = |mtu: u16| usize::from(mtu) - ip_header - 8;
    let mut cases = vec![
        case("udp", Side::Overlay, to(Net::NEAR), Forwarded),
        case(
            "tcp",
            Side::Overlay,
            Ip::tcp(peer, near, ACK, &[], 500),
            Forwarded,
        ),
        case("echo", Side::Overlay, Ip::echo(peer, near), Forwarded),
        case("gateway", Side::Overlay, to(Net::NARROW), Forwarded),
        case(
            "empty datagram",
            Side::Overlay,
            Ip::udp(peer, near, 0),
            Forwarded,
        ),
        case(
            "largest",
            Side::Overlay,
            Ip::udp(peer, near, fits(LINK_MTU)),
            Forwarded,
        ),
        case(
            "too big for eth0",
            Side::Overlay,
            Ip::udp(peer, near, fits(LINK_MTU) + 1),
            SlowMtu,
        ),
        case(
            "too big for the route",
            Side::Overlay,
            Ip::udp(peer, family.subnet(Net::NARROW, 1), fits(NARROW_MTU) + 1),
            SlowMtu,
        ),
        case(
            "spoofed",
            Side::Overlay,
            Ip::udp(family.foreign(), near, 10),
            DropSpoofed,
        ),
        case(
            "spoofed from the router",
            Side::Overlay,
            Ip::udp(family.overlay(1), near, 10),
            DropSpoofed,
        ),
        case(
            "spoofed from the subnet",
            Side::Overlay,
            Ip::udp(near, near, 10),
            DropSpoofed,
        ),
        case(
            "unknown net",
            Side::Overlay,
            Ip::udp(peer, family.foreign(), 10),
            SlowNotRouted,
        ),
        case(
            "peer to peer",
            Side::Overlay,
            Ip::udp(peer, family.overlay(3), 10),
            SlowNotRouted,
        ),
        case("translated", Side::Overlay, to(Net::SNAT), Forwarded),
        case("stack", Side::Overlay, to(Net::STACK), SlowStackRoute),
        case(
            "elsewhere",
            Side::Overlay,
            to(Net::ELSEWHERE),
            SlowOtherLink,
        ),
        case("prohibited", Side::Overlay, to(Net::PROHIBITED), SlowFib),
        case(
            "unresolved",
            Side::Overlay,
            to(Net::UNRESOLVED),
            SlowNoNeighbour,
        ),
        case(
            "to the router",
            Side::Overlay,
            Ip::udp(peer, family.subnet(Net::NEAR, ROUTER), 10),
            SlowToRouter,
        ),
        case(
            "last hop",
            Side::Overlay,
            with(to(Net::NEAR), &|ip| ip.ttl = 1),
            SlowTtl,
        ),
        case(
            "ttl zero",
            Side::Overlay,
            with(to(Net::NEAR), &|ip| ip.ttl = 0),
            SlowTtl,
        ),
        case(
            "ttl two",
            Side::Overlay,
            with(to(Net::NEAR), &|ip| ip.ttl = 2),
            Forwarded,
        ),
        case(
            "sctp",
            Side::Overlay,
            Ip::new(peer, near, 132, vec![0; 40]),
            SlowProtocol,
        ),
        case(
            "tcp header cut short",
            Side::Overlay,
            with(Ip::tcp(peer, near, ACK, &[], 0), &|ip| {
                ip.payload.truncate(19)
            }),
            SlowTransport,
        ),
        case(
            "tcp options beyond the packet",
            Side::Overlay,
            with(Ip::tcp(peer, near, SYN, &[], 0), &|ip| {
                ip.payload[12] = 0xf0
            }),
            SlowTransport,
        ),
        case(
            "udp header cut short",
            Side::Overlay,
            with(to(Net::NEAR), &|ip| ip.payload.truncate(7)),
            SlowTransport,
        ),
        case("udp", Side::Subnet, from(Net::NEAR), Forwarded),
        case(
            "tcp",
            Side::Subnet,
            Ip::tcp(near, peer, ACK, &[], 500),
            Forwarded,
        ),
        case("echo", Side::Subnet, Ip::echo(near, peer), Forwarded),
        case(
            "behind a gateway",
            Side::Subnet,
            from(Net::NARROW),
            Forwarded,
        ),
        case(
            "largest",
            Side::Subnet,
            Ip::udp(near, peer, fits(MTU)),
            Forwarded,
        ),
        case(
            "too big",
            Side::Subnet,
            Ip::udp(near, peer, fits(MTU) + 1),
            SlowMtu,
        ),
        case(
            "underlay",
            Side::Subnet,
            Ip::udp(near, family.subnet(Net::NEAR, ROUTER), 10),
            PassUnrelated,
        ),
        case(
            "transit",
            Side::Subnet,
            Ip::udp(near, family.foreign(), 10),
            PassUnrelated,
        ),
        case(
            "source of no route",
            Side::Subnet,
            Ip::udp(family.foreign(), peer, 10),
            SlowNotRouted,
        ),
        case(
            "opened from a translated net",
            Side::Subnet,
            from(Net::SNAT),
            Forwarded,
        ),
        case("stack", Side::Subnet, from(Net::STACK), SlowStackRoute),
        case(
            "to the tunnel address",
            Side::Subnet,
            Ip::udp(near, family.overlay(1), 10),
            PassUnrelated,
        ),
        case(
            "last hop",
            Side::Subnet,
            with(from(Net::NEAR), &|ip| ip.ttl = 1),
            SlowTtl,
        ),
        case(
            "sctp",
            Side::Subnet,
            Ip::new(near, peer, 132, vec![0; 40]),
            SlowProtocol,
        ),
    ];
    for side in Side::ALL {
        let (source, destination, mtu) = match side {
            Side::Overlay => (peer, near, LINK_MTU),
            Side::Subnet => (near, peer, MTU),
        };
        let segment = |size: u16| {
            let mss = size - ip_header as u16 - 20;
            let mut super_packet = case(
                "super-packet",
                side,
                Ip::tcp(source, destination, ACK, &[], 2 * usize::from(mss) + 100),
                Forwarded,
            );
            super_packet.gso_size = mss.into();
            super_packet
        };
        cases.push(segment(mtu));
        let mut too_big = segment(mtu + 1);
        too_big.verdict = SlowMtu;
        cases.push(too_big);
        let whole = Ip::udp(source, destination, 100);
        if v4 {
            for (name, fragment) in [
                ("first fragment", 0x2000),
                ("middle fragment", 0x2007),
                ("last fragment", 0x0007),
            ] {
                // The later ones know the first by their identification.
                cases.push(case(
                    name,
                    side,
                    with(whole.clone(), &|ip| ip.fragment = fragment),
                    Forwarded,
                ));
            }
            cases.push(case(
                "may be fragmented",
                side,
                with(whole.clone(), &|ip| ip.fragment = 0),
                Forwarded,
            ));
            // Router alert.
            let alert = with(whole.clone(), &|ip| ip.options = vec![0x94, 4, 0, 0]);
            cases.push(case("options", side, alert, SlowOptions));
        } else {
            for (name, header, verdict) in [
                ("hop-by-hop", 0, SlowOptions),
                ("routing", 43, SlowOptions),
                ("later fragment", 44, SlowFragment),
                ("destination options", 60, SlowOptions),
            ] {
                let chain = with(whole.clone(), &|ip| {
                    ip.options = vec![UDP, 0, 1, 4, 0, 0, 0, 0];
                    ip.protocol = header;
                });
                cases.push(case(name, side, chain, verdict));
            }
        }
    }
    cases
}

#[test]
fn every_packet_has_its_verdict() {
    lab::test(|lab| {
        router(lab)?.enter(|| {
            let mut fixture = Fixture::new(None)?;
            let mut wrong = Vec::new();
            for family in FAMILIES {
                for case in cases(family) {
                    let name = format!("{family:?} {:?} {}", case.side, case.name);
                    if let Err(error) = check(&mut fixture, &case) {
                        wrong.push(format!("{name}: {error:#}"));
                    }
                }
            }
            ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
            Ok(())
        })?
    });
}

fn check(fixture: &mut Fixture, case: &Case) -> anyhow::Result<()> {
    let packet = case.packet.bytes();
    let input = match case.side {
        Side::Overlay => packet.clone(),
        Side::Subnet => frame(fixture.mac, fixture.gateway_mac, &packet),
    };
    let outcome = fixture.run(case.side, &input, case.gso_size)?;
    ensure!(
        outcome.verdict == case.verdict,
        "{:?}, not {:?}",
        outcome.verdict,
        case.verdict
    );
    let (code, bytes) = match case.verdict.class() {
        Class::Slow | Class::Pass => (NEXT, input),
        Class::Drop => (SHOT, input),
        Class::Reject => anyhow::bail!("there are no rules"),
        Class::Forward => {
            let mut sent = case.packet.clone();
            sent.ttl -= 1;
            if case.name == "translated" {
                let family = if sent.source.is_ipv4() {
                    Family::V4
                } else {
                    Family::V6
                };
                sent = sent.from(family.subnet(Net::NEAR, ROUTER));
            }
            let (to, from) = match case.side {
                Side::Overlay => (fixture.gateway_mac, fixture.mac),
                // The kernel takes the header off on the way into the TUN device.
                Side::Subnet => (fixture.mac, fixture.gateway_mac),
            };
            (REDIRECT, frame(to, from, &sent.bytes()))
        }
    };
    ensure!(
        outcome.code == code,
        "return code {}, not {code}",
        outcome.code
    );
    ensure!(
        outcome.bytes == bytes,
        "bytes:\n{:02x?}\nnot\n{bytes:02x?}",
        outcome.bytes
    );
    Ok(())
}
