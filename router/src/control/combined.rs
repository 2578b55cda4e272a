//! Several sources, one state: who wins where two of them want the same, and what each update changes.

mod derived;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;

use super::via::{self, Pool};
use super::{Changed, Delta, Identity, Peer, Policy, Route, Snapshot, State, Update};
use crate::via::ViaNet;
use crate::wireguard::keys::{PrivateKey, PublicKey};

/// What every source wants, and the one state that comes of it.
///
/// Sources have ranks. Of a public key, a route or a private key that two of them name, the first
/// source's is taken; of an allowed IP that two peers have, the first source's, or in one source the
/// one with the lower key. What is not taken is not in the state, and told by [`Combined::conflicts`].
/// Overlay addresses and rules of all sources count together; the peers of a source without rules (for
/// a direction) may do what they could if there were no other.
#[derive(Clone, Debug)]
pub struct Combined {
    sources: Vec<Held>,
    state: State,
    /// The claimants of allowed IPs that more than one peer has.
    contested: BTreeMap<IpNet, BTreeSet<PublicKey>>,
    /// Addresses for 4via6, while there is a route of this kind.
    pool: Option<Pool>,
    /// Peers that may open nothing.
    jailed: BTreeSet<PublicKey>,
}

/// What one source wants.
#[derive(Clone, Debug)]
struct Held {
    name: &'static str,
    identity: Option<Identity>,
    peers: HashMap<PublicKey, Arc<Peer>>,
    /// Those of them that got an address for 4via6, as the source has said them.
    said: HashMap<PublicKey, Arc<Peer>>,
    routes: Vec<Route>,
    policy: Policy,
    /// Why it could say nothing new the last time.
    failure: Option<String>,
}

/// Something that a source wants and does not get, since another one has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// A peer that two sources name.
    Key(PublicKey),
    /// An allowed IP, and the peer that does not get it.
    Net(IpNet, PublicKey),
    /// A route that two sources want in different ways.
    Route(IpNet),
    /// The router's own private key.
    PrivateKey,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => write!(f, "the peer {key}"),
            Self::Net(net, key) => write!(f, "the allowed IP {net} of the peer {key}"),
            Self::Route(cidr) => write!(f, "the route {cidr}"),
            Self::PrivateKey => f.write_str("its private key"),
        }
    }
}

impl Held {
    /// What the source says of a peer.
    fn said(&self, key: &PublicKey) -> Option<&Peer> {
        let said = self.said.get(key).or_else(|| self.peers.get(key))?;
        Some(said)
    }

    /// Whether it has a rule for flows that peers open (`true`), or for those opened to them.
    fn rules(&self, from_overlay: bool) -> bool {
        let mut rules = self.policy.rules.iter();
        rules.any(|rule| rule.direction.covers(from_overlay))
    }
}

