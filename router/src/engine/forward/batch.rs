//! Datagrams on their way to the underlay: sealed into one arena, grouped into messages that the
//! kernel cuts up (UDP GSO), sent with one call.

use std::net::{IpAddr, SocketAddr};

use crate::engine::forward::routes::PeerId;
use crate::engine::path::{Path, RelayId};
use crate::geneve;
use crate::wireguard::Arena;
use crate::wireguard::keys::PublicKey;

/// Bytes of sealed datagrams before they are sent. Larger ones fall out of the cache.
const ARENA: usize = 4 * 65_536;
/// Messages before they are sent.
pub(crate) const MESSAGES: usize = 64;
/// UDP payload of a message: what fits one IPv4 packet.
pub(crate) const LONGEST: usize = 65_507;
/// Datagrams of a message (`UDP_MAX_SEGMENTS` of kernels before 6.9).
pub(crate) const SEGMENTS: usize = 64;

/// Where a peer is, and which of our addresses it talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Its underlay address.
    pub(crate) remote: SocketAddr,
    /// Our address that it sent to last (sticky source).
    pub(crate) local: Option<IpAddr>,
    /// A node that carries to the peer what is behind a header with this number is there instead.
    pub(crate) number: Option<u32>,
}

impl Endpoint {
    /// The header that each datagram has.
    pub(crate) fn header(&self) -> Option<[u8; geneve::LEN]> {
        let number = self.number?;
        let header = geneve::Header {
            inner: geneve::Inner::WireGuard,
            control: false,
            number,
        };
        Some(header.bytes())
    }
}

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    /// Out of our sockets.
    Udp(Endpoint),
    /// Through a relay, to whoever has this key.
    Relay(RelayId, PublicKey),
    /// Both, for nobody knows whether the first way still leads there.
    Both(Endpoint, RelayId, PublicKey),
}

impl Destination {
    /// The address, if it goes out of our sockets alone.
    pub(crate) fn endpoint(&self) -> Option<&Endpoint> {
        match self {
            Self::Udp(endpoint) => Some(endpoint),
            Self::Relay(..) | Self::Both(..) => None,
        }
    }

    /// The way, for those outside.
    pub(crate) fn path(&self) -> Path {
        match self {
            Self::Udp(endpoint) => match endpoint.number {
                None => Path::Udp(endpoint.remote),
                Some(number) => Path::PeerRelay(endpoint.remote, number),
            },
            Self::Relay(relay, _) | Self::Both(_, relay, _) => Path::Relay(*relay),
        }
    }
}

/// One message: datagrams of equal size, the last of them perhaps shorter, contiguous in the arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message {
    /// Offset in the arena.
    pub(crate) offset: usize,
    /// Length of all datagrams in bytes.
    pub(crate) length: usize,
    /// Length of each datagram but the last.
    pub(crate) size: usize,
    /// Number of datagrams.
    pub(crate) segments: usize,
    /// Where to.
    pub(crate) to: Destination,
    /// Which peer's; none for a reply to a stranger.
    pub(crate) peer: Option<PeerId>,
    /// ECN bits of the underlay packets.
    pub(crate) ecn: u8,
}

impl Message {
    fn takes(&self, length: usize) -> bool {
        let whole = self.length == self.size * self.segments;
        whole && length <= self.size && self.segments < SEGMENTS && self.length + length <= LONGEST
    }
}

/// Where finished messages go.
pub(crate) trait UdpSink {
    /// Sends messages; drops and counts what the underlay does not take.
    fn send(&mut self, arena: &[u8], messages: &[Message]);
}

/// The datagrams of one worker that are not sent yet.
#[derive(Debug)]
pub(crate) struct Batch {
    arena: Box<[u8]>,
    used: usize,
    messages: Vec<Message>,
    gso: bool,
}

impl Batch {
    /// An empty batch. Without `gso` each datagram is a message.
    pub(crate) fn new(gso: bool) -> Self {
        Self {
            arena: vec![0; ARENA].into_boxed_slice(),
            used: 0,
            messages: Vec::with_capacity(MESSAGES),
            gso,
        }
    }

    /// Sends everything.
    pub(crate) fn flush(&mut self, sink: &mut impl UdpSink) {
        if !self.messages.is_empty() {
            sink.send(&self.arena[..self.used], &self.messages);
        }
        self.messages.clear();
        self.used = 0;
    }

    /// Opens the batch for datagrams to one destination. Without `gso` each is a message.
    pub(crate) fn lane<'a, S: UdpSink>(
        &'a mut self,
        sink: &'a mut S,
        to: Destination,
        peer: Option<PeerId>,
        ecn: u8,
        gso: bool,
    ) -> Lane<'a, S> {
        let gso = gso && self.gso;
        let extend = gso
            && self
                .messages
                .last()
                .is_some_and(|last| last.peer == peer && last.ecn == ecn && last.to == to);
        let header = to.endpoint().and_then(Endpoint::header);
        Lane {
            batch: self,
            sink,
            to,
            header,
            peer,
            ecn,
            gso,
            extend,
            count: 0,
        }
    }
}

