//! Disco messages about peer relays. They are sealed as all of disco is.

use std::net::SocketAddr;
use std::time::Duration;

use crate::tailnet::disco;
use crate::tailnet::keys::DiscoPublic;

const BIND: u8 = 4;
const CHALLENGE: u8 = 5;
const ANSWER: u8 = 6;
const CALL_ME_MAYBE_VIA: u8 = 7;
const ALLOCATE: u8 = 8;
const ALLOCATED: u8 = 9;

/// A place on a relay for two nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The relay's disco key.
    pub server: DiscoPublic,
    /// The nodes' disco keys.
    pub clients: [DiscoPublic; 2],
    /// Which of several of one relay is newer.
    pub lamport: u64,
    /// Number in the header of its datagrams, 24 bits.
    pub number: u32,
    /// How long both have to bind.
    pub bind_within: Duration,
    /// How long it lasts without traffic.
    pub lasts: Duration,
    /// Where the relay is.
    pub addresses: Vec<SocketAddr>,
}

/// What binding is about, the same in all three messages of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// The endpoint's number, which must be the header's.
    pub number: u32,
    /// Which try it is; not 0.
    pub generation: u32,
    /// Disco key of the other node.
    pub remote: DiscoPublic,
    /// From the relay, to be sent back to it.
    pub challenge: [u8; 32],
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// To a relay: this is where I am.
    Bind(Handshake),
    /// From a relay: are you there?
    Challenge(Handshake),
    /// To a relay: I am.
    Answer(Handshake),
    /// To a peer, only over DERP: reach me by this relay.
    CallMeMaybeVia(Endpoint),
    /// To a relay, only over DERP: an endpoint for these two.
    Allocate {
        /// Their disco keys.
        clients: [DiscoPublic; 2],
        /// Comes back in the answer.
        generation: u32,
    },
    /// From a relay, only over DERP.
    Allocated {
        /// The question's.
        generation: u32,
        /// What was asked for.
        endpoint: Endpoint,
    },
}

impl Message {
    /// Reads what was in a box. `None` for what is too short or of another kind.
    pub fn parse(clear: &[u8]) -> Option<Self> {
        let ([kind, version], body) = clear.split_first_chunk::<2>()?;
        let mut body = Reader(body);
        match (*kind, *version) {
            // Later versions have more behind.
            (BIND, _) => body.handshake().map(Self::Bind),
            (CHALLENGE, _) => body.handshake().map(Self::Challenge),
            (ANSWER, _) => body.handshake().map(Self::Answer),
            (CALL_ME_MAYBE_VIA, 0) => body.endpoint().map(Self::CallMeMaybeVia),
            (ALLOCATE, 0) => Some(Self::Allocate {
                clients: [body.key()?, body.key()?],
                generation: body.u32()?,
            }),
            (ALLOCATED, 0) => Some(Self::Allocated {
                generation: body.u32()?,
                endpoint: body.endpoint()?,
            }),
            _ => None,
        }
    }

    /// What goes into a box.
    pub fn clear(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        match self {
            Self::Bind(handshake) => handshake.write(BIND, &mut out),
            Self::Challenge(handshake) => handshake.write(CHALLENGE, &mut out),
            Self::Answer(handshake) => handshake.write(ANSWER, &mut out),
            Self::CallMeMaybeVia(endpoint) => {
                out.extend([CALL_ME_MAYBE_VIA, 0]);
                endpoint.write(&mut out);
            }
            Self::Allocate {
                clients,
                generation,
            } => {
                out.extend([ALLOCATE, 0]);
                out.extend(clients.iter().flat_map(DiscoPublic::as_bytes));
                out.extend(generation.to_be_bytes());
            }
            Self::Allocated {
                generation,
                endpoint,
            } => {
                out.extend([ALLOCATED, 0]);
                out.extend(generation.to_be_bytes());
                endpoint.write(&mut out);
            }
        }
        out
    }
}

impl Handshake {
    fn write(&self, kind: u8, out: &mut Vec<u8>) {
        out.extend([kind, 0]);
        out.extend(self.number.to_be_bytes());
        out.extend(self.generation.to_be_bytes());
        out.extend(self.remote.as_bytes());
        out.extend(self.challenge);
    }
}

