//! Two forwarders over a simulated network: loss, duplication, reordering, roaming, forgery.
//!
//! Handshakes are spared from loss: boringtun repeats them by a clock of its own, after 5 s.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod change;
mod elsewhere;
mod handshake;
mod hostile;
mod inside;
mod relay;
mod simulation;
mod timing;

use std::net::{IpAddr, SocketAddr};

use super::*;
use crate::engine::forward::batch::{Destination, Message, UdpSink};
use crate::engine::forward::directory::Keys;
use crate::engine::forward::peer::{JUDGE_AFTER, Setup, Shared};
use crate::engine::forward::routes::Routes;
use crate::engine::forward::staged::{STAGED, STAGED_TOTAL};
use crate::engine::forward::wheel::TICK;
use crate::engine::offload::coalesce::TunSink;
use crate::engine::offload::segment::{SLACK, Segments};
use crate::engine::packets::Flow;
use crate::engine::path::Path;
use crate::wireguard::Packets as _;
use crate::wireguard::keys::{PresharedKey, PrivateKey};

const OFFLOAD: Offload = Offload {
    vnet: true,
    tcp: true,
    udp: true,
};

/// A datagram on the simulated underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Datagram {
    to: SocketAddr,
    local: Option<IpAddr>,
    bytes: Vec<u8>,
    ecn: u8,
}

/// Collects what a forwarder gives away.
#[derive(Default)]
struct Wire {
    packets: Vec<Vec<u8>>,
    datagrams: Vec<Datagram>,
    relayed: Vec<(Path, Vec<u8>)>,
    /// Where else what went through a relay was to go.
    both: Vec<Path>,
    handed: Vec<(usize, Content, Vec<u8>)>,
    /// Other workers take nothing.
    stuffed: bool,
    /// Messages between nodes, if somebody takes them.
    inside: Option<Vec<Vec<u8>>>,
}

impl Port for Wire {
    fn other(&mut self, _: &Origin, _: &[u8]) -> Counter {
        Counter::DropOther
    }

    fn takes_inside(&self) -> bool {
        self.inside.is_some()
    }

    fn inside(&mut self, packet: &[u8]) -> Counter {
        self.inside.get_or_insert_default().push(packet.to_vec());
        Counter::RxInside
    }

    fn hand_over(&mut self, worker: usize, content: Content, bytes: &[u8]) -> bool {
        if !self.stuffed {
            self.handed.push((worker, content, bytes.to_vec()));
        }
        !self.stuffed
    }
}

impl TunSink for Wire {
    fn write(&mut self, frame: &[u8]) {
        let (head, packet) = frame.split_first_chunk().unwrap();
        let header = vnet::Header::decode(head).unwrap();
        let mut buffer = [packet, &[0; SLACK]].concat();
        let mut segments = Segments::new(header, &mut buffer, packet.len(), 0).unwrap();
        while let Some(segment) = segments.next() {
            self.packets.push(segment.to_vec());
        }
    }
}

impl UdpSink for Wire {
    fn send(&mut self, arena: &[u8], messages: &[Message]) {
        for message in messages {
            let bytes = &arena[message.offset..message.offset + message.length];
            if let Destination::Both(endpoint, ..) = message.to {
                self.both.push(Destination::Udp(endpoint).path());
            }
            let Some(endpoint) = message.to.endpoint() else {
                let relayed = bytes.chunks(message.size).map(<[u8]>::to_vec);
                self.relayed
                    .extend(relayed.map(|bytes| (message.to.path(), bytes)));
                continue;
            };
            for datagram in bytes.chunks(message.size) {
                self.datagrams.push(Datagram {
                    to: endpoint.remote,
                    local: endpoint.local,
                    bytes: datagram.to_vec(),
                    ecn: message.ecn,
                });
            }
        }
    }
}

/// One end: a forwarder, its key, its address.
struct End {
    forwarder: Forwarder,
    wire: Wire,
    counters: Arc<Counters>,
    shared: Arc<Shared>,
    key: PrivateKey,
    address: SocketAddr,
    /// Our address that datagrams come to, if that is known.
    local: Option<IpAddr>,
    now: Duration,
}

const THEM: PeerId = 0;

impl End {
    fn new(seed: u8) -> Self {
        Self::placed(
            seed,
            Place {
                worker: 0,
                workers: 1,
            },
        )
    }

    fn placed(seed: u8, place: Place) -> Self {
        let key = PrivateKey::from_bytes([seed; 32]);
        let counters = Arc::new(Counters::new());
        let local = Arc::new(LocalKey::new(&key));
        let shared = Arc::new(Shared::new(key.public()));
        Self {
            forwarder: Forwarder::new(place, 1420, local, OFFLOAD, true, counters.clone()),
            wire: Wire::default(),
            counters,
            shared,
            key,
            address: SocketAddr::from(([192, 0, 2, seed], 51820)),
            local: None,
            now: Duration::ZERO,
        }
    }

