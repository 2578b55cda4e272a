//! What becomes of a parsed packet. No packet byte is changed here.

use crate::abi::{Address, Prefix, Route, Settings, Side};
use crate::mss;
use crate::packet::{Packet, SYN, Transport};
use crate::verdict::Verdict;

/// What a decision looks up: the maps, and the kernel's routing.
pub trait Tables {
    /// The settings.
    fn settings(&self) -> Settings;

    /// Interface that the packet came in by.
    fn ingress(&self) -> u32;

    /// Whether `address` is one of a peer's allowed IPs.
    fn in_overlay(&self, address: &Prefix) -> bool;

    /// The advertised route with the longest prefix that contains `address`.
    fn route(&self, address: &Prefix) -> Option<Route>;

    /// MTU in bytes of a subnet-side NIC; `None` if `from_subnet` is not attached to it.
    fn link_mtu(&self, index: u32) -> Option<u32>;

    /// The kernel's answer where `packet` goes. The kernel judges [`Packet::segment_len`] by the
    /// path's MTU.
    fn next_hop(&self, packet: &Packet, settings: &Settings) -> Result<Hop, Verdict>;
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Interface index.
    pub link: u32,
    /// MTU of the path in bytes, `u32::MAX` where the kernel does not tell.
    pub mtu: u32,
    /// Destination, then source hardware address; zero toward the TUN device.
    pub hardware: [u8; 12],
}

/// A packet that the fast path carries, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Interface index to redirect to.
    pub link: u32,
    /// Hardware addresses, destination first, of the Ethernet header to put in front; `None`
    /// toward the TUN device.
    pub hardware: Option<[u8; 12]>,
    /// The largest MSS that a SYN may announce; `None` for what is no SYN.
    pub mss: Option<u16>,
}

/// Decides about `packet` in the program of `side`.
#[inline(always)]
pub fn decide<T: Tables>(side: Side, packet: &Packet, tables: &T) -> Result<Forward, Verdict> {
    let (overlay, subnet) = match side {
        Side::Overlay => (&packet.source, &packet.destination),
        Side::Subnet => (&packet.destination, &packet.source),
    };
    if !tables.in_overlay(overlay) {
        return Err(match side {
            Side::Overlay => Verdict::DropSpoofed,
            Side::Subnet => Verdict::PassUnrelated,
        });
    }
    let settings = tables.settings();
    check_route(tables.route(subnet), &settings)?;
    check_scope(&overlay.address)?;
    check_scope(&subnet.address)?;
    match packet.transport {
        Transport::Tcp | Transport::Udp | Transport::Icmp => {}
        Transport::Fragment => return Err(Verdict::SlowFragment),
        Transport::Options => return Err(Verdict::SlowOptions),
        Transport::Other => return Err(Verdict::SlowProtocol),
        Transport::Bad => return Err(Verdict::SlowTransport),
    }
    if packet.ttl <= 1 {
        return Err(Verdict::SlowTtl);
    }

    let hop = tables.next_hop(packet, &settings)?;
    let (near, hardware) = match side {
        Side::Overlay => (hop.link, Some(hop.hardware)),
        Side::Subnet if hop.link != settings.tun => return Err(Verdict::SlowOtherLink),
        Side::Subnet => (tables.ingress(), None),
    };
    // An interface that replies do not come back by would split the flow over two paths.
    let link_mtu = tables.link_mtu(near).ok_or(Verdict::SlowOtherLink)?;
    let mss = (packet.tcp_flags & SYN != 0).then(|| {
        // The segments that the announcement allows come the other way: every MTU on both sides
        // counts.
        let mtu = settings.mtu.min(link_mtu).min(hop.mtu);
        mss::for_mtu(mtu, packet.header_len)
    });
    Ok(Forward {
        link: hop.link,
        hardware,
        mss,
    })
}

/// Routes whose flows the kernel's connection tracking must see whole, both directions.
#[inline(always)]
fn check_route(route: Option<Route>, settings: &Settings) -> Result<(), Verdict> {
    let route = route.ok_or(Verdict::SlowNotRouted)?;
    if route.flags & Route::STACK != 0 {
        Err(Verdict::SlowStackRoute)
    } else if route.flags & Route::SNAT != 0 {
        Err(Verdict::SlowSnat)
    } else if settings.flags & Settings::POLICY != 0 {
        Err(Verdict::SlowPolicy)
    } else {
        Ok(())
    }
}

