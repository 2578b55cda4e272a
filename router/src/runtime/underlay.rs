//! What the ways of underlay packets carry, looked at again and again: the kernel tells nobody when it
//! believes a "packet too big", nor when it forgets one.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::ops::Bound::{Excluded, Unbounded};
use std::time::{Duration, Instant};

use super::{Daemon, facts};
use crate::api::Problem;
use crate::config::Config;
use crate::control::{Combined, Endpoint};
use crate::core::{Path, misfit, tunnel_mtu};
use crate::engine::PeerStats;
use crate::netlink::{self, Netlink};
use crate::wireguard::keys::PublicKey;

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(5);
/// After this long without a refusal the next one is news.
const CALM: Duration = Duration::from_secs(120);
/// Addresses of one look; with more peers each has its turn. Each costs some 50 us.
const AT_ONCE: usize = 256;

/// Where the looks are, and what has been told.
#[derive(Debug)]
pub(super) struct Underlay {
    /// When the next look is due.
    pub(super) due: Instant,
    /// The address that was looked at last.
    last: Option<IpAddr>,
    /// The tunnel MTU in bytes as last told.
    mtu: u16,
    misfit: Option<String>,
    /// Peers whose datagrams are sent one by one, and when that was last seen.
    uncut: HashMap<PublicKey, Instant>,
}

impl Underlay {
    /// Nothing but the facts has been looked at.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            due: now,
            last: None,
            mtu: crate::config::DEFAULT_MTU,
            misfit: None,
            uncut: HashMap::new(),
        }
    }
}

impl Daemon {
    /// Looks at the ways to the peers that are due.
    pub(super) async fn look_at_underlay(&mut self) {
        self.network.underlay.due = Instant::now() + PAUSE;
        let peers = self.machine.engine.peer_stats();
        let endpoints = peers.iter().filter_map(|peer| Some(peer.endpoint()?.ip()));
        let endpoints: BTreeSet<IpAddr> = endpoints.collect();
        let (after, before) = match self.network.underlay.last {
            Some(last) => (
                endpoints.range((Excluded(last), Unbounded)),
                Some(endpoints.range(..=last)),
            ),
            None => (endpoints.range::<IpAddr, _>(..), None),
        };
        let turn = after.chain(before.into_iter().flatten()).take(AT_ONCE);
        let turn: Vec<IpAddr> = turn.copied().collect();
        self.network.underlay.last = turn.last().copied().or(self.network.underlay.last);
        let paths = &mut self.network.facts.paths;
        let all = paths.len();
        paths.retain(|to, _| to.is_unspecified() || endpoints.contains(to));
        let fewer = paths.len() < all;
        self.follow_ways(turn, fewer).await;
        self.tell_uncut(&peers);
    }

    /// Looks at the ways to these peers.
    pub(super) async fn look_at_ways(&mut self, peers: &[PublicKey]) {
        let engine = &self.machine.engine;
        let endpoints = peers.iter().filter_map(|key| engine.endpoint_of(key));
        let addresses = endpoints.map(|endpoint| endpoint.ip()).take(AT_ONCE);
        self.follow_ways(addresses.collect(), false).await;
    }

    /// Asks the kernel for the ways to these addresses. Nothing but the tunnel MTU depends on them.
    async fn follow_ways(&mut self, addresses: Vec<IpAddr>, mut changed: bool) {
        for address in addresses {
            let paths = &mut self.network.facts.paths;
            match path(&self.machine.netlink, address).await {
                Ok(Some(path)) => changed |= paths.insert(address, path) != Some(path),
                Ok(None) => changed |= paths.remove(&address).is_some(),
                Err(error) => tracing::debug!(%error, "the way to a peer"),
            }
        }
        if !changed {
            return;
        }
        let (mtu, _) = tunnel_mtu(&self.sources.local, &self.network.facts);
        if self.core.wanted().is_none_or(|plan| plan.mtu != mtu) {
            self.replan();
        } else {
            self.tell_mtu();
        }
    }

