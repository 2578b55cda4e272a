#![allow(clippy::unwrap_used)]
use super::*;
use crate::craft::Ip;
use crate::site::*;

/// A datagram of 2,000 bytes from a peer to a server, and its reply.
fn datagrams(family: Family) -> (Ip, Ip) {
    let [peer, ..] = family.peers.map(ip);
    let [server, _] = family.servers.map(ip);
    let ask = Ip::udp(peer, server, 2000).ports(62_000, 53);
    let reply = Ip::udp(server, ip(family.external), 2000);
    (ask, reply)
}

/// What the fragments make when they are put together again.
fn whole(fragments: &[Ip]) -> Vec<u8> {
    let header = if fragments[0].source.is_ipv4() { 0 } else { 8 };
    let parts = fragments.iter().map(|part| part.payload[header..].to_vec());
    parts.collect::<Vec<_>>().concat()
}

#[test]
fn all_fragments_get_one_translation() {
    for family in FAMILIES {
        let mut world = router(true);
        let (ask, reply) = datagrams(family);
        let peer = ask.source;
        let sent = ask.fragments(77, &[800, 1600]);
        let out: Vec<Ip> = sent
            .iter()
            .map(|part| up(&mut world, part).unwrap())
            .collect();
        assert!(out.iter().all(|part| part.source == ip(family.external)));
        let payload = whole(&out);
        let port = u16::from_be_bytes([payload[0], payload[1]]);
        assert!((2000..=2015).contains(&port));
        let wanted = ask.clone().from(ip(family.external)).ports(port, 53);
        assert_eq!(payload, wanted.payload, "checksum and ports");

        let reply = reply.ports(53, port);
        let back: Vec<Ip> = reply
            .fragments(78, &[800, 1600])
            .iter()
            .map(|part| down(&mut world, part).unwrap())
            .collect();
        let wanted = reply.to(peer).ports(53, 62_000);
        assert_eq!(whole(&back), wanted.payload);
        assert!(
            back.iter()
                .all(|part| part.destination == peer && part.ttl == 63)
        );
    }
}

#[test]
fn a_later_fragment_that_comes_first() {
    for family in FAMILIES {
        let (ask, _) = datagrams(family);
        let parts = ask.fragments(79, &[800]);
        // Translated, its port is not known, and the kernel would give it another.
        let mut world = router(true);
        assert_eq!(up(&mut world, &parts[1]), Err(Verdict::DropFragment));
        assert!(up(&mut world, &parts[0]).is_ok());
        // As it is, the kernel gets all of the packet.
        let mut world = router(false);
        for part in [&parts[1], &parts[0], &parts[1]] {
            assert_eq!(up(&mut world, part), Err(Verdict::SlowFragment));
        }
        // And of no other.
        let next = ask.fragments(80, &[800]);
        assert!(up(&mut world, &next[0]).is_ok());
        assert!(up(&mut world, &next[1]).is_ok());
    }
}

#[test]
fn fragments_of_strangers_are_theirs() {
    let (ask, reply) = datagrams(V4);
    let mut world = router(true);
    up(&mut world, &ask.fragments(81, &[800])[0]).unwrap();
    // The same identification of another host, protocol and way.
    let mut other = ask.fragments(81, &[800]).remove(1);
    other.source = ip(V4.peers[1]);
    assert_eq!(up(&mut world, &other), Err(Verdict::DropFragment));
    let back = reply.fragments(81, &[800]).remove(1);
    assert_eq!(down(&mut world, &back), Err(Verdict::PassUnrelated));
}

#[test]
fn an_identification_that_comes_again_is_another_packets() {
    for family in FAMILIES {
        let (ask, _) = datagrams(family);
        let parts = ask.fragments(82, &[800]);
        let mut world = router(true);
        up(&mut world, &parts[0]).unwrap();
        world.now += 29_000_000_000;
        assert!(up(&mut world, &parts[1]).is_ok());
        world.now += 2_000_000_000;
        assert_eq!(up(&mut world, &parts[1]), Err(Verdict::DropFragment));
        // Nor does a later one that once came early have all go to the kernel for good.
        let mut world = router(false);
        assert_eq!(up(&mut world, &parts[1]), Err(Verdict::SlowFragment));
        world.now += 31_000_000_000;
        assert!(up(&mut world, &parts[0]).is_ok());
        assert!(up(&mut world, &parts[1]).is_ok());
    }
}
