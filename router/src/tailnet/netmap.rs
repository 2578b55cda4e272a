//! The network map: what the coordination server has told so far.
//!
//! [`Netmap::apply`] takes responses in their order and tells what each has changed, so that the rest of the router
//! does what the change costs and no more. After `control/controlclient/map.go` of Tailscale's sources. It
//! serializes, for the state directory: a router that starts while the server is away goes on with the last map.

mod node;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use node::{Node, NodeId};

use crate::tailnet::filter::{self, Compiled};
use crate::tailnet::keys::{DiscoPublic, NodePublic};
use crate::tailnet::time::Timestamp;
use crate::tailnet::wire::{
    DerpMap, DisplayMessage, FilterRule, List, MapResponse, UserProfile, each, entries,
};

/// A response that cannot be the first of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server's first map does not say who this node is")]
pub struct NoSelf;

/// Whoever has this toward a node may carry datagrams for it.
const RELAY_TARGET: &str = "tailscale.com/cap/relay-target";
/// Whoever has this toward a node may have it carry datagrams.
const RELAY: &str = "tailscale.com/cap/relay";
/// A node with this uses no peer relays.
const NO_RELAYS: &str = "disable-relay-client";
/// A node with this is no peer relay.
const NO_RELAY: &str = "disable-relay-server";

/// What a response has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Something of the node itself.
    pub own: bool,
    /// Peers that are new or have changed.
    pub set: BTreeSet<NodeId>,
    /// Keys that no peer has any more: of peers that are gone, or have another key now.
    pub removed: BTreeSet<NodePublic>,
    /// The packet filter, or who has a capability that it names.
    pub filter: bool,
    /// The relays.
    pub derp: bool,
    /// What the server finds wrong.
    pub health: bool,
    /// Names of users, the tailnet, or tailnet lock.
    pub names: bool,
}

impl Change {
    /// Whether nothing has.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The map. A clone shares what there is much of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Netmap {
    own: Option<Node>,
    peers: BTreeMap<NodeId, Arc<Node>>,
    filters: BTreeMap<String, Arc<List<FilterRule>>>,
    /// The capabilities that the filters name as sources. A stream begins with the filters, so it need not be kept.
    #[serde(skip)]
    named: BTreeSet<String>,
    derp: Arc<DerpMap>,
    users: BTreeMap<i64, Arc<UserProfile>>,
    health: Vec<String>,
    messages: BTreeMap<String, DisplayMessage>,
    domain: String,
    /// Search domains, MagicDNS's first.
    search: Vec<String>,
    /// Tailnet lock is on.
    locked: bool,
}

impl Netmap {
    /// The node itself; `None` before the first map.
    pub fn own(&self) -> Option<&Node> {
        self.own.as_ref()
    }

    /// All peers.
    pub fn peers(&self) -> impl Iterator<Item = &Node> {
        self.peers.values().map(Arc::as_ref)
    }

    /// A peer.
    pub fn peer(&self, id: NodeId) -> Option<&Node> {
        self.peers.get(&id).map(Arc::as_ref)
    }

    /// The relays, without those that are null.
    pub fn derp(&self) -> &Arc<DerpMap> {
        &self.derp
    }

    /// The name of a user.
    pub fn user(&self, id: i64) -> Option<&UserProfile> {
        self.users.get(&id).map(Arc::as_ref)
    }

    /// What the server finds wrong, for people.
    pub fn health(&self) -> impl Iterator<Item = String> {
        let messages = self.messages.values().map(|message| {
            let part = |text: &Option<String>| text.clone().unwrap_or_default();
            match (part(&message.title), part(&message.text)) {
                (title, text) if text.is_empty() => title,
                (title, text) if title.is_empty() => text,
                (title, text) => format!("{title}: {text}"),
            }
        });
        self.health.iter().cloned().chain(messages)
    }

    /// The tailnet's name.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The domain of the nodes' names.
    pub fn magic_dns_suffix(&self) -> &str {
        let name = self.own.as_ref().map_or("", |own| own.name.as_str());
        let own = name.trim_end_matches('.').split_once('.');
        own.map_or_else(
            || self.search.first().map_or("", String::as_str),
            |(_, suffix)| suffix,
        )
    }

