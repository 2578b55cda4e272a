//! As few networks as hold the same addresses as those that are wanted, also while these come and go. A
//! default route is beside them: it comes behind routes of other tables, and all else before them.

use std::collections::BTreeSet;

use ipnet::IpNet;

/// Networks of which none lies in another and no two could be one, and default routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fewest(BTreeSet<IpNet>);

/// What a change makes of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) new: BTreeSet<IpNet>,
    pub(super) gone: BTreeSet<IpNet>,
}

impl Difference {
    fn add(&mut self, net: IpNet) {
        if !self.gone.remove(&net) {
            self.new.insert(net);
        }
    }

    fn remove(&mut self, net: IpNet) {
        if !self.new.remove(&net) {
            self.gone.insert(net);
        }
    }
}

impl Fewest {
    pub(super) fn of<'n>(nets: impl IntoIterator<Item = &'n IpNet>) -> Self {
        let nets: BTreeSet<IpNet> = nets.into_iter().copied().collect();
        let mut fewest: Vec<IpNet> = Vec::with_capacity(nets.len());
        // In this order each comes behind what holds it.
        for mut net in nets {
            let holder = fewest.last();
            if holder.is_some_and(|holder| !is_default(holder) && holder.contains(&net)) {
                continue;
            }
            while let Some((whole, other)) = half(net)
                && fewest.last() == Some(&other)
            {
                fewest.pop();
                net = whole;
            }
            fewest.push(net);
        }
        Self(fewest.into_iter().collect())
    }

    pub(super) fn nets(&self) -> impl Iterator<Item = IpNet> {
        self.0.iter().copied()
    }

    /// `net` is wanted from now on.
    pub(super) fn add(&mut self, net: IpNet, difference: &mut Difference) {
        if self.holder(net).is_some() {
            return;
        }
        if !is_default(&net) {
            let within = self.0.range(net..);
            let within: Vec<IpNet> = within
                .take_while(|inner| net.contains(*inner))
                .copied()
                .collect();
            for inner in within {
                self.drop(inner, difference);
            }
        }
        let mut net = net;
        // Two halves are one.
        while let Some((whole, other)) = half(net)
            && self.0.contains(&other)
        {
            self.drop(other, difference);
            net = whole;
        }
        self.0.insert(net);
        difference.add(net);
    }

    /// `net` is not wanted any more. `wanted` is what still is, in the same order as here.
    pub(super) fn remove(
        &mut self,
        net: IpNet,
        wanted: &BTreeSet<IpNet>,
        difference: &mut Difference,
    ) {
        if outer(net).any(|outer| wanted.contains(&outer)) {
            return;
        }
        let Some(holder) = self.holder(net) else {
            return;
        };
        self.drop(holder, difference);
        if is_default(&net) {
            return;
        }
        // The other halves on the way down to it.
        let mut rest = net;
        while rest != holder
            && let Some((whole, other)) = half(rest)
        {
            self.add(other, difference);
            rest = whole;
        }
        let within = wanted.range(net..);
        for inner in within.take_while(|inner| net.contains(*inner)) {
            self.add(*inner, difference);
        }
    }

    fn drop(&mut self, net: IpNet, difference: &mut Difference) {
        self.0.remove(&net);
        difference.remove(net);
    }

    /// The one that holds `net`; a default route holds no other.
    pub(super) fn holder(&self, net: IpNet) -> Option<IpNet> {
        outer(net).find(|outer| self.0.contains(outer))
    }
}

fn is_default(net: &IpNet) -> bool {
    net.prefix_len() == 0
}

/// The networks that hold `net`, itself first; of a default route itself alone.
fn outer(net: IpNet) -> impl Iterator<Item = IpNet> {
    let lengths = (net.prefix_len().min(1)..=net.prefix_len()).rev();
    let nets = lengths.filter_map(move |length| IpNet::new(net.addr(), length).ok());
    nets.map(|net| net.trunc())
}

/// The network that `net` is a half of, if that is no default route, and the other half.
fn half(net: IpNet) -> Option<(IpNet, IpNet)> {
    let whole = net.supernet().filter(|whole| !is_default(whole))?;
    let mut halves = whole.subnets(net.prefix_len()).ok()?;
    let other = halves.find(|other| *other != net)?;
    Some((whole, other))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn any_net() -> impl Strategy<Value = IpNet> {
        let length = prop_oneof![Just(0_u8), Just(1), 27_u8..=32];
        (0_u8..32, length, any::<bool>()).prop_map(|(bits, length, v6)| {
            let net = match v6 {
                false => format!("{}.0.0.{bits}/{length}", 10 + (bits & 1) * 128),
                true if length < 2 => format!("fd00::{bits:x}/{length}"),
                true => format!("fd00::{bits:x}/{}", length + 96),
            };
            net.parse::<IpNet>().unwrap().trunc()
        })
    }

    /// What a library makes of them, but for default routes.
    fn aggregated(wanted: &BTreeSet<IpNet>) -> BTreeSet<IpNet> {
        let (whole, nets): (Vec<IpNet>, Vec<IpNet>) = wanted.iter().copied().partition(is_default);
        let nets = IpNet::aggregate(&nets).into_iter().flat_map(|net| {
            // It would be made of two halves.
            let halves = if is_default(&net) {
                1
            } else {
                net.prefix_len()
            };
            net.subnets(halves).unwrap()
        });
        whole.into_iter().chain(nets).collect()
    }

    proptest! {
        #[test]
        fn they_are_always_as_few_as_hold_what_is_wanted(
            changes in prop::collection::vec((any::<bool>(), any_net()), 1..64),
        ) {
            let (mut fewest, mut wanted) = (Fewest::default(), BTreeSet::new());
            for changes in changes.chunks(3) {
                let before = fewest.clone();
                let mut difference = Difference::default();
                for (add, net) in changes {
                    if *add {
                        wanted.insert(*net);
                        fewest.add(*net, &mut difference);
                    } else if wanted.remove(net) {
                        fewest.remove(*net, &wanted, &mut difference);
                    }
                }
                prop_assert_eq!(&fewest, &Fewest::of(&wanted));
                prop_assert_eq!(&fewest.0, &aggregated(&wanted));
                let new: BTreeSet<IpNet> = fewest.0.difference(&before.0).copied().collect();
                let gone: BTreeSet<IpNet> = before.0.difference(&fewest.0).copied().collect();
                prop_assert_eq!(difference, Difference { new, gone });
            }
        }
    }
}