impl Combined {
    /// Sources with these names, by rank, that have not said anything yet.
    pub fn new(names: &[&'static str]) -> Self {
        let held = names.iter().map(|name| Held {
            name,
            identity: None,
            peers: HashMap::new(),
            said: HashMap::new(),
            routes: Vec::new(),
            policy: Policy::default(),
            failure: None,
        });
        Self {
            sources: held.collect(),
            state: State::default(),
            contested: BTreeMap::new(),
            pool: None,
            jailed: BTreeSet::new(),
        }
    }

    /// What is wanted of the router.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What the source with this rank wants of a peer.
    pub fn peer_of(&self, rank: usize, key: &PublicKey) -> Option<&Peer> {
        self.sources.get(rank)?.said(key)
    }

    /// All peers that the source with this rank wants, in no order.
    pub fn peers_of(&self, rank: usize) -> impl Iterator<Item = &Peer> {
        let source = self.sources.get(rank).into_iter();
        source.flat_map(|source| source.peers.keys().filter_map(|key| source.said(key)))
    }

    /// The name of the first source that wants a peer, and its rank.
    pub fn source_of(&self, key: &PublicKey) -> Option<(usize, &'static str)> {
        let rank = self.rank(key)?;
        Some((rank, self.sources.get(rank)?.name))
    }

    /// The private key that the source with this rank wants the router to have.
    pub fn key_of(&self, rank: usize) -> Option<&PrivateKey> {
        Some(&self.sources.get(rank)?.identity.as_ref()?.private_key)
    }

    /// The policy that the source with this rank wants.
    pub fn policy_of(&self, rank: usize) -> Option<&Policy> {
        Some(&self.sources.get(rank)?.policy)
    }

    /// Whether the source with this rank wants just that.
    pub fn wants(&self, rank: usize, identity: Option<&Identity>, snapshot: &Snapshot) -> bool {
        self.sources.get(rank).is_some_and(|source| {
            let is_known = |peer: &Peer| source.said(&peer.public_key) == Some(peer);
            source.identity.as_ref() == identity
                && source.peers.len() == snapshot.peers.len()
                && snapshot.peers.iter().all(is_known)
                && source.routes == snapshot.routes
                && source.policy == snapshot.policy
        })
    }

    /// Takes what a source says; tells what of the state has changed. An unknown rank says nothing.
    pub fn apply(&mut self, rank: usize, update: Update) -> Changed {
        let Some(source) = self.sources.get_mut(rank) else {
            return Changed::default();
        };
        source.failure = None;
        let (delta, gone) = match update {
            Update::Delta(delta) => {
                let gone = delta.remove.clone();
                (delta, gone)
            }
            Update::Whole { identity, snapshot } => {
                source.identity = None;
                let stay: BTreeSet<&PublicKey> =
                    snapshot.peers.iter().map(|peer| &peer.public_key).collect();
                let known = source.peers.keys();
                let gone = known.filter(|key| !stay.contains(key)).copied().collect();
                let Snapshot {
                    peers,
                    routes,
                    policy,
                } = snapshot;
                let delta = Delta {
                    identity,
                    set: peers,
                    remove: Vec::new(),
                    routes: Some(routes),
                    policy: Some(policy),
                };
                (delta, gone)
            }
        };
        self.take(rank, delta, gone)
    }

    /// Notes that a source could say nothing new. What it said before stays.
    pub fn failed(&mut self, rank: usize, why: String) {
        if let Some(source) = self.sources.get_mut(rank) {
            source.failure = Some(why);
        }
    }

    /// The sources that could say nothing new the last time, each with the reason.
    pub fn failures(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let failing = self.sources.iter();
        failing.filter_map(|source| Some((source.name, source.failure.as_deref()?)))
    }

    fn take(&mut self, rank: usize, delta: Delta, gone: Vec<PublicKey>) -> Changed {
        let switches = self.switches_via(rank, &delta);
        let mut keys: BTreeSet<PublicKey> = gone
            .iter()
            .copied()
            .chain(delta.set.iter().map(|peer| peer.public_key))
            .collect();
        if switches {
            let all = self.sources.iter().flat_map(|source| source.peers.keys());
            keys.extend(all);
        }
        // What each of these peers was, before the source says something else.
        let before: Vec<(PublicKey, Option<Arc<Peer>>)> = keys
            .into_iter()
            .map(|key| (key, self.claimant(&key).cloned()))
            .collect();
        let ranks: Vec<Option<usize>> = before.iter().map(|(key, _)| self.rank(key)).collect();
        if switches {
            self.switch_via();
        }
        let source = &mut self.sources[rank];
        for key in gone {
            source.peers.remove(&key);
            source.said.remove(&key);
        }
        for mut peer in delta.set {
            peer.allowed_ips
                .iter_mut()
                .for_each(|net| *net = net.trunc());
            let peer = Arc::new(peer);
            source.said.remove(&peer.public_key);
            source.peers.insert(peer.public_key, peer.clone());
            if let Some(pool) = &mut self.pool {
                derived::give(pool, source, &peer);
            }
        }
        if let Some(identity) = delta.identity {
            source.identity = Some(identity);
        }
        let routes = delta.routes.is_some();
        source.routes = delta
            .routes
            .unwrap_or_else(|| std::mem::take(&mut source.routes));
        let policy = delta.policy.is_some();
        source.policy = delta
            .policy
            .unwrap_or_else(|| std::mem::take(&mut source.policy));
        let mut changed = Changed::default();
        self.settle(&before, &ranks, &mut changed);
        self.tidy_pool();
        let has_moved = |(key, rank): (&PublicKey, &Option<usize>)| {
            rank.is_some() && self.rank(key).is_some() && self.rank(key) != *rank
        };
        let keys = before.iter().map(|(key, _)| key);
        let moved = keys.zip(&ranks).any(has_moved);
        let identity = self.identity();
        if self.state.identity != identity {
            self.state.identity = identity;
            changed.identity = true;
        }
        if routes {
            let wanted = self.routes();
            let sites: Vec<ViaNet> = via::sites(&wanted).collect();
            let unserved = via::unserved(&wanted);
            let merged = via::ipv4(wanted);
            changed.routes = merged != self.state.routes || sites != self.state.sites;
            self.state.routes = merged;
            self.state.sites = sites;
            self.state.unserved = unserved;
        }
        let derived = self.moves_a_derived_rule(&changed);
        if policy
            || (!self.state.policy.rules.is_empty()
                && (moved || switches || derived || self.moves_an_implied_rule(rank, &changed)))
        {
            let merged = self.policy();
            changed.policy = merged != self.state.policy;
            self.state.policy = merged;
        }
        changed
    }

    /// The first source that names a peer.
    fn rank(&self, key: &PublicKey) -> Option<usize> {
        self.sources
            .iter()
            .position(|source| source.peers.contains_key(key))
    }

    /// What the first source that names a peer wants of it.
    fn claimant(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.sources.iter().find_map(|source| source.peers.get(key))
    }

    /// Brings the peers of the state in line, of which these may have changed.
    fn settle(
        &mut self,
        before: &[(PublicKey, Option<Arc<Peer>>)],
        ranks: &[Option<usize>],
        changed: &mut Changed,
    ) {
        let mut moves = Vec::new();
        // Who had each allowed IP that may change hands.
        let mut had: BTreeMap<IpNet, Option<PublicKey>> = BTreeMap::new();
        for ((key, before), rank) in before.iter().zip(ranks) {
            let now = self.claimant(key).cloned();
            if now == *before && self.rank(key) == *rank {
                continue;
            }
            let (old, new) = (nets(before.as_deref()), nets(now.as_deref()));
            had.extend(old.union(&new).map(|net| (*net, self.holder(net))));
            moves.push((*key, now, old, new));
        }
        let mut affected: BTreeMap<PublicKey, Option<Arc<Peer>>> = BTreeMap::new();
        for (key, now, old, new) in &moves {
            affected.insert(*key, self.state.peers.shared(key).cloned());
            old.difference(new).for_each(|net| self.release(*net, key));
            if let Some(now) = now {
                // Whole for now: it gets a number, by which it can claim.
                self.state.peers.put(now.clone());
            }
        }
        for (key, _, old, new) in &moves {
            new.difference(old).for_each(|net| self.claim(*net, *key));
        }
        for (net, before) in had {
            let holder = self.give(net);
            if holder != before {
                changed.nets.insert(net);
                for key in [before, holder].into_iter().flatten() {
                    let peer = || self.state.peers.shared(&key).cloned();
                    affected.entry(key).or_insert_with(peer);
                }
            }
        }
        for (key, before) in affected {
            let now = self
                .claimant(&key)
                .map(|wanted| self.less_what_others_have(wanted));
            if now == before {
                // What was put in its place meanwhile has to go.
                if let Some(before) = before {
                    self.state.peers.put(before);
                }
                continue;
            }
            changed.peers.insert(key);
            match now {
                Some(now) => self.state.peers.put(now),
                None => self.state.peers.forget(&key),
            }
        }
    }

    /// A peer without the allowed IPs that others have.
    fn less_what_others_have(&self, wanted: &Arc<Peer>) -> Arc<Peer> {
        let has = |net: &IpNet| self.holder(net) == Some(wanted.public_key);
        if wanted.allowed_ips.iter().all(has) {
            return wanted.clone();
        }
        let mut less = Peer::clone(wanted);
        less.allowed_ips.retain(has);
        Arc::new(less)
    }

    /// Who has an allowed IP.
    fn holder(&self, net: &IpNet) -> Option<PublicKey> {
        Some(self.state.peers.owner(net)?.public_key)
    }

    fn release(&mut self, net: IpNet, key: &PublicKey) {
        match self.contested.get_mut(&net) {
            Some(claimants) => _ = claimants.remove(key),
            None => _ = self.state.peers.owners.remove(&net),
        }
    }

    fn claim(&mut self, net: IpNet, key: PublicKey) {
        if let Some(claimants) = self.contested.get_mut(&net) {
            claimants.insert(key);
        } else if let Some(holder) = self.holder(&net) {
            self.contested.insert(net, BTreeSet::from([holder, key]));
        } else if let Some(number) = self.state.peers.number(&key) {
            self.state.peers.owners.insert(net, number);
        }
    }

    /// Gives an allowed IP to the first of those who claim it, and tells who that is.
    fn give(&mut self, net: IpNet) -> Option<PublicKey> {
        let Some(claimants) = self.contested.get(&net) else {
            return self.holder(&net);
        };
        let first = claimants.iter().min_by_key(|key| (self.rank(key), **key));
        let first = first.copied();
        if claimants.len() < 2 {
            self.contested.remove(&net);
        }
        match first.and_then(|key| self.state.peers.number(&key)) {
            Some(number) => _ = self.state.peers.owners.insert(net, number),
            None => _ = self.state.peers.owners.remove(&net),
        }
        first
    }

    /// The private key of the first source that has one, and the overlay addresses of all.
    fn identity(&self) -> Option<Identity> {
        let mut identities = self
            .sources
            .iter()
            .filter_map(|source| source.identity.as_ref());
        let mut identity = identities.next()?.clone();
        for other in identities {
            let new = other.addresses.iter();
            let known = identity.addresses.clone();
            let new = new.filter(|address| !known.contains(address));
            identity.addresses.extend(new);
        }
        Some(identity)
    }

    fn routes(&self) -> Vec<Route> {
        let mut known = BTreeSet::new();
        let all = self.sources.iter().flat_map(|source| &source.routes);
        all.filter(|route| known.insert(route.cidr))
            .copied()
            .collect()
    }

    /// What sources want and do not get, each with the name of its source.
    pub fn conflicts(&self) -> Vec<(&'static str, Conflict)> {
        let mut conflicts = Vec::new();
        let key = self.state.identity.as_ref().map(|own| &own.private_key);
        for (rank, source) in self.sources.iter().enumerate() {
            let own = source.identity.as_ref().map(|own| &own.private_key);
            if own.is_some() && own != key {
                conflicts.push((source.name, Conflict::PrivateKey));
            }
            if rank > 0 {
                let keys = source.peers.keys();
                let mut lost: Vec<_> = keys.filter(|key| self.rank(key) != Some(rank)).collect();
                lost.sort_unstable();
                let lost = lost.into_iter().map(|key| Conflict::Key(*key));
                conflicts.extend(lost.map(|conflict| (source.name, conflict)));
            }
            let lost = source
                .routes
                .iter()
                .filter(|r| !crate::via::overlaps(&r.cidr) && !self.state.routes.contains(r));
            conflicts.extend(lost.map(|route| (source.name, Conflict::Route(route.cidr))));
        }
        for (net, claimants) in &self.contested {
            let holder = self.holder(net);
            let losers = claimants.iter().filter(|key| Some(**key) != holder);
            conflicts.extend(losers.filter_map(|key| {
                let source = self.sources.get(self.rank(key)?)?;
                Some((source.name, Conflict::Net(*net, *key)))
            }));
        }
        conflicts
    }
}

fn nets(peer: Option<&Peer>) -> BTreeSet<IpNet> {
    let nets = peer.into_iter().flat_map(|peer| &peer.allowed_ips);
    nets.copied().collect()
}

#[cfg(test)]
mod tests;
