//! Frames of the protocol: a kind, a length, and so many bytes.
//!
//! After `derp/derp.go`. What comes from a relay is bounded, and what is not known is passed over.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::GoneReason;
use crate::tailnet::keys::NodePublic;

/// What a relay's greeting begins with: "DERP" and a key in UTF-8.
const MAGIC: [u8; 8] = *b"DERP\xf0\x9f\x94\x91";
/// Bytes of a kind and a length.
const HEAD: usize = 5;
/// Bytes of a key.
const KEY: usize = 32;
/// Most bytes of a datagram.
pub const MOST_DATAGRAM: usize = 64 << 10;
/// Most bytes of a frame that is read.
const MOST: usize = 1 << 20;
/// Bytes that a datagram has in front of it on the wire.
pub const OVERHEAD: usize = HEAD + KEY;
/// Most bytes of a relay's words that are kept.
const WORDS: usize = 1024;

const SERVER_KEY: u8 = 0x01;
const CLIENT_INFO: u8 = 0x02;
const SERVER_INFO: u8 = 0x03;
const SEND: u8 = 0x04;
const RECEIVE: u8 = 0x05;
const KEEP_ALIVE: u8 = 0x06;
const NOTE_PREFERRED: u8 = 0x07;
const PEER_GONE: u8 = 0x08;
const PEER_PRESENT: u8 = 0x09;
const PING: u8 = 0x12;
const PONG: u8 = 0x13;
const HEALTH: u8 = 0x14;
const RESTARTING: u8 = 0x15;

/// A frame that breaks the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// More than a frame may have.
    #[error("the relay sends a frame of {0} bytes, which is too long")]
    TooLong(u32),
    /// The first frame is no greeting.
    #[error("the relay's greeting is not understood; is it a DERP server?")]
    Greeting,
}

/// What a relay sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Its key, first of all.
    ServerKey(NodePublic),
    /// What it says of itself: a nonce and a box.
    ServerInfo(Bytes),
    /// A datagram.
    Packet {
        /// Who has sent it, by the relay's word.
        from: NodePublic,
        /// The datagram.
        bytes: Bytes,
    },
    /// Nothing but a sign of life.
    KeepAlive,
    /// A peer is not there.
    Gone {
        /// The peer.
        peer: NodePublic,
        /// Why.
        reason: GoneReason,
    },
    /// A peer is there; only told to relays of the same region.
    Present(NodePublic),
    /// To be answered with the same bytes.
    Ping([u8; 8]),
    /// Answers a ping.
    Pong([u8; 8]),
    /// What is wrong with the connection; empty for nothing.
    Health(String),
    /// The relay restarts.
    Restarting {
        /// How long to wait before connecting again.
        reconnect_in: Duration,
        /// How long to try before it counts as failed.
        try_for: Duration,
    },
    /// Of a kind that is not known, or too short for its kind.
    Other(u8),
}

/// Takes the next frame out of what has been read. `None` when it is not here whole.
pub fn next(buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let Some(&[kind, a, b, c, d]) = buffer.first_chunk::<HEAD>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([a, b, c, d]);
    if length as usize > MOST {
        return Err(FrameError::TooLong(length));
    }
    let whole = HEAD + length as usize;
    if buffer.len() < whole {
        buffer.reserve(whole - buffer.len());
        return Ok(None);
    }
    let mut body = buffer.split_to(whole).freeze();
    body.advance(HEAD);
    Ok(Some(read(kind, body)?))
}

