//! Kinds of packets, and the verdict that each must meet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use router_ebpf::abi::Side;
use router_ebpf::verdict::Verdict;

use super::bed::{GATEWAY_MAC, ROUTER_MAC};
use crate::packet::{self, Segment};

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
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

    /// Host 1 of the n-th routed network; its prefix is /28 or /64.
    pub(super) fn subnet(self, n: u32) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 1)) + 16 * n).into(),
            Self::V6 => six(0x2001, n, 1),
        }
    }

    /// Prefix length of a routed network.
    pub(super) fn routed(self) -> u8 {
        match self {
            Self::V4 => 28,
            Self::V6 => 64,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// 64 bytes of UDP of a flow that the fast path carries.
    Udp,
    /// TCP data of a flow that the fast path carries.
    Tcp,
    /// A SYN whose MSS is clamped.
    Syn,
    /// A source that is no peer's, or from the subnet's side a packet of no concern to us, such as
    /// the underlay's own.
    Foreign,
}

/// A kind of packet through one of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) side: Side,
    pub(super) family: Family,
    pub(super) what: What,
}

impl Kind {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        let kinds = [What::Udp, What::Tcp, What::Syn, What::Foreign];
        Side::ALL.into_iter().flat_map(move |side| {
            kinds.into_iter().flat_map(move |what| {
                [Family::V4, Family::V6].map(|family| Self { side, family, what })
            })
        })
    }

    pub(super) fn name(self) -> String {
        let what = match (self.what, self.side) {
            (What::Udp, _) => "udp",
            (What::Tcp, _) => "tcp",
            (What::Syn, _) => "syn-clamp",
            (What::Foreign, Side::Overlay) => "spoofed",
            (What::Foreign, Side::Subnet) => "unrelated",
        };
        format!("{}-{what}-{}", self.side.label(), self.family.name())
    }

    pub(super) fn verdict(self) -> Verdict {
        match (self.what, self.side) {
            (What::Udp | What::Tcp | What::Syn, _) => Verdict::Forwarded,
            (What::Foreign, Side::Overlay) => Verdict::DropSpoofed,
            (What::Foreign, Side::Subnet) => Verdict::PassUnrelated,
        }
    }

    /// The packet between the `overlay`-th peer and the `route`-th network, as the program sees it.
    pub(super) fn frame(self, overlay: u32, route: u32) -> Vec<u8> {
        let inside = match self.what {
            What::Foreign => self.family.foreign(),
            _ => self.family.overlay(overlay),
        };
        let inside = SocketAddr::new(inside, 40_000);
        let outside = SocketAddr::new(self.family.subnet(route), 443);
        let (from, to) = match self.side {
            Side::Overlay => (inside, outside),
            Side::Subnet => (outside, inside),
        };
        /// MSS 8960, as on a jumbo link.
        const MSS: [u8; 4] = [2, 4, 0x23, 0x00];
        let (data, syn) = (Segment::default(), Segment::default());
        let packet = match self.what {
            What::Udp | What::Foreign => packet::udp(from, to, 64),
            What::Tcp => {
                let flags = packet::ACK;
                packet::tcp(
                    from,
                    to,
                    Segment {
                        flags,
                        payload: 64,
                        ..data
                    },
                )
            }
            What::Syn => {
                let flags = packet::SYN;
                packet::tcp(
                    from,
                    to,
                    Segment {
                        flags,
                        options: &MSS,
                        ..syn
                    },
                )
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
}
