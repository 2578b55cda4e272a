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
