//! What a bad network or an attacker sends.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[test]
fn replayed_datagrams_are_dropped() {
    let (mut client, mut router) = connected();
    client.transmit(&up(1));
    let datagram = client.wire.datagrams.remove(0);
    for _ in 0..3 {
        router.receive(client.address, &datagram.bytes, 0);
    }
    assert_eq!(router.wire.packets, [up(1)]);
    assert_eq!(router.count(Counter::DropReplay), 2);
}

#[test]
fn spoofed_inner_sources_are_dropped() {
    let (mut client, mut router) = connected();
    let flow = |source| Flow {
        source,
        ..Flow::new(false, false)
    };
    for source in [2, 3, 2] {
        client.transmit(&flow(source).packet(source.into(), 0, 0, b"from"));
    }
    settle(&mut client, &mut router);
    assert_eq!(router.wire.packets.len(), 2);
    assert_eq!(router.drops(), [(Counter::DropSource.label(), 1)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn nothing_is_forged_or_doubled_on_a_bad_network(
        seed: u64,
        count in 1u16..200,
        loss in 0u64..30,
        duplication in 0u64..30,
        reordering in 0usize..60,
    ) {
        let (mut client, mut router) = connected();
        let mut state = seed | 1;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut lost = BTreeSet::new();
        for serial in 0..count {
            client.transmit(&up(serial));
        }
        let mut flying: Vec<_> = std::mem::take(&mut client.wire.datagrams)
            .into_iter()
            .enumerate()
            .collect();
        flying.retain(|(serial, _)| {
            let keep = random(100) >= loss;
            if !keep {
                lost.insert(*serial as u16);
            }
            keep
        });
        for at in (0..flying.len()).rev() {
            if random(100) < duplication {
                flying.insert(at, flying[at].clone());
            }
            let other = at.saturating_sub(random(reordering as u64 + 1) as usize);
            flying.swap(at, other);
        }
        for (_, datagram) in &flying {
            router.receive(client.address, &datagram.bytes, 0);
        }
        let mut expected: Vec<_> = (0..count).filter(|s| !lost.contains(s)).map(up).collect();
        let mut arrived = router.wire.packets;
        expected.sort();
        arrived.sort();
        prop_assert_eq!(arrived, expected);
    }

    #[test]
    fn hostile_datagrams_do_no_harm(
        datagrams in proptest::collection::vec(
            (0u8..6, proptest::collection::vec(any::<u8>(), 0..200), any::<prop::sample::Index>(), any::<u8>()),
            0..60,
        ),
    ) {
        let (mut client, mut router) = connected();
        client.transmit(&up(1));
        let valid = client.wire.datagrams.remove(0).bytes;
        let elsewhere = SocketAddr::from(([203, 0, 113, 1], 1));
        for (kind, random, at, byte) in datagrams {
            let mut datagram = match kind {
                // A valid datagram, damaged.
                0 | 1 => {
                    let mut datagram = valid.clone();
                    let at = at.index(datagram.len());
                    if datagram[at] == byte {
                        continue;
                    }
                    datagram[at] = byte;
                    datagram
                }
                2 => valid[..at.index(valid.len())].to_vec(),
                _ => random,
            };
            // Messages of the right kind and length, and of our session.
            if kind >= 3 {
                datagram.resize([148, 92, 64][usize::from(kind) - 3], byte);
                datagram[..4].copy_from_slice(&[kind - 2, 0, 0, 0]);
                datagram[4..8].copy_from_slice(&valid[4..8]);
                datagram[8..12].copy_from_slice(&valid[4..8]);
            }
            router.receive(elsewhere, &datagram, byte);
        }
        prop_assert_eq!(&router.wire.packets, &[] as &[Vec<u8>]);
        prop_assert_eq!(router.shared.stats().endpoint(), Some(client.address));
        router.receive(client.address, &valid, 0);
        prop_assert_eq!(&router.wire.packets, &[up(1)]);
    }

    #[test]
    fn any_packet_from_the_tun_device_is_taken(
        packets in proptest::collection::vec(
            (any::<[u8; vnet::LEN]>(), proptest::collection::vec(any::<u8>(), 0..300)),
            1..30,
        ),
    ) {
        let (mut client, mut router) = connected();
        for (head, mut packet) in packets {
            if packet.len() > 20 {
                packet[..20].copy_from_slice(&up(0)[..20]);
            }
            let length = packet.len();
            packet.resize(length + SLACK, 0);
            if let Some(header) = vnet::Header::decode(&head) {
                client
                    .forwarder
                    .transmit(header, &mut packet, length, client.now, &mut client.wire);
            }
        }
        client.forwarder.flush(&mut client.wire);
        settle(&mut client, &mut router);
    }
}
