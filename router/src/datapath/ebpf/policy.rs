//! The policy as the programs search it: see [`router_ebpf::policy`].
//!
//! A rule becomes one clause for each different list of ports among its destinations; a clause is
//! all sources of the rule, the destinations with that list, and its protocols with these ports.
//! Destinations and services are compiled at once (`Targets`). Sources change more often, for they are
//! peers, and are kept so that single ones can come and go (`Sources`).

use std::collections::{BTreeMap, HashMap};
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use ipnet::IpNet;
use router_ebpf::abi::{Address, Prefix};
use router_ebpf::policy::{self as table, Axis, MAX_CLAUSES, Set};

use super::tables::prefix;
use crate::control::{Direction, Policy, Rule};
use crate::datapath::nets::Nets;
use crate::datapath::policy::{NewFlow, TCP, UDP, icmp, ports};

/// Why a policy cannot be put in force, worded for an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the rules have more than {MAX_CLAUSES} different lists of ports together; merge rules that \
     differ in nothing but one of `from`, `to` and `protocols`"
)]
pub struct TooManyClauses;

/// A policy in the form of the programs' tables.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    pub(super) targets: Arc<Targets>,
    pub(super) sources: Arc<Sources>,
}

/// What the clauses let through, but for whose it is.
#[derive(Debug, Default)]
pub(super) struct Targets {
    bank: u32,
    /// In order, so that a prefix stands before those within it.
    prefixes: Vec<Node>,
    sets: Vec<Set>,
    /// By clause: the place of its rule in the policy.
    rules: Vec<usize>,
    /// By rule: its clauses.
    clauses: Vec<Range<u32>>,
}

/// Whose flows the clauses let through.
#[derive(Clone, Debug, Default)]
pub(super) struct Sources {
    /// The clauses of each source of flows that peers open.
    from_overlay: Nets<Vec<u32>>,
    /// The same of flows that the subnet side opens.
    to_overlay: Nets<Vec<u32>>,
    /// How many rules are about each of them.
    rules: [usize; 2],
}

/// A prefix of a destination or a service.
#[derive(Clone, Copy, Debug)]
struct Node {
    address: Address,
    /// Bits of `address` that count.
    len: u32,
    /// Place of its set.
    set: u32,
    /// Place of the longest prefix around it.
    around: Option<u32>,
}

impl Node {
    fn holds(&self, address: &Address, len: u32) -> bool {
        self.len <= len && masked(address, self.len) == self.address
    }
}

impl Compiled {
    /// Compiles `policy` for one of the banks.
    pub fn new(policy: &Policy, bank: u32) -> Result<Self, TooManyClauses> {
        let targets = Targets::new(policy, bank)?;
        let mut sources = Sources::default();
        for (rule, clauses) in policy.rules.iter().zip(&targets.clauses) {
            sources.add(rule.direction, &rule.sources, clauses);
            for from_overlay in [true, false] {
                let covers = rule.direction.covers(from_overlay);
                sources.rules[usize::from(from_overlay)] += usize::from(covers);
            }
        }
        Ok(Self {
            targets: Arc::new(targets),
            sources: Arc::new(sources),
        })
    }

    /// The bank that it is for; zero when it was not compiled from a policy.
    pub fn bank(&self) -> u32 {
        self.targets.bank
    }

    /// Whether some rule is about flows that peers open (`from_overlay`), or about those opened to them.
    pub fn is_restricted(&self, from_overlay: bool) -> bool {
        self.sources.rules[usize::from(from_overlay)] > 0
    }

    /// Whether `flow` may begin, found as the programs find it.
    pub fn allows(&self, from_overlay: bool, flow: &NewFlow) -> bool {
        !self.is_restricted(from_overlay) || self.rule(from_overlay, flow).is_some()
    }

