//! Timers, by simulated clocks: rekeying, death of sessions, keepalives, retries.

use std::ops::Range;

use super::*;
use crate::engine::forward::pace::BURST;
use crate::wireguard::message::INITIATION;
use crate::wireguard::{Tunnel, clock};

const CLIENT: usize = 0;
const ROUTER: usize = 1;
/// How late a timer may be.
const LATE: f64 = 0.11;
/// What is added to some timers at random.
const JITTER: f64 = 0.334;

/// Client and router, a network that loses nothing but what it is told to, and what was sent.
struct World {
    ends: [End; 2],
    /// What this end sends is lost.
    cut: [bool; 2],
    /// Time in seconds, sender, message.
    seen: Vec<(f64, usize, Vec<u8>)>,
}

impl World {
    /// Both have a session, which the client began at 0.
    fn connected() -> Self {
        let (client, router) = connected();
        Self {
            ends: [client, router],
            cut: [false; 2],
            seen: Vec::new(),
        }
    }

    /// Client and router as they are, strangers yet.
    fn of(client: End, router: End) -> Self {
        Self {
            ends: [client, router],
            cut: [false; 2],
            seen: Vec::new(),
        }
    }

    fn now(&self) -> f64 {
        self.ends[CLIENT].now.as_secs_f64()
    }

    fn carry(&mut self) {
        loop {
            let mut idle = true;
            for from in [CLIENT, ROUTER] {
                for datagram in std::mem::take(&mut self.ends[from].wire.datagrams) {
                    idle = false;
                    self.seen.push((self.now(), from, datagram.bytes.clone()));
                    let address = self.ends[from].address;
                    if !self.cut[from] && datagram.to == self.ends[1 - from].address {
                        self.ends[1 - from].receive(address, &datagram.bytes, 0);
                    }
                }
            }
            if idle {
                return;
            }
        }
    }

    fn send(&mut self, from: usize, serial: u16) {
        let packet = if from == CLIENT {
            up(serial)
        } else {
            down(serial)
        };
        self.ends[from].transmit(&packet);
        self.carry();
    }

    /// Lets time pass until this second, with a packet each second from those in `talk`.
    fn until(&mut self, second: f64, talk: &[usize]) {
        let steps = ((second - self.now()) * 10.0).round() as u32;
        for step in 0..steps {
            if step % 10 == 0 {
                for from in talk {
                    self.send(*from, step as u16);
                }
            }
            clock::advance(TICK);
            for end in &mut self.ends {
                end.tick(TICK);
            }
            self.carry();
        }
    }

    /// When an end sent what `pick` picks.
    fn times(&self, from: usize, pick: impl Fn(&[u8]) -> bool) -> Vec<f64> {
        self.seen
            .iter()
            .filter(|(_, sender, message)| *sender == from && pick(message))
            .map(|(at, _, _)| *at)
            .collect()
    }

    fn initiations(&self, from: usize) -> Vec<f64> {
        self.times(from, |message| {
            message::kind(message) == Some(Kind::Initiation)
        })
    }

    fn keepalives(&self, from: usize) -> Vec<f64> {
        self.times(from, |message| {
            message.len() == message::DATA_OVERHEAD
                && matches!(message::kind(message), Some(Kind::Data(_)))
        })
    }
}

#[track_caller]
fn within(times: &[f64], ranges: &[Range<f64>]) {
    let fits = times.len() == ranges.len()
        && times
            .iter()
            .zip(ranges)
            .all(|(at, range)| range.contains(at));
    assert!(fits, "{times:?} instead of {ranges:?}");
}

#[test]
fn the_initiator_that_sends_renews_after_two_minutes() {
    let mut world = World::connected();
    world.until(370.0, &[CLIENT, ROUTER]);
    // A packet each second, so a second late at most; counted from the session before.
    let late = 1.0 + LATE;
    within(
        &world.initiations(CLIENT),
        &[
            120.0..120.0 + LATE,
            240.0..240.0 + late + LATE,
            360.0..360.0 + 3.0 * late,
        ],
    );
    within(&world.initiations(ROUTER), &[]);
    for end in &world.ends {
        assert_eq!(end.drops(), []);
    }
    assert_eq!(world.ends[ROUTER].wire.packets.len(), 370);
    assert_eq!(world.ends[CLIENT].wire.packets.len(), 370);
}

#[test]
fn the_responder_leaves_renewing_to_the_initiator() {
    let mut world = World::connected();
    world.until(125.0, &[]);
    world.send(ROUTER, 1);
    world.until(134.9, &[]);
    within(&world.initiations(CLIENT), &[]);
    // The initiator renews with the keepalive that it answers with.
    world.until(140.0, &[]);
    within(&world.initiations(CLIENT), &[135.0..135.0 + 2.0 * LATE]);
    within(&world.initiations(ROUTER), &[]);
}

