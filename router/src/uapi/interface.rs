//! What a device is configured to be, and how a `set` changes it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;

use ipnet::IpNet;

use super::{AllowedIp, Errno, PeerSet, PeerState, Refusal, Set, State};
use crate::engine::{PeerSpec, PeerStats};
use crate::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::wireguard::message::is_low_order;

/// The configuration of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// The private key; without one the device is silent.
    pub private_key: Option<PrivateKey>,
    /// Firewall mark; 0 for none.
    pub fwmark: u32,
    peers: HashMap<PublicKey, Peer>,
    /// The place of the next new peer.
    next: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Peer {
    /// Peers are shown in the order in which they came. No place is given twice.
    place: u64,
    preshared_key: Option<PresharedKey>,
    endpoint: Option<SocketAddr>,
    keepalive: u16,
    allowed_ips: BTreeSet<IpNet>,
}

/// What a `set` makes of an [`Interface`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edited {
    /// The configuration from now on.
    pub interface: Interface,
    /// The port to listen on from now on, if it shall change.
    pub listen_port: Option<u16>,
    /// Endpoints that were named, whatever they were before: peers may have roamed away.
    pub endpoints: Vec<(PublicKey, SocketAddr)>,
    /// Peers that went and came again: nothing of them is to stay, be it a session or a counter.
    pub renewed: HashSet<PublicKey>,
}

impl Edited {
    /// Those of the peers `before` that keep session and counters; `None`: all. The others must be
    /// gone before a new private key and new peers come: that key may be a former peer's, and a new
    /// peer's the old one.
    pub fn staying(&self, before: &Interface) -> Option<Vec<PeerSpec>> {
        let own = self.interface.private_key.as_ref().map(PrivateKey::public);
        let mut staying = before.specs();
        let all = staying.len();
        staying.retain(|peer| {
            Some(peer.public_key) != own && !self.renewed.contains(&peer.public_key)
        });
        (staying.len() < all).then_some(staying)
    }
}

impl Interface {
    /// A device with this key, mark and peers, each public key once.
    pub fn new(
        private_key: PrivateKey,
        fwmark: u32,
        peers: impl IntoIterator<Item = PeerSpec>,
    ) -> Self {
        let peers = (1..).zip(peers).map(|(place, spec)| {
            let peer = Peer {
                place,
                preshared_key: spec.preshared_key,
                endpoint: spec.endpoint,
                keepalive: spec.keepalive.unwrap_or(0),
                allowed_ips: spec.allowed_ips.into_iter().collect(),
            };
            (spec.public_key, peer)
        });
        let peers: HashMap<PublicKey, Peer> = peers.collect();
        Self {
            private_key: Some(private_key),
            fwmark,
            next: peers.len() as u64,
            peers,
        }
    }

    /// This with none of the peers but those that a `set` may change: whom it names, and whoever loses
    /// allowed IPs to them. With all where it replaces them or changes the key.
    pub fn part(&self, set: &Set) -> Self {
        if set.replace_peers || set.private_key.is_some() {
            return self.clone();
        }
        let named: HashSet<PublicKey> = set.peers.iter().map(|peer| peer.public_key).collect();
        let changes = set.peers.iter().flat_map(|peer| &peer.allowed_ips);
        let added: Vec<IpNet> = changes
            .filter_map(|change| match change {
                AllowedIp::Add(cidr) => Some(*cidr),
                AllowedIp::Remove(_) | AllowedIp::Clear => None,
            })
            .collect();
        let peers = self.peers.iter().filter(|(key, peer)| {
            named.contains(*key) || added.iter().any(|cidr| peer.allowed_ips.contains(cidr))
        });
        Self {
            private_key: self.private_key.clone(),
            fwmark: self.fwmark,
            peers: peers.map(|(key, peer)| (*key, peer.clone())).collect(),
            next: self.next,
        }
    }

    /// Takes what has become of a part of it.
    pub fn put(&mut self, part: &Self, edited: Self) {
        for key in part.peers.keys() {
            self.peers.remove(key);
        }
        self.peers.extend(edited.peers);
        self.private_key = edited.private_key;
        self.fwmark = edited.fwmark;
        self.next = edited.next;
    }

