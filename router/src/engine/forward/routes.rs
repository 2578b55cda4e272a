//! Allowed IPs: which peer an address belongs to (longest prefix wins).
//!
//! The prefixes are laid out once as sorted, disjoint ranges, so that a lookup is one binary search
//! over plain arrays: 8 bytes per range for IPv4, 20 for IPv6, nothing to chase, nothing to lock.

use std::net::IpAddr;

use ipnet::IpNet;

/// Number of a peer within one engine.
pub(crate) type PeerId = u32;

const NOBODY: PeerId = PeerId::MAX;

/// Ranges of one address family. Range `i` goes from `starts[i]` to the next start.
#[derive(Debug)]
struct Ranges<A> {
    starts: Vec<A>,
    owners: Vec<PeerId>,
}

impl<A: Copy + Ord> Ranges<A> {
    /// `prefixes` are (first, last, owner), each range nested in or disjoint from every other;
    /// `next` gives the address after, or none after the last one.
    fn build(mut prefixes: Vec<(A, A, PeerId)>, zero: A, next: impl Fn(A) -> Option<A>) -> Self {
        // Outer before inner.
        prefixes.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        let mut ranges = Self {
            starts: vec![zero],
            owners: vec![NOBODY],
        };
        let mut enclosing: Vec<(A, PeerId)> = Vec::new();
        for (first, last, owner) in prefixes {
            while let Some((end, _)) = enclosing.last()
                && *end < first
            {
                let end = *end;
                enclosing.pop();
                ranges.resume_after(end, &enclosing, &next);
            }
            ranges.start(first, owner);
            enclosing.push((last, owner));
        }
        while let Some((end, _)) = enclosing.pop() {
            ranges.resume_after(end, &enclosing, &next);
        }
        ranges.starts.shrink_to_fit();
        ranges.owners.shrink_to_fit();
        ranges
    }

    /// A range has ended: what encloses it goes on.
    fn resume_after(&mut self, end: A, enclosing: &[(A, PeerId)], next: &impl Fn(A) -> Option<A>) {
        if let Some(start) = next(end) {
            // An enclosing range that ends at the same address ends in the same moment.
            let owner = enclosing
                .iter()
                .rev()
                .find(|(last, _)| *last > end)
                .map_or(NOBODY, |(_, owner)| *owner);
            self.start(start, owner);
        }
    }

    fn start(&mut self, at: A, owner: PeerId) {
        if self.starts.last() == Some(&at) {
            self.starts.pop();
            self.owners.pop();
        }
        if self.owners.last() != Some(&owner) {
            self.starts.push(at);
            self.owners.push(owner);
        }
    }

    fn get(&self, address: A) -> Option<PeerId> {
        let after = self.starts.partition_point(|start| *start <= address);
        let owner = *self.owners.get(after.checked_sub(1)?)?;
        (owner != NOBODY).then_some(owner)
    }
}

/// The allowed IPs of all peers.
#[derive(Debug)]
pub(crate) struct Routes {
    v4: Ranges<u32>,
    v6: Ranges<u128>,
}

impl Routes {
    /// Lays out the table. No CIDR may occur twice.
    pub(crate) fn new(entries: impl IntoIterator<Item = (IpNet, PeerId)>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (cidr, peer) in entries {
            match cidr {
                IpNet::V4(net) => {
                    v4.push((net.network().to_bits(), net.broadcast().to_bits(), peer));
                }
                IpNet::V6(net) => {
                    v6.push((net.network().to_bits(), net.broadcast().to_bits(), peer));
                }
            }
        }
        Self {
            v4: Ranges::build(v4, 0, |a| a.checked_add(1)),
            v6: Ranges::build(v6, 0, |a| a.checked_add(1)),
        }
    }

    /// Whose address this is.
    pub(crate) fn get(&self, address: IpAddr) -> Option<PeerId> {
        match address {
            IpAddr::V4(address) => self.v4.get(address.to_bits()),
            IpAddr::V6(address) => self.v6.get(address.to_bits()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    /// Few distinct bits, so that prefixes nest and touch.
    fn v4_net() -> impl Strategy<Value = IpNet> {
        (any::<u32>(), 0u8..=32).prop_map(|(bits, length)| {
            let bits = bits & 0xc000_0103;
            IpNet::new(Ipv4Addr::from(bits).into(), length)
                .unwrap()
                .trunc()
        })
    }

    fn v6_net() -> impl Strategy<Value = IpNet> {
        (any::<u128>(), 0u8..=128).prop_map(|(bits, length)| {
            let bits = bits & (0xe << 124 | 7);
            IpNet::new(Ipv6Addr::from(bits).into(), length)
                .unwrap()
                .trunc()
        })
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|b| IpAddr::from(Ipv4Addr::from(b & 0xc000_0103))),
            any::<u32>().prop_map(|b| IpAddr::from(Ipv4Addr::from(b))),
            any::<u128>().prop_map(|b| IpAddr::from(Ipv6Addr::from(b & (0xe << 124 | 7)))),
            any::<u128>().prop_map(|b| IpAddr::from(Ipv6Addr::from(b))),
        ]
    }

    fn naive(entries: &[(IpNet, PeerId)], address: IpAddr) -> Option<PeerId> {
        entries
            .iter()
            .filter(|(net, _)| net.contains(&address))
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, peer)| *peer)
    }

    proptest! {
        #[test]
        fn agrees_with_a_linear_search(
            nets in proptest::collection::btree_set(prop_oneof![v4_net(), v6_net()], 0..40),
            probes in proptest::collection::vec(address(), 50),
        ) {
            let entries: Vec<_> = nets.into_iter().zip(0..).collect();
            let routes = Routes::new(entries.iter().copied());
            let edges = entries
                .iter()
                .flat_map(|(net, _)| [net.network(), net.broadcast()]);
            for address in probes.into_iter().chain(edges) {
                prop_assert_eq!(routes.get(address), naive(&entries, address), "{}", address);
            }
        }
    }

    #[test]
    fn empty_table_owns_nothing() {
        let routes = Routes::new([]);
        assert_eq!(routes.get(IpAddr::from([0, 0, 0, 0])), None);
        assert_eq!(routes.get(IpAddr::from([255; 16])), None);
    }

    #[test]
    fn whole_address_space_and_its_last_address() {
        let routes = Routes::new([
            ("0.0.0.0/0".parse().unwrap(), 1),
            ("255.255.255.255/32".parse().unwrap(), 2),
        ]);
        assert_eq!(routes.get(IpAddr::from([255, 255, 255, 254])), Some(1));
        assert_eq!(routes.get(IpAddr::from([255; 4])), Some(2));
    }
}
