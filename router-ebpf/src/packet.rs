//! What the fast path must know of a packet.

use core::hint::black_box;

use crate::abi::{Address, Denied, Side, Tuple};
use crate::frame::Frame;
use crate::verdict::Verdict;

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;

/// IPv6 next header of a fragment header.
pub const IPV6_FRAGMENT: u8 = 44;

/// TCP flag FIN.
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;

/// Length in bytes of the IPv6 fragment header (RFC 8200, section 4.5).
pub(crate) const FRAGMENT_HEADER: u32 = 8;
/// Length in bytes of the hop-by-hop header in front of an IPv6 super-packet above 64 KiB.
pub(crate) const JUMBO_HEADER: u32 = 8;

/// What is behind the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP; its header lies within the packet.
    Tcp,
    /// UDP; its header lies within the packet.
    Udp,
    /// An echo request or reply of ICMP or ICMPv6.
    Echo,
    /// An ICMP or ICMPv6 error about another packet.
    Error,
    /// Another protocol, or another ICMP message.
    Other,
    /// A fragment that is not the first.
    Fragment,
    /// IPv4 options or an IPv6 extension header stand in front of the transport header.
    Options,
    /// TCP, UDP or ICMP with a header that is cut short or impossible.
    Bad,
}

/// A parsed packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Addresses, protocol (of IPv6: the next header, behind a fragment header if there is one),
    /// and of TCP, UDP and echo the ports; else they are zero.
    pub tuple: Tuple,
    /// First four bytes of the IP header: TOS, or traffic class and flow label, are in it.
    pub first_word: [u8; 4],
    /// IPv4 header checksum; zero for IPv6.
    pub header_checksum: [u8; 2],
    /// TTL or hop limit.
    pub ttl: u8,
    /// Whether routers may cut the packet: IPv4 without "don't fragment".
    pub may_cut: bool,
    /// Whether the packet is a fragment, the first included.
    pub is_fragment: bool,
    /// Identification of a fragment; of IPv4 in the last two bytes.
    pub id: [u8; 4],
    /// IP header length in bytes, without IPv6 extension headers.
    pub header_len: u32,
    /// Where the transport header begins, in bytes from the IP header.
    pub transport_at: u32,
    /// Length in bytes that the IP header tells; the packet has as many. A super-packet above 64 KiB
    /// (BIG TCP) has zero there, and is as long as it is.
    pub len: u32,
    /// Payload bytes of each segment of a super-packet; zero for a plain packet.
    pub gso_size: u32,
    /// What is behind the IP header.
    pub transport: Transport,
    /// TCP flags from FIN to CWR; else zero.
    pub tcp_flags: u8,
    /// Sequence number, then acknowledgement number of TCP; else zero.
    pub sequence: [u32; 2],
    /// Length of the TCP or UDP header in bytes, TCP options included; else zero.
    pub transport_len: u32,
    /// Of an ICMP error and of a later fragment: the tuple of the flow that it goes with, once a
    /// decision has found it.
    pub flow: Tuple,
}

impl Default for Packet {
    fn default() -> Self {
        let tuple = Tuple {
            source: Address::v4([0; 4]),
            destination: Address::v4([0; 4]),
            ports: [[0; 2]; 2],
            protocol: 0,
        };
        Self {
            tuple,
            first_word: [0; 4],
            header_checksum: [0; 2],
            ttl: 0,
            may_cut: false,
            is_fragment: false,
            id: [0; 4],
            header_len: 0,
            transport_at: 0,
            len: 0,
            gso_size: 0,
            transport: Transport::Bad,
            tcp_flags: 0,
            sequence: [0; 2],
            transport_len: 0,
            flow: tuple,
        }
    }
}

impl Packet {
    /// Bytes at the IP layer of the largest packet that leaves for this one: a super-packet leaves
    /// as its segments.
    #[inline(always)]
    pub const fn segment_len(&self) -> u32 {
        if self.gso_size == 0 || self.transport_len == 0 {
            self.len
        } else {
            // What may stand in between no segment has, see `has_jumbo_header`.
            self.header_len + self.transport_len + self.gso_size
        }
    }

