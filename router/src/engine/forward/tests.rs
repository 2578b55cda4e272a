//! Two forwarders over a simulated network: loss, duplication, reordering, roaming, forgery.
//!
//! Handshakes are spared from loss: boringtun repeats them by a clock of its own, after 5 s.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::engine::batch::Message;
use crate::engine::packets::Flow;
use crate::engine::peer::Setup;
use crate::engine::peer::Shared;
use crate::engine::routes::Routes;
use crate::engine::segment::SLACK;
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
    bytes: Vec<u8>,
    ecn: u8,
}

/// Collects what a forwarder gives away.
#[derive(Default)]
struct Wire {
    packets: Vec<Vec<u8>>,
    datagrams: Vec<Datagram>,
    handed: Vec<(usize, Content, Vec<u8>)>,
    /// Other workers take nothing.
    stuffed: bool,
}

impl Port for Wire {
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
            for datagram in bytes.chunks(message.size) {
                self.datagrams.push(Datagram {
                    to: message.endpoint.remote,
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
            now: Duration::ZERO,
        }
    }

    /// Adds the other end as the only peer.
    fn meet(&mut self, them: &Self, allowed: &[&str], endpoint: bool, keepalive: Option<u64>) {
        let public = them.key.public();
        let directory = Directory {
            routes: Routes::new(allowed.iter().map(|cidr| (cidr.parse().unwrap(), THEM))),
            keys: HashMap::from([(public, THEM)]),
            owners: vec![0],
        };
        let setup = Setup {
            id: THEM,
            public_key: public,
            preshared_key: Some(PresharedKey::from_bytes([9; 32])),
            // Even: it belongs to the first worker of one and of two.
            index: 0x0012_3400 + 2 * u32::from(self.key.public().0[0]),
            endpoint: endpoint.then_some(them.address),
            keepalive: keepalive.map(Duration::from_secs),
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
            endpoint: Some(SocketAddr::from(([192, 0, 2, id as u8 + 1], 51820))),
            keepalive,
            shared: self.shared.clone(),
        };
        let directory = Directory {
            routes: Routes::new((0..count).map(|id| (cidr(id), id))),
            keys: HashMap::new(),
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
            local: None,
            ecn,
        };
        let (now, stride) = (self.now, datagram.len());
        self.forwarder
            .receive(&origin, datagram, stride, now, &mut self.wire);
        self.forwarder.flush(&mut self.wire);
    }

    fn tick(&mut self, later: Duration) {
        self.now += later;
        while !self.forwarder.tick(self.now, &mut self.wire) {}
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

#[test]
fn packets_that_wait_for_the_handshake_arrive_in_order() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24", "fd00::/64"], true, None);
    router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], false, None);
    let sent: Vec<_> = (0..20).map(|serial| up(serial * 2)).collect();
    for packet in &sent {
        client.transmit(packet);
    }
    assert_eq!(client.wire.datagrams.len(), 1, "one initiation, no more");
    settle(&mut client, &mut router);
    assert_eq!(router.wire.packets, sent);
    for end in [&client, &router] {
        assert_eq!(end.count(Counter::HandshakesCompleted), 1);
        assert_eq!(end.drops(), []);
        let stats = end.shared.stats();
        assert!(stats.last_handshake.is_some());
        // An initiation one way, a response the other; data and a keepalive.
        assert!(stats.rx_bytes >= 92 && stats.tx_bytes >= 92);
    }
    let (ours, theirs) = (client.shared.stats(), router.shared.stats());
    assert_eq!(
        (ours.tx_bytes, ours.rx_bytes),
        (theirs.rx_bytes, theirs.tx_bytes)
    );
}

