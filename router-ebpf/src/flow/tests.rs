#![allow(clippy::unwrap_used)]
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use proptest::prelude::*;

use crate::abi::{Flow, Settings, Side, Tuple};
use crate::craft::{Ip, TCP, UDP};
use crate::forward::Exit;
use crate::frame::Bytes;
use crate::memory::Memory;
use crate::packet::{ACK, FIN, RST, SYN};
use crate::site::*;
use crate::tables::Hop;
use crate::verdict::Verdict;
use crate::world::World;

mod limits;
mod ports;
mod reuse;

#[test]
fn a_flow_goes_out_translated_and_its_replies_come_back() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        let external = ip(family.external);
        let mut world = router(true);
        let syn = Ip::tcp(peer, server, SYN, &[], 0);
        same(
            &up(&mut world, &syn).unwrap(),
            &syn.clone().from(external).forwarded(),
        );
        let answer = Ip::tcp(server, external, SYN | ACK, &[], 0).ports(443, 40000);
        same(
            &down(&mut world, &answer).unwrap(),
            &answer.clone().to(peer).forwarded(),
        );
        let data = Ip::tcp(peer, server, ACK, &[], 100);
        same(
            &up(&mut world, &data).unwrap(),
            &data.clone().from(external).forwarded(),
        );

        let ask = Ip::udp(peer, server, 30);
        same(
            &up(&mut world, &ask).unwrap(),
            &ask.clone().from(external).forwarded(),
        );
        let answer = Ip::udp(server, external, 31).ports(53, 40000);
        same(
            &down(&mut world, &answer).unwrap(),
            &answer.clone().to(peer).forwarded(),
        );

        let echo = Ip::echo(peer, server).identifier(7000);
        let out = up(&mut world, &echo).unwrap();
        same(&out, &echo.clone().from(external).forwarded());
        let reply = out.echo_reply();
        same(
            &down(&mut world, &reply).unwrap(),
            &reply.clone().to(peer).forwarded(),
        );
        // Nobody else's replies come in.
        for stranger in [
            Ip::udp(server, external, 31).ports(53, 40001),
            Ip::udp(server, external, 31).ports(54, 40000),
            Ip::udp(ip(family.servers[1]), external, 31).ports(53, 40000),
            Ip::tcp(server, external, ACK, &[], 0).ports(443, 40001),
        ] {
            assert_eq!(down(&mut world, &stranger), Err(Verdict::PassUnrelated));
        }
    }
}

#[test]
fn a_checksum_that_udp_leaves_out_stays_out() {
    let mut world = router(true);
    let mut ask = Ip::udp(ip(V4.peers[0]), ip(V4.servers[0]), 30);
    ask.payload[6..8].fill(0);
    let out = up(&mut world, &ask).unwrap();
    assert_eq!(out.payload, ask.payload);
}

#[test]
fn two_peers_with_one_port_get_two() {
    for family in FAMILIES {
        let [first, second, _] = family.peers.map(ip);
        let [server, other] = family.servers.map(ip);
        let external = ip(family.external);
        let mut world = router(true);
        let port = |packet: &Ip| u16::from_be_bytes([packet.payload[0], packet.payload[1]]);
        let ask = |peer, server| Ip::udp(peer, server, 5);
        assert_eq!(port(&up(&mut world, &ask(first, server)).unwrap()), 40000);
        let changed = up(&mut world, &ask(second, server)).unwrap();
        let new = port(&changed);
        assert!((2000..=2015).contains(&new), "{new}");
        same(
            &changed,
            &ask(second, server)
                .from(external)
                .ports(new, 53)
                .forwarded(),
        );
        // Toward another server the port is free.
        assert_eq!(port(&up(&mut world, &ask(second, other)).unwrap()), 40000);
        let reply = |port| Ip::udp(server, external, 6).ports(53, port);
        for (at, peer) in [(40000, first), (new, second)] {
            let back = down(&mut world, &reply(at)).unwrap();
            same(&back, &reply(at).to(peer).ports(53, 40000).forwarded());
        }
    }
}

