//! Reading captured packets: as much of IP, TCP, UDP and ICMP as the tests look at.

use std::net::IpAddr;

/// TCP.
pub const TCP: u8 = libc::IPPROTO_TCP as u8;
/// UDP.
pub const UDP: u8 = libc::IPPROTO_UDP as u8;
/// ICMP for IPv4.
pub const ICMP: u8 = libc::IPPROTO_ICMP as u8;
/// ICMP for IPv6.
pub const ICMPV6: u8 = libc::IPPROTO_ICMPV6 as u8;

const FLAG_SYN: u8 = 0x02;
const FLAG_ACK: u8 = 0x10;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;

/// An IP packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Source.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TOS or traffic class; the lower two bits are those of ECN (RFC 3168).
    pub tos: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Length at the IP layer, in bytes.
    pub len: usize,
    /// What follows the IP header; it may be cut off.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Parses an IP packet; `None` if it is something else. IPv6 extension headers are not followed.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let be16 = |at: usize| {
            let field = bytes.get(at..at + 2)?;
            Some(usize::from(u16::from_be_bytes([field[0], field[1]])))
        };
        match bytes.first()? >> 4 {
            4 => {
                let header = usize::from(bytes[0] & 15) * 4;
                Some(Self {
                    source: <[u8; 4]>::try_from(bytes.get(12..16)?).ok()?.into(),
                    destination: <[u8; 4]>::try_from(bytes.get(16..20)?).ok()?.into(),
                    ttl: bytes[8],
                    tos: bytes[1],
                    protocol: bytes[9],
                    len: be16(2)?,
                    payload: bytes.get(header..)?,
                })
            }
            6 => Some(Self {
                source: <[u8; 16]>::try_from(bytes.get(8..24)?).ok()?.into(),
                destination: <[u8; 16]>::try_from(bytes.get(24..40)?).ok()?.into(),
                ttl: bytes[7],
                tos: bytes[0] << 4 | bytes[1] >> 4,
                protocol: bytes[6],
                len: be16(4)? + 40,
                payload: &bytes[40..],
            }),
            _ => None,
        }
    }

    /// Source and destination port of TCP or UDP.
    pub fn ports(&self) -> Option<(u16, u16)> {
        if !matches!(self.protocol, TCP | UDP) {
            return None;
        }
        let ports = self.payload.get(..4)?;
        let source = u16::from_be_bytes([ports[0], ports[1]]);
        Some((source, u16::from_be_bytes([ports[2], ports[3]])))
    }

    /// The MSS option of a SYN.
    pub fn syn_mss(&self) -> Option<u16> {
        (self.tcp_flags()? & (FLAG_SYN | FLAG_ACK) == FLAG_SYN).then(|| self.mss())?
    }

    /// The MSS option of a SYN-ACK.
    pub fn syn_ack_mss(&self) -> Option<u16> {
        let both = FLAG_SYN | FLAG_ACK;
        (self.tcp_flags()? & both == both).then(|| self.mss())?
    }

    /// Type and code of ICMP or ICMPv6.
    pub fn icmp(&self) -> Option<(u8, u8)> {
        let known = matches!(self.protocol, ICMP | ICMPV6);
        let head = self.payload.get(..2)?;
        known.then_some((head[0], head[1]))
    }

    /// The MTU that a "packet too big" reports (RFC 1191, RFC 4443).
    pub fn too_big_mtu(&self) -> Option<u32> {
        let rest = self.payload.get(4..8)?;
        match (self.protocol, self.icmp()?) {
            (ICMP, (3, 4)) => Some(u16::from_be_bytes([rest[2], rest[3]]).into()),
            (ICMPV6, (2, 0)) => Some(u32::from_be_bytes([rest[0], rest[1], rest[2], rest[3]])),
            _ => None,
        }
    }

    /// What an ICMP error quotes: from its ninth byte on.
    pub fn quoted(&self) -> Option<Packet<'a>> {
        let is_error = match (self.protocol, self.icmp()?) {
            (ICMP, (kind, _)) => matches!(kind, 3..=5 | 11 | 12),
            (_, (kind, _)) => kind < 128,
        };
        is_error.then(|| Packet::parse(self.payload.get(8..)?))?
    }

    fn tcp_flags(&self) -> Option<u8> {
        (self.protocol == TCP).then(|| self.payload.get(13).copied())?
    }

    fn mss(&self) -> Option<u16> {
        let header = usize::from(self.payload.get(12)? >> 4) * 4;
        let mut options = self.payload.get(20..header)?;
        loop {
            match *options {
                [] | [OPTION_END, ..] => return None,
                [OPTION_NOP, ref rest @ ..] => options = rest,
                [OPTION_MSS, 4, high, low, ..] => return Some(u16::from_be_bytes([high, low])),
                [_, len, ..] if len >= 2 => options = options.get(usize::from(len)..)?,
                _ => return None,
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_syn_of_either_family() {
        let tcp = [
            0, 80, 1, 187, 0, 0, 0, 0, 0, 0, 0, 0, 0x70, FLAG_SYN, 0, 0, 0, 0, 0, 0, 1, 1, 2, 4, 5,
            180, 0, 0,
        ];
        let mut v4 = vec![
            0x45, 0, 0, 48, 0, 0, 0, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        v4.extend(tcp);
        let mut v6 = vec![0x60, 0, 0, 0, 0, 28, TCP, 63];
        v6.extend([0xfd; 16]);
        v6.extend([0xfe; 16]);
        v6.extend(tcp);
        for bytes in [&v4, &v6] {
            let packet = Packet::parse(bytes).unwrap();
            assert_eq!(packet.len, bytes.len());
            assert_eq!(packet.ports(), Some((80, 443)));
            assert_eq!(
                (packet.ttl, packet.tos),
                (if bytes[0] == 0x45 { 64 } else { 63 }, 0)
            );
            assert_eq!(packet.syn_mss(), Some(1460));
            assert_eq!(packet.syn_ack_mss(), None);
            assert_eq!(packet.too_big_mtu(), None);
            for cut in 0..bytes.len() {
                // Whatever it says, it must not panic.
                if let Some(packet) = Packet::parse(&bytes[..cut]) {
                    let _ = (packet.syn_mss(), packet.ports(), packet.icmp());
                }
            }
        }
    }
}
