//! Kinds of packets, and the verdict that each must meet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lab::packet::Packet;
use router_ebpf::abi::Side;
use router_ebpf::verdict::Verdict;

use super::bed::{GATEWAY_MAC, MTU, ROUTER_MAC};
use crate::generator::packet::sum;
use crate::packet::{self, Segment, TTL, ip_header, pseudo_sum};

/// The first of the ports that flows come from, and how many there are. All are kept when the
/// source is translated.
const PORTS: (u16, u32) = (1024, 30_000);
/// The first of the ports that flows go to.
pub(super) const SERVICE: u16 = 443;
/// MSS that a SYN announces: as on a jumbo link.
const MSS: u16 = 8960;

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        }
    }

    /// The n-th overlay address.
    pub(super) fn overlay(self, n: u32) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 1, 0)) + n).into(),
            Self::V6 => six(0xfd64, n, 0),
        }
    }

    /// Host 1 of the n-th network of those whose sources are translated, or of those whose are
    /// not; its prefix is /28 or /64.
    pub(super) fn subnet(self, nat: bool, n: u32) -> IpAddr {
        let (v4, v6) = match nat {
            true => (Ipv4Addr::new(172, 16, 0, 1), 0x3ffe),
            false => (Ipv4Addr::new(10, 0, 0, 1), 0x2001),
        };
        match self {
            Self::V4 => Ipv4Addr::from(u32::from(v4) + 16 * n).into(),
            Self::V6 => six(v6, n, 1),
        }
    }

    /// Prefix length of a routed network.
    pub(super) fn routed(self) -> u8 {
        match self {
            Self::V4 => 28,
            Self::V6 => 64,
        }
    }

    /// The router's address on the subnet side.
    pub(super) fn router(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(192, 0, 2, 1).into(),
            Self::V6 => six(0x2001, 0xffff_0000, 1),
        }
    }

    /// An address that is neither in the overlay nor routed.
    fn foreign(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(198, 51, 100, 7).into(),
            Self::V6 => six(0x3fff, 7, 7),
        }
    }
}

fn six(first: u16, net: u32, host: u16) -> IpAddr {
    let (high, low) = ((net >> 16) as u16, net as u16);
    Ipv6Addr::new(first, 0xdb8, high, low, 0, 0, 0, host).into()
}

/// What kind of packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum What {
    /// 64 bytes of UDP of a flow that the fast path carries.
    Udp,
    /// TCP data of a flow that the fast path carries.
    Tcp,
    /// A SYN whose MSS is clamped, of a flow that is there already.
    Syn,
    /// UDP, each packet the first of its flow.
    New,
    /// A source that is no peer's, or from the subnet's side a packet of no concern to us: the
    /// underlay's own.
    Foreign,
}

/// A kind of packet through one of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    pub(super) side: Side,
    pub(super) family: Family,
    pub(super) what: What,
    /// Whether the flow's source is translated.
    pub(super) nat: bool,
}

/// The two ends of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    /// The peer's end, or what stands for it.
    pub(super) overlay: SocketAddr,
    pub(super) subnet: SocketAddr,
}

impl Kind {
    /// IPv4.
    pub(super) fn v4(side: Side, what: What, nat: bool) -> Self {
        Self {
            side,
            family: Family::V4,
            what,
            nat,
        }
    }

    pub(super) fn all() -> impl Iterator<Item = Self> {
        let kinds = [
            (What::Udp, false),
            (What::Udp, true),
            (What::Tcp, false),
            (What::Tcp, true),
            (What::Syn, false),
            (What::New, false),
            (What::New, true),
            (What::Foreign, false),
        ];
        Side::ALL
            .into_iter()
            .flat_map(move |side| kinds.map(|(what, nat)| (side, what, nat)))
            // The subnet opens no flow whose sources are translated.
            .filter(|kind| !matches!(kind, (Side::Subnet, What::New, true)))
            .flat_map(|(side, what, nat)| {
                Family::ALL.map(|family| Self {
                    family,
                    ..Self::v4(side, what, nat)
                })
            })
    }

    pub(super) fn name(self) -> String {
        let what = match (self.what, self.side) {
            (What::Udp, _) => "udp",
            (What::Tcp, _) => "tcp",
            (What::Syn, _) => "syn-clamp",
            (What::New, _) => "new-flow",
            (What::Foreign, Side::Overlay) => "spoofed",
            (What::Foreign, Side::Subnet) => "unrelated",
        };
        let nat = if self.nat { "nat-" } else { "" };
        format!("{}-{nat}{what}-{}", self.side.label(), self.family.name())
    }

    pub(super) fn verdict(self) -> Verdict {
        match (self.what, self.side) {
            (What::Udp | What::Tcp | What::Syn | What::New, _) => Verdict::Forwarded,
            (What::Foreign, Side::Overlay) => Verdict::DropSpoofed,
            (What::Foreign, Side::Subnet) => Verdict::PassUnrelated,
        }
    }

    /// Whether the packets belong to flows that were opened before.
    pub(super) fn is_established(self) -> bool {
        matches!(self.what, What::Udp | What::Tcp | What::Syn)
    }

