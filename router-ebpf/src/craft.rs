//! Packets from scratch, with checksums of their own making: for the tests of the host and of the
//! kernel.

use std::net::IpAddr;

use crate::packet::IPV6_FRAGMENT;

pub use crate::packet::{ACK, FIN, ICMP, ICMPV6, RST, SYN, TCP, UDP};

/// An IP packet to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Source.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// IP protocol, or IPv6 next header.
    pub protocol: u8,
    /// Transport header and what is behind it.
    pub payload: Vec<u8>,
    /// IPv4 options, a multiple of four bytes, or IPv6 extension headers.
    pub options: Vec<u8>,
    /// Flags and fragment offset of IPv4.
    pub fragment: u16,
    /// Identification of IPv4.
    pub id: u16,
}

impl Ip {
    /// A packet with TTL 64 and "don't fragment"; its transport checksum is right.
    pub fn new(source: IpAddr, destination: IpAddr, protocol: u8, payload: Vec<u8>) -> Self {
        let mut ip = Self {
            source,
            destination,
            ttl: 64,
            protocol,
            payload,
            options: Vec::new(),
            fragment: 0x4000,
            id: 0x1234,
        };
        ip.fill_transport_checksum();
        ip
    }

    /// A TCP segment from port 40000 to 443, with `len` bytes of payload and a multiple of four bytes
    /// of options.
    pub fn tcp(source: IpAddr, destination: IpAddr, flags: u8, options: &[u8], len: usize) -> Self {
        assert_eq!(options.len() % 4, 0);
        let mut header = vec![0x9c, 0x40, 0x01, 0xbb, 0, 0, 0, 1, 0, 0, 0, 2];
        header.push((5 + options.len() as u8 / 4) << 4);
        header.extend([flags, 0xff, 0xff, 0, 0, 0, 0]);
        header.extend(options);
        header.extend(filler(len));
        Self::new(source, destination, TCP, header)
    }

