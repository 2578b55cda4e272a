//! Ports that are used again.

use super::*;

/// RFC 5382, section 5: a flow is established only by a handshake of its own.
#[test]
fn a_syn_from_a_used_port_begins_both_directions_anew() {
    for snat in [false, true] {
        let mut world = router(snat);
        let [peer, ..] = V4.peers.map(ip);
        let [server, _] = V4.servers.map(ip);
        let external = if snat { ip(V4.external) } else { peer };
        let near = |flags, ack| {
            Ip::tcp(peer, server, flags, &[], 0)
                .ports(40_000, 443)
                .sequence(900, ack)
        };
        let far = |flags, seq, ack| {
            Ip::tcp(server, external, flags, &[], 0)
                .ports(443, 40_000)
                .sequence(seq, ack)
        };
        let seen = |world: &World| {
            [Side::Overlay, Side::Subnet].map(|wanted| {
                let flows = world.flows();
                let entry = flows.iter().find(|(side, ..)| *side == wanted).unwrap();
                entry.2.tcp
            })
        };
        for packet in [near(SYN, 0), near(ACK, 7001), near(FIN | ACK, 7001)] {
            up(&mut world, &packet).unwrap();
            let answer = if packet.payload[13] & SYN != 0 {
                far(SYN | ACK, 7000, 901)
            } else {
                far(FIN | ACK, 7001, 902)
            };
            down(&mut world, &answer).unwrap();
        }
        assert_eq!(seen(&world).map(|tcp| tcp & Flow::FIN), [Flow::FIN; 2]);

        up(&mut world, &near(SYN, 0)).unwrap();
        assert_eq!(seen(&world), [Flow::SYN, 0], "nothing is established");
        // A closed port answers with sequence number zero.
        down(&mut world, &far(RST | ACK, 0, 901)).unwrap();
        assert_eq!(seen(&world), [Flow::SYN, Flow::RST]);
        up(&mut world, &near(SYN, 0)).unwrap();
        down(&mut world, &far(SYN | ACK, 9_000_000, 901)).unwrap();
        up(&mut world, &near(ACK, 9_000_001)).unwrap();
        assert_eq!(seen(&world), [Flow::SYN | Flow::ACK, Flow::SYN]);
        // The one before does not count for what is believed of this one.
        down(&mut world, &far(RST, 7002, 0)).unwrap();
        assert_eq!(seen(&world)[1], Flow::SYN);
    }
}
