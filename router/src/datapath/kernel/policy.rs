//! The policy as nf_tables can search it, at the size of the rules.
//!
//! nf_tables finds one thing at a time, so the rules stand by destination: each different CIDR has a chain
//! with the rules for it, one for each list of ports. CIDRs that contain each other are of different levels,
//! each with a map from its CIDRs to their chains: a packet is looked up once in each level, of which there are
//! as many as CIDRs lie within each other. Whose rule it is the sets of sources tell, which rules with the same
//! sources share. So nothing is repeated for each peer or each pair, a new flow costs the rules of
//! its destination, and one source more is one element more.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ipnet::IpNet;

use super::span::{Family, Span, holds, intersect, span, union};
use crate::control::{Policy, Rule};
use crate::datapath::policy::{TCP, UDP, icmp, is_restricted, ports};

/// Sources of rules, of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sources {
    /// Single addresses.
    pub(super) hosts: BTreeSet<u128>,
    /// Ranges, in order.
    pub(super) ranges: Vec<Span>,
    /// Whether these are all addresses of the family.
    pub(super) all: bool,
}

impl Sources {
    fn new(nets: &[IpNet], family: Family) -> Self {
        let is_host = |net: &&IpNet| net.prefix_len() == net.max_prefix_len();
        let hosts = nets.iter().filter(is_host);
        let ranges = union(nets.iter().filter(|net| !is_host(net)), family);
        Self {
            hosts: hosts.filter_map(|net| Some(span(net, family)?.0)).collect(),
            all: ranges == [(0, family.last())],
            ranges,
        }
    }

    fn is_empty(&self) -> bool {
        self.hosts.is_empty() && self.ranges.is_empty()
    }

    fn hold(&self, address: u128) -> bool {
        self.hosts.contains(&address) || holds(&self.ranges, address)
    }

    /// Whether the kernel's sets become these by single addresses alone.
    pub(super) fn is_near(&self, other: &Self) -> bool {
        self.ranges == other.ranges && self.all == other.all
    }

    fn meet(&self, side: &[Span]) -> bool {
        !intersect(&self.ranges, side).is_empty()
            || self.hosts.iter().any(|host| holds(side, *host))
    }
}

/// What a rule lets through to a destination.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Opening {
    /// Destination ports, host order, inclusive; `None`: all, and of protocols without ports.
    pub(super) ports: Option<(u16, u16)>,
    /// Protocols, in order.
    pub(super) protocols: Vec<u8>,
    /// Place of the sources among those of the family.
    pub(super) sources: usize,
}

/// What the rules about one direction let through, of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tree {
    /// Whether there are such rules at all; else everything is let through.
    pub(super) restricted: bool,
    /// Destinations by how many others they lie within, each with the place of its openings: those of a
    /// level are in order and do not overlap.
    pub(super) levels: Vec<Vec<(Span, usize)>>,
    pub(super) openings: Vec<Vec<Opening>>,
}

/// The policy of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Compiled {
    /// The different lists of sources.
    pub(super) sources: Vec<Sources>,
    /// What peers may do.
    pub(super) from: Tree,
    /// What the subnet side may do to peers.
    pub(super) to: Tree,
}

impl Compiled {
    /// Compiles the policy for what peers send, and for what `subnet` sends to them.
    pub(super) fn new(policy: &Policy, family: Family, subnet: &[Span]) -> Self {
        let mut compiled = Self::default();
        let mut places: HashMap<&[IpNet], Option<usize>> = HashMap::new();
        let mut from = BTreeMap::new();
        let mut to = BTreeMap::new();
        for rule in &policy.rules {
            let sources = &mut compiled.sources;
            let place = *places.entry(&rule.sources).or_insert_with(|| {
                let list = Sources::new(&rule.sources, family);
                let list = Some(list).filter(|list| !list.is_empty())?;
                sources.push(list);
                Some(sources.len() - 1)
            });
            let Some(place) = place else {
                continue;
            };
            if rule.direction.covers(true) {
                open(&mut from, rule, place, family);
            }
            let meets = compiled.sources.get(place);
            if rule.direction.covers(false) && meets.is_some_and(|list| list.meet(subnet)) {
                open(&mut to, rule, place, family);
            }
        }
        compiled.from = Tree::new(from, is_restricted(policy, true), family);
        compiled.to = Tree::new(to, is_restricted(policy, false), family);
        compiled
    }

