#![allow(clippy::unwrap_used)]
use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::craft::{Ip, frame, sum};
use crate::memory::Memory;
use crate::site::*;
use crate::world::World;

/// A router whose rules let nothing through, and that says so.
fn denying(snat: bool) -> World {
    let mut world = router(snat);
    world.settings.flags |= Settings::REJECT;
    world.settings.bank = 1;
    world
}

/// The two ends of a packet that the program of `side` sees.
fn ends(family: Family, side: Side) -> (IpAddr, IpAddr) {
    let (peer, server) = (ip(family.peers[0]), ip(family.servers[0]));
    match side {
        Side::Overlay => (peer, server),
        Side::Subnet => (server, peer),
    }
}

/// What becomes of a packet, and what its sender gets.
fn rejected(
    world: &mut World,
    side: Side,
    packet: &Ip,
    gso_size: u32,
) -> (Verdict, Option<Vec<u8>>) {
    let bytes = match side {
        Side::Overlay => packet.bytes(),
        Side::Subnet => frame([2; 6], [4; 6], &packet.bytes()),
    };
    let mut memory = Memory::new(side, bytes, gso_size);
    let (verdict, forward) = world.run(side, &mut memory);
    let Some(forward) = forward else {
        return (verdict, None);
    };
    assert_eq!(forward.exit, Exit::Answer);
    assert_eq!(memory.gso_size, 0, "a plain packet");
    let header = memory.offset;
    if side == Side::Subnet {
        assert_eq!(memory.bytes[..12], [[4; 6], [2; 6]].concat());
    }
    (verdict, Some(memory.bytes.split_off(header)))
}

fn reset_of(world: &mut World, side: Side, packet: &Ip, gso_size: u32) -> Ip {
    let (verdict, sent) = rejected(world, side, packet, gso_size);
    assert_eq!(verdict, Verdict::RejectPolicy, "{packet:?}");
    let sent = sent.unwrap();
    let reset = Ip::read(&sent).unwrap();
    assert_eq!(reset.bytes(), sent, "nothing else, and nothing behind it");
    reset
}

/// Checks that `reset` is `wanted` but for its window, and that its checksum is right, also when a
/// device computes it again from the value that is there.
fn same_reset(reset: &Ip, wanted: &Ip) {
    assert_eq!(reset.transport_sum(), u16::MAX, "checksum");
    let again = !sum(&reset.payload);
    let stands = u16::from_be_bytes([reset.payload[16], reset.payload[17]]);
    let differ = again ^ stands;
    // Zero has two faces.
    assert!(
        differ == 0 || differ == u16::MAX && again.min(stands) == 0,
        "{again} {stands}"
    );
    let plain = |ip: &Ip| {
        let mut ip = ip.clone();
        ip.id = 0;
        ip.payload[14..18].fill(0);
        ip
    };
    same(&plain(reset), &plain(wanted));
}

#[test]
fn a_segment_is_answered_by_the_rst_that_its_sender_believes() {
    const NEXT: u32 = 0x8000_0000;
    for family in FAMILIES {
        for side in Side::ALL {
            let (source, destination) = ends(family, side);
            let mut world = denying(false);
            for (flags, options, len, gso_size, sequence, wanted) in [
                (SYN, 0, 0, 0, [7, 0], (RST | ACK, [0, 8])),
                (SYN, 40, 0, 0, [7, 9], (RST | ACK, [0, 8])),
                (SYN, 0, 5, 0, [u32::MAX, 0], (RST | ACK, [0, 5])),
                (0, 0, 100, 0, [NEXT, 3], (RST | ACK, [0, NEXT + 100])),
                (FIN, 12, 10, 0, [1, 0], (RST | ACK, [0, 12])),
                (SYN | FIN, 0, 0, 0, [1, 0], (RST | ACK, [0, 3])),
                (ACK, 0, 0, 0, [1, 2], (RST, [2, 0])),
                (SYN | ACK, 4, 0, 0, [1, NEXT], (RST, [NEXT, 0])),
                (FIN | ACK, 12, 1000, 0, [1, 0], (RST, [0, 0])),
                (ACK, 12, 60_000, 1348, [1, 77], (RST, [77, 0])),
                (0, 12, 60_000, 1348, [1, 77], (RST | ACK, [0, 60_001])),
            ] {
                let packet = Ip::tcp(source, destination, flags, &vec![1; options], len)
                    .ports(3000, 80)
                    .sequence(sequence[0], sequence[1]);
                let reset = reset_of(&mut world, side, &packet, gso_size);
                let (flags, [sequence, acknowledged]) = wanted;
                let wanted = Ip::tcp(destination, source, flags, &[], 0)
                    .ports(80, 3000)
                    .sequence(sequence, acknowledged);
                same_reset(&reset, &wanted);
            }
            assert!(world.flows().is_empty(), "nothing was opened");
            let reset = Ip::tcp(source, destination, RST | ACK, &[], 0);
            let (verdict, sent) = rejected(&mut world, side, &reset, 0);
            assert_eq!((verdict, sent), (Verdict::DropPolicy, None));
        }
    }
}

