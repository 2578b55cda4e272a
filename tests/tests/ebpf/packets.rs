//! Packets from scratch, with checksums of their own making.

use std::net::IpAddr;

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;

pub(super) const SYN: u8 = 0x02;
pub(super) const ACK: u8 = 0x10;

/// An IP packet to be.
#[derive(Clone, Debug)]
pub(super) struct Ip {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) ttl: u8,
    pub(super) protocol: u8,
    pub(super) payload: Vec<u8>,
    /// IPv4 options, a multiple of four bytes, or IPv6 extension headers.
    pub(super) options: Vec<u8>,
    /// Flags and fragment offset of IPv4.
    pub(super) fragment: u16,
}

impl Ip {
    pub(super) fn new(source: IpAddr, destination: IpAddr, protocol: u8, payload: Vec<u8>) -> Self {
        let mut ip = Self {
            source,
            destination,
            ttl: 64,
            protocol,
            payload,
            options: Vec::new(),
            fragment: 0x4000,
        };
        ip.fill_transport_checksum();
        ip
    }

    pub(super) fn tcp(
        source: IpAddr,
        destination: IpAddr,
        flags: u8,
        options: &[u8],
        len: usize,
    ) -> Self {
        assert_eq!(options.len() % 4, 0);
        let mut header = vec![0x9c, 0x40, 0x01, 0xbb, 0, 0, 0, 1, 0, 0, 0, 2];
        header.push((5 + options.len() as u8 / 4) << 4);
        header.extend([flags, 0xff, 0xff, 0, 0, 0, 0]);
        header.extend(options);
        header.extend(filler(len));
        Self::new(source, destination, TCP, header)
    }

    pub(super) fn udp(source: IpAddr, destination: IpAddr, len: usize) -> Self {
        let mut datagram = vec![0x9c, 0x40, 0, 53];
        datagram.extend(((8 + len) as u16).to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(filler(len));
        Self::new(source, destination, UDP, datagram)
    }

    pub(super) fn echo(source: IpAddr, destination: IpAddr) -> Self {
        let (kind, protocol) = if source.is_ipv4() {
            (8, ICMP)
        } else {
            (128, ICMPV6)
        };
        let mut message = vec![kind, 0, 0, 0, 0, 7, 0, 1];
        message.extend(filler(56));
        Self::new(source, destination, protocol, message)
    }

    fn fill_transport_checksum(&mut self) {
        let at = match self.protocol {
            TCP => 16,
            UDP => 6,
            ICMP | ICMPV6 => 2,
            _ => return,
        };
        self.payload[at..at + 2].fill(0);
        let sum = !self.transport_sum();
        self.payload[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }

    /// The Internet sum over pseudo-header and payload (RFC 1071): all ones when right.
    pub(super) fn transport_sum(&self) -> u16 {
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

    /// The bytes from the IP header on.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let header_len = 20 + self.options.len();
                let len = (header_len + self.payload.len()) as u16;
                out.extend([0x40 | (header_len / 4) as u8, 0]);
                out.extend(len.to_be_bytes());
                out.extend([0x12, 0x34]);
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
pub(super) fn sum(bytes: &[u8]) -> u16 {
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
pub(super) fn mss(value: u16) -> [u8; 4] {
    let [high, low] = value.to_be_bytes();
    [2, 4, high, low]
}

fn filler(len: usize) -> impl Iterator<Item = u8> {
    (0..len).map(|n| n as u8)
}

/// An Ethernet frame around an IP packet.
pub(super) fn frame(destination: [u8; 6], source: [u8; 6], packet: &[u8]) -> Vec<u8> {
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