#[test]
fn a_port_of_a_socket_is_not_taken_nor_one_of_the_kernels() {
    let [peer, ..] = V4.peers.map(ip);
    let [server, _] = V4.servers.map(ip);
    let mut world = router(true);
    world.sockets.insert(Tuple {
        source: address(server),
        destination: address(ip(V4.external)),
        ports: [53_u16.to_be_bytes(), 40000_u16.to_be_bytes()],
        protocol: UDP,
    });
    for (own, wanted) in [
        (40000, 2000..=2015),
        (61_000, 2000..=2015),
        (1023, 2000..=2015),
    ] {
        let ask = Ip::udp(peer, server, 5).ports(own, 53);
        let out = up(&mut world, &ask).unwrap();
        let port = u16::from_be_bytes([out.payload[0], out.payload[1]]);
        assert!(wanted.contains(&port), "{own}: {port}");
    }
}

#[test]
fn exhaustion_is_a_drop_and_ends_with_the_flows() {
    let mut world = router(true);
    let [server, _] = V4.servers.map(ip);
    // None of these ports can be kept; three peers, for one alone would meet its limit.
    let ask = |n: u16| Ip::udp(ip(V4.peers[usize::from(n % 3)]), server, 5).ports(62_000 + n, 53);
    let opened: HashSet<u16> = (0..200)
        .filter(|n| up(&mut world, &ask(*n)).is_ok())
        .collect();
    // All sixteen, or all but those that the probes of every other missed.
    assert!((12..=16).contains(&opened.len()), "{}", opened.len());
    let refused = (0..200).find(|n| !opened.contains(n)).unwrap();
    assert_eq!(
        up(&mut world, &ask(refused)),
        Err(Verdict::DropNatExhausted)
    );
    assert_eq!(world.flows().len(), 2 * opened.len(), "half a flow is left");
    world.end(|_, _, _| true);
    assert!(up(&mut world, &ask(refused)).is_ok());
}

#[test]
fn the_subnet_side_opens_flows_where_nothing_is_translated() {
    for family in FAMILIES {
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        for snat in [false, true] {
            let mut world = router(snat);
            let ask = Ip::udp(server, peer, 5).ports(5000, 6000);
            same(&down(&mut world, &ask).unwrap(), &ask.clone().forwarded());
            let answer = Ip::udp(peer, server, 6).ports(6000, 5000);
            same(
                &up(&mut world, &answer).unwrap(),
                &answer.clone().forwarded(),
            );
        }
    }
}

#[test]
fn the_policy_is_asked_once_and_again_when_it_changes() {
    let mut world = router(true);
    let [peer, ..] = V4.peers.map(ip);
    let [server, _] = V4.servers.map(ip);
    world.settings.bank = 1;
    world.rules = Box::new(|tuple| (tuple.ports[1] == [0, 53]).then_some(4));
    let ask = Ip::udp(peer, server, 5);
    let denied = Ip::udp(peer, server, 5).ports(40000, 54);
    assert_eq!(up(&mut world, &denied), Err(Verdict::DropPolicy));
    assert!(up(&mut world, &ask).is_ok());
    let reply = Ip::udp(server, ip(V4.external), 6).ports(53, 40000);
    assert!(down(&mut world, &reply).is_ok(), "replies need no rule");

    world.rules = Box::new(|_| None);
    assert!(up(&mut world, &ask).is_ok(), "nothing was said of a change");
    world.settings.generation += 1;
    assert_eq!(up(&mut world, &ask), Err(Verdict::DropPolicy));
    assert_eq!(down(&mut world, &reply), Err(Verdict::DropPolicy));
    world.settings.bank = 0;
    world.settings.generation += 1;
    assert!(up(&mut world, &ask).is_ok());
    assert!(down(&mut world, &reply).is_ok());
}

#[test]
fn a_router_that_drains_carries_on_and_opens_nothing() {
    for (family, snat) in FAMILIES.into_iter().zip([true, false]) {
        let mut world = router(snat);
        let [peer, ..] = family.peers.map(ip);
        let [server, _] = family.servers.map(ip);
        let back = if snat { ip(family.external) } else { peer };
        let ask = Ip::udp(peer, server, 5);
        let reply = Ip::udp(server, back, 6).ports(53, 40000);
        assert!(up(&mut world, &ask).is_ok());
        world.settings.flags |= Settings::DRAINING;
        world.settings.generation += 1;
        assert!(up(&mut world, &ask).is_ok());
        assert!(down(&mut world, &reply).is_ok());
        let flows = world.flows().len();
        for new in [
            Ip::udp(peer, server, 5).ports(40001, 53),
            Ip::tcp(peer, server, SYN, &[], 0),
        ] {
            assert_eq!(up(&mut world, &new), Err(Verdict::DropDraining));
        }
        if !snat {
            let new = Ip::udp(server, peer, 5).ports(53, 6000);
            assert_eq!(down(&mut world, &new), Err(Verdict::DropDraining));
        }
        assert_eq!(world.flows().len(), flows);
        // What the kernel is to carry, it judges.
        world.routes.clear();
        let other = Ip::udp(peer, server, 5).ports(40002, 53);
        assert_eq!(up(&mut world, &other), Err(Verdict::SlowNotRouted));
    }
}