/// A batch open for one destination.
#[derive(Debug)]
pub(crate) struct Lane<'a, S> {
    batch: &'a mut Batch,
    sink: &'a mut S,
    to: Destination,
    /// What each datagram begins with.
    header: Option<[u8; geneve::LEN]>,
    peer: Option<PeerId>,
    ecn: u8,
    gso: bool,
    /// Whether the last message has the same destination.
    extend: bool,
    /// Datagrams that were put in.
    count: u64,
}

impl<S: UdpSink> Lane<'_, S> {
    /// Datagrams that were put in.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Bytes before what is put in.
    fn before(&self) -> usize {
        self.header.map_or(0, |header| header.len())
    }

    /// Puts one ready datagram into the batch.
    pub(crate) fn push(&mut self, datagram: &[u8]) {
        self.slot(datagram.len()).copy_from_slice(datagram);
        self.filled(datagram.len());
    }
}

impl<S: UdpSink> Arena for Lane<'_, S> {
    fn slot(&mut self, length: usize) -> &mut [u8] {
        let before = self.before();
        let length = before + length;
        let full = self.batch.messages.len() == MESSAGES
            && !self
                .batch
                .messages
                .last()
                .is_some_and(|last| self.extend && last.takes(length));
        if full || self.batch.used + length > ARENA {
            self.batch.flush(self.sink);
            self.extend = false;
        }
        let slot = &mut self.batch.arena[self.batch.used..self.batch.used + length];
        let (head, rest) = slot.split_at_mut(before);
        if let Some(header) = &self.header {
            head.copy_from_slice(header);
        }
        rest
    }

    fn filled(&mut self, length: usize) {
        let length = self.before() + length;
        self.count += 1;
        let offset = self.batch.used;
        self.batch.used += length;
        match self.batch.messages.last_mut() {
            Some(last) if self.extend && last.takes(length) => {
                last.length += length;
                last.segments += 1;
            }
            _ => {
                self.batch.messages.push(Message {
                    offset,
                    length,
                    size: length,
                    segments: 1,
                    to: self.to,
                    peer: self.peer,
                    ecn: self.ecn,
                });
                self.extend = self.gso;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Sent(Vec<(Destination, u8, Vec<u8>)>, usize);

    impl UdpSink for Sent {
        fn send(&mut self, arena: &[u8], messages: &[Message]) {
            assert!(messages.len() <= MESSAGES);
            for message in messages {
                assert!(message.length <= LONGEST && message.segments <= SEGMENTS);
                let bytes = &arena[message.offset..message.offset + message.length];
                let datagrams: Vec<_> = bytes.chunks(message.size).collect();
                assert_eq!(datagrams.len(), message.segments);
                self.1 += 1;
                for datagram in datagrams {
                    let header = message.to.endpoint().and_then(Endpoint::header);
                    let inner = match header {
                        Some(header) => datagram.strip_prefix(&header[..]).unwrap(),
                        None => datagram,
                    };
                    self.0.push((message.to, message.ecn, inner.to_vec()));
                }
            }
        }
    }

    fn endpoint(host: u8) -> Destination {
        Destination::Udp(Endpoint {
            remote: SocketAddr::from(([192, 0, 2, host], 51820)),
            local: None,
            number: (host == 2).then_some(0x01_0203),
        })
    }

    proptest! {
        #[test]
        fn what_is_sent_is_what_was_put_in(
            lanes in proptest::collection::vec(
                (0u8..3, 0u8..2, proptest::collection::vec(prop_oneof![Just(1452usize), Just(96), 32usize..1500], 1..60)),
                0..40,
            ),
            gso: bool,
        ) {
            let mut batch = Batch::new(gso);
            let mut sent = Sent::default();
            let mut expected = Vec::new();
            let mut serial = 0u32;
            for (host, ecn, lengths) in lanes {
                let mut lane = batch.lane(&mut sent, endpoint(host), Some(host.into()), ecn, true);
                for length in lengths {
                    serial += 1;
                    let mut datagram = vec![host; length];
                    datagram[..4].copy_from_slice(&serial.to_be_bytes());
                    lane.push(&datagram);
                    expected.push((endpoint(host), ecn, datagram));
                }
            }
            batch.flush(&mut sent);
            prop_assert_eq!(sent.0, expected);
        }
    }

    #[test]
    fn equal_datagrams_share_messages_across_lanes() {
        let mut batch = Batch::new(true);
        let mut sent = Sent::default();
        for _ in 0..3 {
            let mut lane = batch.lane(&mut sent, endpoint(1), Some(1), 0, true);
            for _ in 0..15 {
                lane.push(&[7; 1452]);
            }
        }
        batch.flush(&mut sent);
        assert_eq!((sent.0.len(), sent.1), (45, 1));
    }
}
