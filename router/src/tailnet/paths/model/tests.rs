use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::*;
use crate::engine::RelayId;
use crate::tailnet::disco::{self, Message};
use crate::tailnet::keys::{DiscoSecret, NodeSecret};
use crate::tailnet::paths::peer::{HEARTBEAT, TRUST};
use crate::tailnet::paths::{Command, PathPeer};
use crate::tailnet::wire::DerpMap;

mod bounds;
mod own;
mod serving;

/// One end with all that it was told.
struct End {
    paths: Paths,
    boxes: Boxes,
    key: NodePublic,
    disco: DiscoPublic,
}

fn random(seed: u8) -> Random {
    let mut count = 0_u64;
    Box::new(move |bytes| {
        count += 1;
        for (at, byte) in bytes.iter_mut().enumerate() {
            let part = count.to_le_bytes()[at % 8];
            *byte = part ^ seed;
        }
        true
    })
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn secs(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

impl End {
    fn new(seed: u8, now: Instant) -> Self {
        let digits = format!("{seed:02x}").repeat(32);
        let text = format!("privkey:{digits}");
        let (node, disco): (NodeSecret, DiscoSecret) =
            (text.parse().unwrap(), text.parse().unwrap());
        let mut paths = Paths::new(random(seed));
        let (key, public) = (node.public(), disco.public());
        let boxes = Boxes::new(&disco);
        paths.handle_command(Command::Identity { node, disco }, now);
        Self {
            paths,
            boxes,
            key,
            disco: public,
        }
    }

    fn spec(&self, endpoints: &[&str], home: Option<u32>) -> PathPeer {
        PathPeer {
            key: self.key,
            disco: Some(self.disco),
            endpoints: endpoints.iter().map(|text| at(text)).collect(),
            home,
            wireguard_only: false,
            relayed: true,
            online: None,
            addresses: Vec::new(),
        }
    }

    fn meet(&mut self, peer: PathPeer, now: Instant) {
        let peers = Command::Peers {
            set: vec![peer],
            removed: Vec::new(),
        };
        self.paths.handle_command(peers, now);
    }

    /// What it has sent, as `other` reads it.
    fn sent(&mut self, other: &mut Self) -> Vec<(Way, Message, Vec<u8>)> {
        let all = std::iter::from_fn(|| self.paths.poll_transmit());
        let read = |transmit: Transmit| {
            let message = other.boxes.open(&self.disco, &transmit.bytes)?;
            Some((transmit.to, message, transmit.bytes))
        };
        all.filter_map(read).collect()
    }

    /// What the engine was told.
    fn ways(&mut self) -> Vec<Ways> {
        let all = std::iter::from_fn(|| self.paths.poll_event());
        let ways = |event| match event {
            Event::Path { ways, .. } => Some(ways),
            _ => None,
        };
        all.filter_map(ways).collect()
    }

    /// The same without what goes beside relays.
    fn paths(&mut self) -> Vec<Path> {
        self.ways().into_iter().map(|ways| ways.path).collect()
    }
}

const THERE: &str = "192.0.2.9:41641";
const HERE: &str = "192.0.2.1:41641";
const RELAY: Path = Path::Relay(RelayId(3));

/// Two ends, the first of which knows an address of the other.
fn pair(now: Instant) -> (End, End) {
    let (mut a, mut b) = (End::new(1, now), End::new(2, now));
    a.meet(b.spec(&[THERE], Some(3)), now);
    b.meet(a.spec(&[], Some(3)), now);
    (a, b)
}

/// Has what `from` sent by UDP arrive at `to`; gives what was sent by relays.
fn carry(from: &mut End, source: &str, to: &mut End, now: Instant) -> Vec<Message> {
    let mut relayed = Vec::new();
    for (way, message, bytes) in from.sent(to) {
        match way {
            Way::Udp(..) => to.paths.handle_datagram(at(source), None, &bytes, now),
            Way::PeerRelay(..) | Way::Served(_) => {}
            Way::Relay(..) => relayed.push(message),
        }
    }
    relayed
}

#[test]
fn traffic_begins_by_the_relay_and_goes_on_directly() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let key = b.key;
    assert_eq!(a.paths(), [RELAY]);
    assert!(a.sent(&mut b).is_empty(), "a quiet peer is asked nothing");
    assert_eq!(a.paths.poll_timeout(), None);
    a.paths.handle_active(&key, now);
    // Without STUN servers the call goes at once.
    let calls = carry(&mut a, HERE, &mut b, now);
    assert_eq!(calls, [Message::CallMeMaybe(Vec::new())]);
    let later = now + secs(0.02);
    carry(&mut b, THERE, &mut a, later);
    assert_eq!(a.paths(), [Path::Udp(at(THERE))]);
    // The other end has pinged back, for it did not know the address.
    carry(&mut a, HERE, &mut b, later);
    assert_eq!(b.paths(), [RELAY, Path::Udp(at(HERE))]);
    let report = a.paths.report(later);
    let way = &report.peers[&key];
    assert!(way.trusted && way.active && way.why.is_none());
    assert_eq!(way.latency, Some(secs(0.02)));
}

/// Lets time pass with all that `a` sends answered or lost; gives the pings of it.
fn pass(a: &mut End, b: &mut End, from: Instant, to: Instant, answered: bool) -> usize {
    let mut pings = 0;
    while let Some(next) = a.paths.poll_timeout().filter(|next| *next <= to) {
        let now = next.max(from);
        a.paths.handle_timeout(now);
        for (way, message, bytes) in a.sent(b) {
            if let (Way::Udp(..), Message::Ping { .. }) = (way, message) {
                pings += 1;
                if answered {
                    b.paths.handle_datagram(at(HERE), None, &bytes, now);
                }
            }
        }
        carry(b, THERE, a, now);
    }
    pings
}

#[test]
fn a_path_is_kept_alive_while_there_is_traffic_and_costs_nothing_then() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    let key = b.key;
    for second in (0..30).step_by(5) {
        let now = start + secs(f64::from(second));
        a.paths.handle_active(&key, now);
        carry(&mut a, HERE, &mut b, now);
        carry(&mut b, THERE, &mut a, now);
        pass(&mut a, &mut b, now, now + secs(4.9), true);
    }
    a.paths();
    let last = start + secs(25.0);
    let pings = pass(&mut a, &mut b, last, last + SESSION + secs(10.0), true);
    assert!((13..=16).contains(&pings), "{pings}");
    assert_eq!(a.paths(), [RELAY], "once nobody asks any more");
    assert_eq!(a.paths.poll_timeout(), None);
    assert!(a.paths.report(last + secs(100.0)).peers[&key].why.is_some());
}

