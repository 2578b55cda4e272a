//! The rig without Sluice: real clients, a real relay, NATs, and our own coordination server get along. What fails
//! here is no fault of the router's.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use lab::site::Arms;
use lab::tailnet::{Nat, Tailnet};
use lab::tailscaled::{self, Tailscaled};
use lab::{Lab, http, wait_until};

use crate::tailnet::node::SOON;

/// Two real clients join our server, see each other, and reach each other directly.
#[test]
fn two_real_clients_reach_each_other() {
    tailscaled::test(|lab| {
        let net = Tailnet::new(lab, Arms::Two)?;
        let laptop = net.join(&net.site.laptop, &[])?;
        let phone = net.join(&net.site.phone, &[])?;
        laptop.wait_peer("phone", "its relay and endpoints", |peer| {
            peer["Relay"] == "r1" && peer["Online"] == true
        })?;
        let [v4, v6] = phone.addresses()?;
        let pong = laptop.ping(&v4.to_string(), &[])?;
        ensure!(is_direct(&pong), "{pong}");
        for address in [v4, v6] {
            ensure!(
                net.site.laptop.pings(&address.to_string(), &[])?,
                "{address}"
            );
        }
        Ok(())
    });
}

fn is_direct(pong: &str) -> bool {
    pong.lines()
        .any(|line| line.contains(" via ") && !line.contains("via DERP"))
}

/// Two real clients behind NATs, and what the first says of the way to the second.
fn between(lab: &Lab, one: Nat, other: Nat) -> Result<(Tailnet, [Tailscaled; 2], String)> {
    let net = Tailnet::new(lab, Arms::Two)?;
    let hotel = net.hidden(lab, "hotel", 1, one)?;
    let home = net.hidden(lab, "home", 2, other)?;
    let here = net.join(&hotel.host, &[])?;
    let there = net.join(&home.host, &[])?;
    here.wait_peer("home", "its relay", |peer| peer["Relay"] == "r1")?;
    let [v4, _] = there.addresses()?;
    let pong = here.cli(&["ping", "--c=5", "--timeout=5s", &v4.to_string()])?;
    // Something gets through in any case.
    let server = home.host.http_server(80)?;
    http::download(&hotel.host, SocketAddr::new(v4, 80), 1 << 20)?;
    drop(server);
    Ok((net, [here, there], pong.stdout))
}

#[test]
fn easy_nats_are_traversed() {
    tailscaled::test(|lab| {
        let (_net, _nodes, pong) = between(lab, Nat::Easy, Nat::Easy)?;
        ensure!(is_direct(&pong), "{pong}");
        Ok(())
    });
}

#[test]
fn hard_nats_leave_the_relay() {
    tailscaled::test(|lab| {
        let (_net, _nodes, pong) = between(lab, Nat::Hard, Nat::Hard)?;
        ensure!(pong.contains("via DERP(r1)") && !is_direct(&pong), "{pong}");
        Ok(())
    });
}

#[test]
fn blocked_udp_leaves_the_relay() {
    tailscaled::test(|lab| {
        let (mut net, [here, there], pong) = between(lab, Nat::NoUdp, Nat::Easy)?;
        ensure!(pong.contains("via DERP(r1)") && !is_direct(&pong), "{pong}");
        // It is the relay: without it nothing goes, and with it again everything does.
        net.relay()?.stop();
        let [v4, _] = there.addresses()?;
        let v4 = v4.to_string();
        let gone = here.cli(&["ping", "--c=1", "--timeout=2s", &v4])?;
        ensure!(!gone.status.success(), "{}", gone.stdout);
        net.relay()?.start()?;
        wait_until(SOON, "the relay to be used again", || {
            let pong = here.cli(&["ping", "--c=1", "--timeout=2s", &v4]);
            pong.is_ok_and(|pong| pong.stdout.contains("via DERP(r1)"))
        })
    });
}
