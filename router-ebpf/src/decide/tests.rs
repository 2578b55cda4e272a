#![allow(clippy::unwrap_used)]
use std::net::IpAddr;

use super::*;
use crate::abi::{Address, Link, Overlay, Route};
use crate::craft::{ACK, Ip, SYN, frame, mss};
use crate::frame::Bytes;
use crate::memory::Memory;
use crate::tables::{Hop, fib_failure};
use crate::world::World;

const TUN: u32 = 7;
const NIC: u32 = 3;
const MAC: [u8; 12] = [6; 12];

fn v4(octets: [u8; 4]) -> Prefix {
    Prefix::cidr(Address::v4(octets), 8)
}

/// A router with 100.0.0.0/8 in the tunnel and 10.0.0.0/8 behind its NIC.
fn router(route: u32) -> World {
    let mut world = World::new(Settings {
        tun: TUN,
        mtu: 1420,
        flags: Settings::FIB_MTU,
        generation: 1,
        flows_per_source: 10,
        flows_from_subnet: 10,
        ports: [1024, 2047],
        kept_ports: [1024, u16::MAX],
        ..Settings::default()
    });
    world.ingress = [TUN, NIC];
    world.overlay = vec![(v4([100, 0, 0, 0]), Overlay::of(1))];
    world.routes = vec![(v4([10, 0, 0, 0]), Route { flags: route })];
    let link = Link {
        mtu: 1500,
        ..Link::default()
    };
    world.links.insert(NIC, link);
    answer(&mut world, 1500);
    world
}

/// The kernel routes peers to the TUN device and all else to the NIC.
fn answer(world: &mut World, mtu: u32) {
    world.routing = Box::new(move |packet, _| {
        let to_peer = packet.tuple.destination.octets[0] == 100;
        Ok(Hop {
            gateway: [0; 4],
            link: if to_peer { TUN } else { NIC },
            mtu: if to_peer { u32::MAX } else { mtu },
            resolved: !to_peer,
            hardware: Bytes(MAC),
        })
    });
}

fn ends(side: Side) -> (IpAddr, IpAddr) {
    let (peer, near) = ([100, 64, 0, 2].into(), [10, 0, 0, 2].into());
    match side {
        Side::Overlay => (peer, near),
        Side::Subnet => (near, peer),
    }
}

fn run(world: &mut World, side: Side, ip: &Ip) -> (Verdict, Option<Forward>) {
    let bytes = match side {
        Side::Overlay => ip.bytes(),
        Side::Subnet => frame([2; 6], [4; 6], &ip.bytes()),
    };
    world.run(side, &mut Memory::new(side, bytes, 0))
}

/// The MSS that leaves of a SYN whose only option it is.
fn announced(world: &mut World, side: Side, syn: &Ip) -> u16 {
    let bytes = match side {
        Side::Overlay => syn.bytes(),
        Side::Subnet => frame([2; 6], [4; 6], &syn.bytes()),
    };
    let mut memory = Memory::new(side, bytes, 0);
    assert_eq!(world.run(side, &mut memory).0, Verdict::Forwarded);
    let left = Ip::read(&memory.bytes[memory.offset..]).unwrap();
    u16::from_be_bytes([left.payload[22], left.payload[23]])
}

fn udp(side: Side) -> Ip {
    let (source, destination) = ends(side);
    Ip::udp(source, destination, 72)
}

#[test]
fn a_routed_packet_of_a_peer_goes_on() {
    let mut world = router(0);
    let (verdict, up) = run(&mut world, Side::Overlay, &udp(Side::Overlay));
    assert_eq!(verdict, Verdict::Forwarded);
    let up = up.unwrap();
    assert_eq!((up.exit, up.link, up.hardware), (Exit::Ethernet, NIC, MAC));
    let (verdict, down) = run(&mut world, Side::Subnet, &udp(Side::Subnet));
    assert_eq!(verdict, Verdict::Forwarded);
    let down = down.unwrap();
    assert_eq!((down.exit, down.link), (Exit::Tun, TUN));
}

