//! Peers that are not where they were, or not where a name says first, and sources that do not get
//! through.

use super::*;
use crate::wireguard::clock;

fn dead(host: u8) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, host], 51820))
}

/// Seconds until something that the client sends each second reaches the router, at most so many.
fn until_through(client: &mut End, router: &mut End, most: u64) -> Option<u64> {
    for second in 0..most {
        client.transmit(&up(second as u16));
        for _ in 0..10 {
            settle(client, router);
            clock::advance(TICK);
            client.tick(TICK);
            router.tick(TICK);
        }
        settle(client, router);
        if !std::mem::take(&mut router.wire.packets).is_empty() {
            return Some(second);
        }
    }
    None
}

#[test]
fn of_several_addresses_a_live_one_is_found() {
    for position in 0..3 {
        let (mut client, mut router) = (End::new(1), End::new(2));
        client.meet(&router, &["10.0.0.0/24", "fd00::/64"], false, None);
        router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], false, None);
        let mut addresses = vec![dead(1), dead(2)];
        addresses.insert(position, router.address);
        client.change(Change {
            configured: vec![(THEM, addresses)],
            ..Change::default()
        });
        let took = until_through(&mut client, &mut router, 60);
        assert!(
            took.is_some_and(|took| took <= 11 * position as u64),
            "{position}: {took:?}"
        );
        // That one dies, another one comes to life.
        router.address = dead(1);
        let took = until_through(&mut client, &mut router, 240);
        assert!(took.is_some(), "{position}");
    }
}

#[test]
fn a_peer_that_has_roamed_to_a_dead_address_is_found_where_it_is_configured() {
    let (mut client, mut router) = connected();
    let home = std::mem::replace(&mut router.address, dead(1));
    router.transmit(&down(1));
    settle(&mut client, &mut router);
    assert_eq!(
        until_through(&mut client, &mut router, 5),
        Some(0),
        "it was followed"
    );
    // It begins anew at home, and waits to be called.
    router = End::new(2);
    router.now = client.now;
    router.address = home;
    router.meet(&client, &["10.0.0.2/32", "fd00::2/128"], false, None);
    let took = until_through(&mut client, &mut router, 300).unwrap();
    // Data without an answer asks for a handshake after 15 seconds; from then on two minutes.
    assert!((120..150).contains(&took), "{took}");
}

#[test]
fn a_source_that_may_not_get_through_is_not_kept() {
    let (mut client, mut router) = connected();
    client.local = Some(IpAddr::from([192, 0, 2, 1]));
    router.transmit(&down(1));
    settle(&mut client, &mut router);
    client.transmit(&up(2));
    assert_eq!(client.wire.datagrams.pop().unwrap().local, client.local);
    // Nothing comes back any more: from the first retry on, any source will do.
    let mut sources = Vec::new();
    for second in 0..30u16 {
        client.transmit(&up(second));
        for _ in 0..10 {
            clock::advance(TICK);
            client.tick(TICK);
        }
        sources.extend(client.wire.datagrams.drain(..).map(|d| d.local));
    }
    assert_eq!(sources.first(), Some(&client.local));
    assert_eq!(sources.last(), Some(&None));

    // An answer makes it known again.
    router.transmit(&down(3));
    settle(&mut client, &mut router);
    client.transmit(&up(4));
    assert_eq!(client.wire.datagrams.pop().unwrap().local, client.local);
}

#[test]
fn a_source_is_not_used_while_packets_leave_by_another_interface() {
    let (mut client, mut router) = connected();
    client.local = Some(IpAddr::from([192, 0, 2, 1]));
    let mut source = |client: &mut End| {
        router.transmit(&down(1));
        settle(client, &mut router);
        client.transmit(&up(2));
        client.wire.datagrams.pop().unwrap().local
    };
    assert_eq!(source(&mut client), client.local);
    for detour in [true, false] {
        client.now += JUDGE_AFTER;
        source(&mut client);
        client.tick(TICK);
        let (id, way) = client.forwarder.doubtful.pop().unwrap();
        assert_eq!((Some(way.local), way.detour), (client.local, !detour));
        client.forwarder.judge(id, &Way { detour, ..way });
        let expected = client.local.filter(|_| !detour);
        assert_eq!(source(&mut client), expected);
    }
}