    /// Whether a hop-by-hop header with the length stands in front of the TCP header: Linux 5.19 to 6.x
    /// puts it into IPv6 super-packets above 64 KiB, and takes it out when it cuts them.
    #[inline(always)]
    pub const fn has_jumbo_header(&self) -> bool {
        self.gso_size != 0 && self.transport_at != self.header_len && !self.is_fragment
    }

    /// The tuple of the flow that the packet goes with.
    #[inline(always)]
    pub fn flow_tuple(&self) -> &Tuple {
        match self.transport {
            Transport::Error | Transport::Fragment => &self.flow,
            _ => &self.tuple,
        }
    }

    /// Whether the packet, in the program of `side`, cannot be the first of a flow that connection
    /// tracking would take for new.
    #[inline(always)]
    pub fn is_underway(&self, side: Side) -> bool {
        match self.transport {
            Transport::Tcp => self.tcp_flags & (SYN | ACK | RST) != SYN,
            Transport::Echo => {
                let asked = match side {
                    Side::Overlay => self.tuple.ports[1] == Tuple::ASKED_BY_OVERLAY,
                    Side::Subnet => self.tuple.ports[0] == Tuple::ASKED_BY_SUBNET,
                };
                !asked
            }
            _ => false,
        }
    }

    /// What user space is told of the packet, which was denied in the program of `side`; `verdict` is
    /// the number of a [`Verdict`], `time` in ns of `CLOCK_MONOTONIC`.
    #[inline(always)]
    pub const fn denied(&self, side: Side, verdict: u8, time: u64) -> Denied {
        Denied {
            time,
            len: self.len,
            source: self.tuple.source,
            destination: self.tuple.destination,
            ports: self.tuple.ports,
            protocol: self.tuple.protocol,
            side: side as u8,
            verdict,
            tcp_flags: self.tcp_flags,
            reserved: [0; 4],
        }
    }

    /// Whether the packet is IPv4.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.tuple.source.is_v4()
    }
}

/// Parses the packet that the program of `side` finds in `frame`, in place: a packet is too large
/// for the stack of a program. [`Verdict::DropMalformed`] if it is not a whole IP packet.
#[inline(always)]
pub fn parse<F: Frame>(side: Side, frame: &F, packet: &mut Packet) -> Result<(), Verdict> {
    let start: [u8; 2] = whole::<F, 0, 2>(frame)?;
    packet.gso_size = frame.gso_size();
    packet.tuple.ports = [[0; 2]; 2];
    packet.tcp_flags = 0;
    packet.transport_len = 0;
    match start[0] >> 4 {
        4 => {
            parse_v4(frame, packet)?;
            transport::<F, 20>(side, frame, packet);
        }
        6 => {
            parse_v6(frame, packet)?;
            if packet.transport_at != 40 {
                transport::<F, 48>(side, frame, packet);
            } else {
                transport::<F, 40>(side, frame, packet);
            }
        }
        _ => return Err(Verdict::DropMalformed),
    }
    if packet.len > frame.len() {
        return Err(Verdict::DropMalformed);
    }
    Ok(())
}

/// The bytes of a header that every packet has.
#[inline(always)]
fn whole<F: Frame, const AT: usize, const N: usize>(frame: &F) -> Result<[u8; N], Verdict> {
    let mut header = [0; N];
    if frame.header::<AT, N>(&mut header) {
        Ok(header)
    } else {
        Err(Verdict::DropMalformed)
    }
}

