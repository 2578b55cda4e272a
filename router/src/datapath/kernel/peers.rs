//! The peers' addresses, each with its peer's number: sets of single addresses, which change one by one, and sets
//! of ranges, which are few and are written anew. An address is looked for in the first ones, then in the
//! others.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::span::{Family, Span, holds, partition, span, union};
use crate::datapath::OverlayChange;
use crate::netlink::nft::{Holds, REG, Rule, Transaction};

/// The peers' addresses of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Peers {
    family: Family,
    hosts: BTreeMap<u128, u32>,
    ranges: BTreeMap<IpNet, u32>,
    /// The ranges, merged and in order.
    union: Vec<Span>,
}

/// What becomes of the maps.
#[derive(Debug, Default)]
pub(super) struct Changes {
    remove: Vec<(u128, u32)>,
    add: Vec<(u128, u32)>,
    ranges: bool,
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty() && !self.ranges
    }

    /// Whether other ranges are peers' now, too.
    pub(super) fn ranges(&self) -> bool {
        self.ranges
    }

    /// Whether somebody has lost addresses.
    pub(super) fn take_away(&self) -> bool {
        self.ranges || !self.remove.is_empty()
    }

    /// Single addresses that nobody had before.
    pub(super) fn come(&self) -> impl Iterator<Item = u128> {
        let had: BTreeSet<u128> = self.remove.iter().map(|(address, _)| *address).collect();
        let come = self.add.iter().map(|(address, _)| *address);
        come.filter(move |address| !had.contains(address))
    }
}

/// The names of the sets of addresses: single ones, ranges.
pub(super) fn names(family: Family) -> [&'static str; 2] {
    match family {
        Family::V4 => ["peers4", "peer_ranges4"],
        Family::V6 => ["peers6", "peer_ranges6"],
    }
}

/// The names of the maps from addresses to peers' numbers: single addresses, ranges.
pub(super) fn map_names(family: Family) -> [&'static str; 2] {
    match family {
        Family::V4 => ["peer_of4", "peer_of_ranges4"],
        Family::V6 => ["peer_of6", "peer_of_ranges6"],
    }
}

/// The names of the sets of peers' numbers with their addresses: single ones, ranges.
pub(super) fn pair_names(family: Family) -> [&'static str; 2] {
    match family {
        Family::V4 => ["peer_has4", "peer_has_ranges4"],
        Family::V6 => ["peer_has6", "peer_has_ranges6"],
    }
}

/// Of more ranges the kernel would take long to make a set of pairs; then whose is whose is not asked.
const MOST: usize = 4096;

impl Peers {
    pub(super) fn new(overlay: &BTreeMap<IpNet, u32>, family: Family) -> Self {
        let mut peers = Self {
            family,
            hosts: BTreeMap::new(),
            ranges: BTreeMap::new(),
            union: Vec::new(),
        };
        for (net, peer) in overlay {
            match peers.host(net) {
                Some(Ok(address)) => {
                    peers.hosts.insert(address, *peer);
                }
                Some(Err(net)) => {
                    peers.ranges.insert(net, *peer);
                }
                None => {}
            }
        }
        peers.union = union(peers.ranges.keys(), family);
        peers
    }

    /// The address of a CIDR of this family if it is a single one.
    fn host(&self, net: &IpNet) -> Option<Result<u128, IpNet>> {
        let (first, last) = span(net, self.family)?;
        Some(if first == last { Ok(first) } else { Err(*net) })
    }

    /// Carries `change` out, and yields what is to be done to the maps.
    pub(super) fn change(&mut self, change: &OverlayChange) -> Changes {
        // By CIDR, what it is in the end.
        let removed = change.remove.iter().map(|net| (net, None));
        let set = change.set.iter().map(|(net, peer)| (net, Some(*peer)));
        let last: BTreeMap<&IpNet, Option<u32>> = removed.chain(set).collect();
        let mut changes = Changes::default();
        for (net, peer) in last {
            match self.host(net) {
                Some(Ok(address)) => {
                    let before = match peer {
                        Some(peer) => self.hosts.insert(address, peer),
                        None => self.hosts.remove(&address),
                    };
                    if before != peer {
                        changes.remove.extend(before.map(|peer| (address, peer)));
                        changes.add.extend(peer.map(|peer| (address, peer)));
                    }
                }
                Some(Err(net)) => {
                    let before = match peer {
                        Some(peer) => self.ranges.insert(net, peer),
                        None => self.ranges.remove(&net),
                    };
                    changes.ranges |= before != peer;
                }
                None => {}
            }
        }
        if changes.ranges {
            self.union = union(self.ranges.keys(), self.family);
        }
        changes
    }

    /// Whether an address is a peer's.
    pub(super) fn hold(&self, address: u128) -> bool {
        self.hosts.contains_key(&address) || holds(&self.union, address)
    }

    /// Single addresses.
    pub(super) fn hosts(&self) -> impl Iterator<Item = u128> {
        self.hosts.keys().copied()
    }

    /// Ranges, merged and in order.
    pub(super) fn ranges(&self) -> &[Span] {
        &self.union
    }

    /// CIDRs of more than one address.
    pub(super) fn nets(&self) -> impl Iterator<Item = &IpNet> {
        self.ranges.keys()
    }