#[test]
fn a_path_that_falls_silent_is_left_for_the_relay_and_everything_is_asked() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    let key = b.key;
    a.paths.handle_active(&key, start);
    carry(&mut a, HERE, &mut b, start);
    carry(&mut b, THERE, &mut a, start);
    assert_eq!(a.paths(), [RELAY, Path::Udp(at(THERE))]);
    pass(&mut a, &mut b, start, start + TRUST - secs(0.1), false);
    assert_eq!(a.paths(), []);
    let lost = start + TRUST + secs(0.1);
    pass(&mut a, &mut b, start, lost, false);
    // Nobody knows yet whether it leads there: both are taken, until the last ping is not answered either.
    let also = Some(Path::Udp(at(THERE)));
    assert_eq!(a.ways(), [Ways { path: RELAY, also }]);
    let mut asked = 0;
    for minute in 0..10 {
        let now = lost + secs(60.0 * f64::from(minute));
        for second in (0..60).step_by(5) {
            let now = now + secs(f64::from(second));
            a.paths.handle_active(&key, now);
            asked += pass(&mut a, &mut b, now, now + secs(4.9), false);
        }
    }
    // Less and less often, once a minute in the end.
    assert!((10..=25).contains(&asked), "{asked}");
    // It is heard again by the next ping that is answered.
    let now = lost + secs(600.0);
    for second in (0..70).step_by(5) {
        let now = now + secs(f64::from(second));
        a.paths.handle_active(&key, now);
        pass(&mut a, &mut b, now, now + secs(4.9), true);
    }
    assert_eq!(a.ways(), [RELAY, Path::Udp(at(THERE))].map(Ways::one));
}

