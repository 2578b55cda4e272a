//! Where packets go, and changes of the peers.

use super::*;

#[test]
fn endpoints_follow_authentic_datagrams_only() {
    let (mut client, mut router) = connected();
    let moved = SocketAddr::from(([198, 51, 100, 7], 4444));
    client.transmit(&up(1));
    let mut forged = client.wire.datagrams[0].bytes.clone();
    *forged.last_mut().unwrap() ^= 1;
    router.receive(moved, &forged, 0);
    assert_eq!(router.count(Counter::DropAuth), 1);
    assert_eq!(router.shared.stats().endpoint(), Some(client.address));

    let authentic = client.wire.datagrams.remove(0).bytes;
    router.receive(moved, &authentic, 0);
    assert_eq!(router.shared.stats().endpoint(), Some(moved));
    router.transmit(&down(1));
    assert_eq!(router.wire.datagrams.pop().unwrap().to, moved);

    // The same datagram from somewhere else again: replayed, so not believed.
    router.receive(client.address, &authentic, 0);
    assert_eq!(router.shared.stats().endpoint(), Some(moved));
}

#[test]
fn a_session_begins_where_a_peer_was_before() {
    let (mut client, before) = connected();
    let elsewhere = SocketAddr::from(([198, 51, 100, 7], 4444));
    // Who is known to be somewhere by now is asked there.
    for (known, resume) in [(false, client.address), (true, elsewhere)] {
        let mut router = End::new(2);
        router.address = before.address;
        router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], known, None);
        assert_eq!(router.wire.datagrams, []);
        router.change(Change {
            resume: vec![(THEM, Path::Udp(resume))],
            ..Change::default()
        });
        assert_eq!(router.wire.datagrams.len(), 1);
        assert_eq!(router.wire.datagrams[0].to, client.address);
        if !known {
            settle(&mut client, &mut router);
            client.transmit(&up(1));
            settle(&mut client, &mut router);
            assert_eq!(router.wire.packets, [up(1)]);
        }
    }
}