    /// The ranges with their peers: of several that hold an address, the longest prefix counts.
    fn pieces(&self) -> Vec<(Span, u32)> {
        let nets: Vec<(&IpNet, &u32)> = self.ranges.iter().collect();
        let labelled: Vec<(Span, u32)> = nets
            .iter()
            .zip(0..)
            .filter_map(|((net, _), index)| Some((span(net, self.family)?, index)))
            .collect();
        let pieces = partition(&labelled)
            .into_iter()
            .filter_map(|(span, around)| {
                let around = around.iter().filter_map(|index| nets.get(*index as usize));
                let (_, peer) = around.max_by_key(|(net, _)| net.prefix_len())?;
                Some((span, **peer))
            });
        pieces.collect()
    }

    /// Whether sets tell each peer's number with its addresses.
    pub(super) fn are_paired(&self) -> bool {
        self.ranges.len() <= MOST
    }

    /// Writes the sets and the maps.
    pub(super) fn write(&self, tx: &mut Transaction<'_>) {
        let family = self.family;
        let [hosts, ranges] = names(family);
        let count = self.hosts.len();
        tx.host_set(hosts, family, count);
        tx.address_set(ranges, family, &[]);
        let both = [Holds::Single(count), Holds::Ranges];
        for (map, holds) in map_names(family).into_iter().zip(both) {
            tx.number_map(map, family, holds);
        }
        for (set, holds) in pair_names(family).into_iter().zip(both) {
            tx.pair_set(set, family, holds);
        }
        let all = self.hosts.iter().map(|(host, peer)| (*host, *peer));
        self.write_hosts(tx, all);
        self.write_ranges(tx);
    }

    fn write_hosts(
        &self,
        tx: &mut Transaction<'_>,
        hosts: impl Iterator<Item = (u128, u32)> + Clone,
    ) {
        let family = self.family;
        let addresses = hosts.clone().map(|(address, _)| address);
        tx.add_hosts(names(family)[0], family, addresses);
        tx.add_numbers(map_names(family)[0], family, hosts.clone());
        tx.add_pairs(pair_names(family)[0], family, hosts);
    }

    fn write_ranges(&self, tx: &mut Transaction<'_>) {
        let family = self.family;
        let pieces = self.pieces();
        tx.add_spans(names(family)[1], family, &self.union);
        tx.add_ranges(map_names(family)[1], family, &pieces);
        if self.are_paired() {
            tx.add_range_pairs(pair_names(family)[1], family, &pieces);
        }
    }

    /// Makes them right after a change.
    pub(super) fn write_changes(&self, tx: &mut Transaction<'_>, changes: &Changes) {
        let family = self.family;
        let gone = || changes.remove.iter().map(|(address, _)| *address);
        tx.remove_hosts(names(family)[0], family, gone());
        tx.remove_hosts(map_names(family)[0], family, gone());
        tx.remove_pairs(
            pair_names(family)[0],
            family,
            changes.remove.iter().copied(),
        );
        self.write_hosts(tx, changes.add.iter().copied());
        if changes.ranges {
            for names in [names(family), map_names(family), pair_names(family)] {
                tx.empty(names[1]);
            }
            self.write_ranges(tx);
        }
    }
}

/// Writes a rule for each set: of packets whose address, as `load` puts it into [`REG`], is a peer's.
pub(super) fn rules(
    tx: &mut Transaction<'_>,
    chain: &str,
    family: Family,
    load: impl Fn(&mut Rule<'_, '_>),
    then: impl Fn(&mut Rule<'_, '_>),
) {
    for set in names(family) {
        tx.rule(chain, |r| {
            load(r);
            r.lookup(set, REG);
            then(r);
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn any_net() -> impl Strategy<Value = IpNet> {
        (0u32..16, 29u8..=32).prop_map(|(host, len)| {
            let address = std::net::Ipv4Addr::from(0x0a00_0000 + host);
            IpNet::new(address.into(), len).unwrap().trunc()
        })
    }

    proptest! {
        #[test]
        fn changes_make_what_is_made_at_once(
            before in proptest::collection::btree_map(any_net(), 0u32..3, 0..8),
            set in proptest::collection::vec((any_net(), 0u32..3), 0..4),
            remove in proptest::collection::vec(any_net(), 0..4),
        ) {
            let mut peers = Peers::new(&before, Family::V4);
            let mut hosts = peers.hosts.clone();
            let change = OverlayChange { set, remove };
            let mut after = before;
            change.apply(&mut after);
            let changes = peers.change(&change);
            let wanted = Peers::new(&after, Family::V4);
            prop_assert_eq!(&peers, &wanted);
            // As the kernel's map has it, which refuses what is there or is not.
            for (host, peer) in &changes.remove {
                prop_assert_eq!(hosts.remove(host), Some(*peer));
            }
            for (host, peer) in &changes.add {
                prop_assert!(hosts.insert(*host, *peer).is_none());
            }
            prop_assert_eq!(hosts, wanted.hosts);
        }
    }

    #[test]
    fn the_longest_prefix_has_the_address() {
        let overlay = [("10.0.0.0/24", 1), ("10.0.0.0/25", 2), ("10.0.0.7/32", 3)];
        let overlay = overlay.map(|(net, peer)| (net.parse().unwrap(), peer));
        let peers = Peers::new(&overlay.into(), Family::V4);
        let base = 0x0a00_0000;
        assert_eq!(
            peers.pieces(),
            [((base, base + 127), 2), ((base + 128, base + 255), 1)]
        );
        assert_eq!(peers.hosts, [(base + 7, 3)].into());
    }
}
