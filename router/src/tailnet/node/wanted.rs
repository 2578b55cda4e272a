//! The network map as what a control source wants of the router.
//!
//! After `net/routemanager` of Tailscale's sources. What has changed costs what it is; nothing looks at all peers but
//! [`whole`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::Settings;
use crate::control::{Delta, Identity, Peer, Route, Snapshot, Update};
use crate::tailnet::keys::NodeSecret;
use crate::tailnet::netmap::{Change, Netmap, Node, NodeId};
use crate::tailnet::time::Timestamp;
use crate::wireguard::keys::PublicKey;

/// Everything. `now` is the server's clock.
pub(super) fn whole(key: &NodeSecret, map: &Netmap, settings: &Settings, now: Timestamp) -> Update {
    let rules = Rules::of(settings);
    Update::Whole {
        identity: Some(identity(key, map)),
        snapshot: Snapshot {
            peers: map
                .peers()
                .filter_map(|node| rules.peer(node, map, now))
                .collect(),
            routes: settings.advertise_routes.clone(),
            policy: map.policy().policy,
        },
    }
}

/// A node that takes no part: it lets nobody in and knows nobody.
pub(super) fn nothing(key: &NodeSecret, settings: &Settings) -> Update {
    whole(key, &Netmap::default(), settings, Timestamp(0))
}

/// What has changed of `map`; peers whose keys end by themselves are in `expired`.
pub(super) fn delta(
    key: &NodeSecret,
    map: &Netmap,
    settings: &Settings,
    change: &Change,
    now: Timestamp,
) -> Delta {
    let rules = Rules::of(settings);
    let mut delta = Delta {
        identity: change.own.then(|| identity(key, map)),
        policy: change.filter.then(|| map.policy().policy),
        remove: change.removed.iter().map(|key| (*key).into()).collect(),
        ..Delta::default()
    };
    let mut gone = BTreeSet::new();
    for node in change.set.iter().filter_map(|id| map.peer(*id)) {
        match rules.peer(node, map, now) {
            Some(peer) => delta.set.push(peer),
            None => _ = gone.insert(node.key),
        }
    }
    if !gone.is_empty() {
        // A node that has joined anew can have the key of one that has ended.
        let same = map.peers().filter(|node| gone.contains(&node.key));
        delta
            .set
            .extend(same.filter_map(|node| rules.peer(node, map, now)));
        delta.remove.extend(gone.into_iter().map(PublicKey::from));
    }
    delta
}

/// Whether a delta would say anything.
pub(super) fn is_nothing(delta: &Delta) -> bool {
    *delta == Delta::default()
}

fn identity(key: &NodeSecret, map: &Netmap) -> Identity {
    Identity {
        private_key: key.wireguard().clone(),
        addresses: map
            .own()
            .map(|own| own.addresses.clone())
            .unwrap_or_default(),
    }
}

/// What the settings mean for peers.
struct Rules<'s> {
    accept_routes: bool,
    own_routes: &'s [Route],
}

impl<'s> Rules<'s> {
    fn of(settings: &'s Settings) -> Self {
        Self {
            accept_routes: settings.accept_routes,
            own_routes: &settings.advertise_routes,
        }
    }

    /// A peer, if it can be one.
    fn peer(&self, node: &Node, map: &Netmap, now: Timestamp) -> Option<Peer> {
        let allowed = node.allowed_ips.iter().map(IpNet::trunc);
        let allowed: BTreeSet<IpNet> = allowed.filter(|net| self.takes(node, net)).collect();
        (is_reachable(node, now) && !allowed.is_empty()).then(|| Peer {
            name: Some(name(node, map).to_owned()).filter(|name| !name.is_empty()),
            public_key: node.key.into(),
            preshared_key: None,
            allowed_ips: allowed.into_iter().collect(),
            endpoint: None,
            keepalive: None,
            roaming: false,
            masquerade: masquerade(node, map),
            jailed: node.jailed,
        })
    }

    /// Whether packets for `net` go to the node: always for what is an address of the tailnet, else if routes are
    /// taken and it is nothing that this router leads to itself. Never everything: Sluice uses no exit nodes.
    fn takes(&self, node: &Node, net: &IpNet) -> bool {
        if net.prefix_len() == 0 {
            return false;
        }
        let single = net.prefix_len() == net.max_prefix_len();
        if (single && is_tailnets(net.addr())) || node.addresses.contains(net) {
            return true;
        }
        let leads_there = |route: &Route| route.cidr.contains(net);
        self.accept_routes && !self.own_routes.iter().any(leads_there)
    }
}