    /// Whether the policy lets a new flow of peers (`from_overlay`) or of the subnet side through, found as
    /// the kernel finds it.
    pub(super) fn allows(
        &self,
        from_overlay: bool,
        [source, destination]: [u128; 2],
        protocol: u8,
        port: u16,
    ) -> bool {
        let tree = if from_overlay { &self.from } else { &self.to };
        let fits = |opening: &Opening| {
            opening.protocols.contains(&protocol)
                && opening
                    .ports
                    .is_none_or(|(first, last)| (first..=last).contains(&port))
                && self
                    .sources
                    .get(opening.sources)
                    .is_some_and(|list| list.hold(source))
        };
        !tree.restricted
            || tree.levels.iter().any(|level| {
                let behind = level.partition_point(|((first, _), _)| *first <= destination);
                let found = behind.checked_sub(1).and_then(|at| level.get(at));
                let found = found.filter(|((_, last), _)| *last >= destination);
                let openings = found.and_then(|(_, place)| tree.openings.get(*place));
                openings.is_some_and(|openings| openings.iter().any(fits))
            })
    }

    /// Whether the kernel's chains become these by single sources more or less.
    pub(super) fn is_near(&self, other: &Self) -> bool {
        let lists = self.sources.iter().zip(&other.sources);
        self.from == other.from
            && self.to == other.to
            && self.sources.len() == other.sources.len()
            && lists.into_iter().all(|(one, other)| one.is_near(other))
    }
}

/// Adds what a rule opens, by destination.
fn open(all: &mut BTreeMap<IpNet, BTreeSet<Opening>>, rule: &Rule, sources: usize, family: Family) {
    let ipv4 = family == Family::V4;
    let named: &[u8] = if rule.protocols.is_empty() {
        &[TCP, UDP]
    } else {
        &rule.protocols
    };
    let mut protocols = [named, &[icmp(ipv4)]].concat();
    protocols.sort_unstable();
    protocols.dedup();
    for destination in &rule.destinations {
        if destination.cidr.addr().is_ipv4() != ipv4 {
            continue;
        }
        let mut by_ports: BTreeMap<_, Vec<u8>> = BTreeMap::new();
        for protocol in &protocols {
            if let Some(open) = ports(rule, &destination.ports, *protocol, ipv4) {
                let open = Some(open).filter(|open| *open != (0, u16::MAX));
                by_ports.entry(open).or_default().push(*protocol);
            }
        }
        let openings = by_ports.into_iter().map(|(ports, protocols)| Opening {
            ports,
            protocols,
            sources,
        });
        all.entry(destination.cidr.trunc())
            .or_default()
            .extend(openings);
    }
}

impl Tree {
    fn new(all: BTreeMap<IpNet, BTreeSet<Opening>>, restricted: bool, family: Family) -> Self {
        let mut tree = Self {
            restricted,
            ..Self::default()
        };
        // In order, a CIDR comes behind those that it lies within.
        let mut around: Vec<IpNet> = Vec::new();
        for (net, openings) in all {
            while around.last().is_some_and(|outer| !outer.contains(&net)) {
                around.pop();
            }
            let Some(span) = span(&net, family) else {
                continue;
            };
            if tree.levels.len() == around.len() {
                tree.levels.push(Vec::new());
            }
            if let Some(level) = tree.levels.get_mut(around.len()) {
                level.push((span, tree.openings.len()));
            }
            tree.openings.push(openings.into_iter().collect());
            around.push(net);
        }
        tree
    }
}

#[cfg(test)]
mod tests;