#[test]
fn too_many_waiting_packets_drop_the_oldest() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24"], true, None);
    router.meet(&client, &["10.0.0.2/32"], false, None);
    let sent: Vec<_> = (0..STAGED as u16 + 10)
        .map(|serial| up(serial * 2))
        .collect();
    for packet in &sent {
        client.transmit(packet);
    }
    settle(&mut client, &mut router);
    assert_eq!(router.wire.packets, sent[10..]);
    assert_eq!(client.count(Counter::DropStaged), 10);
}

#[test]
fn both_start_at_once() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24", "fd00::/64"], true, None);
    router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], true, None);
    client.transmit(&up(1));
    router.transmit(&down(1));
    settle(&mut client, &mut router);
    client.transmit(&up(2));
    router.transmit(&down(2));
    settle(&mut client, &mut router);
    assert!(router.wire.packets.contains(&up(2)));
    assert!(client.wire.packets.contains(&down(2)));
}

#[test]
fn replayed_datagrams_are_dropped() {
    let (mut client, mut router) = connected();
    client.transmit(&up(1));
    let datagram = client.wire.datagrams.remove(0);
    for _ in 0..3 {
        router.receive(client.address, &datagram.bytes, 0);
    }
    assert_eq!(router.wire.packets, [up(1)]);
    assert_eq!(router.count(Counter::DropReplay), 2);
}

#[test]
fn a_replayed_handshake_changes_nothing() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24"], true, None);
    router.meet(&client, &["10.0.0.2/32"], false, None);
    client.transmit(&up(0));
    let initiation = client.wire.datagrams[0].clone();
    settle(&mut client, &mut router);
    let elsewhere = SocketAddr::from(([203, 0, 113, 1], 1));
    router.receive(elsewhere, &initiation.bytes, 0);
    assert_eq!(router.count(Counter::DropHandshake), 1);
    assert_eq!(router.wire.datagrams, []);
    assert_eq!(router.shared.stats().endpoint, Some(client.address));
}

#[test]
fn endpoints_follow_authentic_datagrams_only() {
    let (mut client, mut router) = connected();
    let moved = SocketAddr::from(([198, 51, 100, 7], 4444));
    client.transmit(&up(1));
    let mut forged = client.wire.datagrams[0].bytes.clone();
    *forged.last_mut().unwrap() ^= 1;
    router.receive(moved, &forged, 0);
    assert_eq!(router.count(Counter::DropAuth), 1);
    assert_eq!(router.shared.stats().endpoint, Some(client.address));

    let authentic = client.wire.datagrams.remove(0).bytes;
    router.receive(moved, &authentic, 0);
    assert_eq!(router.shared.stats().endpoint, Some(moved));
    router.transmit(&down(1));
    assert_eq!(router.wire.datagrams.pop().unwrap().to, moved);

    // The same datagram from somewhere else again: replayed, so not believed.
    router.receive(client.address, &authentic, 0);
    assert_eq!(router.shared.stats().endpoint, Some(moved));
}

#[test]
fn spoofed_inner_sources_are_dropped() {
    let (mut client, mut router) = connected();
    let flow = |source| Flow {
        source,
        ..Flow::new(false, false)
    };
    for source in [2, 3, 2] {
        client.transmit(&flow(source).packet(source.into(), 0, 0, b"from"));
    }
    settle(&mut client, &mut router);
    assert_eq!(router.wire.packets.len(), 2);
    assert_eq!(router.drops(), [(Counter::DropSource.label(), 1)]);
}

#[test]
fn removed_peers_end_at_once() {
    let (mut client, mut router) = connected();
    client.transmit(&up(1));
    router.change(Change {
        remove: vec![THEM],
        directory: Some(Arc::new(Directory {
            routes: Routes::new([]),
            keys: HashMap::new(),
            owners: vec![],
        })),
        ..Change::default()
    });
    settle(&mut client, &mut router);
    router.transmit(&down(1));
    assert_eq!(router.wire.packets, [] as [Vec<u8>; 0]);
    assert_eq!(router.wire.datagrams, []);
    assert_eq!(
        router.drops(),
        [
            (Counter::DropIndex.label(), 1),
            (Counter::DropNoPeer.label(), 1)
        ]
    );
}