    /// A UDP datagram from port 40000 to 53.
    pub fn udp(source: IpAddr, destination: IpAddr, len: usize) -> Self {
        let mut datagram = vec![0x9c, 0x40, 0, 53];
        datagram.extend(((8 + len) as u16).to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(filler(len));
        Self::new(source, destination, UDP, datagram)
    }

    /// An echo request with the identifier 7.
    pub fn echo(source: IpAddr, destination: IpAddr) -> Self {
        let (kind, protocol) = if source.is_ipv4() {
            (8, ICMP)
        } else {
            (128, ICMPV6)
        };
        let mut message = vec![kind, 0, 0, 0, 0, 7, 0, 1];
        message.extend(filler(56));
        Self::new(source, destination, protocol, message)
    }

    /// The reply to this echo request.
    pub fn echo_reply(&self) -> Self {
        let mut reply = self.clone();
        std::mem::swap(&mut reply.source, &mut reply.destination);
        reply.payload[0] = if self.protocol == ICMP { 0 } else { 129 };
        reply.fill_transport_checksum();
        reply
    }

    /// An ICMP error of `kind` and `code` about a packet; `rest` is the word behind its checksum.
    pub fn error(
        source: IpAddr,
        destination: IpAddr,
        [kind, code]: [u8; 2],
        rest: u32,
        quoted: &[u8],
    ) -> Self {
        let protocol = if source.is_ipv4() { ICMP } else { ICMPV6 };
        let mut message = vec![kind, code, 0, 0];
        message.extend(rest.to_be_bytes());
        message.extend(quoted);
        Self::new(source, destination, protocol, message)
    }

    /// The same with other ports: of TCP and UDP.
    pub fn ports(mut self, source: u16, destination: u16) -> Self {
        self.payload[..2].copy_from_slice(&source.to_be_bytes());
        self.payload[2..4].copy_from_slice(&destination.to_be_bytes());
        self.fill_transport_checksum();
        self
    }

    /// The same with another identifier: of an echo.
    pub fn identifier(mut self, id: u16) -> Self {
        self.payload[4..6].copy_from_slice(&id.to_be_bytes());
        self.fill_transport_checksum();
        self
    }

    /// The same with other sequence and acknowledgement numbers: of TCP.
    pub fn sequence(mut self, sequence: u32, acknowledged: u32) -> Self {
        self.payload[4..8].copy_from_slice(&sequence.to_be_bytes());
        self.payload[8..12].copy_from_slice(&acknowledged.to_be_bytes());
        self.fill_transport_checksum();
        self
    }

    /// The fragments of this packet, cut in front of these places of its payload, which are
    /// multiples of eight.
    pub fn fragments(&self, id: u16, cuts: &[usize]) -> Vec<Self> {
        let mut starts = vec![0];
        starts.extend(cuts);
        let ends = cuts.iter().copied().chain([self.payload.len()]);
        let fragment = |(start, end): (&usize, usize)| {
            let more = u16::from(end < self.payload.len());
            let mut fragment = self.clone();
            fragment.payload = self.payload[*start..end].to_vec();
            if self.source.is_ipv4() {
                fragment.id = id;
                fragment.fragment = more << 13 | (start / 8) as u16;
            } else {
                let [high, low] = (*start as u16 | more).to_be_bytes();
                let [id_high, id_low] = id.to_be_bytes();
                fragment.options = vec![self.protocol, 0, high, low, 0, 0, id_high, id_low];
                fragment.protocol = IPV6_FRAGMENT;
            }
            fragment
        };
        starts.iter().zip(ends).map(fragment).collect()
    }

    fn fill_transport_checksum(&mut self) {
        let at = match self.protocol {
            TCP => 16,
            UDP => 6,
            ICMP | ICMPV6 => 2,
            _ => return,
        };
        // The payload of some packets is meant to be too short for a checksum.
        if self.payload.len() < at + 2 {
            return;
        }
        self.payload[at..at + 2].fill(0);
        let sum = !self.transport_sum();
        self.payload[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }

    /// The Internet sum over pseudo-header and payload (RFC 1071): all ones when right.
    pub fn transport_sum(&self) -> u16 {
        let mut covered = Vec::new();
        if self.protocol != ICMP {
            for address in [self.source, self.destination] {
                match address {
                    IpAddr::V4(address) => covered.extend(address.octets()),
                    IpAddr::V6(address) => covered.extend(address.octets()),
                }
            }
            covered.extend((self.payload.len() as u32).to_be_bytes());
            covered.extend([0, 0, 0, self.protocol]);
        }
        covered.extend(&self.payload);
        sum(&covered)
    }

    /// The packet in these bytes; IPv6 extension headers are payload. `None` if it is not whole, has
    /// IPv4 options or a wrong IPv4 header checksum.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let be16 = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let v4 = |at: usize| Some(IpAddr::from(*bytes.get(at..)?.first_chunk::<4>()?));
        let v6 = |at: usize| Some(IpAddr::from(*bytes.get(at..)?.first_chunk::<16>()?));
        match bytes.first()? >> 4 {
            4 => {
                let right = bytes[0] == 0x45 && sum(bytes.get(..20)?) == u16::MAX;
                right.then_some(Self {
                    source: v4(12)?,
                    destination: v4(16)?,
                    ttl: bytes[8],
                    protocol: bytes[9],
                    payload: bytes.get(20..be16(2)?.into())?.to_vec(),
                    options: Vec::new(),
                    fragment: be16(6)?,
                    id: be16(4)?,
                })
            }
            6 => Some(Self {
                source: v6(8)?,
                destination: v6(24)?,
                ttl: *bytes.get(7)?,
                protocol: *bytes.get(6)?,
                payload: bytes.get(40..)?.get(..be16(4)?.into())?.to_vec(),
                options: Vec::new(),
                fragment: 0x4000,
                id: 0,
            }),
            _ => None,
        }
    }

    /// The same one hop later.
    pub fn forwarded(mut self) -> Self {
        self.ttl -= 1;
        self
    }

    /// The same from another address, with the transport checksum anew.
    pub fn from(mut self, source: IpAddr) -> Self {
        self.source = source;
        self.fill_transport_checksum();
        self
    }

    /// The same to another address, with the transport checksum anew.
    pub fn to(mut self, destination: IpAddr) -> Self {
        self.destination = destination;
        self.fill_transport_checksum();
        self
    }

    /// The bytes from the IP header on.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let header_len = 20 + self.options.len();
                let len = (header_len + self.payload.len()) as u16;
                out.extend([0x40 | (header_len / 4) as u8, 0]);
                out.extend(len.to_be_bytes());
                out.extend(self.id.to_be_bytes());
                out.extend(self.fragment.to_be_bytes());
                out.extend([self.ttl, self.protocol, 0, 0]);
                out.extend(source.octets());
                out.extend(destination.octets());
                out.extend(&self.options);
                let checksum = !sum(&out);
                out[10..12].copy_from_slice(&checksum.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                out.extend([0x60, 0, 0, 0]);
                let len = (self.options.len() + self.payload.len()) as u16;
                out.extend(len.to_be_bytes());
                out.extend([self.protocol, self.ttl]);
                out.extend(source.octets());
                out.extend(destination.octets());
                out.extend(&self.options);
            }
            _ => panic!("one family for both addresses"),
        }
        out.extend(&self.payload);
        out
    }
}

/// The one's complement sum of big-endian words (RFC 1071), by the book.
pub fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u64;
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u64::from(pair[0]) * 256 + u64::from(low);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An MSS option.
pub fn mss(value: u16) -> [u8; 4] {
    let [high, low] = value.to_be_bytes();
    [2, 4, high, low]
}

fn filler(len: usize) -> impl Iterator<Item = u8> {
    (0..len).map(|n| n as u8)
}

/// An Ethernet frame around an IP packet.
pub fn frame(destination: [u8; 6], source: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let ethertype = if packet[0] >> 4 == 6 {
        0x86dd_u16
    } else {
        0x0800
    };
    let mut out = Vec::new();
    out.extend(destination);
    out.extend(source);
    out.extend(ethertype.to_be_bytes());
    out.extend(packet);
    out
}