#[test]
fn the_smallest_mtu_of_both_ways_clamps_a_syn() {
    for side in Side::ALL {
        let (source, destination) = ends(side);
        let syn = Ip::tcp(source, destination, SYN, &mss(9000), 0);
        let mut world = router(0);
        let mut clamp = |change: &dyn Fn(&mut World)| {
            change(&mut world);
            world.clear();
            announced(&mut world, side, &syn)
        };
        assert_eq!(clamp(&|_| ()), 1420 - 40);
        assert_eq!(clamp(&|world| world.settings.mtu = 9000), 1500 - 40);
        let of_path = clamp(&|world| answer(world, 1300));
        let wanted = match side {
            Side::Overlay => 1300 - 40,
            // The path back is not known here; the overlay's SYN is where it counts.
            Side::Subnet => 1500 - 40,
        };
        assert_eq!(of_path, wanted);
    }
}

#[test]
fn addresses_come_before_all_else() {
    for side in Side::ALL {
        let stranger = match side {
            Side::Overlay => Verdict::DropSpoofed,
            Side::Subnet => Verdict::PassUnrelated,
        };
        // Backward: a source in the subnet from the tunnel, and the other way round.
        let mut odd = udp(side.other());
        odd.fragment = 7;
        odd.ttl = 0;
        assert_eq!(run(&mut router(0), side, &odd).0, stranger);
        let (source, destination) = ends(side);
        (odd.source, odd.destination) = (source, destination);
        let mut world = router(0);
        world.routes.clear();
        assert_eq!(run(&mut world, side, &odd).0, Verdict::SlowNotRouted);
        assert_eq!(run(&mut router(0), side, &odd).0, Verdict::SlowFragment);
    }
}

#[test]
fn what_the_kernel_must_translate_is_left_to_it() {
    for side in Side::ALL {
        let mut stack = router(Route::SNAT | Route::STACK);
        let verdict = run(&mut stack, side, &udp(side)).0;
        assert_eq!(verdict, Verdict::SlowStackRoute);
    }
    // Without an external address, and in the middle of a connection.
    let (source, destination) = ends(Side::Overlay);
    let mut world = router(Route::SNAT);
    let udp = run(&mut world, Side::Overlay, &udp(Side::Overlay)).0;
    assert_eq!(udp, Verdict::SlowSnat);
    let ack = Ip::tcp(source, destination, ACK, &[], 10);
    let ack = run(&mut world, Side::Overlay, &ack).0;
    assert_eq!(ack, Verdict::SlowNoFlow);
}

#[test]
fn both_directions_agree_on_the_interfaces() {
    let other = |link| -> crate::world::Routing {
        Box::new(move |_, _| {
            Ok(Hop {
                gateway: [0; 4],
                link,
                mtu: 1500,
                resolved: true,
                hardware: Bytes(MAC),
            })
        })
    };
    let mut world = router(0);
    world.routing = other(9);
    let up = run(&mut world, Side::Overlay, &udp(Side::Overlay)).0;
    assert_eq!(up, Verdict::SlowOtherLink);

    world.routing = other(NIC);
    let down = run(&mut world, Side::Subnet, &udp(Side::Subnet)).0;
    assert_eq!(down, Verdict::SlowOtherLink);

    let mut world = router(0);
    world.ingress = [TUN, 9];
    let down = run(&mut world, Side::Subnet, &udp(Side::Subnet)).0;
    assert_eq!(down, Verdict::SlowOtherLink);
}

#[test]
fn a_refused_lookup_keeps_its_reason() {
    for code in 1..=9 {
        let wanted = fib_failure(code);
        let mut world = router(0);
        world.routing = Box::new(move |_, _| Err(wanted));
        let up = run(&mut world, Side::Overlay, &udp(Side::Overlay)).0;
        assert_eq!(up, wanted);
    }
    assert_eq!(fib_failure(-22), Verdict::SlowFib);
}

