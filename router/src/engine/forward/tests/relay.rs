//! Peers through relays, and peers that are where somebody else says.

use super::*;
use crate::engine::path::RelayId;

const RELAY: RelayId = RelayId(3);

/// Carries what two ends have sent through the relay, until nothing more comes.
fn relay(a: &mut End, b: &mut End) -> usize {
    let mut carried = 0;
    let mut pass = |from: &mut End, to: &mut End| {
        let key = from.key.public();
        for (path, bytes) in std::mem::take(&mut from.wire.relayed) {
            assert_eq!(path, Path::Relay(RELAY));
            carried += 1;
            let content = Content::Datagrams(Origin::relayed(RELAY, key), bytes.len());
            let (now, length) = (to.now, bytes.len());
            let mut buffer = [&bytes[..], &[0; SLACK]].concat();
            to.forwarder
                .accept(content, &mut buffer, length, now, &mut to.wire);
            to.forwarder.flush(&mut to.wire);
        }
    };
    while !a.wire.relayed.is_empty() || !b.wire.relayed.is_empty() {
        pass(a, b);
        pass(b, a);
    }
    carried
}

fn tell(end: &mut End, path: Path) {
    end.change(Change {
        paths: vec![(THEM, path)],
        ..Change::default()
    });
}

/// Client and router who know each other's keys and no address.
fn apart() -> (End, End) {
    let (mut client, mut router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24", "fd00::/64"], false, None);
    router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], false, None);
    (client, router)
}

#[test]
fn a_session_begins_through_a_relay_and_goes_on_without_it() {
    let (mut client, mut router) = apart();
    tell(&mut client, Path::Relay(RELAY));
    client.transmit(&up(0));
    assert_eq!(client.wire.datagrams, []);
    assert!(relay(&mut client, &mut router) >= 3);
    assert_eq!(std::mem::take(&mut router.wire.packets), [up(0)]);
    // The router, whose peer roams, answers the way it was called.
    assert_eq!(router.shared.stats().path, Some(Path::Relay(RELAY)));
    router.transmit(&down(1));
    relay(&mut client, &mut router);
    assert_eq!(std::mem::take(&mut client.wire.packets), [down(1)]);
    // Counted as the rest is.
    assert!(router.shared.stats().rx_bytes > 0 && client.shared.stats().tx_bytes > 0);
    assert!(router.count(Counter::RxRelayed) >= 2);

    // A direct way is found: the same session goes on there.
    tell(&mut client, Path::Udp(router.address));
    client.transmit(&up(2));
    assert!(client.wire.relayed.is_empty());
    settle(&mut client, &mut router);
    assert_eq!(router.wire.packets, [up(2)]);
    assert_eq!(router.shared.stats().path, Some(Path::Udp(client.address)));
    assert_eq!(router.count(Counter::HandshakesCompleted), 1);
    for end in [&client, &router] {
        assert_eq!(end.drops(), []);
    }
}

#[test]
fn a_late_packet_moves_nobody_who_does_not_roam() {
    let (mut client, mut router) = connected();
    let (told, roamed) = (router.shared.stats().path, router.count(Counter::Roamed));
    router.change(Change {
        roaming: vec![(THEM, false)],
        ..Change::default()
    });
    client.transmit(&up(2));
    let datagram = client.wire.datagrams.pop().unwrap();
    let elsewhere = SocketAddr::from(([203, 0, 113, 1], 1));
    router.receive(elsewhere, &datagram.bytes, 0);
    assert_eq!(router.wire.packets, [up(2)], "the packet is good");
    assert_eq!(router.shared.stats().path, told);
    assert_eq!(router.count(Counter::Roamed), roamed);

    tell(&mut router, Path::Relay(RELAY));
    client.transmit(&up(4));
    settle(&mut client, &mut router);
    assert_eq!(router.shared.stats().path, Some(Path::Relay(RELAY)));
    router.transmit(&down(5));
    assert_eq!(router.wire.relayed.len(), 1);
}

#[test]
fn what_a_relay_says_of_a_sender_is_believed_of_no_message() {
    let (mut client, mut router) = apart();
    tell(&mut client, Path::Relay(RELAY));
    client.transmit(&up(0));
    relay(&mut client, &mut router);
    let before = router.shared.stats();
    // Somebody sends junk in the client's name, and an initiation of another key.
    let mut stranger = End::new(3);
    stranger.meet(&router, &["10.0.0.0/24"], true, None);
    stranger.transmit(&up(0));
    let initiation = stranger.wire.datagrams.pop().unwrap().bytes;
    let data = [&[4, 0, 0, 0][..], &[7; 60]].concat();
    for bytes in [initiation, data] {
        let origin = Origin::relayed(RelayId(9), client.key.public());
        let content = Content::Datagrams(origin, bytes.len());
        let mut buffer = [&bytes[..], &[0; SLACK]].concat();
        let (now, wire) = (router.now, &mut router.wire);
        router
            .forwarder
            .accept(content, &mut buffer, bytes.len(), now, wire);
    }
    assert_eq!(router.count(Counter::DropUnknownPeer), 1);
    assert_eq!(router.count(Counter::DropIndex), 1);
    assert_eq!(router.shared.stats(), before);
}
