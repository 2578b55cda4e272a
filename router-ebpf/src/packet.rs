//! The bytes of a packet, and what the fast path must know of them.

use crate::abi::{Address, Prefix};
use crate::verdict::Verdict;

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;

/// TCP flag SYN.
pub const SYN: u8 = 0x02;

/// Bytes of a packet; aligned, so that programs can take them word by word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes<const N: usize>(pub [u8; N]);

/// Whether a write leaves the sum over the packet as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// The same rewrite mends a checksum inside the packet, so the sum over all stays.
    Kept,
    /// No checksum inside the packet covers the bytes.
    Changed,
}

/// A packet in place; offsets count from its IP header. The only way to its bytes.
pub trait Frame {
    /// Bytes from the IP header to the end, link-layer padding included.
    fn len(&self) -> u32;

    /// Whether there is nothing behind the link-layer header.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Payload bytes of each segment of a super-packet; zero for a plain packet.
    fn gso_size(&self) -> u32;

    /// `N` bytes at `AT`, if the packet has them. For headers, whose place is known to the compiler
    /// and to the verifier: the cheap way.
    fn header<const AT: usize, const N: usize>(&self) -> Option<[u8; N]>;

    /// `N` bytes at any place, if the packet has them.
    fn read<const N: usize>(&self, at: u32) -> Option<Bytes<N>>;

    /// Overwrites bytes that [`Frame::read`] has seen.
    fn write<const N: usize>(&mut self, at: u32, bytes: &Bytes<N>, sum: Sum)
    -> Result<(), Verdict>;

    /// Accounts in the transport checksum at `at` for a 16-bit word under it that changes. A
    /// checksum that is still left to the hardware stays so.
    fn replace_checksum(&mut self, at: u32, from: [u8; 2], to: [u8; 2]) -> Result<(), Verdict>;

    /// Cuts the packet to `len` bytes.
    fn trim(&mut self, len: u32) -> Result<(), Verdict>;

    /// Puts an Ethernet header in front of a packet that has none.
    fn push_ethernet(&mut self, header: &Bytes<14>) -> Result<(), Verdict>;
}

/// What is behind the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP; its header lies within the packet.
    Tcp,
    /// UDP; its header lies within the packet.
    Udp,
    /// ICMP or ICMPv6.
    Icmp,
    /// Another protocol.
    Other,
    /// The packet is a fragment, the first included.
    Fragment,
    /// IPv4 options or an IPv6 extension header stand in front of the transport header.
    Options,
    /// TCP, UDP or ICMP with a header that is cut short or impossible.
    Bad,
}

/// A parsed packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address, as a key of the maps.
    pub source: Prefix,
    /// Destination address, as a key of the maps.
    pub destination: Prefix,
    /// First four bytes of the IP header: TOS, or traffic class and flow label, are in it.
    pub first_word: [u8; 4],
    /// IPv4 header checksum; zero for IPv6.
    pub header_checksum: [u8; 2],
    /// TTL or hop limit.
    pub ttl: u8,
    /// IPv4 protocol or IPv6 next header.
    pub protocol: u8,
    /// Source and destination port of TCP and UDP, big-endian; else zero.
    pub ports: [[u8; 2]; 2],
    /// IP header length in bytes, without IPv6 extension headers.
    pub header_len: u32,
    /// Length in bytes that the IP header tells; the packet has as many.
    pub len: u32,
    /// Payload bytes of each segment of a super-packet; zero for a plain packet.
    pub gso_size: u32,
    /// What is behind the IP header.
    pub transport: Transport,
    /// TCP flags from FIN to CWR; else zero.
    pub tcp_flags: u8,
    /// Length of the TCP or UDP header in bytes, TCP options included; else zero.
    pub transport_len: u32,
}

impl Packet {
    /// Bytes at the IP layer of the largest packet that leaves for this one: a super-packet leaves
    /// as its segments.
    #[inline(always)]
    pub const fn segment_len(&self) -> u32 {
        if self.gso_size == 0 || self.transport_len == 0 {
            self.len
        } else {
            self.header_len + self.transport_len + self.gso_size
        }
    }
}

