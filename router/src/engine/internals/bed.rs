//! What `fuzz/` drives: a router and the session of one peer, in memory.
//!
//! The peer is honest in its cryptography alone, so that what it seals may be anything.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::counters::{Counter, Counters};
use crate::engine::forward::Forwarder;
use crate::engine::forward::batch::{Message, UdpSink};
use crate::engine::forward::directory::{Change, Directory, Keys};
use crate::engine::forward::peer::{Setup, Shared};
use crate::engine::forward::port::{Content, Origin, Place, Port};
use crate::engine::forward::routes::Routes;
use crate::engine::offload::coalesce::{HOLD, Offload, TunSink};
use crate::engine::offload::segment::{SLACK, Segments};
use crate::engine::offload::vnet::{self, Header};
use crate::wireguard::keys::{PrivateKey, PublicKey};
use crate::wireguard::message::INITIATION;
use crate::wireguard::{Arena, LocalKey, Packets, Tunnel};

const ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 51820);
const MTU: u16 = 1420;
const INDEX: u32 = 0x0012_3456;
/// Between two inputs: the limiter's buckets fill again.
const STEP: Duration = Duration::from_millis(10);

/// Checks what comes out of a forwarder. All that a worker writes must be what it can read.
#[derive(Default)]
struct Wire {
    datagrams: Vec<Vec<u8>>,
}

impl Port for Wire {
    fn other(&mut self, _: &Origin, _: &[u8]) -> Counter {
        Counter::DropOther
    }

    fn hand_over(&mut self, _: usize, _: Content, _: &[u8]) -> bool {
        unreachable!("there is one worker")
    }
}

impl TunSink for Wire {
    fn write(&mut self, frame: &[u8]) {
        let head = frame.first_chunk();
        let header = head.and_then(Header::decode);
        let Some(header) = header else {
            panic!("a frame without a header: {frame:02x?}");
        };
        let mut buffer = [&frame[vnet::LEN..], &[0; SLACK]].concat();
        let length = buffer.len() - SLACK;
        let Ok(mut segments) = Segments::new(header, &mut buffer, length, 0) else {
            panic!("a frame that cannot be cut: {frame:02x?}");
        };
        let mut count = 0;
        while segments.next().is_some() {
            count += 1;
        }
        assert!(count > 0, "an empty frame");
    }
}

impl UdpSink for Wire {
    fn send(&mut self, arena: &[u8], messages: &[Message]) {
        for message in messages {
            let bytes = &arena[message.offset..][..message.length];
            let datagrams = bytes.chunks(message.size).map(<[u8]>::to_vec);
            self.datagrams.extend(datagrams);
        }
    }
}

/// A router with one peer, and that peer's end of the session.
pub struct Bed {
    forwarder: Forwarder,
    wire: Wire,
    peer: Tunnel,
    router: PublicKey,
    now: Duration,
}

impl Default for Bed {
    fn default() -> Self {
        Self::new()
    }
}

impl Bed {
    /// A router and a peer who have a session.
    pub fn new() -> Self {
        let [router, peer] =
            [1, 2].map(|seed| Arc::new(LocalKey::new(&PrivateKey::from_bytes([seed; 32]))));
        let place = Place {
            worker: 0,
            workers: 1,
        };
        let offload = Offload {
            vnet: true,
            tcp: true,
            udp: true,
        };
        let counters = Arc::new(Counters::new());
        let mut bed = Self {
            forwarder: Forwarder::new(place, MTU, router.clone(), offload, true, counters),
            wire: Wire::default(),
            peer: Tunnel::new(&peer, &router.public(), None, INDEX + 1),
            router: router.public(),
            now: Duration::ZERO,
        };
        let everything = ["0.0.0.0/0", "::/0"].map(str::parse);
        let routes = everything.into_iter().flatten().map(|cidr| (cidr, 0));
        let change = Change {
            add: vec![Setup {
                id: 0,
                public_key: peer.public(),
                preshared_key: None,
                index: INDEX,
                endpoints: Vec::new(),
                keepalive: None,
                roaming: true,
                shared: Arc::new(Shared::new(peer.public())),
            }],
            directory: Some(Arc::new(Directory {
                routes: Routes::new(routes),
                keys: Keys::from_iter([(peer.public(), 0)]),
                owners: vec![0],
            })),
            ..Change::default()
        };
        bed.forwarder.apply(change, bed.now, &mut bed.wire);
        let initiation = bed.initiation();
        bed.datagrams(&initiation, INITIATION);
        let response = bed.wire.datagrams.pop().unwrap_or_default();
        let mut confirmation = [0; INITIATION];
        match bed.peer.handshake(&response, bed.now, &mut confirmation) {
            Ok((Some(length), true)) => bed.datagrams(&confirmation[..length], length),
            other => panic!("no session: {other:?}"),
        }
        bed
    }