    /// The ends of the n-th flow of all, between the `peer`-th peer and the `network`-th network.
    pub(super) fn ends(self, n: u32, peer: u32, network: u32) -> Ends {
        let foreign = self.family.foreign();
        let (overlay, subnet) = match (self.what, self.side) {
            (What::Foreign, Side::Overlay) => (foreign, self.family.subnet(self.nat, network)),
            (What::Foreign, Side::Subnet) => (self.family.router(), foreign),
            _ => (
                self.family.overlay(peer),
                self.family.subnet(self.nat, network),
            ),
        };
        let (first, ports) = PORTS;
        Ends {
            overlay: SocketAddr::new(overlay, first + (n % ports) as u16),
            subnet: SocketAddr::new(subnet, SERVICE + (n / ports) as u16),
        }
    }

    /// The ends as the subnet knows them: a translated flow keeps its port.
    pub(super) fn outside(self, ends: Ends) -> Ends {
        let overlay = match self.nat {
            true => SocketAddr::new(self.family.router(), ends.overlay.port()),
            false => ends.overlay,
        };
        Ends { overlay, ..ends }
    }

    /// The ends as packets that the program gets name them.
    pub(super) fn seen(self, ends: Ends) -> Ends {
        match (self.what, self.side) {
            (What::Foreign, _) | (_, Side::Overlay) => ends,
            (_, Side::Subnet) => self.outside(ends),
        }
    }

    /// The packet between such ends, as the program gets it.
    pub(super) fn frame(self, ends: Ends) -> Vec<u8> {
        let (from, to) = match self.side {
            Side::Overlay => (ends.overlay, ends.subnet),
            Side::Subnet => (ends.subnet, ends.overlay),
        };
        let packet = match self.what {
            What::Udp | What::New | What::Foreign => packet::udp(from, to, 64),
            What::Tcp => {
                let data = Segment {
                    flags: packet::ACK,
                    payload: 64,
                    ..Segment::default()
                };
                packet::tcp(from, to, data)
            }
            What::Syn => {
                let [high, low] = MSS.to_be_bytes();
                let syn = Segment {
                    flags: packet::SYN,
                    options: &[2, 4, high, low],
                    ..Segment::default()
                };
                packet::tcp(from, to, syn)
            }
        };
        match self.side {
            Side::Overlay => packet,
            Side::Subnet => {
                let ether_type: [u8; 2] = match self.family {
                    Family::V4 => [0x08, 0x00],
                    Family::V6 => [0x86, 0xdd],
                };
                [&ROUTER_MAC[..], &GATEWAY_MAC, &ether_type, &packet].concat()
            }
        }
    }

    /// The kind of packet from the overlay that opens the flow.
    pub(super) fn opening(self) -> Self {
        let what = match self.what {
            What::Tcp => What::Syn,
            what => what,
        };
        Self {
            side: Side::Overlay,
            what,
            ..self
        }
    }

    /// Where a packet that the program has carried comes from and goes to, by its bytes with their
    /// Ethernet header; `None` unless it was changed as it must, checksums included.
    pub(super) fn carried(self, frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
        let bytes = frame.get(14..)?;
        let packet = Packet::parse(bytes)?;
        let header = ip_header(packet.source);
        let whole = sum(&bytes[header..], pseudo_sum(bytes).into()) == u16::MAX
            && (packet.source.is_ipv6() || sum(&bytes[..header], 0) == u16::MAX);
        let mss = MTU - header as u16 - 20;
        let clamped = self.what != What::Syn || packet.syn_mss() == Some(mss);
        if packet.ttl != TTL - 1 || !whole || !clamped {
            return None;
        }
        let (from, to) = packet.ports()?;
        Some((
            SocketAddr::new(packet.source, from),
            SocketAddr::new(packet.destination, to),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_packet_one_hop_on_was_carried() {
        for kind in Kind::all().filter(|kind| kind.side == Side::Subnet) {
            let ends = kind.ends(50_001, 3, 5);
            let mut frame = kind.frame(ends);
            assert_eq!(kind.carried(&frame), None, "{}", kind.name());
            // As the program does, but for the MSS.
            let ttl = if kind.family == Family::V4 { 22 } else { 21 };
            frame[ttl] -= 1;
            if kind.family == Family::V4 {
                assert_eq!(kind.carried(&frame), None, "the header's checksum");
                frame[24] += 1;
            }
            let wanted = (kind.what != What::Syn).then_some((ends.subnet, ends.overlay));
            assert_eq!(kind.carried(&frame), wanted, "{}", kind.name());
        }
    }

    #[test]
    fn no_two_flows_have_the_same_ends() {
        let kind = Kind::v4(Side::Overlay, What::Udp, true);
        let ends: std::collections::HashSet<_> = (0..200_000)
            .map(|n| kind.ends(n, 0, 0))
            .map(|ends| (ends.overlay, ends.subnet))
            .collect();
        assert_eq!(ends.len(), 200_000);
    }
}