/// Parses the packet in `frame`; [`Verdict::DropMalformed`] if it is not a whole IP packet.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F) -> Result<Packet, Verdict> {
    let start: [u8; 2] = frame.header::<0, 2>().ok_or(Verdict::DropMalformed)?;
    let packet = match start[0] >> 4 {
        4 => transport::<F, 20>(frame, parse_v4(frame)?),
        6 => transport::<F, 40>(frame, parse_v6(frame)?),
        _ => return Err(Verdict::DropMalformed),
    };
    if packet.len > frame.len() {
        return Err(Verdict::DropMalformed);
    }
    Ok(packet)
}

/// RFC 791, section 3.1. The header checksum is not verified: an error in it survives the
/// incremental update, and the next hop drops the packet.
#[inline(always)]
fn parse_v4<F: Frame>(frame: &F) -> Result<Packet, Verdict> {
    let header: [u8; 20] = frame.header::<0, 20>().ok_or(Verdict::DropMalformed)?;
    let header_len = 4 * u32::from(header[0] & 0x0f);
    let len = u32::from(u16::from_be_bytes([header[2], header[3]]));
    if header_len < 20 || len < header_len {
        return Err(Verdict::DropMalformed);
    }
    // "More fragments" and the offset; "don't fragment" does not matter here.
    let transport = if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        Transport::Fragment
    } else if header_len != 20 {
        Transport::Options
    } else {
        match header[9] {
            TCP => Transport::Tcp,
            UDP => Transport::Udp,
            ICMP => Transport::Icmp,
            _ => Transport::Other,
        }
    };
    let mut source = Address::v4([0; 4]);
    let mut destination = Address::v4([0; 4]);
    source.octets[..4].copy_from_slice(&header[12..16]);
    destination.octets[..4].copy_from_slice(&header[16..20]);
    Ok(Packet {
        source: Prefix::host(source),
        destination: Prefix::host(destination),
        first_word: [header[0], header[1], header[2], header[3]],
        header_checksum: [header[10], header[11]],
        ttl: header[8],
        protocol: header[9],
        ports: [[0; 2]; 2],
        header_len,
        len,
        gso_size: frame.gso_size(),
        transport,
        tcp_flags: 0,
        transport_len: 0,
    })
}

/// RFC 8200, section 3.
#[inline(always)]
fn parse_v6<F: Frame>(frame: &F) -> Result<Packet, Verdict> {
    let header: [u8; 40] = frame.header::<0, 40>().ok_or(Verdict::DropMalformed)?;
    let transport = match header[6] {
        TCP => Transport::Tcp,
        UDP => Transport::Udp,
        ICMPV6 => Transport::Icmp,
        44 => Transport::Fragment,
        // Hop-by-hop, routing, destination options, mobility, HIP, shim6: chains of headers.
        0 | 43 | 60 | 135 | 139 | 140 => Transport::Options,
        _ => Transport::Other,
    };
    let mut source = Address::v6([0; 16]);
    let mut destination = Address::v6([0; 16]);
    source.octets.copy_from_slice(&header[8..24]);
    destination.octets.copy_from_slice(&header[24..40]);
    Ok(Packet {
        source: Prefix::host(source),
        destination: Prefix::host(destination),
        first_word: [header[0], header[1], header[2], header[3]],
        header_checksum: [0; 2],
        ttl: header[7],
        protocol: header[6],
        ports: [[0; 2]; 2],
        header_len: 40,
        len: 40 + u32::from(u16::from_be_bytes([header[4], header[5]])),
        gso_size: frame.gso_size(),
        transport,
        tcp_flags: 0,
        transport_len: 0,
    })
}

