//! What follows from all sources together: rules, and addresses for 4via6.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::super::{Delta, Destination, Direction, Peer, Policy, Rule, jail, via};
use super::{Changed, Combined, Held, Pool};

/// Gives a peer of a source its address for 4via6.
pub(super) fn give(pool: &mut Pool, source: &mut Held, peer: &Arc<Peer>) {
    if let Some(address) = pool.address(&peer.allowed_ips) {
        let mut with = Peer::clone(peer);
        with.allowed_ips.push(address);
        source.said.insert(peer.public_key, peer.clone());
        source.peers.insert(peer.public_key, Arc::new(with));
    }
}

impl Combined {
    /// Whether 4via6 begins or ends with an update.
    pub(super) fn switches_via(&self, rank: usize, delta: &Delta) -> bool {
        let routes = self.sources.iter().enumerate().map(|(at, source)| {
            let new = delta.routes.as_ref().filter(|_| at == rank);
            new.unwrap_or(&source.routes)
        });
        let mut sites = routes.flat_map(|routes| via::sites(routes));
        sites.next().is_some() != self.pool.is_some()
    }

    /// Gives all peers addresses for 4via6, or takes these away.
    pub(super) fn switch_via(&mut self) {
        if self.pool.take().is_some() {
            for source in &mut self.sources {
                source.peers.extend(source.said.drain());
            }
            return;
        }
        let mut pool = Pool::default();
        for source in &mut self.sources {
            // In an order of their own, so that each gets the same one after a restart.
            let mut peers: Vec<Arc<Peer>> = source.peers.values().cloned().collect();
            peers.sort_unstable_by_key(|peer| crate::via::host(&peer.allowed_ips));
            for peer in peers {
                give(&mut pool, source, &peer);
            }
        }
        self.pool = Some(pool);
    }

    /// Forgets the addresses of former peers, when they are many.
    pub(super) fn tidy_pool(&mut self) {
        let peers = self.state.peers.len();
        if let Some(pool) = self.pool.as_mut().filter(|pool| pool.is_stale(peers)) {
            let peers = self.sources.iter().flat_map(|source| source.peers.values());
            pool.tidy(peers.map(Arc::as_ref));
        }
    }

    /// Whether rules name peers that an update has changed: while some are jailed, or for 4via6.
    pub(super) fn moves_a_derived_rule(&mut self, changed: &Changed) -> bool {
        let were_jailed = !self.jailed.is_empty();
        for key in &changed.peers {
            match self.state.peers.get(key) {
                Some(peer) if peer.jailed => self.jailed.insert(*key),
                _ => self.jailed.remove(key),
            };
        }
        let named = were_jailed || !self.jailed.is_empty() || self.pool.is_some();
        named && !changed.peers.is_empty() || changed.routes && self.pool.is_some()
    }

    /// Whether an update of the source with this rank has changed the allowed IPs of a source without
    /// rules: what its peers may do is written as a rule for these.
    pub(super) fn moves_an_implied_rule(&self, rank: usize, changed: &Changed) -> bool {
        let without = |rank: usize| {
            let source = self.sources.get(rank);
            source.is_some_and(|source| !(source.rules(true) && source.rules(false)))
        };
        let mut ranks = changed.peers.iter().filter_map(|key| self.rank(key));
        !changed.nets.is_empty() && (without(rank) || ranks.any(without))
    }

    pub(super) fn policy(&self) -> Policy {
        let denied = self.sources.first().map(|source| source.policy.denied);
        let mut rules = Vec::new();
        for (rank, source) in self.sources.iter().enumerate() {
            rules.extend(source.policy.rules.iter().cloned());
            for from_overlay in [true, false] {
                let closed = self.sources.iter().any(|other| other.rules(from_overlay));
                if closed && !source.rules(from_overlay) {
                    rules.extend(self.everything_for_its_peers(rank, from_overlay));
                }
            }
        }
        let mut policy = Policy {
            rules,
            denied: denied.unwrap_or_default(),
        };
        jail::close(&mut policy, &self.state.peers);
        if let Some(pool) = &self.pool {
            via::rules(&mut policy, &self.routes(), pool);
        }
        policy
    }

    /// What the peers of a source without rules for a direction may do, written as a rule.
    fn everything_for_its_peers(&self, rank: usize, from_overlay: bool) -> Option<Rule> {
        let keys = self.sources.get(rank)?.peers.keys();
        let own = keys.filter(|key| self.rank(key) == Some(rank));
        let peers = own.filter_map(|key| self.state.peers.get(key));
        let allowed: BTreeSet<IpNet> = peers
            .flat_map(|peer| peer.allowed_ips.iter().copied())
            .collect();
        if allowed.is_empty() {
            return None;
        }
        let allowed: Vec<IpNet> = allowed.into_iter().collect();
        let anywhere = vec![IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
        let (direction, sources, destinations) = if from_overlay {
            (Direction::FromOverlay, allowed, anywhere)
        } else {
            (Direction::ToOverlay, anywhere, allowed)
        };
        let ports = 0..=u16::MAX;
        let destinations = destinations.into_iter().map(|cidr| Destination {
            cidr,
            ports: ports.clone(),
        });
        Some(Rule {
            direction,
            sources,
            destinations: destinations.collect(),
            protocols: (0..=u8::MAX).collect(),
        })
    }
}
