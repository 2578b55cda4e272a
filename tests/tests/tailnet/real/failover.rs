//! Two routers of one route.

use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use lab::site::{Arms, SERVER, VPC};
use lab::tailnet::Tailnet;
use lab::{Flow, Stream, http, poll, tailscaled, wait_until};
use serde_json::Value;

use super::{SOON, advertised, diagnosis, router, wait_reach};

const ECHO: u16 = 7777;
const HTTP: u16 = 80;

/// The route moves from one to the other and back under load.
#[test]
fn a_route_moves_between_routers() {
    tailscaled::test(|lab| {
        let net = Tailnet::new(lab, Arms::Two)?;
        let spare = net.second_router(lab)?;
        let (_, one) = router(&net, &net.site.router, |_| {})?;
        let (_, _two) = router(&net, &spare, |_| {})?;
        let laptop = net.join(&net.site.laptop, &[])?;
        laptop.wait_peer("spare", "that it is there", |peer| peer["Online"] == true)?;
        let _echo = net.site.server.udp_echo(ECHO)?;
        for server in SERVER {
            wait_reach(&net.site.laptop, server).with_context(|| diagnosis(&laptop, &one))?;
        }
        let ids = [
            net.control.node("spare")?.id,
            net.control.node("router")?.id,
        ];
        for (id, name) in ids.into_iter().zip(["spare", "router"]) {
            let stream = Stream::start(&net.site.laptop, SocketAddr::new(SERVER[0], ECHO))?;
            stream.wait(100)?;
            for route in VPC {
                net.control.set_primary(route, id);
            }
            laptop.wait_peer(name, "the route", |peer| {
                peer["PrimaryRoutes"].as_array().map(Vec::len) == Some(VPC.len())
            })?;
            wait_reach(&net.site.laptop, SERVER[0])?;
            stream.wait(100)?;
            let counted = stream.end()?;
            eprintln!("the route moves to {name}: {counted:?}");
            // A second's worth: what a first handshake takes on a slow machine.
            ensure!(counted.lost <= 100 && counted.sent >= 200, "{counted:?}");
        }
        Ok(())
    });
}

/// The router in charge drains: the other one has its routes and its flows, until it comes back.
#[test]
fn a_router_that_drains_leaves_its_routes_to_the_other() {
    tailscaled::test(|lab| {
        let net = Tailnet::new(lab, Arms::Two)?;
        let spare = net.second_router(lab)?;
        let (_, one) = router(&net, &net.site.router, |_| {})?;
        let (_, two) = router(&net, &spare, |_| {})?;
        let laptop = net.join(&net.site.laptop, &[])?;
        laptop.wait_peer("spare", "that it is there", |peer| peer["Online"] == true)?;
        let _servers = (
            net.site.server.udp_echo(ECHO)?,
            net.site.server.http_server(HTTP)?,
        );
        for server in SERVER {
            wait_reach(&net.site.laptop, server).with_context(|| diagnosis(&laptop, &one))?;
        }
        let in_charge = |name: &str| {
            laptop.wait_peer(name, "the routes", |peer| {
                peer["PrimaryRoutes"].as_array().map(Vec::len) == Some(VPC.len())
            })
        };
        in_charge("router")?;
        ensure!(one.status()?["life"]["phase"] == "serving");
        // It breaks when the route moves, and is not to be waited for.
        let mut left_behind = Flow::open(&net.site.laptop, &net.site.server, SERVER[0])?;
        left_behind.works()?;
        let stream = Stream::start(&net.site.laptop, SocketAddr::new(SERVER[0], ECHO))?;
        stream.wait(100)?;

        let drained = one.command(&["drain", "--no-wait"])?;
        ensure!(drained.status.success(), "{drained:?}");
        poll(SOON, "the routes to be withdrawn", || {
            let node = net.control.node("router").ok()?;
            node.hostinfo["RoutableIPs"].is_null().then_some(())
        })?;
        in_charge("spare")?;
        let forwarded = |sluice: &lab::sluice::Sluice| sluice.packets("from_overlay", "forwarded");
        let before = forwarded(&two)?;
        for server in SERVER {
            http::download(&net.site.laptop, SocketAddr::new(server, HTTP), 1 << 20)?;
        }
        ensure!(
            forwarded(&two)? > before,
            "it is not the other that carries"
        );
        // A flow without connection goes on by the other, which translates it anew.
        stream.wait(100)?;
        let counted = stream.end()?;
        eprintln!("while one router drained: {counted:?}");
        ensure!(counted.lost <= 100, "{counted:?}");
        wait_until(4 * SOON, "no flow to be left", || {
            let life = &one.status().unwrap_or_default()["life"];
            life["phase"] == "drained" && life["flows"] == 0
        })
        .with_context(|| one.log())?;
        let status = one.status()?;
        ensure!(
            status["tailnet"]["routes"] == Value::Array(Vec::new()),
            "{status}"
        );
        ensure!(status["problems"] == Value::Array(Vec::new()), "{status}");
        ensure!(http::get_local(one.socket(), "/readyz").is_err());

        let back = one.command(&["undrain"])?;
        ensure!(back.status.success(), "{back:?}");
        advertised(&net.control, "router")?;
        http::get_local(one.socket(), "/readyz")?;
        // It takes over again when the other one goes.
        let drained = two.command(&["drain", "--no-wait"])?;
        ensure!(drained.status.success(), "{drained:?}");
        in_charge("router")?;
        for server in SERVER {
            http::download(&net.site.laptop, SocketAddr::new(server, HTTP), 1 << 20)?;
        }
        Ok(())
    });
}
