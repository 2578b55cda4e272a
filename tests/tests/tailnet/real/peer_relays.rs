//! Peer relays between a router and a client that cannot meet.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use lab::site::{ENDPOINT_V6, SERVER};
use lab::sluice::Sluice;
use lab::tailnet::{Nat, Tailnet, rule};
use lab::tailscaled::{self, Tailscaled};
use lab::{Flow, Host, wait_until};
use serde_json::{Value, json};

use super::paths::Apart;
use super::{Routed, diagnosis};
use crate::tailnet::node::SOON;

const PORT: u16 = 7777;

/// Real tailscaled as a peer relay.
struct Relay {
    node: Tailscaled,
    name: String,
}

impl Relay {
    fn start(net: &Tailnet, host: &Host) -> Result<Self> {
        let node = net.join(host, &[])?;
        node.run(&["set", &format!("--relay-server-port={PORT}")])?;
        let name = host.name().to_owned();
        Ok(Self { node, name })
    }
}

/// Everybody may reach everything, ask the relays for places, and be reached by them.
fn grant(net: &Tailnet, relays: &[Relay]) -> Result<()> {
    let nodes = ["100.64.0.0/10", "fd7a:115c:a1e0::/48"];
    let mut rules = vec![rule(&["*"], &["*"])];
    for relay in relays {
        let own = relay.node.addresses()?;
        let to = own.map(|address| match address {
            IpAddr::V4(_) => format!("{address}/32"),
            IpAddr::V6(_) => format!("{address}/128"),
        });
        let own = own.map(|address| address.to_string());
        rules.push(json!({
            "SrcIPs": ["*"], "CapGrant": [{"Dsts": to, "CapMap": {"tailscale.com/cap/relay": []}}],
        }));
        rules.push(json!({
            "SrcIPs": own, "CapGrant": [{"Dsts": nodes, "CapMap": {"tailscale.com/cap/relay-target": []}}],
        }));
    }
    net.control.set_filter(Value::Array(rules));
    Ok(())
}

/// Both ends of what is relayed.
struct Ends<'a> {
    host: &'a Host,
    client: &'a Tailscaled,
    sluice: &'a Sluice,
}

impl Ends<'_> {
    /// The peer relay that an end sends by, if by one, as both call it.
    fn relays(&self) -> [Option<String>; 2] {
        let theirs = self.client.peer("router").ok().flatten();
        let theirs = theirs.and_then(|peer| peer["PeerRelay"].as_str().map(str::to_owned));
        let status = self.sluice.status().unwrap_or_default();
        let peers = status["tailnet"]["peers"].as_array().cloned();
        let ours = peers.unwrap_or_default().into_iter().find_map(|peer| {
            let way = peer["way"].as_str()?.strip_prefix("peer relay ")?;
            Some(way.to_owned())
        });
        [theirs.filter(|at| !at.is_empty()), ours]
    }

    /// Both ends go by a peer relay that is as wanted, or by none; yields it.
    fn wait_relay(&self, what: &str, wanted: impl Fn(Option<&str>) -> bool) -> Result<String> {
        let mut last = [None, None];
        wait_until(SOON * 2, what, || {
            let _ = self.host.pings(&SERVER[0].to_string(), &[]);
            last = self.relays();
            last.iter().all(|at| wanted(at.as_deref()))
        })
        .with_context(|| format!("{last:?}; {}", diagnosis(self.client, self.sluice)))?;
        let [_, ours] = last;
        Ok(ours.unwrap_or_default())
    }
}

impl Apart {
    fn ends(&self) -> Ends<'_> {
        Ends {
            host: &self.hotel.host,
            client: &self.client,
            sluice: &self.sluice,
        }
    }
}

/// How much has gone out by peer relays of this family.
fn sent(sluice: &Sluice, what: &str, family: &str) -> Result<u64> {
    let name = format!("tailscaled_outbound_{what}_total{{path=\"peer_relay_{family}\"}} ");
    let metrics = sluice.metrics()?;
    let mut counts = metrics.lines().filter_map(|line| line.strip_prefix(&name));
    Ok(counts.next().context("no such metric")?.parse()?)
}

