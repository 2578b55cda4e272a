//! Disco: how nodes find underlay paths to each other, on the WireGuard socket.
//!
//! After Tailscale's `disco/disco.go`: magic, sender's disco key, nonce, and a NaCl box with type, version and
//! body. Opening a box costs an X25519 for each new peer, so ask for the sender's key first and open only what
//! comes from a key that the map knows; [`Boxes`] keeps what the X25519 has yielded.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crypto_box::aead::Aead as _;
use crypto_box::{PublicKey, SalsaBox, SecretKey};

use crate::tailnet::keys::{DiscoPublic, DiscoSecret, NodePublic};

/// What every disco datagram begins with: "TS" and a speech balloon in UTF-8.
pub const MAGIC: [u8; 6] = *b"TS\xf0\x9f\x92\xac";
const NONCE: usize = 24;
const HEADER: usize = MAGIC.len() + 32 + NONCE;
/// An address, IPv4 mapped into IPv6, and a port.
const ENDPOINT: usize = 18;
/// Boxes that are kept. Each is 32 bytes of key.
const KEPT: usize = 16_384;

const PING: u8 = 1;
const PONG: u8 = 2;
const CALL_ME_MAYBE: u8 = 3;

/// Ties a pong to its ping; from a good random source.
pub type Transaction = [u8; 12];

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Asks whether this path carries datagrams.
    Ping {
        /// Comes back in the pong.
        transaction: Transaction,
        /// The node that the sender says it is: several can share a disco key. Only together with the map it means
        /// something.
        node: Option<NodePublic>,
        /// Zeroes behind it in bytes, to find out what size the path carries.
        padding: usize,
    },
    /// Answers a ping.
    Pong {
        /// The ping's.
        transaction: Transaction,
        /// Where the ping came from.
        source: SocketAddr,
    },
    /// Only over a relay: asks for pings to these endpoints, which replace those known so far.
    CallMeMaybe(
        /// The sender's endpoints.
        Vec<SocketAddr>,
    ),
}

impl Message {
    /// Reads what was in a box. `None` for what is too short or of a kind that is not known.
    pub fn parse(clear: &[u8]) -> Option<Self> {
        let (&[kind, version], body) = clear.split_first_chunk::<2>()?;
        match kind {
            PING => {
                let (transaction, rest) = body.split_first_chunk::<12>()?;
                let node = rest.first_chunk::<32>();
                Some(Self::Ping {
                    transaction: *transaction,
                    node: node
                        .filter(|key| **key != [0; 32])
                        .map(|key| NodePublic::from_bytes(*key)),
                    padding: rest.len() - node.map_or(0, |key| key.len()),
                })
            }
            PONG => {
                let (transaction, rest) = body.split_first_chunk::<12>()?;
                Some(Self::Pong {
                    transaction: *transaction,
                    source: endpoint(rest.first_chunk()?),
                })
            }
            // Another version, or a torn list, says nothing of endpoints; the call is one all the same.
            CALL_ME_MAYBE if version != 0 || !body.len().is_multiple_of(ENDPOINT) => {
                Some(Self::CallMeMaybe(Vec::new()))
            }
            CALL_ME_MAYBE => {
                let endpoints = body.as_chunks::<ENDPOINT>().0;
                Some(Self::CallMeMaybe(endpoints.iter().map(endpoint).collect()))
            }
            _ => None,
        }
    }

    /// What goes into a box.
    pub fn clear(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        match self {
            Self::Ping {
                transaction,
                node,
                padding,
            } => {
                out.extend([PING, 0]);
                out.extend(transaction);
                if let Some(node) = node {
                    out.extend(node.as_bytes());
                }
                out.resize(out.len() + padding, 0);
            }
            Self::Pong {
                transaction,
                source,
            } => {
                out.extend([PONG, 0]);
                out.extend(transaction);
                out.extend(bytes(source));
            }
            Self::CallMeMaybe(endpoints) => {
                out.extend([CALL_ME_MAYBE, 0]);
                out.extend(endpoints.iter().flat_map(bytes));
            }
        }
        out
    }
}

/// Reads an address, IPv4 mapped into IPv6, and a port.
pub(super) fn endpoint(bytes: &[u8; ENDPOINT]) -> SocketAddr {
    let (address, port) = bytes.split_at(16);
    let address = <[u8; 16]>::try_from(address).unwrap_or_default();
    let port = u16::from_be_bytes([port[0], port[1]]);
    SocketAddr::new(Ipv6Addr::from(address).to_canonical(), port)
}

