//! A router joins, its routes are approved, and a real client uses them.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use lab::site::{Arms, SERVER, VPC};
use lab::tailnet::{KEY, Tailnet};
use lab::{Capture, packet, tailscaled};
use serde_json::json;

use super::{Routed, SOON, advertised, joining};
use crate::tailnet::real::{wait_lost, wait_reach};

/// The router is logged out and let in again, by commands: the client loses the way, and has it again.
#[test]
fn the_router_logs_out_and_in_again() {
    tailscaled::test(|lab| {
        let net = Tailnet::new(lab, Arms::Two)?;
        let state = lab.folder().join("state");
        let state = state.to_str().context("a path of text")?;
        let sluice = net
            .site
            .router
            .sluice_without_file(&["--state-dir", state], &[])?;
        let works = |words: &[&str]| -> Result<()> {
            let output = sluice.command(words)?;
            ensure!(output.status.success(), "{words:?}: {output:?}");
            Ok(())
        };
        let (server, key) = (net.control.url(), format!("--auth-key={KEY}"));
        let (server, routes) = (format!("--login-server={server}"), VPC.join(","));
        let routes = format!("--advertise-routes={routes}");
        works(&[
            "up",
            &server,
            &key,
            &routes,
            "--hostname=router",
            "--timeout=20s",
        ])?;
        let node = advertised(&net.control, "router")?;
        net.control.approve(node.id, &VPC);
        let laptop = net.join(&net.site.laptop, &[])?;
        for server in SERVER {
            wait_reach(&net.site.laptop, server)?;
        }
        works(&["logout"])?;
        for server in SERVER {
            wait_lost(&net.site.laptop, server)?;
        }
        works(&["up", &key, "--timeout=20s"])?;
        let again = advertised(&net.control, "router")?;
        ensure!(
            again.key != node.key,
            "the key that was given up is used again"
        );
        net.control.approve(again.id, &VPC);
        for server in SERVER {
            wait_reach(&net.site.laptop, server).with_context(|| sluice.log())?;
        }
        drop(laptop);
        sluice.stop()
    });
}

/// Pages, downloads and uploads of both families, from a real client to a server in the VPC.
#[test]
fn a_real_client_reaches_the_vpc() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        let site = &routed.net.site;
        let _web = site.server.http_server(80)?;
        routed.wait_reach()?;
        for server in SERVER {
            let at = SocketAddr::new(server, 80);
            lab::http::download(&site.laptop, at, 4 << 20)?;
            lab::http::upload(&site.laptop, at, 4 << 20)?;
        }
        // The router's own name and addresses, as the client has them.
        let peer = routed.laptop.peer("router")?.unwrap_or_default();
        ensure!(
            peer["HostName"] == "router" && peer["Online"] == true,
            "{peer}"
        );
        let routes = peer["PrimaryRoutes"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        ensure!(
            VPC.iter().all(|cidr| routes.contains(&json!(cidr))),
            "{peer}"
        );
        ensure!(
            peer["CurAddr"].as_str().is_some_and(|at| !at.is_empty()),
            "not direct: {peer}"
        );
        routed.status("the laptop among its peers", |status| {
            status["BackendState"] == "Running"
                && status["Peer"].as_object().is_some_and(|peers| {
                    peers
                        .values()
                        .any(|peer| peer["HostName"] == "laptop" && peer["CurAddr"] != "")
                })
        })
    });
}

/// Reads the MSS of a packet.
type Mss = for<'a, 'p> fn(&'a packet::Packet<'p>) -> Option<u16>;