/// User space raises the generation behind a change: who has read it before may have judged by what was.
#[test]
fn what_is_judged_while_the_policy_changes_is_judged_again() {
    for established in [false, true] {
        let mut world = Box::new(router(true));
        let [peer, ..] = V4.peers.map(ip);
        let [server, _] = V4.servers.map(ip);
        let ask = Ip::udp(peer, server, 5);
        world.settings.bank = 1;
        world.rules = Box::new(|_| Some(0));
        if established {
            assert!(up(&mut world, &ask).is_ok());
            world.settings.generation += 1;
        }
        let generation = &raw mut world.settings.generation;
        let asked = std::cell::Cell::new(0);
        world.rules = Box::new(move |_| {
            asked.set(asked.get() + 1);
            if asked.get() > 1 {
                return None;
            }
            // SAFETY: the world stays in its box; written as the kernel writes a map under a program.
            unsafe { generation.write_volatile(generation.read_volatile() + 1) };
            Some(0)
        });
        if established {
            assert!(up(&mut world, &ask).is_ok(), "by the old policy");
        }
        assert_eq!(up(&mut world, &ask), Err(Verdict::DropPolicy));
    }
}

#[test]
fn the_answer_to_what_the_kernel_carried_needs_no_rule_either() {
    let mut world = router(false);
    let [peer, ..] = V4.peers.map(ip);
    let [server, _] = V4.servers.map(ip);
    world.settings.bank = 1;
    world.rules = Box::new(move |tuple| (tuple.source == address(peer)).then_some(0));
    world.routing = Box::new(|_, _| {
        let (link, mtu, hardware) = (NIC, u32::MAX, Bytes([0; 12]));
        Ok(Hop {
            gateway: [0; 4],
            link,
            mtu,
            resolved: false,
            hardware,
        })
    });
    let ask = Ip::udp(peer, server, 5);
    assert_eq!(up(&mut world, &ask), Err(Verdict::SlowNoNeighbour));
    let reply = Ip::udp(server, peer, 6).ports(53, 40000);
    assert!(down(&mut world, &reply).is_ok());
}

#[test]
fn the_next_hop_is_found_once_a_generation() {
    let mut world = router(true);
    let [peer, ..] = V4.peers.map(ip);
    let [server, _] = V4.servers.map(ip);
    let ask = Ip::udp(peer, server, 5);
    let run = |world: &mut World| {
        let mut memory = Memory::new(Side::Overlay, ask.bytes(), 0);
        world.run(Side::Overlay, &mut memory).1.unwrap()
    };
    assert_eq!(run(&mut world).hardware, [6; 12]);
    let moved = |to: Option<[u8; 12]>| -> crate::world::Routing {
        Box::new(move |_, _| {
            Ok(Hop {
                gateway: [0; 4],
                link: NIC,
                mtu: 1500,
                resolved: to.is_some(),
                hardware: Bytes(to.unwrap_or_default()),
            })
        })
    };
    world.routing = moved(Some([8; 12]));
    assert_eq!(run(&mut world).hardware, [6; 12]);
    world.settings.generation += 1;
    assert_eq!(run(&mut world).hardware, [8; 12]);
    // A neighbour that is not known: the kernel finds it, for this packet and the next ones.
    world.routing = moved(None);
    world.settings.generation += 1;
    for _ in 0..2 {
        let forward = run(&mut world);
        assert_eq!((forward.exit, forward.link), (Exit::Neighbour, NIC));
    }
    world.routing = moved(Some([9; 12]));
    let forward = run(&mut world);
    assert_eq!((forward.exit, forward.hardware), (Exit::Ethernet, [9; 12]));
}