#[test]
fn the_initiator_that_receives_renews_in_the_last_minute() {
    let mut world = World::connected();
    world.until(164.0, &[]);
    world.send(ROUTER, 1);
    world.until(164.9, &[]);
    within(&world.initiations(CLIENT), &[]);
    world.until(166.0, &[]);
    world.send(ROUTER, 2);
    world.until(170.0, &[]);
    within(&world.initiations(CLIENT), &[166.0..166.0 + LATE]);
    assert_eq!(world.ends[CLIENT].wire.packets, [down(1), down(2)]);
}

#[test]
fn a_session_is_dead_after_three_minutes() {
    let mut world = World::connected();
    world.until(179.0, &[]);
    world.cut = [true, true];
    world.send(ROUTER, 1);
    let late = world.seen.pop().unwrap().2;
    world.send(CLIENT, 1);
    assert!(matches!(
        message::kind(&world.seen[0].2),
        Some(Kind::Data(_))
    ));
    world.until(180.1, &[]);
    let router = world.ends[ROUTER].address;
    world.ends[CLIENT].receive(router, &late, 0);
    assert_eq!(world.ends[CLIENT].count(Counter::DropExpired), 1);
    assert_eq!(world.ends[CLIENT].wire.packets, [] as [Vec<u8>; 0]);
    for end in [CLIENT, ROUTER] {
        world.seen.clear();
        world.send(end, 2);
        world.until(world.now() + 5.0 - LATE, &[end]);
        let data = |m: &[u8]| matches!(message::kind(m), Some(Kind::Data(_)));
        assert_eq!(world.times(end, data), [] as [f64; 0]);
        assert_eq!(world.initiations(end).len(), 1);
    }
    world.cut = [false, false];
    world.until(200.0, &[]);
    assert!(world.ends[ROUTER].wire.packets.contains(&up(2)));
    assert!(world.ends[CLIENT].wire.packets.contains(&down(2)));
}

#[test]
fn data_is_acknowledged_after_ten_seconds_of_silence() {
    let mut world = World::connected();
    world.until(60.0, &[]);
    world.seen.clear();
    world.send(CLIENT, 1);
    world.until(63.0, &[]);
    world.send(CLIENT, 2);
    world.until(100.0, &[]);
    within(
        &world.keepalives(ROUTER),
        &[70.0..70.0 + LATE, 80.0..80.0 + 2.0 * LATE],
    );
    within(&world.keepalives(CLIENT), &[]);
    // Whoever answers needs no keepalive.
    world.seen.clear();
    world.send(CLIENT, 3);
    world.until(105.0, &[]);
    world.send(ROUTER, 3);
    world.until(114.0, &[]);
    within(&world.keepalives(ROUTER), &[]);
    assert_eq!(
        world.initiations(CLIENT).len() + world.initiations(ROUTER).len(),
        0
    );
}

#[test]
fn persistent_keepalives_keep_a_mapping_open() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    router.meet(&client, &["10.0.0.2/32"], false, None);
    client.meet(&router, &["10.0.0.0/24"], true, Some(25));
    let mut world = World::of(client, router);
    world.until(110.0, &[]);
    let expected: Vec<_> = (1..=4)
        .map(|n| 25.0 * f64::from(n)..25.0 * f64::from(n) + LATE * f64::from(n + 1))
        .collect();
    // The first ends the handshake.
    within(&world.keepalives(CLIENT)[1..], &expected);
    within(&world.keepalives(ROUTER), &[]);
}

#[test]
fn silence_after_data_begins_a_handshake() {
    let mut world = World::connected();
    // Idle for long: what counts is the first packet that gets no answer.
    world.until(60.0, &[]);
    world.cut[ROUTER] = true;
    world.send(CLIENT, 1);
    world.until(64.0, &[CLIENT]);
    world.until(76.0, &[]);
    within(&world.initiations(CLIENT), &[75.0..75.0 + JITTER + LATE]);
    world.cut[ROUTER] = false;
    world.until(90.0, &[CLIENT]);
    assert_eq!(world.ends[CLIENT].count(Counter::HandshakesCompleted), 2);
}

#[test]
fn a_handshake_is_tried_for_ninety_seconds() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24", "fd00::/64"], true, None);
    router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], false, None);
    let mut world = World::of(client, router);
    world.cut = [true, true];
    world.send(CLIENT, 2);
    world.until(150.0, &[]);
    let times = world.initiations(CLIENT);
    assert!(times[times.len() - 1] < 90.0 + LATE);
    for pair in times.windows(2) {
        let apart = pair[1] - pair[0];
        assert!((5.0..5.0 + JITTER + LATE).contains(&apart), "{times:?}");
    }
    assert!(times.len() >= 16, "{times:?}");
    assert!(world.ends[CLIENT].forwarder.staged.is_empty(), "given up");

    world.cut = [false, false];
    world.send(CLIENT, 4);
    assert_eq!(world.ends[ROUTER].wire.packets, [up(4)]);
}

#[test]
fn ends_with_different_preshared_keys_never_talk() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24", "fd00::/64"], true, None);
    router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], true, None);
    client.change(Change {
        preshared_keys: vec![(THEM, None)],
        ..Change::default()
    });
    let mut world = World::of(client, router);
    world.until(250.0, &[CLIENT, ROUTER]);
    for end in &world.ends {
        assert_eq!(end.wire.packets, [] as [Vec<u8>; 0]);
        assert_eq!(end.count(Counter::HandshakesCompleted), 0);
        assert_eq!(end.shared.stats().last_handshake, None);
    }
    assert!(world.initiations(CLIENT).len() > 30);
}

