//! ICMP errors about packets of a flow, from whoever sends them, must reach who has sent the packet,
//! and quote it as that one knows it.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, ensure};
use lab::packet::{Packet, UDP};
use lab::site::{Arms, CORE, Client, ROUTER, Running, SERVER, Site, config};
use lab::socket::set_option;
use lab::{Capture, wait_until};
use router_ebpf::craft::{Ip, sum};

use super::super::{Path, SOON, handled, on_every_path, warm_up};
use super::{BRIEFLY, PORT, receive, udp_flow, udp_to};

on_every_path!(
    probes_of_every_ttl_are_answered_hop_by_hop,
    an_end_that_is_gone_is_reported_to_the_server,
    an_error_about_anothers_flow_is_not_believed,
);

/// What is the same of a packet wherever it is quoted without translation: addresses, protocol, and
/// the first eight bytes behind the IP header, with ports or identifier, and the checksum of UDP and
/// ICMP.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    start: [u8; 8],
}

impl Head {
    fn of(packet: &Packet<'_>) -> Option<Self> {
        Some(Self {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol,
            start: *packet.payload.first_chunk()?,
        })
    }
}

/// Finds a probe that has left, then the error about it. Yields who has sent it.
fn reporter(
    capture: &Capture,
    probe: impl Fn(&Packet<'_>) -> bool,
) -> anyhow::Result<(IpAddr, (u8, u8))> {
    let sent = capture.find(SOON, "a probe", |p| probe(p).then(|| Head::of(p))?)?;
    let find = |p: &Packet<'_>| {
        let quoted = p.quoted()?;
        let header = p.payload.get(8..28)?;
        Some((
            p.source,
            p.icmp()?,
            Head::of(&quoted)?,
            p.source.is_ipv6() || sum(header) == u16::MAX,
        ))
    };
    let (from, kind, quoted, header_is_right) = capture.find(SOON, "an error", find)?;
    ensure!(quoted == sent, "it quotes {quoted:?} instead of {sent:?}");
    ensure!(header_is_right, "the quoted header's checksum is wrong");
    Ok((from, kind))
}

/// As traceroute does it, with UDP to a closed port and with echo requests.
fn probes_of_every_ttl_are_answered_hop_by_hop(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let laptop = &run.site.laptop;
        for ((server, router), core) in SERVER.into_iter().zip(ROUTER).zip(CORE) {
            warm_up(laptop, server)?;
            let (exceeded, unreachable) = match server {
                IpAddr::V4(_) => ((11, 0), (3, 3)),
                IpAddr::V6(_) => ((3, 0), (1, 4)),
            };
            for (ttl, from, kind) in [
                (1, router, exceeded),
                (2, core, exceeded),
                (3, server, unreachable),
            ] {
                let at_laptop = laptop.capture(run.tunnel.device())?;
                let error = udp_probe(&run, server, ttl)?;
                let to_port = |p: &Packet<'_>| {
                    p.protocol == UDP && p.destination == server && p.ports().is_some()
                };
                let seen = reporter(&at_laptop, to_port)
                    .with_context(|| format!("{path:?} {server}: UDP with TTL {ttl}"))?;
                assert_eq!(seen, (from, kind), "{path:?} {server} UDP TTL {ttl}");
                // The laptop's kernel has found the socket.
                let expected = if kind == exceeded {
                    ErrorKind::HostUnreachable
                } else {
                    ErrorKind::ConnectionRefused
                };
                assert_eq!(error.kind(), expected, "{path:?} {server} {ttl}: {error}");
            }
            for (ttl, from) in [(1, router), (2, core)] {
                let at_laptop = laptop.capture(run.tunnel.device())?;
                let argv = format!("ping -n -q -c1 -W1 -t{ttl} {server}");
                let ping = laptop.command(argv.split(' ')).output()?;
                assert!(ping.stdout.contains("+1 errors"), "{}", ping.stdout);
                let request = |p: &Packet<'_>| matches!(p.icmp(), Some((8 | 128, 0)));
                let seen = reporter(&at_laptop, request)
                    .with_context(|| format!("{path:?} {server}: echo with TTL {ttl}"))?;
                assert_eq!(seen, (from, exceeded), "{path:?} {server} echo TTL {ttl}");
            }
        }
        Ok(())
    });
}

/// Sends a datagram and yields the error that its socket gets.
fn udp_probe(run: &Running, server: IpAddr, ttl: libc::c_int) -> anyhow::Result<io::Error> {
    let socket = udp_to(&run.site.laptop, SocketAddr::new(server, 33_434))?;
    let (level, receive_errors, hops) = match server {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_RECVERR, libc::IP_TTL),
        IpAddr::V6(_) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_RECVERR,
            libc::IPV6_UNICAST_HOPS,
        ),
    };
    set_option(&socket, level, receive_errors, 1)?;
    set_option(&socket, level, hops, ttl)?;
    socket.send(&[7; 32])?;
    match socket.recv(&mut [0; 64]) {
        Err(error) => Ok(error),
        Ok(len) => anyhow::bail!("{len} bytes from a closed port"),
    }
}

