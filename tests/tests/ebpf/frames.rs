//! What the table of verdicts does not reach: SYN packets, frames that are no plain IP to us, and
//! settings that change under the programs.

use anyhow::ensure;
use lab::Host;
use router::control::{Policy, RouteMode, Rule};
use router_ebpf::abi::Side;
use router_ebpf::craft::*;
use router_ebpf::verdict::Verdict;

use super::fixture::*;

/// Runs `body` with a fixture inside the router.
fn inside(body: impl FnOnce(&mut Fixture, &Host) -> anyhow::Result<()> + Send) {
    lab::test(|lab| {
        let host = router(lab)?;
        host.enter(|| body(&mut Fixture::new(None)?, &host))?
    });
}

/// The packet as its side sees it.
fn input(fixture: &Fixture, side: Side, packet: &Ip) -> Vec<u8> {
    match side {
        Side::Overlay => packet.bytes(),
        Side::Subnet => frame(fixture.mac, fixture.gateway_mac, &packet.bytes()),
    }
}

/// Source and destination of a packet that `side` forwards.
pub(super) fn ends(family: Family, side: Side) -> (std::net::IpAddr, std::net::IpAddr) {
    let (peer, near) = (family.overlay(PEER), family.subnet(Net::NEAR, GATEWAY));
    match side {
        Side::Overlay => (peer, near),
        Side::Subnet => (near, peer),
    }
}

#[test]
fn a_syn_announces_what_the_tunnel_holds() {
    inside(|fixture, _| {
        for family in FAMILIES {
            let limit = MTU - if family == Family::V4 { 40 } else { 60 };
            for side in Side::ALL {
                let (source, destination) = ends(family, side);
                for flags in [SYN, SYN | ACK, ACK] {
                    for announced in [0, 536, limit - 1, limit, limit + 1, 1460, 8961, u16::MAX] {
                        // At an even and at an odd place of the header.
                        for before in [&[][..], &[1, 1, 1], &[4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]]
                        {
                            let syn = |value: u16| {
                                let mut options = [before, &mss(value)].concat();
                                options.resize(options.len().next_multiple_of(4), 0);
                                Ip::tcp(source, destination, flags, &options, 0)
                            };
                            let sent = syn(announced);
                            let outcome = fixture.run(side, &input(fixture, side, &sent), 0)?;
                            ensure!(outcome.verdict == Verdict::Forwarded);
                            let mut wanted = syn(if flags & SYN == 0 {
                                announced
                            } else {
                                announced.min(limit)
                            });
                            wanted.ttl -= 1;
                            ensure!(
                                outcome.bytes[14..] == wanted.bytes(),
                                "{family:?} {side:?} flags {flags:#x} MSS {announced} behind {before:?}"
                            );
                        }
                    }
                }
            }
        }
        Ok(())
    });
}

#[test]
fn a_syn_announces_no_more_than_the_subnet_side_holds() {
    inside(|fixture, _| {
        fixture.change(|spec| spec.mtu = 9000)?;
        for family in FAMILIES {
            let headers = if family == Family::V4 { 40 } else { 60 };
            let announced =
                |source, destination| Ip::tcp(source, destination, SYN, &mss(u16::MAX), 0);
            let peer = family.overlay(PEER);
            let near = family.subnet(Net::NEAR, GATEWAY);
            let narrow = family.subnet(Net::NARROW, 1);
            for (side, source, destination, mtu) in [
                (Side::Overlay, peer, near, LINK_MTU),
                (
                    Side::Overlay,
                    peer,
                    narrow,
                    if has_fib_mtu() { NARROW_MTU } else { LINK_MTU },
                ),
                (Side::Subnet, near, peer, LINK_MTU),
            ] {
                let sent = announced(source, destination);
                let outcome = fixture.run(side, &input(fixture, side, &sent), 0)?;
                let at = outcome.bytes.len() - 2;
                let value = u16::from_be_bytes([outcome.bytes[at], outcome.bytes[at + 1]]);
                ensure!(value == mtu - headers, "{family:?} {side:?}: {value}");
            }
        }
        Ok(())
    });
}

#[test]
fn only_plain_ip_to_us_is_taken_from_the_wire() {
    inside(|fixture, _| {
        let (ours, theirs) = (fixture.mac, fixture.gateway_mac);
        for family in FAMILIES {
            let (source, destination) = ends(family, Side::Subnet);
            let packet = Ip::udp(source, destination, 64).bytes();
            let plain = frame(ours, theirs, &packet);
            let mut tagged = plain.clone();
            tagged.splice(12..12, [0x81, 0x00, 0, 7]);
            let mut mpls = plain.clone();
            mpls[12..14].copy_from_slice(&[0x88, 0x47]);
            let mut wrong_version = plain.clone();
            wrong_version[14] ^= 0x30;
            for (name, bytes) in [
                (
                    "to another machine",
                    frame([2, 0, 0, 0, 0, 0x77], theirs, &packet),
                ),
                ("broadcast", frame([0xff; 6], theirs, &packet)),
                (
                    "multicast",
                    frame([0x33, 0x33, 0, 0, 0, 1], theirs, &packet),
                ),
                ("VLAN", tagged),
                ("MPLS", mpls),
                ("wrong version", wrong_version),
                ("cut short", plain[..plain.len() - 1].to_vec()),
            ] {
                let outcome = fixture.run(Side::Subnet, &bytes, 0)?;
                ensure!(
                    outcome.verdict == Verdict::PassUnrelated,
                    "{name}: {:?}",
                    outcome.verdict
                );
                ensure!(outcome.code == NEXT && outcome.bytes == bytes, "{name}");
            }
        }
        Ok(())
    });
}

