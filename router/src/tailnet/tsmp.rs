//! TSMP, the tailnet's own messages between nodes, inside the tunnel: IP protocol 99.
//!
//! After `net/packet/tsmp.go` of Tailscale's sources. Here is what stands behind the IP header.

use std::net::{IpAddr, SocketAddr};

use crate::tailnet::keys::DiscoPublic;

/// The IP protocol number.
pub const PROTOCOL: u8 = 99;

const REJECTED: u8 = b'!';
const PING: u8 = b'p';
const PONG: u8 = b'o';
const DISCO_KEY: u8 = b'a';
/// Something is wrong with the rejecting node that may mend itself.
const MAYBE_BROKEN: u8 = 1;

/// Why a flow was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The packet filter does not let it through.
    Policy,
    /// The node takes no flows at all.
    ShieldsUp,
    /// The node does not forward.
    Forwarding,
    /// The host's firewall has dropped it.
    HostFirewall,
    /// Another one, by its byte.
    Other(u8),
}

impl Reason {
    fn byte(self) -> u8 {
        match self {
            Self::Policy => b'A',
            Self::ShieldsUp => b'S',
            Self::Forwarding => b'F',
            Self::HostFirewall => b'W',
            Self::Other(byte) => byte,
        }
    }

    fn from_byte(byte: u8) -> Self {
        match byte {
            b'A' => Self::Policy,
            b'S' => Self::ShieldsUp,
            b'F' => Self::Forwarding,
            b'W' => Self::HostFirewall,
            other => Self::Other(other),
        }
    }
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A flow of the receiver was refused.
    Rejected {
        /// IP protocol of the flow.
        protocol: u8,
        /// Why.
        reason: Reason,
        /// Source port of the flow, host byte order.
        source: u16,
        /// Destination port of the flow, host byte order.
        destination: u16,
        /// It may mend itself.
        maybe_broken: bool,
    },
    /// Asks for a pong with the same bytes.
    Ping([u8; 8]),
    /// Answers a ping.
    Pong {
        /// The ping's bytes.
        data: [u8; 8],
        /// Port of the peer API, host byte order; 0 for none.
        peer_api: u16,
    },
    /// The sender's disco key, from now on.
    DiscoKey(DiscoPublic),
}

impl Message {
    /// Reads what stands behind the IP header. Bytes behind a message are room for later versions.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let (kind, rest) = payload.split_first()?;
        let port = |at: usize| Some(u16::from_be_bytes(*rest.get(at..)?.first_chunk()?));
        match *kind {
            REJECTED => Some(Self::Rejected {
                protocol: *rest.first()?,
                reason: Reason::from_byte(*rest.get(1)?),
                source: port(2)?,
                destination: port(4)?,
                maybe_broken: rest.get(6).is_some_and(|flags| flags & MAYBE_BROKEN != 0),
            }),
            PING => Some(Self::Ping(*rest.first_chunk()?)),
            PONG => Some(Self::Pong {
                data: *rest.first_chunk()?,
                peer_api: port(8).unwrap_or(0),
            }),
            DISCO_KEY => {
                let key = *rest.first_chunk::<32>()?;
                (key != [0; 32]).then(|| Self::DiscoKey(DiscoPublic::from_bytes(key)))
            }
            _ => None,
        }
    }

    /// What stands behind the IP header.
    pub fn payload(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(33);
        match *self {
            Self::Rejected {
                protocol,
                reason,
                source,
                destination,
                maybe_broken,
            } => {
                out.extend([REJECTED, protocol, reason.byte()]);
                out.extend(source.to_be_bytes());
                out.extend(destination.to_be_bytes());
                out.extend(maybe_broken.then_some(MAYBE_BROKEN));
            }
            Self::Ping(data) => {
                out.push(PING);
                out.extend(data);
            }
            Self::Pong { data, peer_api } => {
                out.push(PONG);
                out.extend(data);
                out.extend(peer_api.to_be_bytes());
            }
            Self::DiscoKey(key) => {
                out.push(DISCO_KEY);
                out.extend(key.as_bytes());
            }
        }
        out
    }
}

/// The whole IP packet of a message. `None` where the addresses are of two families.
pub fn packet(message: &Message, source: IpAddr, destination: IpAddr) -> Option<Vec<u8>> {
    around(PROTOCOL, &message.payload(), source, destination)
}

