//! The router as a peer relay between two real clients that cannot meet.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use lab::site::Arms;
use lab::sluice::{Config, Sluice};
use lab::tailnet::{Hidden, Nat, Tailnet, rule};
use lab::tailscaled::{self, Tailscaled};
use lab::{Lab, http, wait_until};
use serde_json::{Value, json};

use super::router;
use crate::tailnet::node::SOON;

const PORT: u16 = 7777;

/// Two real clients behind hard NATs, and a router with a public address that is a peer relay.
struct Carried {
    hotel: (Hidden, Tailscaled),
    home: (Hidden, Tailscaled),
    config: Config,
    sluice: Sluice,
    net: Tailnet,
}

impl Carried {
    fn new(lab: &Lab) -> Result<Self> {
        let net = Tailnet::new(lab, Arms::Two)?;
        let hotel = net.hidden(lab, "hotel", 1, Nat::Hard)?;
        let home = net.hidden(lab, "home", 2, Nat::Hard)?;
        let (config, sluice) = router(&net, &net.site.router, |config| {
            if let Some(tailnet) = &mut config.tailnet {
                tailnet.more.push(("relay_server_port", PORT.to_string()));
            }
        })?;
        let join = |hidden: Hidden| -> Result<_> {
            let node = net.join(&hidden.host, &[])?;
            Ok((hidden, node))
        };
        Ok(Self {
            hotel: join(hotel)?,
            home: join(home)?,
            config,
            sluice,
            net,
        })
    }

    /// Everybody may reach everything, all know the router as a relay, and these may use it.
    fn grant(&self, clients: &[String]) -> Result<()> {
        let own = self.sluice.status()?["tailnet"]["addresses"].clone();
        let own: Vec<IpAddr> = serde_json::from_value(own)?;
        let to: Vec<String> = own
            .iter()
            .map(|at| match at {
                IpAddr::V4(at) => format!("{at}/32"),
                IpAddr::V6(at) => format!("{at}/128"),
            })
            .collect();
        let nodes = ["100.64.0.0/10", "fd7a:115c:a1e0::/48"];
        self.net.control.set_filter(json!([
            rule(&["*"], &["*"]),
            {"SrcIPs": clients, "CapGrant": [{"Dsts": to, "CapMap": {"tailscale.com/cap/relay": []}}]},
            {"SrcIPs": own, "CapGrant": [{"Dsts": nodes, "CapMap": {"tailscale.com/cap/relay-target": []}}]},
        ]));
        Ok(())
    }

    fn clients(&self) -> Result<Vec<String>> {
        let all = [self.hotel.1.addresses()?, self.home.1.addresses()?];
        Ok(all.concat().iter().map(IpAddr::to_string).collect())
    }

    fn relay(&self) -> Result<Value> {
        Ok(self.sluice.status()?["tailnet"]["relay_server"].clone())
    }

    /// How the one reaches the other, in the words of `tailscale ping`.
    fn ping(&self) -> Result<String> {
        let [v4, _] = self.home.1.addresses()?;
        // Ways are tried while something is sent.
        let _ = self.hotel.0.host.pings(&v4.to_string(), &[]);
        let words = ["ping", "--c=1", "--timeout=5s", &v4.to_string()];
        Ok(self.hotel.1.cli(&words)?.stdout)
    }

    fn wait_carried(&self) -> Result<()> {
        wait_until(SOON * 2, "the router to carry it", || {
            let via = format!("via peer-relay({}:{PORT}:vni:", lab::site::ENDPOINT.ip());
            self.ping().is_ok_and(|pong| pong.contains(&via))
        })
        .with_context(|| self.diagnosis())
    }

    fn transfers(&self) -> Result<()> {
        let _web = self.home.0.host.http_server(80)?;
        let [v4, _] = self.home.1.addresses()?;
        let at = SocketAddr::new(v4, 80);
        http::download(&self.hotel.0.host, at, 4 << 20)?;
        http::upload(&self.hotel.0.host, at, 4 << 20)
    }

    fn diagnosis(&self) -> String {
        let status = self.sluice.status().unwrap_or_default();
        format!(
            "pong: {:?}; router: {}; its log: {}",
            self.ping(),
            status["tailnet"],
            self.sluice.log()
        )
    }
}

/// Hard against hard meets at the router, with every byte as it was sent; and again after the router's restart.
#[test]
fn the_router_carries_between_hard_nats() {
    tailscaled::test(|lab| {
        let mut carried = Carried::new(lab)?;
        carried.grant(&carried.clients()?)?;
        let told = carried.net.control.node("router")?.hostinfo["PeerRelay"].clone();
        ensure!(told == true, "Hostinfo.PeerRelay: {told}");
        carried.wait_carried()?;
        carried.transfers()?;
        let relay = carried.relay()?;
        ensure!(relay["open"] == 1, "{relay}");
        ensure!(relay["clients"] == 2, "{relay}");
        ensure!(relay["bytes"].as_u64() > Some(8 << 20), "{relay}");
        let metrics = carried.sluice.metrics()?;
        for line in [
            "tailscaled_peer_relay_endpoints{state=\"open\"} 1",
            "sluice_tailnet_relay_server_running 1",
        ] {
            ensure!(metrics.lines().any(|other| other == line), "{metrics}");
        }
        // Its places are gone then, and those who have lost one ask again.
        carried.sluice.hand_over()?;
        wait_until(SOON * 2, "the next daemon's first place", || {
            let _ = carried.ping();
            carried.relay().is_ok_and(|relay| relay["open"] == 1)
        })
        .with_context(|| carried.diagnosis())?;
        carried.wait_carried()?;
        carried.transfers()
    });
}

/// Who has no grant gets no place, and goes by the relay as before; and a router that is no peer relay any more has none.
#[test]
fn without_a_grant_nobody_is_carried() {
    tailscaled::test(|lab| {
        let mut carried = Carried::new(lab)?;
        carried.grant(&["100.64.0.99".to_owned()])?;
        wait_until(SOON * 2, "a question without a grant", || {
            let _ = carried.ping();
            let relay = carried.relay();
            relay.is_ok_and(|relay| relay["ungranted"].as_u64() > Some(0))
        })
        .with_context(|| carried.diagnosis())?;
        carried.transfers()?;
        let pong = carried.ping()?;
        ensure!(pong.contains("via DERP(r1)"), "{pong}");
        let relay = carried.relay()?;
        ensure!(relay["connecting"] == 0 && relay["open"] == 0, "{relay}");
        ensure!(relay["packets"] == 0, "{relay}");
        // The port can be had by others as soon as it is not wanted.
        let mut config = carried.config.clone();
        if let Some(tailnet) = &mut config.tailnet {
            tailnet.more.clear();
        }
        carried.sluice.reload(&config)?;
        wait_until(SOON, "the relay's end", || {
            carried.relay().is_ok_and(|relay| relay.is_null())
        })
        .with_context(|| carried.diagnosis())?;
        let _taken = carried.net.site.router.udp_echo(PORT)?;
        carried.sluice.reload(&carried.config)?;
        wait_until(SOON, "the port's problem", || {
            let status = carried.sluice.status().unwrap_or_default();
            let relay = &status["tailnet"]["relay_server"];
            relay["running"] == false && status["problems"].to_string().contains("UDP port 7777")
        })
        .with_context(|| carried.diagnosis())
    });
}
