//! What is wanted, held so that a change costs as much as what changes.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Identity, Peer, Policy, Route};
use crate::via::ViaNet;
use crate::wireguard::keys::PublicKey;

/// So many numbers of former peers rest before one is given again: who still counts by the number of
/// one that has just gone must not take the next peer for it.
const RESTING: usize = 64;

/// Everything that is wanted of the router beside the settings of the machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Who the router is; `None` until a source has said so.
    pub identity: Option<Identity>,
    /// The peers.
    pub peers: Peers,
    /// Advertised routes, each CIDR once; IPv4 ones in the place of those to sites (4via6).
    pub routes: Vec<Route>,
    /// The sites' networks that peers reach by IPv6, in the order of their sources.
    pub sites: Vec<ViaNet>,
    /// Routes to sites that are none: of several sites at once, or to what is never reached.
    pub unserved: Vec<IpNet>,
    /// What peers may reach.
    pub policy: Policy,
}

impl State {
    /// The router's own overlay addresses.
    pub fn addresses(&self) -> &[IpNet] {
        self.identity.as_ref().map_or(&[], |own| &own.addresses)
    }
}

/// What of a [`State`] is not as it was. What it is now stands in the state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The identity.
    pub identity: bool,
    /// Peers that came, went or changed.
    pub peers: BTreeSet<PublicKey>,
    /// Allowed IPs that are another peer's now, or came or went.
    pub nets: BTreeSet<IpNet>,
    /// The routes.
    pub routes: bool,
    /// The policy.
    pub policy: bool,
}

impl Changed {
    /// Whether all is as before.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// The peers that went: `state` is what is wanted now.
    pub fn gone<'c>(&'c self, state: &'c State) -> impl Iterator<Item = PublicKey> + 'c {
        let gone = self.peers.iter();
        gone.filter(move |key| state.peers.get(key).is_none())
            .copied()
    }
}

/// The peers, each with a number from one on that it keeps as long as it stays.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    numbers: HashMap<PublicKey, u32>,
    /// By number less one.
    list: Vec<Option<Arc<Peer>>>,
    /// Numbers of former peers, the one that went first in front.
    free: VecDeque<u32>,
    pub(super) owners: BTreeMap<IpNet, u32>,
}

impl Peers {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// All of them, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.list.iter().flatten().map(Arc::as_ref)
    }

    /// The peer with this public key.
    pub fn get(&self, key: &PublicKey) -> Option<&Peer> {
        self.numbered(self.number(key)?)
    }

    /// The peer with this number.
    pub fn numbered(&self, number: u32) -> Option<&Peer> {
        let place = (number as usize).checked_sub(1)?;
        self.list.get(place)?.as_deref()
    }

    /// The peer with this public key, to be shared.
    pub(super) fn shared(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        let place = self.number(key)? as usize - 1;
        self.list.get(place)?.as_ref()
    }

    /// The number of the peer with this public key.
    pub fn number(&self, key: &PublicKey) -> Option<u32> {
        self.numbers.get(key).copied()
    }

    /// Every allowed IP, with the number of the peer whose it is.
    pub fn allowed_ips(&self) -> &BTreeMap<IpNet, u32> {
        &self.owners
    }

    /// The peer that has exactly this allowed IP.
    pub fn owner(&self, net: &IpNet) -> Option<&Peer> {
        self.numbered(*self.owners.get(net)?)
    }

    /// The peer that an overlay address is of.
    pub fn at(&self, address: IpAddr) -> Option<&Peer> {
        let number = self.around(IpNet::from(address)).next()?;
        self.numbered(number)
    }

    /// The peers of which an allowed IP holds `net` or lies within it; some more than once.
    pub fn overlapping(&self, net: IpNet) -> impl Iterator<Item = &Peer> {
        // Sorted, a network stands before all that it holds.
        let within = self.owners.range(net..);
        let within = within.take_while(move |(inner, _)| net.contains(*inner));
        let within = within.map(|(_, number)| *number);
        let numbers = self.around(net).chain(within);
        numbers.filter_map(|number| self.numbered(number))
    }

    /// The numbers of the peers that `net` lies within an allowed IP of, the longest prefix first.
    fn around(&self, net: IpNet) -> impl Iterator<Item = u32> {
        let outer = (0..=net.prefix_len()).rev();
        let outer = outer.filter_map(move |length| IpNet::new(net.addr(), length).ok());
        outer.filter_map(|outer| self.owners.get(&outer.trunc()).copied())
    }

    /// The number of a peer, which it gets if it has none.
    fn number_of(&mut self, key: PublicKey) -> u32 {
        if let Some(number) = self.numbers.get(&key) {
            return *number;
        }
        let rested = self.free.len() > RESTING;
        let number = rested.then(|| self.free.pop_front()).flatten();
        let number = number.unwrap_or_else(|| {
            self.list.push(None);
            u32::try_from(self.list.len()).unwrap_or(u32::MAX)
        });
        self.numbers.insert(key, number);
        number
    }

    /// Has the peer with this key be as given. Its allowed IPs are a matter of `owners`.
    pub(super) fn put(&mut self, peer: Arc<Peer>) {
        let number = self.number_of(peer.public_key);
        if let Some(place) = self.list.get_mut(number as usize - 1) {
            *place = Some(peer);
        }
    }

    /// Forgets a peer, which has no allowed IPs any more.
    pub(super) fn forget(&mut self, key: &PublicKey) {
        if let Some(number) = self.numbers.remove(key) {
            if let Some(place) = self.list.get_mut(number as usize - 1) {
                *place = None;
            }
            self.free.push_back(number);
        }
    }
}