    /// Says once what has become of the tunnel MTU.
    pub(super) fn tell_mtu(&mut self) {
        let (mtu, narrow) = tunnel_mtu(&self.sources.local, &self.network.facts);
        if mtu != self.network.underlay.mtu {
            match narrow {
                Some(way) => tracing::info!(mtu, "the tunnel MTU fits the underlay: {way}"),
                None => tracing::info!(mtu, "the tunnel MTU"),
            }
            self.network.underlay.mtu = mtu;
        }
        let misfit = misfit(mtu, &self.sources.local, &self.network.facts);
        if misfit != self.network.underlay.misfit {
            match &misfit {
                Some(text) => tracing::warn!("{text}"),
                None => tracing::info!("the tunnel MTU fits the underlay again"),
            }
            self.network.underlay.misfit = misfit;
        }
    }

    /// Says once of each peer that its datagrams are sent one by one.
    fn tell_uncut(&mut self, peers: &[PeerStats]) {
        let now = Instant::now();
        for peer in peers.iter().filter(|peer| peer.uncut) {
            let before = self.network.underlay.uncut.insert(peer.public_key, now);
            if before.is_none() {
                tracing::info!("{}", self.uncut(&[peer]));
            }
        }
        // Who sends little is refused now and then only.
        let calm = |last: &Instant| now.duration_since(*last) >= CALM;
        self.network.underlay.uncut.retain(|_, last| !calm(last));
    }

    fn uncut(&self, peers: &[&PeerStats]) -> String {
        const SHOWN: usize = 3;
        let named = |stats: &&PeerStats| {
            let peer = self.sources.state().peers.get(&stats.public_key);
            let name = peer.and_then(|peer| peer.name.clone());
            let carries = stats.endpoint().and_then(|endpoint| {
                let mtu = self.network.facts.paths.get(&endpoint.ip())?.mtu?;
                Some(format!(
                    " (the path to {} carries {mtu} bytes)",
                    endpoint.ip()
                ))
            });
            name.unwrap_or_else(|| stats.public_key.to_string()) + &carries.unwrap_or_default()
        };
        let names: Vec<String> = peers.iter().take(SHOWN).map(named).collect();
        let more = match peers.len().saturating_sub(SHOWN) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!(
            "the kernel refuses to cut messages into datagrams (UDP GSO) on the way to {}{more}, which \
             may be too narrow for them: they are sent one by one, which costs more CPU time; it is \
             asked again every ten seconds",
            names.join(", ")
        )
    }

    /// What of the underlay stops or slows packets.
    pub(super) fn underlay_problems<'a>(
        &self,
        stats: impl Iterator<Item = &'a PeerStats>,
    ) -> Vec<Problem> {
        let problem = |part: &str, error| Problem {
            part: part.to_owned(),
            error,
        };
        let uncut: Vec<&PeerStats> = stats.filter(|stats| stats.uncut).collect();
        let uncut = (!uncut.is_empty()).then(|| problem("gso", self.uncut(&uncut)));
        let misfit = self.network.underlay.misfit.clone();
        let misfit = misfit.map(|text| problem("mtu", text));
        misfit.into_iter().chain(uncut).collect()
    }
}

/// The way to a peer. `None`: there is none, or it depends on more than the address.
async fn path(netlink: &Netlink, to: IpAddr) -> Result<Option<Path>, netlink::Error> {
    if matches!(to, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
        return Ok(None);
    }
    let hop = netlink.route_to(to).await?;
    Ok(hop.map(|hop| Path {
        link: hop.link.index,
        mtu: hop.mtu,
    }))
}

/// The tunnel MTU in bytes that `config` has on this machine as it is now, and why it does not fit,
/// if it does not. Needs no rights.
pub fn try_mtu(config: &Config) -> Result<(u16, Option<String>), super::Error> {
    let runtime = super::runtime()?;
    runtime.block_on(async {
        let (netlink, _changes) = Netlink::connect()?;
        let mut combined = Combined::new(&["the configuration file"]);
        combined.apply(0, config.update());
        let mut facts = facts::gather(&netlink, combined.state(), None).await?;
        for peer in combined.state().peers.iter() {
            // Names are left: this is about the machine, and should not wait for others.
            if let Some(Endpoint::Addr(endpoint)) = &peer.endpoint
                && let Some(path) = path(&netlink, endpoint.ip()).await?
            {
                facts.paths.insert(endpoint.ip(), path);
            }
        }
        let (mtu, _) = tunnel_mtu(&config.local, &facts);
        Ok((mtu, misfit(mtu, &config.local, &facts)))
    })
}