/// Our addresses, each with the one by which the node knows it.
fn masquerade(node: &Node, map: &Netmap) -> Vec<(IpAddr, IpAddr)> {
    let known = [node.masquerade4, node.masquerade6].into_iter().flatten();
    let own = |known: IpAddr| {
        let own = map.own()?.addresses.iter().map(IpNet::addr);
        let mut own = own.filter(|own| own.is_ipv4() == known.is_ipv4());
        Some((own.next()?, known))
    };
    known.filter_map(own).collect()
}

/// Whether anything can be sent to the node: its key is good, and it speaks what we do.
pub(super) fn is_reachable(node: &Node, now: Timestamp) -> bool {
    let speaks = node.disco.is_some() || node.home_derp != 0 || node.wireguard_only;
    speaks && !node.is_expired(now)
}

/// Addresses that Tailscale gives out.
fn is_tailnets(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let [first, second, ..] = address.octets();
            first == 100 && second & 0xc0 == 64
        }
        IpAddr::V6(address) => address.segments()[..3] == [0xfd7a, 0x115c, 0xa1e0],
    }
}

/// The name without the tailnet's.
fn name<'n>(node: &'n Node, map: &Netmap) -> &'n str {
    let full = node.name.trim_end_matches('.');
    let short = full.strip_suffix(map.magic_dns_suffix());
    short
        .and_then(|name| name.strip_suffix('.'))
        .unwrap_or(full)
}

/// When peers' keys end, so that nobody looks at all peers to find the one that is due.
#[derive(Debug, Default)]
pub(super) struct Expiries {
    by_node: BTreeMap<NodeId, Timestamp>,
    by_time: BTreeSet<(Timestamp, NodeId)>,
    /// Those that have come, which a clock that is put back takes back.
    ended: BTreeSet<(Timestamp, NodeId)>,
}

impl Expiries {
    /// Those of a whole map.
    pub(super) fn of(map: &Netmap) -> Self {
        let mut expiries = Self::default();
        map.peers()
            .for_each(|node| expiries.note(node.id, Some(node)));
        expiries
    }

    /// What has changed.
    pub(super) fn follow(&mut self, map: &Netmap, change: &Change) {
        change
            .set
            .iter()
            .for_each(|id| self.note(*id, map.peer(*id)));
        if !change.removed.is_empty() {
            let by_node = &mut self.by_node;
            self.ended.retain(|(_, id)| {
                let stays = map.peer(*id).is_some();
                if !stays {
                    by_node.remove(id);
                }
                stays
            });
        }
    }

    fn note(&mut self, id: NodeId, node: Option<&Node>) {
        if let Some(old) = self.by_node.remove(&id) {
            self.by_time.remove(&(old, id));
            self.ended.remove(&(old, id));
        }
        let expiry = node
            .filter(|node| !node.expired)
            .and_then(|node| node.key_expiry);
        if let Some(expiry) = expiry {
            self.by_node.insert(id, expiry);
            self.by_time.insert((expiry, id));
        }
    }

    /// When the next one is due, by the server's clock.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// A node whose key has ended.
    pub(super) fn pop(&mut self, now: Timestamp) -> Option<NodeId> {
        let (at, id) = *self.by_time.first()?;
        (at <= now).then(|| {
            self.by_time.pop_first();
            self.ended.insert((at, id));
            id
        })
    }

    /// A node whose key had ended by a clock that was wrong.
    pub(super) fn take_back(&mut self, now: Timestamp) -> Option<NodeId> {
        let (at, id) = *self.ended.last()?;
        (at > now).then(|| {
            self.ended.pop_last();
            self.by_time.insert((at, id));
            id
        })
    }

    /// Whether a clock that is put back would mean something.
    pub(super) fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }
}

/// Takes `next` behind `change`.
pub(super) fn merge(change: &mut Change, next: Change) {
    change.own |= next.own;
    change.filter |= next.filter;
    change.derp |= next.derp;
    change.health |= next.health;
    change.names |= next.names;
    change.set.extend(next.set);
    change.removed.extend(next.removed);
}

#[cfg(test)]
mod tests;