fn read(kind: u8, mut body: Bytes) -> Result<Frame, FrameError> {
    let frame = match kind {
        SERVER_KEY => {
            let key = body.strip_prefix(&MAGIC).and_then(key);
            return key.map(Frame::ServerKey).ok_or(FrameError::Greeting);
        }
        SERVER_INFO => Some(Frame::ServerInfo(body)),
        RECEIVE => key(&body).map(|from| {
            body.advance(KEY);
            Frame::Packet { from, bytes: body }
        }),
        KEEP_ALIVE => Some(Frame::KeepAlive),
        PEER_GONE => key(&body).map(|peer| Frame::Gone {
            peer,
            // Old relays give none.
            reason: match body.get(KEY) {
                None | Some(0) => GoneReason::Disconnected,
                Some(1) => GoneReason::NotHere,
                Some(other) => GoneReason::Other(*other),
            },
        }),
        PEER_PRESENT => key(&body).map(Frame::Present),
        PING => body.first_chunk().copied().map(Frame::Ping),
        PONG => body.first_chunk().copied().map(Frame::Pong),
        HEALTH => {
            let words = String::from_utf8_lossy(&body[..body.len().min(WORDS)]);
            let words = words.chars().filter(|c| !c.is_control()).collect();
            Some(Frame::Health(words))
        }
        RESTARTING => body.first_chunk().map(|&[a, b, c, d, e, f, g, h]| {
            let wait = |bytes| Duration::from_millis(u32::from_be_bytes(bytes).into());
            Frame::Restarting {
                reconnect_in: wait([a, b, c, d]),
                try_for: wait([e, f, g, h]),
            }
        }),
        _ => None,
    };
    Ok(frame.unwrap_or(Frame::Other(kind)))
}

fn key(body: &[u8]) -> Option<NodePublic> {
    body.first_chunk().copied().map(NodePublic::from_bytes)
}

fn head(out: &mut BytesMut, kind: u8, length: usize) {
    out.put_u8(kind);
    // No frame of ours is longer than a datagram and two keys.
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
}

/// Who the client is: its key, and what it says of itself in a box for the relay.
pub(super) fn client_info(
    out: &mut BytesMut,
    client: &NodePublic,
    nonce: &[u8; 24],
    sealed: &[u8],
) {
    head(out, CLIENT_INFO, KEY + nonce.len() + sealed.len());
    out.put_slice(client.as_bytes());
    out.put_slice(nonce);
    out.put_slice(sealed);
}

/// A datagram for a peer.
pub(super) fn send(out: &mut BytesMut, to: &NodePublic, datagram: &[u8]) {
    head(out, SEND, KEY + datagram.len());
    out.put_slice(to.as_bytes());
    out.put_slice(datagram);
}

/// Whether this relay is the client's home.
pub(super) fn note_preferred(out: &mut BytesMut, home: bool) {
    head(out, NOTE_PREFERRED, 1);
    out.put_u8(home.into());
}

/// Asks for a sign of life.
pub(super) fn ping(out: &mut BytesMut, bytes: &[u8; 8]) {
    head(out, PING, bytes.len());
    out.put_slice(bytes);
}

