//! What others can bring about, and what they cannot.

use super::*;
use crate::tailnet::relay::Endpoint;

/// Both ends reach each other directly, and `a` has traffic.
fn direct(now: Instant) -> (End, End) {
    let (mut a, mut b) = pair(now);
    let key = b.key;
    a.paths.handle_active(&key, now);
    carry(&mut a, HERE, &mut b, now);
    carry(&mut b, THERE, &mut a, now);
    assert_eq!(a.paths(), [RELAY, Path::Udp(at(THERE))]);
    a.sent(&mut b);
    (a, b)
}

fn local(addresses: &[&str], port: u16) -> Command {
    Command::Local {
        port,
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        fixed: Vec::new(),
    }
}

/// Somebody has recorded a ping of the peer, and sends it from everywhere.
#[test]
fn recorded_pings_do_not_take_what_keeps_a_path_alive() {
    let start = Instant::now();
    let (mut a, mut b) = direct(start);
    let key = b.key;
    let ping = Message::Ping {
        transaction: [9; 12],
        node: Some(key),
        padding: 0,
    };
    let recorded = b.boxes.seal(&a.disco, &ping, [3; 24]).unwrap();
    let mut stray = 0;
    for tenth in 0..600_u32 {
        let now = start + secs(f64::from(tenth) / 10.0);
        let [_, _, high, low] = tenth.to_be_bytes();
        let source = SocketAddr::from(([198, 51, 100, low], 1000 + u16::from(high)));
        a.paths.handle_datagram(source, None, &recorded, now);
        a.paths.handle_active(&key, now);
        a.paths.handle_timeout(now);
        for (way, message, bytes) in a.sent(&mut b) {
            let Message::Ping { .. } = message else {
                continue;
            };
            match way {
                Way::Udp(to, _) if to == at(THERE) => {
                    b.paths.handle_datagram(at(HERE), None, &bytes, now);
                }
                _ => stray += 1,
            }
        }
        carry(&mut b, THERE, &mut a, now);
    }
    assert_eq!(a.paths(), [], "the path has stayed");
    assert!(stray <= 8 + 60, "{stray}");
}

#[test]
fn an_address_more_takes_no_path_away_and_one_less_does() {
    let now = Instant::now();
    let (mut a, mut b) = direct(now);
    a.paths.handle_command(local(&["192.0.2.1"], 41641), now);
    a.paths();
    a.paths.handle_active(&b.key, now);
    carry(&mut a, HERE, &mut b, now);
    carry(&mut b, THERE, &mut a, now);
    a.paths();
    let bridge = local(&["192.0.2.1", "172.18.0.1"], 41641);
    a.paths.handle_command(bridge, now);
    assert_eq!(a.paths(), []);
    a.paths.handle_command(local(&["192.0.2.1"], 41641), now);
    // Until it has answered again both ways are taken.
    let also = Some(Path::Udp(at(THERE)));
    assert_eq!(a.ways(), [Ways { path: RELAY, also }]);
    a.paths.handle_active(&b.key, now);
    carry(&mut a, HERE, &mut b, now);
    carry(&mut b, THERE, &mut a, now);
    assert_eq!(a.ways(), [Path::Udp(at(THERE))].map(Ways::one));
}

#[test]
fn a_home_that_cannot_be_reached_is_told_and_one_that_nobody_needs_is_not() {
    let now = Instant::now();
    let (mut a, b) = pair(now);
    let map = r#"{"Regions":{"3":{"RegionCode":"abc","Nodes":[{"IPv4":"198.51.100.1"}]},
        "4":{"RegionCode":"far","Nodes":[{"IPv4":"198.51.100.2"}]}}}"#;
    let map: DerpMap = serde_json::from_str(map).unwrap();
    a.paths.handle_command(Command::Derp(Box::new(map)), now);
    for region in [3, 4] {
        a.paths
            .handle_relay(region, Some("connection refused".to_owned()), now);
    }
    assert!(
        a.paths.report(now).relay_problems.is_empty(),
        "nobody needs one"
    );
    a.paths.handle_active(&b.key, now);
    let told = a.paths.report(now).relay_problems;
    let [problem] = told.as_slice() else {
        panic!("{told:?}");
    };
    assert!(problem.contains("region abc") && problem.contains("connection refused"));
    a.paths.handle_relay(3, None, now);
    a.paths
        .handle_health(3, "two nodes have this key".to_owned());
    let told = a.paths.report(now).relay_problems;
    assert!(told[0].contains("two nodes have this key"), "{told:?}");
    // Another key makes all connections anew.
    let text = format!("privkey:{}", "08".repeat(32));
    let (node, disco) = (text.parse().unwrap(), text.parse().unwrap());
    a.paths
        .handle_command(Command::Identity { node, disco }, now);
    assert!(a.paths.report(now).relay_problems.is_empty());
}

/// Calls that a relay has kept come together: the last one says where the peer is.
#[test]
fn the_last_of_several_calls_counts() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    for (number, address) in [(1, "203.0.113.5:5"), (2, "203.0.113.6:6")] {
        let call = Message::CallMeMaybe(vec![at(address)]);
        let bytes = b.boxes.seal(&a.disco, &call, [number; 24]).unwrap();
        a.paths.handle_relayed(3, b.key, &bytes, now);
    }
    let peer = a.paths.peers.get_mut(&b.key).unwrap();
    assert!(
        peer.candidate(at("203.0.113.6:6"))
            .is_some_and(|c| c.called)
    );
    assert!(
        peer.candidate(at("203.0.113.5:5"))
            .is_none_or(|c| !c.called)
    );
}

/// A peer names relays that are none, at addresses of others.
#[test]
fn places_that_a_peer_invents_cost_others_little() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    let mut clients = [a.disco, b.disco];
    clients.sort_by_key(|key| *key.as_bytes());
    let mut sent = 0;
    for tenth in 0..600_u16 {
        let now = start + secs(f64::from(tenth) / 10.0);
        let [high, low] = tenth.to_be_bytes();
        let addresses = (0..16).map(|host| SocketAddr::from(([203, 0, 113, host], 7)));
        let mut key = [5; 32];
        (key[0], key[1]) = (high, low);
        let place = Endpoint {
            server: DiscoPublic::from_bytes(key),
            clients,
            lamport: u64::from(tenth),
            number: u32::from(tenth),
            bind_within: secs(30.0),
            lasts: secs(300.0),
            addresses: addresses.collect(),
        };
        let told = crate::tailnet::relay::Message::CallMeMaybeVia(place);
        let mut nonce = [4; 24];
        (nonce[0], nonce[1]) = (high, low);
        let sealed = b.boxes.seal_clear(&a.disco, &told.clear(), nonce).unwrap();
        a.paths.handle_relayed(3, b.key, &sealed, now);
        a.paths.handle_timeout(now);
        while a.paths.poll_transmit().is_some() {
            sent += 1;
        }
    }
    // Eight places in half a minute; each 16 addresses, five times.
    assert!((16..=24 * 16 * 5).contains(&sent), "{sent}");
}
