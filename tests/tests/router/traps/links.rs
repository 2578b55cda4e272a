//! Subnet-side interfaces of other kinds than Ethernet.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, ensure};
use lab::site::{self, Arms, Client, OVERLAY, SERVER, Site};
use lab::{http, poll};

use super::super::{HTTP, Path, SOON, on_every_path, serve, warm_up};
use crate::ebpf::arrival::{carry, tun};

on_every_path!(a_subnet_side_without_ethernet_is_reached);

/// A device without link-layer header, as tunnels and PPP have it.
const DEVICE: &str = "tun0";

fn a_subnet_side_without_ethernet_is_reached(path: Path) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let ours = ["10.31.0.1", "fd31::1"];
        let at_router = tun(
            &site.router,
            "10.31.0.1/32",
            "fd31::1/128",
            "10.20.0.0/24",
            "2001:db8:20::/64",
        )?;
        let at_server = tun(
            &site.server,
            "10.31.0.2/32",
            "fd31::2/128",
            "10.31.0.0/24",
            "fd31::/64",
        )?;
        for overlay in OVERLAY.into_iter().filter(|_| !path.snat()) {
            site.server
                .ip(&format!("route add {overlay} dev {DEVICE}"))?;
        }
        let client = Client::new("laptop", 2)?;
        let config = site::config(&[&client], path.datapath(), path.snat())?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| carry(&at_router, &at_server, &stop));
            scope.spawn(|| carry(&at_server, &at_router, &stop));
            let work = || {
                // The problem that it tells of does not go away.
                let sluice = match path.datapath() {
                    "ebpf" => site.router.sluice_unsettled(&config)?,
                    _ => site.router.sluice(&config)?,
                };
                let _tunnel = client.connect(&site.laptop, &config.key)?;
                let _servers = serve(&site.server)?;
                for (server, ours) in SERVER.into_iter().zip(ours) {
                    let what = format!("{path:?} {server}");
                    poll(SOON, &what, || warm_up(&site.laptop, server).ok())?;
                    let at_server = site.server.capture(DEVICE)?;
                    http::download(&site.laptop, SocketAddr::new(server, HTTP), 4 << 20)
                        .with_context(|| what.clone())?;
                    http::upload(&site.laptop, SocketAddr::new(server, HTTP), 4 << 20)
                        .with_context(|| what.clone())?;
                    let from = at_server.drain(|p| (p.destination == server).then_some(p.source));
                    let translated = from
                        .iter()
                        .all(|from| *from == ours.parse::<std::net::IpAddr>().unwrap());
                    ensure!(translated == path.snat(), "{what}: {from:?}");
                }
                let status = sluice.status()?;
                let routes = status["routes"].as_array().context("no routes")?;
                for route in routes {
                    ensure!(route["path"] == "slow", "{path:?}: {route}");
                }
                if path.datapath() == "ebpf" {
                    let log = sluice.log();
                    ensure!(log.matches("has no Ethernet header").count() == 1, "{log}");
                    let problems = status["problems"].to_string();
                    ensure!(problems.contains("mode = \\\"stack\\\""), "{problems}");
                    let reason = routes[0]["reason"].as_str().context("no reason")?;
                    ensure!(reason.contains(DEVICE), "{reason}");
                }
                Ok(())
            };
            let outcome = work();
            stop.store(true, Ordering::Relaxed);
            outcome
        })
    });
}