/// An IP packet around this. `None` where the addresses are of two families, or it does not fit.
pub(super) fn around(
    protocol: u8,
    payload: &[u8],
    source: IpAddr,
    destination: IpAddr,
) -> Option<Vec<u8>> {
    const HOPS: u8 = 64;
    let mut out = Vec::with_capacity(40 + payload.len());
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let total = u16::try_from(20 + payload.len()).ok()?;
            out.extend([0x45, 0]);
            out.extend(total.to_be_bytes());
            out.extend([0, 0, 0, 0, HOPS, protocol, 0, 0]);
            out.extend(source.octets());
            out.extend(destination.octets());
            let sum = checksum(&out);
            out[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            out.extend([0x60, 0, 0, 0]);
            out.extend(u16::try_from(payload.len()).ok()?.to_be_bytes());
            out.extend([protocol, HOPS]);
            out.extend(source.octets());
            out.extend(destination.octets());
        }
        _ => return None,
    }
    out.extend(payload);
    Some(out)
}

/// The checksum of RFC 1071, of few bytes.
pub(super) fn checksum(bytes: &[u8]) -> u16 {
    let sum = bytes.chunks(2).fold(0_u32, |sum, pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        sum + u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Tells the sender of a flow from `source` to `destination` that it was refused by policy: the packet
/// that goes back to it, in the name of the destination.
pub fn rejection(source: SocketAddr, destination: SocketAddr, protocol: u8) -> Option<Vec<u8>> {
    let message = Message::Rejected {
        protocol,
        reason: Reason::Policy,
        source: source.port(),
        destination: destination.port(),
        maybe_broken: false,
    };
    packet(&message, destination.ip(), source.ip())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn messages() -> Vec<Message> {
        let mut messages = vec![
            Message::Ping(*b"12345678"),
            Message::Pong {
                data: *b"abcdefgh",
                peer_api: 4242,
            },
            Message::DiscoKey(DiscoPublic::from_bytes([9; 32])),
        ];
        let reasons = [
            Reason::Policy,
            Reason::ShieldsUp,
            Reason::Forwarding,
            Reason::HostFirewall,
            Reason::Other(b'T'),
        ];
        messages.extend(reasons.map(|reason| Message::Rejected {
            protocol: 6,
            reason,
            source: 40_000,
            destination: 443,
            maybe_broken: reason == Reason::Policy,
        }));
        messages
    }

    #[test]
    fn messages_come_back_with_and_without_more_behind() {
        for message in messages() {
            let mut payload = message.payload();
            assert_eq!(Message::parse(&payload), Some(message));
            let shortest = payload.len();
            // The flags of a rejection and the port of a pong may be missing.
            let optional = match message {
                Message::Rejected { maybe_broken, .. } => usize::from(maybe_broken),
                Message::Pong { .. } => 2,
                _ => 0,
            };
            for length in 0..shortest - optional {
                assert_eq!(Message::parse(&payload[..length]), None);
            }
            payload.extend([0; 5]);
            assert_eq!(Message::parse(&payload), Some(message));
        }
        assert_eq!(Message::parse(b"?12345678"), None);
    }

    #[test]
    fn bytes_as_go_writes_them() {
        let packet = rejection(
            "100.64.0.2:40000".parse().unwrap(),
            "10.2.0.9:443".parse().unwrap(),
            6,
        )
        .unwrap();
        assert_eq!(packet[..4], [0x45, 0, 0, 27]);
        assert_eq!(packet[9], PROTOCOL);
        assert_eq!(packet[12..20], [10, 2, 0, 9, 100, 64, 0, 2]);
        assert_eq!(packet[20..], [b'!', 6, b'A', 0x9c, 0x40, 1, 0xbb]);
        let sum = packet[..20].chunks(2).fold(0_u32, |sum, pair| {
            sum + u32::from(u16::from_be_bytes([pair[0], pair[1]]))
        });
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn ipv6_and_mixed_families() {
        let (a, b): (IpAddr, IpAddr) = ("fd7a::1".parse().unwrap(), "fd7a::2".parse().unwrap());
        let packet = super::packet(&Message::Ping([1; 8]), a, b).unwrap();
        assert_eq!(packet[..8], [0x60, 0, 0, 0, 0, 9, PROTOCOL, 64]);
        assert_eq!(Message::parse(&packet[40..]), Some(Message::Ping([1; 8])));
        let v4 = "10.0.0.1".parse().unwrap();
        assert_eq!(super::packet(&Message::Ping([1; 8]), a, v4), None);
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_alike(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Some(message) = Message::parse(&bytes) {
                prop_assert_eq!(Message::parse(&message.payload()), Some(message));
            }
        }
    }
}
