//! Who has which allowed IP: what the workers' table is made of, and how it changes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::engine::forward::routes::{Family, PeerId, Prefix, Routes};

/// Prefixes of one family.
#[derive(Debug)]
struct Owners<A> {
    owners: BTreeMap<Prefix<A>, PeerId>,
    /// How many there are of each length.
    lengths: Vec<u32>,
    /// What has changed since the workers' table was made.
    changed: Vec<Prefix<A>>,
}

impl<A> Default for Owners<A> {
    fn default() -> Self {
        Self {
            owners: BTreeMap::new(),
            lengths: vec![0; 129],
            changed: Vec::new(),
        }
    }
}

/// A table that changes in more than one prefix of so many is laid out anew: that costs less.
const MANY: usize = 32;

impl<A: Family> Owners<A> {
    fn insert(&mut self, prefix: Prefix<A>, owner: PeerId) {
        if self.owners.insert(prefix, owner).is_none() {
            self.lengths[usize::from(prefix.1)] += 1;
        }
        self.changed.push(prefix);
    }

    fn remove(&mut self, prefix: Prefix<A>) {
        if self.owners.remove(&prefix).is_some() {
            self.lengths[usize::from(prefix.1)] -= 1;
            self.changed.push(prefix);
        }
    }

    /// Who has a prefix, or else the longest around it.
    fn owner(&self, (first, length): Prefix<A>) -> Option<PeerId> {
        (0..=length)
            .rev()
            .filter(|length| self.lengths[usize::from(*length)] > 0)
            .find_map(|length| self.owners.get(&(first.first(length), length)))
            .copied()
    }

    fn update(&mut self, routes: &mut Routes) {
        let changed = std::mem::take(&mut self.changed);
        if changed.len() > self.owners.len() / MANY {
            if !changed.is_empty() {
                routes.rebuild(self.owners.iter().map(|(prefix, owner)| (*prefix, *owner)));
            }
            return;
        }
        for prefix in changed {
            let (first, length) = prefix;
            let inside = (first, length + 1)..=(first.last(length), u8::MAX);
            let inside = self.owners.range(inside);
            let inside = inside.map(|(prefix, owner)| (*prefix, *owner));
            routes.replace(prefix, self.owner(prefix), inside);
        }
    }
}

/// Every allowed IP and its owner.
#[derive(Debug, Default)]
pub(super) struct AllowedIps {
    v4: Owners<u32>,
    v6: Owners<u128>,
}

impl AllowedIps {
    /// Who has exactly this CIDR, which has no bits beyond its prefix.
    pub(super) fn get(&self, cidr: &IpNet) -> Option<PeerId> {
        let length = cidr.prefix_len();
        match cidr.network() {
            IpAddr::V4(first) => self.v4.owners.get(&(first.to_bits(), length)),
            IpAddr::V6(first) => self.v6.owners.get(&(first.to_bits(), length)),
        }
        .copied()
    }

    /// Gives a CIDR to a peer.
    pub(super) fn insert(&mut self, cidr: &IpNet, owner: PeerId) {
        let length = cidr.prefix_len();
        match cidr.network() {
            IpAddr::V4(first) => self.v4.insert((first.to_bits(), length), owner),
            IpAddr::V6(first) => self.v6.insert((first.to_bits(), length), owner),
        }
    }

    /// Takes a CIDR from a peer, if it has it.
    pub(super) fn remove(&mut self, cidr: &IpNet, owner: PeerId) {
        if self.get(cidr) != Some(owner) {
            return;
        }
        let length = cidr.prefix_len();
        match cidr.network() {
            IpAddr::V4(first) => self.v4.remove((first.to_bits(), length)),
            IpAddr::V6(first) => self.v6.remove((first.to_bits(), length)),
        }
    }

    /// Brings the workers' table in line with all changes since the last call. Costs as much as what
    /// has changed, and what lies inside of that.
    pub(super) fn update(&mut self, routes: &mut Routes) {
        self.v4.update(routes);
        self.v6.update(routes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Few distinct bits, so that prefixes nest and touch.
    fn net() -> impl Strategy<Value = IpNet> {
        let v4 = (any::<u32>(), 0u8..=32).prop_map(|(bits, length)| {
            let address = std::net::Ipv4Addr::from(bits & 0xc000_0f0f);
            IpNet::new(address.into(), length).unwrap().trunc()
        });
        let v6 = (any::<u128>(), 0u8..=128).prop_map(|(bits, length)| {
            let address = std::net::Ipv6Addr::from(bits & (0xe << 124 | 7));
            IpNet::new(address.into(), length).unwrap().trunc()
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        /// Whatever changes in whatever order, the table is as if it had been made anew.
        #[test]
        fn a_changed_table_is_like_a_new_one(
            start in proptest::collection::vec(net(), 0..400),
            changes in proptest::collection::vec((net(), any::<bool>(), 0u32..5), 1..60),
        ) {
            let mut allowed = AllowedIps::default();
            let mut routes = Routes::new([]);
            let mut wanted = BTreeMap::new();
            for (cidr, owner) in start.iter().zip(0..) {
                allowed.insert(cidr, owner);
                wanted.insert(*cidr, owner);
            }
            allowed.update(&mut routes);
            for (cidr, add, owner) in &changes {
                if *add {
                    allowed.insert(cidr, *owner);
                    wanted.insert(*cidr, *owner);
                } else if let Some(owner) = wanted.remove(cidr) {
                    allowed.remove(cidr, owner);
                }
                allowed.update(&mut routes);
            }
            let anew = Routes::new(wanted);
            let nets = start.iter().chain(changes.iter().map(|(cidr, ..)| cidr));
            for address in nets.flat_map(|net| [net.network(), net.broadcast()]) {
                prop_assert_eq!(routes.get(address), anew.get(address), "{}", address);
            }
        }
    }
}