    /// The place of the first rule that lets `flow` through, found as the programs find it.
    pub fn rule(&self, from_overlay: bool, flow: &NewFlow) -> Option<usize> {
        let source = self.sources.set(from_overlay, &flow.source.into());
        let destination = Prefix::host(super::tables::address(flow.destination));
        let key = table::address(self.bank(), Axis::Destination, destination);
        let destination = self.targets.find(&key)?;
        let like = key.address;
        let port = flow.port.to_be_bytes();
        let service = table::service(self.bank(), &like, flow.protocol, port, 16);
        let clause = table::in_common(&source, destination, self.targets.find(&service)?)?;
        self.targets.rules.get(clause as usize).copied()
    }
}

/// Whether two policies differ in nothing but the sources of their rules.
pub(super) fn differ_in_sources(one: &Policy, other: &Policy) -> bool {
    let same = |(one, other): (&Rule, &Rule)| {
        one.direction == other.direction
            && one.protocols == other.protocols
            && one.destinations == other.destinations
    };
    one.rules.len() == other.rules.len() && one.rules.iter().zip(&other.rules).all(same)
}

impl Sources {
    /// Adds the sources of a rule with these clauses.
    pub(super) fn add(&mut self, direction: Direction, nets: &[IpNet], clauses: &Range<u32>) {
        if clauses.is_empty() {
            return;
        }
        self.each(direction, |sources| {
            for net in nets {
                let net = net.trunc();
                if sources.get(&net).is_none() {
                    sources.insert(net, Vec::new());
                }
                if let Some(known) = sources.get_mut(&net) {
                    known.extend(clauses.clone());
                }
            }
        });
    }

    /// Takes away what [`Sources::add`] has added.
    pub(super) fn remove(&mut self, direction: Direction, nets: &[IpNet], clauses: &Range<u32>) {
        self.each(direction, |sources| {
            for net in nets {
                let net = net.trunc();
                let Some(known) = sources.get_mut(&net) else {
                    continue;
                };
                known.retain(|clause| !clauses.contains(clause));
                if known.is_empty() {
                    sources.remove(&net);
                }
            }
        });
    }

    fn each(&mut self, direction: Direction, mut change: impl FnMut(&mut Nets<Vec<u32>>)) {
        if direction.covers(true) {
            change(&mut self.from_overlay);
        }
        if direction.covers(false) {
            change(&mut self.to_overlay);
        }
    }

    /// The sources of one direction.
    pub(super) fn of(&self, from_overlay: bool) -> &Nets<Vec<u32>> {
        if from_overlay {
            &self.from_overlay
        } else {
            &self.to_overlay
        }
    }

    /// The clauses of all sources that contain `net`.
    pub(super) fn set(&self, from_overlay: bool, net: &IpNet) -> Set {
        let mut set = Set::EMPTY;
        for (_, clauses) in self.of(from_overlay).around(net) {
            clauses.iter().for_each(|clause| set.insert(*clause));
        }
        set
    }
}

impl Targets {
    fn new(policy: &Policy, bank: u32) -> Result<Self, TooManyClauses> {
        let mut targets = Self {
            bank,
            ..Self::default()
        };
        let mut members: BTreeMap<(Address, u32), Vec<u32>> = BTreeMap::new();
        for (place, rule) in policy.rules.iter().enumerate() {
            let first = targets.rules.len() as u32;
            for (ports, cidrs) in clauses(rule) {
                let clause = targets.rules.len();
                if clause == MAX_CLAUSES {
                    return Err(TooManyClauses);
                }
                targets.rules.push(place);
                for key in keys(bank, rule, &ports, &cidrs) {
                    members
                        .entry((key.address, key.len))
                        .or_default()
                        .push(clause as u32);
                }
            }
            targets.clauses.push(first..targets.rules.len() as u32);
        }
        targets.fill(members);
        Ok(targets)
    }

