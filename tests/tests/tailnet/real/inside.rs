//! What passes between the router and a real client inside the tunnel, and is no flow's.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::site::SERVER;
use lab::tailnet::rule_for_ports;
use lab::{poll, tailscaled, wait_until};
use serde_json::{Value, json};

use super::{Routed, SOON};

/// TSMP pings are answered in both directions, and echoes of the server's wish too.
#[test]
fn pings_between_nodes_are_answered() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        routed.wait_reach()?;
        let control = &routed.net.control;
        let router = control.node("router")?;
        for address in router.addresses() {
            let pong = routed.laptop.ping(&address, &["--tsmp"])?;
            ensure!(pong.contains("via TSMP"), "{pong}");
        }
        // And by hand.
        for (flag, kind) in [("--tsmp", "TSMP"), ("--icmp", "ICMP")] {
            let pong = routed.sluice.command(&["ping", flag, "laptop"])?;
            let via = format!("via {kind} in ");
            ensure!(
                pong.status.success() && pong.stdout.contains(&via),
                "{pong:?}"
            );
        }
        // The server has the router ping the laptop.
        for kind in ["TSMP", "ICMP"] {
            let url = control.ping(router.id, kind, None);
            let answer: Result<Value> = poll(SOON, &format!("the answer of a {kind} ping"), || {
                let answers = control.answers();
                let (_, body) = answers.iter().find(|(to, _)| url.ends_with(to.as_str()))?;
                serde_json::from_slice(body).ok()
            });
            let answer = answer?;
            ensure!(
                answer["Type"] == kind && answer["LatencySeconds"].is_f64(),
                "{answer}"
            );
        }
        Ok(())
    });
}

/// Who opens what no rule allows is told so.
#[test]
fn a_client_is_told_what_the_policy_refuses() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        let site = &routed.net.site;
        let _web = site.server.http_server(80)?;
        routed.wait_reach()?;
        let rule = rule_for_ports(&["*"], &["*"], 80, 80);
        routed.net.control.set_filter(json!([rule]));
        wait_until(SOON, "the client to be told", || {
            let short = Duration::from_millis(500);
            let _ = site.laptop.tcp_connect((SERVER[0], 22).into(), short);
            routed.laptop.log().contains("rejected due to acl")
        })
    });
}
