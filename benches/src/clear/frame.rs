//! The frames that the generator feeds: IPv4 behind a virtio-net header, as TUN queues and packet
//! sockets with PACKET_VNET_HDR take them.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::generator::packet::{Flow, Stamp};
use crate::packet;

/// Length of the virtio-net header in bytes (linux/virtio_net.h, legacy layout).
pub(super) const VNET: usize = 10;
/// Length of an Ethernet header in bytes.
pub(super) const ETHERNET: usize = 14;

const IP: usize = 20;
const TCP: usize = 20;
/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: usize = 16;
/// Tunnel MTU of the bed, in bytes.
pub(super) const MTU: usize = 1420;
/// Segments in a super-packet: what fits 64 KiB.
const SEGMENTS: usize = 47;
const SEGMENT: usize = MTU - IP - TCP;

/// What kind of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Size {
    /// 64 bytes of UDP payload, 1,024 flows.
    Small,
    /// UDP packets as long as the tunnel's MTU, 256 flows.
    Mtu,
    /// TCP super-packets of one flow.
    Super,
}

impl Size {
    pub(super) const ALL: [Self; 3] = [Self::Small, Self::Mtu, Self::Super];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Mtu => "mtu",
            Self::Super => "super",
        }
    }

    /// Number of flows.
    pub(super) fn flows(self) -> u16 {
        match self {
            Self::Small => 1024,
            Self::Mtu => 256,
            Self::Super => 1,
        }
    }

    /// Source port of the first flow on the overlay side; sizes never share a flow.
    pub(super) fn first_port(self) -> u16 {
        match self {
            Self::Small => 10_000,
            Self::Mtu => 12_000,
            Self::Super => 13_000,
        }
    }

    /// Packets that a frame stands for on the wire.
    pub(super) fn packets(self) -> u64 {
        match self {
            Self::Small | Self::Mtu => 1,
            Self::Super => SEGMENTS as u64,
        }
    }

    /// Bytes of an IP packet.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Small => 64 + 28,
            Self::Mtu => MTU,
            Self::Super => IP + TCP + SEGMENTS * SEGMENT,
        }
    }
}

/// What stands before the IP header.
#[derive(Clone, Copy, Debug)]
pub(super) enum Link {
    /// Nothing: a TUN queue.
    Tun,
    /// An Ethernet header from one address to another: a packet socket.
    Ethernet { from: [u8; 6], to: [u8; 6] },
}

/// TCP flags of the handshake and after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    Syn,
    SynAck,
    Ack,
    /// A super-packet of data.
    Data,
}

/// A frame of UDP.
pub(super) fn udp(
    link: Link,
    from: SocketAddrV4,
    to: SocketAddrV4,
    size: Size,
    flow: u16,
) -> Vec<u8> {
    let mut packet = vec![0; size.bytes()];
    let stamp = Stamp {
        run: 0,
        flow: flow.into(),
        sequence: 0,
    };
    Flow::new(from, to, (size.bytes() - 28) as u16).write(stamp, &mut packet);
    frame(link, [0; VNET], &packet)
}

/// A frame of TCP. Data is always the same 64 KiB at the same place in the window: to whoever
/// tracks the connection it is sent again and again, which needs no acknowledgements to stay valid.
pub(super) fn tcp(link: Link, from: SocketAddrV4, to: SocketAddrV4, segment: Segment) -> Vec<u8> {
    /// MSS 1460 and a window scale of 7.
    const OPTIONS: [u8; 8] = [2, 4, 0x05, 0xb4, 1, 3, 3, 7];
    let up = from.port() != SERVER_PORT;
    let (ours, theirs) = if up { (1000, 5000) } else { (5000, 1000) };
    let (flags, sequence, acknowledged, options, payload): (_, _, _, &[u8], _) = match segment {
        Segment::Syn => (packet::SYN, ours, 0, &OPTIONS, 0),
        Segment::SynAck => (packet::SYN | packet::ACK, ours, theirs + 1, &OPTIONS, 0),
        Segment::Ack => (packet::ACK, ours + 1, theirs + 1, &[], 0),
        Segment::Data => {
            let flags = packet::ACK | packet::PSH;
            (flags, ours + 1, theirs + 1, &[], SEGMENTS * SEGMENT)
        }
    };
    let segment_of = packet::Segment {
        flags,
        sequence,
        acknowledged,
        options,
        payload,
    };
    let mut bytes = packet::tcp(from.into(), to.into(), segment_of);
    if segment != Segment::Data {
        return frame(link, [0; VNET], &bytes);
    }
    // A partial checksum is the pseudo header's sum, not complemented.
    let partial = packet::pseudo_sum(&bytes);
    bytes[IP + TCP_CHECKSUM..IP + TCP_CHECKSUM + 2].copy_from_slice(&partial.to_be_bytes());
    let before = if matches!(link, Link::Tun) {
        0
    } else {
        ETHERNET
    };
    frame(link, virtio((before + IP) as u16), &bytes)
}

/// The server's port in every flow.
pub(super) const SERVER_PORT: u16 = 9000;

/// The overlay address of the bed's one client.
pub(super) const CLIENT: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);

/// The header of a TCPv4 super-packet whose checksum is to be completed.
fn virtio(transport: u16) -> [u8; VNET] {
    const NEEDS_CSUM: u8 = 1;
    const GSO_TCPV4: u8 = 1;
    let mut header = [0; VNET];
    header[0] = NEEDS_CSUM;
    header[1] = GSO_TCPV4;
    header[2..4].copy_from_slice(&(transport + TCP as u16).to_ne_bytes());
    header[4..6].copy_from_slice(&(SEGMENT as u16).to_ne_bytes());
    header[6..8].copy_from_slice(&transport.to_ne_bytes());
    header[8..10].copy_from_slice(&(TCP_CHECKSUM as u16).to_ne_bytes());
    header
}

fn frame(link: Link, vnet: [u8; VNET], packet: &[u8]) -> Vec<u8> {
    let mut frame = vnet.to_vec();
    if let Link::Ethernet { from, to } = link {
        frame.extend(to);
        frame.extend(from);
        frame.extend((libc::ETH_P_IP as u16).to_be_bytes());
    }
    frame.extend(packet);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use lab::packet::Packet;

    fn ends() -> (SocketAddrV4, SocketAddrV4) {
        let server = SocketAddrV4::new(Ipv4Addr::new(10, 20, 0, 2), SERVER_PORT);
        (SocketAddrV4::new(CLIENT, 13_000), server)
    }

    #[test]
    fn frames_are_what_they_say() {
        let (client, server) = ends();
        for size in [Size::Small, Size::Mtu] {
            let frame = udp(Link::Tun, client, server, size, 0);
            assert_eq!(frame.len(), VNET + size.bytes());
        }
        let syn = tcp(Link::Tun, client, server, Segment::Syn);
        let packet = Packet::parse(&syn[VNET..]).unwrap();
        assert_eq!(packet.syn_mss(), Some(1460));
        assert_eq!(packet.ports(), Some((13_000, SERVER_PORT)));
        let link = Link::Ethernet {
            from: [2; 6],
            to: [4; 6],
        };
        let data = tcp(link, server, client, Segment::Data);
        let packet = Packet::parse(&data[VNET + ETHERNET..]).unwrap();
        assert_eq!(packet.len, Size::Super.bytes());
        assert!(packet.len <= usize::from(u16::MAX));
    }
}
