//! Messages between the nodes of a tailnet themselves, inside the tunnel: TSMP (IP protocol 99), and answers to
//! echoes that the daemon has sent.
//!
//! They are neither TCP nor UDP, so they are looked for where a packet leaves the way on which super-packets are made,
//! and cost the others nothing. A ping is answered here, before any policy, as Tailscale's client does
//! (`net/tstun/wrap.go`).

use crate::engine::offload::ip::{self, ICMP, ICMPV6, V4_HEADER, V6_HEADER};
use crate::engine::offload::write::{write_v4, write_v6};

/// IP protocol number of TSMP.
pub(super) const TSMP: u8 = 99;
const PING: u8 = b'p';
const PONG: u8 = b'o';
/// Bytes that a pong gives back.
const DATA: usize = 8;
const HOPS: u8 = 64;

/// The data of echoes that the daemon sends begin with this.
pub const ECHO: [u8; 8] = *b"sluice\x00\x63";

/// What a packet is, if it is no flow's.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Inside {
    /// A ping, and the answer.
    Ping(Vec<u8>),
    /// Something else for the daemon.
    Message,
    /// Nothing of the kind.
    Other,
}

/// Looks at a packet of a peer whose length is right.
pub(super) fn look(packet: &[u8]) -> Inside {
    let protocol = ip::protocol(packet);
    let start = match packet.first() {
        Some(first) if first >> 4 == 4 => usize::from(first & 15) * 4,
        _ => V6_HEADER,
    };
    let Some(payload) = packet.get(start..) else {
        return Inside::Other;
    };
    match (protocol, payload) {
        (Some(TSMP), [PING, rest @ ..]) => match rest.first_chunk() {
            Some(data) => pong(packet, data).map_or(Inside::Message, Inside::Ping),
            None => Inside::Message,
        },
        (Some(TSMP), _) => Inside::Message,
        (Some(ICMP), [0, ..]) | (Some(ICMPV6), [129, ..])
            if payload.get(8..).is_some_and(|data| data.starts_with(&ECHO)) =>
        {
            Inside::Message
        }
        _ => Inside::Other,
    }
}

/// The answer to a ping. The port of the peer API is 0: there is none.
fn pong(packet: &[u8], data: &[u8; DATA]) -> Option<Vec<u8>> {
    let mut payload = [0; 1 + DATA + 2];
    payload[0] = PONG;
    payload[1..=DATA].copy_from_slice(data);
    let mut out = match ip::addresses(packet)? {
        range if range.len() == 8 => {
            let mut addresses = [0; 8];
            addresses.copy_from_slice(&packet[range]);
            addresses.rotate_left(4);
            let mut header = vec![0; V4_HEADER];
            let total = (V4_HEADER + payload.len()) as u16;
            write_v4(&mut header, 0, total, 0, 0, HOPS, TSMP, &addresses);
            header
        }
        range => {
            let mut addresses = [0; 32];
            addresses.copy_from_slice(&packet[range]);
            addresses.rotate_left(16);
            write_v6(0, payload.len() as u16, TSMP, HOPS, &addresses).to_vec()
        }
    };
    out.extend(payload);
    Some(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::tailnet::tsmp::{Message, packet};

    #[test]
    fn a_ping_is_answered_to_its_sender() {
        for (from, to) in [("100.64.0.2", "100.64.0.1"), ("fd64::2", "fd64::1")] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let ping = packet(&Message::Ping(*b"12345678"), from, to).unwrap();
            let pong = Message::Pong {
                data: *b"12345678",
                peer_api: 0,
            };
            assert_eq!(look(&ping), Inside::Ping(packet(&pong, to, from).unwrap()));
            for message in [
                pong,
                Message::DiscoKey(crate::tailnet::keys::DiscoPublic::from_bytes([7; 32])),
            ] {
                assert_eq!(look(&packet(&message, from, to).unwrap()), Inside::Message);
            }
        }
    }

    #[test]
    fn what_belongs_to_others_passes() {
        let echo = |kind: u8, data: &[u8]| {
            let mut packet = vec![0; V4_HEADER];
            write_v4(&mut packet, 0, 36, 0, 0, 64, ICMP, &[1; 8]);
            packet.extend([kind, 0, 0, 0, 0, 1, 0, 1]);
            packet.extend(data);
            packet
        };
        assert_eq!(look(&echo(0, &ECHO)), Inside::Message);
        assert_eq!(look(&echo(8, &ECHO)), Inside::Other);
        assert_eq!(look(&echo(0, b"12345678")), Inside::Other);
        assert_eq!(look(&[]), Inside::Other);
        assert_eq!(look(&[0x4f; 30]), Inside::Other);
    }
}
