//! Real tailscaled beside our own coordination server and Tailscale's, in network namespaces: needs root, and
//! Tailscale's programs (`cargo xtask setup --peers`).

mod changes;
mod failover;
mod inside;
mod join;
mod mapped;
mod paths;
mod peer_relays;
mod regions;
mod relay_server;
mod restarts;
mod rig;
mod theirs;

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use lab::control_server::{ControlServer, Node};
use lab::site::{Arms, SERVER, VPC};
use lab::sluice::{Config, Route, Sluice};
use lab::tailnet::{KEY, Tailnet};
use lab::tailscaled::Tailscaled;
use lab::{Flow, Host, Lab, poll, wait_until};

use super::node::SOON;

/// A router in a tailnet, and a laptop with real tailscaled that has its routes.
struct Routed {
    laptop: Tailscaled,
    config: Config,
    sluice: Sluice,
    net: Tailnet,
}

impl Routed {
    fn new(lab: &Lab) -> Result<Self> {
        Self::with(lab, |_| {})
    }

    /// The same with a changed configuration.
    fn with(lab: &Lab, change: impl FnOnce(&mut Config)) -> Result<Self> {
        let net = Tailnet::new(lab, Arms::Two)?;
        let (config, sluice) = router(&net, &net.site.router, change)?;
        let laptop = net.join(&net.site.laptop, &[])?;
        let routed = Self {
            laptop,
            config,
            sluice,
            net,
        };
        routed.laptop.wait_peer("router", "its routes", |peer| {
            peer["PrimaryRoutes"].as_array().map(Vec::len) == Some(VPC.len())
        })?;
        Ok(routed)
    }

    /// Waits until the laptop reaches the server over both families.
    fn wait_reach(&self) -> Result<()> {
        for server in SERVER {
            wait_reach(&self.net.site.laptop, server)
                .with_context(|| diagnosis(&self.laptop, &self.sluice))?;
        }
        Ok(())
    }

    /// What the router's status says.
    fn status(&self, what: &str, wanted: impl Fn(&serde_json::Value) -> bool) -> Result<()> {
        let mut last = String::new();
        wait_until(SOON, what, || match self.sluice.status() {
            Ok(status) => {
                last = status.to_string();
                wanted(&status)
            }
            Err(_) => false,
        })
        .with_context(|| last.clone())
    }

    fn flow(&self, server: IpAddr) -> Result<Flow> {
        Flow::open(&self.net.site.laptop, &self.net.site.server, server)
    }
}

/// What both ends say of their way to each other, for the report of a failure.
fn diagnosis(client: &Tailscaled, sluice: &Sluice) -> String {
    let seen = client.peer("router").ok().flatten();
    let ways = sluice.status().unwrap_or_default();
    format!("client: {seen:?}; router: {}", ways["tailnet"])
}

/// A router that has joined, and whose routes are approved.
fn router(
    net: &Tailnet,
    host: &Host,
    change: impl FnOnce(&mut Config),
) -> Result<(Config, Sluice)> {
    let config = joining(&net.control.url(), host.name(), change)?;
    let sluice = host.sluice_unsettled(&config)?;
    let node = advertised(&net.control, host.name()).with_context(|| sluice.log())?;
    net.control.approve(node.id, &VPC);
    Ok((config, sluice))
}

/// The configuration of a router that offers the VPC.
fn joining(url: &str, name: &str, change: impl FnOnce(&mut Config)) -> Result<Config> {
    let mut config = Config::joining(url, KEY)?;
    if let Some(tailnet) = &mut config.tailnet {
        tailnet.hostname = Some(name.to_owned());
    }
    config.routes = VPC
        .map(|cidr| Route {
            cidr: cidr.to_owned(),
            snat: true,
            mode: "fast",
        })
        .into();
    change(&mut config);
    Ok(config)
}

/// Waits until a node has told its routes.
fn advertised(control: &ControlServer, name: &str) -> Result<Node> {
    poll(SOON, &format!("{name}'s routes"), || {
        let node = control.node(name).ok()?;
        node.hostinfo["RoutableIPs"].is_array().then_some(node)
    })
    .with_context(|| format!("{:?}", control.nodes()))
}

fn wait_reach(from: &Host, to: IpAddr) -> Result<()> {
    wait_until(SOON, &format!("{to} to answer {}", from.name()), || {
        from.pings(&to.to_string(), &[]).unwrap_or(false)
    })
}

fn wait_lost(from: &Host, to: IpAddr) -> Result<()> {
    wait_until(
        SOON,
        &format!("{to} to answer {} no more", from.name()),
        || !from.pings(&to.to_string(), &[]).unwrap_or(true),
    )
}