    /// Gives each prefix the set of its own clauses and those of the prefixes around it.
    fn fill(&mut self, members: BTreeMap<(Address, u32), Vec<u32>>) {
        let mut places: HashMap<Set, u32> = HashMap::new();
        for ((address, len), own) in members {
            let around = self.innermost(self.prefixes.len(), &address, len);
            let outer = around.and_then(|node| self.node_set(node));
            let mut set = outer.copied().unwrap_or(Set::EMPTY);
            own.into_iter().for_each(|clause| set.insert(clause));
            let place = *places.entry(set).or_insert_with(|| {
                self.sets.push(set);
                self.sets.len() as u32 - 1
            });
            self.prefixes.push(Node {
                address,
                len,
                set: place,
                around,
            });
        }
    }

    /// The place of the longest prefix that holds the first `len` bits of `address`, among those
    /// before place `end`: the last of these, or one around it.
    fn innermost(&self, end: usize, address: &Address, len: u32) -> Option<u32> {
        let mut place = end.checked_sub(1)? as u32;
        loop {
            let node = self.prefixes.get(place as usize)?;
            if node.holds(address, len) {
                return Some(place);
            }
            place = node.around?;
        }
    }

    fn node_set(&self, place: u32) -> Option<&Set> {
        let node = self.prefixes.get(place as usize)?;
        self.sets.get(node.set as usize)
    }

    /// The set of the longest prefix that contains `key`.
    fn find(&self, key: &Prefix) -> Option<&Set> {
        let behind = self
            .prefixes
            .partition_point(|node| (node.address, node.len) <= (key.address, key.len));
        self.node_set(self.innermost(behind, &key.address, key.len)?)
    }

    /// By clause: the place of its rule in the policy.
    pub(super) fn rules(&self) -> &[usize] {
        &self.rules
    }

    /// By rule: its clauses.
    pub(super) fn clauses(&self) -> &[Range<u32>] {
        &self.clauses
    }

    /// Prefixes, each with the place of its set.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = (Prefix, usize)> {
        self.prefixes.iter().map(|node| {
            let Node { address, len, .. } = *node;
            (Prefix { len, address }, node.set as usize)
        })
    }

    /// The sets, by place.
    pub(super) fn sets(&self) -> &[Set] {
        &self.sets
    }
}

/// `address` without the bits beyond the first `len`.
fn masked(address: &Address, len: u32) -> Address {
    let mut bytes = [0; 20];
    let (family, octets) = bytes.split_at_mut(4);
    family.copy_from_slice(&address.family);
    octets.copy_from_slice(&address.octets);
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(8)) {
        let kept = len.saturating_sub(at).min(8);
        *byte &= !(0xff_u16 >> kept) as u8;
    }
    let [f0, f1, f2, f3, octets @ ..] = bytes;
    Address {
        family: [f0, f1, f2, f3],
        octets,
    }
}

/// The different lists of ports of a rule, with the destinations that have them.
fn clauses(rule: &Rule) -> BTreeMap<Vec<(u16, u16)>, Vec<IpNet>> {
    let mut by_cidr: BTreeMap<IpNet, Vec<(u16, u16)>> = BTreeMap::new();
    for destination in &rule.destinations {
        if !destination.ports.is_empty() {
            let ports = (*destination.ports.start(), *destination.ports.end());
            by_cidr
                .entry(destination.cidr.trunc())
                .or_default()
                .push(ports);
        }
    }
    let mut clauses: BTreeMap<Vec<(u16, u16)>, Vec<IpNet>> = BTreeMap::new();
    for (cidr, mut ports) in by_cidr {
        ports.sort_unstable();
        ports.dedup();
        clauses.entry(ports).or_default().push(cidr);
    }
    clauses
}

