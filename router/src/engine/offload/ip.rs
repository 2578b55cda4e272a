//! Inner packets: addresses, lengths, ECN, and the headers that segmentation and coalescing know.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::engine::offload::checksum;

/// IP protocol number of TCP.
pub(crate) const TCP: u8 = 6;
/// IP protocol number of UDP.
pub(crate) const UDP: u8 = 17;

/// IP protocol number of ICMP.
pub(crate) const ICMP: u8 = 1;
/// IP protocol number of ICMPv6.
pub(crate) const ICMPV6: u8 = 58;

/// Length of an IPv4 header without options, in bytes.
pub(crate) const V4_HEADER: usize = 20;
/// Length of an IPv6 header, in bytes.
pub(crate) const V6_HEADER: usize = 40;
/// Where source and destination address stand in the two headers.
const V4_ADDRESSES: std::ops::Range<usize> = 12..20;
const V6_ADDRESSES: std::ops::Range<usize> = 8..40;

fn v4(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(IpAddr::V4(Ipv4Addr::from(octets)))
}

fn v6(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some(IpAddr::V6(Ipv6Addr::from(octets)))
}

/// Destination of an IP packet.
pub(crate) fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => v4(packet, 16),
        6 => v6(packet, 24),
        _ => None,
    }
}

/// Protocol of an IP packet; of IPv6 that of the first header.
pub(crate) fn protocol(packet: &[u8]) -> Option<u8> {
    match packet.first()? >> 4 {
        4 => packet.get(9),
        6 => packet.get(6),
        _ => None,
    }
    .copied()
}

/// Source of an IP packet.
pub(crate) fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => v4(packet, 12),
        6 => v6(packet, 8),
        _ => None,
    }
}

/// Where source and destination address stand in an IP packet.
pub(crate) fn addresses(packet: &[u8]) -> Option<std::ops::Range<usize>> {
    let addresses = match packet.first()? >> 4 {
        4 => V4_ADDRESSES,
        6 => V6_ADDRESSES,
        _ => return None,
    };
    (addresses.end <= packet.len()).then_some(addresses)
}

/// Source of an IP packet whose header is whole and whose length field says exactly `packet.len()`.
pub(crate) fn checked_source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 15) * 4;
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            (header >= V4_HEADER && header <= total && total == packet.len())
                .then(|| v4(packet, 12))
                .flatten()
        }
        6 => {
            let payload = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
            (payload + V6_HEADER == packet.len())
                .then(|| v6(packet, 8))
                .flatten()
        }
        _ => None,
    }
}

/// ECN bits of an IP packet (RFC 3168), 0 for anything else.
pub(crate) fn ecn(packet: &[u8]) -> u8 {
    match packet {
        [first, second, ..] => match first >> 4 {
            4 => second & 3,
            6 => (second >> 4) & 3,
            _ => 0,
        },
        _ => 0,
    }
}

/// Not ECN-capable.
const NOT_ECT: u8 = 0;
/// ECN-capable, second codepoint.
const ECT_1: u8 = 1;
/// ECN-capable, first codepoint.
const ECT_0: u8 = 2;
/// Congestion experienced.
const CE: u8 = 3;

/// Combines the ECN bits of an underlay packet into the packet it carried, by the table of
/// RFC 6040 section 4.2. False: the packet must be dropped (it met congestion and cannot say so).
#[must_use]
pub(crate) fn merge_ecn(packet: &mut [u8], outer: u8) -> bool {
    let outer = outer & 3;
    let inner = ecn(packet);
    let merged = match (inner, outer) {
        (NOT_ECT, CE) => return false,
        (ECT_0, ECT_1) => ECT_1,
        (ECT_0 | ECT_1, CE) => CE,
        _ => inner,
    };
    if merged != inner {
        set_ecn(packet, merged);
    }
    true
}

fn set_ecn(packet: &mut [u8], ecn: u8) {
    if packet.len() < V4_HEADER {
        return;
    }
    if packet[0] >> 4 == 6 {
        packet[1] = (packet[1] & !0x30) | (ecn << 4);
        return;
    }
    let old = [packet[0], packet[1]];
    packet[1] = (packet[1] & !3) | ecn;
    // RFC 1624, equation 3: HC' = ~(~HC + ~m + m').
    let sum = [
        [!packet[10], !packet[11]],
        [!old[0], !old[1]],
        [packet[0], packet[1]],
    ]
    .into_iter()
    .map(|word| u64::from(u16::from_ne_bytes(word)))
    .sum();
    let field = checksum::finish(sum);
    packet[10..12].copy_from_slice(&field);
}

/// A TCP or UDP packet without IP options, extension headers or fragmentation: the shape that
/// super-packets have. Offsets in bytes from the start of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transport {
    /// [`TCP`] or [`UDP`].
    pub(crate) protocol: u8,
    /// Start of the transport header; it also tells the IP version.
    pub(crate) start: usize,
    /// Start of the payload.
    pub(crate) payload: usize,
}

