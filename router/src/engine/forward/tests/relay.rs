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
    tell_both(end, path, None);
}

fn tell_both(end: &mut End, path: Path, also: Option<Path>) {
    end.change(Change {
        paths: vec![(THEM, path, also)],
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

#[test]
fn traffic_to_a_peer_that_does_not_roam_is_told_when_it_begins_and_now_and_then() {
    let (mut client, mut router) = connected();
    let told = |end: &mut End| std::mem::take(&mut end.forwarder.busy).len();
    let seconds = |client: &mut End, router: &mut End, count: u32, busy: bool| {
        let mut all = 0;
        for at in 0..count * 10 {
            if busy {
                client.transmit(&up(at as u16));
            }
            settle(client, router);
            client.tick(Duration::from_millis(100));
            router.tick(Duration::from_millis(100));
            all += told(client);
        }
        all
    };
    assert_eq!(seconds(&mut client, &mut router, 20, true), 0, "it roams");
    client.change(Change {
        roaming: vec![(THEM, false)],
        ..Change::default()
    });
    assert!((4..=5).contains(&seconds(&mut client, &mut router, 20, true)));
    // What is left to be answered and the last news.
    assert!(seconds(&mut client, &mut router, 40, false) <= 2);
    assert_eq!(seconds(&mut client, &mut router, 60, false), 0);
    client.transmit(&up(1));
    client.tick(Duration::from_millis(10));
    assert_eq!(client.forwarder.busy, [router.key.public()]);
}

#[test]
fn packets_for_a_peer_that_is_nowhere_are_told_of() {
    let (mut client, router) = apart();
    client.change(Change {
        roaming: vec![(THEM, false)],
        ..Change::default()
    });
    for at in 0..3 {
        client.transmit(&up(at));
    }
    assert_eq!(client.forwarder.busy, [router.key.public()]);
}

/// What a peer relay between two ends would do: carries datagrams with its header from one to the other.
fn carry(from: &mut End, to: &mut End, relay: SocketAddr, number: u32) -> usize {
    let all = std::mem::take(&mut from.wire.datagrams);
    for datagram in &all {
        assert_eq!(datagram.to, relay);
        assert_eq!(
            datagram.bytes[..8],
            [0, 0, 0x7a, 0x12, 0, 0, number as u8, 0]
        );
        to.receive(relay, &datagram.bytes, 0);
    }
    all.len()
}

#[test]
fn a_session_goes_by_a_peer_relay_and_answers_go_back_by_it() {
    let (mut client, mut router) = apart();
    for end in [&mut client, &mut router] {
        end.change(Change {
            roaming: vec![(THEM, false)],
            ..Change::default()
        });
    }
    let at = SocketAddr::from(([192, 0, 2, 77], 7777));
    let way = Path::PeerRelay(at, 5);
    tell(&mut client, way);
    // The router was told nothing yet: it answers where it is called from.
    client.transmit(&up(0));
    while carry(&mut client, &mut router, at, 5) + carry(&mut router, &mut client, at, 5) > 0 {}
    assert_eq!(std::mem::take(&mut router.wire.packets), [up(0)]);
    router.transmit(&down(1));
    assert_eq!(carry(&mut router, &mut client, at, 5), 1);
    assert_eq!(std::mem::take(&mut client.wire.packets), [down(1)]);
    for end in [&client, &router] {
        assert_eq!(end.shared.stats().path, Some(way));
        assert_eq!(end.drops(), []);
    }
    // Several that came together are one run, and are opened as one.
    let packets: Vec<_> = [2, 4, 6, 8].map(up).into();
    packets.iter().for_each(|packet| client.transmit(packet));
    let sent = std::mem::take(&mut client.wire.datagrams);
    let together: Vec<u8> = sent.iter().flat_map(|one| one.bytes.clone()).collect();
    let origin = Origin {
        remote: at,
        local: None,
        interface: 0,
        ecn: 0,
        number: None,
        relay: None,
    };
    let (now, stride) = (router.now, sent[0].bytes.len());
    router
        .forwarder
        .receive(&origin, &together, stride, now, &mut router.wire);
    router.forwarder.flush(&mut router.wire);
    // They were merged on the way to the device, so the IP headers are new.
    let udp = |packets: &[Vec<u8>]| {
        packets
            .iter()
            .map(|one| one[20..].to_vec())
            .collect::<Vec<_>>()
    };
    assert_eq!(udp(&router.wire.packets), udp(&packets));
    // Another number there is another relay's place, and moves nobody.
    client.transmit(&up(7));
    let mut late = client.wire.datagrams.pop().unwrap().bytes;
    late[6] = 6;
    router.receive(at, &late, 0);
    assert_eq!(router.shared.stats().path, Some(way));
}

#[test]
fn whoever_roams_does_not_follow_a_peer_relay() {
    let (mut client, mut router) = connected();
    let before = router.shared.stats().path;
    client.transmit(&up(2));
    let datagram = client.wire.datagrams.pop().unwrap().bytes;
    let wrapped = [&[0, 0, 0x7a, 0x12, 0, 0, 5, 0][..], &datagram].concat();
    router.receive(SocketAddr::from(([192, 0, 2, 77], 7)), &wrapped, 0);
    assert_eq!(router.wire.packets, [up(2)], "the packet is good");
    assert_eq!(router.shared.stats().path, before);
}

#[test]
fn a_doubtful_way_is_taken_beside_the_relay_and_each_packet_arrives_once() {
    let (mut client, mut router) = apart();
    tell(&mut client, Path::Relay(RELAY));
    client.transmit(&up(0));
    relay(&mut client, &mut router);
    router.wire.packets.clear();
    let direct = Path::Udp(router.address);
    tell_both(&mut client, Path::Relay(RELAY), Some(direct));
    assert_eq!(client.shared.stats().path, Some(Path::Relay(RELAY)));
    client.transmit(&up(2));
    let message = client.wire.both.pop().unwrap();
    assert_eq!(message, direct);
    assert_eq!(client.wire.relayed.len(), 1);
    // It comes both ways; what is late is a replay.
    let copy = client.wire.relayed[0].1.clone();
    router.receive(client.address, &copy, 0);
    relay(&mut client, &mut router);
    assert_eq!(router.wire.packets, [up(2)]);
    assert_eq!(router.count(Counter::DropReplay), 1);
    // One of the two is found to work.
    tell(&mut client, direct);
    client.transmit(&up(3));
    assert!(client.wire.relayed.is_empty() && client.wire.both.is_empty());
    assert_eq!(client.wire.datagrams.len(), 1);
}