/// RFC 791, section 3.1. The header checksum is not verified: an error in it survives the
/// incremental update, and the next hop drops the packet.
#[inline(always)]
fn parse_v4<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(), Verdict> {
    let header: [u8; 20] = whole::<F, 0, 20>(frame)?;
    let header_len = 4 * u32::from(header[0] & 0x0f);
    let mut len = u32::from(u16::from_be_bytes([header[2], header[3]]));
    if header_len < 20 || len < header_len {
        // As `iph_totlen` of the kernel has it.
        if header_len != 20 || len != 0 || packet.gso_size == 0 || header[9] != TCP {
            return Err(Verdict::DropMalformed);
        }
        len = frame.len();
    }
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    packet.transport = if header_len != 20 {
        Transport::Options
    } else if fragment & 0x1fff != 0 {
        Transport::Fragment
    } else {
        kind(header[9])
    };
    set_v4(&mut packet.tuple.source, &header[12..16]);
    set_v4(&mut packet.tuple.destination, &header[16..20]);
    packet.tuple.protocol = header[9];
    packet.first_word = [header[0], header[1], header[2], header[3]];
    packet.header_checksum = [header[10], header[11]];
    packet.ttl = header[8];
    packet.may_cut = fragment & 0x4000 == 0;
    // "More fragments" and the offset.
    packet.is_fragment = fragment & 0x3fff != 0;
    packet.id = [0, 0, header[4], header[5]];
    packet.header_len = header_len;
    packet.transport_at = header_len;
    packet.len = len;
    Ok(())
}

/// Makes `address` the IPv4 one of these four bytes. Zeros that LLVM knew for such it would have
/// written by a call for BPF, byte by byte.
#[inline(always)]
fn set_v4(address: &mut Address, octets: &[u8]) {
    let zero = black_box(0_u32).to_ne_bytes();
    address.family = Address::v4([0; 4]).family;
    address.octets[..4].copy_from_slice(octets);
    address.octets[4..8].copy_from_slice(&zero);
    address.octets[8..12].copy_from_slice(&zero);
    address.octets[12..].copy_from_slice(&zero);
}

/// RFC 8200, sections 3 and 4.5.
#[inline(always)]
fn parse_v6<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(), Verdict> {
    // Each address by itself, so that it is in registers: see `entry::by_words`.
    let destination = whole::<F, 24, 16>(frame)?;
    let source = whole::<F, 8, 16>(frame)?;
    let header: [u8; 8] = whole::<F, 0, 8>(frame)?;
    packet.tuple.source = Address::v6(source);
    packet.tuple.destination = Address::v6(destination);
    packet.tuple.protocol = header[6];
    packet.first_word = [header[0], header[1], header[2], header[3]];
    packet.header_checksum = [0; 2];
    packet.ttl = header[7];
    packet.may_cut = false;
    packet.is_fragment = false;
    packet.id = [0; 4];
    packet.header_len = 40;
    packet.transport_at = 40;
    packet.len = 40 + u32::from(u16::from_be_bytes([header[4], header[5]]));
    packet.transport = kind(header[6]);
    if packet.len == 40 && packet.gso_size != 0 {
        return parse_jumbo(frame, packet);
    }
    if header[6] == IPV6_FRAGMENT {
        packet.transport = Transport::Bad;
        let mut header = [0; FRAGMENT_HEADER as usize];
        if packet.len >= 40 + FRAGMENT_HEADER && frame.header::<40, _>(&mut header) {
            packet.is_fragment = true;
            packet.tuple.protocol = header[0];
            packet.id = [header[4], header[5], header[6], header[7]];
            packet.transport_at = 40 + FRAGMENT_HEADER;
            packet.transport = if u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 {
                Transport::Fragment
            } else {
                kind(header[0])
            };
        }
    }
    Ok(())
}

/// An IPv6 super-packet above 64 KiB: its payload length is zero, and up to Linux 6.x a hop-by-hop header with
/// the jumbo payload option alone (RFC 2675) follows, as `ipv6_gro_complete` and `ip6_xmit` make it.
#[inline(always)]
fn parse_jumbo<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(), Verdict> {
    packet.len = frame.len();
    let mut header = [0; 4];
    if packet.transport == Transport::Options
        && frame.header::<40, _>(&mut header)
        && header == [TCP, 0, 0xc2, 4]
    {
        packet.tuple.protocol = TCP;
        packet.transport = Transport::Tcp;
        packet.transport_at = 40 + JUMBO_HEADER;
    }
    Ok(())
}