#[test]
fn removed_peers_end_at_once() {
    let (mut client, mut router) = connected();
    client.transmit(&up(1));
    router.change(Change {
        remove: vec![THEM],
        directory: Some(Arc::new(Directory {
            routes: Routes::new([]),
            keys: Keys::from_iter([]),
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
fn packets_that_wait_for_a_removed_peer_are_counted() {
    let (mut client, router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24"], true, None);
    for serial in 0..3 {
        client.transmit(&up(serial * 2));
    }
    client.change(Change {
        remove: vec![THEM],
        ..Change::default()
    });
    assert_eq!(client.count(Counter::DropStaged), 3);
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
fn a_mapped_endpoint_is_an_ipv4_endpoint() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    let plain = router.address;
    router.address = "[::ffff:192.0.2.2]:51820".parse().unwrap();
    client.meet(&router, &["10.0.0.0/24"], true, None);
    client.transmit(&up(0));
    assert_eq!(client.wire.datagrams[0].to, plain);
}

#[test]
fn a_new_preshared_key_ends_the_session_and_nothing_else() {
    let (mut client, mut router) = (End::new(1), End::new(2));
    client.meet(&router, &["10.0.0.0/24", "fd00::/64"], true, None);
    router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], false, None);
    client.transmit(&up(0));
    let captured = client.wire.datagrams[0].clone();
    settle(&mut client, &mut router);
    let moved = SocketAddr::from(([198, 51, 100, 7], 4444));
    client.address = moved;
    client.transmit(&up(1));
    settle(&mut client, &mut router);
    let before = router.shared.stats();
    assert_eq!(before.endpoint(), Some(moved));

    let key = PresharedKey::from_bytes([10; 32]);
    let change = || Change {
        preshared_keys: vec![(THEM, Some(key.clone()))],
        ..Change::default()
    };
    router.change(change());
    // What was captured before is no handshake now, from wherever it comes.
    router.receive(([203, 0, 113, 1], 1).into(), &captured.bytes, 0);
    assert_eq!(router.count(Counter::DropHandshake), 1);
    client.transmit(&up(2));
    settle(&mut client, &mut router);
    assert_eq!(router.count(Counter::DropExpired), 1);
    let after = router.shared.stats();
    assert_eq!(after.endpoint(), Some(moved));
    assert_eq!(
        (after.rx_bytes, after.last_handshake),
        (before.rx_bytes, before.last_handshake)
    );

    // The other end has the old key yet.
    router.wire.packets.clear();
    router.transmit(&down(3));
    settle(&mut client, &mut router);
    assert_eq!(client.wire.packets, [] as [Vec<u8>; 0]);
    client.change(change());
    router.tick(Duration::from_secs(6));
    settle(&mut client, &mut router);
    assert_eq!(client.wire.packets, [down(3)]);
    assert_eq!(router.wire.packets, [] as [Vec<u8>; 0]);
}

#[test]
fn an_allowed_ip_moves_between_peers_who_stay_connected() {
    let (mut first, mut second, mut router) = (End::new(1), End::new(3), End::new(2));
    for client in [&mut first, &mut second] {
        client.meet(&router, &["10.0.0.0/24"], true, None);
    }
    let shared = [&first, &second].map(|client| Arc::new(Shared::new(client.key.public())));
    let setups = [&first, &second].into_iter().zip(&shared).zip(0..);
    let setups = setups.map(|((client, shared), id)| Setup {
        id,
        public_key: client.key.public(),
        preshared_key: Some(PresharedKey::from_bytes([9; 32])),
        index: 100 + id,
        endpoints: Vec::new(),
        keepalive: None,
        roaming: true,
        shared: shared.clone(),
    });
    let add = setups.collect();
    let directory = |owner: PeerId| {
        let routes = [("10.0.0.2/32", owner), ("10.0.0.3/32", 1)];
        let keys = [(first.key.public(), 0), (second.key.public(), 1)];
        Some(Arc::new(Directory {
            routes: Routes::new(routes.map(|(cidr, id)| (cidr.parse().unwrap(), id))),
            keys: Keys::from_iter(keys),
            owners: vec![0, 0],
        }))
    };
    let (before, after) = (directory(0), directory(1));
    router.change(Change {
        add,
        directory: before,
        ..Change::default()
    });
    for client in [&mut first, &mut second] {
        client.transmit(&up(0));
        settle(client, &mut router);
    }
    // The second has no right to the address yet.
    assert_eq!(std::mem::take(&mut router.wire.packets), [up(0)]);
    assert_eq!(router.drops(), [(Counter::DropSource.label(), 1)]);

    router.change(Change {
        directory: after,
        ..Change::default()
    });
    for client in [&mut first, &mut second] {
        client.transmit(&up(2));
        settle(client, &mut router);
    }
    assert_eq!(router.wire.packets, [up(2)]);
    assert_eq!(router.drops(), [(Counter::DropSource.label(), 2)]);
    router.transmit(&down(2));
    settle(&mut second, &mut router);
    assert_eq!(second.wire.packets, [down(2)]);
    for client in [&first, &second] {
        assert_eq!(
            client.count(Counter::HandshakesCompleted),
            1,
            "nobody was disturbed"
        );
    }
}

#[test]
fn both_ends_take_new_private_keys_while_packets_flow() {
    let (mut client, mut router) = connected();
    router.key = PrivateKey::from_bytes([77; 32]);
    router.change(Change {
        local: Some(Arc::new(LocalKey::new(&router.key))),
        ..Change::default()
    });
    client.transmit(&up(1));
    settle(&mut client, &mut router);
    client.change(Change {
        remove: vec![THEM],
        ..Change::default()
    });
    client.meet(&router, &["10.0.0.0/24", "fd00::/64"], true, None);
    client.transmit(&up(2));
    settle(&mut client, &mut router);
    assert_eq!(router.wire.packets, [up(2)], "the router kept its peer");

    client.key = PrivateKey::from_bytes([78; 32]);
    client.change(Change {
        local: Some(Arc::new(LocalKey::new(&client.key))),
        ..Change::default()
    });
    router.change(Change {
        remove: vec![THEM],
        ..Change::default()
    });
    router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], false, None);
    client.transmit(&up(3));
    settle(&mut client, &mut router);
    assert_eq!(router.wire.packets, [up(2), up(3)]);
    router.transmit(&down(3));
    settle(&mut client, &mut router);
    assert_eq!(client.wire.packets, [down(3)]);
}