/// The laptop's socket is closed when the reply comes: its kernel says so, to the server.
fn an_end_that_is_gone_is_reported_to_the_server(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        for server in SERVER {
            warm_up(&run.site.laptop, server)?;
            let (near, far, from) = udp_flow(&run.site, server)?;
            run.site.server.enter(|| far.connect(from))??;
            drop(near);
            far.set_read_timeout(Some(BRIEFLY))?;
            // Any datagram may be lost on its way, but not by the programs.
            wait_until(SOON, "the refusal to reach the server", || {
                let told = far
                    .send(b"anybody there?")
                    .and_then(|_| far.recv(&mut [0; 64]));
                told.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
            })
            .with_context(|| format!("{path:?} {server}"))?;
        }
        for program in ["from_overlay", "from_subnet"] {
            let dropped = handled(&run.sluice, program, |v| v.starts_with("drop_"))?;
            assert_eq!(dropped, 0, "{path:?} {program}");
        }
        Ok(())
    });
}

/// Whoever knows of another peer's flow tells the server that it is over, or that packets are too big.
fn an_error_about_anothers_flow_is_not_believed(path: Path) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        if !path.snat() {
            site.route_overlay()?;
        }
        let clients = [Client::new("laptop", 2)?, Client::new("phone", 3)?];
        let config = config(&clients.each_ref(), path.datapath(), path.snat())?;
        let sluice = site.router.sluice(&config)?;
        let hosts = [&site.laptop, &site.phone];
        let _tunnels = [
            clients[0].connect(hosts[0], &config.key)?,
            clients[1].connect(hosts[1], &config.key)?,
        ];
        let spoofed = || -> anyhow::Result<u64> {
            let programs = ["from_overlay", "kernel_from_overlay"];
            let counts = programs.map(|program| handled(&sluice, program, |v| v == "drop_spoofed"));
            counts.into_iter().sum()
        };
        for (n, server) in SERVER.into_iter().enumerate() {
            for host in hosts {
                warm_up(host, server)?;
            }
            let (near, _far, _) = udp_flow(&site, server)?;
            let [laptop, phone] = clients.each_ref().map(|client| client.addresses[n]);
            let reply = Ip::udp(server, laptop, 30).ports(PORT, near.local_addr()?.port());
            let kind = if server.is_ipv4() { [3, 3] } else { [1, 4] };
            let error = |from| Ip::error(from, server, kind, 0, &reply.bytes()).bytes();
            let at_server = site.server.capture("eth0")?;
            let is_error = |p: &Packet<'_>| p.icmp().filter(|found| *found == kind.into());
            let before = spoofed()?;
            hosts[1].send_ip(&error(phone))?;
            let mut believed = Vec::new();
            wait_until(SOON, "the forged error to be counted", || {
                believed.extend(at_server.drain(is_error));
                !believed.is_empty() || spoofed().is_ok_and(|now| now > before)
            })
            .with_context(|| format!("{path:?} {server}"))?;
            assert_eq!(believed, [], "{path:?} {server}: it is believed");
            // The laptop itself is believed, and nothing came before.
            hosts[0].send_ip(&error(laptop))?;
            at_server.find(SOON, "the laptop's error", is_error)?;
            assert_eq!(at_server.drain(is_error), [], "{path:?} {server}");
        }
        Ok(())
    });
}

/// Another peer's translated port is no way in to that peer.
#[test]
fn a_translated_port_is_no_way_to_its_peer() {
    lab::test(|lab| {
        let mut run = Running::new(lab, Arms::One, "ebpf", true)?;
        let phone = Client::new("phone", 3)?;
        run.config.peers.push(phone.peer());
        run.sluice.reload(&run.config)?;
        let _tunnel = phone.connect(&run.site.phone, &run.config.key)?;
        let (laptop, phone) = (&run.site.laptop, &run.site.phone);
        for server in SERVER {
            wait_until(SOON, "the phone's tunnel", || {
                phone.pings(&server.to_string(), &[]).unwrap_or(false)
            })?;
            let (near, far, external) = udp_flow(&run.site, server)?;
            assert!(run.site.router_inside().contains(&external.ip()));

            let at_laptop = laptop.capture(run.tunnel.device())?;
            let at_server = run.site.server.capture("eth0")?;
            let before = handled(&run.sluice, "from_overlay", |v| v == "slow_to_router")?;
            udp_to(phone, external)?.send(b"let me in")?;
            wait_until(SOON, "the refusal to be counted", || {
                let now = handled(&run.sluice, "from_overlay", |v| v == "slow_to_router");
                now.is_ok_and(|now| now > before)
            })?;
            near.set_read_timeout(Some(BRIEFLY))?;
            assert!(near.recv(&mut [0; 64]).is_err(), "the laptop got it");
            let leaked = |p: &Packet<'_>| p.payload.ends_with(b"let me in").then_some(p.source);
            assert!(at_laptop.drain(leaked).is_empty(), "{server}");
            assert!(at_server.drain(leaked).is_empty(), "{server}");
            // And the flow lives.
            far.send_to(b"welcome", external)?;
            near.set_read_timeout(Some(SOON))?;
            assert_eq!(
                receive(&near)?,
                (b"welcome".to_vec(), SocketAddr::new(server, PORT))
            );
        }
        Ok(())
    });
}
