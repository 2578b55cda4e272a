//! An engine in a network namespace of its own against Debian's wireguard-go across a veth.
//! Needs root: fails without under `CI=true`, else is skipped.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fixture;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use fixture::{DEADLINE, Namespace, Pair, echo, lone, noise, rooted, spec, unique, until};

use crate::engine::control::Engine;
use crate::engine::counters::Counter;
use crate::engine::error::{Error, Failure};
use crate::engine::path::{Path, RelayId};
use crate::engine::types::{Offloads, Options, PeerChange, PeerSpec};
use crate::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::wireguard::message::INITIATION;
use crate::wireguard::{LocalKey, Tunnel};

fn ping(pair: &Pair) {
    pair.laptop.run("ping", "-c 3 -i 0.2 -W 10 10.9.0.1");
    pair.laptop.run("ping", "-c 3 -i 0.2 -W 10 fd09::1");
    pair.router.run("ping", "-c 3 -i 0.2 -W 10 10.9.0.2");
}

fn transfer(pair: &Pair) {
    let data = noise(1 << 20);
    for address in ["10.9.0.1", "fd09::1"] {
        let back = echo(&pair.router, &pair.laptop, address.parse().unwrap(), &data);
        assert!(back == data, "{address}: {} bytes came back", back.len());
    }
    for address in ["10.9.0.2", "fd09::2"] {
        let back = echo(&pair.laptop, &pair.router, address.parse().unwrap(), &data);
        assert!(back == data, "{address}: {} bytes came back", back.len());
    }
}

#[test]
fn speaks_with_wireguard_go() {
    if !rooted() {
        return;
    }
    let pair = Pair::new(true, 1);
    ping(&pair);
    transfer(&pair);

    let stats = pair.engine.peer_stats();
    assert_eq!(stats.len(), 1);
    assert!(stats[0].last_handshake.is_some());
    assert!(
        stats[0].rx_bytes > 4 << 20 && stats[0].tx_bytes > 4 << 20,
        "{stats:?}"
    );
    assert_eq!(
        stats[0].endpoint().unwrap().ip(),
        IpAddr::from([192, 0, 2, 2])
    );
    // Super-packets did the work: far fewer writes than packets.
    assert!(pair.counter("tun_writes") < pair.counter("rx_packets"));
    assert!(pair.counter("udp_sends") < pair.counter("tx_datagrams"));
    for (label, value) in pair.engine.counters() {
        // The kernel sends router solicitations into any interface.
        let strangers = label == Counter::DropNoPeer.label();
        assert!(
            strangers || !label.starts_with("drop_") || value == 0,
            "{label} {value}"
        );
    }
}

#[test]
fn several_workers_share_the_device_and_the_port() {
    if !rooted() {
        return;
    }
    // One peer, so one of the workers owns all; whatever the kernel brings to others is handed over.
    let pair = Pair::new(true, 3);
    let features = pair.engine.features();
    assert_eq!(features.workers, 3);
    assert!(
        features.udp_steering && features.tun_steering,
        "{features:?}"
    );
    ping(&pair);
    transfer(&pair);
    // Only the first initiation came to a worker by chance.
    assert!(
        pair.counter("handed_over") <= 2,
        "{}",
        pair.counter("handed_over")
    );
}

#[test]
fn works_without_offloads() {
    if !rooted() {
        return;
    }
    let pair = Pair::new(false, 1);
    assert!(!pair.engine.features().vnet_header);
    ping(&pair);
    transfer(&pair);
}

#[test]
fn a_taken_name_or_port_is_refused_and_the_device_goes_with_the_engine() {
    if !rooted() {
        return;
    }
    let (namespace, name) = (Namespace::new(), unique("sl"));
    let engine = lone(&name, &namespace).unwrap();
    let port = engine.listen_port();
    let again = lone(&name, &namespace).unwrap_err();
    assert!(
        matches!(&again, Error::DeviceExists(taken) if *taken == name),
        "{again}"
    );
    let options = Options {
        device: unique("sl"),
        mtu: 1420,
        listen_port: port,
        fwmark: 0,
        workers: None,
        offloads: Offloads::ALL,
    };
    let same_port = namespace.inside(|| Engine::start(options, &PrivateKey::from_bytes([1; 32])));
    let same_port = same_port.unwrap_err();
    assert!(
        matches!(&same_port, Error::Bind { port: taken, .. } if *taken == port),
        "{same_port}"
    );
    engine.shutdown();
    drop(lone(&name, &namespace).unwrap());
}