impl Transport {
    /// Reads the headers of a packet whose IP length is right; `None` for any other shape.
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        let (protocol, start) = match packet.first()? {
            // Any IHL but 5 means options.
            0x45 if packet.len() >= V4_HEADER => {
                let fragment = u16::from_be_bytes([packet[6], packet[7]]);
                if fragment & 0xbfff != 0 {
                    return None;
                }
                (packet[9], V4_HEADER)
            }
            first if first >> 4 == 6 && packet.len() >= V6_HEADER => (packet[6], V6_HEADER),
            _ => return None,
        };
        let header = match protocol {
            TCP => usize::from(packet.get(start + 12)? >> 4) * 4,
            UDP => {
                let length = packet.get(start + 4..start + 6)?;
                let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
                if length != packet.len() - start {
                    return None;
                }
                8
            }
            _ => return None,
        };
        let payload = start + header;
        let least = if protocol == TCP { 20 } else { 8 };
        (header >= least && payload <= packet.len()).then_some(Self {
            protocol,
            start,
            payload,
        })
    }

    /// Whether the packet is IPv4.
    pub(crate) fn is_v4(&self) -> bool {
        self.start == V4_HEADER
    }

    /// Where source and destination address stand.
    pub(crate) fn addresses(&self) -> std::ops::Range<usize> {
        if self.is_v4() {
            V4_ADDRESSES
        } else {
            V6_ADDRESSES
        }
    }

    /// Offset of the checksum field from the transport header.
    pub(crate) fn checksum_offset(&self) -> usize {
        if self.protocol == TCP { 16 } else { 6 }
    }

    /// Whether IPv4 header checksum and transport checksum are right. A UDP packet without one
    /// counts as wrong: there is nothing to merge into.
    pub(crate) fn checksums_hold(&self, packet: &[u8]) -> bool {
        if self.is_v4() && !checksum::is_correct(checksum::add(0, &packet[..V4_HEADER])) {
            return false;
        }
        let field = self.start + self.checksum_offset();
        if self.protocol == UDP && packet[field..field + 2] == [0, 0] {
            return false;
        }
        let pseudo = checksum::pseudo(
            &packet[self.addresses()],
            self.protocol,
            packet.len() - self.start,
        );
        checksum::is_correct(checksum::add(pseudo, &packet[self.start..]))
    }

    /// Writes `length` (of the whole packet, in bytes) into the IP header, with its checksum.
    pub(crate) fn set_length(&self, packet: &mut [u8], length: usize) {
        if self.is_v4() {
            packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            packet[10..12].fill(0);
            let field = checksum::finish(checksum::add(0, &packet[..V4_HEADER]));
            packet[10..12].copy_from_slice(&field);
        } else {
            packet[4..6].copy_from_slice(&((length - V6_HEADER) as u16).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::packets::Flow;

    /// RFC 6040, figure 4: rows Not-ECT, ECT(0), ECT(1), CE inside; columns the same outside.
    #[test]
    fn congestion_marks_follow_rfc6040() {
        let codepoints = [NOT_ECT, ECT_0, ECT_1, CE];
        let table = [
            [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None],
            [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)],
            [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)],
            [Some(CE), Some(CE), Some(CE), Some(CE)],
        ];
        for v6 in [false, true] {
            for (inner, row) in codepoints.into_iter().zip(table) {
                for (outer, expected) in codepoints.into_iter().zip(row) {
                    let dscp = 0xb8;
                    let with = |ecn| {
                        let flow = Flow {
                            tos: dscp | ecn,
                            ..Flow::new(v6, true)
                        };
                        flow.packet(1, 2, 0x10, b"payload")
                    };
                    let mut packet = with(inner);
                    // The DSCP outside is not taken over.
                    let kept = merge_ecn(&mut packet, outer | 0x40);
                    assert_eq!(
                        kept.then_some(packet),
                        expected.map(with),
                        "{inner} {outer}"
                    );
                }
            }
        }
    }

    #[test]
    fn sources_of_damaged_packets_are_not_believed() {
        let packet = Flow::new(false, true).packet(1, 2, 0x10, b"payload");
        assert_eq!(checked_source(&packet), Some("10.0.0.2".parse().unwrap()));
        assert_eq!(checked_source(&packet[..packet.len() - 1]), None);
        let mut short = packet.clone();
        short[0] = 0x44;
        assert_eq!(checked_source(&short), None);
        let packet = Flow::new(true, false).packet(1, 2, 0, b"payload");
        assert_eq!(checked_source(&packet), Some("fd00::2".parse().unwrap()));
        assert_eq!(checked_source(&packet[..39]), None);
        assert_eq!(checked_source(&[]), None);
    }
}