impl PartialEq for Peers {
    /// Whether the same peers have the same allowed IPs; their numbers are a matter of history.
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len()
            && (self.iter()).all(|peer| other.get(&peer.public_key) == Some(peer))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn peer(key: u8, nets: &[&str]) -> Arc<Peer> {
        Arc::new(Peer {
            name: None,
            public_key: PublicKey([key; 32]),
            preshared_key: None,
            allowed_ips: nets.iter().map(|net| net.parse().unwrap()).collect(),
            endpoint: None,
            keepalive: None,
            roaming: true,
            masquerade: Vec::new(),
            jailed: false,
        })
    }

    fn peers(list: &[(u8, &[&str])]) -> Peers {
        let mut peers = Peers::default();
        for (key, nets) in list {
            let peer = peer(*key, nets);
            peers.put(peer.clone());
            let number = peers.number(&peer.public_key).unwrap();
            let nets = peer.allowed_ips.iter().map(|net| (*net, number));
            peers.owners.extend(nets);
        }
        peers
    }

    #[test]
    fn a_peer_keeps_its_number_and_that_of_a_former_one_rests() {
        let mut peers = peers(&[(7, &[]), (8, &[]), (9, &[])]);
        let numbers = |peers: &Peers| {
            let keys = peers.iter().map(|peer| peer.public_key);
            let numbers = keys.filter_map(|key| Some((key.0[0], peers.number(&key)?)));
            numbers.collect::<Vec<_>>()
        };
        assert_eq!(numbers(&peers), [(7, 1), (8, 2), (9, 3)]);
        peers.forget(&PublicKey([8; 32]));
        peers.forget(&PublicKey([8; 32]));
        peers.put(peer(5, &[]));
        assert_eq!(numbers(&peers), [(7, 1), (9, 3), (5, 4)]);
        for key in 100..100 + RESTING as u8 {
            peers.put(peer(key, &[]));
            peers.forget(&PublicKey([key; 32]));
        }
        peers.put(peer(6, &[]));
        assert_eq!(peers.number(&PublicKey([6; 32])), Some(2));
        assert_eq!(peers.numbered(2).map(|peer| peer.public_key.0[0]), Some(6));
        assert_eq!(peers.numbered(0), None);
    }

    #[test]
    fn whose_an_address_is_and_what_overlaps_are_found() {
        let peers = peers(&[
            (1, &["10.0.0.0/8", "fd00::/64"]),
            (2, &["10.1.0.0/16"]),
            (3, &["10.1.2.3/32", "0.0.0.0/0"]),
        ]);
        let at = |address: &str| {
            peers
                .at(address.parse().unwrap())
                .map(|p| p.public_key.0[0])
        };
        for (address, key) in [
            ("10.9.9.9", Some(1)),
            ("10.1.9.9", Some(2)),
            ("10.1.2.3", Some(3)),
            ("11.0.0.1", Some(3)),
            ("fd00::7", Some(1)),
            ("fd01::7", None),
        ] {
            assert_eq!(at(address), key, "{address}");
        }
        let overlapping = |net: &str| {
            let found = peers.overlapping(net.parse().unwrap());
            let found: BTreeSet<u8> = found.map(|peer| peer.public_key.0[0]).collect();
            found.into_iter().collect::<Vec<_>>()
        };
        assert_eq!(overlapping("10.1.0.0/16"), [1, 2, 3]);
        assert_eq!(overlapping("10.2.0.0/16"), [1, 3]);
        assert_eq!(overlapping("192.0.2.0/24"), [3]);
        assert_eq!(overlapping("fd00::/16"), [1]);
        assert_eq!(overlapping("2001:db8::/32"), [0; 0]);
    }
}