proptest! {
    #[test]
    fn the_checksum_of_an_rst_is_right_and_stays_so(
        v4: bool,
        host: u16,
        ports: [u16; 2],
        numbers: [u32; 2],
        flags: u8,
    ) {
        let family = if v4 { V4 } else { V6 };
        let (peer, server) = ends(family, Side::Overlay);
        let source = match peer {
            IpAddr::V4(peer) => (u32::from(peer) ^ u32::from(host)).to_be_bytes().into(),
            IpAddr::V6(peer) => (u128::from(peer) ^ u128::from(host)).to_be_bytes().into(),
        };
        let mut world = denying(true);
        let host = crate::abi::Prefix::host(address(source));
        world.overlay = vec![(host, crate::abi::Overlay::of(1))];
        let flags = flags & !RST;
        // In the middle of a connection it is the kernel's to say so.
        let packet = Ip::tcp(source, server, (flags | SYN) & !ACK, &[], 3)
            .ports(ports[0], ports[1])
            .sequence(numbers[0], numbers[1]);
        let reset = reset_of(&mut world, Side::Overlay, &packet, 0);
        let length = 4 + u32::from(flags & FIN != 0);
        let wanted = Ip::tcp(server, source, RST | ACK, &[], 0)
            .ports(ports[1], ports[0])
            .sequence(0, numbers[0].wrapping_add(length));
        same_reset(&reset, &wanted);
    }
}

#[test]
fn all_else_is_answered_by_an_icmp_error() {
    for family in FAMILIES {
        let kind = if family.peers == V4.peers {
            [3, 13]
        } else {
            [1, 1]
        };
        for side in Side::ALL {
            let (source, destination) = ends(family, side);
            let mut world = denying(false);
            let datagram = Ip::udp(source, destination, 100);
            let (verdict, sent) = rejected(&mut world, side, &datagram, 0);
            assert_eq!(verdict, Verdict::RejectPolicy);
            let error = |quoted: &[u8]| Ip::error(destination, source, kind, 0, quoted);
            same_error(
                &Ip::read(&sent.unwrap()).unwrap(),
                &error(&datagram.bytes()),
            );

            let echo = Ip::echo(source, destination);
            let (verdict, sent) = rejected(&mut world, side, &echo, 0);
            assert_eq!(verdict, Verdict::RejectPolicy);
            let mut sent = Ip::read(&sent.unwrap()).unwrap();
            (sent.id, sent.fragment) = (0x1234, 0x4000);
            same(&sent, &error(&echo.bytes()));

            // Of fragments the first alone, be it of TCP.
            for whole in [&datagram, &Ip::tcp(source, destination, SYN, &[], 100)] {
                let [first, later]: [Ip; 2] = whole.fragments(9, &[64]).try_into().unwrap();
                let (verdict, sent) = rejected(&mut world, side, &first, 0);
                assert_eq!(verdict, Verdict::RejectPolicy);
                let sent = Ip::read(&sent.unwrap()).unwrap();
                assert_eq!(sent.payload[..2], kind);
                assert_eq!(sent.transport_sum(), u16::MAX);
                let (verdict, sent) = rejected(&mut world, side, &later, 0);
                assert_eq!((verdict, sent), (Verdict::SlowFragment, None));
            }
        }
    }
}