#[test]
fn what_is_no_wireguard_message_goes_up_and_down_by_the_same_port() {
    if !rooted() {
        return;
    }
    let namespace = Namespace::new();
    namespace.run("ip", "link set lo up");
    let engine = lone(&unique("sl"), &namespace).unwrap();
    let client = namespace.inside(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let dropped = || {
        let counters = engine.counters();
        let label = Counter::DropOther.label();
        counters.iter().find(|(name, _)| *name == label).unwrap().1
    };
    let ping = |port: u16| {
        client
            .send_to(b"TS\xf0\x9f\x92\xac ping", ("127.0.0.1", port))
            .unwrap()
    };
    // Nobody asked.
    ping(engine.listen_port());
    until("the datagram to be dropped", || dropped() == 1);
    let mut datagrams = engine.datagrams().unwrap();
    for _ in 0..2 {
        let port = engine.listen_port();
        ping(port);
        let datagram = datagrams.blocking_recv().unwrap();
        assert_eq!(&datagram.bytes[..], b"TS\xf0\x9f\x92\xac ping");
        assert_eq!(datagram.source, client.local_addr().unwrap());
        let local = datagram.local.unwrap();
        engine
            .send_raw(b"pong", datagram.source, Some(local))
            .unwrap();
        let mut answer = [0; 16];
        let (length, from) = client.recv_from(&mut answer).unwrap();
        assert_eq!(
            (&answer[..length], from),
            (&b"pong"[..], (local, port).into())
        );
        // As well after the port has changed.
        namespace.inside(|| engine.set_listen_port(0)).unwrap();
    }
    assert_eq!(dropped(), 1);
}

#[test]
fn a_peer_joins_through_a_relay() {
    if !rooted() {
        return;
    }
    let namespace = Namespace::new();
    let engine = lone(&unique("sl"), &namespace).unwrap();
    let peer = spec(7, "10.0.0.7/32");
    engine.set_peers(std::slice::from_ref(&peer)).unwrap();
    let mut relayed = engine.relayed().unwrap();
    let local = LocalKey::new(&PrivateKey::from_bytes([7; 32]));
    let mut tunnel = Tunnel::new(&local, &PrivateKey::from_bytes([1; 32]).public(), None, 5);
    let mut message = [0; INITIATION];
    tunnel.initiate_again(&mut message);
    let (relay, key) = (RelayId(4), peer.public_key);
    let nothing: &[u8] = b"no message";
    assert_eq!(
        engine.receive_relayed(relay, [(key, nothing), (key, &message[..])]),
        1
    );
    let response = relayed.blocking_recv().unwrap();
    assert_eq!((response.relay, response.peer), (relay, key));
    let now = Duration::ZERO;
    let (length, done) = tunnel
        .handshake(&response.bytes, now, &mut message)
        .unwrap();
    assert!(done);
    let answer = [(key, &message[..length.unwrap()])];
    assert_eq!(engine.receive_relayed(relay, answer), 0);
    until("the handshake to be complete", || {
        engine.peer_stats()[0].last_handshake.is_some()
    });
    assert_eq!(engine.peer_stats()[0].path, Some(Path::Relay(relay)));
    let direct = Path::Udp(([192, 0, 2, 7], 7).into());
    assert!(engine.set_path(&key, direct, None).unwrap());
    until("the path to be direct", || {
        engine.peer_stats()[0].path == Some(direct)
    });
    assert!(!engine.set_path(&PublicKey([8; 32]), direct, None).unwrap());
    let drops = || {
        let counters = engine.counters();
        let (_, drops) = *counters
            .iter()
            .find(|(name, _)| *name == "drop_relay")
            .unwrap();
        drops
    };
    let before = drops();
    engine.count_relay_drops(3);
    assert_eq!(drops(), before + 3, "what the relays' carrier drops shows");
}

#[test]
fn deleting_the_device_is_noticed() {
    if !rooted() {
        return;
    }
    let (namespace, name) = (Namespace::new(), unique("sl"));
    let engine = lone(&name, &namespace).unwrap();
    namespace.run("ip", &format!("link del {name}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let failure = runtime.block_on(async { tokio::time::timeout(DEADLINE, engine.failed()).await });
    assert!(matches!(*failure.unwrap(), Failure::DeviceGone));
    assert!(matches!(engine.set_peers(&[]), Err(Error::Worker)));
}

#[test]
fn peers_change_without_touching_others() {
    if !rooted() {
        return;
    }
    let namespace = Namespace::new();
    let engine = lone(&unique("sl"), &namespace).unwrap();
    let keys = |engine: &Engine| {
        let mut keys: Vec<_> = engine
            .peer_stats()
            .iter()
            .map(|stats| stats.public_key)
            .collect();
        keys.sort();
        keys
    };
    let (a, b, c) = (
        spec(2, "10.0.0.0/24"),
        spec(3, "10.0.1.0/24"),
        spec(4, "10.0.0.7/32"),
    );
    engine.set_peers(&[a.clone(), b.clone()]).unwrap();
    let skipped = |set: PeerSpec| {
        let remove = Vec::new();
        let set = vec![set];
        let skipped = engine.change_peers(&PeerChange { set, remove }).unwrap();
        skipped.into_iter().next().unwrap().error
    };
    let error = skipped(spec(4, "10.0.0.5/24"));
    assert!(matches!(error, Error::DoubledCidr { .. }), "{error}");
    let error = skipped(spec(1, "10.0.3.0/24"));
    assert!(matches!(error, Error::OwnKey(_)), "{error}");
    let mut expected = vec![a.public_key, b.public_key];
    expected.sort();
    assert_eq!(keys(&engine), expected);

    let moved = PeerSpec {
        endpoint: Some(SocketAddr::from(([192, 0, 2, 9], 5))),
        ..a.clone()
    };
    engine.set_peers(&[moved.clone(), c.clone()]).unwrap();
    let mut expected = vec![a.public_key, c.public_key];
    expected.sort();
    assert_eq!(keys(&engine), expected);
    let stats = engine.peer_stats();
    let stats = stats
        .iter()
        .find(|stats| stats.public_key == a.public_key)
        .unwrap();
    assert_eq!(stats.endpoint(), moved.endpoint);

    // Another preshared key is no reason to forget where the peer is.
    let rekeyed = PeerSpec {
        preshared_key: Some(PresharedKey::from_bytes([1; 32])),
        ..a.clone()
    };
    engine.set_peers(&[rekeyed, c.clone()]).unwrap();
    let stats = engine.peer_stats();
    let rekeyed = stats.iter().find(|stats| stats.public_key == a.public_key);
    assert_eq!(rekeyed.unwrap().endpoint(), moved.endpoint);
    for bytes in [[0; 32], PrivateKey::from_bytes([1; 32]).public().0] {
        let spec = PeerSpec {
            public_key: PublicKey(bytes),
            ..a.clone()
        };
        let error = skipped(spec);
        assert!(
            matches!(error, Error::LowOrderKey(_) | Error::OwnKey(_)),
            "{error}"
        );
    }

    let refused = engine
        .set_private_key(&PrivateKey::from_bytes([4; 32]))
        .unwrap_err();
    assert!(matches!(refused, Error::OwnKey(_)), "{refused}");
    engine
        .set_private_key(&PrivateKey::from_bytes([5; 32]))
        .unwrap();
    engine.set_peers(&[]).unwrap();
    assert_eq!(keys(&engine), []);
}

#[test]
fn the_laptop_may_move_and_is_answered_from_the_address_it_asked() {
    if !rooted() {
        return;
    }
    let pair = Pair::new(true, 2);
    let port = pair.engine.listen_port();
    #[track_caller]
    fn reach(pair: &Pair) {
        pair.laptop.run("ping", "-c 2 -i 0.2 -W 10 10.9.0.1");
    }
    let place = || {
        let stats = pair.engine.peer_stats();
        stats
            .iter()
            .find_map(|stats| stats.endpoint())
            .map(|endpoint| endpoint.ip())
    };
    reach(&pair);

    // The laptop gets another address; the engine follows the first packet from it.
    pair.laptop.run("ip", "addr del 192.0.2.2/24 dev up0");
    pair.laptop.run("ip", "addr add 192.0.2.3/24 dev up0");
    // wireguard-go of 2022 would go on sending from the old one.
    pair.aim(&format!("192.0.2.1:{port}"));
    reach(&pair);
    assert_eq!(place(), Some(IpAddr::from([192, 0, 2, 3])));

    // It asks a second address of the router: answers come from there, or it would move too.
    pair.router.run("ip", "addr add 192.0.2.11/24 dev up0");
    pair.aim(&format!("192.0.2.11:{port}"));
    reach(&pair);
    assert_eq!(pair.aimed(), format!("192.0.2.11:{port}"));

    // That address goes away: the engine sends from another, and the laptop follows.
    pair.router.run("ip", "addr del 192.0.2.11/24 dev up0");
    pair.router.run("ping", "-c 2 -i 0.2 -W 10 10.9.0.2");
    until("the laptop follows", || {
        pair.aimed() == format!("192.0.2.1:{port}")
    });
    reach(&pair);

    // IPv6 outside.
    pair.aim(&format!("[2001:db8::1]:{port}"));
    reach(&pair);
    assert_eq!(place(), Some("2001:db8::2".parse().unwrap()));
    pair.router
        .run("ip", "addr add 2001:db8::11/64 dev up0 nodad");
    pair.aim(&format!("[2001:db8::11]:{port}"));
    reach(&pair);
    assert_eq!(pair.aimed(), format!("[2001:db8::11]:{port}"));
    pair.router.run("ip", "addr del 2001:db8::11/64 dev up0");
    pair.router.run("ping", "-c 2 -i 0.2 -W 10 10.9.0.2");
    until("the laptop follows", || {
        pair.aimed() == format!("[2001:db8::1]:{port}")
    });
    transfer(&pair);
}

#[test]
fn a_narrow_underlay_fragments_and_nothing_is_lost() {
    if !rooted() {
        return;
    }
    let pair = Pair::new(true, 1);
    pair.router.run("ip", "link set up0 mtu 1300");
    pair.laptop.run("ip", "link set up0 mtu 1300");
    transfer(&pair);
}