#[test]
fn calls_are_believed_through_a_relay_alone_and_of_the_peer_itself() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let call = Message::CallMeMaybe(vec![at("203.0.113.5:5")]);
    let bytes = b.boxes.seal(&a.disco, &call, [3; 24]).unwrap();
    a.paths.handle_datagram(at(THERE), None, &bytes, now);
    assert!(a.sent(&mut b).is_empty());
    let other = NodePublic::from_bytes([9; 32]);
    a.paths.handle_relayed(3, other, &bytes, now);
    assert!(a.sent(&mut b).is_empty());
    a.paths.handle_relayed(3, b.key, &bytes, now);
    let asked: Vec<_> = a.sent(&mut b).into_iter().map(|(way, ..)| way).collect();
    let expected = [THERE, "203.0.113.5:5"].map(|text| Way::Udp(at(text), None));
    assert_eq!(asked, expected);
    // Not again and again.
    a.paths.handle_relayed(3, b.key, &bytes, now + secs(0.5));
    assert!(a.sent(&mut b).is_empty());
}

#[test]
fn pongs_count_only_for_what_was_asked_there() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let key = b.key;
    a.paths.handle_active(&key, now);
    a.paths();
    let pings = a.sent(&mut b);
    let Some((_, Message::Ping { transaction, .. }, _)) = pings.first() else {
        panic!("{pings:?}");
    };
    let pong = |transaction| Message::Pong {
        transaction,
        source: at(HERE),
    };
    let mut seal = |message: &Message| b.boxes.seal(&a.disco, message, [5; 24]).unwrap();
    let unasked = seal(&pong([7; 12]));
    let right = seal(&pong(*transaction));
    a.paths.handle_datagram(at(THERE), None, &unasked, now);
    // An answer by the relay says nothing of the address.
    a.paths.handle_relayed(3, key, &right, now);
    let mut torn = right.clone();
    *torn.last_mut().unwrap() ^= 1;
    a.paths.handle_datagram(at(THERE), None, &torn, now);
    assert_eq!(a.paths(), []);
    a.paths
        .handle_datagram(at("203.0.113.77:7"), None, &right, now);
    assert_eq!(
        a.paths(),
        [Path::Udp(at(THERE))],
        "where it was sent, not whence it came"
    );
}

#[test]
fn strangers_are_not_answered_and_nodes_that_share_a_key_are_told_apart() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let mut stranger = End::new(3, now);
    stranger.meet(a.spec(&[HERE], None), now);
    stranger.paths.handle_active(&a.key, now);
    carry(&mut stranger, "203.0.113.3:3", &mut a, now);
    assert_eq!(a.paths.poll_transmit(), None);

    // Another node of the same disco key.
    let mut twin = b.spec(&["198.51.100.4:4"], Some(4));
    twin.key = NodePublic::from_bytes([4; 32]);
    a.meet(twin.clone(), now);
    a.paths();
    b.paths.handle_command(
        Command::Peers {
            set: vec![a.spec(&[HERE], None)],
            removed: Vec::new(),
        },
        now,
    );
    let key = a.key;
    b.paths.handle_active(&key, now);
    carry(&mut b, "203.0.113.8:8", &mut a, now);
    // It is pinged back as the node that it says it is.
    let back: Vec<_> = a.sent(&mut b).into_iter().map(|(way, ..)| way).collect();
    assert_eq!(
        back,
        [Way::Udp(at("203.0.113.8:8"), None); 2],
        "pong and ping"
    );
    let twins = a.paths.peers.get_mut(&twin.key).unwrap();
    assert!(twins.candidate(at("203.0.113.8:8")).is_none());
}

#[test]
fn the_engine_is_told_again_of_peers_that_it_did_not_know() {
    let now = Instant::now();
    let (mut a, b) = pair(now);
    assert_eq!(a.paths(), [RELAY]);
    a.paths
        .handle_command(Command::Applied(vec![b.key.into()]), now);
    assert_eq!(a.paths(), [RELAY]);
    a.paths.handle_command(Command::AppliedAll, now);
    assert_eq!(a.paths(), [RELAY]);
    let removed = Command::Peers {
        set: Vec::new(),
        removed: vec![b.key],
    };
    a.paths.handle_command(removed, now);
    a.paths.handle_command(Command::AppliedAll, now);
    assert_eq!(a.paths(), []);
    assert!(a.paths.by_disco.is_empty() && a.paths.peers.is_empty());
}