/// Addresses that a router must not forward, or forwards by rules of its own (RFC 1812, RFC 4007).
#[inline(always)]
fn check_scope(address: &Address) -> Result<(), Verdict> {
    let o = &address.octets;
    let special = if address.is_v4() {
        // 0/8, 127/8, 169.254/16, multicast, reserved and limited broadcast.
        matches!(o[0], 0 | 127 | 224..) || (o[0] == 169 && o[1] == 254)
    } else {
        // Multicast; fe80::/10; ::/96 with the unspecified and the loopback address.
        o[0] == 0xff || (o[0] == 0xfe && o[1] & 0xc0 == 0x80) || (o[0] == 0 && o[..12] == [0; 12])
    };
    if special {
        Err(Verdict::SlowScope)
    } else {
        Ok(())
    }
}

/// The verdict of a return code of `bpf_fib_lookup` (`BPF_FIB_LKUP_RET_*` in linux/bpf.h) that is
/// neither success (0) nor "no neighbour" on a device that has none.
#[inline(always)]
pub const fn fib_failure(code: i64) -> Verdict {
    match code {
        4 => Verdict::SlowToRouter,
        7 => Verdict::SlowNoNeighbour,
        8 => Verdict::SlowMtu,
        _ => Verdict::SlowFib,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::packet::{TCP, UDP};

    const TUN: u32 = 7;
    const NIC: u32 = 3;
    const MAC: [u8; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

    /// One peer network, one route and one next hop.
    struct Fake {
        settings: Settings,
        route: Option<Route>,
        hop: Result<Hop, Verdict>,
        ingress: u32,
    }

    fn toward(side: Side) -> Fake {
        let (link, ingress) = match side {
            Side::Overlay => (NIC, TUN),
            Side::Subnet => (TUN, NIC),
        };
        Fake {
            settings: Settings {
                abi_version: crate::abi::ABI_VERSION,
                tun: TUN,
                mtu: 1420,
                ..Settings::default()
            },
            route: Some(Route::default()),
            hop: Ok(Hop {
                link,
                mtu: u32::MAX,
                hardware: MAC,
            }),
            ingress,
        }
    }

    impl Tables for Fake {
        fn settings(&self) -> Settings {
            self.settings
        }

        fn ingress(&self) -> u32 {
            self.ingress
        }

        fn in_overlay(&self, address: &Prefix) -> bool {
            address.address.octets[0] == 100
        }

        fn route(&self, address: &Prefix) -> Option<Route> {
            self.route.filter(|_| address.address.octets[0] == 10)
        }

        fn link_mtu(&self, index: u32) -> Option<u32> {
            (index == NIC).then_some(1500)
        }

        fn next_hop(&self, _: &Packet, _: &Settings) -> Result<Hop, Verdict> {
            self.hop
        }
    }

    fn packet(side: Side) -> Packet {
        let peer = Prefix::host(Address::v4([100, 64, 0, 2]));
        let near = Prefix::host(Address::v4([10, 0, 0, 2]));
        let (source, destination) = match side {
            Side::Overlay => (peer, near),
            Side::Subnet => (near, peer),
        };
        Packet {
            source,
            destination,
            first_word: [0x45, 0, 0, 100],
            header_checksum: [0; 2],
            ttl: 64,
            protocol: UDP,
            ports: [[0, 1], [0, 2]],
            header_len: 20,
            len: 100,
            gso_size: 0,
            transport: Transport::Udp,
            tcp_flags: 0,
            transport_len: 8,
        }
    }

    fn syn(side: Side) -> Packet {
        Packet {
            protocol: TCP,
            transport: Transport::Tcp,
            tcp_flags: SYN,
            transport_len: 24,
            ..packet(side)
        }
    }

    fn verdict(side: Side, packet: &Packet, tables: &Fake) -> Verdict {
        decide(side, packet, tables).unwrap_err()
    }

    #[test]
    fn a_routed_packet_of_a_peer_goes_on() {
        let wanted = |link, hardware| Forward {
            link,
            hardware,
            mss: None,
        };
        let up = decide(
            Side::Overlay,
            &packet(Side::Overlay),
            &toward(Side::Overlay),
        );
        assert_eq!(up, Ok(wanted(NIC, Some(MAC))));
        let down = decide(Side::Subnet, &packet(Side::Subnet), &toward(Side::Subnet));
        assert_eq!(down, Ok(wanted(TUN, None)));
    }

    #[test]
    fn the_smallest_mtu_of_both_ways_clamps_a_syn() {
        for side in Side::ALL {
            let mut tables = toward(side);
            let mss = |tables: &Fake| decide(side, &syn(side), tables).unwrap().mss;
            assert_eq!(mss(&tables), Some(1420 - 40));
            tables.settings.mtu = 9000;
            assert_eq!(mss(&tables), Some(1500 - 40));
            tables.hop = tables.hop.map(|hop| Hop { mtu: 1300, ..hop });
            assert_eq!(mss(&tables), Some(1300 - 40));
        }
    }

    #[test]
    fn addresses_come_before_all_else() {
        for side in Side::ALL {
            let stranger = match side {
                Side::Overlay => Verdict::DropSpoofed,
                Side::Subnet => Verdict::PassUnrelated,
            };
            let mut odd = packet(side);
            odd.transport = Transport::Fragment;
            odd.ttl = 0;
            let other = match side {
                Side::Overlay => Side::Subnet,
                Side::Subnet => Side::Overlay,
            };
            let backward = Packet {
                source: packet(other).source,
                destination: packet(other).destination,
                ..odd
            };
            assert_eq!(verdict(side, &backward, &toward(side)), stranger);
            let mut tables = toward(side);
            tables.route = None;
            assert_eq!(verdict(side, &odd, &tables), Verdict::SlowNotRouted);
            assert_eq!(verdict(side, &odd, &toward(side)), Verdict::SlowFragment);
        }
    }

    #[test]
    fn flows_that_the_kernel_tracks_are_its_own() {
        for side in Side::ALL {
            let mut tables = toward(side);
            tables.settings.flags = Settings::POLICY;
            assert_eq!(verdict(side, &packet(side), &tables), Verdict::SlowPolicy);
            tables.route = Some(Route { flags: Route::SNAT });
            assert_eq!(verdict(side, &packet(side), &tables), Verdict::SlowSnat);
            tables.route = Some(Route {
                flags: Route::SNAT | Route::STACK,
            });
            assert_eq!(
                verdict(side, &packet(side), &tables),
                Verdict::SlowStackRoute
            );
        }
    }

    #[test]
    fn both_directions_agree_on_the_interfaces() {
        let mut tables = toward(Side::Overlay);
        tables.hop = tables.hop.map(|hop| Hop { link: 9, ..hop });
        let up = packet(Side::Overlay);
        assert_eq!(verdict(Side::Overlay, &up, &tables), Verdict::SlowOtherLink);

        let mut tables = toward(Side::Subnet);
        tables.ingress = 9;
        let down = packet(Side::Subnet);
        assert_eq!(
            verdict(Side::Subnet, &down, &tables),
            Verdict::SlowOtherLink
        );
        let mut tables = toward(Side::Subnet);
        tables.hop = tables.hop.map(|hop| Hop { link: NIC, ..hop });
        assert_eq!(
            verdict(Side::Subnet, &down, &tables),
            Verdict::SlowOtherLink
        );
    }

    #[test]
    fn special_addresses_are_the_kernels() {
        let v4 = |octets| check_scope(&Address::v4(octets)).is_err();
        let v6 = |text: &str| {
            let address: std::net::Ipv6Addr = text.parse().unwrap();
            check_scope(&Address::v6(address.octets())).is_err()
        };
        for octets in [
            [0, 0, 0, 0],
            [127, 0, 0, 1],
            [169, 254, 169, 254],
            [224, 0, 0, 1],
            [239, 1, 2, 3],
            [240, 0, 0, 1],
            [255, 255, 255, 255],
        ] {
            assert!(v4(octets), "{octets:?}");
        }
        for octets in [
            [1, 0, 0, 0],
            [126, 0, 0, 1],
            [169, 253, 0, 1],
            [223, 255, 255, 255],
        ] {
            assert!(!v4(octets), "{octets:?}");
        }
        for text in ["::", "::1", "::10.0.0.1", "fe80::1", "febf::1", "ff02::1"] {
            assert!(v6(text), "{text}");
        }
        for text in [
            "::ffff:10.0.0.1",
            "64:ff9b::1",
            "fec0::1",
            "fd00::1",
            "fe00::1",
            "2001:db8::1",
        ] {
            assert!(!v6(text), "{text}");
        }
    }

    #[test]
    fn a_refused_lookup_keeps_its_reason() {
        for code in 1..=9 {
            let wanted = fib_failure(code);
            let mut tables = toward(Side::Overlay);
            tables.hop = Err(wanted);
            let up = packet(Side::Overlay);
            assert_eq!(verdict(Side::Overlay, &up, &tables), wanted);
        }
        assert_eq!(fib_failure(-22), Verdict::SlowFib);
    }
}