/// The tunnel's MTU is the tailnet's, and segments fit it even where a client's device has a larger one.
#[test]
fn segments_fit_the_tailnets_mtu() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        let site = &routed.net.site;
        let _web = site.server.http_server(80)?;
        routed.wait_reach()?;
        site.laptop.ip("link set tailscale0 mtu 1500")?;
        for server in SERVER {
            let headers = if server.is_ipv4() { 40 } else { 60 };
            let at_server = site.server.capture("eth0")?;
            let at_laptop = site.laptop.capture("tailscale0")?;
            lab::http::get(&site.laptop, SocketAddr::new(server, 80), "/")?;
            let mss = |capture: &Capture, what, of: Mss| {
                capture.find(SOON, what, |p| {
                    let ours = p.source == server || p.destination == server;
                    ours.then(|| of(p)).flatten()
                })
            };
            let seen = mss(&at_server, "a SYN", |p| p.syn_mss())?;
            let came = mss(&at_laptop, "a SYN-ACK", |p| p.syn_ack_mss())?;
            ensure!(
                (seen, came) == (1280 - headers, 1280 - headers),
                "{seen} {came}"
            );
        }
        Ok(())
    });
}

/// Nothing goes through before the routes are approved, the status says what to do, and then it goes.
#[test]
fn approval_opens_the_way() {
    tailscaled::test(|lab| {
        let net = lab::tailnet::Tailnet::new(lab, lab::site::Arms::Two)?;
        let config = joining(&net.control.url(), "router", |_| {})?;
        let sluice = net.site.router.sluice_unsettled(&config)?;
        let node = advertised(&net.control, "router")?;
        let laptop = net.join(&net.site.laptop, &[])?;
        laptop.wait_peer("router", "that it is there", |peer| peer["Online"] == true)?;
        ensure!(!net.site.laptop.pings(&SERVER[0].to_string(), &[])?);
        let status = sluice.status()?.to_string();
        ensure!(status.contains("approve"), "{status}");
        net.control.approve(node.id, &VPC);
        wait_reach(&net.site.laptop, SERVER[0])?;
        // Half of it is taken back.
        net.control.approve(node.id, &VPC[1..]);
        super::wait_lost(&net.site.laptop, SERVER[0])?;
        wait_reach(&net.site.laptop, SERVER[1])
    });
}

/// Tags that it asks for are its own.
#[test]
fn tags_are_asked_for() {
    tailscaled::test(|lab| {
        let routed = Routed::with(lab, |config| {
            if let Some(joining) = &mut config.tailnet {
                joining
                    .more
                    .push(("advertise_tags", r#"["tag:router"]"#.to_owned()));
            }
        })?;
        routed.laptop.wait_peer("router", "its tag", |peer| {
            peer["Tags"] == json!(["tag:router"])
        })?;
        routed.wait_reach()
    });
}

/// An ephemeral router is gone from the tailnet when it is stopped.
#[test]
fn an_ephemeral_router_leaves_nothing() {
    tailscaled::test(|lab| {
        let Routed {
            laptop,
            sluice,
            net,
            config: _,
        } = Routed::with(lab, |config| {
            if let Some(joining) = &mut config.tailnet {
                joining.ephemeral = true;
            }
        })?;
        wait_reach(&net.site.laptop, SERVER[0])?;
        sluice.stop()?;
        let left: Result<_> = net.control.node("router");
        ensure!(left.is_err(), "{left:?}");
        laptop.wait("the router to be gone", |status| {
            status["Peer"]
                .as_object()
                .is_none_or(serde_json::Map::is_empty)
        })?;
        Ok(())
    });
}

/// An address of 4via6 leads to the IPv4 address that it names.
#[test]
fn four_via_six_reaches_ipv4() {
    tailscaled::test(|lab| {
        const SITE: &str = "fd7a:115c:a1e0:b1a:0:7:a14:0/112";
        let via = "fd7a:115c:a1e0:b1a:0:7:a14:14".parse()?;
        let routed = Routed::with(lab, |config| {
            config.routes.push(lab::sluice::Route {
                cidr: SITE.to_owned(),
                snat: true,
                mode: "fast",
            });
        })?;
        let site = &routed.net.site;
        let node = routed.net.control.node("router")?;
        routed.net.control.approve(node.id, &[VPC[0], VPC[1], SITE]);
        let _web = site.server.http_server(80)?;
        wait_reach(&site.laptop, via)?;
        let at = SocketAddr::new(via, 80);
        lab::http::download(&site.laptop, at, 1 << 20)?;
        lab::http::upload(&site.laptop, at, 1 << 20)
    });
}