    /// Adds the other end as the only peer.
    fn meet(&mut self, them: &Self, allowed: &[&str], endpoint: bool, keepalive: Option<u64>) {
        let public = them.key.public();
        let directory = Directory {
            routes: Routes::new(allowed.iter().map(|cidr| (cidr.parse().unwrap(), THEM))),
            keys: Keys::from_iter([(public, THEM)]),
            owners: vec![0],
        };
        let setup = Setup {
            id: THEM,
            public_key: public,
            preshared_key: Some(PresharedKey::from_bytes([9; 32])),
            // Even: it belongs to the first worker of one and of two.
            index: 0x0012_3400 + 2 * u32::from(self.key.public().0[0]),
            endpoints: endpoint.then_some(them.address).into_iter().collect(),
            keepalive: keepalive.map(Duration::from_secs),
            roaming: true,
            shared: self.shared.clone(),
        };
        self.change(Change {
            add: vec![setup],
            directory: Some(Arc::new(directory)),
            ..Change::default()
        });
    }

    /// Adds `count` peers that never answer; peer n has 10.1.n.0/24.
    fn crowd(&mut self, count: u32, keepalive: Option<Duration>) {
        let cidr = |id: u32| format!("10.1.{id}.0/24").parse().unwrap();
        let setup = |id: u32| Setup {
            id,
            public_key: PrivateKey::from_bytes([id as u8 + 10; 32]).public(),
            preshared_key: None,
            index: id,
            endpoints: vec![SocketAddr::from(([192, 0, 2, id as u8 + 1], 51820))],
            keepalive,
            roaming: true,
            shared: self.shared.clone(),
        };
        let directory = Directory {
            routes: Routes::new((0..count).map(|id| (cidr(id), id))),
            keys: Keys::from_iter([]),
            owners: vec![0; count as usize],
        };
        self.change(Change {
            add: (0..count).map(setup).collect(),
            directory: Some(Arc::new(directory)),
            ..Change::default()
        });
    }

    fn change(&mut self, change: Change) {
        self.forwarder.apply(change, self.now, &mut self.wire);
    }

    /// A packet from the TUN device.
    fn transmit(&mut self, packet: &[u8]) {
        let mut buffer = [packet, &[0; SLACK]].concat();
        let header = vnet::Header::PLAIN;
        let (now, length) = (self.now, packet.len());
        self.forwarder
            .transmit(header, &mut buffer, length, now, &mut self.wire);
        self.forwarder.flush(&mut self.wire);
    }

    fn receive(&mut self, from: SocketAddr, datagram: &[u8], ecn: u8) {
        let origin = Origin {
            remote: from,
            local: self.local,
            interface: u32::from(self.local.is_some()),
            ecn,
            number: None,
            relay: None,
        };
        let (now, stride) = (self.now, datagram.len());
        self.forwarder
            .receive(&origin, datagram, stride, now, &mut self.wire);
        self.forwarder.flush(&mut self.wire);
    }

    /// Lets time pass for this end.
    fn tick(&mut self, later: Duration) {
        self.now += later;
        self.forwarder.tick(self.now, &mut self.wire);
    }

    fn count(&self, counter: Counter) -> u64 {
        self.counters.get(counter)
    }

    fn drops(&self) -> Vec<(&'static str, u64)> {
        Counter::ALL
            .iter()
            .map(|counter| (counter.label(), self.count(*counter)))
            .filter(|(label, value)| label.starts_with("drop_") && *value > 0)
            .collect()
    }
}

/// Carries datagrams to and fro until none is left.
fn settle(a: &mut End, b: &mut End) {
    loop {
        let (from_a, from_b) = (
            std::mem::take(&mut a.wire.datagrams),
            std::mem::take(&mut b.wire.datagrams),
        );
        if from_a.is_empty() && from_b.is_empty() {
            return;
        }
        let (at_a, at_b) = (a.address, b.address);
        for datagram in from_a.into_iter().filter(|d| d.to == at_b) {
            b.receive(at_a, &datagram.bytes, datagram.ecn);
        }
        for datagram in from_b.into_iter().filter(|d| d.to == at_a) {
            a.receive(at_b, &datagram.bytes, datagram.ecn);
        }
    }
}

/// Client and router with a session. The client is 10.0.0.2, the router 10.0.0.1 (and v6 alike).
fn connected() -> (End, End) {
    let (mut client, mut router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24", "fd00::/64"], true, None);
    router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], false, None);
    client.transmit(&up(0));
    settle(&mut client, &mut router);
    assert_eq!(std::mem::take(&mut router.wire.packets), [up(0)]);
    (client, router)
}

/// A packet from the client to the router.
fn up(serial: u16) -> Vec<u8> {
    Flow::new(serial % 2 == 1, false).packet(serial, 0, 0, &[serial.to_be_bytes(); 40].concat())
}

/// A packet from the router to the client.
fn down(serial: u16) -> Vec<u8> {
    let flow = Flow {
        source: 1,
        destination: 2,
        ..Flow::new(serial % 2 == 1, false)
    };
    flow.packet(serial, 0, 0, &[serial.to_be_bytes(); 40].concat())
}