    /// Whether tailnet lock is on: peers then believe only nodes that are signed.
    pub fn is_locked(&self) -> bool {
        self.locked
    }

    /// The packet filter as policy.
    pub fn policy(&self) -> Compiled {
        filter::compile(self.rules(), &|cap| self.holders(cap))
    }

    fn rules(&self) -> impl Iterator<Item = &FilterRule> {
        self.filters.values().flat_map(|rules| rules.iter())
    }

    /// The addresses of the peers that have a capability.
    fn holders(&self, cap: &str) -> Vec<IpNet> {
        let holders = self.peers.values().filter(|peer| peer.caps.contains(cap));
        holders
            .flat_map(|peer| peer.addresses.iter().copied())
            .collect()
    }

    /// Peers that may carry datagrams between this node and others: the filter grants them that toward this node.
    /// Looks at all peers, if there is such a grant.
    pub fn peer_relays(&self) -> BTreeSet<NodePublic> {
        match self
            .own
            .as_ref()
            .is_some_and(|own| own.caps.contains(NO_RELAYS))
        {
            true => BTreeSet::new(),
            false => self.granted(RELAY_TARGET, Node::knows_relays),
        }
    }

    /// Peers for which this node may carry datagrams: the filter grants them that toward this node. Looks at all peers,
    /// if there is such a grant.
    pub fn relay_clients(&self) -> BTreeSet<NodePublic> {
        self.granted(RELAY, |_| true)
    }

    /// Whether the tailnet lets this node be a peer relay.
    pub fn may_relay(&self) -> bool {
        self.own
            .as_ref()
            .is_some_and(|own| !own.caps.contains(NO_RELAY))
    }

    /// Peers that are `fit` and have a capability toward this node, by the filter.
    fn granted(&self, cap: &str, fit: impl Fn(&Node) -> bool) -> BTreeSet<NodePublic> {
        let Some(own) = &self.own else {
            return BTreeSet::new();
        };
        // As Tailscale's client: of each family the first address counts.
        let own_of = |v4: bool| {
            let mut addresses = own.addresses.iter().map(IpNet::addr);
            addresses.find(|address| address.is_ipv4() == v4)
        };
        let families = [true, false].map(own_of);
        let grants = |rule: &FilterRule, own: IpAddr| {
            each(&rule.cap_grant).any(|grant| {
                let map = grant.cap_map.iter().flat_map(|map| map.0.iter());
                let named = each(&grant.caps).chain(map).any(|other| other == cap);
                let contains =
                    |net: &String| net.parse().is_ok_and(|net: IpNet| net.contains(&own));
                named && each(&grant.dsts).any(contains)
            })
        };
        let granted = families.into_iter().flatten().flat_map(|own| {
            let rules = self.rules().filter(move |rule| grants(rule, own));
            let sources = rules.flat_map(|rule| filter::sources(rule, &|cap| self.holders(cap)));
            sources.filter(move |net| net.addr().is_ipv4() == own.is_ipv4())
        });
        let granted: Vec<IpNet> = granted.collect();
        if granted.is_empty() {
            return BTreeSet::new();
        }
        let holders = self.peers.values().filter(|peer| {
            let mut addresses = peer.addresses.iter();
            fit(peer)
                && peer.signed
                && addresses.any(|own| granted.iter().any(|net| net.contains(own)))
        });
        holders.map(|peer| peer.key).collect()
    }