#[test]
fn a_flow_whose_way_is_elsewhere_keeps_its_translation_or_waits() {
    for (snat, wanted) in [
        (true, Verdict::DropOtherLink),
        (false, Verdict::SlowOtherLink),
    ] {
        let mut world = router(snat);
        let ask = Ip::udp(ip(V4.peers[0]), ip(V4.servers[0]), 5);
        let before = up(&mut world, &ask).unwrap();
        world.routing = Box::new(|_, _| {
            Ok(Hop {
                gateway: [0; 4],
                link: NIC + 1,
                mtu: 1500,
                resolved: true,
                hardware: Bytes([8; 12]),
            })
        });
        world.settings.generation += 1;
        assert_eq!(up(&mut world, &ask), Err(wanted));
        // The programs come to the other NIC; the flow is known by its old address.
        let link = world.links[&NIC];
        world.links.insert(NIC + 1, link);
        same(&up(&mut world, &ask).unwrap(), &before);
    }
}

#[test]
fn tcp_is_followed_from_its_first_segment_to_its_last() {
    let [peer, ..] = V4.peers.map(ip);
    let [server, _] = V4.servers.map(ip);
    let external = ip(V4.external);
    let mut world = router(true);
    let seen = |world: &World, side: Side| {
        let flows = world.flows();
        let flow = flows.iter().find(|(found, ..)| *found == side);
        flow.unwrap().2.tcp
    };
    let out = |flags, sequence, acknowledged| {
        Ip::tcp(peer, server, flags, &[], 0).sequence(sequence, acknowledged)
    };
    let back = |flags, sequence, acknowledged| {
        Ip::tcp(server, external, flags, &[], 0)
            .ports(443, 40000)
            .sequence(sequence, acknowledged)
    };
    let middle = up(&mut world, &out(ACK, 100, 500));
    assert_eq!(middle, Err(Verdict::SlowNoFlow));
    up(&mut world, &out(SYN, 100, 0)).unwrap();
    down(&mut world, &back(SYN | ACK, 500, 101)).unwrap();
    assert_eq!(seen(&world, Side::Overlay), Flow::SYN);
    up(&mut world, &out(ACK, 101, 501)).unwrap();
    down(&mut world, &back(ACK, 501, 151)).unwrap();
    assert_eq!(seen(&world, Side::Overlay), Flow::SYN | Flow::ACK);
    assert_eq!(seen(&world, Side::Subnet), Flow::SYN | Flow::ACK);

    // An RST far from where the other end waits ends nothing; one in its place does.
    down(&mut world, &back(RST, 501 + (1 << 21), 0)).unwrap();
    assert_eq!(seen(&world, Side::Subnet), Flow::SYN | Flow::ACK);
    down(&mut world, &back(RST, 400, 0)).unwrap();
    assert_eq!(seen(&world, Side::Subnet), Flow::SYN | Flow::ACK);
    down(&mut world, &back(RST, 501, 0)).unwrap();
    assert_eq!(seen(&world, Side::Subnet) & Flow::RST, Flow::RST);
    // Which the other end may yet not have believed.
    down(&mut world, &back(ACK, 501, 151)).unwrap();
    assert_eq!(seen(&world, Side::Subnet), Flow::SYN | Flow::ACK);

    up(&mut world, &out(FIN | ACK, 151, 501)).unwrap();
    down(&mut world, &back(FIN | ACK, 501, 152)).unwrap();
    for side in Side::ALL {
        assert_eq!(seen(&world, side), Flow::SYN | Flow::ACK | Flow::FIN);
    }
    // The same ports again.
    up(&mut world, &out(SYN, 9000, 0)).unwrap();
    assert_eq!(seen(&world, Side::Overlay), Flow::SYN);
}