    /// The router's public key.
    pub fn router(&self) -> PublicKey {
        self.router
    }

    /// The router's receiver index of the session, or of one after it.
    pub fn index(&self) -> u32 {
        INDEX << 8 | 1
    }

    /// An initiation by the peer, as it should be.
    pub fn initiation(&mut self) -> [u8; INITIATION] {
        let mut initiation = [0; INITIATION];
        self.peer.initiate_again(&mut initiation);
        initiation
    }

    /// Datagrams that arrive together, each `stride` bytes long but the last.
    pub fn datagrams(&mut self, buffer: &[u8], stride: usize) {
        self.now += STEP;
        let origin = Origin {
            remote: ADDRESS,
            local: None,
            interface: 0,
            ecn: 3,
            number: None,
            relay: None,
        };
        let (now, wire) = (self.now, &mut self.wire);
        wire.datagrams.clear();
        self.forwarder.receive(&origin, buffer, stride, now, wire);
        self.forwarder.flush(wire);
    }

    /// Packets that the peer seals, whatever they are, and that arrive together: while more keep
    /// coming, if there are several.
    pub fn sealed(&mut self, packets: &[Vec<u8>]) {
        self.now += STEP;
        let mut sealed = Sealed::default();
        self.peer
            .seal(&mut Plain(packets.iter()), self.now, &mut sealed);
        let origin = Origin {
            remote: ADDRESS,
            local: None,
            interface: 0,
            ecn: 0,
            number: None,
            relay: None,
        };
        for (at, datagram) in sealed.all.iter().enumerate() {
            let (now, wire) = (self.now, &mut self.wire);
            let length = datagram.len();
            if at % 4 == 1 {
                self.forwarder.hold(now + HOLD / 4 * at as u32, wire);
            }
            self.forwarder.receive(&origin, datagram, length, now, wire);
        }
        self.forwarder.flush(&mut self.wire);
    }

    /// A read from the TUN device: virtio header and packet.
    pub fn device(&mut self, frame: &[u8]) {
        self.now += STEP;
        let Some(header) = frame.first_chunk().and_then(Header::decode) else {
            return;
        };
        let mut buffer = [&frame[vnet::LEN..], &[0; SLACK]].concat();
        let length = buffer.len() - SLACK;
        let (now, wire) = (self.now, &mut self.wire);
        wire.datagrams.clear();
        self.forwarder
            .transmit(header, &mut buffer, length, now, wire);
        self.forwarder.flush(wire);
    }
}

struct Plain<'a>(std::slice::Iter<'a, Vec<u8>>);

impl Packets for Plain<'_> {
    fn next(&mut self) -> Option<&[u8]> {
        self.0.next().map(Vec::as_slice)
    }
}

#[derive(Default)]
struct Sealed {
    slot: Vec<u8>,
    all: Vec<Vec<u8>>,
}

impl Arena for Sealed {
    fn slot(&mut self, length: usize) -> &mut [u8] {
        self.slot = vec![0; length];
        &mut self.slot
    }

    fn filled(&mut self, length: usize) {
        self.all.push(self.slot[..length].to_vec());
    }
}
