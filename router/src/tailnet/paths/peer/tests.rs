use super::*;
use crate::tailnet::keys::NodePublic;

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn peer(endpoints: &[&str]) -> Peer {
    Peer::new(PathPeer {
        key: NodePublic::from_bytes([1; 32]),
        disco: None,
        endpoints: endpoints.iter().map(|text| at(text)).collect(),
        home: Some(3),
        wireguard_only: false,
        relayed: true,
        online: None,
        addresses: vec!["100.64.0.9".parse().unwrap()],
    })
}

fn best(text: &str, millis: u64) -> Best {
    Best::direct(at(text), Duration::from_millis(millis))
}

#[test]
fn what_can_be_nobodys_address_is_no_candidate() {
    let peer = peer(&[
        "192.0.2.1:1",
        "[2001:db8::1]:1",
        "[::ffff:192.0.2.2]:1",
        "192.0.2.1:0",
        "0.0.0.0:1",
        "127.0.0.1:1",
        "224.0.0.1:1",
        "255.255.255.255:1",
        "[fe80::1]:1",
        "[::1]:1",
        "100.64.0.9:1",
    ]);
    let all: Vec<_> = peer.candidates.iter().map(|c| c.address).collect();
    let expected = ["192.0.2.1:1", "[2001:db8::1]:1", "192.0.2.2:1"].map(at);
    assert_eq!(all, expected);
}

#[test]
fn candidates_are_bounded_and_the_named_ones_stay() {
    let mut peer = peer(&["192.0.2.1:1"]);
    for port in 1..1000 {
        peer.candidate_or_new(SocketAddr::from(([198, 51, 100, 1], port)));
    }
    assert_eq!(peer.candidates.len(), CANDIDATES);
    assert!(peer.candidate(at("192.0.2.1:1")).is_some());
    assert!(peer.candidate(at("198.51.100.1:999")).is_some());
    peer.call(&[at("203.0.113.1:1")]);
    peer.prune(Instant::now());
    assert_eq!(peer.candidates.len(), 2);
}

#[test]
fn a_new_call_takes_the_place_of_the_last() {
    let mut peer = peer(&["192.0.2.1:1"]);
    assert!(peer.call(&[at("203.0.113.1:1"), at("192.0.2.1:1")]));
    assert!(!peer.call(&[at("203.0.113.1:1")]));
    peer.call(&[at("203.0.113.2:1")]);
    peer.prune(Instant::now());
    let all: Vec<_> = peer.candidates.iter().map(|c| c.address).collect();
    assert_eq!(all, ["192.0.2.1:1", "203.0.113.2:1"].map(at));
}

#[test]
fn families_are_chosen_by_latency_and_none_for_a_trifle() {
    let (v4, v6) = ("192.0.2.1:1", "[2001:db8::1]:1");
    assert!(best(v6, 20).is_better_than(best(v4, 20)));
    assert!(!best(v4, 20).is_better_than(best(v6, 21)));
    assert!(best(v4, 20).is_better_than(best(v6, 30)));
    assert!(!best(v4, 20).is_better_than(best("192.0.2.2:1", 20)));
    assert!(!best(v4, 19).is_better_than(best("192.0.2.2:1", 20)));
    assert!(best("10.0.0.1:1", 20).is_better_than(best(v4, 20)));
    assert!(!best(v4, 0).is_better_than(best("192.0.2.2:1", 0)));
}

#[test]
fn untrusted_paths_give_way_to_a_relay_that_knows_the_peer() {
    let now = Instant::now();
    let mut peer = peer(&["192.0.2.1:1"]);
    let up = |_| false;
    let at_home = Path::Relay(RelayId(3));
    let relay = Some(Ways::one(at_home));
    let also = Some(Path::Udp(at("192.0.2.1:1")));
    let direct = also.map(Ways::one);
    let both = |path| Some(Ways { path, also });
    assert_eq!(peer.choose(up, now), relay);
    peer.answered(at("192.0.2.1:1"), Duration::from_millis(9), now);
    assert_eq!(peer.choose(up, now), direct);
    let later = now + TRUST;
    assert_eq!(peer.choose(up, later), both(at_home));
    assert_eq!(peer.choose(|_| true, later), direct, "the relay is down");
    peer.absent = Some((3, later));
    assert_eq!(peer.choose(up, later), direct, "the relay knows it not");
    assert_eq!(peer.choose(up, later + ABSENT), both(at_home));
    peer.heard_through = Some(8);
    assert_eq!(peer.choose(up, later), both(Path::Relay(RelayId(8))));
    peer.best = None;
    assert_eq!(peer.choose(|_| true, later), relay, "better than nothing");
    peer.spec.home = None;
    peer.heard_through = None;
    assert_eq!(peer.choose(up, later), None);
}

#[test]
fn a_peer_relay_is_better_than_none_and_worse_than_a_direct_path() {
    let now = Instant::now();
    let mut peer = peer(&["192.0.2.1:1"]);
    let by = |number, server, ms| Best {
        path: Path::PeerRelay(at("198.51.100.1:7"), number),
        latency: Duration::from_millis(ms),
        server: Some(DiscoPublic::from_bytes([server; 32])),
    };
    assert!(peer.wants_relays(now));
    peer.found_relay(by(1, 1, 50), now);
    assert_eq!(peer.best, Some(by(1, 1, 50)));
    assert!(peer.is_trusted(now) && !peer.is_direct(now));
    peer.found_relay(by(2, 2, 49), now);
    assert_eq!(peer.best, Some(by(1, 1, 50)), "not for a trifle");
    peer.found_relay(by(3, 1, 90), now);
    assert_eq!(peer.best, Some(by(3, 1, 90)), "the relay serves one place");
    peer.answered_by_relay(by(1, 1, 1).path, Duration::ZERO, now);
    assert_eq!(peer.best, Some(by(3, 1, 90)));
    peer.answered(at("192.0.2.1:1"), Duration::from_millis(200), now);
    assert!(peer.is_direct(now) && !peer.wants_relays(now));
    peer.found_relay(by(4, 1, 1), now);
    assert!(peer.is_direct(now));
    peer.found_relay(by(4, 1, 1), now + TRUST);
    assert!(!peer.is_direct(now + TRUST) && peer.is_trusted(now + TRUST));
}

#[test]
fn an_address_that_was_never_asked_is_not_believed() {
    let now = Instant::now();
    let mut peer = peer(&[]);
    peer.answered(at("192.0.2.1:1"), Duration::ZERO, now);
    assert_eq!(peer.best, None);
}
