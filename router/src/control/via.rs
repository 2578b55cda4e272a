//! 4via6 in what is wanted: IPv4 addresses for peers, IPv4 routes for sites, and rules about both.
//!
//! Behind the engine there is IPv4 alone: a route for a site becomes one for its IPv4 network, whose sources are
//! translated, and a peer gets an address of [`POOL`] beside its own ones. A rule about 4via6 addresses becomes
//! another one, from peers' addresses of the pool to IPv4, and the rule itself is kept from both: a peer with an IPv4
//! address must not reach by it what is open to its IPv6 address, nor the other way.

use std::collections::{BTreeMap, HashSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Destination, Direction, Peer, Policy, Route, Rule};
use crate::via::{self, POOL, ViaNet};

/// Tries before addresses are looked through one by one.
const TRIES: u32 = 16;

/// The addresses of the pool that are in use, by the address of the peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pool {
    addresses: BTreeMap<Ipv6Addr, Ipv4Addr>,
    taken: HashSet<Ipv4Addr>,
}

impl Pool {
    /// The address of a peer with these allowed IPs. It rests on the peer's IPv6 address, so that it is mostly the
    /// same one after a restart, when flows go on. A peer without such an address gets none, nor when all are in use.
    pub(super) fn address(&mut self, allowed_ips: &[IpNet]) -> Option<IpNet> {
        let address = self.give(via::host(allowed_ips)?)?;
        Some(IpNet::V4(address.into()))
    }

    fn give(&mut self, host: Ipv6Addr) -> Option<Ipv4Addr> {
        if let Some(address) = self.addresses.get(&host) {
            return Some(*address);
        }
        let base = POOL.network().to_bits();
        // Neither the network's own address nor its broadcast.
        let last = POOL.broadcast().to_bits() - base - 1;
        let tried = (0..TRIES).map(|round| 1 + hash(host, round) % last);
        let address = tried
            .chain(1..=last)
            .map(|number| Ipv4Addr::from_bits(base + number))
            .find(|address| !self.taken.contains(address))?;
        self.taken.insert(address);
        self.addresses.insert(host, address);
        Some(address)
    }

    /// Whether it holds so many addresses that most are of former peers, where there are `peers` now.
    pub(super) fn is_stale(&self, peers: usize) -> bool {
        const FEW: usize = 1024;
        self.addresses.len() > 2 * peers + FEW
    }

    /// Forgets the addresses of all but these peers.
    pub(super) fn tidy<'p>(&mut self, peers: impl Iterator<Item = &'p Peer>) {
        let hosts: HashSet<Ipv6Addr> = peers
            .filter_map(|peer| via::host(&peer.allowed_ips))
            .collect();
        self.addresses.retain(|host, _| hosts.contains(host));
        self.taken = self.addresses.values().copied().collect();
    }

    /// What stands for the peers in `net`.
    fn of(&self, net: Ipv6Net) -> Vec<IpNet> {
        if net.prefix_len() == 0 {
            return vec![POOL.into()];
        }
        let within = self.addresses.range(net.network()..=net.broadcast());
        within
            .map(|(_, address)| IpNet::V4((*address).into()))
            .collect()
    }
}

/// FNV-1a, folded.
fn hash(host: Ipv6Addr, round: u32) -> u32 {
    let bytes = host.octets().into_iter().chain(round.to_be_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash ^ hash >> 32) as u32
}

/// The sites' networks among routes.
pub(super) fn sites(routes: &[Route]) -> impl Iterator<Item = ViaNet> {
    let sites = routes.iter().filter_map(|route| ViaNet::of(&route.cidr));
    sites.filter(ViaNet::is_served)
}

/// Routes that are neither to a site nor to anything else.
pub(super) fn unserved(routes: &[Route]) -> Vec<IpNet> {
    let cidrs = routes.iter().map(|route| route.cidr).filter(via::overlaps);
    cidrs
        .filter(|cidr| !ViaNet::of(cidr).is_some_and(|via| via.is_served()))
        .collect()
}

