//! What restarts, and who notices.

use std::net::SocketAddr;

use anyhow::ensure;
use lab::site::SERVER;
use lab::{Flow, Stream, tailscaled, wait_until};

use super::{Routed, SOON, wait_reach};

const ECHO: u16 = 7777;

/// The coordination server goes and comes back: no packet is lost, and changes arrive again.
#[test]
fn the_control_server_restarts_unnoticed() {
    tailscaled::test(|lab| {
        let mut routed = Routed::new(lab)?;
        let _echo = routed.net.site.server.udp_echo(ECHO)?;
        routed.wait_reach()?;
        let stream = Stream::start(&routed.net.site.laptop, SocketAddr::new(SERVER[0], ECHO))?;
        routed.net = routed.net.restart_control()?;
        let control = &routed.net.control;
        wait_until(SOON, "both nodes to be back", || {
            ["laptop", "router"]
                .iter()
                .all(|name| control.node(name).is_ok_and(|node| node.online))
        })?;
        control.rename(control.node("laptop")?.id, "notebook");
        routed.status("a change", |status| {
            status["Peer"].to_string().contains("notebook.")
        })?;
        stream.wait(50)?;
        let counted = stream.end()?;
        ensure!(counted.lost == 0, "{counted:?}");
        let registered = control
            .requests()
            .iter()
            .filter(|(path, _)| path == "/machine/register")
            .count();
        // Those of the first time were told to the server that is gone.
        ensure!(registered <= 2, "{registered} registrations");
        Ok(())
    });
}

/// The router restarts: it is the same node without being let in again, and the client goes on by itself.
#[test]
fn the_router_restarts_as_the_same_node() {
    tailscaled::test(|lab| {
        let Routed {
            laptop,
            config,
            sluice,
            net,
        } = Routed::new(lab)?;
        let site = &net.site;
        let _echo = site.server.udp_echo(ECHO)?;
        for server in SERVER {
            wait_reach(&site.laptop, server)?;
        }
        let registrations = || {
            let requests = net.control.requests();
            let ours = |(path, body): &&(String, serde_json::Value)| {
                path == "/machine/register" && body["Hostinfo"]["Hostname"] == "router"
            };
            requests.iter().filter(ours).count()
        };
        let (before, node) = (registrations(), net.control.node("router")?);
        let mut flow = Flow::open(&site.laptop, &site.server, SERVER[0])?;
        flow.works()?;
        let stream = Stream::start(&site.laptop, SocketAddr::new(SERVER[0], ECHO))?;
        // As an update does it: the next daemon takes over what keeps flows alive.
        sluice.stop_by(libc::SIGUSR1)?;
        // Its key is of no use any more: it must not need it.
        let mut config = config;
        if let Some(joining) = &mut config.tailnet {
            joining.auth_key = None;
        }
        let _sluice = site.router.sluice_unsettled(&config)?;
        wait_reach(&site.laptop, SERVER[0])?;
        let counted = stream.end()?;
        flow.works()?;
        eprintln!("a restart of the router: {counted:?}");
        // Five seconds' worth.
        ensure!(counted.lost <= 500, "{counted:?}");
        ensure!(registrations() == before, "it was registered again");
        ensure!(net.control.node("router")?.key == node.key && net.control.nodes().len() == 2);
        drop(laptop);
        Ok(())
    });
}

/// A client restarts, with another disco key, and goes on.
#[test]
fn a_client_restarts() {
    tailscaled::test(|lab| {
        let mut routed = Routed::new(lab)?;
        routed.wait_reach()?;
        let old = routed.net.control.node("laptop")?.disco;
        routed.laptop.stop()?;
        routed.laptop.start()?;
        wait_until(SOON, "another disco key", || {
            routed
                .net
                .control
                .node("laptop")
                .is_ok_and(|node| node.disco != old)
        })?;
        routed.wait_reach()
    });
}
