//! Does the traffic arrive, intact, and by the path that was asked for?

use std::io::{Read, Write};
use std::net::SocketAddr;

use anyhow::Context;
use lab::site::{self, Arms, Client, ENDPOINT_V6, ROUTER, Running, SERVER, Site};
use lab::{http, wait_until};

use super::{HTTP, Path, SOON, carried_fast, echoes, handled, on_every_path, serve, warm_up};

on_every_path!(
    a_laptop_reaches_a_vpc_one_armed,
    a_laptop_reaches_a_vpc_two_armed,
    a_connection_survives_a_forgotten_next_hop,
);

const MIB: usize = 1 << 20;

fn a_laptop_reaches_a_vpc(arms: Arms, path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, arms, path.datapath(), path.snat())?;
        let status = run.sluice.status()?;
        assert_eq!(status["datapath"]["active"], path.datapath(), "{status:#}");
        let flows = run.sluice.flows();
        assert_eq!(flows.is_ok(), path.datapath() == "ebpf", "{flows:?}");
        assert_eq!(status["flows"].is_object(), flows.is_ok(), "{status:#}");
        let _servers = serve(&run.site.server)?;
        let laptop = &run.site.laptop;
        let arriving = run.site.server.capture("eth0")?;
        for (family, server) in SERVER.into_iter().enumerate() {
            let web = SocketAddr::new(server, HTTP);
            assert!(laptop.pings(&server.to_string(), &[])?, "ping {server}");
            assert_eq!(http::get(laptop, web, "/")?, http::GREETING.as_bytes());
            http::download(laptop, web, 3 * MIB)?;
            http::upload(laptop, web, 3 * MIB)?;
            echoes(laptop, server, 1000, SOON)?;
            let source = arriving.find(SOON, "a SYN", |p| p.syn_mss().map(|_| p.source))?;
            let expected = if path.snat() {
                run.site.router_inside()[family]
            } else {
                run.client.addresses[family]
            };
            assert_eq!(source, expected, "what the server sees");
            arriving.drain(|_| None::<()>);
        }
        assert!(run.tunnel.has_handshake(&run.config.key.public)?);
        let fast = carried_fast(&run.sluice)?;
        if path.datapath() == "ebpf" {
            assert!(fast.iter().all(|packets| *packets > 100), "{fast:?}");
            let slow = handled(&run.sluice, "from_overlay", |v| v.starts_with("slow"))?;
            assert!(slow < 10, "{slow} packets took the slow path");
        } else {
            assert_eq!(fast, [0, 0]);
        }
        Ok(())
    });
}

fn a_laptop_reaches_a_vpc_one_armed(path: Path) {
    a_laptop_reaches_a_vpc(Arms::One, path);
}

fn a_laptop_reaches_a_vpc_two_armed(path: Path) {
    a_laptop_reaches_a_vpc(Arms::Two, path);
}

#[test]
fn the_router_itself_answers() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", false)?;
        for router in ROUTER {
            assert!(run.site.laptop.pings(&router.to_string(), &[])?, "{router}");
        }
        Ok(())
    });
}

#[test]
fn a_stack_route_takes_the_slow_path() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        site.route_overlay()?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], "ebpf", false)?;
        for route in &mut config.routes {
            route.mode = "stack";
        }
        let sluice = site.router.sluice(&config)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let _servers = serve(&site.server)?;
        for server in SERVER {
            http::download(&site.laptop, SocketAddr::new(server, HTTP), MIB)?;
        }
        let [up, _] = carried_fast(&sluice)?;
        assert_eq!(up, 0);
        Ok(())
    });
}

#[test]
fn the_underlay_may_be_ipv6() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let client = Client::new("laptop", 2)?;
        let config = site::config(&[&client], "ebpf", true)?;
        let _sluice = site.router.sluice(&config)?;
        let tunnel = client.tunnel_to(&config.key, ENDPOINT_V6).mtu(1400);
        let _tunnel = site.laptop.wireguard_go(&tunnel)?;
        let _servers = serve(&site.server)?;
        for server in SERVER {
            http::download(&site.laptop, SocketAddr::new(server, HTTP), MIB)?;
        }
        Ok(())
    });
}

#[test]
fn a_lossy_underlay_loses_no_data() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", false)?;
        run.site.laptop.lose("eth0", 1.0)?;
        run.site.router.lose("wan", 1.0)?;
        let _servers = serve(&run.site.server)?;
        for server in SERVER {
            let web = SocketAddr::new(server, HTTP);
            http::download(&run.site.laptop, web, MIB)?;
            http::upload(&run.site.laptop, web, MIB)?;
        }
        Ok(())
    });
}

/// The packets of one connection then cross the router by both paths, unless they are translated.
fn a_connection_survives_a_forgotten_next_hop(path: Path) {
    for known in [false, true] {
        lab::test(|lab| {
            let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
            for server in SERVER {
                if known {
                    warm_up(&run.site.laptop, server)?;
                }
                let listener = run
                    .site
                    .server
                    .tcp_listener(SocketAddr::new(server, HTTP))?;
                let to = SocketAddr::new(server, HTTP);
                let mut near = run.site.laptop.tcp_connect(to, SOON)?;
                let (mut far, _) = listener.accept()?;
                far.set_read_timeout(Some(SOON))?;
                for round in 0..3 {
                    let mut byte = [0];
                    near.write_all(b"a")?;
                    far.read_exact(&mut byte).with_context(|| {
                        format!("{path:?} {server} known {known} round {round}: up")
                    })?;
                    far.write_all(b"b")?;
                    near.read_exact(&mut byte).with_context(|| {
                        format!("{path:?} {server} known {known} round {round}: down")
                    })?;
                    for nic in ["wan", "lan"] {
                        run.site.router.ip(&format!("neigh flush dev {nic}"))?;
                    }
                }
            }
            Ok(())
        });
    }
}

#[test]
fn the_programs_log_packets_if_asked_to() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], "ebpf", true)?;
        config.log = "info,packets=trace";
        let sluice = site.router.sluice(&config)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        for (server, own) in SERVER.into_iter().zip(client.addresses) {
            warm_up(&site.laptop, server)?;
            let (there, back) = (format!(" > {server} "), format!(" {server} "));
            for parts in [
                ["from_overlay forwarded ", &format!(" {own} "), &there],
                ["from_subnet forwarded ", &back, " > "],
            ] {
                wait_until(SOON, &format!("{parts:?} in the log"), || {
                    let log = sluice.log();
                    let mut lines = log.lines();
                    lines.any(|line| parts.iter().all(|part| line.contains(part)))
                })?;
            }
        }
        Ok(())
    });
}