/// The keys of destinations and services that a clause of `rule` belongs to.
fn keys<'a>(
    bank: u32,
    rule: &'a Rule,
    ranges: &'a [(u16, u16)],
    cidrs: &'a [IpNet],
) -> impl Iterator<Item = Prefix> + 'a {
    let of = move |cidr: &IpNet| table::address(bank, Axis::Destination, prefix(&cidr.trunc()));
    let destinations = cidrs.iter().map(of);
    let families = [(true, Address::v4([0; 4])), (false, Address::v6([0; 16]))];
    let services = families.into_iter().flat_map(move |(ipv4, like)| {
        let mut protocols = if rule.protocols.is_empty() {
            vec![TCP, UDP]
        } else {
            rule.protocols.clone()
        };
        protocols.push(icmp(ipv4));
        protocols.into_iter().flat_map(move |protocol| {
            ranges.iter().flat_map(move |(first, last)| {
                let open = ports(rule, &(*first..=*last), protocol, ipv4);
                let pieces = match open {
                    Some((first, last)) if matches!(protocol, TCP | UDP) => split(first..=last),
                    Some(_) => vec![(0, 0)],
                    None => Vec::new(),
                };
                pieces.into_iter().map(move |(port, bits)| {
                    table::service(bank, &like, protocol, port.to_be_bytes(), bits)
                })
            })
        })
    });
    destinations.chain(services)
}