/// Hard against hard meets at the peer relay, in the middle of a flow; without it the flow goes on by the relay.
#[test]
fn hard_against_hard_meets_at_a_peer_relay() {
    tailscaled::test(|lab| {
        let apart = Apart::new(lab, Nat::Hard, Some(Nat::Hard))?;
        let site = &apart.net.site;
        let mut relays = [Relay::start(&apart.net, &site.phone)?];
        grant(&apart.net, &relays)?;
        apart.wait_reach()?;
        let mut flow = Flow::open(&apart.hotel.host, &site.server, SERVER[0])?;
        apart
            .ends()
            .wait_relay("the peer relay", |at| at.is_some())?;
        flow.works()?;
        apart.transfers()?;
        for (what, least) in [("bytes", 4 << 20), ("packets", 1000)] {
            let count = sent(&apart.sluice, what, "ipv4")?;
            ensure!(count > least, "{count} {what}");
        }
        relays[0].node.stop()?;
        apart.ends().wait_relay("the relay", |at| at.is_none())?;
        flow.works()?;
        apart.transfers()
    });
}

/// Two peer relays: the one in use goes, and the flow moves to the other, and back when that one goes too.
#[test]
fn one_peer_relay_stands_in_for_another() {
    tailscaled::test(|lab| {
        let apart = Apart::new(lab, Nat::Hard, Some(Nat::Hard))?;
        let site = &apart.net.site;
        let mut relays = [
            Relay::start(&apart.net, &site.phone)?,
            Relay::start(&apart.net, &site.laptop)?,
        ];
        grant(&apart.net, &relays)?;
        apart.wait_reach()?;
        let mut flow = Flow::open(&apart.hotel.host, &site.server, SERVER[0])?;
        let place = |at: &str| at.split(":vni").next().unwrap_or_default().to_owned();
        let address = |relay: &Relay| match relay.name.as_str() {
            "phone" => format!("192.0.2.10:{PORT}"),
            _ => format!("203.0.113.10:{PORT}"),
        };
        let mut used = place(&apart.ends().wait_relay("a peer relay", |at| at.is_some())?);
        for _ in 0..2 {
            flow.works()?;
            apart.transfers()?;
            let (mut gone, mut stays) = (None, None);
            for relay in &mut relays {
                match address(relay) == used {
                    true => gone = Some(relay),
                    false => stays = Some(relay),
                }
            }
            let (gone, stays) = gone
                .zip(stays)
                .with_context(|| format!("no relay is at {used}"))?;
            gone.node.stop()?;
            let other = address(stays);
            apart.ends().wait_relay("the other peer relay", |at| {
                at.is_some_and(|at| place(at) == other)
            })?;
            gone.node.start()?;
            used = other;
        }
        flow.works()?;
        apart.transfers()
    });
}

/// UDP goes by IPv6 alone, and between router and client not at all: they meet at the relay's IPv6 address.
#[test]
fn a_peer_relay_is_reached_over_ipv6() {
    tailscaled::test(|lab| {
        let routed = Routed::new(lab)?;
        let site = &routed.net.site;
        let rules = format!(
            "table inet apart {{ chain forward {{
                type filter hook forward priority 0;
                meta nfproto ipv4 meta l4proto udp drop;
                ip6 saddr {router} ip6 daddr 2001:db8:113::10 meta l4proto udp drop;
                ip6 saddr 2001:db8:113::10 ip6 daddr {router} meta l4proto udp drop;
            }}
            }}",
            router = ENDPOINT_V6.ip()
        );
        let nft = site.internet.command(["nft", "-f", "-"]);
        nft.stdin(rules).run()?;
        let relays = [Relay::start(&routed.net, &site.phone)?];
        grant(&routed.net, &relays)?;
        routed.wait_reach()?;
        let mut flow = routed.flow(SERVER[0])?;
        let ends = Ends {
            host: &site.laptop,
            client: &routed.laptop,
            sluice: &routed.sluice,
        };
        let at = format!("[2001:db8:192::10]:{PORT}:");
        ends.wait_relay("the peer relay over IPv6", |found| {
            found.is_some_and(|found| found.starts_with(&at))
        })?;
        flow.works()?;
        let before = sent(&routed.sluice, "bytes", "ipv6")?;
        let _web = site.server.http_server(80)?;
        lab::http::download(&site.laptop, (SERVER[0], 80).into(), 4 << 20)?;
        lab::http::upload(&site.laptop, (SERVER[0], 80).into(), 4 << 20)?;
        let carried = sent(&routed.sluice, "bytes", "ipv6")? - before;
        ensure!(carried > 4 << 20, "{carried} bytes by the peer relay");
        flow.works()
    });
}
