//! What is answered, changed or kept from the device inside the tunnel.

use super::*;
use crate::engine::forward::edits::Edits;
use crate::engine::offload::via::sites::Sites;
use crate::engine::types::PeerSpec;
use crate::tailnet::tsmp::{Message, packet};
use crate::via::ViaNet;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A client with a session, whose packets are changed as this says.
fn edited(allowed: &[&str], masquerade: &[(&str, &str)]) -> (End, End) {
    let (mut client, mut router) = connected();
    let spec = PeerSpec {
        public_key: client.key.public(),
        preshared_key: None,
        allowed_ips: allowed.iter().map(|net| net.parse().unwrap()).collect(),
        endpoint: None,
        others: Vec::new(),
        keepalive: None,
        roaming: true,
        masquerade: masquerade
            .iter()
            .map(|(own, known)| (address(own), address(known)))
            .collect(),
    };
    let nets = spec.allowed_ips.iter().map(|net| (*net, THEM));
    let directory = Directory {
        routes: Routes::new(nets),
        keys: Keys::from_iter([(client.key.public(), THEM)]),
        owners: vec![0],
    };
    let site = ViaNet {
        site: 7,
        net: "10.1.0.0/16".parse().unwrap(),
    };
    router.change(Change {
        directory: Some(Arc::new(directory)),
        edits: vec![(THEM, Edits::of(&spec))],
        sites: Some(Arc::new(Sites::new([site]))),
        ..Change::default()
    });
    let everything = ["0.0.0.0/0", "::/0"].map(|net| (net.parse().unwrap(), THEM));
    let directory = Directory {
        routes: Routes::new(everything),
        keys: Keys::from_iter([(router.key.public(), THEM)]),
        owners: vec![0],
    };
    client.change(Change {
        directory: Some(Arc::new(directory)),
        ..Change::default()
    });
    (client, router)
}

/// Has the client send.
fn send(client: &mut End, router: &mut End, packet: &[u8]) {
    client.transmit(packet);
    settle(client, router);
}

#[test]
fn a_ping_between_nodes_is_answered_before_the_device() {
    let (mut client, mut router) = connected();
    let ping = packet(
        &Message::Ping([7; 8]),
        address("10.0.0.2"),
        address("10.0.0.1"),
    )
    .unwrap();
    client.transmit(&ping);
    settle(&mut client, &mut router);
    assert_eq!(
        std::mem::take(&mut router.wire.packets),
        std::slice::from_ref(&ping),
        "nobody takes such"
    );

    router.wire.inside = Some(Vec::new());
    client.transmit(&ping);
    settle(&mut client, &mut router);
    assert!(router.wire.packets.is_empty());
    let pong = client.wire.packets.pop().unwrap();
    let answer = Message::Pong {
        data: [7; 8],
        peer_api: 0,
    };
    assert_eq!(Message::parse(&pong[20..]), Some(answer));
    assert_eq!(pong[12..20], [10, 0, 0, 1, 10, 0, 0, 2]);

    // Whoever sends many at once gets some answers.
    for _ in 0..100 {
        client.forwarder.flush(&mut client.wire);
        client.transmit(&ping);
    }
    settle(&mut client, &mut router);
    let count = router.count(Counter::RxInside) + router.count(Counter::DropInside);
    assert_eq!(count, 101);
}

#[test]
fn messages_go_up_and_hosts_cannot_send_them() {
    let (mut client, mut router) = connected();
    router.wire.inside = Some(Vec::new());
    let rejected = Message::Rejected {
        protocol: 6,
        reason: crate::tailnet::tsmp::Reason::Policy,
        source: 1,
        destination: 2,
        maybe_broken: false,
    };
    let message = packet(&rejected, address("fd00::2"), address("fd00::1")).unwrap();
    client.transmit(&message);
    settle(&mut client, &mut router);
    // The packet as it was sent, without padding.
    assert_eq!(router.wire.inside, Some(vec![message]));
    assert!(router.wire.packets.is_empty());

    let forged = packet(
        &Message::Ping([1; 8]),
        address("10.0.0.1"),
        address("10.0.0.2"),
    )
    .unwrap();
    router.transmit(&forged);
    assert_eq!(router.count(Counter::DropInside), 1);
    settle(&mut client, &mut router);
    assert!(client.wire.packets.is_empty());
    // The daemon can.
    let mut buffer = [&forged[..], &[0; SLACK]].concat();
    let (now, length) = (router.now, forged.len());
    router
        .forwarder
        .accept(Content::Inside, &mut buffer, length, now, &mut router.wire);
    router.forwarder.flush(&mut router.wire);
    settle(&mut client, &mut router);
    assert_eq!(client.wire.packets.len(), 1);
}