/// The fewest prefixes that make up a range of ports, each with its number of bits.
fn split(ports: RangeInclusive<u16>) -> Vec<(u16, u32)> {
    let (mut first, end) = (u32::from(*ports.start()), u32::from(*ports.end()) + 1);
    let mut pieces = Vec::new();
    while first < end {
        // As large as its place allows, and as there is room.
        let aligned = first.trailing_zeros().min(16);
        let room = (end - first).ilog2();
        let size = aligned.min(room);
        pieces.push((first as u16, 16 - size));
        first += 1 << size;
    }
    pieces
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::control::Destination;
    use crate::datapath::policy::allows;

    /// A world of 16 addresses in each family, so that prefixes meet.
    fn host(ipv4: bool, number: u8) -> IpAddr {
        if ipv4 {
            Ipv4Addr::new(10, 0, 0, number).into()
        } else {
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, number.into()).into()
        }
    }

    fn net() -> impl Strategy<Value = IpNet> {
        (any::<bool>(), 0u8..16, 0u8..=5).prop_map(|(ipv4, number, wider)| {
            let address = host(ipv4, number);
            let longest = if ipv4 { 32 } else { 128 };
            let len = if wider == 5 { 0 } else { longest - wider };
            IpNet::new(address, len).unwrap().trunc()
        })
    }

    /// Ports at which ranges and prefixes begin and end.
    const PORTS: [u16; 12] = [0, 1, 2, 3, 79, 80, 443, 1023, 1024, 32768, 65534, 65535];

    fn ports() -> impl Strategy<Value = RangeInclusive<u16>> {
        let any = (0..PORTS.len(), 0..PORTS.len()).prop_map(|(a, b)| PORTS[a]..=PORTS[b]);
        prop_oneof![2 => Just(0..=u16::MAX), 5 => any]
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let destination = (net(), ports()).prop_map(|(cidr, ports)| Destination { cidr, ports });
        (
            proptest::collection::vec(net(), 0..4),
            proptest::collection::vec(destination, 0..5),
            proptest::sample::subsequence(vec![1u8, 6, 17, 47, 58], 0..3),
            proptest::sample::select(vec![
                Direction::FromOverlay,
                Direction::ToOverlay,
                Direction::Both,
                Direction::Both,
            ]),
        )
            .prop_map(|(sources, destinations, protocols, direction)| Rule {
                direction,
                sources,
                destinations,
                protocols,
            })
    }

    fn new_flow() -> impl Strategy<Value = NewFlow> {
        (
            any::<bool>(),
            0u8..18,
            0u8..18,
            proptest::sample::select(vec![1u8, 6, 17, 47, 58, 132]),
            proptest::sample::select(PORTS.to_vec()),
        )
            .prop_map(|(ipv4, source, destination, protocol, port)| NewFlow {
                source: host(ipv4, source),
                destination: host(ipv4, destination),
                protocol,
                port,
            })
    }

    fn only(policy: &Policy, place: usize) -> Policy {
        Policy {
            rules: vec![policy.rules[place].clone()],
            ..Policy::default()
        }
    }

    /// The tables agree with the plain meaning, and the rule that they name is the first.
    fn check(policy: &Policy, compiled: &Compiled, flow: &NewFlow) {
        for from in [true, false] {
            let allowed = compiled.allows(from, flow);
            assert_eq!(allowed, allows(policy, from, flow), "{flow:?} {policy:#?}");
            let names = |place: &usize| {
                let about = policy.rules[*place].direction.covers(from);
                about && allows(&only(policy, *place), from, flow)
            };
            let wanted = (0..policy.rules.len()).find(names);
            assert_eq!(compiled.rule(from, flow), wanted, "{flow:?} {policy:#?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn the_tables_mean_what_the_rules_mean(
            rules in proptest::collection::vec(rule(), 1..8),
            flows in proptest::collection::vec(new_flow(), 40),
        ) {
            let policy = Policy { rules, ..Policy::default() };
            let compiled = Compiled::new(&policy, 1).unwrap();
            for flow in &flows {
                check(&policy, &compiled, flow);
            }
        }

        #[test]
        fn ranges_are_split_without_a_gap(a: u16, b: u16) {
            let (first, last) = (a.min(b), a.max(b));
            let mut next = u32::from(first);
            let pieces = split(first..=last);
            prop_assert!(pieces.len() <= 30);
            for (port, bits) in pieces {
                let size = 1u32 << (16 - bits);
                prop_assert_eq!(u32::from(port), next);
                prop_assert_eq!(u32::from(port) % size, 0);
                next += size;
            }
            prop_assert_eq!(next, u32::from(last) + 1);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]

        /// Sets of many words, too.
        #[test]
        fn a_long_list_means_what_its_rules_mean(
            rules in proptest::collection::vec(rule(), 300..1000),
            flows in proptest::collection::vec(new_flow(), 100),
        ) {
            let policy = Policy { rules, ..Policy::default() };
            let compiled = Compiled::new(&policy, 2).unwrap();
            for flow in &flows {
                check(&policy, &compiled, flow);
            }
        }
    }

    fn to(cidr: &str, ports: RangeInclusive<u16>) -> Destination {
        Destination {
            cidr: cidr.parse().unwrap(),
            ports,
        }
    }

    #[test]
    fn destinations_with_the_same_ports_are_one_clause() {
        let rule = Rule {
            sources: vec!["100.64.0.0/10".parse().unwrap()],
            destinations: vec![
                to("10.0.0.1/32", 80..=80),
                to("10.0.0.1/32", 443..=443),
                to("10.0.0.2/32", 443..=443),
                to("10.0.0.2/32", 80..=80),
                to("10.0.0.3/32", 22..=22),
            ],
            ..Rule::default()
        };
        assert_eq!(clauses(&rule).len(), 2);
    }

    #[test]
    fn more_clauses_than_places_are_refused() {
        let one = |port: usize| Rule {
            sources: vec!["100.64.0.0/10".parse().unwrap()],
            destinations: vec![to("10.0.0.0/8", port as u16..=port as u16)],
            protocols: vec![TCP],
            ..Rule::default()
        };
        let rules = |count: usize| Policy {
            rules: (0..count).map(one).collect(),
            ..Policy::default()
        };
        assert!(Compiled::new(&rules(MAX_CLAUSES), 1).is_ok());
        let error = Compiled::new(&rules(MAX_CLAUSES + 1), 1).unwrap_err();
        assert!(error.to_string().contains("4096"), "{error}");
    }

    #[test]
    fn rules_for_the_same_peers_share_a_set() {
        let rules = (1..=1000).map(|port| Rule {
            sources: vec!["100.64.0.0/10".parse().unwrap()],
            destinations: vec![to("10.0.0.0/8", port..=port)],
            protocols: vec![TCP],
            ..Rule::default()
        });
        let policy = Policy {
            rules: rules.collect(),
            ..Policy::default()
        };
        let compiled = Compiled::new(&policy, 1).unwrap();
        // All destinations and ICMP of both families; each port by itself.
        assert_eq!(compiled.targets.sets().len(), 1001);
        assert_eq!(compiled.targets.rules().len(), 1000);
    }
}