/// The routes as the datapaths get them: IPv4 in the place of 4via6.
pub(super) fn ipv4(routes: Vec<Route>) -> Vec<Route> {
    let sites: Vec<(ViaNet, Route)> = routes
        .iter()
        .filter_map(|route| Some((ViaNet::of(&route.cidr)?, *route)))
        .filter(|(via, _)| via.is_served())
        .collect();
    let mut plain = routes;
    plain.retain(|route| !via::overlaps(&route.cidr));
    for (via, route) in sites {
        let cidr = via.net.into();
        if plain.iter().all(|known| known.cidr != cidr) {
            plain.push(Route {
                cidr,
                snat: true,
                ..route
            });
        }
    }
    plain
}

/// Adds the rules that 4via6 needs behind those that are there. `wanted` are the routes as sources say them.
pub(super) fn rules(policy: &mut Policy, wanted: &[Route], pool: &Pool) {
    let sites: Vec<ViaNet> = sites(wanted).collect();
    let native = wanted.iter().filter_map(|route| v4(&route.cidr));
    let native: Vec<Ipv4Net> = native.collect();
    // What is reached by IPv6 alone.
    let mut hidden: Vec<Ipv4Net> = sites.iter().map(|via| via.net).collect();
    for net in &native {
        hidden = hidden
            .into_iter()
            .flat_map(|part| without(part, *net))
            .collect();
    }
    let mut more = Vec::new();
    for rule in &mut policy.rules {
        if rule.direction.covers(true) {
            let rule = translated(rule, &sites, pool);
            more.extend(
                rule.filter(|rule| !rule.sources.is_empty() && !rule.destinations.is_empty()),
            );
        }
        rule.sources = rule
            .sources
            .iter()
            .flat_map(|net| less(*net, &[POOL]))
            .collect();
        let mut holes = vec![POOL];
        if rule.direction.covers(true) {
            holes.extend(&hidden);
        }
        let destinations = std::mem::take(&mut rule.destinations);
        rule.destinations = destinations
            .into_iter()
            .flat_map(|to| {
                let ports = to.ports;
                less(to.cidr, &holes)
                    .into_iter()
                    .map(move |cidr| Destination {
                        cidr,
                        ports: ports.clone(),
                    })
            })
            .collect();
    }
    policy.rules.append(&mut more);
}

/// What a rule says of 4via6; `None` if nothing.
fn translated(rule: &Rule, sites: &[ViaNet], pool: &Pool) -> Option<Rule> {
    let mut destinations = Vec::new();
    for to in rule
        .destinations
        .iter()
        .filter(|to| via::overlaps(&to.cidr))
    {
        for via in sites {
            let own = via.cidr();
            let net = if to.cidr.contains(&own) {
                Some(via.net)
            } else {
                let inner = ViaNet::of(&to.cidr).filter(|_| own.contains(&to.cidr));
                inner.map(|inner| inner.net)
            };
            destinations.extend(net.map(|net| Destination {
                cidr: net.into(),
                ports: to.ports.clone(),
            }));
        }
    }
    if destinations.is_empty() {
        return None;
    }
    let sources = rule.sources.iter().filter_map(|net| match net {
        IpNet::V6(net) => Some(*net),
        IpNet::V4(_) => None,
    });
    let mut sources: Vec<IpNet> = sources.flat_map(|net| pool.of(net)).collect();
    if sources.contains(&POOL.into()) {
        sources = vec![POOL.into()];
    }
    sources.sort_unstable();
    sources.dedup();
    Some(Rule {
        direction: Direction::FromOverlay,
        sources,
        destinations,
        protocols: rule.protocols.clone(),
    })
}

fn v4(net: &IpNet) -> Option<Ipv4Net> {
    match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
    }
}

/// A CIDR without some IPv4 networks.
fn less(net: IpNet, holes: &[Ipv4Net]) -> Vec<IpNet> {
    let IpNet::V4(net) = net else {
        return vec![net];
    };
    let mut parts = vec![net];
    for hole in holes {
        parts = parts
            .into_iter()
            .flat_map(|part| without(part, *hole))
            .collect();
    }
    parts.into_iter().map(IpNet::V4).collect()
}

/// A network without another one.
fn without(net: Ipv4Net, hole: Ipv4Net) -> Vec<Ipv4Net> {
    if hole.contains(&net) {
        return Vec::new();
    }
    if !net.contains(&hole) {
        return vec![net];
    }
    let halves = net.subnets(net.prefix_len() + 1).into_iter().flatten();
    halves.flat_map(|half| without(half, hole)).collect()
}

#[cfg(test)]
mod tests;
