#![allow(clippy::unwrap_used)]
use std::net::IpAddr;

use super::*;
use crate::craft::{ACK, Ip, SYN, frame};
use crate::forward::Exit;
use crate::memory::Memory;
use crate::site::*;
use crate::world::World;

/// Type and code of "time exceeded", "port unreachable" and "packet too big".
fn kinds(v4: bool) -> [[u8; 2]; 3] {
    if v4 {
        [[11, 0], [3, 3], [3, 4]]
    } else {
        [[3, 0], [1, 4], [2, 0]]
    }
}

/// A translated flow of each protocol: the first packet as the peer sends it and as it leaves.
fn flows(world: &mut World, peer: IpAddr, server: IpAddr) -> Vec<(Ip, Ip)> {
    let packets = [
        Ip::tcp(peer, server, SYN, &[], 0).ports(62_000, 80),
        Ip::udp(peer, server, 100).ports(62_000, 80),
        Ip::echo(peer, server).identifier(62_000),
    ];
    packets
        .into_iter()
        .map(|packet| {
            let out = up(world, &packet).unwrap();
            (packet, out)
        })
        .collect()
}

#[test]
fn an_error_about_what_left_comes_back_as_if_nothing_were_translated() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        // A router on the way, which is none of those that the routes tell of.
        let hop = ip(if peer.is_ipv4() {
            "192.0.2.1"
        } else {
            "2001:db8:ff::1"
        });
        let mut world = router(true);
        for (sent, left) in flows(&mut world, peer, server) {
            for kind in kinds(peer.is_ipv4()) {
                for sender in [hop, server] {
                    // Whole, and no more than what RFC 792 promises.
                    let least = if peer.is_ipv4() { 28 } else { 48 };
                    for len in [least, left.bytes().len()] {
                        let error = |quoted: &Ip, to| {
                            Ip::error(sender, to, kind, 1300, &quoted.bytes()[..len])
                        };
                        let came = error(&left, ip(family.external));
                        let arrived = down(&mut world, &came).unwrap();
                        // The quote lost a hop of its TTL on the way, before it was quoted.
                        let quoted = sent.clone().forwarded();
                        same(&arrived, &error(&quoted, peer).forwarded());
                    }
                }
            }
        }
    }
}

#[test]
fn an_error_of_a_peer_about_a_reply_goes_out_translated() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        let external = ip(family.external);
        let mut world = router(true);
        for (_, left) in flows(&mut world, peer, server) {
            let reply = match left.protocol {
                TCP => Ip::tcp(server, external, SYN | ACK, &[], 0),
                UDP => Ip::udp(server, external, 90),
                _ => Ip {
                    ttl: 64,
                    ..left.echo_reply()
                },
            };
            let reply = match left.protocol {
                TCP | UDP => {
                    reply.ports(80, u16::from_be_bytes([left.payload[0], left.payload[1]]))
                }
                _ => reply,
            };
            let arrived = down(&mut world, &reply).unwrap();
            let kind = kinds(peer.is_ipv4())[1];
            let error = Ip::error(peer, server, kind, 0, &arrived.bytes());
            let out = up(&mut world, &error).unwrap();
            let quoted = reply.forwarded();
            same(
                &out,
                &Ip::error(external, server, kind, 0, &quoted.bytes()).forwarded(),
            );
        }
    }
}