#[test]
fn the_time_of_use_is_written_no_more_than_it_must() {
    let mut world = router(true);
    let ask = Ip::udp(ip(V4.peers[0]), ip(V4.servers[0]), 5);
    let used = |world: &World| {
        let flows = world.flows();
        let flow = flows.iter().find(|(side, ..)| *side == Side::Overlay);
        flow.unwrap().2.last_used
    };
    for (now, wanted) in [
        (100, 100),
        (100 + Flow::COARSE, 100),
        (101 + Flow::COARSE, 101 + Flow::COARSE),
    ] {
        world.now = now;
        up(&mut world, &ask).unwrap();
        assert_eq!(used(&world), wanted);
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A packet of a peer, with this port or identifier, to a server.
    Up {
        protocol: u8,
        peer: usize,
        port: u16,
        server: usize,
    },
    /// A reply to what came out last but this many.
    Reply(usize),
    /// Time passes, and every flow of this peer ends.
    End(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let up = (0..3_u8, 0..3_usize, 0..6_u16, 0..2_usize).prop_map(|(kind, peer, port, server)| {
        Step::Up {
            protocol: [TCP, UDP, 1][usize::from(kind)],
            peer,
            port: [2000, 2001, 40000, 40001, 62000, 62001][usize::from(port)],
            server,
        }
    });
    prop_oneof![
        8 => up,
        4 => (0..20_usize).prop_map(Step::Reply),
        1 => (0..3_usize).prop_map(Step::End),
    ]
}

/// A flow by protocol, peer, port and server.
type Inner = (u8, usize, u16, usize);

/// What a NAT must hold to, without a word of how.
#[derive(Default)]
struct Model {
    /// Which flow has a port toward a server.
    outer: HashMap<(u8, u16, usize), Inner>,
    inner: HashMap<Inner, u16>,
    /// Packets that came out.
    out: Vec<(Inner, Ip)>,
}

fn crafted(protocol: u8, peer: IpAddr, port: u16, server: IpAddr) -> Ip {
    match protocol {
        TCP => Ip::tcp(peer, server, SYN, &[], 0).ports(port, 80),
        UDP => Ip::udp(peer, server, 9).ports(port, 80),
        _ => Ip::echo(peer, server).identifier(port),
    }
}

fn port_of(protocol: u8, ip: &Ip) -> u16 {
    let at = if matches!(protocol, TCP | UDP) { 0 } else { 4 };
    u16::from_be_bytes([ip.payload[at], ip.payload[at + 1]])
}

fn reply_to(protocol: u8, out: &Ip) -> Ip {
    match protocol {
        TCP => Ip::tcp(out.destination, out.source, SYN | ACK, &[], 0)
            .ports(80, port_of(protocol, out)),
        UDP => Ip::udp(out.destination, out.source, 7).ports(80, port_of(protocol, out)),
        _ => Ip {
            ttl: 64,
            ..out.echo_reply()
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_two_flows_share_a_tuple_and_every_reply_finds_its_flow(
        steps in proptest::collection::vec(step(), 1..150),
        v6: bool,
    ) {
        let family = if v6 { V6 } else { V4 };
        let (peers, servers) = (family.peers.map(ip), family.servers.map(ip));
        let external = ip(family.external);
        let mut world = router(true);
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Up { protocol, peer, port, server } => {
                    let key = (protocol, peer, port, server);
                    let sent = crafted(protocol, peers[peer], port, servers[server]);
                    let out = match up(&mut world, &sent) {
                        Ok(out) => out,
                        Err(verdict) => {
                            // All sixteen ports toward this server, or nearly, are others'.
                            prop_assert_eq!(verdict, Verdict::DropNatExhausted);
                            prop_assert!(!model.inner.contains_key(&key));
                            continue;
                        }
                    };
                    let got = port_of(protocol, &out);
                    let known = *model.inner.entry(key).or_insert(got);
                    prop_assert_eq!(known, got, "a flow keeps its port");
                    let owner = *model.outer.entry((protocol, got, server)).or_insert(key);
                    prop_assert_eq!(owner, key, "two flows share a tuple");
                    prop_assert!(got == port || (2000..=2015).contains(&got));
                    let mut wanted = sent.from(external).forwarded();
                    wanted = match protocol {
                        TCP | UDP => wanted.ports(got, 80),
                        _ => wanted.identifier(got),
                    };
                    same(&out, &wanted);
                    model.out.push((key, out));
                }
                Step::Reply(back) => {
                    let Some((key, out)) = model.out.iter().rev().nth(back) else {
                        continue;
                    };
                    let (protocol, peer, port, _) = *key;
                    let reply = reply_to(protocol, out);
                    let arrived = down(&mut world, &reply);
                    if model.inner.get(key) != Some(&port_of(protocol, out)) {
                        // The flow has ended. Another may have its place, and no other fate.
                        continue;
                    }
                    let mut wanted = reply.to(peers[peer]).forwarded();
                    wanted = match protocol {
                        TCP | UDP => wanted.ports(80, port),
                        _ => wanted.identifier(port),
                    };
                    same(&arrived.unwrap(), &wanted);
                }
                Step::End(peer) => {
                    let source = address(peers[peer]);
                    world.end(|side, tuple, _| side == Side::Overlay && tuple.source == source);
                    model.inner.retain(|(_, of, ..), _| *of != peer);
                    model.outer.retain(|_, (_, of, ..)| *of != peer);
                }
            }
            prop_assert_eq!(world.flows().len(), 2 * model.inner.len());
        }
    }
}