/// Writes what [`endpoint`] reads.
pub(super) fn bytes(endpoint: &SocketAddr) -> [u8; ENDPOINT] {
    let mut bytes = [0; ENDPOINT];
    let address = match endpoint.ip() {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    bytes[..16].copy_from_slice(&address.octets());
    bytes[16..].copy_from_slice(&endpoint.port().to_be_bytes());
    bytes
}

/// Who says to have sent a datagram; `None` when it is no disco.
pub fn sender(datagram: &[u8]) -> Option<DiscoPublic> {
    let rest = datagram.strip_prefix(&MAGIC)?;
    let key = *rest.first_chunk::<32>()?;
    (datagram.len() > HEADER && key != [0; 32]).then(|| DiscoPublic::from_bytes(key))
}

/// Seals and opens for one disco key of ours.
pub struct Boxes {
    public: DiscoPublic,
    secret: SecretKey,
    boxes: HashMap<DiscoPublic, SalsaBox>,
}

impl Boxes {
    /// For our key.
    pub fn new(secret: &DiscoSecret) -> Self {
        Self {
            public: secret.public(),
            secret: SecretKey::from_bytes(*secret.expose()),
            boxes: HashMap::new(),
        }
    }

    /// What is in a datagram from `sender`. `None` when it is not from there, or of a kind that is not known.
    /// Ask only for senders that the map knows: each new one costs an X25519 and a place.
    pub fn open(&mut self, sender: &DiscoPublic, datagram: &[u8]) -> Option<Message> {
        Message::parse(&self.open_clear(sender, datagram)?)
    }

    /// The same for a message of any kind.
    pub fn open_clear(&mut self, sender: &DiscoPublic, datagram: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = datagram
            .get(HEADER - NONCE..)?
            .split_first_chunk::<NONCE>()?;
        self.boxed(sender).decrypt(nonce.into(), sealed).ok()
    }

    /// The datagram with `message` for `receiver`. The nonce must be a random one.
    pub fn seal(
        &mut self,
        receiver: &DiscoPublic,
        message: &Message,
        nonce: [u8; NONCE],
    ) -> Option<Vec<u8>> {
        self.seal_clear(receiver, &message.clear(), nonce)
    }

    /// The same with what a message of any kind is when it is not sealed.
    pub fn seal_clear(
        &mut self,
        receiver: &DiscoPublic,
        clear: &[u8],
        nonce: [u8; NONCE],
    ) -> Option<Vec<u8>> {
        let sealed = self.boxed(receiver).encrypt((&nonce).into(), clear).ok()?;
        let mut out = Vec::with_capacity(HEADER + sealed.len());
        out.extend(MAGIC);
        out.extend(self.public.as_bytes());
        out.extend(nonce);
        out.extend(sealed);
        Some(out)
    }

    /// Forgets a key that nobody has any more.
    pub fn forget(&mut self, peer: &DiscoPublic) {
        self.boxes.remove(peer);
    }

    /// Forgets all other keys.
    pub fn keep(&mut self, peers: &BTreeSet<DiscoPublic>) {
        self.boxes.retain(|peer, _| peers.contains(peer));
    }

    fn boxed(&mut self, peer: &DiscoPublic) -> &SalsaBox {
        if self.boxes.len() >= KEPT && !self.boxes.contains_key(peer) {
            self.boxes.clear();
        }
        let secret = &self.secret;
        self.boxes
            .entry(*peer)
            .or_insert_with(|| SalsaBox::new(&PublicKey::from_bytes(*peer.as_bytes()), secret))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn messages() -> Vec<Message> {
        vec![
            Message::Ping {
                transaction: [1; 12],
                node: Some(NodePublic::from_bytes([2; 32])),
                padding: 0,
            },
            Message::Ping {
                transaction: [1; 12],
                node: Some(NodePublic::from_bytes([2; 32])),
                padding: 100,
            },
            Message::Ping {
                transaction: [1; 12],
                node: None,
                padding: 5,
            },
            Message::Pong {
                transaction: [3; 12],
                source: "192.0.2.1:41641".parse().unwrap(),
            },
            Message::Pong {
                transaction: [3; 12],
                source: "[2001:db8::1]:41641".parse().unwrap(),
            },
            Message::CallMeMaybe(vec![]),
            Message::CallMeMaybe(vec![
                "192.0.2.1:1".parse().unwrap(),
                "[2001:db8::1]:65535".parse().unwrap(),
            ]),
        ]
    }

    #[test]
    fn messages_come_back() {
        for message in messages() {
            assert_eq!(Message::parse(&message.clear()), Some(message));
        }
    }

    /// Bytes of Tailscale's own tests (`disco/disco_test.go` describes the same layout).
    #[test]
    fn bytes_as_go_writes_them() {
        let ping = Message::Ping {
            transaction: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
            node: None,
            padding: 3,
        };
        let expected = [1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0];
        assert_eq!(ping.clear(), expected);
        let pong = Message::Pong {
            transaction: [1; 12],
            source: "2.3.4.5:1234".parse().unwrap(),
        };
        let mut expected = vec![2, 0];
        expected.extend([1; 12]);
        expected.extend([
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 2, 3, 4, 5, 4, 0xd2,
        ]);
        assert_eq!(pong.clear(), expected);
    }

    #[test]
    fn more_behind_and_later_versions() {
        let mut pong = messages()[3].clear();
        pong.extend([1, 2, 3]);
        assert_eq!(Message::parse(&pong), Some(messages()[3].clone()));
        let mut call = messages()[6].clear();
        call.push(0);
        assert_eq!(Message::parse(&call), Some(Message::CallMeMaybe(vec![])));
        let mut call = messages()[6].clear();
        call[1] = 1;
        assert_eq!(Message::parse(&call), Some(Message::CallMeMaybe(vec![])));
        assert_eq!(Message::parse(&[4, 0, 1, 2, 3]), None);
        assert_eq!(Message::parse(&[1]), None);
    }

    #[test]
    fn boxes_open_for_whom_they_are() {
        let keys: Vec<_> = (0..3).map(|_| DiscoSecret::generate().unwrap()).collect();
        let [mut a, mut b, mut c] = [0, 1, 2].map(|at| Boxes::new(&keys[at]));
        for message in messages() {
            let datagram = a.seal(&keys[1].public(), &message, [7; 24]).unwrap();
            assert_eq!(sender(&datagram), Some(keys[0].public()));
            assert_eq!(b.open(&keys[0].public(), &datagram), Some(message));
            assert_eq!(c.open(&keys[0].public(), &datagram), None);
            assert_eq!(b.open(&keys[2].public(), &datagram), None);
            for length in 0..datagram.len() {
                assert_eq!(b.open(&keys[0].public(), &datagram[..length]), None);
            }
        }
        assert_eq!(sender(&[0; 100]), None);
        assert_eq!(sender(&MAGIC), None);
    }

    /// The NaCl box itself: the known answer of NaCl's own tests (`tests/box.c`), reversed by us.
    #[test]
    fn the_box_is_nacls() {
        let alice: DiscoSecret =
            "privkey:77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
                .parse()
                .unwrap();
        let bob: DiscoPublic =
            "discokey:de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
                .parse()
                .unwrap();
        let nonce: [u8; 24] = [
            0x69, 0x69, 0x6e, 0xe9, 0x55, 0xb6, 0x2b, 0x73, 0xcd, 0x62, 0xbd, 0xa8, 0x75, 0xfc,
            0x73, 0xd6, 0x82, 0x19, 0xe0, 0x03, 0x6b, 0x7a, 0x0b, 0x37,
        ];
        let mut boxes = Boxes::new(&alice);
        let text = [0xbe, 0x07, 0x5f, 0xc5, 0x3c, 0x81, 0xf2, 0xd5];
        let sealed = boxes
            .boxed(&bob)
            .encrypt((&nonce).into(), text.as_slice())
            .unwrap();
        // The stream does not depend on what follows, so the first bytes are those of the published box.
        assert_eq!(
            sealed[16..],
            [0x8e, 0x99, 0x3b, 0x9f, 0x48, 0x68, 0x12, 0x73]
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(message) = Message::parse(&bytes) {
                let again = Message::parse(&message.clear());
                prop_assert!(again.is_some());
            }
            let _ = sender(&bytes);
        }
    }
}