/// The first fragment has the ports; a later one is known by its identification.
#[test]
fn an_error_about_a_fragment_comes_back_as_if_nothing_were_translated() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        let external = ip(family.external);
        let mut world = router(true);
        let kind = kinds(peer.is_ipv4())[2];
        let datagram = Ip::udp(peer, server, 3000).ports(62_000, 80);
        let mut port = 0;
        for fragment in datagram.fragments(9, &[1200, 2400]) {
            let left = up(&mut world, &fragment).unwrap();
            if port == 0 {
                let at = if peer.is_ipv4() { 0 } else { 8 };
                port = u16::from_be_bytes([left.payload[at], left.payload[at + 1]]);
            }
            assert_eq!(left.source, external);
            let error = Ip::error(server, external, kind, 1300, &left.bytes());
            let arrived = down(&mut world, &error).unwrap();
            let wanted = Ip::error(server, peer, kind, 1300, &fragment.forwarded().bytes());
            same(&arrived, &wanted.forwarded());
        }
        // And of a peer about a reply.
        let reply = Ip::udp(server, external, 3000).ports(80, port);
        for fragment in reply.fragments(10, &[1200, 2400]) {
            let arrived = down(&mut world, &fragment).unwrap();
            let error = Ip::error(peer, server, kind, 1300, &arrived.bytes());
            let out = up(&mut world, &error).unwrap();
            let wanted = Ip::error(external, server, kind, 1300, &fragment.forwarded().bytes());
            same(&out, &wanted.forwarded());
        }
        // Of a packet that nobody has seen.
        let other = Ip::udp(external, server, 3000)
            .fragments(11, &[1200])
            .remove(1);
        let error = Ip::error(server, external, kind, 1300, &other.bytes());
        assert_eq!(down(&mut world, &error), Err(Verdict::PassUnrelated));
    }
}

#[test]
fn an_error_about_nothing_of_ours_is_not_ours() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        let external = ip(family.external);
        let mut world = router(true);
        let (_, left) = flows(&mut world, peer, server).remove(1);
        let kind = kinds(peer.is_ipv4())[1];
        // About a flow that there is not, cut short, and about a packet to somebody else.
        let other = left.clone().ports(1999, 80);
        for (quoted, len) in [(&other, 200), (&left, 20)] {
            let len = len.min(quoted.bytes().len());
            let error = Ip::error(server, external, kind, 0, &quoted.bytes()[..len]);
            assert_eq!(down(&mut world, &error), Err(Verdict::PassUnrelated));
        }
        let mislaid = Ip::error(server, server, kind, 0, &left.bytes());
        assert_eq!(down(&mut world, &mislaid), Err(Verdict::PassUnrelated));
        // A peer that speaks in another's name.
        let spoofed = Ip::error(ip(family.external), server, kind, 0, &left.bytes());
        assert_eq!(up(&mut world, &spoofed), Err(Verdict::DropSpoofed));
        let stray = Ip::error(peer, server, kind, 0, &left.bytes());
        assert_eq!(up(&mut world, &stray), Err(Verdict::SlowNoFlow));
    }
}

/// What a program sends instead of a reply that it cannot carry.
fn answered(world: &mut World, reply: &Ip, gso_size: u32) -> (Verdict, Option<Vec<u8>>) {
    let bytes = frame([2; 6], [4; 6], &reply.bytes());
    let mut memory = Memory::new(Side::Subnet, bytes, gso_size);
    let (verdict, forward) = world.run(Side::Subnet, &mut memory);
    let sent = forward.map(|forward| {
        assert_eq!(forward.exit, Exit::Answer);
        memory.bytes
    });
    (verdict, sent)
}

