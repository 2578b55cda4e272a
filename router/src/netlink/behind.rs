//! The networks that routes which lead nowhere hold: as few as hold the same addresses as the networks
//! that are wanted, also while those come and go.

use std::collections::BTreeSet;

use ipnet::IpNet;

/// Networks of which none lies in another and no two could be one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Behind(BTreeSet<IpNet>);

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

impl Behind {
    pub(super) fn of<'n>(nets: impl IntoIterator<Item = &'n IpNet>) -> Self {
        let nets: Vec<IpNet> = nets.into_iter().copied().collect();
        Self(IpNet::aggregate(&nets).into_iter().collect())
    }

    pub(super) fn nets(&self) -> impl Iterator<Item = IpNet> {
        self.0.iter().copied()
    }

    /// `net` is wanted from now on.
    pub(super) fn add(&mut self, net: IpNet, difference: &mut Difference) {
        if self.holder(net).is_some() {
            return;
        }
        let within = self.0.range(net..);
        let within: Vec<IpNet> = within
            .take_while(|inner| net.contains(*inner))
            .copied()
            .collect();
        for inner in within {
            self.drop(inner, difference);
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

    fn holder(&self, net: IpNet) -> Option<IpNet> {
        outer(net).find(|outer| self.0.contains(outer))
    }
}

/// The networks that hold `net`, itself first.
fn outer(net: IpNet) -> impl Iterator<Item = IpNet> {
    let lengths = (0..=net.prefix_len()).rev();
    let nets = lengths.filter_map(move |length| IpNet::new(net.addr(), length).ok());
    nets.map(|net| net.trunc())
}

/// The network that `net` is a half of, and the other half.
fn half(net: IpNet) -> Option<(IpNet, IpNet)> {
    let whole = net.supernet()?;
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
        (0_u8..32, 27_u8..=32, any::<bool>()).prop_map(|(bits, length, v6)| {
            let net = match v6 {
                false => format!("10.0.0.{bits}/{length}"),
                true => format!("fd00::{bits:x}/{}", length + 96),
            };
            net.parse::<IpNet>().unwrap().trunc()
        })
    }

    proptest! {
        #[test]
        fn they_are_always_as_few_as_hold_what_is_wanted(
            changes in prop::collection::vec((any::<bool>(), any_net()), 1..64),
        ) {
            let (mut behind, mut wanted) = (Behind::default(), BTreeSet::new());
            for changes in changes.chunks(3) {
                let before = behind.clone();
                let mut difference = Difference::default();
                for (add, net) in changes {
                    if *add {
                        wanted.insert(*net);
                        behind.add(*net, &mut difference);
                    } else if wanted.remove(net) {
                        behind.remove(*net, &wanted, &mut difference);
                    }
                }
                prop_assert_eq!(&behind, &Behind::of(&wanted));
                let new: BTreeSet<IpNet> = behind.0.difference(&before.0).copied().collect();
                let gone: BTreeSet<IpNet> = before.0.difference(&behind.0).copied().collect();
                prop_assert_eq!(difference, Difference { new, gone });
            }
        }
    }
}