#[test]
fn a_flow_that_the_rules_no_longer_allow_ends_with_an_answer() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        let mut world = denying(true);
        world.rules = Box::new(|_| Some(0));
        let syn = Ip::tcp(peer, server, SYN, &[], 0).ports(3000, 80);
        up(&mut world, &syn).unwrap();
        up(&mut world, &Ip::udp(peer, server, 10).ports(3000, 80)).unwrap();
        world.rules = Box::new(|_| None);
        world.settings.generation += 1;

        let data = |from, to| Ip::tcp(from, to, ACK, &[], 10).sequence(50, 60);
        let reset = |from, to| Ip::tcp(from, to, RST, &[], 0).sequence(60, 0);
        let sent = data(peer, server).ports(3000, 80);
        let got = reset_of(&mut world, Side::Overlay, &sent, 0);
        same_reset(&got, &reset(server, peer).ports(80, 3000));
        // The server knows the peer by the external address.
        let external = ip(family.external);
        let reply = data(server, external).ports(80, 3000);
        let got = reset_of(&mut world, Side::Subnet, &reply, 0);
        same_reset(&got, &reset(external, server).ports(3000, 80));
        // An error about such a flow is not answered.
        let quoted = Ip::udp(external, server, 10).ports(3000, 80).bytes();
        let kind = if peer.is_ipv4() { [3, 3] } else { [1, 4] };
        let error = Ip::error(server, external, kind, 0, &quoted);
        let got = rejected(&mut world, Side::Subnet, &error, 0);
        assert_eq!(got, (Verdict::DropPolicy, None));
    }
}

#[test]
fn what_may_belong_to_an_allowed_flow_is_not_answered() {
    for family in FAMILIES {
        for side in Side::ALL {
            // The other end may open flows; this one was forgotten.
            let (source, destination) = ends(family, side);
            let mut world = denying(false);
            let opener = address(destination);
            world.rules = Box::new(move |tuple| (tuple.source == opener).then_some(0));
            let data = Ip::tcp(source, destination, ACK, &[], 10);
            for packet in [&data, &Ip::echo(source, destination).echo_reply()] {
                let mut packet = packet.clone();
                (packet.source, packet.destination) = (source, destination);
                let packet = packet.from(source);
                let got = rejected(&mut world, side, &packet, 0);
                assert_eq!(got, (Verdict::DropPolicy, None));
            }
            for packet in [
                Ip::tcp(source, destination, SYN, &[], 0),
                Ip::udp(source, destination, 9),
                Ip::echo(source, destination),
            ] {
                let verdict = rejected(&mut world, side, &packet, 0).0;
                assert_eq!(verdict, Verdict::RejectPolicy);
            }
        }
    }
}

#[test]
fn answers_have_their_limits() {
    for family in FAMILIES {
        let (peer, server) = ends(family, Side::Overlay);
        for packet in [Ip::udp(peer, server, 9), Ip::tcp(peer, server, SYN, &[], 0)] {
            let mut world = denying(false);
            world.errors.set(1);
            let verdict = rejected(&mut world, Side::Overlay, &packet, 0).0;
            assert_eq!(verdict, Verdict::RejectPolicy);
            let denied = (Verdict::DropPolicy, None);
            assert_eq!(rejected(&mut world, Side::Overlay, &packet, 0), denied);
            // Unless the settings say so, none is sent.
            world.errors.set(9);
            world.settings.flags &= !Settings::REJECT;
            assert_eq!(rejected(&mut world, Side::Overlay, &packet, 0), denied);
            assert_eq!(world.errors.get(), 9);
            // To the router itself, or to all hosts of a network.
            world.settings.flags |= Settings::REJECT;
            world.routing = Box::new(|_, _| Err(Verdict::SlowToRouter));
            let verdict = rejected(&mut world, Side::Overlay, &packet, 0).0;
            assert_eq!(verdict, Verdict::SlowToRouter);
            // Where else it would have gone makes no difference.
            world.routing = Box::new(|_, _| Err(Verdict::SlowFib));
            let verdict = rejected(&mut world, Side::Overlay, &packet, 0).0;
            assert_eq!(verdict, Verdict::RejectPolicy);
        }
    }
}