/// What an IPv4 protocol or IPv6 next header announces. Of ICMP the message decides later.
#[inline(always)]
fn kind(protocol: u8) -> Transport {
    match protocol {
        TCP => Transport::Tcp,
        UDP => Transport::Udp,
        ICMP | ICMPV6 => Transport::Echo,
        // Hop-by-hop, routing, destination options, mobility, HIP, shim6: chains of headers.
        0 | 43 | IPV6_FRAGMENT | 60 | 135 | 139 | 140 => Transport::Options,
        _ => Transport::Other,
    }
}

/// Reads the transport header, which begins at `AT`: RFC 9293, section 3.1; RFC 768; RFC 792 and
/// RFC 4443, whose messages have eight bytes or more.
#[inline(always)]
fn transport<F: Frame, const AT: usize>(side: Side, frame: &F, packet: &mut Packet) {
    let payload = packet.len.wrapping_sub(packet.transport_at);
    let kind = packet.transport;
    match kind {
        Transport::Tcp | Transport::Udp | Transport::Echo => {}
        _ => return,
    }
    packet.transport = Transport::Bad;
    match kind {
        Transport::Tcp => {
            let mut header = [0; 14];
            if !frame.header::<AT, _>(&mut header) {
                return;
            }
            packet.tuple.ports = [[header[0], header[1]], [header[2], header[3]]];
            packet.tcp_flags = header[13];
            packet.sequence = [
                u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
                u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
            ];
            packet.transport_len = 4 * u32::from(header[12] >> 4);
            if packet.transport_len >= 20 && packet.transport_len <= payload {
                packet.transport = kind;
            }
        }
        Transport::Udp if payload >= 8 => {
            let mut header = [0; 4];
            if !frame.header::<AT, _>(&mut header) {
                return;
            }
            let [a, b, c, d] = header;
            packet.tuple.ports = [[a, b], [c, d]];
            packet.transport_len = 8;
            packet.transport = kind;
        }
        Transport::Echo if payload >= 8 => {
            let mut header = [0; 6];
            if !frame.header::<AT, _>(&mut header) {
                return;
            }
            let [kind, _, _, _, a, b] = header;
            packet.transport = message(packet.tuple.protocol, packet.is_v4(), kind);
            if let Some(ports) = echo_ports(side, packet.tuple.protocol, kind, [a, b])
                && packet.transport == Transport::Echo
            {
                packet.tuple.ports = ports;
            }
            if packet.is_fragment && packet.transport == Transport::Error {
                packet.transport = Transport::Other;
            }
        }
        _ => {}
    }
}

/// What an ICMP message of type `kind` is. Errors: destination unreachable, time exceeded and
/// parameter problem of RFC 792; the four of RFC 4443.
#[inline(always)]
fn message(protocol: u8, v4: bool, kind: u8) -> Transport {
    match (protocol, v4, kind) {
        (ICMP, true, 0 | 8) | (ICMPV6, false, 128 | 129) => Transport::Echo,
        (ICMP, true, 3 | 11 | 12) | (ICMPV6, false, 1..=4) => Transport::Error,
        _ => Transport::Other,
    }
}

/// The ports of an echo that a packet seen by the program of `side` carries, see [`Tuple`]; `None`
/// for another message.
#[inline(always)]
pub fn echo_ports(side: Side, protocol: u8, kind: u8, id: [u8; 2]) -> Option<[[u8; 2]; 2]> {
    let request = match (protocol, kind) {
        (ICMP, 8) | (ICMPV6, 128) => true,
        (ICMP, 0) | (ICMPV6, 129) => false,
        _ => return None,
    };
    let asked = match (side, request) {
        (Side::Overlay, true) | (Side::Subnet, false) => Tuple::ASKED_BY_OVERLAY,
        _ => Tuple::ASKED_BY_SUBNET,
    };
    Some(match side {
        Side::Overlay => [id, asked],
        Side::Subnet => [asked, id],
    })
}

#[cfg(test)]
mod tests;