    /// Takes a response that is no keep-alive. `first` is whether it is the first of its stream. `now` dates peers
    /// that were seen just now.
    pub fn apply(
        &mut self,
        response: MapResponse,
        first: bool,
        now: Timestamp,
    ) -> Result<Change, NoSelf> {
        if first && response.node.is_none() {
            return Err(NoSelf);
        }
        let mut change = Change::default();
        if let Some(node) = response.node.as_ref().and_then(Node::from_wire) {
            change.own = self.own.as_ref() != Some(&node);
            self.own = Some(node);
        }
        if first {
            // A stream begins with everything: what it leaves out is not there any more.
            change.health |= replace(&mut self.health, Vec::new());
            change.health |= replace(&mut self.messages, BTreeMap::new());
        }
        self.apply_filters(&response, first, &mut change);
        self.apply_peers(&response, first, now, &mut change);
        if !change.removed.is_empty() {
            // A node that has joined anew can have an old one's key under another number.
            for peer in self.peers.values() {
                change.removed.remove(&peer.key);
            }
        }
        if let Some(derp) = response.derp_map {
            change.derp |= self.apply_derp(derp);
        }
        for profile in each(&response.user_profiles) {
            if let Some(id) = profile.id {
                let old = self.users.insert(id, Arc::new(profile.clone()));
                change.names |= old.as_deref() != Some(profile);
            }
        }
        if let Some(health) = response.health {
            change.health |= replace(&mut self.health, health.0);
        }
        if let Some(messages) = response.display_messages {
            change.health |= merge(&mut self.messages, messages);
        }
        if let Some(domain) = response.domain.filter(|domain| !domain.is_empty()) {
            change.names |= replace(&mut self.domain, domain);
        }
        if let Some(dns) = response.dns_config {
            let search = dns.domains.unwrap_or_default().0;
            change.names |= replace(&mut self.search, search);
        }
        if let Some(lock) = response.tka_info {
            let on = lock.head.is_some_and(|head| !head.is_empty()) && lock.disabled != Some(true);
            change.names |= replace(&mut self.locked, on);
        }
        Ok(change)
    }

    /// The order is the protocol's: a list of all peers excludes all else about them.
    fn apply_peers(
        &mut self,
        response: &MapResponse,
        first: bool,
        now: Timestamp,
        change: &mut Change,
    ) {
        if each(&response.peers).next().is_some() {
            let mut gone: BTreeSet<NodeId> = self.peers.keys().copied().collect();
            for node in each(&response.peers).filter_map(Node::from_wire) {
                gone.remove(&node.id);
                self.set(node, change);
            }
            for id in gone {
                self.remove(id, change);
            }
            return;
        }
        if first {
            // A stream begins with all peers, so one without peers means that there are none.
            for id in self.peers.keys().copied().collect::<Vec<_>>() {
                self.remove(id, change);
            }
        }
        for id in each(&response.peers_removed) {
            self.remove(NodeId(*id), change);
        }
        for node in each(&response.peers_changed).filter_map(Node::from_wire) {
            self.set(node, change);
        }
        let number = |text: &String| text.parse().ok().map(NodeId);
        for (id, seen) in entries(&response.peer_seen_change) {
            let seen = seen.then_some(now);
            self.touch(number(id), change, |peer| peer.last_seen = seen);
        }
        for (id, online) in entries(&response.online_change) {
            self.touch(number(id), change, |peer| peer.online = Some(*online));
        }
        for patch in each(&response.peers_changed_patch) {
            self.touch(patch.node_id.map(NodeId), change, |peer| peer.patch(patch));
        }
    }

    /// A disco key that a peer has told through the tunnel (TSMP): it is connected, whatever the server knows.
    pub fn learn_disco(&mut self, id: NodeId, key: DiscoPublic, now: Timestamp) -> Change {
        let mut change = Change::default();
        let is_known = |peer: &Node| peer.disco == Some(key) && peer.online == Some(true);
        if !self.peer(id).is_none_or(is_known) {
            self.touch(Some(id), &mut change, |peer| {
                peer.disco = Some(key);
                peer.online = Some(true);
                peer.last_seen = Some(now);
            });
        }
        change
    }

    fn set(&mut self, mut node: Node, change: &mut Change) {
        let old = self.peers.get(&node.id).map(Arc::as_ref);
        if let Some(old) = old {
            node.keep_newer_disco(old);
            if *old == node {
                return;
            }
        }
        self.note(old, Some(&node), change);
        self.peers.insert(node.id, Arc::new(node));
    }

