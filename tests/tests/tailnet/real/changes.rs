//! What an administrator changes while flows are open: who may do what, names, keys.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use lab::site::SERVER;
use lab::tailnet::{KEY, rule, rule_for_ports};
use lab::{tailscaled, wait_until};
use serde_json::json;

use super::{Routed, SOON, wait_lost, wait_reach};

/// A rule that goes cuts a live flow, and one that comes back has it go on.
#[test]
fn an_acl_change_cuts_a_live_flow_and_opens_new_ones() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        routed.wait_reach()?;
        for server in SERVER {
            let mut flow = routed.flow(server)?;
            flow.works()?;
            // Not by port: a rule for some ports of a host lets its pings through, as in tailscaled.
            let elsewhere = ["10.20.99.0/24", "2001:db8:20:99::/64"];
            routed
                .net
                .control
                .set_filter(json!([rule(&["*"], &elsewhere)]));
            wait_lost(&routed.net.site.laptop, server)?;
            flow.hangs()?;
            routed.net.control.set_filter(json!([rule(&["*"], &["*"])]));
            // A translated connection that was cut is over: its port may be another's by now.
            routed.wait_reach()?;
            routed.flow(server)?.works()?;
        }
        Ok(())
    });
}

/// A rule for one port of a host closes the others, not pings.
#[test]
fn ports_are_told_apart() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        let site = &routed.net.site;
        let _web = site.server.http_server(80)?;
        let _other = site.server.http_server(8080)?;
        routed.wait_reach()?;
        let rules = json!([rule_for_ports(&["*"], &["10.20.0.20"], 80, 80)]);
        routed.net.control.set_filter(rules);
        let connects = |port| {
            let at = SocketAddr::new(SERVER[0], port);
            site.laptop.tcp_connect(at, Duration::from_secs(2)).is_ok()
        };
        wait_until(SOON, "the filter", || !connects(8080))?;
        ensure!(connects(80));
        wait_reach(&site.laptop, SERVER[0])?;
        wait_lost(&site.laptop, SERVER[1])
    });
}

/// A rule names who may: another client is not meant.
#[test]
fn a_filter_tells_clients_apart() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        let site = &routed.net.site;
        let phone = routed.net.join(&site.phone, &[])?;
        phone.wait_peer("router", "its routes", |peer| {
            peer["PrimaryRoutes"].is_array()
        })?;
        routed.wait_reach()?;
        wait_reach(&site.phone, SERVER[0])?;
        let [v4, v6] = routed
            .laptop
            .addresses()?
            .map(|address| address.to_string());
        let rules = json!([rule(&[&v4, &v6], &["10.20.0.0/16", "2001:db8:20::/56"])]);
        routed.net.control.set_filter(rules);
        wait_lost(&site.phone, SERVER[0])?;
        wait_lost(&site.phone, SERVER[1])?;
        routed.wait_reach()
    });
}

/// New names of both ends are known, and nothing else changes.
#[test]
fn a_rename_leaves_flows_alone() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        routed.wait_reach()?;
        let mut flow = routed.flow(SERVER[0])?;
        flow.works()?;
        let control = &routed.net.control;
        control.rename(control.node("laptop")?.id, "notebook");
        control.rename(control.node("router")?.id, "gate");
        routed.laptop.wait_peer("gate", "its new name", |_| true)?;
        routed.status("the new names", |status| {
            let peers = status["Peer"].as_object();
            peers.is_some_and(|peers| {
                let mut names = peers
                    .values()
                    .map(|peer| peer["DNSName"].as_str().unwrap_or_default());
                names.any(|name| name.starts_with("notebook."))
            }) && status["Self"]["DNSName"]
                .as_str()
                .is_some_and(|name| name.starts_with("gate."))
        })?;
        flow.works()
    });
}

/// The router's key ends: it gets a new one by its auth key, and clients go on.
#[test]
fn the_routers_key_is_renewed() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        routed.wait_reach()?;
        let mut flow = routed.flow(SERVER[0])?;
        flow.works()?;
        let control = &routed.net.control;
        let old = control.node("router")?;
        control.expire(old.id);
        wait_until(SOON, "another key", || {
            control
                .node("router")
                .is_ok_and(|node| node.key != old.key && !node.expired)
        })?;
        ensure!(control.node("router")?.id == old.id, "another node");
        routed.laptop.wait_peer("router", "its new key", |peer| {
            peer["PublicKey"].as_str().is_some_and(|key| key != old.key)
        })?;
        flow.works()?;
        routed.wait_reach()
    });
}

/// A client's key ends: it is cut off, and in again with a new one.
#[test]
fn an_expired_client_is_cut_off() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        routed.wait_reach()?;
        let control = &routed.net.control;
        let old = control.node("laptop")?;
        control.expire(old.id);
        wait_lost(&routed.net.site.laptop, SERVER[0])?;
        routed.status("that the client has expired", |status| {
            let peers = status["Peer"].as_object();
            peers.is_some_and(|peers| peers.values().any(|peer| peer["Expired"] == true))
        })?;
        routed.laptop.up(&control.url(), KEY, &["--force-reauth"])?;
        wait_until(SOON, "another key", || {
            control
                .node("laptop")
                .is_ok_and(|node| node.key != old.key && !node.expired)
        })?;
        routed.wait_reach()
    });
}

/// A client that is removed has no way in any more.
#[test]
fn a_removed_client_is_gone() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        routed.wait_reach()?;
        let control = &routed.net.control;
        control.remove(control.node("laptop")?.id);
        wait_lost(&routed.net.site.laptop, SERVER[0])?;
        routed.status("that the client is gone", |status| {
            status["Peer"]
                .as_object()
                .is_some_and(serde_json::Map::is_empty)
        })
    });
}
