//! Translated ports that the router itself gets later.

use super::*;

/// A flow of TCP that was translated and is established, and what its server sends.
fn established(world: &mut World, peer: IpAddr, server: IpAddr) -> impl Fn(u8, u32) -> Ip + use<> {
    let external = ip(if peer.is_ipv4() {
        V4.external
    } else {
        V6.external
    });
    let back = move |flags, sequence| {
        Ip::tcp(server, external, flags, &[], 0)
            .ports(443, 40_000)
            .sequence(sequence, 101)
    };
    let out = |flags, sequence, acknowledged| {
        Ip::tcp(peer, server, flags, &[], 0).sequence(sequence, acknowledged)
    };
    up(world, &out(SYN, 100, 0)).unwrap();
    down(world, &back(SYN | ACK, 500)).unwrap();
    up(world, &out(ACK, 101, 501)).unwrap();
    back
}

#[test]
fn a_socket_that_comes_later_gets_its_answers() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        let mut world = router(true);
        let back = established(&mut world, peer, server);
        down(&mut world, &back(ACK, 501)).unwrap();
        // A socket of the router has got the same tuple.
        let answer = back(SYN | ACK, 70_000_000);
        let tuple = |packet: &Ip| {
            let port = |at: usize| [packet.payload[at], packet.payload[at + 1]];
            Tuple {
                source: address(packet.source),
                destination: address(packet.destination),
                ports: [port(0), port(2)],
                protocol: packet.protocol,
            }
        };
        world.sockets.insert(tuple(&answer));
        for packet in [answer, back(ACK, 70_000_001)] {
            assert_eq!(down(&mut world, &packet), Err(Verdict::SlowToRouter));
        }
        let more = Ip::tcp(peer, server, ACK, &[], 0).sequence(101, 501);
        assert_eq!(up(&mut world, &more), Err(Verdict::DropNatExhausted));
        let lost = |(_, _, flow): &(Side, Tuple, Flow)| flow.tcp == Flow::LOST;
        assert!(world.flows().iter().all(lost), "the sweep sees it");

        // UDP: within a second, and only as long as the socket is there.
        let ask = Ip::udp(peer, server, 30);
        up(&mut world, &ask).unwrap();
        let answer = Ip::udp(server, ip(family.external), 31).ports(53, 40_000);
        down(&mut world, &answer).unwrap();
        world.now += 2 * Flow::COARSE;
        world.sockets.insert(tuple(&answer));
        for _ in 0..2 {
            assert_eq!(down(&mut world, &answer), Err(Verdict::SlowToRouter));
        }
        world.sockets.clear();
        world.now += 2 * Flow::COARSE;
        assert!(down(&mut world, &answer).is_ok());
    }
}

/// Connection tracking's translations are no sockets, and tell nothing; but a server greets nobody twice.
#[test]
fn a_translation_that_comes_later_gets_its_answers() {
    let [peer, ..] = V4.peers.map(ip);
    let [server, _] = V4.servers.map(ip);
    let mut world = router(true);
    let back = established(&mut world, peer, server);
    // What the server sends again is the flow's.
    down(&mut world, &back(SYN | ACK, 500)).unwrap();
    let more = Ip::tcp(peer, server, ACK, &[], 0).sequence(101, 60_000);
    up(&mut world, &more).unwrap();
    down(&mut world, &back(SYN | ACK, 500)).unwrap();
    for packet in [back(SYN | ACK, 70_000_000), back(ACK, 70_000_001)] {
        assert_eq!(down(&mut world, &packet), Err(Verdict::SlowToRouter));
    }
}