    /// Carries out a `set` on a copy. On error nothing is to change.
    pub fn edit(&self, set: &Set) -> Result<Edited, Refusal> {
        let mut new = self.clone();
        if let Some(key) = &set.private_key {
            new.private_key.clone_from(key);
        }
        new.fwmark = set.fwmark.unwrap_or(new.fwmark);
        let own = new.private_key.as_ref().map(PrivateKey::public);
        if set.replace_peers {
            new.peers.clear();
        } else if let Some(own) = &own {
            // As the kernel has it: a device is not a peer of itself.
            new.peers.remove(own);
        }
        let mut owners: HashMap<IpNet, PublicKey> = HashMap::new();
        if set.peers.iter().any(|peer| !peer.allowed_ips.is_empty()) {
            for (key, peer) in &new.peers {
                owners.extend(peer.allowed_ips.iter().map(|cidr| (*cidr, *key)));
            }
        }
        let mut endpoints = HashMap::new();
        for peer in &set.peers {
            if own == Some(peer.public_key) {
                continue;
            }
            if is_low_order(&peer.public_key.0) {
                let reason = format!(
                    "peer {}: this public key is of small order and protects nothing",
                    peer.public_key
                );
                return Err(Refusal::new(Errno::Invalid, reason));
            }
            if !new.edit_peer(peer, &mut owners) {
                endpoints.remove(&peer.public_key);
            } else if let Some(endpoint) = peer.endpoint {
                endpoints.insert(peer.public_key, endpoint);
            }
        }
        let renewed = new.peers.iter().filter(|(key, peer)| {
            let before = self.peers.get(*key);
            before.is_some_and(|before| before.place != peer.place)
        });
        Ok(Edited {
            renewed: renewed.map(|(key, _)| *key).collect(),
            interface: new,
            listen_port: set.listen_port,
            endpoints: endpoints.into_iter().collect(),
        })
    }

    /// False when there is no such peer afterwards.
    fn edit_peer(&mut self, set: &PeerSet, owners: &mut HashMap<IpNet, PublicKey>) -> bool {
        let key = set.public_key;
        if set.remove {
            if let Some(peer) = self.peers.remove(&key) {
                disown(&peer, owners);
            }
            return false;
        }
        if set.update_only && !self.peers.contains_key(&key) {
            return false;
        }
        let peer = self.peers.entry(key).or_insert_with(|| {
            self.next += 1;
            Peer {
                place: self.next,
                preshared_key: None,
                endpoint: None,
                keepalive: 0,
                allowed_ips: BTreeSet::new(),
            }
        });
        if let Some(preshared_key) = &set.preshared_key {
            peer.preshared_key.clone_from(preshared_key);
        }
        peer.endpoint = set.endpoint.or(peer.endpoint);
        peer.keepalive = set.keepalive.unwrap_or(peer.keepalive);
        for change in &set.allowed_ips {
            self.change_allowed_ip(key, *change, owners);
        }
        true
    }

    fn change_allowed_ip(
        &mut self,
        key: PublicKey,
        change: AllowedIp,
        owners: &mut HashMap<IpNet, PublicKey>,
    ) {
        if let AllowedIp::Add(cidr) = change
            && let Some(owner) = owners.insert(cidr, key)
            && let Some(loser) = self.peers.get_mut(&owner)
        {
            loser.allowed_ips.remove(&cidr);
        }
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        match change {
            AllowedIp::Add(cidr) => {
                peer.allowed_ips.insert(cidr);
            }
            AllowedIp::Remove(cidr) => {
                if peer.allowed_ips.remove(&cidr) {
                    owners.remove(&cidr);
                }
            }
            AllowedIp::Clear => {
                disown(peer, owners);
                peer.allowed_ips.clear();
            }
        }
    }

    fn in_order(&self) -> Vec<(&PublicKey, &Peer)> {
        let mut peers: Vec<_> = self.peers.iter().collect();
        peers.sort_unstable_by_key(|(_, peer)| peer.place);
        peers
    }

    /// The peers as the engine takes them. None without a private key: there is nobody whose
    /// peers they could be.
    pub fn specs(&self) -> Vec<PeerSpec> {
        let peers = self.in_order().into_iter();
        peers
            .filter(|_| self.private_key.is_some())
            .map(|(key, peer)| PeerSpec {
                public_key: *key,
                preshared_key: peer.preshared_key.clone(),
                allowed_ips: peer.allowed_ips.iter().copied().collect(),
                endpoint: peer.endpoint,
                others: Vec::new(),
                keepalive: Some(peer.keepalive).filter(|seconds| *seconds > 0),
                masquerade: Vec::new(),
                roaming: true,
            })
            .collect()
    }

    /// What a `get` shows, with the port in use and what the engine knows of the peers.
    pub fn state(&self, listen_port: u16, stats: Vec<PeerStats>) -> State {
        let stats: HashMap<PublicKey, PeerStats> = stats
            .into_iter()
            .map(|stats| (stats.public_key, stats))
            .collect();
        let peers = self.in_order().into_iter().map(|(key, peer)| {
            let stats = stats.get(key);
            PeerState {
                public_key: *key,
                preshared_key: peer.preshared_key.clone(),
                endpoint: stats.map_or(peer.endpoint, |stats| stats.endpoint()),
                last_handshake: stats.and_then(|stats| stats.last_handshake),
                tx_bytes: stats.map_or(0, |stats| stats.tx_bytes),
                rx_bytes: stats.map_or(0, |stats| stats.rx_bytes),
                keepalive: peer.keepalive,
                allowed_ips: peer.allowed_ips.iter().copied().collect(),
            }
        });
        State {
            private_key: self.private_key.clone(),
            listen_port,
            fwmark: self.fwmark,
            peers: peers.collect(),
        }
    }
}

fn disown(peer: &Peer, owners: &mut HashMap<IpNet, PublicKey>) {
    for cidr in &peer.allowed_ips {
        owners.remove(cidr);
    }
}

#[cfg(test)]
mod tests;