/// Reads the transport header, which begins at `AT`: RFC 9293, section 3.1; RFC 768; RFC 792 and
/// RFC 4443, whose messages have eight bytes or more.
#[inline(always)]
fn transport<F: Frame, const AT: usize>(frame: &F, mut packet: Packet) -> Packet {
    let payload = packet.len - packet.header_len;
    let kind = packet.transport;
    match kind {
        Transport::Tcp | Transport::Udp | Transport::Icmp => {}
        _ => return packet,
    }
    packet.transport = Transport::Bad;
    match kind {
        Transport::Tcp => {
            let Some(header) = frame.header::<AT, 14>() else {
                return packet;
            };
            packet.ports = [[header[0], header[1]], [header[2], header[3]]];
            packet.tcp_flags = header[13];
            packet.transport_len = 4 * u32::from(header[12] >> 4);
            if packet.transport_len >= 20 && packet.transport_len <= payload {
                packet.transport = kind;
            }
        }
        Transport::Udp if payload >= 8 => {
            let Some([a, b, c, d]) = frame.header::<AT, 4>() else {
                return packet;
            };
            packet.ports = [[a, b], [c, d]];
            packet.transport_len = 8;
            packet.transport = kind;
        }
        Transport::Icmp if payload >= 8 => packet.transport = kind,
        _ => {}
    }
    packet
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::abi::Side;
    use crate::memory::Memory;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Packet, Verdict> {
        parse(&Memory::new(Side::Overlay, bytes.to_vec(), 0))
    }

    const TCP_V4: [u8; 40] = [
        0x45, 0x02, 0, 40, 1, 2, 0x40, 0, 64, 6, 0xab, 0xcd, 10, 0, 0, 1, 10, 0, 0, 2, //
        0x9c, 0x40, 0x01, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x12, 0, 0, 0, 0, 0, 0,
    ];

    #[test]
    fn the_fields_of_a_tcp_segment() {
        let packet = read(&TCP_V4).unwrap();
        let wanted = Packet {
            source: Prefix::host(Address::v4([10, 0, 0, 1])),
            destination: Prefix::host(Address::v4([10, 0, 0, 2])),
            first_word: [0x45, 2, 0, 40],
            header_checksum: [0xab, 0xcd],
            ttl: 64,
            protocol: TCP,
            ports: [[0x9c, 0x40], [0x01, 0xbb]],
            header_len: 20,
            len: 40,
            gso_size: 0,
            transport: Transport::Tcp,
            tcp_flags: 0x12,
            transport_len: 20,
        };
        assert_eq!(packet, wanted);
    }

    #[test]
    fn the_same_over_ipv6() {
        let mut bytes = vec![0x6a, 0xbc, 0xde, 0xf0, 0, 20, 6, 63];
        bytes.extend([1; 16]);
        bytes.extend([2; 16]);
        bytes.extend(&TCP_V4[20..]);
        let packet = read(&bytes).unwrap();
        let wanted = Packet {
            source: Prefix::host(Address::v6([1; 16])),
            destination: Prefix::host(Address::v6([2; 16])),
            first_word: [0x6a, 0xbc, 0xde, 0xf0],
            header_checksum: [0; 2],
            ttl: 63,
            header_len: 40,
            len: 60,
            ..read(&TCP_V4).unwrap()
        };
        assert_eq!(packet, wanted);
    }

    #[test]
    fn padding_is_no_part_of_the_packet() {
        let mut padded = TCP_V4.to_vec();
        padded.extend([0; 6]);
        assert_eq!(read(&padded), read(&TCP_V4));
    }

    #[test]
    fn what_is_no_whole_packet() {
        assert_eq!(read(&[]), Err(Verdict::DropMalformed));
        assert_eq!(read(&TCP_V4[..39]), Err(Verdict::DropMalformed));
        for (at, value) in [
            (0, 0x44),
            (0, 0x55),
            (0, 0x05),
            (3, 19),
            (0, 0x4f),
            (0, 0x65),
        ] {
            let mut bytes = TCP_V4;
            bytes[at] = value;
            assert_eq!(read(&bytes), Err(Verdict::DropMalformed), "{at} {value}");
        }
    }

    #[test]
    fn a_super_packet_is_judged_by_its_segments() {
        let mut packet = read(&TCP_V4).unwrap();
        assert_eq!(packet.segment_len(), 40);
        packet.gso_size = 1380;
        packet.transport_len = 32;
        assert_eq!(packet.segment_len(), 20 + 32 + 1380);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_without_a_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..120),
            version in prop::sample::select(vec![0x45_u8, 0x46, 0x60, 0x00]),
            gso_size: u32,
        ) {
            if let Some(first) = bytes.first_mut() {
                *first = version;
            }
            if let Ok(packet) = parse(&Memory::new(Side::Overlay, bytes.clone(), gso_size)) {
                prop_assert!(packet.len as usize <= bytes.len());
                prop_assert!(packet.header_len <= packet.len);
                if packet.transport == Transport::Tcp {
                    prop_assert!(packet.header_len + packet.transport_len <= packet.len);
                }
            }
        }
    }
}