#[test]
fn a_new_private_key_ends_sessions() {
    let (mut client, mut router) = connected();
    router.change(Change {
        local: Some(Arc::new(LocalKey::new(&PrivateKey::from_bytes([77; 32])))),
        ..Change::default()
    });
    client.transmit(&up(1));
    settle(&mut client, &mut router);
    assert_eq!(router.wire.packets, [] as [Vec<u8>; 0]);
    assert_eq!(router.drops(), [(Counter::DropExpired.label(), 1)]);
}

#[test]
fn persistent_keepalives_start_at_once_and_go_on() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    router.meet(&client, &["10.0.0.2/32"], false, None);
    client.meet(&router, &["10.0.0.0/24"], true, Some(25));
    client.tick(Duration::ZERO);
    assert_eq!(client.wire.datagrams.len(), 1, "initiation");
    settle(&mut client, &mut router);
    assert_eq!(client.count(Counter::HandshakesCompleted), 1);
    client.tick(Duration::from_secs(24));
    assert_eq!(client.wire.datagrams, []);
    client.tick(Duration::from_secs(1));
    assert_eq!(client.wire.datagrams.len(), 1);
    settle(&mut client, &mut router);
    assert_eq!(router.wire.packets, [] as [Vec<u8>; 0]);
    assert_eq!(router.drops(), []);
    // Traffic puts them off; taking the interval away ends them.
    client.tick(Duration::from_secs(20));
    client.transmit(&up(2));
    client.wire.datagrams.clear();
    client.tick(Duration::from_secs(20));
    assert_eq!(client.wire.datagrams, []);
    client.change(Change {
        keepalives: vec![(THEM, None)],
        ..Change::default()
    });
    client.tick(Duration::from_secs(600));
    assert_eq!(client.wire.datagrams, []);
}

#[test]
fn congestion_marks_cross_the_tunnel_and_dscp_does_not() {
    let (mut client, mut router) = connected();
    let packet = |tos| {
        let flow = Flow {
            tos,
            ..Flow::new(false, true)
        };
        flow.packet(5, 6, 0x10, b"payload")
    };
    client.transmit(&packet(0xba));
    let datagram = client.wire.datagrams.remove(0);
    assert_eq!(datagram.ecn, 2);
    router.receive(client.address, &datagram.bytes, 3);
    assert_eq!(router.wire.packets, [packet(0xbb)]);
}

#[test]
fn what_belongs_to_another_worker_is_handed_over() {
    let place = |worker| Place { worker, workers: 2 };
    let mut client = End::new(1);
    let (mut owner, mut other) = (End::placed(2, place(0)), End::placed(2, place(1)));
    client.meet(&owner, &["10.0.0.0/24", "fd00::/64"], true, None);
    owner.meet(&client, &["10.0.0.2/32", "fd00::2/128"], false, None);
    other.change(Change {
        directory: Some(owner.forwarder.directory.clone()),
        ..Change::default()
    });
    let carry = |owner: &mut End, other: &mut End| {
        for (worker, content, mut bytes) in std::mem::take(&mut other.wire.handed) {
            assert_eq!(worker, 0);
            let length = bytes.len();
            bytes.resize(length + SLACK, 0);
            let wire = &mut owner.wire;
            owner
                .forwarder
                .accept(content, &mut bytes, length, owner.now, wire);
            owner.forwarder.flush(wire);
        }
    };

    // The initiation arrives at the wrong worker, and everything after it.
    for serial in 0..3 {
        client.transmit(&up(serial));
        for _ in 0..2 {
            for datagram in std::mem::take(&mut client.wire.datagrams) {
                other.receive(client.address, &datagram.bytes, 0);
            }
            carry(&mut owner, &mut other);
            for datagram in std::mem::take(&mut owner.wire.datagrams) {
                client.receive(owner.address, &datagram.bytes, 0);
            }
        }
    }
    assert_eq!(owner.wire.packets, (0..3).map(up).collect::<Vec<_>>());
    other.transmit(&down(1));
    carry(&mut owner, &mut other);
    settle(&mut client, &mut owner);
    assert_eq!(client.wire.packets, [down(1)]);
    for end in [&owner, &other, &client] {
        assert_eq!(end.drops(), []);
    }

    other.wire.stuffed = true;
    other.transmit(&down(1));
    assert_eq!(other.drops(), [(Counter::DropHandOver.label(), 1)]);
}