#[test]
fn what_is_no_packet_from_the_tunnel_is_dropped() {
    inside(|fixture, _| {
        for family in FAMILIES {
            let (source, destination) = ends(family, Side::Overlay);
            let whole = Ip::udp(source, destination, 64).bytes();
            let mut version = whole.clone();
            version[0] = 0x55;
            let mut length = whole.clone();
            length[if family == Family::V4 { 3 } else { 5 }] += 1;
            for bytes in [
                version,
                length,
                whole[..whole.len() - 1].to_vec(),
                whole[..19].to_vec(),
            ] {
                let outcome = fixture.run(Side::Overlay, &bytes, 0)?;
                ensure!(
                    outcome.verdict == Verdict::DropMalformed,
                    "{:?}",
                    outcome.verdict
                );
                ensure!(outcome.code == SHOT);
            }
        }
        Ok(())
    });
}

#[test]
fn the_padding_of_a_short_frame_stays_outside_the_tunnel() {
    inside(|fixture, _| {
        for family in FAMILIES {
            let (source, destination) = ends(family, Side::Subnet);
            let mut packet = Ip::udp(source, destination, 2);
            let mut padded = input(fixture, Side::Subnet, &packet);
            padded.extend([0xaa; 16]);
            let outcome = fixture.run(Side::Subnet, &padded, 0)?;
            packet.ttl -= 1;
            ensure!(outcome.bytes == input(fixture, Side::Subnet, &packet));
        }
        Ok(())
    });
}

#[test]
fn special_addresses_go_to_the_kernel() {
    inside(|fixture, _| {
        fixture.change(|spec| {
            for route in &mut spec.routes {
                if let Ok(all) = ipnet::IpNet::new(route.cidr.addr(), 0) {
                    // Every net is routed, as for an exit node.
                    route.cidr = all.trunc();
                }
            }
            spec.routes.sort();
            spec.routes.dedup_by_key(|route| route.cidr);
            for route in &mut spec.routes {
                route.snat = false;
                route.mode = RouteMode::Fast;
            }
        })?;
        for (family, addresses) in [
            (
                Family::V4,
                [
                    "224.0.0.251",
                    "255.255.255.255",
                    "169.254.169.254",
                    "169.254.0.1",
                    "127.0.0.1",
                ],
            ),
            (
                Family::V6,
                ["ff02::fb", "ff05::2", "fe80::1", "fd00:ec2::254", "::1"],
            ),
        ] {
            for address in addresses {
                let packet = Ip::udp(family.overlay(PEER), address.parse()?, 64).bytes();
                let outcome = fixture.run(Side::Overlay, &packet, 0)?;
                let verdict = match address {
                    "169.254.169.254" | "169.254.0.1" | "fe80::1" | "fd00:ec2::254" => {
                        Verdict::DropLinkLocal
                    }
                    _ => Verdict::SlowScope,
                };
                ensure!(
                    outcome.verdict == verdict,
                    "{address}: {:?}",
                    outcome.verdict
                );
            }
        }
        Ok(())
    });
}

#[test]
fn settings_change_under_the_programs() {
    inside(|fixture, host| {
        for family in FAMILIES {
            let packet = |fixture: &Fixture, side| {
                let (source, destination) = ends(family, side);
                input(fixture, side, &Ip::udp(source, destination, 64))
            };
            let expect = |fixture: &mut Fixture, overlay, subnet| {
                for (side, wanted) in [(Side::Overlay, overlay), (Side::Subnet, subnet)] {
                    let bytes = packet(fixture, side);
                    let verdict = fixture.run(side, &bytes, 0)?.verdict;
                    ensure!(
                        verdict == wanted,
                        "{family:?} {side:?}: {verdict:?}, not {wanted:?}"
                    );
                }
                Ok(())
            };
            use Verdict::*;
            expect(fixture, Forwarded, Forwarded)?;

            let rule = Rule {
                sources: vec![],
                destinations: vec![],
                protocols: vec![],
                ..Rule::default()
            };
            fixture.change(|spec| spec.policy.rules = vec![rule])?;
            expect(fixture, DropPolicy, DropPolicy)?;
            fixture.change(|spec| spec.policy = Policy::default())?;
            expect(fixture, Forwarded, Forwarded)?;

            let all = fixture.spec.clone();
            fixture.change(|spec| spec.overlay.clear())?;
            expect(fixture, DropSpoofed, PassUnrelated)?;
            fixture.change(|spec| {
                spec.overlay.clone_from(&all.overlay);
                spec.routes.clear();
            })?;
            expect(fixture, SlowNotRouted, SlowNotRouted)?;
            // A longer prefix wins over a shorter one.
            fixture.change(|spec| {
                spec.routes.clone_from(&all.routes);
                let len = if family == Family::V4 { 32 } else { 128 };
                spec.routes.push(router::control::Route {
                    cidr: ipnet::IpNet::new(family.subnet(Net::NEAR, GATEWAY), len)
                        .expect("a whole address"),
                    snat: false,
                    mode: RouteMode::Stack,
                });
            })?;
            expect(fixture, SlowStackRoute, SlowStackRoute)?;
            fixture.change(|spec| spec.clone_from(&all))?;
            expect(fixture, Forwarded, Forwarded)?;

            let key = match family {
                Family::V4 => "net/ipv4/ip_forward",
                Family::V6 => "net/ipv6/conf/all/forwarding",
            };
            // As the daemon does when the kernel tells of a change.
            host.sysctl(key, "0")?;
            fixture.ebpf.bump_generation()?;
            // A reply needs no route: where it goes is known.
            expect(fixture, SlowFib, Forwarded)?;
            host.sysctl(key, "1")?;
        }
        Ok(())
    });
}