#[test]
fn what_may_be_cut_is_translated_before_the_kernel_cuts_it() {
    // The second kernel tells no MTU, and is asked with the packet's length.
    for flags in [Settings::FIB_MTU, 0] {
        let mut world = router(Route::SNAT);
        world.settings.flags = flags;
        let link = world.links.get_mut(&NIC).unwrap();
        (link.v4[0], link.v4_count) = ([10, 0, 0, 9], 1);
        world.routing = Box::new(move |_, len| {
            if flags == 0 && len > 1280 {
                return Err(Verdict::SlowMtu);
            }
            let (link, mtu, hardware) = (NIC, if flags == 0 { 0 } else { 1280 }, Bytes(MAC));
            Ok(Hop {
                gateway: [0; 4],
                link,
                mtu,
                resolved: true,
                hardware,
            })
        });
        let (source, destination) = ends(Side::Overlay);
        let mut sent = Ip::udp(source, destination, 1300).ports(3000, 80);
        let (verdict, forward) = run(&mut world, Side::Overlay, &sent);
        assert_eq!(verdict, Verdict::SlowMtu);
        assert!(forward.is_none(), "{flags}: the kernel tells the peer");

        sent.fragment = 0;
        let mut memory = Memory::new(Side::Overlay, sent.bytes(), 0);
        let (verdict, forward) = world.run(Side::Overlay, &mut memory);
        let exit = forward.map(|forward| forward.exit);
        assert_eq!(
            (verdict, exit),
            (Verdict::SlowMtu, Some(Exit::Stack)),
            "{flags}"
        );
        let handed = Ip::read(&memory.bytes[memory.offset..]).unwrap();
        assert_eq!(handed.source, IpAddr::from([10, 0, 0, 9]), "{flags}");
    }
}

#[test]
fn a_routes_own_mtu_counts_both_ways() {
    let mut world = router(0);
    let own = Route { flags: 0 }.with_mtu(1300);
    world.routes = vec![(v4([10, 0, 0, 0]), own)];
    for side in Side::ALL {
        let (source, destination) = ends(side);
        let syn = Ip::tcp(source, destination, SYN, &mss(9000), 0);
        assert_eq!(announced(&mut world, side, &syn), 1300 - 40);
    }
    let up = |len| {
        let (source, destination) = ends(Side::Overlay);
        Ip::udp(source, destination, len)
    };
    let (verdict, forward) = run(&mut world, Side::Overlay, &up(1300 - 28));
    assert_eq!(verdict, Verdict::Forwarded, "{forward:?}");
    assert_eq!(
        run(&mut world, Side::Overlay, &up(1301 - 28)).0,
        Verdict::SlowMtu
    );
}

#[test]
fn what_the_kernel_gets_of_a_judged_flow_it_takes_as_it_is() {
    for (route, opener) in [
        (0, Side::Overlay),
        (0, Side::Subnet),
        (Route::SNAT, Side::Subnet),
    ] {
        let mut world = router(route);
        assert_eq!(run(&mut world, opener, &udp(opener)).0, Verdict::Forwarded);
        for side in Side::ALL {
            let ip = if side == opener {
                udp(side)
            } else {
                udp(side).ports(53, 40_000)
            };
            let bytes = match side {
                Side::Overlay => ip.bytes(),
                Side::Subnet => frame([2; 6], [4; 6], &ip.bytes()),
            };
            let mut packet = Packet::default();
            crate::packet::parse(side, &Memory::new(side, bytes, 0), &mut packet).unwrap();
            let view = world.view(side);
            for verdict in [Verdict::SlowTtl, Verdict::SlowMtu, Verdict::SlowFragment] {
                assert!(is_judged(side, verdict, &packet, &view));
            }
            let moved = is_judged(side, Verdict::SlowOtherLink, &packet, &view);
            assert_eq!(moved, opener == Side::Subnet);
            for verdict in [Verdict::SlowNotRouted, Verdict::SlowNoFlow] {
                assert!(!is_judged(side, verdict, &packet, &view));
            }
            packet.tuple.ports[0] = [1, 1];
            assert!(
                !is_judged(side, Verdict::SlowTtl, &packet, &view),
                "no flow"
            );
        }
    }
}