/// A packet with these addresses instead of its own.
fn with_addresses(mut packet: Vec<u8>, source: &str, destination: &str) -> Vec<u8> {
    use crate::engine::offload::readdress::readdress;
    for (is_source, text) in [(true, source), (false, destination)] {
        match address(text) {
            IpAddr::V4(address) => readdress(&mut packet, is_source, &address.octets(), false),
            IpAddr::V6(address) => readdress(&mut packet, is_source, &address.octets(), false),
        }
        .unwrap();
    }
    packet
}

#[test]
fn a_peer_reaches_ipv4_by_ipv6() {
    let allowed = ["fd00::2/128", "198.18.3.4/32", "10.0.0.2/32"];
    let (mut client, mut router) = edited(&allowed, &[]);
    let host = "fd7a:115c:a1e0:b1a:0:7:a01:203";
    let v6 = |serial: u16, source: &str, destination: &str| {
        with_addresses(
            Flow::new(true, true).packet(0, serial.into(), 0x10, b"hello"),
            source,
            destination,
        )
    };
    send(&mut client, &mut router, &v6(1, "fd00::2", host));
    let seen = router.wire.packets.pop().unwrap();
    assert_eq!(seen[12..20], [198, 18, 3, 4, 10, 1, 2, 3]);
    let transport = crate::engine::offload::ip::Transport::parse(&seen).unwrap();
    assert!(transport.checksums_hold(&seen));

    let answer = Flow::new(false, true).packet(9, 5, 0x10, b"hello");
    router.transmit(&with_addresses(answer, "10.1.2.3", "198.18.3.4"));
    settle(&mut client, &mut router);
    // Traffic class and flow label are the translator's.
    let back = client.wire.packets.pop().unwrap();
    assert_eq!(back[8..], v6(5, host, "fd00::2")[8..]);

    // Other sites, and what is none, pass as they are.
    for other in ["fd7a:115c:a1e0:b1a:0:8:a01:203", "fd00::9"] {
        let packet = v6(2, "fd00::2", other);
        send(&mut client, &mut router, &packet);
        assert_eq!(router.wire.packets.pop(), Some(packet));
    }
    assert!(router.drops().is_empty(), "{:?}", router.drops());
    // No host of the pool's network but the peer's own.
    let answer = Flow::new(false, true).packet(9, 5, 0x10, b"hello");
    router.transmit(&with_addresses(answer.clone(), "10.2.2.3", "198.18.3.4"));
    router.transmit(&with_addresses(answer, "10.1.2.3", "198.18.3.5"));
    assert_eq!(router.drops(), [("drop_via", 1), ("drop_no_peer", 1)]);
}

#[test]
fn what_does_not_fit_is_answered_to_the_host() {
    let allowed = ["fd00::2/128", "198.18.3.4/32"];
    let (mut client, mut router) = edited(&allowed, &[]);
    let long = Flow::new(false, false).packet(9, 5, 0, &[7; 1420 - 28]);
    router.transmit(&with_addresses(long, "10.1.2.3", "198.18.3.4"));
    let told = router.wire.packets.pop().unwrap();
    assert_eq!(told[12..22], [198, 18, 3, 4, 10, 1, 2, 3, 3, 4]);
    assert_eq!(told[26..28], 1400_u16.to_be_bytes());
    let flow = Flow {
        dont_fragment: false,
        ..Flow::new(false, false)
    };
    router.transmit(&with_addresses(
        flow.packet(9, 5, 0, &[7; 1420 - 28]),
        "10.1.2.3",
        "198.18.3.4",
    ));
    settle(&mut client, &mut router);
    assert_eq!(client.wire.packets.len(), 2, "in two pieces");
}

#[test]
fn a_peer_that_knows_us_by_another_address() {
    let masquerade = [("10.0.0.1", "100.99.0.1"), ("fd00::1", "fd99::1")];
    let (mut client, mut router) = edited(&["10.0.0.2/32", "fd00::2/128"], &masquerade);
    for (v6, them, own, known) in [
        (false, "10.0.0.2", "10.0.0.1", "100.99.0.1"),
        (true, "fd00::2", "fd00::1", "fd99::1"),
    ] {
        let packet = |source: &str, destination: &str| {
            with_addresses(
                Flow::new(v6, true).packet(1, 1, 0x10, b"hi"),
                source,
                destination,
            )
        };
        send(&mut client, &mut router, &packet(them, known));
        assert_eq!(router.wire.packets.pop(), Some(packet(them, own)));
        router.transmit(&packet(own, them));
        settle(&mut client, &mut router);
        assert_eq!(client.wire.packets.pop(), Some(packet(known, them)));
    }
}
