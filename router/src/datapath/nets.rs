//! Values by CIDR, searched by what contains what.

use std::collections::BTreeMap;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A map from CIDRs without host bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nets<V> {
    by_net: BTreeMap<IpNet, V>,
    /// How many CIDRs there are of each length, IPv4 and IPv6: only these lengths are searched.
    lengths: [BTreeMap<u8, usize>; 2],
}

impl<V> Default for Nets<V> {
    fn default() -> Self {
        Self {
            by_net: BTreeMap::new(),
            lengths: Default::default(),
        }
    }
}

impl<V> Nets<V> {
    pub(crate) fn is_empty(&self) -> bool {
        self.by_net.is_empty()
    }

    pub(crate) fn get(&self, net: &IpNet) -> Option<&V> {
        self.by_net.get(net)
    }

    pub(crate) fn get_mut(&mut self, net: &IpNet) -> Option<&mut V> {
        self.by_net.get_mut(net)
    }

    pub(crate) fn insert(&mut self, net: IpNet, value: V) -> Option<V> {
        let before = self.by_net.insert(net, value);
        if before.is_none() {
            *self.lengths_mut(&net).entry(net.prefix_len()).or_default() += 1;
        }
        before
    }

    pub(crate) fn remove(&mut self, net: &IpNet) -> Option<V> {
        let before = self.by_net.remove(net)?;
        let lengths = self.lengths_mut(net);
        if let Some(count) = lengths.get_mut(&net.prefix_len()) {
            *count -= 1;
            if *count == 0 {
                lengths.remove(&net.prefix_len());
            }
        }
        Some(before)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&IpNet, &V)> {
        self.by_net.iter()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &IpNet> {
        self.by_net.keys()
    }

    /// What contains `net`, itself included; the longest first.
    pub(crate) fn around(&self, net: &IpNet) -> impl Iterator<Item = (IpNet, &V)> {
        let net = *net;
        let lengths = &self.lengths[family(&net)];
        let lengths = lengths.range(..=net.prefix_len()).rev();
        lengths.filter_map(move |(len, _)| {
            let outer = cut(&net, *len);
            Some((outer, self.by_net.get(&outer)?))
        })
    }

    /// What lies within `net`, itself included, in order.
    pub(crate) fn inside(&self, net: &IpNet) -> impl Iterator<Item = (&IpNet, &V)> {
        self.by_net.range(*net..=last(net))
    }

    fn lengths_mut(&mut self, net: &IpNet) -> &mut BTreeMap<u8, usize> {
        &mut self.lengths[family(net)]
    }
}

impl<V> FromIterator<(IpNet, V)> for Nets<V> {
    fn from_iter<I: IntoIterator<Item = (IpNet, V)>>(all: I) -> Self {
        let mut nets = Self::default();
        for (net, value) in all {
            nets.insert(net, value);
        }
        nets
    }
}

fn family(net: &IpNet) -> usize {
    usize::from(net.addr().is_ipv6())
}

/// The CIDR of the first `len` bits, which are no more than those of `net`.
fn cut(net: &IpNet, len: u8) -> IpNet {
    match net {
        IpNet::V4(net) => Ipv4Net::new_assert(net.addr(), len).trunc().into(),
        IpNet::V6(net) => Ipv6Net::new_assert(net.addr(), len).trunc().into(),
    }
}

/// The last of all CIDRs within `net`: they are ordered by address, then by length.
fn last(net: &IpNet) -> IpNet {
    match net {
        IpNet::V4(net) => Ipv4Net::new_assert(net.broadcast(), 32).into(),
        IpNet::V6(net) => Ipv6Net::new_assert(net.broadcast(), 128).into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn net() -> impl Strategy<Value = IpNet> {
        let v4 = (0u32..16, prop_oneof![Just(0u8), 27u8..=32]).prop_map(|(host, len)| {
            let address = std::net::Ipv4Addr::from(0x0a00_0000 + host);
            Ipv4Net::new(address, len).unwrap().trunc().into()
        });
        let v6 = (0u128..16, prop_oneof![Just(0u8), 123u8..=128]).prop_map(|(host, len)| {
            let address = std::net::Ipv6Addr::from(u128::MAX - 15 + host);
            Ipv6Net::new(address, len).unwrap().trunc().into()
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn what_contains_and_what_is_contained(
            nets in proptest::collection::vec(net(), 0..12),
            gone in proptest::collection::vec(net(), 0..4),
            asked in net(),
        ) {
            let mut map: Nets<()> = nets.iter().map(|net| (*net, ())).collect();
            let mut plain: std::collections::BTreeSet<IpNet> = nets.into_iter().collect();
            for net in gone {
                prop_assert_eq!(map.remove(&net).is_some(), plain.remove(&net));
            }
            let inside: Vec<_> = plain.iter().filter(|net| asked.contains(*net)).collect();
            prop_assert_eq!(map.inside(&asked).map(|(net, _)| net).collect::<Vec<_>>(), inside);
            let mut around: Vec<_> =
                plain.iter().copied().filter(|net| net.contains(&asked)).collect();
            around.sort_by_key(|net| std::cmp::Reverse(net.prefix_len()));
            prop_assert_eq!(map.around(&asked).map(|(net, ())| net).collect::<Vec<_>>(), around);
        }
    }
}