#[test]
fn initiations_of_strangers_and_wrong_keys_are_dropped() {
    let (client, mut router) = (End::new(1), End::new(2));
    let mut stranger = End::new(3);
    router.meet(&client, &["10.0.0.2/32"], false, None);
    stranger.meet(&router, &["10.0.0.0/24"], true, None);
    stranger.transmit(&up(0));
    settle(&mut stranger, &mut router);
    assert_eq!(router.count(Counter::DropUnknownPeer), 1);
    // mac1 is made with another router's key.
    let mut lost = End::new(4);
    let other = End::new(5);
    lost.meet(&other, &["10.0.0.0/24"], true, None);
    lost.transmit(&up(0));
    router.receive(lost.address, &lost.wire.datagrams[0].bytes, 0);
    assert_eq!(router.count(Counter::DropMac), 1);
    assert_eq!(router.wire.datagrams, []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn nothing_is_forged_or_doubled_on_a_bad_network(
        seed: u64,
        count in 1u16..200,
        loss in 0u64..30,
        duplication in 0u64..30,
        reordering in 0usize..60,
    ) {
        let (mut client, mut router) = connected();
        let mut state = seed | 1;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut lost = BTreeSet::new();
        for serial in 0..count {
            client.transmit(&up(serial));
        }
        let mut flying: Vec<_> = std::mem::take(&mut client.wire.datagrams)
            .into_iter()
            .enumerate()
            .collect();
        flying.retain(|(serial, _)| {
            let keep = random(100) >= loss;
            if !keep {
                lost.insert(*serial as u16);
            }
            keep
        });
        for at in (0..flying.len()).rev() {
            if random(100) < duplication {
                flying.insert(at, flying[at].clone());
            }
            let other = at.saturating_sub(random(reordering as u64 + 1) as usize);
            flying.swap(at, other);
        }
        for (_, datagram) in &flying {
            router.receive(client.address, &datagram.bytes, 0);
        }
        let mut expected: Vec<_> = (0..count).filter(|s| !lost.contains(s)).map(up).collect();
        let mut arrived = router.wire.packets;
        expected.sort();
        arrived.sort();
        prop_assert_eq!(arrived, expected);
    }

    #[test]
    fn hostile_datagrams_do_no_harm(
        datagrams in proptest::collection::vec(
            (0u8..6, proptest::collection::vec(any::<u8>(), 0..200), any::<prop::sample::Index>(), any::<u8>()),
            0..60,
        ),
    ) {
        let (mut client, mut router) = connected();
        client.transmit(&up(1));
        let valid = client.wire.datagrams.remove(0).bytes;
        let elsewhere = SocketAddr::from(([203, 0, 113, 1], 1));
        for (kind, random, at, byte) in datagrams {
            let mut datagram = match kind {
                // A valid datagram, damaged.
                0 | 1 => {
                    let mut datagram = valid.clone();
                    let at = at.index(datagram.len());
                    if datagram[at] == byte {
                        continue;
                    }
                    datagram[at] = byte;
                    datagram
                }
                2 => valid[..at.index(valid.len())].to_vec(),
                _ => random,
            };
            // Messages of the right kind and length, and of our session.
            if kind >= 3 {
                datagram.resize([148, 92, 64][usize::from(kind) - 3], byte);
                datagram[..4].copy_from_slice(&[kind - 2, 0, 0, 0]);
                datagram[4..8].copy_from_slice(&valid[4..8]);
                datagram[8..12].copy_from_slice(&valid[4..8]);
            }
            router.receive(elsewhere, &datagram, byte);
        }
        prop_assert_eq!(&router.wire.packets, &[] as &[Vec<u8>]);
        prop_assert_eq!(router.shared.stats().endpoint, Some(client.address));
        router.receive(client.address, &valid, 0);
        prop_assert_eq!(&router.wire.packets, &[up(1)]);
    }

    #[test]
    fn any_packet_from_the_tun_device_is_taken(
        packets in proptest::collection::vec(
            (any::<[u8; vnet::LEN]>(), proptest::collection::vec(any::<u8>(), 0..300)),
            1..30,
        ),
    ) {
        let (mut client, mut router) = connected();
        for (head, mut packet) in packets {
            if packet.len() > 20 {
                packet[..20].copy_from_slice(&up(0)[..20]);
            }
            let length = packet.len();
            packet.resize(length + SLACK, 0);
            if let Some(header) = vnet::Header::decode(&head) {
                client
                    .forwarder
                    .transmit(header, &mut packet, length, client.now, &mut client.wire);
            }
        }
        client.forwarder.flush(&mut client.wire);
        settle(&mut client, &mut router);
    }
}

#[test]
fn a_mapped_endpoint_is_an_ipv4_endpoint() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    let plain = router.address;
    router.address = "[::ffff:192.0.2.2]:51820".parse().unwrap();
    client.meet(&router, &["10.0.0.0/24"], true, None);
    client.transmit(&up(0));
    assert_eq!(client.wire.datagrams[0].to, plain);
}