impl Endpoint {
    fn write(&self, out: &mut Vec<u8>) {
        let nanos = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        out.extend(self.server.as_bytes());
        out.extend(self.clients.iter().flat_map(DiscoPublic::as_bytes));
        out.extend(self.lamport.to_be_bytes());
        out.extend(self.number.to_be_bytes());
        out.extend(nanos(self.bind_within).to_be_bytes());
        out.extend(nanos(self.lasts).to_be_bytes());
        out.extend(self.addresses.iter().flat_map(disco::bytes));
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn key(&mut self) -> Option<DiscoPublic> {
        self.take().map(DiscoPublic::from_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    /// Nanoseconds; below zero is none.
    fn duration(&mut self) -> Option<Duration> {
        let nanos = self.take().map(i64::from_be_bytes)?;
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(0)))
    }

    fn handshake(&mut self) -> Option<Handshake> {
        Some(Handshake {
            number: self.u32()?,
            generation: self.u32()?,
            remote: self.key()?,
            challenge: self.take()?,
        })
    }

    fn endpoint(&mut self) -> Option<Endpoint> {
        let endpoint = Endpoint {
            server: self.key()?,
            clients: [self.key()?, self.key()?],
            lamport: self.take().map(u64::from_be_bytes)?,
            number: self.u32()?,
            bind_within: self.duration()?,
            lasts: self.duration()?,
            addresses: {
                let (addresses, rest) = self.0.as_chunks();
                if addresses.is_empty() || !rest.is_empty() {
                    return None;
                }
                addresses.iter().map(disco::endpoint).collect()
            },
        };
        Some(endpoint)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in super::super) fn endpoint() -> Endpoint {
        Endpoint {
            server: DiscoPublic::from_bytes([1; 32]),
            clients: [2, 3].map(|byte| DiscoPublic::from_bytes([byte; 32])),
            lamport: 4,
            number: 5,
            bind_within: Duration::from_secs(1),
            lasts: Duration::from_secs(60),
            addresses: vec![
                "192.0.2.1:7".parse().unwrap(),
                "[2001:db8::1]:8".parse().unwrap(),
            ],
        }
    }

    fn messages() -> Vec<Message> {
        let handshake = Handshake {
            number: 1,
            generation: 2,
            remote: DiscoPublic::from_bytes([3; 32]),
            challenge: [4; 32],
        };
        vec![
            Message::Bind(handshake),
            Message::Challenge(handshake),
            Message::Answer(handshake),
            Message::CallMeMaybeVia(endpoint()),
            Message::Allocate {
                clients: endpoint().clients,
                generation: 9,
            },
            Message::Allocated {
                generation: 9,
                endpoint: endpoint(),
            },
        ]
    }

    #[test]
    fn messages_come_back() {
        for message in messages() {
            let clear = message.clear();
            assert_eq!(Message::parse(&clear), Some(message.clone()));
            for length in 0..clear.len() {
                // Whole addresses may be missing.
                let cut = Message::parse(&clear[..length]);
                assert!(cut.is_none() || length + 18 == clear.len(), "{message:?}");
            }
        }
    }

    /// The layout that `disco/disco.go` describes.
    #[test]
    fn bytes_as_go_writes_them() {
        let messages = messages();
        let mut expected = vec![4, 0, 0, 0, 0, 1, 0, 0, 0, 2];
        expected.extend([3; 32]);
        expected.extend([4; 32]);
        assert_eq!(messages[0].clear(), expected);
        let mut expected = vec![9, 0, 0, 0, 0, 9];
        expected.extend([1; 32]);
        expected.extend([2; 32]);
        expected.extend([3; 32]);
        expected.extend([0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 5]);
        expected.extend([0, 0, 0, 0, 0x3b, 0x9a, 0xca, 0]);
        expected.extend([0, 0, 0, 0x0d, 0xf8, 0x47, 0x58, 0]);
        expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1, 0, 7]);
        expected.extend([
            0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8,
        ]);
        assert_eq!(messages[5].clear(), expected);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(message) = Message::parse(&bytes) {
                prop_assert!(Message::parse(&message.clear()).is_some());
            }
        }
    }
}
