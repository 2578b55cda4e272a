//! Handshakes, timers, and packets that wait for them.

use std::collections::BTreeSet;

use super::*;
use crate::engine::forward::pace::BURST;

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
    assert_eq!(router.shared.stats().endpoint(), Some(client.address));
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
    settle(&mut client, &mut router);
    client.tick(Duration::from_secs(14));
    assert_eq!(client.wire.datagrams, []);
    router.transmit(&down(2));
    settle(&mut client, &mut router);
    client.change(Change {
        keepalives: vec![(THEM, None)],
        ..Change::default()
    });
    client.tick(Duration::from_secs(600));
    assert_eq!(client.wire.datagrams, []);
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
    let waiting = |id: u32| end.forwarder.staged.counts(id).0;
    assert_eq!(waiting(offline), 5);
    assert_eq!((0..=offline).map(waiting).sum::<usize>(), STAGED_TOTAL);
    assert_eq!(end.count(Counter::DropStaged), 5);
    // All give up, at the pace of handshakes, for the answer could have come late.
    for _ in 0..20 {
        end.tick(Duration::from_secs(10));
    }
    assert!(
        end.forwarder.staged.is_empty(),
        "who is given up keeps no packets"
    );
    let all = STAGED_TOTAL as u64 + 5;
    assert_eq!(end.count(Counter::DropStaged), all, "each is counted");
}

#[test]
fn a_new_private_key_does_not_strand_packets_of_who_waits_for_its_turn() {
    for another in [false, true] {
        let mut end = End::new(1);
        let last = BURST;
        end.crowd(last + 1, None);
        let transmit = |end: &mut End, id: u32| {
            let mut packet = up(0);
            packet[16..20].copy_from_slice(&[10, 1, id as u8, 1]);
            end.transmit(&packet);
        };
        for id in 0..=last {
            transmit(&mut end, id);
        }
        assert_eq!(end.wire.datagrams.len(), BURST as usize);
        end.change(Change {
            local: Some(Arc::new(LocalKey::new(&PrivateKey::from_bytes([99; 32])))),
            ..Change::default()
        });
        if another {
            transmit(&mut end, last);
        }
        end.wire.datagrams.clear();
        for _ in 0..3 {
            end.tick(TICK);
        }
        go_on(&mut end);
        let reached: BTreeSet<_> = end.wire.datagrams.iter().map(|d| d.to).collect();
        assert_eq!(reached.len(), last as usize + 1, "{another}");
    }
}

/// Time passes for as long as anything is due soon.
fn go_on(end: &mut End) {
    let last = end.now + TICK;
    while let Some(at) = end.forwarder.deadline().filter(|at| *at <= last) {
        end.now = end.now.max(at);
        end.tick(Duration::ZERO);
    }
}

#[test]
fn timers_begin_few_handshakes_before_packets_have_their_turn() {
    let mut end = End::new(1);
    let count = 3 * BURST as usize;
    end.crowd(count as u32, Some(Duration::from_secs(25)));
    assert_eq!(end.wire.datagrams, [], "not all at once");
    end.tick(Duration::ZERO);
    assert_eq!(end.wire.datagrams.len(), BURST as usize);
    end.tick(Duration::ZERO);
    assert_eq!(end.wire.datagrams.len(), BURST as usize);
    go_on(&mut end);
    let reached: BTreeSet<_> = end.wire.datagrams.iter().map(|d| d.to).collect();
    assert_eq!((end.wire.datagrams.len(), reached.len()), (count, count));

    // A new key: each tunnel takes it in its turn, and begins its handshake again.
    let local = Arc::new(LocalKey::new(&PrivateKey::from_bytes([99; 32])));
    end.change(Change {
        local: Some(local),
        ..Change::default()
    });
    let before = end.wire.datagrams.len();
    end.tick(Duration::from_secs(1));
    assert!(end.wire.datagrams.len() - before <= BURST as usize);
    for _ in 0..3 {
        end.tick(TICK);
    }
    go_on(&mut end);
    assert_eq!(end.wire.datagrams.len(), 2 * count);
}