#[test]
fn offline_peers_do_not_keep_others_from_waiting() {
    let mut end = End::new(1);
    let offline = (STAGED_TOTAL / STAGED) as u32;
    end.crowd(offline + 1, None);
    let mut transmit = |id: u32, times: usize| {
        let mut packet = up(0);
        packet[16..20].copy_from_slice(&[10, 1, id as u8, 1]);
        for _ in 0..times {
            end.transmit(&packet);
        }
    };
    for id in 0..offline {
        transmit(id, STAGED);
    }
    transmit(offline, 5);
    let waiting = |id: u32| end.forwarder.peers.get(id).unwrap().staged.len();
    assert_eq!(waiting(offline), 5);
    assert_eq!((0..=offline).map(waiting).sum::<usize>(), STAGED_TOTAL);
    assert_eq!(end.forwarder.staged, STAGED_TOTAL);
    assert_eq!(end.count(Counter::DropStaged), 5);
    end.tick(REST_AFTER);
    assert_eq!(end.forwarder.staged, 0, "a resting peer keeps no packets");
}

#[test]
fn timers_begin_few_handshakes_before_packets_have_their_turn() {
    let mut end = End::new(1);
    let count = 3 * INITIATIONS;
    end.crowd(count as u32, Some(Duration::from_secs(25)));
    assert_eq!(end.wire.datagrams, [], "not all at once");
    for turn in 1..=3 {
        let done = end.forwarder.tick(end.now, &mut end.wire);
        assert_eq!(end.wire.datagrams.len(), turn * INITIATIONS);
        assert_eq!(done, turn == 3);
    }
    let reached: BTreeSet<_> = end.wire.datagrams.iter().map(|d| d.to).collect();
    assert_eq!(reached.len(), count);

    // A new key: each tunnel takes it in its turn.
    let local = Arc::new(LocalKey::new(&PrivateKey::from_bytes([99; 32])));
    end.change(Change {
        local: Some(local),
        ..Change::default()
    });
    assert!(!end.forwarder.tick(end.now, &mut end.wire));
    assert!(!end.forwarder.tick(end.now, &mut end.wire));
    assert!(end.forwarder.tick(end.now, &mut end.wire));
}
