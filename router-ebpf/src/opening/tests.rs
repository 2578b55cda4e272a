#![allow(clippy::unwrap_used)]
use super::*;
use crate::craft::{ACK, Ip, SYN, frame};
use crate::memory::Memory;
use crate::packet::parse;
use crate::site::{FAMILIES, Family, address, ip, router};
use crate::world::World;

/// What is told of a packet of these bytes.
fn told(world: &World, side: Side, bytes: Vec<u8>) -> u32 {
    let bytes = match side {
        Side::Overlay => bytes,
        Side::Subnet => frame([2; 6], [4; 6], &bytes),
    };
    let memory = Memory::new(side, bytes, 0);
    let mut packet = Packet::default();
    parse(side, &memory, &mut packet).unwrap();
    let view = world.view(side);
    match opening(side, &mut packet, &memory, &view) {
        DENIED => denied(side, &packet, &view),
        told => told,
    }
}

fn ends(family: Family, side: Side) -> [std::net::IpAddr; 2] {
    let (peer, server) = (ip(family.peers[0]), ip(family.servers[0]));
    match side {
        Side::Overlay => [peer, server],
        Side::Subnet => [server, peer],
    }
}

#[test]
fn what_begins_a_flow_is_told_as_the_policy_says() {
    for family in FAMILIES {
        for side in Side::ALL {
            let [source, destination] = ends(family, side);
            let syn = |port| Ip::tcp(source, destination, SYN, &[], 0).ports(4000, port);
            let mut world = router(true);
            assert_eq!(told(&world, side, syn(80).bytes()), PERMITTED);
            world.settings.bank = 1;
            world.rules = Box::new(|tuple| (tuple.ports[1] == [0, 80]).then_some(0));
            assert_eq!(told(&world, side, syn(80).bytes()), PERMITTED);
            assert_eq!(told(&world, side, syn(81).bytes()), DENIED);
            // A direction without rules is open.
            world.settings.flags |= match side {
                Side::Overlay => Settings::OPEN_FROM_OVERLAY,
                Side::Subnet => Settings::OPEN_TO_OVERLAY,
            };
            assert_eq!(told(&world, side, syn(81).bytes()), PERMITTED);
        }
    }
}

#[test]
fn what_may_be_of_a_flow_from_the_other_end_is_silent() {
    for family in FAMILIES {
        for side in Side::ALL {
            let [source, destination] = ends(family, side);
            let mut world = router(true);
            world.settings.bank = 1;
            let opener = address(destination);
            world.rules = Box::new(move |tuple| (tuple.source == opener).then_some(0));
            let tcp = |flags| Ip::tcp(source, destination, flags, &[], 10).bytes();
            assert_eq!(told(&world, side, tcp(ACK)), SILENT);
            assert_eq!(told(&world, side, tcp(SYN)), DENIED);
            world.rules = Box::new(|_| None);
            assert_eq!(told(&world, side, tcp(ACK)), DENIED);
        }
    }
    // From peer to peer.
    for family in FAMILIES {
        let [one, other, _] = family.peers.map(ip);
        let mut world = router(true);
        world.settings.bank = 1;
        world.rules = Box::new(move |tuple| (tuple.source == address(other)).then_some(0));
        let reply = Ip::tcp(one, other, ACK, &[], 10).bytes();
        assert_eq!(told(&world, Side::Overlay, reply), SILENT);
    }
}

/// The packet with these bytes behind its IP header, which announces what `next` is.
fn with_headers(packet: &Ip, headers: &[u8], next: u8) -> Vec<u8> {
    let bytes = packet.bytes();
    let v4 = packet.source.is_ipv4();
    let (header, payload) = bytes.split_at(if v4 { 20 } else { 40 });
    let mut header = header.to_vec();
    if v4 {
        header[0] += headers.len() as u8 / 4;
        header[3] += headers.len() as u8;
    } else {
        header[5] += headers.len() as u8;
        header[6] = next;
    }
    [&header[..], headers, payload].concat()
}

#[test]
fn ports_are_found_behind_options() {
    for family in FAMILIES {
        let [source, destination] = ends(family, Side::Overlay);
        let mut world = router(true);
        world.settings.bank = 1;
        world.rules =
            Box::new(|tuple| (tuple.protocol == UDP && tuple.ports[1] == [0, 53]).then_some(0));
        let to = |port| Ip::udp(source, destination, 9).ports(4000, port);
        let headers: &[(&[u8], u8)] = if source.is_ipv4() {
            &[(&[148, 4, 0, 0], 0)]
        } else {
            let padded = |next| [next, 0, 1, 4, 0, 0, 0, 0];
            &[
                (&padded(UDP), 0),
                (&[padded(60), padded(UDP)].concat(), 0),
                (
                    &[padded(IPV6_FRAGMENT), [UDP, 0, 0, 1, 0, 0, 0, 9]].concat(),
                    60,
                ),
            ]
        };
        for (headers, next) in headers {
            let of = |port| {
                told(
                    &world,
                    Side::Overlay,
                    with_headers(&to(port), headers, *next),
                )
            };
            assert_eq!([of(53), of(54)], [PERMITTED, DENIED], "{headers:?}");
        }
        if !source.is_ipv4() {
            // More headers than are looked through, and fewer than are announced.
            let long = [[60, 0, 1, 4, 0, 0, 0, 0]; 5].concat();
            let packet = with_headers(&to(53), &long, 60);
            assert_eq!(told(&world, Side::Overlay, packet), DENIED);
        }
    }
}
