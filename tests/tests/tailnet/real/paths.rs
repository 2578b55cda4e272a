//! Ways between a router and real clients: NATs of both kinds, blocked UDP, relays that go and come back.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use lab::site::{Arms, ENDPOINT, SERVER, VPC};
use lab::sluice::{Config, Sluice};
use lab::tailnet::{CONTROL, Hidden, Nat, Tailnet};
use lab::tailscaled::{self, Tailscaled};
use lab::{Flood, Flow, Forgery, Lab, http, wait_until};

use super::{SOON, diagnosis, router, wait_lost, wait_reach};

/// Datagrams of a flood per second.
const RATE: u32 = 20_000;

/// A client behind a NAT, and a router with a public address, or behind a NAT too.
pub(super) struct Apart {
    pub(super) client: Tailscaled,
    pub(super) sluice: Sluice,
    pub(super) hotel: Hidden,
    pub(super) net: Tailnet,
}

impl Apart {
    pub(super) fn new(lab: &Lab, client: Nat, hides_router: Option<Nat>) -> Result<Self> {
        Self::with(lab, client, hides_router, |_| {})
    }

    fn with(
        lab: &Lab,
        client: Nat,
        hides_router: Option<Nat>,
        change: impl FnOnce(&mut Config),
    ) -> Result<Self> {
        Self::prepared(lab, client, hides_router, |_| Ok(()), change)
    }

    /// The same with something `before` the router starts.
    pub(super) fn prepared(
        lab: &Lab,
        client: Nat,
        hides_router: Option<Nat>,
        before: impl FnOnce(&Tailnet) -> Result<()>,
        change: impl FnOnce(&mut Config),
    ) -> Result<Self> {
        let net = Tailnet::new(lab, Arms::Two)?;
        if let Some(nat) = hides_router {
            net.hide_router(nat)?;
        }
        let hotel = net.hidden(lab, "hotel", 1, client)?;
        before(&net)?;
        let (_, sluice) = router(&net, &net.site.router, change)?;
        let client = net.join(&hotel.host, &[])?;
        client.wait_peer("router", "its routes", |peer| {
            peer["PrimaryRoutes"].as_array().map(Vec::len) == Some(VPC.len())
        })?;
        Ok(Self {
            client,
            sluice,
            hotel,
            net,
        })
    }

    pub(super) fn wait_reach(&self) -> Result<()> {
        wait_reach(&self.hotel.host, SERVER[0])
            .with_context(|| diagnosis(&self.client, &self.sluice))
    }

    /// The client sends to the router directly, or by the relay.
    pub(super) fn wait_way(&self, direct: bool) -> Result<()> {
        let what = if direct { "a direct path" } else { "the relay" };
        // Ways are tried while something is sent.
        wait_until(SOON, what, || {
            let _ = self.hotel.host.pings(&SERVER[0].to_string(), &[]);
            let peer = self.client.peer("router").ok().flatten();
            peer.is_some_and(|peer| (peer["CurAddr"] != "") == direct)
        })
        .with_context(|| diagnosis(&self.client, &self.sluice))
    }

    pub(super) fn transfers(&self) -> Result<()> {
        let _web = self.net.site.server.http_server(80)?;
        let at = SocketAddr::new(SERVER[0], 80);
        http::download(&self.hotel.host, at, 4 << 20)?;
        http::upload(&self.hotel.host, at, 4 << 20)
    }
}

#[test]
fn through_an_easy_nat() {
    tailscaled::test(|lab| {
        let apart = Apart::new(lab, Nat::Easy, None)?;
        apart.wait_reach()?;
        apart.wait_way(true)?;
        apart.transfers()
    });
}

#[test]
fn a_hard_nat_against_a_public_router() {
    tailscaled::test(|lab| {
        let apart = Apart::new(lab, Nat::Hard, None)?;
        apart.wait_reach()?;
        apart.wait_way(true)?;
        apart.transfers()
    });
}

#[test]
fn easy_against_easy() {
    tailscaled::test(|lab| {
        let apart = Apart::new(lab, Nat::Easy, Some(Nat::Easy))?;
        apart.wait_reach()?;
        apart.wait_way(true)?;
        apart.transfers()
    });
}

#[test]
fn hard_against_hard_takes_the_relay() {
    tailscaled::test(|lab| {
        let apart = Apart::new(lab, Nat::Hard, Some(Nat::Hard))?;
        apart.wait_reach()?;
        apart.wait_way(false)?;
        apart.transfers()
    });
}

/// A client whose UDP is blocked uses the relay; the relay goes and comes back.
#[test]
fn blocked_udp_and_a_relay_that_dies() {
    tailscaled::test(|lab| {
        let mut apart = Apart::new(lab, Nat::NoUdp, None)?;
        apart.wait_reach()?;
        apart.wait_way(false)?;
        apart.transfers()?;
        apart.net.relay()?.stop();
        wait_lost(&apart.hotel.host, SERVER[0])?;
        apart.net.relay()?.start()?;
        apart.wait_reach()?;
        apart.transfers()
    });
}

/// UDP gets through in the middle of a transfer, and is blocked again: the transfer goes on, byte by byte.
#[test]
fn a_transfer_survives_a_better_way_and_its_loss() {
    tailscaled::test(|lab| {
        let apart = Apart::new(lab, Nat::NoUdp, None)?;
        apart.wait_reach()?;
        apart.wait_way(false)?;
        let mut flow = Flow::open(&apart.hotel.host, &apart.net.site.server, SERVER[0])?;
        flow.works()?;
        apart.hotel.set(Nat::Easy)?;
        apart.wait_way(true)?;
        flow.works()?;
        apart.transfers()?;
        apart.hotel.set(Nat::NoUdp)?;
        flow.works()?;
        apart.wait_way(false)?;
        apart.transfers()?;
        ensure!(flow.works().is_ok());
        Ok(())
    });
}

/// The guard of the uplink lets disco pass; floods of initiations and of junk that looks like disco keep no way from
/// being found, and no session from going on.
#[test]
fn ways_are_found_behind_a_guard_and_under_floods() {
    tailscaled::test(|lab| {
        let apart = Apart::with(lab, Nat::Easy, None, |config| config.guard = true)?;
        let guard = &apart.sluice.status()?["uplink_guard"];
        ensure!(guard["interface"].is_string(), "{guard}");
        let SocketAddr::V4(to) = ENDPOINT else {
            anyhow::bail!("the endpoint is IPv4");
        };
        let attacker = &apart.net.control_host;
        let IpAddr::V4(from) = CONTROL[0] else {
            anyhow::bail!("the attacker is IPv4");
        };
        let flood = |forgery| {
            attacker.flood(&Flood {
                to,
                forgery,
                sources: (from, 1),
                rate: RATE,
            })
        };
        let initiations = flood(Forgery::Initiations { key: None })?;
        let disco = flood(Forgery::Disco)?;
        apart.wait_reach()?;
        apart.wait_way(true)?;
        apart.transfers()?;
        ensure!(initiations.sent() > 1000 && disco.sent() > 1000);
        let lost = apart.sluice.engine_counter("drop_receive_full")?;
        ensure!(lost == 0, "{lost} datagrams of sessions");
        Ok(())
    });
}