    fn remove(&mut self, id: NodeId, change: &mut Change) {
        if let Some(old) = self.peers.remove(&id) {
            self.note(Some(&*old), None, change);
        }
    }

    /// Changes a peer, if there is one of this number.
    fn touch(&mut self, id: Option<NodeId>, change: &mut Change, edit: impl FnOnce(&mut Node)) {
        let Some(old) = id.and_then(|id| self.peers.get(&id)) else {
            return;
        };
        let mut node = Node::clone(old);
        edit(&mut node);
        if **old != node {
            self.note(Some(old), Some(&node), change);
            self.peers.insert(node.id, Arc::new(node));
        }
    }

    /// Notes what a peer was and is.
    fn note(&self, old: Option<&Node>, new: Option<&Node>, change: &mut Change) {
        match (old, new) {
            (_, Some(new)) => {
                change.set.insert(new.id);
            }
            (Some(old), None) => {
                change.set.remove(&old.id);
            }
            (None, None) => {}
        }
        if let Some(old) = old.filter(|old| new.is_none_or(|new| new.key != old.key)) {
            change.removed.insert(old.key);
        }
        change.filter |= self.named.iter().any(|cap| {
            let held = |node: Option<&Node>| {
                node.filter(|node| node.caps.contains(cap))
                    .map(|node| node.addresses.clone())
            };
            held(old) != held(new)
        });
    }

    /// The capabilities that the filter names as sources.
    fn named_capabilities(&self) -> BTreeSet<String> {
        let rules = self.filters.values().flat_map(|rules| rules.iter());
        rules
            .flat_map(|rule| each(&rule.src_ips))
            .filter_map(|source| source.strip_prefix("cap:"))
            .map(str::to_owned)
            .collect()
    }

    fn apply_filters(&mut self, response: &MapResponse, first: bool, change: &mut Change) {
        if !first && response.packet_filter.is_none() && response.packet_filters.is_none() {
            return;
        }
        let before = self.filters.clone();
        if first {
            self.filters.clear();
        }
        if let Some(base) = &response.packet_filter {
            self.filters
                .insert("base".to_owned(), Arc::new(base.clone()));
        }
        if let Some(named) = &response.packet_filters {
            let shared = |rules: &Option<List<FilterRule>>| rules.clone().map(Arc::new);
            let named = named
                .iter()
                .map(|(name, rules)| (name.clone(), shared(rules)));
            merge(&mut self.filters, named.collect());
        }
        change.filter |= before != self.filters;
        self.named = self.named_capabilities();
    }

    fn apply_derp(&mut self, mut new: DerpMap) -> bool {
        if new.regions.is_none() {
            new.regions = self.derp.regions.clone();
            new.omit_default_regions = self.derp.omit_default_regions;
        }
        if let Some(regions) = &mut new.regions {
            regions.retain(|_, region| region.is_some());
        }
        match (&mut new.home_params, &self.derp.home_params) {
            (None, old) => new.home_params = old.clone(),
            (Some(params), Some(old)) if params.region_score.is_none() => {
                params.region_score = old.region_score.clone();
            }
            _ => {}
        }
        replace(&mut self.derp, Arc::new(new))
    }
}

/// Puts `new` there, and tells whether it is something else.
fn replace<T: PartialEq>(place: &mut T, new: T) -> bool {
    let changed = *place != new;
    *place = new;
    changed
}

/// Takes named values: null takes one away, `*` with null all, before the others are looked at. Tells whether
/// anything has changed.
fn merge<T: Clone + PartialEq>(
    values: &mut BTreeMap<String, T>,
    named: BTreeMap<String, Option<T>>,
) -> bool {
    let before = values.clone();
    if matches!(named.get("*"), Some(None)) {
        values.clear();
    }
    for (name, value) in named {
        match value {
            _ if name == "*" => {}
            Some(value) => {
                values.insert(name, value);
            }
            None => {
                values.remove(&name);
            }
        }
    }
    *values != before
}

#[cfg(test)]
mod tests;