/// Answers a ping.
pub(super) fn pong(out: &mut BytesMut, bytes: &[u8; 8]) {
    head(out, PONG, bytes.len());
    out.put_slice(bytes);
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The datagrams that a client has written, and to whom.
    pub(in super::super) fn sent(out: &mut BytesMut) -> Vec<(NodePublic, Bytes)> {
        let mut found = Vec::new();
        while let Some(&[kind, a, b, c, d]) = out.first_chunk::<HEAD>() {
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            let mut body = out.split_to(HEAD + length).freeze();
            body.advance(HEAD);
            if kind == SEND {
                let to = key(&body).unwrap();
                found.push((to, body.slice(KEY..)));
            }
        }
        found
    }

    fn bytes(kind: u8, body: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        head(&mut out, kind, body.len());
        out.put_slice(body);
        out
    }

    fn one(kind: u8, body: &[u8]) -> Frame {
        let mut buffer = bytes(kind, body);
        let frame = next(&mut buffer).unwrap().unwrap();
        assert!(buffer.is_empty());
        frame
    }

    const PEER: NodePublic = NodePublic::from_bytes([7; 32]);

    /// The bytes that `derp/derp.go` describes.
    #[test]
    fn frames_are_read() {
        let mut greeting = "DERP🔑".as_bytes().to_vec();
        greeting.extend([7; 32]);
        greeting.extend(b"what may come");
        assert_eq!(one(1, &greeting), Frame::ServerKey(PEER));
        assert_eq!(
            one(3, b"box"),
            Frame::ServerInfo(Bytes::from_static(b"box"))
        );
        let mut packet = vec![7; 32];
        packet.extend(b"datagram");
        let read = Frame::Packet {
            from: PEER,
            bytes: Bytes::from_static(b"datagram"),
        };
        assert_eq!(one(5, &packet), read);
        assert_eq!(one(6, b""), Frame::KeepAlive);
        for (behind, reason) in [
            (&[][..], GoneReason::Disconnected),
            (&[0], GoneReason::Disconnected),
            (&[1], GoneReason::NotHere),
            (&[0xf0, 9], GoneReason::Other(0xf0)),
        ] {
            let body = [&[7; 32], behind].concat();
            assert_eq!(one(8, &body), Frame::Gone { peer: PEER, reason });
        }
        assert_eq!(one(9, &[7; 51]), Frame::Present(PEER));
        assert_eq!(one(0x12, b"12345678"), Frame::Ping(*b"12345678"));
        assert_eq!(one(0x13, b"12345678 "), Frame::Pong(*b"12345678"));
        assert_eq!(one(0x14, b"dup\nlicate"), Frame::Health("duplicate".into()));
        let restarting = Frame::Restarting {
            reconnect_in: Duration::from_millis(256),
            try_for: Duration::from_secs(2),
        };
        assert_eq!(one(0x15, &[0, 0, 1, 0, 0, 0, 7, 0xd0]), restarting);
    }

    #[test]
    fn what_is_unknown_or_short_is_passed_over_and_what_is_too_long_is_not_waited_for() {
        assert_eq!(one(0xff, b"news"), Frame::Other(0xff));
        for (kind, length) in [(5, 31), (8, 31), (9, 0), (0x12, 7), (0x13, 0), (0x15, 7)] {
            assert_eq!(one(kind, &vec![0; length]), Frame::Other(kind));
        }
        assert_eq!(next(&mut bytes(1, &[0; 40])), Err(FrameError::Greeting));
        let mut long = BytesMut::from(&[5, 0, 0x10, 0, 1][..]);
        assert_eq!(next(&mut long), Err(FrameError::TooLong(0x10_0001)));
    }

    #[test]
    fn frames_are_written() {
        let mut out = BytesMut::new();
        send(&mut out, &PEER, b"datagram");
        let mut expected = vec![4, 0, 0, 0, 40];
        expected.extend([7; 32]);
        expected.extend(b"datagram");
        assert_eq!(out, expected);
        assert_eq!(out.len(), OVERHEAD + 8);
        out.clear();
        note_preferred(&mut out, true);
        ping(&mut out, b"12345678");
        pong(&mut out, b"87654321");
        let expected = b"\x07\0\0\0\x01\x01\x12\0\0\0\x0812345678\x13\0\0\0\x0887654321";
        assert_eq!(out, expected[..]);
        out.clear();
        client_info(&mut out, &PEER, &[8; 24], b"sealed");
        assert_eq!(out[..6], [2, 0, 0, 0, 62, 7]);
        assert_eq!(out[HEAD + 32..][..24], [8; 24]);
        assert!(out.ends_with(b"sealed"));
    }

    proptest! {
        /// However the stream is cut, the same frames come out of it.
        #[test]
        fn cuts_change_nothing(
            frames in proptest::collection::vec(
                (2u8..0x18, proptest::collection::vec(any::<u8>(), 0..80)), 0..8),
            cuts in proptest::collection::vec(1usize..40, 1..20),
        ) {
            let stream: Vec<u8> =
                frames.iter().flat_map(|(kind, body)| bytes(*kind, body)).collect();
            let expected: Vec<_> = frames.iter().map(|(kind, body)| one(*kind, body)).collect();
            let (mut buffer, mut found) = (BytesMut::new(), Vec::new());
            let (mut rest, mut cuts) = (&stream[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                buffer.extend_from_slice(now);
                while let Some(frame) = next(&mut buffer).unwrap() {
                    found.push(frame);
                }
                rest = later;
            }
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = next(&mut buffer) {}
        }
    }
}
