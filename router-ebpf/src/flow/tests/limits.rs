//! Who may have how many flows.

use super::*;

#[test]
fn one_source_cannot_fill_the_table() {
    let mut world = router(false);
    let [greedy, modest, _] = V6.peers.map(ip);
    let [server, _] = V6.servers.map(ip);
    let ask = |peer, n: u32| Ip::udp(peer, server, 5).ports(1024 + n as u16, 53);
    for n in 0..LIMIT {
        assert!(up(&mut world, &ask(greedy, n)).is_ok());
    }
    let more = up(&mut world, &ask(greedy, LIMIT));
    assert_eq!(more, Err(Verdict::DropSourceLimit));
    assert!(
        up(&mut world, &ask(greedy, 0)).is_ok(),
        "an open one goes on"
    );
    assert!(up(&mut world, &ask(modest, 0)).is_ok());

    world.entries = world.flows().len() + 1;
    assert_eq!(up(&mut world, &ask(modest, 1)), Err(Verdict::DropTableFull));
    world.entries = usize::MAX;
    world.end(|side, tuple, _| side == Side::Overlay && tuple.source == address(greedy));
    assert!(up(&mut world, &ask(greedy, LIMIT)).is_ok());
    assert!(up(&mut world, &ask(modest, 1)).is_ok());
}

#[test]
fn a_peer_has_one_share_whatever_addresses_it_has() {
    for family in FAMILIES {
        let mut world = router(false);
        let [one, another, modest] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        // The first two are one peer's.
        for (cidr, peer) in &mut world.overlay {
            if cidr.address == address(another) {
                *peer = crate::abi::Overlay::of(1);
            }
        }
        let ask = |peer, n: u32| Ip::udp(peer, server, 5).ports(1024 + n as u16, 53);
        let opened = (0..LIMIT).map(|n| up(&mut world, &ask([one, another][n as usize % 2], n)));
        assert!(opened.collect::<Vec<_>>().iter().all(Result::is_ok));
        for peer in [one, another] {
            let more = up(&mut world, &ask(peer, LIMIT));
            assert_eq!(more, Err(Verdict::DropSourceLimit));
        }
        assert!(up(&mut world, &ask(modest, 0)).is_ok());
    }
}

#[test]
fn flows_from_the_subnet_are_not_the_peers() {
    for family in FAMILIES {
        let mut world = router(false);
        let [peer, ..] = family.peers.map(ip);
        let hosts = family.servers.map(ip);
        world.settings.flows_from_subnet = LIMIT + 10;
        let tell = |host, n: u32| Ip::udp(host, peer, 5).ports(53, 1024 + n as u16);
        for n in 0..LIMIT {
            assert!(down(&mut world, &tell(hosts[0], n)).is_ok());
        }
        // A host has a limit of its own, and all of them together have one.
        let more = down(&mut world, &tell(hosts[0], LIMIT));
        assert_eq!(more, Err(Verdict::DropSourceLimit));
        for n in 0..10 {
            assert!(down(&mut world, &tell(hosts[1], n)).is_ok());
        }
        let more = down(&mut world, &tell(hosts[1], 10));
        assert_eq!(more, Err(Verdict::DropSourceLimit));
        let ask = |n: u32| Ip::udp(peer, hosts[0], 5).ports(9000 + n as u16, 99);
        for n in 0..LIMIT {
            assert!(up(&mut world, &ask(n)).is_ok(), "the peer's own {n}");
        }
    }
}