#[test]
fn jumps_of_the_wall_clock_stop_nothing() {
    let mut world = World::connected();
    for jump in [-86_400, 86_400, 400 * 86_400, -86_400] {
        clock::correct_wall(jump);
        let (mut now, before) = (world.now(), world.ends[ROUTER].wire.packets.len());
        world.until(now + 130.0, &[CLIENT]);
        assert_eq!(
            world.ends[ROUTER].wire.packets.len() - before,
            130,
            "{jump}"
        );
        // And between sessions.
        clock::correct_wall(jump);
        now = world.now();
        world.until(now + 400.0, &[]);
        clock::correct_wall(-jump);
        world.until(now + 410.0, &[CLIENT]);
        assert_eq!(
            world.ends[ROUTER].wire.packets.len() - before,
            140,
            "{jump}"
        );
    }
}

#[test]
fn a_machine_that_slept_goes_on() {
    for hours in [0.04, 0.06, 1.0, 100.0] {
        let mut world = World::connected();
        let slept = Duration::from_secs_f64(hours * 3600.0);
        clock::advance(slept);
        for end in &mut world.ends {
            end.now += slept;
        }
        let now = world.now();
        world.until(now + 3.0, &[CLIENT]);
        assert_eq!(world.ends[ROUTER].wire.packets.len(), 3, "{hours}");
    }
}

#[test]
fn a_quiet_peer_costs_nothing() {
    let mut world = World::connected();
    world.until(30.0, &[]);
    // Until its keys are erased nothing is to be done for it, and after that nothing ever.
    for end in &world.ends {
        // The wheel looks at it once a turn.
        let next = end.forwarder.deadline().unwrap();
        assert!(next > Duration::from_secs(50), "{next:?}");
    }
    world.until(190.0, &[]);
    for end in &world.ends {
        assert_eq!(end.forwarder.deadline(), None);
    }
}

/// Peers of a router that starts again: each answers at once.
#[test]
fn a_thousand_peers_resumed_at_once_are_back_within_three_seconds() {
    const PEERS: u32 = 1000;
    let mut router = End::new(1);
    let key = |id: u32| {
        let mut bytes = [7; 32];
        bytes[..4].copy_from_slice(&id.to_le_bytes());
        PrivateKey::from_bytes(bytes)
    };
    let address = |id: u32| SocketAddr::from(([10, 9, (id >> 8) as u8, id as u8], 51820));
    let mut peers: Vec<_> = (0..PEERS)
        .map(|id| {
            let local = LocalKey::new(&key(id));
            let tunnel = Tunnel::new(&local, &router.key.public(), None, 0x00ab_0000 + id);
            (local, tunnel)
        })
        .collect();
    let setup = |id: u32| Setup {
        id,
        public_key: key(id).public(),
        preshared_key: None,
        index: 0x0012_0000 + id,
        endpoints: Vec::new(),
        keepalive: None,
        roaming: true,
        shared: router.shared.clone(),
    };
    let change = Change {
        add: (0..PEERS).map(setup).collect(),
        directory: Some(Arc::new(Directory {
            routes: Routes::new([]),
            keys: Keys::from_iter((0..PEERS).map(|id| (key(id).public(), id))),
            owners: vec![0; PEERS as usize],
        })),
        resume: (0..PEERS).map(|id| (id, Path::Udp(address(id)))).collect(),
        ..Change::default()
    };
    router.change(change);
    let (mut most, mut sent) = (0, 0);
    loop {
        let initiations = std::mem::take(&mut router.wire.datagrams);
        let initiations = initiations.iter().filter(|d| d.bytes.len() == INITIATION);
        let mut count = 0;
        for datagram in initiations {
            count += 1;
            let SocketAddr::V4(to) = datagram.to else {
                panic!("an IPv4 address");
            };
            let id = u32::from(*to.ip()) & 0xffff;
            let mut answer = [0; INITIATION];
            let (_, tunnel) = &mut peers[id as usize];
            let done = tunnel.handshake(&datagram.bytes, router.now, &mut answer);
            let (Some(length), false) = done.unwrap() else {
                panic!("an answer");
            };
            router.receive(address(id), &answer[..length], 0);
        }
        (most, sent) = (most.max(count), sent + count);
        match router.forwarder.deadline() {
            Some(at) if sent < PEERS as usize => {
                router.now = router.now.max(at);
                router.tick(Duration::ZERO);
            }
            _ => break,
        }
    }
    assert_eq!(sent, PEERS as usize, "one each");
    assert!(
        most <= BURST as usize,
        "{most} before packets have their turn"
    );
    assert_eq!(router.count(Counter::HandshakesCompleted), u64::from(PEERS));
    assert_eq!(router.drops(), []);
    assert!(router.now < Duration::from_secs(3), "{:?}", router.now);
}
