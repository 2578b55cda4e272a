//! A router with peers and servers of both families, for the tests of all modules.
#![allow(clippy::unwrap_used)]

use std::net::IpAddr;

use crate::abi::{Address, Link, Overlay, Prefix, Route, Settings, Side};
use crate::craft::{Ip, TCP, frame, sum};
use crate::forward::Exit;
use crate::frame::Bytes;
use crate::memory::Memory;
use crate::tables::Hop;
use crate::verdict::Verdict;
use crate::world::World;

pub(crate) const TUN: u32 = 7;
pub(crate) const NIC: u32 = 3;
/// Flows of one source, at most.
pub(crate) const LIMIT: u32 = 40;

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => Address::v4(ip.octets()),
        IpAddr::V6(ip) => Address::v6(ip.octets()),
    }
}

/// Addresses of one family.
#[derive(Clone, Copy)]
pub(crate) struct Family {
    pub(crate) peers: [&'static str; 3],
    pub(crate) servers: [&'static str; 2],
    pub(crate) external: &'static str,
}

pub(crate) const V4: Family = Family {
    peers: ["100.64.0.2", "100.64.0.3", "100.64.0.4"],
    servers: ["10.0.0.2", "10.0.0.3"],
    external: "10.0.0.254",
};
pub(crate) const V6: Family = Family {
    peers: ["fd64::2", "fd64::3", "fd64::4"],
    servers: ["2001:db8::2", "2001:db8::3"],
    external: "2001:db8::fe",
};
pub(crate) const FAMILIES: [Family; 2] = [V4, V6];

/// A router that translates (or not), with few ports to choose from.
pub(crate) fn router(snat: bool) -> World {
    let mut world = World::new(Settings {
        tun: TUN,
        mtu: 1420,
        flags: Settings::FIB_MTU,
        generation: 1,
        flows_per_source: LIMIT,
        flows_from_subnet: 2 * LIMIT,
        kept_ports: [1024, 60_999],
        ports: [2000, 2015],
        ..Settings::default()
    });
    world.ingress = [TUN, NIC];
    for family in FAMILIES {
        for (number, peer) in (1..).zip(family.peers) {
            world
                .overlay
                .push((Prefix::host(address(ip(peer))), Overlay::of(number)));
        }
        for server in family.servers {
            let flags = if snat { Route::SNAT } else { 0 };
            let route = (Prefix::host(address(ip(server))), Route { flags });
            world.routes.push(route);
        }
    }
    let mut link = Link {
        mtu: 1500,
        v4_count: 1,
        v6_count: 1,
        ..Link::default()
    };
    link.v4[0] = address(ip(V4.external)).v4_octets();
    link.v6[0] = address(ip(V6.external)).octets;
    world.links.insert(NIC, link);
    world.routing = Box::new(|packet, _| {
        let [first, second, ..] = packet.tuple.destination.octets;
        let to_peer = first == 100 || [first, second] == [0xfd, 0x64];
        Ok(Hop {
            gateway: [0; 4],
            link: if to_peer { TUN } else { NIC },
            mtu: 1500,
            resolved: !to_peer,
            hardware: Bytes([6; 12]),
        })
    });
    world
}

/// A packet through the program of `side`, and what leaves.
pub(crate) fn through(world: &mut World, side: Side, packet: &Ip) -> Result<Ip, Verdict> {
    let bytes = match side {
        Side::Overlay => packet.bytes(),
        Side::Subnet => frame([2; 6], [4; 6], &packet.bytes()),
    };
    let mut memory = Memory::new(side, bytes, 0);
    match world.run(side, &mut memory) {
        (Verdict::Forwarded, Some(forward)) => {
            assert!(matches!(
                forward.exit,
                Exit::Tun | Exit::Ethernet | Exit::Neighbour
            ));
            Ok(Ip::read(&memory.bytes[memory.offset..]).unwrap())
        }
        (verdict, _) => Err(verdict),
    }
}

pub(crate) fn up(world: &mut World, packet: &Ip) -> Result<Ip, Verdict> {
    through(world, Side::Overlay, packet)
}

pub(crate) fn down(world: &mut World, packet: &Ip) -> Result<Ip, Verdict> {
    through(world, Side::Subnet, packet)
}

/// What an error costs its sender: the whole packet in one line.
pub(crate) fn same(left: &Ip, right: &Ip) {
    assert_eq!(left.bytes(), right.bytes(), "{left:?}\nis not\n{right:?}");
}

/// Checks that `error` is `wanted` but for the checksum of the TCP or UDP packet that it quotes, and
/// that its own checksum is right, also when a device then fills in the quoted one.
pub(crate) fn same_error(error: &Ip, wanted: &Ip) {
    let v4 = error.source.is_ipv4();
    let transport = 8 + if v4 { 20 } else { 40 };
    let protocol = error.payload[8 + if v4 { 9 } else { 6 }];
    let at = transport + if protocol == TCP { 16 } else { 6 };
    let mut filled = error.clone();
    filled.payload[at..at + 2].fill(0);
    // What the device starts from, and so what is under the checksum twice.
    let start = [error.payload[at], error.payload[at + 1]];
    let before = [&filled.payload[transport..], &start[..]].concat();
    let computed = !sum(&before);
    filled.payload[at..at + 2].copy_from_slice(&computed.to_be_bytes());
    for error in [error, &filled] {
        assert_eq!(error.transport_sum(), u16::MAX, "checksum of the error");
    }
    let but_for_checksums = |ip: &Ip| {
        let mut ip = ip.clone();
        for at in [2, at] {
            ip.payload[at..at + 2].fill(0);
        }
        (ip.fragment, ip.id) = (0, 0);
        ip
    };
    same(&but_for_checksums(error), &but_for_checksums(wanted));
}