#[test]
fn a_reply_that_the_tunnel_cannot_hold_is_answered_as_the_sender_knows_it() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        let external = ip(family.external);
        let mut world = router(true);
        flows(&mut world, peer, server);
        up(
            &mut world,
            &Ip::tcp(peer, server, SYN, &[], 0).ports(3000, 80),
        )
        .unwrap();
        let v4 = peer.is_ipv4();
        let headers = if v4 { 40 } else { 60 };
        for (payload, gso_size, fits) in [
            (1420 - headers, 0, true),
            (1421 - headers, 0, false),
            (1460, 0, false),
            (60_000, 1421 - headers, false),
        ] {
            let reply = Ip::tcp(server, external, ACK, &[], payload).ports(80, 3000);
            let bytes = frame([2; 6], [4; 6], &reply.bytes());
            let mut memory = Memory::new(Side::Subnet, bytes, gso_size as u32);
            if fits {
                let verdict = world.run(Side::Subnet, &mut memory).0;
                assert_eq!(verdict, Verdict::Forwarded);
                continue;
            }
            let (verdict, sent) = answered(&mut world, &reply, gso_size as u32);
            assert_eq!(verdict, Verdict::DropTooBig);
            let sent = sent.unwrap();
            assert_eq!(sent[..12], [[4; 6], [2; 6]].concat(), "back to who sent it");
            let (kind, rest, most) = if v4 {
                ([3, 4], 1420, QUOTE_V4)
            } else {
                ([2, 0], 1420, QUOTE_V6)
            };
            let quoted = reply.bytes();
            let len = quoted.len().min(most as usize) & !3;
            let wanted = Ip::error(external, server, kind, rest, &quoted[..len]);
            same_error(&Ip::read(&sent[14..]).unwrap(), &wanted);
        }
        // Without "don't fragment" the kernel cuts it.
        if v4 {
            let mut reply = Ip::udp(server, external, 1460).ports(80, 3000);
            up(&mut world, &Ip::udp(peer, server, 1).ports(3000, 80)).unwrap();
            reply.fragment = 0;
            let mut memory = Memory::new(Side::Subnet, frame([2; 6], [4; 6], &reply.bytes()), 0);
            let (verdict, forward) = world.run(Side::Subnet, &mut memory);
            assert_eq!(
                (verdict, forward.unwrap().exit),
                (Verdict::SlowMtu, Exit::Stack)
            );
            // The kernel will lower the TTL.
            same(&Ip::read(&memory.bytes[14..]).unwrap(), &reply.to(peer));
        }
    }
}

#[test]
fn a_reply_at_its_last_hop_is_answered() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        let external = ip(family.external);
        let mut world = router(true);
        up(&mut world, &Ip::udp(peer, server, 1).ports(3000, 80)).unwrap();
        let mut reply = Ip::udp(server, external, 40).ports(80, 3000);
        reply.ttl = 1;
        let (verdict, sent) = answered(&mut world, &reply, 0);
        assert_eq!(verdict, Verdict::DropTtl);
        let kind = kinds(peer.is_ipv4())[0];
        let wanted = Ip::error(external, server, kind, 0, &reply.bytes());
        same_error(&Ip::read(&sent.unwrap()[14..]).unwrap(), &wanted);
        // No more than may be sent, and never about another error.
        world.errors.set(0);
        assert_eq!(answered(&mut world, &reply, 0), (Verdict::DropTtl, None));
        world.errors.set(10);
        let (_, left) = flows(&mut world, peer, server).remove(1);
        let mut error = Ip::error(server, external, kind, 0, &left.bytes());
        error.ttl = 1;
        assert_eq!(answered(&mut world, &error, 0), (Verdict::DropTtl, None));
    }
}

#[test]
fn an_error_of_a_peer_about_anothers_flow_is_not_believed() {
    for family in FAMILIES {
        let [peer, stranger, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        for snat in [false, true] {
            let external = if snat { ip(family.external) } else { peer };
            let mut world = router(snat);
            flows(&mut world, peer, server);
            let reply = Ip::udp(server, external, 90).ports(80, 62_000);
            let reply = if snat {
                let (_, left) = flows(&mut world, peer, server).remove(1);
                reply.ports(80, u16::from_be_bytes([left.payload[0], left.payload[1]]))
            } else {
                reply
            };
            let arrived = down(&mut world, &reply).unwrap();
            for kind in kinds(peer.is_ipv4()) {
                let error = |from| Ip::error(from, server, kind, 600, &arrived.bytes());
                let refused = up(&mut world, &error(stranger));
                assert_eq!(refused, Err(Verdict::DropSpoofed), "{kind:?}");
                assert!(up(&mut world, &error(peer)).is_ok(), "{kind:?}");
            }
            // A router in the network of the peer may tell of it.
            for (cidr, peer) in &mut world.overlay {
                if cidr.address == address(stranger) {
                    *peer = crate::abi::Overlay::of(1);
                }
            }
            let error = Ip::error(
                stranger,
                server,
                kinds(peer.is_ipv4())[0],
                0,
                &arrived.bytes(),
            );
            assert!(up(&mut world, &error).is_ok());
        }
    }
}
