//! TCP and UDP packets of either family, with checksums.

use std::net::{IpAddr, SocketAddr};

use crate::generator::packet::sum;

/// TTL and hop limit of every packet.
pub(crate) const TTL: u8 = 64;

/// FIN, SYN and so on of a TCP header.
pub(crate) const SYN: u8 = 0x02;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const ACK: u8 = 0x10;

/// A TCP segment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Segment<'a> {
    /// Flags.
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledged: u32,
    /// Options, a multiple of four bytes.
    pub options: &'a [u8],
    /// Bytes of payload.
    pub payload: usize,
}

/// Bytes of an IP header without options.
pub(crate) fn ip_header(ip: IpAddr) -> usize {
    if ip.is_ipv4() { 20 } else { 40 }
}

/// A TCP packet.
pub fn tcp(from: SocketAddr, to: SocketAddr, segment: Segment<'_>) -> Vec<u8> {
    let header = 20 + segment.options.len();
    let mut tcp = vec![0; header + segment.payload];
    tcp[4..8].copy_from_slice(&segment.sequence.to_be_bytes());
    tcp[8..12].copy_from_slice(&segment.acknowledged.to_be_bytes());
    tcp[12] = (header as u8 / 4) << 4;
    tcp[13] = segment.flags;
    tcp[14..16].copy_from_slice(&u16::MAX.to_be_bytes());
    tcp[20..header].copy_from_slice(segment.options);
    fill(&mut tcp[header..]);
    packet(from, to, libc::IPPROTO_TCP as u8, 16, tcp)
}

/// A UDP packet with this many bytes of payload.
pub fn udp(from: SocketAddr, to: SocketAddr, payload: usize) -> Vec<u8> {
    let mut udp = vec![0; 8 + payload];
    let length = udp.len() as u16;
    udp[4..6].copy_from_slice(&length.to_be_bytes());
    fill(&mut udp[8..]);
    packet(from, to, libc::IPPROTO_UDP as u8, 6, udp)
}

/// Anything but zeros, and no period that a power of two divides.
fn fill(payload: &mut [u8]) {
    for (i, byte) in payload.iter_mut().enumerate() {
        *byte = (i % 251) as u8;
    }
}

/// The sum of the pseudo-header of TCP and UDP, folded, not complemented.
pub(crate) fn pseudo_sum(packet: &[u8]) -> u16 {
    let (addresses, header, protocol) = match packet.first().map(|b| b >> 4) {
        Some(4) => (12..20, 20, packet[9]),
        _ => (8..40, 40, packet[6]),
    };
    let length = (packet.len() - header) as u64;
    let unfolded = u64::from(sum(&packet[addresses], 0)) + u64::from(protocol) + length;
    sum(&[], unfolded)
}

fn packet(
    from: SocketAddr,
    to: SocketAddr,
    protocol: u8,
    checksum_at: usize,
    mut transport: Vec<u8>,
) -> Vec<u8> {
    transport[..2].copy_from_slice(&from.port().to_be_bytes());
    transport[2..4].copy_from_slice(&to.port().to_be_bytes());
    let header = ip_header(to.ip());
    let mut packet = vec![0; header];
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&((header + transport.len()) as u16).to_be_bytes());
            packet[6] = 0x40; // DF
            packet[8] = TTL;
            packet[9] = protocol;
            packet[12..16].copy_from_slice(&from.octets());
            packet[16..20].copy_from_slice(&to.octets());
            let checksum = !sum(&packet, 0);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        (from, to) => {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&(transport.len() as u16).to_be_bytes());
            packet[6] = protocol;
            packet[7] = TTL;
            packet[8..24].copy_from_slice(&six(from));
            packet[24..40].copy_from_slice(&six(to));
        }
    }
    packet.append(&mut transport);
    let checksum = match !sum(&packet[header..], pseudo_sum(&packet).into()) {
        // Zero would mean that there is none (RFC 768).
        0 if protocol == libc::IPPROTO_UDP as u8 => 0xffff,
        other => other,
    };
    let at = header + checksum_at;
    packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    packet
}

fn six(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lab::packet::Packet;

    #[test]
    fn packets_of_both_families_are_whole() {
        let mss = [2, 4, 0x05, 0xb4];
        for (from, to) in [
            ("100.64.0.2:1000", "10.0.0.1:443"),
            ("[fd64::2]:1000", "[2001:db8::1]:443"),
        ] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let syn = Segment {
                flags: SYN,
                options: &mss,
                ..Segment::default()
            };
            for bytes in [tcp(from, to, syn), udp(from, to, 11)] {
                let header = ip_header(to.ip());
                assert_eq!(sum(&bytes[header..], pseudo_sum(&bytes).into()), 0xffff);
                let packet = Packet::parse(&bytes).unwrap();
                assert_eq!(packet.len, bytes.len());
                assert_eq!((packet.source, packet.destination), (from.ip(), to.ip()));
                assert_eq!(packet.ports(), Some((1000, 443)));
            }
            let bytes = tcp(from, to, syn);
            assert_eq!(Packet::parse(&bytes).unwrap().syn_mss(), Some(1460));
        }
    }
}