#[test]
fn a_peer_that_has_started_anew_is_not_trusted_where_it_was() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let key = b.key;
    a.paths.handle_active(&key, now);
    carry(&mut a, HERE, &mut b, now);
    carry(&mut b, THERE, &mut a, now);
    a.paths();
    let mut anew = End::new(5, now);
    anew.key = key;
    a.meet(anew.spec(&[THERE], Some(3)), now);
    assert_eq!(a.paths(), [RELAY]);
    let asked = a.sent(&mut anew);
    assert!(matches!(
        asked.first(),
        Some((Way::Udp(..), Message::Ping { .. }, _))
    ));
    assert!(!a.paths.by_disco.contains_key(&b.disco));
}

#[test]
fn pings_for_somebody_are_answered_or_say_what_was_tried() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let key = b.key;
    let outcome = |a: &mut End| {
        let all = std::iter::from_fn(|| a.paths.poll_event());
        let found = all.filter_map(|event| match event {
            Event::Ponged(id, outcome) => Some((id, outcome)),
            _ => None,
        });
        found.collect::<Vec<_>>()
    };
    a.paths
        .handle_ping(1, &NodePublic::from_bytes([9; 32]), now);
    assert_eq!(outcome(&mut a), [(1, Err(PingError::Unknown))]);
    a.paths.handle_ping(2, &key, now);
    carry(&mut a, HERE, &mut b, now);
    carry(&mut b, THERE, &mut a, now + secs(0.03));
    let pong = Pong {
        path: Path::Udp(at(THERE)),
        region: None,
        latency: secs(0.03),
    };
    assert_eq!(outcome(&mut a), [(2, Ok(pong))]);
    let later = now + secs(100.0);
    a.paths.handle_timeout(later);
    a.paths.handle_ping(3, &key, later);
    assert!(outcome(&mut a).is_empty());
    a.paths.handle_timeout(later + secs(5.0));
    let silent = outcome(&mut a);
    let Some((3, Err(PingError::Silent { tried, .. }))) = silent.first() else {
        panic!("{silent:?}");
    };
    assert!(tried.contains(THERE), "{tried}");
}

#[test]
fn ten_thousand_quiet_peers_have_no_deadline() {
    let now = Instant::now();
    let mut a = End::new(1, now);
    let peers = (0..10_000_u32).map(|at| {
        let mut bytes = [7; 32];
        bytes[..4].copy_from_slice(&at.to_be_bytes());
        PathPeer {
            key: NodePublic::from_bytes(bytes),
            disco: Some(DiscoPublic::from_bytes(bytes)),
            endpoints: vec![SocketAddr::from((at.to_be_bytes(), 41641))],
            home: Some(3),
            wireguard_only: false,
            relayed: true,
            online: None,
            addresses: Vec::new(),
        }
    });
    let peers = Command::Peers {
        set: peers.collect(),
        removed: Vec::new(),
    };
    a.paths.handle_command(peers, now);
    assert_eq!(a.paths.poll_timeout(), None);
    assert_eq!(a.paths.poll_transmit(), None);
    assert!(a.paths.report(now).peers.is_empty());
}

#[test]
fn all_peers_at_once_stay_within_the_budget() {
    let now = Instant::now();
    let mut a = End::new(1, now);
    let mut keys = Vec::new();
    for number in 0..2000_u32 {
        let secret = format!("privkey:{:0>64}", format!("{number:x}"));
        let disco: DiscoSecret = secret.parse().unwrap();
        let key = NodePublic::from_bytes(*disco.public().as_bytes());
        keys.push(key);
        let endpoints = (0..10).map(|host| SocketAddr::from(([203, 0, 113, host], 1000)));
        a.meet(
            PathPeer {
                key,
                disco: Some(disco.public()),
                endpoints: endpoints.collect(),
                home: None,
                wireguard_only: false,
                relayed: true,
                online: None,
                addresses: Vec::new(),
            },
            now,
        );
    }
    let mut sent = 0;
    for second in 0..30 {
        let now = now + secs(f64::from(second));
        a.paths.handle_timeout(now);
        for key in &keys {
            a.paths.handle_active(key, now);
        }
        while let Some(transmit) = a.paths.poll_transmit() {
            assert!(disco::sender(&transmit.bytes).is_some());
            sent += 1;
        }
    }
    let most = PINGS.1 as usize + 30 * 1000;
    assert!((10_000..=most).contains(&sent), "{sent}");
    assert!(a.paths.poll_timeout().unwrap() <= now + secs(29.0) + HEARTBEAT);
}
